"""The engine that keeps everything in memory: for tests, simulation and throw-away clusters.

Lives here: the ordered map, its isolated snapshots, and the model of what a crash leaves. Does not live here: any
file. The rule that keeps it honest: it promises exactly what the durable engine does and not more, so a crash may take
every batch since the last flush, and never an ingested file.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from typing import Final, NamedTuple

from sortedcontainers import SortedDict

from shardkv.errors import StorageError
from shardkv.storage.engine import MISSING, Missing, WriteBatch

SCAN_CHUNK_KEYS: Final = 256
"""A snapshot's scan looks ahead this far, so that writes may come between its steps."""


class _Operation(NamedTuple):
    """One write or ingest since the last flush, and how to take it back."""

    batch: WriteBatch
    ingested: bool
    undo: dict[bytes, bytes | None]


class MemoryEngine:
    """See :class:`shardkv.storage.engine.Engine`.

    With ``crashable`` it remembers what has been written since the last flush, so that :meth:`crash` can take part of
    it back. Without, a flush costs nothing and nothing is remembered. ``in_loop`` is how a worker thread has something
    done in the loop: whoever lets :meth:`ingest` run in a real thread says so.
    """

    def __init__(
        self, *, crashable: bool = False, in_loop: Callable[[Callable[[], None]], None] = lambda change: change()
    ) -> None:
        self._data: SortedDict[bytes, bytes] = SortedDict()
        self._crashable = crashable
        self._in_loop = in_loop
        self._operations: list[_Operation] = []
        self._snapshots: list[MemorySnapshot] = []
        self._built: dict[str, dict[bytes, bytes]] = {}
        self._writes = 0
        self._written_bytes = 0
        self._flushed_bytes = 0
        self._closed = False
        self.stall = False
        self.full = False
        """Set by tests: what :meth:`stalled` answers."""

    # Reads

    def get(self, key: bytes) -> bytes | None:
        return self._data.get(key)

    def get_many(self, keys: Sequence[bytes]) -> list[bytes | None]:
        return list(map(self._data.get, keys))

    def scan(self, start: bytes, end: bytes, *, reverse: bool = False) -> Iterator[tuple[bytes, bytes]]:
        return self._scan(start, end, reverse, self._writes)

    def _scan(self, start: bytes, end: bytes, reverse: bool, writes: int) -> Iterator[tuple[bytes, bytes]]:
        if start >= end:
            return
        data = self._data
        for key in data.irange(start, end, (True, False), reverse=reverse):
            yield key, data[key]
            assert self._writes == writes, "the engine was written to during a scan of it: scan a snapshot"

    def snapshot(self) -> "MemorySnapshot":
        self._check_open()
        snapshot = MemorySnapshot(self)
        self._snapshots.append(snapshot)
        return snapshot

    # Writes

    def write(self, batch: WriteBatch) -> None:
        self._check_open()
        self._apply(batch, ingested=False)
        self._written_bytes += batch.bytes

    def _apply(self, batch: WriteBatch, *, ingested: bool) -> None:
        data = self._data
        self._writes += 1
        if self._crashable or self._snapshots:
            undo = self._undo(batch)
            for snapshot in self._snapshots:
                snapshot.remember(undo)
            if self._crashable:
                self._operations.append(_Operation(batch, ingested, undo))
        for start, end in batch.deleted:
            for key in list(data.irange(start, end, (True, False))):
                del data[key]
        for key, value in batch.changes.items():
            if value is None:
                data.pop(key, None)
            else:
                data[key] = value

    def _undo(self, batch: WriteBatch) -> dict[bytes, bytes | None]:
        """What every key that the batch touches holds now; None for absent."""
        data = self._data
        undo: dict[bytes, bytes | None] = {}
        for start, end in batch.deleted:
            for key in data.irange(start, end, (True, False)):
                undo[key] = data[key]
        for key in batch.changes:
            undo[key] = data.get(key)
        return undo

    def flush(self) -> None:
        self._check_open()
        self._operations.clear()
        self._flushed_bytes = self._written_bytes

    @property
    def unflushed_bytes(self) -> int:
        return self._written_bytes - self._flushed_bytes

    def stalled(self) -> bool:
        return self.stall

    # Ingest

    def builder(self, path: str) -> "MemoryIngestBuilder":
        self._check_open()
        return MemoryIngestBuilder(self._built, path)

    def ingest(self, path: str) -> None:
        self._check_open()
        pairs = self._built.pop(path, None)
        if pairs is None:
            raise StorageError(f"there is no finished file to ingest at {path}; build it again")
        batch = WriteBatch()
        batch.changes.update(pairs)
        # The map is not made for two threads: the loop reads and writes it meanwhile.
        self._in_loop(partial(self._apply, batch, ingested=True))

    # Ends

    def close(self) -> None:
        self._closed = True

    def crash(self, choose: Callable[[int], int]) -> "MemoryEngine":
        """The engine that a process finds which starts after this one's died; this one is of no more use.

        ``choose(n)`` picks how many of the ``n`` batches since the last flush survive, 0 to ``n``. Ingested files
        survive whatever it picks.
        """
        assert self._crashable, "made without crashable=True"
        data = self._data
        for operation in reversed(self._operations):
            for key, value in operation.undo.items():
                if value is None:
                    data.pop(key, None)
                else:
                    data[key] = value
        batches = sum(not operation.ingested for operation in self._operations)
        kept = choose(batches)
        assert 0 <= kept <= batches, f"the chooser kept {kept} of {batches} batches"
        self._closed = True
        survivor = MemoryEngine(crashable=True)
        survivor._data.update(data)
        for operation in self._operations:
            if operation.ingested:
                survivor._apply(operation.batch, ingested=True)
            elif kept:
                kept -= 1
                survivor._apply(operation.batch, ingested=False)
        survivor._operations.clear()
        return survivor

    def _check_open(self) -> None:
        if self._closed:
            raise StorageError("the engine is closed")

    def check(self) -> None:
        keys = list(self._data)
        assert keys == sorted(set(keys)), "the keys are out of order"
        for key, value in self._data.items():
            assert type(key) is bytes, f"a key is {type(key).__name__}"
            assert type(value) is bytes, f"the value of {key!r} is {type(value).__name__}"
        assert self._flushed_bytes <= self._written_bytes, f"flushed {self._flushed_bytes} of {self._written_bytes}"
        assert self._crashable or not self._operations, f"{len(self._operations)} operations are remembered in vain"
        for snapshot in self._snapshots:
            snapshot.check()

    def _release(self, snapshot: "MemorySnapshot") -> None:
        if snapshot in self._snapshots:
            self._snapshots.remove(snapshot)


