"""One Raft group's part of the shared log, as its Raft core reads it, and the cache of all groups' entry data.

Lives here: which entries a group has, where they lie, its hard state and compaction point. Does not live here: how
that gets to the disk. The rule: a group's state changes only through the methods that take an update, in the order in
which the records are written, so that recovery, which calls the same methods, arrives at the same state.
"""

from collections import deque
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Final, NamedTuple
from zlib import crc32

from shardkv.errors import StorageError
from shardkv.raft.errors import Compacted, SnapshotTemporarilyUnavailable, Unavailable
from shardkv.raft.messages import NONE, ConfState, Entry, EntryType, HardState, Snapshot
from shardkv.raft.storage import ENTRY_OVERHEAD_BYTES
from shardkv.storage.record import (
    CompactLog,
    CreateGroup,
    GroupMeta,
    ResetLog,
    Tombstone,
    pack_group,
    pack_group_tail,
)
from shardkv.storage.segment import PLACE_MASK, Places, Segment, read_entry
from shardkv.types import RangeId

CACHE_ENTRY_BYTES: Final = 256
"""What a cached entry costs beside its data."""
SHARED_STUBS_MAX: Final = 16_384

_TYPES: Final = (EntryType.NORMAL, EntryType.CONF_CHANGE, EntryType.CONF_CHANGE_V2)


class Stub(NamedTuple):
    """An entry whose data are on disk only. Its term stands first, as in an Entry."""

    term: int
    type: int
    bytes: int


@lru_cache(maxsize=SHARED_STUBS_MAX)
def shared_stub(term: int, type_: int, bytes_: int) -> Stub:
    """Many entries are alike without their data; they share one object."""
    return Stub(term, type_, bytes_)


ABSENT: Final = Stub(-1, 0, 0)
"""During recovery: an entry that a checkpoint promises but no segment has shown yet. It lay in a segment that is gone,
so a later record must compact it away or bring it back."""


def _data_bytes(item: Entry | Stub) -> int:
    return len(item.data) if isinstance(item, Entry) else item.bytes


