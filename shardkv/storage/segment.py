"""One file of the shared Raft log: its name, how far it is filled, who has entries in it, and how it comes to be.

Does not live here: what the records in it say. The rule: a segment gets its final name only when it is zero-filled, and
the directory is synced before anything is written to it.
"""

import re
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from typing import Final

from shardkv.environment import Disk, File
from shardkv.errors import Corruption, OutOfSpace, StorageError
from shardkv.types import RangeId

SEGMENT_SUFFIX: Final = ".wal"
SPARE_PREFIX: Final = "spare-"
"""Of a file that is to become a segment, and may go whenever no process has it."""
RESERVE_PREFIX: Final = "reserve-"

_NAME: Final = re.compile(r"([0-9a-f]{16})\.wal")
_RESERVE: Final = re.compile(RESERVE_PREFIX + "([0-9]+)")

# A place is one int: segment id (32 bits), offset of the data in the segment (32 bits), checksum of the data (32 bits).
PLACE_SEGMENT_SHIFT: Final = 64
PLACE_OFFSET_SHIFT: Final = 32
PLACE_MASK: Final = (1 << 32) - 1


def segment_path(directory: str, segment_id: int) -> str:
    return f"{directory}/{segment_id:016x}{SEGMENT_SUFFIX}"


def segment_id_of(name: str) -> int | None:
    """The id in a file name, or None if that is no segment's."""
    match = _NAME.fullmatch(name)
    return int(match[1], 16) if match else None


class Segment:
    """``file`` is None until the log's writer has made it; until then nothing can be read back from it."""

    __slots__ = ("end", "file", "id", "last_index", "path", "size")

    def __init__(self, segment_id: int, path: str, size: int, file: File | None = None) -> None:
        self.id = segment_id
        self.path = path
        self.size = size
        self.end = 0
        """Where the next record goes."""
        self.file = file
        self.last_index: dict[RangeId, int] = {}
        """For each group with entries here, the highest index: once it is compacted away, none of them is live."""

    def read(self, place: int, count: int) -> tuple[bytes, int]:
        """``count`` bytes of data at ``place``, and the checksum that they should have."""
        assert self.file is not None, f"segment {self.id} was not made yet"
        return self.file.pread(count, (place >> PLACE_OFFSET_SHIFT) & PLACE_MASK), place & PLACE_MASK


def read_entry(segments: dict[int, Segment], place: int, count: int, crc32: Callable[[bytes], int]) -> bytes:
    """An entry's data, read back and checked. Raises Corruption."""
    segment = segments[place >> PLACE_SEGMENT_SHIFT]
    data, crc = segment.read(place, count)
    if len(data) != count or crc32(data) != crc:
        offset = (place >> PLACE_OFFSET_SHIFT) & PLACE_MASK
        raise Corruption(
            f"{segment.path}: the {count} bytes of an entry at offset {offset} are not what was written; "
            "stop the node, check its disk, and start a node under another name with an empty data directory"
        )
    return data


class Places:
    """Places of entries in a row, packed: twelve bytes each, where a list of ints takes 56."""

    __slots__ = ("_sums", "_where")

    def __init__(self, count: int = 0) -> None:
        self._where = array("Q", bytes(8 * count))
        """Segment id and offset."""
        self._sums = array("I", bytes(4 * count))
        """Checksums of the data."""

    def __len__(self) -> int:
        return len(self._where)

    def __getitem__(self, position: int) -> int:
        return (self._where[position] << PLACE_OFFSET_SHIFT) | self._sums[position]

    def __setitem__(self, position: int, place: int) -> None:
        self._where[position] = place >> PLACE_OFFSET_SHIFT
        self._sums[position] = place & PLACE_MASK

    def extend(self, places: Sequence[int]) -> None:
        append_where, append_sum = self._where.append, self._sums.append
        for place in places:
            append_where(place >> PLACE_OFFSET_SHIFT)
            append_sum(place & PLACE_MASK)

    def cut(self, start: int, end: int | None = None) -> None:
        """Drop the places from ``start`` (included) to ``end`` (excluded)."""
        del self._where[start:end]
        del self._sums[start:end]

    def segment_ids(self, end: int | None = None) -> Iterator[int]:
        """The segments of the first places, up to ``end``."""
        shift = PLACE_SEGMENT_SHIFT - PLACE_OFFSET_SHIFT
        return (where >> shift for where in self._where[:end])


def remove_spares(disk: Disk, directory: str) -> bool:
    """Give back the room of the files that a process before this one meant for segments; whether there were any."""
    spares = [name for name in disk.list(directory) if name.startswith(SPARE_PREFIX)]
    for name in spares:
        disk.unlink(f"{directory}/{name}")
    return bool(spares)


