"""Reads of a store and of batches that it could not take yet, as one.

Pure. For an engine whose disk became full between the moment when it was asked and the write: the state machines have
applied the batch, so it must be seen, and nothing else is written before it. The rule: what is read here is exactly
what the store will hold once it has taken the batches in their order.
"""

from collections.abc import Callable, Iterator, Sequence
from heapq import merge
from operator import itemgetter

from shardkv.storage.engine import MISSING, Snapshot, WriteBatch


def get(batches: Sequence[WriteBatch], key: bytes, below: Callable[[bytes], bytes | None]) -> bytes | None:
    for batch in reversed(batches):
        value = batch.get(key)
        if value is not MISSING:
            return value
    return below(key)


def scan(
    batches: Sequence[WriteBatch],
    pairs: Iterator[tuple[bytes, bytes]],
    start: bytes,
    end: bytes,
    *,
    reverse: bool = False,
) -> Iterator[tuple[bytes, bytes]]:
    """``pairs`` is the same scan of the store below."""
    changed: dict[bytes, bytes | None] = {}
    spans: list[tuple[bytes, bytes]] = []
    for batch in batches:
        for low, high in batch.deleted:
            spans.append((low, high))
            for key in [key for key in changed if low <= key < high]:
                del changed[key]
        changed.update((key, value) for key, value in batch.changes.items() if start <= key < end)
    kept = (pair for pair in pairs if pair[0] not in changed and not any(low <= pair[0] < high for low, high in spans))
    put = [(key, value) for key, value in sorted(changed.items(), reverse=reverse) if value is not None]
    return merge(kept, put, key=itemgetter(0), reverse=reverse)


class OverlaidSnapshot:
    """See :class:`shardkv.storage.engine.Snapshot`."""

    def __init__(self, snapshot: Snapshot, batches: Sequence[WriteBatch]) -> None:
        self._snapshot = snapshot
        self._batches = tuple(batches)

    def get(self, key: bytes) -> bytes | None:
        return get(self._batches, key, self._snapshot.get)

    def get_many(self, keys: Sequence[bytes]) -> list[bytes | None]:
        return [self.get(key) for key in keys]

    def scan(self, start: bytes, end: bytes, *, reverse: bool = False) -> Iterator[tuple[bytes, bytes]]:
        return scan(self._batches, self._snapshot.scan(start, end, reverse=reverse), start, end, reverse=reverse)

    def close(self) -> None:
        self._snapshot.close()
