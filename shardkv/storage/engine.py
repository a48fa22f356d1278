"""What an engine is: one ordered store per node for the data of all its ranges, and the batch that changes it.

Lives here: the protocol that :mod:`memory` and :mod:`rocks` both keep, and :class:`WriteBatch`. Does not live here:
what keys mean (ranges, prefixes, versions); an engine sees bytes. The rule: what a crash leaves behind is a prefix of
the batches, no older than the last flush, plus every ingested file; callers put a range's applied index into the same
batch as its data and keep the Raft log until :meth:`Engine.flush` has passed it.
"""

from collections.abc import Iterator, Sequence
from enum import Enum
from typing import Final, Protocol

BATCH_KEYS_MAX: Final = 2_000
"""Callers cut their batches here unless one atomic entry needs more: ``write`` holds the interpreter lock at about
1 µs a key, and the loop must not stand still for longer than a couple of milliseconds."""

REPLACE_ADVICE: Final = (
    "if other nodes have replicas of this node's ranges, move the folder engine out of its data directory, and nothing "
    "else, and start it again: the data are copied from them; else restore all of the data directory from a backup"
)
"""What is to be done about an engine that is damaged, or an old copy."""


class Missing(Enum):
    """The type of :data:`MISSING`; an enum so that type checkers can tell it from None."""

    MISSING = "missing"

    def __repr__(self) -> str:
        return "MISSING"


MISSING: Final = Missing.MISSING
"""What :meth:`WriteBatch.get` answers for a key that the batch says nothing about."""


class WriteBatch:
    """Changes that are written as one, in plain Python so that the caller can read its own writes.

    Meaning: the spans in ``deleted`` go first, then ``changes`` apply. :meth:`delete_range` drops the keys it covers
    from ``changes``, so the outcome is that of the calls in their order. ``bytes`` counts keys and values as handed
    in. A batch belongs to its engine once it is written: do not change it after.
    """

    __slots__ = ("bytes", "changes", "deleted")

    def __init__(self) -> None:
        self.changes: dict[bytes, bytes | None] = {}
        """The new value of each key; None deletes it."""
        self.deleted: list[tuple[bytes, bytes]] = []
        """Half-open spans ``start, end``."""
        self.bytes = 0

    def put(self, key: bytes, value: bytes) -> None:
        self.changes[key] = value
        self.bytes += len(key) + len(value)

    def delete(self, key: bytes) -> None:
        self.changes[key] = None
        self.bytes += len(key)

    def delete_range(self, start: bytes, end: bytes) -> None:
        """Delete every key from ``start`` (included) to ``end`` (excluded). An empty span does nothing."""
        if start >= end:
            return
        changes = self.changes
        if changes:
            for key in [key for key in changes if start <= key < end]:
                del changes[key]
        self.deleted.append((start, end))
        self.bytes += len(start) + len(end)

    def get(self, key: bytes) -> bytes | Missing | None:
        """The value after this batch: bytes, None for deleted, or :data:`MISSING` if the batch says nothing."""
        value = self.changes.get(key, MISSING)
        if value is MISSING and self.deleted:
            for start, end in self.deleted:
                if start <= key < end:
                    return None
        return value

    def __len__(self) -> int:
        """The number of changes: keys and spans."""
        return len(self.changes) + len(self.deleted)

    def __bool__(self) -> bool:
        return bool(self.changes or self.deleted)

    def check(self) -> None:
        for key, value in self.changes.items():
            assert type(key) is bytes, f"a key is {type(key).__name__}"
            assert value is None or type(value) is bytes, f"the value of {key!r} is {type(value).__name__}"
        for start, end in self.deleted:
            assert start < end, f"the span {start!r}, {end!r} is empty"


class Reader(Protocol):
    """Reads of one state of the store."""

    def get(self, key: bytes) -> bytes | None: ...

    def get_many(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """The values of ``keys``, in their order; None where a key is absent."""
        ...

    def scan(self, start: bytes, end: bytes, *, reverse: bool = False) -> Iterator[tuple[bytes, bytes]]:
        """The pairs from ``start`` (included) to ``end`` (excluded), in key order, or the opposite with ``reverse``.

        Scanning an engine itself: finish before the next write to it (the memory engine asserts that). Take a
        snapshot to scan for longer.
        """
        ...


class Snapshot(Reader, Protocol):
    """The store as it was at one moment. Close it: it keeps old data on disk or in memory."""

    def close(self) -> None: ...


class IngestBuilder(Protocol):
    """Writes sorted pairs to be ingested as one, in bounded memory however many they are."""

    @property
    def paths(self) -> Sequence[str]:
        """The files on the disk, one or several: what is not ingested after all, the owner unlinks."""
        ...

    def put(self, key: bytes, value: bytes) -> None:
        """Add a pair. Keys come strictly ascending."""
        ...

    def finish(self) -> None:
        """Complete the file; blocks on the disk. At least one pair must have been put."""
        ...

    def abandon(self) -> None:
        """Drop what was put so far."""
        ...


class Engine(Reader, Protocol):
    """One ordered, durable store. Errors that may escape: StorageError, Corruption, OutOfSpace.

    Everything but :meth:`flush`, :meth:`ingest`, building and :meth:`close` is quick and meant for the loop.
    """

    def write(self, batch: WriteBatch) -> None:
        """Apply a batch as one. Not durable until :meth:`flush`. Look at :meth:`stalled` first."""
        ...

    def snapshot(self) -> Snapshot: ...

    def flush(self) -> None:
        """Blocks; run it in a worker thread. Once it returns, everything written before it was called is durable."""
        ...

    @property
    def unflushed_bytes(self) -> int:
        """About how many bytes have been written since the start of the last completed flush."""
        ...

    def stalled(self) -> bool:
        """Whether a write now would wait for a flush or a compaction, or fail because a flush has found no room on the
        disk: hold back what is to be applied. Raises StorageError when the engine has failed for good."""
        ...

    @property
    def full(self) -> bool:
        """Whether the last :meth:`stalled` was for lack of room on the disk. What is written nevertheless stays in
        memory, is read as if it were written, and is written first of all when there is room."""
        ...

    def builder(self, path: str) -> IngestBuilder:
        """A builder of a file at ``path`` for :meth:`ingest`, on the same file system as the engine.

        It may be used in a worker thread.
        """
        ...

    def ingest(self, path: str) -> None:
        """Take over what was built at ``path``, as one: its pairs overwrite. Blocks. Durable at once, while batches
        written *before* it are not: flush first, and carry the range's applied index in it (trap 19). The files are
        gone after."""
        ...

    def close(self) -> None:
        """Flush, as far as there is room on the disk, and close. A crash is what happens without it."""
        ...

    def check(self) -> None:
        """Walk the invariants. May be slow; for tests."""
        ...