class Spares:
    """Makes segment files: ahead of time in a background job, or on the spot if none is ready.

    One more, the reserve, is made ahead of time and taken only when no other can be had. So the disk is known to be
    full while there still is room for the records that were on their way, and for Raft's own after them. It stays for
    the next process: one that starts on a full disk could make no other.
    """

    def __init__(self, disk: Disk, directory: str, segment_bytes: int, reserve_bytes: int) -> None:
        self._disk = disk
        self._directory = directory
        self._segment_bytes = segment_bytes
        self._reserve_bytes = reserve_bytes
        self._made = 0
        self._ready: tuple[str, File] | None = None
        self._reserve: tuple[str, File] | None = None
        self._busy = False
        self.taken = 0
        """How many files have become segments."""
        self.shortage: OutOfSpace | None = None
        """Why the reserve was taken, or could not be made, until there is another."""

    def inherit(self) -> None:
        """Take over the reserve of the process before this one, and remove what else it has left. Before all else."""
        remove_spares(self._disk, self._directory)
        for name in self._disk.list(self._directory):
            match = _RESERVE.fullmatch(name)
            if match is None:
                continue
            path = f"{self._directory}/{name}"
            file = self._disk.open(path)
            if self._reserve is None and file.pread(self._reserve_bytes + 1, 0) == bytes(self._reserve_bytes):
                self._reserve = path, file
                self._made = int(match[1])
            else:
                file.close()
                self._disk.unlink(path)  # unfinished, or of another size

    @property
    def ready(self) -> bool:
        return self._ready is not None

    def prepare(self) -> Callable[[], None] | None:
        """A job that makes the reserve, or else a spare, for any worker thread; None if there are both, or one is being
        made.

        If the job raises OutOfSpace, nothing is lost: ask again once there is space.
        """
        if self._busy:
            return None
        number = self._made + 1
        if self._reserve is None:
            job = partial(self._prepare_reserve, f"{RESERVE_PREFIX}{number}")
        elif self._ready is None:
            job = partial(self._prepare, f"{SPARE_PREFIX}ahead-{number}")
        else:
            return None
        self._busy = True
        self._made = number
        return job

    def _prepare_reserve(self, name: str) -> None:
        try:
            self._reserve = self._make_ahead(name, self._reserve_bytes)
            self.shortage = None
        except OutOfSpace as error:
            self.shortage = error
            raise
        finally:
            self._busy = False

    def _prepare(self, name: str) -> None:
        try:
            self._ready = self._make_ahead(name, self._segment_bytes)
        finally:
            self._busy = False

    def _make_ahead(self, name: str, size: int) -> tuple[str, File]:
        """Begin nothing that cannot be finished: it is tried again and again, and nobody else would find room then."""
        free_bytes = self._disk.free_bytes(self._directory)
        if free_bytes < size:
            raise OutOfSpace(
                f"{free_bytes} bytes are left for a file of {size} bytes in {self._directory}; free space or enlarge "
                "the disk"
            )
        return self._make(name, size)

    def _make(self, name: str, size: int) -> tuple[str, File]:
        """Two threads may be in here at once, each with a name of its own."""
        path = f"{self._directory}/{name}"
        file = self._disk.open(path, create=True)
        try:
            file.truncate(0)
            file.allocate(size)
        except BaseException:
            self._discard(path, file)
            raise
        return path, file

    def _discard(self, path: str, file: File) -> None:
        """Give back the room that an unfinished file takes. That may fail, too: a start removes what is left."""
        file.close()
        with suppress(StorageError, FileNotFoundError):
            self._disk.unlink(path)

    def install(self, segment: Segment) -> None:
        """Give ``segment`` a file under its name, durably. Blocks; called by the log's writer only.

        If it raises OutOfSpace, nothing has changed and it may be called again.
        """
        path, file = self._take(segment)
        try:
            self._disk.rename(path, segment.path)
        except OutOfSpace:
            self._discard(path, file)
            raise
        file.renamed(segment.path)
        try:
            self._disk.sync_directory(self._directory)
        except OutOfSpace as error:
            raise StorageError(
                f"{error}; what the log holds is unknown, so restart the node when there is room"
            ) from error
        segment.file = file
        self.taken += 1

    def _take(self, segment: Segment) -> tuple[str, File]:
        """The file that becomes ``segment``, of its size, but for the reserve, which grows as it is written to."""
        ready = self._ready
        if ready is not None:
            # Else it is not touched: this moment the other thread may have one ready.
            self._ready = None
        try:
            if ready is None:
                ready = self._make(f"{SPARE_PREFIX}now-{segment.id}", self._segment_bytes)
            path, file = ready
            if segment.size > self._segment_bytes:
                try:
                    file.allocate(segment.size)
                except OutOfSpace:
                    self._discard(path, file)
                    raise
        except OutOfSpace as error:
            reserve = self._reserve
            if reserve is None:
                raise
            self.shortage = error
            self._reserve = None
            # A segment for one large record would be full with it, and the next one is not to be had.
            segment.size = max(segment.size, self._reserve_bytes)
            return reserve
        return path, file

    def close(self) -> None:
        for spare in (self._ready, self._reserve):
            if spare is not None:
                spare[1].close()
        self._ready = self._reserve = None
