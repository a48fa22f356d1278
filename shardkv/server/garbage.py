"""When the process looks for cyclic garbage: when it is idle, and never in the middle of a turn.

Lives here: the policy. The collector itself is handed in, by whoever owns the process; a simulated node, or one inside
a user's own process, gets none and leaves it alone. The interpreter's own policy collects when enough has been
allocated, which is in the middle of the work and, with tens of thousands of long-lived objects, takes as long as
several turns.

What stands after the start is frozen: it is never looked at again. After that there are two kinds of collection. A
*full* one looks at everything that is not frozen and waits for an idle moment. A *young* one looks only at what has
come since the last and is quick; it is forced after a while, or once much has come, however busy the node is. A node
that is never idle gets a full one now and then all the same.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Protocol

import trio

from shardkv.environment import Clock

LOOK_SECONDS: Final = 1.0
IDLE_TURNS_MAX: Final = 200
"""Between two looks. Ticks and heartbeats of a node without work stay below it; a single client is far above."""
IDLE_PAUSES: Final = 50
"""An idle node waits this many times the last pause between full collections: they cost at most 2 % of its time."""
IDLE_SECONDS_MIN: Final = 5.0
IDLE_OBJECTS_MIN: Final = 700
"""New objects that make a full collection worth while; the interpreter's own threshold for a young one."""
FORCE_SECONDS: Final = 60.0
"""No collection for so long: a young one, busy or not."""
FULL_SECONDS_MAX: Final = 600.0
"""No full collection for so long: one, busy or not."""
YOUNG_OBJECTS_MAX: Final = 200_000
"""New objects that force a young collection: about 20 ms of pause, and some tens of megabytes if all were garbage."""
PAUSE_SECONDS: Final = 0.1
"""A pause that is worth a warning."""
_YOUNG, _FULL = 1, 2
"""Generations up to which a collection looks."""


class Collector(Protocol):
    """The interpreter's collector; the module ``gc`` is one."""

    def collect(self, generation: int = ..., /) -> int: ...

    def get_count(self) -> tuple[int, int, int]: ...

    def freeze(self) -> None: ...

    def unfreeze(self) -> None: ...

    def enable(self) -> None: ...

    def disable(self) -> None: ...


@dataclass(frozen=True, slots=True)
class GarbageStatistics:
    """A frozen picture of the collections since the start."""

    young: int
    full: int
    objects: int
    """Found to be garbage."""
    pause_seconds_sum: float
    pause_seconds_max: float


class GarbagePolicy:
    """Decides when ``collector`` runs, for as long as :meth:`run` does. ``turns`` counts what the node has done."""

    def __init__(self, collector: Collector, clock: Clock, turns: Callable[[], int], log: Any) -> None:
        self._collector = collector
        self._clock = clock
        self._turns = turns
        self._log = log
        self._turns_seen = 0
        self._collected_ns = self._full_ns = 0
        self._pause_ns = 0
        """Of the last full collection."""
        self._young = self._full = self._objects = 0
        self._pause_ns_sum = self._pause_ns_max = 0

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Service, to be started once the node serves. The interpreter's own policy is back when it ends."""
        collector = self._collector
        collector.collect()
        collector.freeze()
        collector.disable()
        self._collected_ns = self._full_ns = self._clock.monotonic_ns()
        try:
            task_status.started()
            while True:
                await self._clock.sleep(LOOK_SECONDS)
                self.look()
        finally:
            collector.enable()
            collector.unfreeze()

    def look(self) -> None:
        """Collect, if this is the moment."""
        now = self._clock.monotonic_ns()
        turns = self._turns()
        idle = turns - self._turns_seen <= IDLE_TURNS_MAX
        self._turns_seen = turns
        objects = self._collector.get_count()[0]
        since_full = (now - self._full_ns) / 1e9
        wait = max(IDLE_SECONDS_MIN, min(IDLE_PAUSES * self._pause_ns / 1e9, FORCE_SECONDS))
        if since_full >= FULL_SECONDS_MAX or (idle and since_full >= wait and objects >= IDLE_OBJECTS_MIN):
            self._collect(_FULL)
        elif objects >= YOUNG_OBJECTS_MAX or now - self._collected_ns >= FORCE_SECONDS * 1e9:
            self._collect(_YOUNG)

    def _collect(self, generation: int) -> None:
        begun = self._clock.monotonic_ns()
        found = self._collector.collect(generation)
        self._collected_ns = self._clock.monotonic_ns()
        pause = self._collected_ns - begun
        self._objects += found
        self._pause_ns_sum += pause
        self._pause_ns_max = max(self._pause_ns_max, pause)
        if generation == _FULL:
            self._full += 1
            self._full_ns, self._pause_ns = self._collected_ns, pause
        else:
            self._young += 1
        report = self._log.warning if pause > PAUSE_SECONDS * 1e9 else self._log.debug
        report("garbage collected", full=generation == _FULL, pause_ms=round(pause / 1e6, 1), objects=found)

    def statistics(self) -> GarbageStatistics:
        return GarbageStatistics(
            young=self._young,
            full=self._full,
            objects=self._objects,
            pause_seconds_sum=self._pause_ns_sum / 1e9,
            pause_seconds_max=self._pause_ns_max / 1e9,
        )

    def check(self) -> None:
        assert self._full_ns <= self._collected_ns, "a full collection is a collection too"
        assert self._pause_ns_max <= self._pause_ns_sum, "the longest pause is one of all"