class GroupLog:
    """Implements :class:`shardkv.raft.storage.RaftStorage`."""

    __slots__ = (
        "_items",
        "_places",
        "_segments",
        "_tail",
        "applied_conf_state",
        "compact_index",
        "compact_term",
        "conf_state",
        "data_bytes",
        "hard_state",
        "payload",
        "range_id",
        "replica_id",
        "snapshot_source",
        "tombstone",
        "unreadable",
    )

    def __init__(self, segments: dict[int, Segment], range_id: RangeId, create: CreateGroup) -> None:
        self.range_id = range_id
        self.replica_id = create.replica_id
        self.hard_state = HardState(create.term, NONE, create.index)
        self.conf_state = create.conf_state
        """As of the last create or reset."""
        self.applied_conf_state: ConfState | None = None
        """What :meth:`initial_state` answers instead, if set: the owner knows the applied configuration, and sets it
        before it makes the core."""
        self.payload = create.payload
        self.compact_index = create.index
        self.compact_term = create.term
        self.tombstone: Tombstone | None = None
        """Set once the group has ended; its log stays readable until it is released."""
        self.snapshot_source: Callable[[], Snapshot] | None = None
        """What :meth:`snapshot` asks; set by the owner."""
        self.unreadable: Callable[[StorageError], None] | None = None
        """Told, before it is raised, of the error when an entry cannot be read back; set by the owner. Whoever asked
        for it may not be the one to whom it matters: a peer's message may be what has it read."""
        self._segments = segments
        self.data_bytes = 0
        """Of all entries that are held, in memory or not."""
        self._items: list[Entry | Stub] = []
        self._places = Places()
        """Parallel to ``_items``: where each entry's data lie."""
        self._tail: bytes | None = None

    @classmethod
    def from_meta(cls, segments: dict[int, Segment], meta: GroupMeta) -> "GroupLog":
        """A group as a checkpoint describes it, its entries still :data:`ABSENT`."""
        create = CreateGroup(meta.replica_id, meta.compact_index, meta.compact_term, meta.conf_state, meta.payload)
        log = cls(segments, meta.range_id, create)
        log.hard_state = meta.hard_state
        log.tombstone = meta.tombstone
        count = meta.last_index - meta.compact_index
        log._items = [ABSENT] * count
        log._places = Places(count)
        return log

    # What the Raft core reads

    def initial_state(self) -> tuple[HardState, ConfState]:
        return self.hard_state, self.conf_state if self.applied_conf_state is None else self.applied_conf_state

    def first_index(self) -> int:
        return self.compact_index + 1

    def last_index(self) -> int:
        return self.compact_index + len(self._items)

    def term(self, index: int) -> int:
        position = index - self.compact_index - 1
        if position < 0:
            if position == -1:
                return self.compact_term
            raise Compacted(f"entry {index} of a log that begins at {self.first_index()}")
        if position >= len(self._items):
            raise Unavailable(f"entry {index} of a log that ends at {self.last_index()}")
        return self._items[position][0]

    def type(self, index: int) -> int:
        return self._items[index - self.compact_index - 1].type

    def entries(self, lo: int, hi: int, bytes_max: int) -> Sequence[Entry]:
        """Entries from ``lo`` to below ``hi``, cut at ``bytes_max`` but at least one. May read from the disk.

        Raises Compacted, Unavailable, StorageError (Corruption).
        """
        offset = self.compact_index + 1
        items = self._items
        if lo < offset:
            raise Compacted(f"entry {lo} of a log that begins at {offset}")
        if hi > offset + len(items):
            raise Unavailable(f"entries to {hi} of a log that ends at {self.last_index()}")
        found: list[Entry] = []
        size = 0
        for index in range(lo, hi):
            item = items[index - offset]
            if isinstance(item, Entry):
                size += ENTRY_OVERHEAD_BYTES + len(item.data)
            else:
                size += ENTRY_OVERHEAD_BYTES + item.bytes
            if size > bytes_max and found:
                break
            found.append(item if isinstance(item, Entry) else self._read(index, item))
        return found

    def _read(self, index: int, stub: Stub) -> Entry:
        assert stub is not ABSENT, f"entry {index} of range {self.range_id} was never found"
        try:
            data = read_entry(self._segments, self._places[index - self.compact_index - 1], stub.bytes, crc32)
        except StorageError as error:
            if self.unreadable is not None:
                self.unreadable(error)
            raise
        return Entry(stub.term, index, _TYPES[stub.type], data)

    def snapshot(self) -> Snapshot:
        if self.snapshot_source is None:
            raise SnapshotTemporarilyUnavailable("nobody makes snapshots of this group yet")
        return self.snapshot_source()

    @property
    def ended(self) -> bool:
        return self.tombstone is not None

    # How it changes

    def reset(self, reset: ResetLog) -> None:
        assert not self.ended, f"range {self.range_id} has ended"
        assert reset.index >= self.hard_state.commit, (
            f"range {self.range_id}: a reset to {reset.index} below commit {self.hard_state.commit}"
        )
        self._items.clear()
        self.data_bytes = 0
        self._places.cut(0)
        self.compact_index, self.compact_term, self.conf_state = reset
        term, vote, _ = self.hard_state
        if reset.term > term:
            term, vote = reset.term, NONE
        self.hard_state = HardState(term, vote, reset.index)
        self._tail = None

    def append(self, first: int, items: Sequence[Entry | Stub], places: Sequence[int]) -> None:
        """Put entries from index ``first`` on, and drop what stood at or after it."""
        position = first - self.compact_index - 1
        held = self._items
        assert position >= 0, f"range {self.range_id}: append at {first}, compacted to {self.compact_index}"
        assert position <= len(held), f"range {self.range_id}: append at {first} after {self.last_index()}"
        assert first > self.hard_state[2], f"range {self.range_id}: append at {first}, committed {self.hard_state[2]}"
        assert self.tombstone is None, f"range {self.range_id} has ended"
        if position < len(held):
            self.data_bytes -= sum(map(_data_bytes, held[position:]))
            del held[position:]
            self._places.cut(position)
        self.data_bytes += sum(map(_data_bytes, items))
        held.extend(items)
        self._places.extend(places)

    def set_hard_state(self, new: HardState) -> None:
        old = self.hard_state
        assert new[0] >= old[0], f"range {self.range_id}: the term moves back from {old} to {new}"
        assert new[0] > old[0] or new[1] == old[1] or old[1] == NONE, (
            f"range {self.range_id}: the vote changes within a term, from {old} to {new}"
        )
        assert new[2] >= old[2], f"range {self.range_id}: the commit index moves back from {old} to {new}"
        assert new[2] <= self.compact_index + len(self._items), (
            f"range {self.range_id}: {new} commits past the last entry {self.last_index()}"
        )
        assert self.tombstone is None, f"range {self.range_id} has ended"
        self.hard_state = new

    def compact(self, compact: CompactLog) -> None:
        """Forget entries up to and with an index; does nothing if they are forgotten already."""
        index, term = compact
        count = index - self.compact_index
        if count <= 0:
            return
        assert index <= self.hard_state.commit, (
            f"range {self.range_id}: compaction to {index}, committed {self.hard_state.commit}"
        )
        held = self._items[count - 1]
        assert held is ABSENT or held[0] == term, (
            f"range {self.range_id}: entry {index} is of term {held[0]}, not {term}"
        )
        self.data_bytes -= sum(map(_data_bytes, self._items[:count]))
        del self._items[:count]
        self._places.cut(0, count)
        self.compact_index, self.compact_term = index, term

    def move(self, first: int, items: Sequence[Entry | Stub], places: Sequence[int]) -> None:
        """The same entries now lie elsewhere."""
        start = first - self.compact_index - 1
        assert 0 <= start <= len(self._items) - len(items), f"range {self.range_id}: {first} and on are not held"
        for position, item, place in zip(range(start, start + len(items)), items, places):
            held = self._items[position]
            assert held is ABSENT or held[0] == item[0], (
                f"range {self.range_id}: a copy of entry {first + position - start} has term {item[0]}, not {held[0]}"
            )
            # In the running log the copy is not on disk yet, so its data must be in memory.
            self.data_bytes += _data_bytes(item) - _data_bytes(held)
            self._items[position] = item
            self._places[position] = place

    def end(self, tombstone: Tombstone) -> None:
        self.tombstone = tombstone
        self._tail = None

    # What the log as a whole asks

    def evict(self, first: int, last: int, synced: int) -> None:
        """Drop the data of entries ``first`` to ``last`` from memory, but for those that do not lie before the place
        ``synced``: an entry that was overwritten, or moved, since it was cached may not be on disk again yet."""
        items, places = self._items, self._places
        offset = self.compact_index + 1
        for position in range(max(first - offset, 0), min(last - offset + 1, len(items))):
            item = items[position]
            if type(item) is Entry and item.data and places[position] < synced:
                items[position] = shared_stub(item.term, item.type, len(item.data))

    def live_in(self, segment: Segment) -> list[int]:
        """The indexes of entries whose only copy lies in a segment. Walks the log up to the last that it holds."""
        first = self.compact_index + 1
        segment_ids = self._places.segment_ids(max(segment.last_index.get(self.range_id, 0) - self.compact_index, 0))
        return [index for index, segment_id in enumerate(segment_ids, first) if segment_id == segment.id]

    def absent(self) -> list[int]:
        return [self.compact_index + 1 + position for position, item in enumerate(self._items) if item is ABSENT]

    def fingerprint(self, index: int) -> tuple[int, int, int]:
        """Term, size and checksum of an entry that is held, without reading it."""
        position = index - self.compact_index - 1
        return self._items[position][0], self.entry_bytes(index), self._places[position] & PLACE_MASK

    def entry_bytes(self, index: int) -> int:
        return _data_bytes(self._items[index - self.compact_index - 1])

    def pack(self) -> bytes:
        """The group in a checkpoint."""
        if self._tail is None:
            self._tail = pack_group_tail(self.conf_state, self.payload, self.tombstone)
        head = (
            self.range_id,
            self.replica_id,
            *self.hard_state,
            self.compact_index,
            self.compact_term,
            self.last_index(),
        )
        return pack_group(head, self.ended, len(self.payload), self._tail)

    def check(self) -> None:
        assert len(self._items) == len(self._places), f"{len(self._items)} entries, {len(self._places)} places"
        size = sum(map(_data_bytes, self._items))
        assert size == self.data_bytes, f"range {self.range_id}: {size} bytes of entries, counted {self.data_bytes}"
        assert self.compact_index <= self.hard_state.commit <= self.last_index(), (
            f"range {self.range_id}: compacted {self.compact_index}, {self.hard_state}, last {self.last_index()}"
        )
        terms = [self.compact_term, *(item[0] for item in self._items)]
        assert terms == sorted(terms), f"range {self.range_id}: the terms move back: {terms}"
        assert terms[-1] <= self.hard_state.term, (
            f"range {self.range_id}: an entry of term {terms[-1]} under {self.hard_state}"
        )
        for index, item in enumerate(self._items, self.first_index()):
            assert item is not ABSENT, f"range {self.range_id}: entry {index} was never found"
            assert not isinstance(item, Entry) or item.index == index, f"range {self.range_id}: {item} at {index}"
        for index, segment_id in enumerate(self._places.segment_ids(), self.first_index()):
            segment = self._segments.get(segment_id)
            assert segment is not None, f"range {self.range_id}: entry {index} lies in a segment that is gone"
            assert index <= segment.last_index.get(self.range_id, 0), (
                f"range {self.range_id}: entry {index} lies in {segment.path}, which does not know"
            )


