"""One replica's view of its log: what the storage holds, and on top what was appended and is not applied yet.

The newest entries stay here, in ``tail``, until they are both written and applied, so that replicating and applying
them reads no storage; where applying falls behind by more than may be handed out, until they are written.
Nothing here knows of terms in force, peers or roles.

Invariants: applied <= applying <= committed <= last_index, stable < in_progress, and the tail ends at last_index.
"""

from typing import Final

from shardkv.raft.errors import Compacted, Inconsistent, Unavailable
from shardkv.raft.messages import Entry, Snapshot
from shardkv.raft.storage import ENTRY_OVERHEAD_BYTES, RaftStorage, entries_bytes

_NO_ENTRIES: Final[tuple[Entry, ...]] = ()


class RaftLog:
    """The log of one replica. Indexes are inclusive unless they are called ``hi``."""

    __slots__ = (
        "applied",
        "applying",
        "applying_bytes",
        "applying_bytes_max",
        "applying_paused",
        "committed",
        "in_progress",
        "last_index",
        "last_term",
        "snapshot",
        "snapshot_in_progress",
        "stable",
        "storage",
        "tail",
        "tail_first",
    )

    def __init__(self, storage: RaftStorage, applying_bytes_max: int) -> None:
        self.storage = storage
        self.last_index = storage.last_index()
        self.last_term = storage.term(self.last_index)
        self.tail: list[Entry] = []
        self.tail_first = self.last_index + 1
        """The index of ``tail[0]``, and the one after the last entry when the tail is empty."""
        self.stable = self.last_index
        """Entries up to here are known to be in the storage and not about to be overwritten there."""
        self.in_progress = self.last_index + 1
        """Entries below this have been handed out to be written."""
        self.snapshot: Snapshot | None = None
        """A snapshot that is to replace the log and is not yet written."""
        self.snapshot_in_progress = False
        compacted = storage.first_index() - 1
        self.committed = compacted
        self.applying = compacted
        """Entries up to here have been handed out to be applied."""
        self.applied = compacted
        self.applying_bytes = 0
        self.applying_bytes_max = applying_bytes_max
        self.applying_paused = False

    @property
    def first_index(self) -> int:
        if self.snapshot is not None:
            return self.snapshot.metadata.index + 1
        return self.storage.first_index()

    def term(self, index: int) -> int:
        """The term of an entry, or of the one just before the log. Raises ``Compacted`` or ``Unavailable``."""
        if index == self.last_index:
            return self.last_term
        if index > self.last_index:
            raise Unavailable(f"entry {index} of a log that ends at {self.last_index}")
        if index >= self.tail_first:
            return self.tail[index - self.tail_first].term
        if self.snapshot is not None:
            metadata = self.snapshot.metadata
            if index == metadata.index:
                return metadata.term
            raise Compacted(f"entry {index} of a log that begins at {metadata.index + 1}")
        return self.storage.term(index)

    def type(self, index: int) -> int:
        """The type of an entry that is held."""
        return self.tail[index - self.tail_first].type if index >= self.tail_first else self.storage.type(index)

    def matches(self, index: int, term: int) -> bool:
        """Whether the entry at ``index`` has this term (the log matching property, paper 5.3)."""
        if index == self.last_index:
            return self.last_term == term
        try:
            return self.term(index) == term
        except (Compacted, Unavailable):
            return False

    def is_up_to_date(self, index: int, term: int) -> bool:
        """Whether a log that ends so holds at least what this one does (paper 5.4.1)."""
        return term > self.last_term or (term == self.last_term and index >= self.last_index)

    def entries(self, lo: int, bytes_max: int) -> tuple[Entry, ...]:
        """The entries from ``lo`` on, bounded in bytes but at least one if there is one. Raises ``Compacted``."""
        if lo > self.last_index:
            return _NO_ENTRIES
        return self.slice(lo, self.last_index + 1, bytes_max)

    def slice(self, lo: int, hi: int, bytes_max: int) -> tuple[Entry, ...]:
        """The entries from ``lo`` to below ``hi``, bounded in bytes but at least one. Raises ``Compacted``."""
        assert lo <= hi <= self.last_index + 1, f"[{lo}, {hi}) of a log that ends at {self.last_index}"
        if lo == hi:
            return _NO_ENTRIES
        tail_first = self.tail_first
        if lo >= tail_first:
            if hi - lo == 1:
                return (self.tail[lo - tail_first],)
            return self._tail_slice(lo, hi, bytes_max, at_least_one=True)
        if lo < self.first_index:
            raise Compacted(f"entry {lo} of a log that begins at {self.first_index}")
        cut = min(hi, tail_first)
        stored = tuple(self.storage.entries(lo, cut, bytes_max))
        if hi <= tail_first or len(stored) < cut - lo:
            return stored
        left = bytes_max - entries_bytes(stored)
        return stored + self._tail_slice(tail_first, hi, left, at_least_one=False)

    def _tail_slice(self, lo: int, hi: int, bytes_max: int, *, at_least_one: bool) -> tuple[Entry, ...]:
        start = lo - self.tail_first
        entries = self.tail[start : hi - self.tail_first]
        left = bytes_max
        for count, entry in enumerate(entries):
            left -= ENTRY_OVERHEAD_BYTES + len(entry.data)
            if left < 0:
                return tuple(entries[: max(count, 1) if at_least_one else count])
        return tuple(entries)

    def append(self, entries: tuple[Entry, ...]) -> None:
        """Add entries after the one before the first of them, dropping whatever stood there."""
        first = entries[0].index
        if first <= self.committed:
            raise Inconsistent(f"entry {first} would overwrite a committed one (committed {self.committed})")
        if first == self.last_index + 1:
            self.tail.extend(entries)
        else:
            assert first <= self.last_index, f"append at {first} after {self.last_index}"
            if first <= self.tail_first:
                self.tail = list(entries)
                self.tail_first = first
            else:
                self.tail[first - self.tail_first :] = entries
            self.stable = min(self.stable, first - 1)
            self.in_progress = min(self.in_progress, first)
        last = entries[-1]
        self.last_index = last.index
        self.last_term = last.term

    def maybe_append(self, index: int, term: int, entries: tuple[Entry, ...], commit: int) -> int | None:
        """A leader's append: the entries that follow (``index``, ``term``), and how far it has committed.

        Returns the last index that now matches the leader's log, or None when the log has no such entry to follow.
        """
        if not self.matches(index, term):
            return None
        last = index + len(entries)
        if entries:
            # In the normal case everything is new; else skip what is here already, for a late append truncates nothing.
            if index == self.last_index:
                self.append(entries)
            else:
                for position, entry in enumerate(entries):
                    if not self.matches(entry.index, entry.term):
                        self.append(entries[position:])
                        break
        self.commit_to(min(commit, last))
        return last

    def conflict_hint(self, index: int, term: int) -> tuple[int, int]:
        """The last entry at or before ``index`` whose term is at most ``term``, as (index, its term).

        That is the best guess at where this log agrees with another of which only that one entry is known. An entry
        whose term is no longer known may agree; it is returned with term 0.
        """
        while index > 0:
            try:
                ours = self.term(index)
            except (Compacted, Unavailable):
                return index, 0
            if ours <= term:
                return index, ours
            index -= 1
        return 0, 0

    def commit_to(self, index: int) -> None:
        """Raise the commit index; it never falls. Raises ``Inconsistent`` past the end of the log."""
        if index > self.committed:
            if index > self.last_index:
                raise Inconsistent(f"commit {index} of a log that ends at {self.last_index}: was it lost or cut?")
            self.committed = index

    # What is to be written.

    def next_unstable(self) -> tuple[Entry, ...]:
        """The entries that are to be written and have not been handed out."""
        if self.in_progress > self.last_index:
            return _NO_ENTRIES
        return tuple(self.tail[self.in_progress - self.tail_first :])

    def next_snapshot(self) -> Snapshot | None:
        return None if self.snapshot_in_progress else self.snapshot

    def accept_unstable(self) -> None:
        """What ``next_unstable`` and ``next_snapshot`` gave is being written."""
        self.in_progress = self.last_index + 1
        if self.snapshot is not None:
            self.snapshot_in_progress = True

    def stable_to(self, index: int, term: int) -> None:
        """The log up to this entry is written, and no write under way will overwrite it. Stale news is ignored."""
        if index <= self.stable or index > self.last_index or self.term(index) != term:
            return
        self.stable = index
        if self.in_progress <= index:
            self.in_progress = index + 1
        self._trim()

    def stable_snapshot_to(self, index: int) -> None:
        if self.snapshot is not None and self.snapshot.metadata.index == index:
            self.snapshot = None
            self.snapshot_in_progress = False

    def restore(self, snapshot: Snapshot) -> None:
        """The log becomes what follows this snapshot, which is still to be written."""
        self.committed = snapshot.metadata.index
        self.last_index = snapshot.metadata.index
        self.last_term = snapshot.metadata.term
        self.tail = []
        self.tail_first = self.last_index + 1
        self.stable = self.last_index
        self.in_progress = self.last_index + 1
        self.snapshot = snapshot
        self.snapshot_in_progress = False

    # What is to be applied.

    def appliable(self, allow_unstable: bool) -> int:
        """The highest index that may be applied. Unless ``allow_unstable``, only what is surely on this disk is."""
        committed, stable = self.committed, self.stable
        return committed if allow_unstable or committed < stable else stable

    def has_next_committed(self, allow_unstable: bool) -> bool:
        # A snapshot that waits goes first, alone.
        if self.applying_paused or self.snapshot is not None or self.applying >= self.committed:
            return False
        return allow_unstable or self.applying < self.stable

    def next_committed(self, allow_unstable: bool) -> tuple[Entry, ...]:
        """The entries to apply next, within the bytes that may be out at once."""
        if not self.has_next_committed(allow_unstable):
            return _NO_ENTRIES
        left = self.applying_bytes_max - self.applying_bytes
        assert left > 0, f"{self.applying_bytes} of {self.applying_bytes_max} bytes are out, yet it is not paused"
        return self.slice(self.applying + 1, self.appliable(allow_unstable) + 1, left)

    def accept_applying(self, entries: tuple[Entry, ...], allow_unstable: bool) -> None:
        """What ``next_committed`` gave is being applied."""
        index = entries[-1].index
        assert index <= self.committed, f"{index} is handed out, committed is {self.committed}"
        self.applying = index
        self.applying_bytes += entries_bytes(entries)
        # When the bound cut the hand-out short, the next entry does not fit: wait until these are done.
        self.applying_paused = self.applying_bytes >= self.applying_bytes_max or index < self.appliable(allow_unstable)

    def applied_to(self, index: int, size: int) -> None:
        """Entries up to ``index`` are applied; ``size`` of the bytes that were out are done."""
        if index > self.committed or index < self.applied:
            raise Inconsistent(f"applied {index} is not within {self.applied} to {self.committed}")
        self.applied = index
        if self.applying < index:
            self.applying = index
        left = self.applying_bytes - size
        self.applying_bytes = left = left if left > 0 else 0
        self.applying_paused = left >= self.applying_bytes_max
        self._trim()

    def _trim(self) -> None:
        """Let go of the entries that are both written and applied.

        While as much is being applied as may be, of all that are written: a state machine that stalls, or a replica
        that waits for its data, must not hold the log of all that time in memory. It is read back when it is wanted.
        """
        cut = self.stable + 1
        if self.applied < cut and not self.applying_paused:
            cut = self.applied + 1
        if cut > self.tail_first:
            if cut > self.last_index:
                self.tail.clear()
                cut = self.last_index + 1
            else:
                del self.tail[: cut - self.tail_first]
            self.tail_first = cut

    def check(self) -> None:
        assert self.applied <= self.applying <= self.committed <= self.last_index, (
            f"applied {self.applied}, applying {self.applying}, committed {self.committed}, last {self.last_index}"
        )
        assert self.tail_first + len(self.tail) == self.last_index + 1, (
            f"{len(self.tail)} entries from {self.tail_first} do not end at {self.last_index}"
        )
        assert self.stable < self.in_progress <= self.last_index + 1, (
            f"stable {self.stable}, in progress {self.in_progress}, last {self.last_index}"
        )
        assert self.tail_first <= self.stable + 1, f"the tail begins at {self.tail_first}, stable is {self.stable}"
        indexes = [entry.index for entry in self.tail]
        assert indexes == list(range(self.tail_first, self.last_index + 1)), f"gaps: {indexes}"
        terms = [entry.term for entry in self.tail]
        assert terms == sorted(terms), f"terms move back: {terms}"
        assert not self.tail or terms[-1] == self.last_term, f"last term {self.last_term} against {terms[-1]}"
        assert self.snapshot is not None or not self.snapshot_in_progress, "no snapshot, yet it is being written"
