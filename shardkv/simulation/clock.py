"""Time and chance as one simulated node sees them: a clock that drifts and jumps, a random source of its own.

The rule: a node can only ask its own clock; the run's virtual time is for the simulator and its checkers.
"""

import math
from collections.abc import Coroutine
from contextlib import AbstractContextManager
from typing import Any

import trio

from shardkv.simulation import determinism
from shardkv.simulation.calls import Calls

START_WALL_MS = 1_767_225_600_000
"""What a clock without an offset shows when a run starts: 2026-01-01."""
RESOLUTION_SECONDS = 1e-9
"""Of a clock that counts nanoseconds. Whoever sleeps for less until a moment of it would find that no time has passed,
and with nothing else to do sleep so again for ever."""


class SimulationClock:
    """Implements :class:`shardkv.environment.Clock`.

    Args:
        drift: how much faster than virtual time it runs; 0.01 is one percent, negative is slower.
        monotonic_offset_ns: what it shows at the start: how long its machine is up, which is no other node's affair.
        wall_offset_ms: how far its idea of the date is ahead.
    """

    __slots__ = (
        "_base_ns",
        "_base_time",
        "_drift",
        "_last_ns",
        "_last_time",
        "node_calls",
        "wall_drift_ms_max",
        "wall_offset_ms",
    )

    def __init__(self, *, drift: float = 0.0, monotonic_offset_ns: int = 0, wall_offset_ms: int = 0) -> None:
        self._drift = drift
        self._base_time = 0.0
        self._base_ns = monotonic_offset_ns
        self._last_ns = monotonic_offset_ns
        self._last_time = math.nan
        """Of the run, when the clock was last read."""
        self.node_calls: Calls | None = None
        """Where the node whose clock this is counts its calls."""
        self.wall_drift_ms_max: float = math.inf
        """How far drift takes the date away: a time service holds that, though not the monotonic clock's rate."""
        self.wall_offset_ms: int = wall_offset_ms
        """May be set at any time: a clock that is stepped, or an operator's hand."""

    @property
    def drift(self) -> float:
        return self._drift

    def set_drift(self, drift: float) -> None:
        """Run at another rate from now on."""
        assert drift > -1, f"a clock with drift {drift} stands still or runs backwards"
        self._base_ns = self.monotonic_ns()
        self._base_time = determinism.now()
        self._drift = drift

    def suspend(self, seconds: float) -> None:
        """The machine sleeps for so long while the rest of the world stands still: its clock goes on, it does not."""
        self._base_ns += round(seconds * 1e9)
        self._last_time = math.nan

    def reboot(self, monotonic_ns: int) -> None:
        """The machine was off: its monotonic clock begins anew, and may show once more what it showed before."""
        self._base_ns = self._last_ns = monotonic_ns
        self._base_time = determinism.now()
        self._last_time = math.nan

    def monotonic_ns(self) -> int:
        now = determinism.now()
        if now != self._last_time:
            self._last_time = now
            elapsed = (now - self._base_time) * (1.0 + self._drift)
            self._last_ns = max(self._last_ns, self._base_ns + round(elapsed * 1e9))
        return self._last_ns

    def wall_ms(self) -> int:
        now_ms = determinism.now() * 1000
        drifted_ms = max(-self.wall_drift_ms_max, min(self.wall_drift_ms_max, now_ms * self._drift))
        return START_WALL_MS + self.wall_offset_ms + round(now_ms + drifted_ms)

    def sleep(self, seconds: float) -> Coroutine[Any, Any, None]:
        if self.node_calls is not None:
            self.node_calls.hit()
        return determinism.sleep(self._virtual(seconds))

    def deadline(self, seconds: float) -> AbstractContextManager[trio.CancelScope]:
        return determinism.deadline_after(self._virtual(seconds))

    def _virtual(self, seconds: float) -> float:
        """How long ``seconds`` of this clock take in virtual time; more than none takes what the clock can show."""
        return max(seconds, RESOLUTION_SECONDS) / (1.0 + self._drift) if seconds > 0 else 0.0


class SimulatedRandom:
    """Implements :class:`shardkv.environment.Random` from a seed."""

    __slots__ = ("_random",)

    def __init__(self, *seed: object) -> None:
        self._random = determinism.seeded_random("random", *seed)

    def random(self) -> float:
        return self._random.random()

    def randrange(self, stop: int) -> int:
        return self._random.randrange(stop)


class SimulatedIds:
    """Implements :class:`shardkv.environment.Ids` from a seed: unpredictable to the node, repeatable to us."""

    __slots__ = ("_random",)

    def __init__(self, *seed: object) -> None:
        self._random = determinism.seeded_random("ids", *seed)

    def random_bytes(self, count: int) -> bytes:
        return self._random.randbytes(count)
