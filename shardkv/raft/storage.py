"""The log and state that a replica finds on its disk, as the core reads them, and an implementation in memory.

The core only ever reads through this; what is to be written it hands out in ``Ready``. Real storage lives in
``shardkv.storage``.
"""

from collections.abc import Sequence
from typing import Final, Protocol

from shardkv.raft.errors import Compacted, SnapshotOutOfDate, Unavailable
from shardkv.raft.messages import (
    EMPTY_CONF_STATE,
    EMPTY_HARD_STATE,
    ConfState,
    Entry,
    HardState,
    Snapshot,
    SnapshotMetadata,
)

ENTRY_OVERHEAD_BYTES: Final = 24
"""What an entry costs beside its data, for every bound that counts entries in bytes."""


def entries_bytes(entries: Sequence[Entry]) -> int:
    """The size of the entries, by which messages and hand-outs are bounded."""
    size = ENTRY_OVERHEAD_BYTES * len(entries)
    for entry in entries:
        size += len(entry.data)
    return size


def payload_bytes(entries: Sequence[Entry]) -> int:
    """The size of the entries' data alone; that of an empty entry is zero."""
    size = 0
    for entry in entries:
        size += len(entry.data)
    return size


def limited(entries: Sequence[Entry], bytes_max: int) -> Sequence[Entry]:
    """The longest prefix within ``bytes_max``, but never less than the first entry."""
    size = 0
    for count, entry in enumerate(entries):
        size += ENTRY_OVERHEAD_BYTES + len(entry.data)
        if size > bytes_max and count:
            return entries[:count]
    return entries


class RaftStorage(Protocol):
    """What is on disk. Every index from ``first_index()`` to ``last_index()`` is held, without gaps.

    Reads must reflect a write no later than its responses are delivered, and may reflect it earlier.
    """

    def initial_state(self) -> tuple[HardState, ConfState]:
        """The hard state and the configuration as of the applied index. Read once, when the replica is made."""
        ...

    def entries(self, lo: int, hi: int, bytes_max: int) -> Sequence[Entry]:
        """Entries from ``lo`` to below ``hi``, cut at ``bytes_max`` but at least one.

        Raises ``Compacted`` when ``lo`` lies before the first index, ``Unavailable`` when ``hi`` lies past the end.
        """
        ...

    def term(self, index: int) -> int:
        """The term of an entry, or of the one just before the first index.

        Raises ``Compacted`` or ``Unavailable`` outside of those.
        """
        ...

    def type(self, index: int) -> int:
        """The type of an entry that is held. Reads no data, however old the entry is."""
        ...

    def first_index(self) -> int: ...

    def last_index(self) -> int: ...

    def snapshot(self) -> Snapshot:
        """A snapshot as of the applied index, or little older. Raises ``SnapshotTemporarilyUnavailable`` for now.

        One from before a member was added does not name it in its configuration, and that member refuses it.
        """
        ...


class MemoryStorage:
    """A log in memory: for tests, and for what shall not outlive its process."""

    __slots__ = ("_entries", "_hard_state", "_snapshot")

    def __init__(self, conf_state: ConfState = EMPTY_CONF_STATE) -> None:
        # The first element stands for the entry before the first index: its term must be known, its data is gone.
        self._entries: list[Entry] = [Entry(0, 0)]
        self._hard_state = EMPTY_HARD_STATE
        self._snapshot = Snapshot(SnapshotMetadata(conf_state=conf_state))

    @property
    def hard_state(self) -> HardState:
        return self._hard_state

    def initial_state(self) -> tuple[HardState, ConfState]:
        return self._hard_state, self._snapshot.metadata.conf_state

    def entries(self, lo: int, hi: int, bytes_max: int) -> Sequence[Entry]:
        offset = self._entries[0].index
        if lo <= offset:
            raise Compacted(f"entry {lo} of a log that begins at {offset + 1}")
        if hi > self.last_index() + 1:
            raise Unavailable(f"entries to {hi} of a log that ends at {self.last_index()}")
        return limited(self._entries[lo - offset : hi - offset], bytes_max)

    def term(self, index: int) -> int:
        position = index - self._entries[0].index
        if position < 0:
            raise Compacted(f"entry {index} of a log that begins at {self.first_index()}")
        if position >= len(self._entries):
            raise Unavailable(f"entry {index} of a log that ends at {self.last_index()}")
        return self._entries[position].term

    def type(self, index: int) -> int:
        return self._entries[index - self._entries[0].index].type

    def first_index(self) -> int:
        return self._entries[0].index + 1

    def last_index(self) -> int:
        return self._entries[-1].index

    def snapshot(self) -> Snapshot:
        return self._snapshot

    def set_hard_state(self, hard_state: HardState) -> None:
        self._hard_state = hard_state

    def append(self, entries: Sequence[Entry]) -> None:
        """Add entries, overwriting what stands at or after the first of them."""
        first = self.first_index()
        if not entries or entries[-1].index < first:
            return
        if entries[0].index < first:
            entries = entries[first - entries[0].index :]
        position = entries[0].index - self._entries[0].index
        assert position <= len(self._entries), f"append at {entries[0].index} after {self.last_index()}"
        self._entries[position:] = entries

    def apply_snapshot(self, snapshot: Snapshot) -> None:
        """Replace everything by a snapshot. Raises ``SnapshotOutOfDate`` unless it is newer."""
        have = self._snapshot.metadata.index
        if have and have >= snapshot.metadata.index:
            raise SnapshotOutOfDate(f"snapshot {snapshot.metadata.index} over {have}")
        self._snapshot = snapshot
        self._entries = [Entry(snapshot.metadata.term, snapshot.metadata.index)]

    def create_snapshot(self, index: int, conf_state: ConfState, data: bytes) -> Snapshot:
        """Remember the state at ``index``. Raises ``SnapshotOutOfDate`` unless it is newer."""
        if index <= self._snapshot.metadata.index:
            raise SnapshotOutOfDate(f"snapshot {index} over {self._snapshot.metadata.index}")
        self._snapshot = Snapshot(SnapshotMetadata(index, self.term(index), conf_state), data)
        return self._snapshot

    def compact(self, index: int) -> None:
        """Forget the entries up to and with ``index``, which must have been applied.

        Raises ``Compacted`` when they are forgotten already.
        """
        position = index - self._entries[0].index
        if position <= 0:
            raise Compacted(f"the log already begins at {self.first_index()}")
        assert index <= self.last_index(), f"compaction to {index} of a log that ends at {self.last_index()}"
        self._entries[: position + 1] = [Entry(self._entries[position].term, index)]

    def check(self) -> None:
        first = self._entries[0].index
        indexes = [entry.index for entry in self._entries]
        assert indexes == list(range(first, first + len(indexes))), f"gaps: {indexes}"
        terms = [entry.term for entry in self._entries]
        assert terms == sorted(terms), f"terms move back: {terms}"
