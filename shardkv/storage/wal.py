"""The shared Raft log of a node: one record a turn for all its groups, in segments that are filled, kept and dropped.

Lives here: appending, the write job, rotation, collection. Does not live here: formats (:mod:`record`), what an update
means (:mod:`log_state`), starting (:mod:`recovery`). The rule: the loop encodes and updates memory and never touches a
file but to read back old entries; files are written by jobs that it hands to one writer thread, in order.

A failed write or sync is final: nobody knows what is on the disk after it, so the log refuses everything from then on
and the process should end. Only a write that met a full disk is not: what it was to write stays first in the queue, and
the same bytes go to the same place once there is room, before anything else is written.
"""

from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Final, NamedTuple

from shardkv.environment import Disk
from shardkv.errors import OutOfSpace, StorageError
from shardkv.raft.messages import Entry
from shardkv.storage.collection import dead_segments, live_bytes, moves_from
from shardkv.storage.group_log import EntryCache, GroupLog
from shardkv.storage.log_state import LogState
from shardkv.storage.record import (
    HEADER_BYTES,
    CompactLog,
    CreateGroup,
    LogUpdate,
    ResetLog,
    Tombstone,
    encode_turn,
    pack_header,
    seed_of,
)
from shardkv.storage.recovery import recover
from shardkv.storage.segment import PLACE_OFFSET_SHIFT, PLACE_SEGMENT_SHIFT, Segment, Spares, segment_path
from shardkv.types import RangeId, ReplicaId

__all__ = [
    "CompactLog",
    "CreateGroup",
    "GroupLog",
    "LogUpdate",
    "ResetLog",
    "Tombstone",
    "Wal",
    "WalSettings",
    "WalStatistics",
]

SEGMENT_BYTES_MAX: Final = 1 << 30
"""Offsets in a segment have 32 bits, and a single record may make it larger than set."""
RECORD_DATA_BYTES_MAX: Final = 64 * 1024 * 1024
"""A turn with more entry data than this becomes several records; the entries of one group stay together. Recovery takes
nothing of a size that cannot be for a record, and while a sync lasts long very many groups may collect."""


@dataclass(frozen=True, slots=True)
class WalSettings:
    """All of these may be changed between two starts."""

    segment_bytes: int = 16 * 1024 * 1024
    reserve_bytes: int = 8 * 1024 * 1024
    """So much more is made ahead of time, and written to only when no segment can be made: for the client data that
    are on their way when the disk turns out to be full, and for what Raft writes of its own until there is room."""
    cache_bytes_max: int = 32 * 1024 * 1024
    """Entry data kept in memory, over all groups."""
    move_live_fraction_max: float = 0.25
    """The oldest segment's live entries are moved forward when they are no more than this part of it."""
    closed_segments_max: int = 16
    """With more closed segments than this, the oldest one's live entries are moved however many they are, as long as
    new records pay for it: see ``moved_per_new_byte``."""
    moved_per_new_byte: int = 4
    """Beyond that many segments, so many bytes are moved for each byte that is new. Where most of the log is live,
    moving frees next to nothing, and a log that is written to no more would be written anew for ever; so the log may
    be a quarter larger than what is live in it."""
    move_bytes_max: int = 256 * 1024
    move_entries_max: int = 1_000
    """At most this is moved by one collection, for it is read and encoded in the loop."""


@dataclass(frozen=True, slots=True)
class WalStatistics:
    """A frozen picture of the log."""

    groups: int
    tombstones: int
    segments: int
    """The one written to among them."""
    segment_bytes: int
    """Of all segments, as they lie on disk."""
    oldest_segment_id: int
    sequence: int
    """Number of the last record encoded."""
    synced_sequence: int
    """Number of the last record known to be on disk."""
    cached_bytes: int
    records: int
    """Encoded since the start."""
    syncs: int
    """Of segment files, since the start."""
    written_bytes: int
    """Since the start."""
    moved_entries: int
    """Written again to free old segments, since the start."""
    cut_bytes: int
    """Of a torn tail, when the log was opened."""
    spare_ready: bool
    failed: bool


