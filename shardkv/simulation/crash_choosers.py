"""Who chooses what a crash leaves of what was not synced on a simulated disk.

Lives here: the choices, from nothing to everything, and at random as a disk may do. Does not live here: what becomes of
files and names by a choice (``files``), and when a crash is (``disk``). The rule: a choice is made of each write and of
each change of a directory by itself, for no order among them is promised.
"""

from collections.abc import Collection
from typing import Final, Protocol

from shardkv.simulation.determinism import SeededRandom
from shardkv.simulation.files import Unsynced

SECTOR_BYTES: Final = 512
"""A torn write is torn at multiples of this offset: what a disk writes as one."""


class CrashChooser(Protocol):
    """Decides what a crash leaves of what was not synced."""

    def spans(self, change: Unsynced) -> list[tuple[int, int]]:
        """Which parts ``start, end`` of a write's bytes survive. Of an empty one there are no bytes, but the file has
        grown up to it. A truncation survives if there is any span at all."""
        ...

    def entries(self, directory: str, count: int) -> Collection[int]:
        """Which of ``count`` unsynced changes of a directory survive, by position from 0: any of them."""
        ...


class LoseAll:
    """Nothing survives that was not synced."""

    def spans(self, change: Unsynced) -> list[tuple[int, int]]:
        return []

    def entries(self, directory: str, count: int) -> Collection[int]:
        return ()


class KeepAll:
    """Everything survives."""

    def spans(self, change: Unsynced) -> list[tuple[int, int]]:
        return [(0, len(change.data) if change.data is not None else 1)]

    def entries(self, directory: str, count: int) -> Collection[int]:
        return range(count)


class TearLast:
    """All that was written survives, but of the last write only the first ``keep_bytes``."""

    def __init__(self, keep_bytes: int) -> None:
        self.keep_bytes = keep_bytes

    def spans(self, change: Unsynced) -> list[tuple[int, int]]:
        size = len(change.data) if change.data is not None else 1
        return [(0, min(size, self.keep_bytes) if change.last else size)]

    def entries(self, directory: str, count: int) -> Collection[int]:
        return range(count)


class ChooseAtRandom:
    """Each write survives whole, in part (any of its sectors) or not at all; of each directory any of its changes."""

    def __init__(self, random: SeededRandom) -> None:
        self._random = random

    def spans(self, change: Unsynced) -> list[tuple[int, int]]:
        size = len(change.data) if change.data is not None else 1
        match self._random.randrange(4):
            case 0:
                return []
            case 1:
                return [(0, size)]
            case 2:
                return [(0, self._random.randrange(size + 1))]
        spans = []
        start = 0
        while start < size:
            end = min(size, start + SECTOR_BYTES - (change.offset + start) % SECTOR_BYTES)
            if self._random.random() < 0.5:
                spans.append((start, end))
            start = end
        return [*spans, (size, size)]

    def entries(self, directory: str, count: int) -> Collection[int]:
        chosen = self._random.randrange(1 << count)
        return [position for position in range(count) if chosen >> position & 1]
