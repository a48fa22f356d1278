"""Time and chance from the operating system. No policy lives here: who waits, and for how long, is the caller's."""

import os
import random
import time
from contextlib import AbstractContextManager
from typing import Final

import trio

# CLOCK_BOOTTIME runs on while the machine is suspended, so a lease cannot outlive its promise in a laptop's sleep.
# Elsewhere the plain monotonic clock must do.
_MONOTONIC: Final = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


class RealClock:
    """Implements :class:`shardkv.environment.Clock`."""

    __slots__ = ()

    def monotonic_ns(self) -> int:
        return time.clock_gettime_ns(_MONOTONIC)

    def wall_ms(self) -> int:
        return time.time_ns() // 1_000_000

    async def sleep(self, seconds: float) -> None:
        await trio.sleep(seconds)

    def deadline(self, seconds: float) -> AbstractContextManager[trio.CancelScope]:
        return trio.move_on_after(seconds)


class RealRandom:
    """Implements :class:`shardkv.environment.Random`: good for jitter, not for secrets."""

    __slots__ = ("_random",)

    def __init__(self) -> None:
        self._random = random.Random()

    def random(self) -> float:
        return self._random.random()

    def randrange(self, stop: int) -> int:
        return self._random.randrange(stop)


class RealIds:
    """Implements :class:`shardkv.environment.Ids`."""

    __slots__ = ()

    def random_bytes(self, count: int) -> bytes:
        return os.urandom(count)