class MemorySnapshot:
    """A view that stays: the engine's data under the old values of what has changed since. Made in O(1)."""

    def __init__(self, engine: MemoryEngine) -> None:
        self._engine = engine
        self._old: SortedDict[bytes, bytes | None] = SortedDict()

    def remember(self, undo: dict[bytes, bytes | None]) -> None:
        """Keep the values that are about to be overwritten; the first one kept is the snapshot's."""
        old = self._old
        for key, value in undo.items():
            if key not in old:
                old[key] = value

    def get(self, key: bytes) -> bytes | None:
        value: bytes | Missing | None = self._old.get(key, MISSING)
        return self._engine._data.get(key) if value is MISSING else value

    def get_many(self, keys: Sequence[bytes]) -> list[bytes | None]:
        return [self.get(key) for key in keys]

    def scan(self, start: bytes, end: bytes, *, reverse: bool = False) -> Iterator[tuple[bytes, bytes]]:
        while start < end:
            chunk, start, end = self._chunk(start, end, reverse)
            yield from chunk

    def _chunk(self, start: bytes, end: bytes, reverse: bool) -> tuple[list[tuple[bytes, bytes]], bytes, bytes]:
        """The next pairs, and the span that is left."""
        data, old = self._engine._data, self._old
        keys = list(islice(data.irange(start, end, (True, False), reverse=reverse), SCAN_CHUNK_KEYS))
        low, high = start, end
        if len(keys) == SCAN_CHUNK_KEYS:
            if reverse:
                low = keys[-1]
            else:
                high = keys[-1] + b"\0"
        merged = {key: data[key] for key in keys}
        for key in old.irange(low, high, (True, False)):
            value = old[key]
            if value is None:
                merged.pop(key, None)
            else:
                merged[key] = value
        chunk = sorted(merged.items(), reverse=reverse)
        return (chunk, start, low) if reverse else (chunk, high, end)

    def close(self) -> None:
        self._engine._release(self)

    def check(self) -> None:
        keys = list(self._old)
        assert keys == sorted(set(keys)), "the old keys are out of order"


class MemoryIngestBuilder:
    """See :class:`shardkv.storage.engine.IngestBuilder`."""

    def __init__(self, built: dict[str, dict[bytes, bytes]], path: str) -> None:
        self._built = built
        self._path = path
        self._pairs: dict[bytes, bytes] = {}
        self._last: bytes | None = None
        self._abandoned = False
        self.paths: tuple[str, ...] = ()

    def put(self, key: bytes, value: bytes) -> None:
        assert self._last is None or key > self._last, f"{key!r} was put after {self._last!r}"
        self._last = key
        self._pairs[key] = value

    def finish(self) -> None:
        assert self._pairs, "an ingest file needs at least one pair"
        assert not self._abandoned, f"{self._path} was given up"
        self._built[self._path] = self._pairs

    def abandon(self) -> None:
        self._abandoned = True
        self._built.pop(self._path, None)