class _Write(NamedTuple):
    segment: Segment
    offset: int
    data: bytes
    sequence: int


def _place(segment: Segment, offset: int) -> int:
    return (segment.id << PLACE_SEGMENT_SHIFT) | (offset << PLACE_OFFSET_SHIFT)


class Wal:
    """All methods but :meth:`open` and the jobs are for the loop; jobs go to the writer thread, in order."""

    def __init__(
        self,
        disk: Disk,
        directory: str,
        settings: WalSettings,
        seed: int,
        spares: Spares,
        state: LogState,
        sequence: int,
    ) -> None:
        self._disk = disk
        self._directory = directory
        self._settings = settings
        self._seed = seed
        self._spares = spares
        self._state = state
        self._segment = next(reversed(state.segments.values()))
        self._sequence = sequence
        self._synced_sequence = sequence
        self._synced_place = _place(self._segment, self._segment.end)
        """Every record before it is on disk."""
        self._queue: deque[_Write] = deque()
        """Encoded and not yet written; bounded by what the owner encodes before it waits for a job."""
        self._cache = EntryCache(settings.cache_bytes_max)
        self._failure: BaseException | None = None
        self._collected = (-1, -1)
        """What the state looked like when a collection last found nothing to do."""
        self._records = 0
        self._syncs = 0
        self._written_bytes = 0
        self._moved_entries = 0
        self._moves_paid = 0
        """How many bytes may yet be moved out of segments of which much is live."""
        self._cut_bytes = 0

    @classmethod
    def open(
        cls,
        disk: Disk,
        directory: str,
        settings: WalSettings = WalSettings(),
        *,
        token: bytes = b"",
        create: bool = True,
        mark: int = 0,
    ) -> "Wal":
        """Recover the log in ``directory``, or begin one. Blocks; run it in a worker thread.

        ``token`` is the data directory's own; every checksum starts from it. Say ``create=False`` for a directory that
        is a node's already: an empty log there has been lost, and with it votes (trap 24). ``mark`` is a
        :attr:`synced_sequence` of before: a log that ends earlier has lost what others count on. Raises Corruption (the
        message says where and what to do), StorageError, OutOfSpace.
        """
        assert 0 < settings.segment_bytes <= SEGMENT_BYTES_MAX, f"{settings.segment_bytes} bytes a segment"
        seed = seed_of(token)
        spares = Spares(disk, directory, settings.segment_bytes, settings.reserve_bytes)
        disk.make_directory(directory)
        try:
            spares.inherit()
            recovered = recover(disk, directory, seed, settings.segment_bytes, create=create, mark=mark)
        except BaseException:
            spares.close()
            raise
        wal = cls(disk, directory, settings, seed, spares, recovered.state, recovered.sequence)
        wal._cut_bytes = recovered.cut_bytes
        return wal

    @property
    def groups(self) -> dict[RangeId, GroupLog]:
        """Every group created and not yet released. Read only."""
        return self._state.groups

    @property
    def tombstones(self) -> dict[RangeId, ReplicaId]:
        """For each range, the highest replica id that has ended on this node. Read only."""
        return self._state.tombstones

    @property
    def synced_sequence(self) -> int:
        """Number of the last record on disk."""
        return self._synced_sequence

    # Appending

    def append(self, updates: Sequence[LogUpdate]) -> Callable[[], None]:
        """Encode one record for the whole turn and take it into memory; the job that makes it durable.

        A turn of very much data becomes several records, and a crash may leave only the first of them. Without updates
        there is no record, and the job makes durable what was appended before.

        Hand the job to the writer thread; when it has returned, this record and all before it are on disk. Jobs may
        be merged: each writes all that is queued when it starts, with one sync, and one that finds its record synced
        returns at once. A job that raises OutOfSpace has made nothing of its record known and may be run again, until
        it returns. Updates of one group apply in their order. Raises StorageError once the log has failed.
        """
        if self._failure is not None:
            raise self._refusal()
        if not updates:
            return partial(self._write_through, self._sequence)
        meta, pieces, crcs, data_bytes = encode_turn(updates)
        if data_bytes > RECORD_DATA_BYTES_MAX and len(updates) > 1:
            half = len(updates) // 2
            self.append(updates[:half])
            return self.append(updates[half:])
        write, base = self._place_record(meta, pieces, data_bytes)
        self._moves_paid += (HEADER_BYTES + len(meta) + data_bytes) * self._settings.moved_per_new_byte
        try:
            self._apply(updates, write.segment, base, crcs)
        except BaseException as error:
            # The record says something that cannot be: it must not reach the disk.
            self._failure = error
            raise
        self._queue.append(write)  # not before: the writer takes whatever it finds there
        # Both are the writer's: read in the opposite order, the sequence number is never ahead of the place.
        synced_sequence = self._synced_sequence
        self._cache.trim(synced_sequence, self._synced_place)
        return partial(self._write_through, self._sequence)

    def _place_record(self, meta: bytes, pieces: Sequence[bytes], data_bytes: int) -> tuple[_Write, int]:
        """A record that is to be queued, in a new segment if it does not fit, and the place of its data."""
        record_bytes = HEADER_BYTES + len(meta) + data_bytes
        segment = self._segment
        if segment.end + record_bytes > segment.size:
            segment = self._rotate(record_bytes)
        sequence = self._sequence + 1
        header = pack_header(self._seed, meta, data_bytes, segment.id, sequence, self._synced_sequence)
        self._sequence = sequence
        offset = segment.end
        write = _Write(segment, offset, b"".join((header, meta, *pieces)), sequence)
        segment.end = offset + record_bytes
        self._records += 1
        data_offset = offset + HEADER_BYTES + len(meta)
        return write, _place(segment, data_offset)

    def _rotate(self, record_bytes: int) -> Segment:
        """Begin a segment with a checkpoint and room for a record. Its file comes to be when the writer gets there."""
        meta = self._state.encode_checkpoint()
        segment_id = self._segment.id + 1
        # Were it hardly larger than what it begins with, every turn of a node with many ranges would begin another.
        size = max(self._settings.segment_bytes, 4 * len(meta), HEADER_BYTES + len(meta) + record_bytes)
        assert size <= 2 * SEGMENT_BYTES_MAX, f"a record of {record_bytes} bytes"
        segment = Segment(segment_id, segment_path(self._directory, segment_id), size)
        # The writer syncs the old segment before it writes to a new one, so by the time this stands on disk, all
        # before it is synced.
        header = pack_header(self._seed, meta, 0, segment_id, self._sequence + 1, self._sequence)
        self._sequence += 1
        self._queue.append(_Write(segment, 0, header + meta, self._sequence))
        segment.end = HEADER_BYTES + len(meta)
        self._state.segments[segment_id] = self._segment = segment
        self._records += 1
        return segment

    def _apply(self, updates: Sequence[LogUpdate], segment: Segment, base: int, crcs: list[int]) -> None:
        apply, add, sequence = self._state.apply, self._cache.add, self._sequence
        number = 0
        for update in updates:
            entries = update.entries
            if not entries:
                apply(update, segment, 0, (), ())
                continue
            places = []
            start = base
            first = index = entries[0].index
            for entry in entries:
                assert entry.index == index, f"range {update.range_id}: entry {entry.index} follows {index - 1}"
                index += 1
                places.append(base + crcs[number])
                number += 1
                base += len(entry.data) << PLACE_OFFSET_SHIFT
            log = apply(update, segment, first, entries, places)
            assert log is not None, f"range {update.range_id} is not in the log"
            add(sequence, log, first, index - 1, (base - start) >> PLACE_OFFSET_SHIFT)

    # The writer thread

    def _write_through(self, sequence: int) -> None:
        """Make all that is queued durable, with one sync for each segment that it touches."""
        if self._failure is not None:
            raise self._refusal()
        if self._synced_sequence >= sequence:
            return
        try:
            self._write_queued()
        except OutOfSpace:
            # Whatever part of the record is on disk, the queue still begins with it.
            raise
        except BaseException as error:
            self._failure = error
            if isinstance(error, StorageError) or not isinstance(error, Exception):
                raise
            raise StorageError(f"writing the log in {self._directory} failed: {error!r}; the node must end") from error

    def _write_queued(self) -> None:
        queue = self._queue
        segment: Segment | None = None
        sequence, end = self._synced_sequence, 0
        for _ in range(len(queue)):
            write = queue[0]
            if write.segment is not segment:
                if segment is not None:
                    self._sync(segment, sequence, end)
                segment = write.segment
                if segment.file is None:
                    self._spares.install(segment)
            assert segment.file is not None, f"{segment.path} is not open"
            segment.file.pwrite(write.data, write.offset)
            queue.popleft()
            end = write.offset + len(write.data)
            self._written_bytes += len(write.data)
            sequence = write.sequence
        if segment is not None:
            self._sync(segment, sequence, end)

    def _sync(self, segment: Segment, sequence: int, end: int) -> None:
        """Make a segment durable up to ``end``, where record ``sequence`` ends."""
        assert segment.file is not None, f"{segment.path} is not open"
        try:
            segment.file.sync()
        except OutOfSpace as error:
            # Not to be tried again: the system may have dropped the data, and a second sync would say that all is well.
            raise StorageError(
                f"{error}; what the log holds is unknown, so restart the node when there is room"
            ) from error
        self._syncs += 1
        self._synced_place = _place(segment, end)
        self._synced_sequence = sequence

    def _refusal(self) -> StorageError:
        return StorageError(
            f"the log in {self._directory} has failed before ({self._failure!r}) and takes nothing more; "
            "the node must end"
        )

    # Housekeeping

    def prepare(self) -> Callable[[], None] | None:
        """A job for any worker thread that makes the reserve, or the next segment's file ahead of time; None if that is
        done.

        Ask until it answers None, whenever :attr:`spares_taken` has changed. The job may raise OutOfSpace: nothing is
        lost, but when the segment that is written to is full and the reserve, too, nothing can be logged until there is
        room. So refuse new commands at once.
        """
        return self._spares.prepare()

    @property
    def spares_taken(self) -> int:
        """How many segments were made since the start."""
        return self._spares.taken

    @property
    def shortage(self) -> OutOfSpace | None:
        """Why there is no reserve: it is written to now, or was, or could not be made. None if it is there, or is made
        for the first time."""
        return self._spares.shortage

    def collect(self) -> Callable[[], None] | None:
        """A job for the writer thread that frees old segments; None if there is nothing to do.

        Where few entries hold back the oldest segment, this appends copies of them to the log (reading them back, up
        to a bound). Call again until it answers None, with turns in between.
        """
        if self._failure is not None:
            raise self._refusal()
        seen = (self._state.freed, self._segment.id)
        if len(self._state.segments) < 2 or self._collected == seen:
            return None
        dead = dead_segments(self._state)
        moved = False
        if not dead:
            if self._spares.shortage is not None:
                return None  # what room is left is not for copies, even where they would give back more in the end
            moved = self._move_stragglers()
            if not moved:
                self._collected = seen
                return None
            dead = dead_segments(self._state)
        for segment in dead:
            del self._state.segments[segment.id]
        return partial(self._drop, self._sequence, dead)

    def _move_stragglers(self) -> bool:
        """Copy live entries of the oldest segment to the end of the log, if that is worth it."""
        settings, state = self._settings, self._state
        oldest = next(iter(state.segments.values()))
        bound = int(settings.move_live_fraction_max * oldest.size)
        paid = False
        if len(state.segments) <= settings.closed_segments_max + 1:
            self._moves_paid = 0
        else:
            paid = self._moves_paid > 0
        if not paid and live_bytes(state, oldest, bound + 1) > bound:
            return False
        moves = moves_from(state, oldest, settings.move_entries_max, settings.move_bytes_max)
        updates = []
        for move in moves:
            entries: Sequence[Entry] = move.log.entries(move.first, move.last + 1, 1 << 62)
            updates.append(LogUpdate(move.log.range_id, entries=entries))
        meta, pieces, crcs, data_bytes = encode_turn(updates, rewritten=True)
        write, base = self._place_record(meta, pieces, data_bytes)
        self._queue.append(write)
        number = 0
        for update in updates:
            places = []
            for entry in update.entries:
                places.append(base + crcs[number])
                number += 1
                base += len(entry.data) << PLACE_OFFSET_SHIFT
            first = update.entries[0].index
            log = state.move(update.range_id, write.segment, first, update.entries, places)
            moved_bytes = sum(len(entry.data) for entry in update.entries)
            self._cache.add(self._sequence, log, first, first + len(update.entries) - 1, moved_bytes)
        self._moved_entries += number
        if paid:
            self._moves_paid -= HEADER_BYTES + len(meta) + data_bytes
        return True

    def _drop(self, sequence: int, dead: list[Segment]) -> None:
        # What made these segments dead must be on disk before they go.
        self._write_through(sequence)
        try:
            for segment in list(dead):
                assert segment.file is not None, f"{segment.path} was never made"
                segment.file.close()
                self._disk.unlink(segment.path)
                dead.remove(segment)
            self._disk.sync_directory(self._directory)
        except OutOfSpace:
            # Some file systems need room to remove a file, too. The job may be run again, and goes on where it was.
            raise
        except BaseException as error:
            self._failure = error
            raise

    def require_in_place(self) -> None:
        """Raise FileNotFoundError if the segment that is written to lies no more where a start will look for it.

        For any worker thread. A file that was removed or replaced takes every write, and a start would never see them.
        """
        segments = self._state.segments
        segment = segments.get(self._synced_place >> PLACE_SEGMENT_SHIFT)
        if segment is None or segment.file is None or segment.file.is_at(segment.path):
            return
        if segment.id in segments:  # else it was dropped a moment ago
            raise FileNotFoundError(f"{segment.path} was removed, or another file was put in its place")

    def statistics(self) -> WalStatistics:
        segments = self._state.segments
        return WalStatistics(
            groups=len(self.groups),
            tombstones=len(self.tombstones),
            segments=len(segments),
            segment_bytes=sum(segment.size for segment in segments.values()),
            oldest_segment_id=next(iter(segments)),
            sequence=self._sequence,
            synced_sequence=self._synced_sequence,
            cached_bytes=self._cache.bytes,
            records=self._records,
            syncs=self._syncs,
            written_bytes=self._written_bytes,
            moved_entries=self._moved_entries,
            cut_bytes=self._cut_bytes,
            spare_ready=self._spares.ready,
            failed=self._failure is not None,
        )

    def close(self) -> None:
        """Write what is queued and close the files. Blocks. What a full disk has no room for, nobody was told of."""
        try:
            if self._failure is None:
                with suppress(OutOfSpace):
                    self._write_through(self._sequence)
        finally:
            self._spares.close()
            for segment in self._state.segments.values():
                if segment.file is not None:
                    segment.file.close()

    def check(self) -> None:
        self._state.check()
        self._cache.check()
        assert self._synced_sequence <= self._sequence, f"synced {self._synced_sequence} of {self._sequence}"
        assert self._segment.end <= self._segment.size, f"{self._segment.end} bytes in {self._segment.size}"
        for segment in self._state.segments.values():
            assert segment is self._segment or segment.end <= segment.size, f"{segment.path} ends at {segment.end}"