class EntryCache:
    """Bounds the entry data in memory, over all groups: the data of the last ``bytes_max`` appended, and no older.

    It does not notice that entries were compacted, so it may hold less than it could, never more.
    """

    def __init__(self, bytes_max: int) -> None:
        self._bytes_max = bytes_max
        self._appended: deque[tuple[int, GroupLog, int, int, int]] = deque()
        """Sequence number, group, first and last index, bytes; oldest first."""
        self.bytes = 0

    def add(self, sequence: int, log: GroupLog, first: int, last: int, data_bytes: int) -> None:
        size = data_bytes + CACHE_ENTRY_BYTES * (last - first + 1)
        self._appended.append((sequence, log, first, last, size))
        self.bytes += size

    def trim(self, synced_sequence: int, synced: int) -> None:
        """Evict down to the bound, except what is not on disk yet and could not be read back.

        On disk are the records up to number ``synced_sequence``, which lie before the place ``synced``.
        """
        appended = self._appended
        while self.bytes > self._bytes_max and appended and appended[0][0] <= synced_sequence:
            _, log, first, last, size = appended.popleft()
            self.bytes -= size
            log.evict(first, last, synced)

    def check(self) -> None:
        size = sum(item[4] for item in self._appended)
        assert size == self.bytes, f"the cache counts {self.bytes} bytes and holds {size}"
