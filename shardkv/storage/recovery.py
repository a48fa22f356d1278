"""Reads the shared log back after a start, and decides what damage means.

The rule: a record that was known to be synced is never given up. Every record says up to which sequence number the log
was synced when it was written. Reading stops at the first record that does not sum up. If any sound record further on
says that the missing one was synced, or the mark that the data directory keeps does, that is Corruption; if none does,
the rest is a torn tail, which nobody was told about, and is cut off before anything is appended.

Memory: one window, one meta section and one entry's data at a time; entries stay on disk until they are asked for, and
of each about 20 bytes are kept: 1 GiB of log, be it of the smallest entries, is recovered within 256 MiB.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, NamedTuple
from zlib import crc32

from shardkv.environment import Disk, File
from shardkv.errors import Corruption, StorageError
from shardkv.storage.group_log import shared_stub
from shardkv.storage.log_state import LogState
from shardkv.storage.record import (
    HEADER_BYTES,
    MAGIC,
    Checkpoint,
    DecodedUpdate,
    Header,
    Malformed,
    decode_meta,
    header_sums_up,
    pack_header,
    unpack_header,
)
from shardkv.storage.segment import (
    PLACE_OFFSET_SHIFT,
    PLACE_SEGMENT_SHIFT,
    SPARE_PREFIX,
    Segment,
    segment_id_of,
    segment_path,
)

WINDOW_BYTES: Final = 1024 * 1024
FIRST_SEGMENT_BYTES: Final = 1024 * 1024
"""The first segment of a new log is no larger, for its node waits while the disk fills it with zeros. The others are
made ahead of time."""

_ADVICE: Final = (
    "this node's log cannot be trusted: do not delete anything; check the disk, then start a node under another name "
    "with an empty data directory"
)


class _Window:
    """Reads a file in large pieces."""

    def __init__(self, file: File) -> None:
        self._file = file
        self.size = file.size()
        self._start = 0
        self._data = b""

    def read(self, offset: int, count: int) -> bytes:
        """``count`` bytes, or fewer at the end of the file."""
        start = offset - self._start
        if start < 0 or start + count > len(self._data):
            self._start, start = offset, 0
            self._data = self._file.pread(max(count, WINDOW_BYTES), offset)
        return self._data[start : start + count]


class _Record(NamedTuple):
    offset: int
    header: Header
    content: list[DecodedUpdate] | Checkpoint


class _Damage(NamedTuple):
    segment: Segment
    offset: int


@dataclass(frozen=True, slots=True)
class Recovered:
    state: LogState
    sequence: int
    """Of the last sound record; everything up to it is synced."""
    cut_bytes: int
    """How much of a torn tail held something and was cut off."""


def recover(disk: Disk, directory: str, seed: int, segment_bytes: int, *, create: bool, mark: int) -> Recovered:
    """Open the log in ``directory``, which was on disk up to record ``mark``, or begin one. Blocks.

    Raises Corruption, StorageError, OutOfSpace.
    """
    ids = [segment_id for name in disk.list(directory) if (segment_id := segment_id_of(name)) is not None]
    if not ids:
        if not create or mark:
            raise Corruption(f"{directory} holds no segment of the log, and this node had one; {_ADVICE}")
        return _begin(disk, directory, seed, segment_bytes)
    ids.sort()
    # Old segments are unlinked oldest first, but a crash may let a later removal survive without an earlier one.
    run = [segment_id for position, segment_id in enumerate(ids) if ids[-1] - segment_id == len(ids) - 1 - position]
    recovery = _Recovery(disk, directory, seed)
    try:
        return recovery.run(run, leftovers=ids[: len(ids) - len(run)], mark=mark)
    except BaseException:
        recovery.close()
        raise


def _begin(disk: Disk, directory: str, seed: int, segment_bytes: int) -> Recovered:
    """The first segment. Its name comes after its checkpoint is synced: an oldest segment without one is damaged."""
    state = LogState()
    meta = state.encode_checkpoint()
    path = f"{directory}/{SPARE_PREFIX}0"
    file = disk.open(path, create=True)
    size = min(segment_bytes, FIRST_SEGMENT_BYTES)
    segment = Segment(1, segment_path(directory, 1), size, file)
    record = pack_header(seed, meta, 0, segment.id, 1, 0) + meta
    file.allocate(size)
    file.pwrite(record, 0)
    file.sync()
    disk.rename(path, segment.path)
    file.renamed(segment.path)
    disk.sync_directory(directory)
    segment.end = len(record)
    state.segments[segment.id] = segment
    return Recovered(state, 1, 0)


class _Recovery:
    def __init__(self, disk: Disk, directory: str, seed: int) -> None:
        self._disk = disk
        self._directory = directory
        self._seed = seed
        self._state = LogState()
        self._sequence = 0
        self._opened: list[File] = []

    def close(self) -> None:
        for file in self._opened:
            file.close()

    def run(self, ids: list[int], leftovers: list[int], mark: int) -> Recovered:
        segments = []
        for segment_id in ids:
            path = segment_path(self._directory, segment_id)
            file = self._disk.open(path)
            self._opened.append(file)
            segments.append(Segment(segment_id, path, file.size(), file))
        damage = self._replay(segments)
        later = [segment for segment in segments if segment.id not in self._state.segments]
        self._judge(damage, later)
        absent = self._state.absent()
        if absent:
            range_id, indexes = absent[0]
            raise Corruption(
                f"{self._directory}: entries {indexes[0]} to {indexes[-1]} of range {range_id} are in no segment "
                f"(and {len(absent) - 1} more ranges miss entries); {_ADVICE}"
            )
        self._read_again(damage, later)
        if self._sequence < mark:
            raise Corruption(
                f"{self._directory}: the log ends with record {self._sequence} at offset {damage.offset} of "
                f"{damage.segment.path}, and was on disk up to record {mark}: the last ones are damaged, newer "
                f"segments were removed, or this is an older copy. Put back what was there, if you can; else {_ADVICE}"
            )
        cut_bytes = self._cut(damage, later)
        for segment_id in leftovers:
            self._disk.unlink(segment_path(self._directory, segment_id))
        # Also if no name went: who gave the newest segment its name may have been killed before that was durable.
        self._disk.sync_directory(self._directory)
        return Recovered(self._state, self._sequence, cut_bytes)

    # Reading

    def _replay(self, segments: list[Segment]) -> _Damage:
        """Apply every sound record in order; where that ended."""
        state = self._state
        damage = _Damage(segments[0], 0)
        for segment in segments:
            assert segment.file is not None, f"{segment.path} is not open"
            window = _Window(segment.file)
            for record in self._records(window, segment):
                if record.offset == 0:
                    self._enter(segment, record)
                else:
                    self._apply(segment, record)
                self._sequence = record.header.sequence
                segment.end = record.offset + record.header.record_bytes
            if segment.id not in state.segments:
                break
            damage = _Damage(segment, segment.end)
        return damage

    def _read_again(self, damage: _Damage, later: list[Segment]) -> None:
        """Give nothing up that only one read could not make out.

        A record that is damaged on disk is damaged each time. One that is sound the second time may have been synced,
        acknowledged and counted on; a node that went on without it would have forgotten its word.
        """
        for segment, offset in (damage, *((each, 0) for each in later[:1])):
            assert segment.file is not None, f"{segment.path} is not open"
            if next(self._records(_Window(segment.file), segment, offset), None) is not None:
                raise StorageError(
                    f"{segment.path}: reading the record at offset {offset} twice gave different bytes; nothing was "
                    "changed: start the node again, and check the disk if this comes back"
                )

    def _records(self, window: _Window, segment: Segment, offset: int = 0) -> Iterator[_Record]:
        while True:
            found = self._summed(window, segment, offset)
            if found is None:
                return
            header, meta = found
            if self._sequence and header.sequence != self._sequence + 1:
                return
            try:
                content = decode_meta(meta)
            except Malformed as error:
                raise Corruption(
                    f"{segment.path}: the record at offset {offset} is sound but {error}; {_ADVICE}"
                ) from error
            if isinstance(content, Checkpoint) != (offset == 0):
                raise Corruption(f"{segment.path}: the record at offset {offset} is out of place; {_ADVICE}")
            if not self._data_sums_up(window, offset, header, content):
                return
            yield _Record(offset, header, content)
            offset += header.record_bytes

    def _summed(self, window: _Window, segment: Segment, offset: int) -> tuple[Header, bytes] | None:
        """The header and meta section at ``offset`` if their checksum holds."""
        raw = window.read(offset, HEADER_BYTES)
        header = unpack_header(raw, segment.id)
        if header is None or offset + header.record_bytes > window.size:
            return None
        meta = window.read(offset + HEADER_BYTES, header.meta_bytes)
        return (header, meta) if header_sums_up(self._seed, raw, meta, header.crc) else None

    @staticmethod
    def _data_sums_up(window: _Window, offset: int, header: Header, content: list[DecodedUpdate] | Checkpoint) -> bool:
        start = offset + HEADER_BYTES + header.meta_bytes
        if isinstance(content, Checkpoint):
            return True
        if header.data_bytes <= WINDOW_BYTES:
            data = memoryview(window.read(start, header.data_bytes))
            for update in content:
                for _, _, size, crc, place in update.entries:
                    # A slice that is too short does not sum up either, but for that of no bytes.
                    if crc32(data[place : place + size]) != crc:
                        return False
            return True
        for update in content:
            for entry in update.entries:
                if crc32(window.read(start + entry.offset, entry.bytes)) != entry.crc:
                    return False
        return True

    def _enter(self, segment: Segment, record: _Record) -> None:
        """The checkpoint at the start of a segment: the beginning, or a check of what was replayed so far."""
        state = self._state
        checkpoint = record.content
        assert isinstance(checkpoint, Checkpoint), f"{segment.path} starts with {checkpoint}"
        if not state.segments:
            state.begin(checkpoint)
        else:
            expected = decode_meta(state.encode_checkpoint())
            if checkpoint != expected:
                raise Corruption(f"{segment.path}: its checkpoint differs from the records before it; {_ADVICE}")
        state.segments[segment.id] = segment

    def _apply(self, segment: Segment, record: _Record) -> None:
        updates = record.content
        assert not isinstance(updates, Checkpoint), f"{segment.path} has a checkpoint at {record.offset}"
        data_offset = record.offset + HEADER_BYTES + record.header.meta_bytes
        base = (segment.id << PLACE_SEGMENT_SHIFT) | (data_offset << PLACE_OFFSET_SHIFT)
        for update in updates:
            items = [shared_stub(entry.term, entry.type, entry.bytes) for entry in update.entries]
            places = [base + (entry.offset << PLACE_OFFSET_SHIFT) + entry.crc for entry in update.entries]
            if update.rewritten:
                self._state.move(update.range_id, segment, update.entries_start, items, places)
            else:
                self._state.apply(update, segment, update.entries_start, items, places)

    # Judging

    def _judge(self, damage: _Damage, later: list[Segment]) -> None:
        """Raise Corruption if the record after the last sound one is known to have been synced."""
        if not self._state.segments:
            raise Corruption(
                f"{damage.segment.path}: the oldest segment has no sound beginning: an older one is missing, or it was "
                f"damaged, or the log belongs to another data directory; {_ADVICE}"
            )
        missing = self._sequence + 1
        for segment, offset in [(damage.segment, damage.offset), *((segment, 0) for segment in later)]:
            witness = self._witness(segment, offset, missing)
            if witness is not None:
                raise Corruption(
                    f"{damage.segment.path}: the record at offset {damage.offset} (number {missing}) is damaged, and "
                    f"the record at offset {witness} of {segment.path} says that it was synced; {_ADVICE}"
                )

    def _witness(self, segment: Segment, offset: int, missing: int) -> int | None:
        """The offset of a sound record from ``offset`` on that says that number ``missing`` was synced."""
        assert segment.file is not None, f"{segment.path} is not open"
        window, probe = _Window(segment.file), _Window(segment.file)
        while offset < window.size:
            data = window.read(offset, WINDOW_BYTES)
            position = data.find(MAGIC)
            while position >= 0:
                found = self._summed(probe, segment, offset + position)
                if found is not None and found[0].synced_sequence >= missing:
                    return offset + position
                position = data.find(MAGIC, position + 1)
            # A magic may lie across the border of two windows.
            offset += max(len(data) - len(MAGIC) + 1, 1)
        return None

    def _cut(self, damage: _Damage, later: list[Segment]) -> int:
        """Remove everything after the last sound record, durably; the bytes that were not zero and went."""
        for segment in reversed(later):
            assert segment.file is not None, f"{segment.path} is not open"
            segment.file.close()
            self._opened.remove(segment.file)
            self._disk.unlink(segment.path)
        file = damage.segment.file
        assert file is not None, f"{damage.segment.path} is not open"
        cut_bytes = _used_bytes(file, damage.offset)
        if cut_bytes:
            file.truncate(damage.offset)
        file.allocate(damage.segment.size)
        # Also without a torn tail: what a killed process wrote and did not sync may be in the page cache alone, and
        # from here on it counts as synced.
        file.sync()
        return cut_bytes


def _used_bytes(file: File, offset: int) -> int:
    """The distance from ``offset`` to the last byte that is not zero."""
    start, used = offset, 0
    while data := file.pread(WINDOW_BYTES, start):
        stripped = data.rstrip(b"\0")
        if stripped:
            used = start + len(stripped) - offset
        start += len(data)
    return used
