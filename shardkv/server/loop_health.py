"""How late the node's one loop is: a probe that sleeps, looks how much too late it woke, and warns.

Lives here: the measurement and the warning. Does not live here: what makes the loop late (a long turn, a collection, a
machine without processor time), nor who shows the figures (the admin endpoint). The rule: the probe costs the loop a
few wake-ups a second and no request anything.
"""

from bisect import bisect_left
from dataclasses import dataclass
from typing import Any, Final

import trio

from shardkv.environment import Clock

PROBE_SECONDS: Final = 0.25
"""Shorter than a leader's promise (400 ms), so that no standstill long enough to lose a lease goes unseen."""
LATE_SECONDS: Final = 0.2
"""Half of a leader's promise: worth a warning."""
WARN_SECONDS: Final = 10.0
"""Between two warnings."""
BOUNDS_SECONDS: Final = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 5.0)
"""Upper bounds, included, of the groups that latenesses are counted in; above the last there is one more."""


@dataclass(frozen=True, slots=True)
class LoopStatistics:
    """A frozen picture of the loop's lateness since the start."""

    counts: tuple[int, ...]
    """Probes per group of :data:`BOUNDS_SECONDS`; the last counts what lies above all bounds."""
    late_seconds_sum: float


class LoopProbe:
    """Measures the loop that it runs in. A service."""

    def __init__(self, clock: Clock, log: Any) -> None:
        self._clock = clock
        self._log = log
        self._counts = [0] * (len(BOUNDS_SECONDS) + 1)
        self._sum = 0.0
        self._warned_ns: int | None = None

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        clock = self._clock
        task_status.started()
        while True:
            due_ns = clock.monotonic_ns() + int(PROBE_SECONDS * 1e9)
            await clock.sleep(PROBE_SECONDS)
            now_ns = clock.monotonic_ns()
            self.record(max(0, now_ns - due_ns) / 1e9, now_ns)

    def record(self, late_seconds: float, now_ns: int) -> None:
        """Count one probe that woke ``late_seconds`` too late."""
        self._counts[bisect_left(BOUNDS_SECONDS, late_seconds)] += 1
        self._sum += late_seconds
        if late_seconds <= LATE_SECONDS:
            return
        if self._warned_ns is None or now_ns - self._warned_ns >= WARN_SECONDS * 1e9:
            self._warned_ns = now_ns
            self._log.warning(
                "the loop stood still; other nodes may take this one for dead",
                late_ms=round(late_seconds * 1000),
                advice="give the machine more processor time, or look for large requests",
            )

    def statistics(self) -> LoopStatistics:
        return LoopStatistics(tuple(self._counts), self._sum)

    def check(self) -> None:
        assert all(count >= 0 for count in self._counts), f"counts below zero: {self._counts}"
