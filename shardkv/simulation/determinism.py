"""Virtual time, and runs that repeat.

The rule: all chance in a simulated run comes from the seed that :func:`run_deterministically` is given, including the
order in which trio runs tasks that are ready together.
"""

import math
import random  # noqa: TID251  # seeded here, and only here
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import contextmanager
from heapq import heappop, heappush
from typing import Any, Final, TypeVar

import trio

from shardkv.simulation import scheduler

T = TypeVar("T")

STANDSTILL_ROUNDS: Final = 64 * scheduler.POLL_ROUNDS
"""So often the scheduler goes round at one moment only when some task wakes itself for ever."""


SLEEP_STEPS_PER_SECOND: Final = 1_000_000
"""Sleeps end at multiples of a microsecond."""

LOOK_SECONDS: Final = 0.0003
"""Between two looks at what may pass as soon as a message arrives: about what one takes, so that none is missed."""


class Standstill(Exception):
    """Tasks run, and time does not pass. A real node would keep a processor busy with nothing."""


class Timer:
    """A call that is to be made at a moment of virtual time. See :func:`call_at`."""

    __slots__ = ("callback", "moment", "task")

    def __init__(self, moment: float, callback: Callable[[], object], task: trio.lowlevel.Task | None = None) -> None:
        """``task`` is woken instead of a call being made, if one is given."""
        self.moment = moment
        self.callback: Callable[[], object] | None = callback
        self.task = task

    def cancel(self) -> None:
        self.callback = None

    def fire(self) -> None:
        callback, self.callback = self.callback, None
        if callback is not None:
            callback()


class VirtualClock(trio.abc.Clock):
    """Time that jumps to the next moment at which anything is due whenever all tasks wait.

    It has timers of its own beside trio's deadlines: a timer costs a tenth of a cancel scope, and a simulated second is
    made of hundreds. The scheduler asks it how long to wait exactly when no task can run; that is when it jumps.
    """

    def __init__(self) -> None:
        self.now = 0.0
        self._timers: list[tuple[float, int, Timer]] = []
        self._made = 0
        self._runner: Any = None
        self._moved_at = (-1.0, 0)
        """The last moment that was looked at, and the round at which it was new."""
        self.standstill: Standstill | None = None
        """What the run has been cancelled for."""

    def start_clock(self) -> None:
        """It starts at 0."""
        self._runner = scheduler.current_runner()

    def current_time(self) -> float:
        return self.now

    def call_at(self, moment: float, callback: Callable[[], object], task: trio.lowlevel.Task | None = None) -> Timer:
        timer = Timer(moment, callback, task)
        self._made += 1
        heappush(self._timers, (moment, self._made, timer))
        return timer

    def deadline_to_sleep_time(self, deadline: float) -> float:
        if deadline <= self.now:
            return 0
        runner = self._runner
        if runner.waiting_for_idle:
            return math.inf  # Whoever waits for all others to wait comes first.
        timers, runq = self._timers, runner.runq
        while not runq:  # A timer may wake nobody; then time goes on without a round of the scheduler.
            while timers and timers[0][2].callback is None:
                heappop(timers)
            if not timers or timers[0][0] > deadline:
                if deadline == math.inf:
                    return math.inf
                self.now = max(self.now, deadline)
                return 0
            moment = self.now = max(self.now, timers[0][0])
            while timers and timers[0][0] <= moment:
                timer = heappop(timers)[2]
                callback, timer.callback = timer.callback, None
                if callback is None:
                    continue
                if timer.task is not None:
                    runner.reschedule(timer.task)
                else:
                    callback()
        return 0

    def look(self, rounds: int) -> None:
        """See whether time passes. Where it has not for very many rounds, the run is cancelled, and at last ended."""
        moment, since = self._moved_at
        if self.now != moment:
            self._moved_at = (self.now, rounds)
        elif rounds - since >= STANDSTILL_ROUNDS:
            self._moved_at = (moment, rounds)
            busy = ", ".join(sorted({task.name for task in self._runner.runq}))
            if self.standstill is not None:
                raise self.standstill  # cancelling has not ended it
            self.standstill = Standstill(f"time has stood still at {moment:.6f} s; what runs all the while: {busy}")
            self._runner.main_task.parent_nursery.cancel_scope.cancel()


_clock: VirtualClock | None = None
"""Of the run under way."""


@contextmanager
def _deterministic(seed: int | str) -> Iterator[VirtualClock]:
    global _clock
    before = _clock
    _clock = VirtualClock()
    try:
        with scheduler.quickened(f"scheduler {seed}"):
            yield _clock
    finally:
        _clock = before


def run_deterministically(function: Callable[..., Awaitable[T]], *args: object, seed: int | str) -> T:
    """Like ``trio.run``, in virtual time that jumps whenever all tasks wait; the same seed gives the same run.

    Raises Standstill when tasks run for ever without waiting for anything.

    Nothing inside may wait for the real world (threads, sockets): the clock would run away from it.
    """
    with _deterministic(seed) as clock:
        try:
            return trio.run(function, *args, clock=clock)
        finally:
            if clock.standstill is not None:
                raise clock.standstill


def seeded_random(*parts: object) -> random.Random:
    """A random source of its own for each use, so that one more draw here changes nothing there."""
    return random.Random(" ".join(map(str, parts)))


SeededRandom = random.Random


def now() -> float:
    """The virtual time of the run, in seconds: one for all nodes, whatever their clocks say."""
    return trio.current_time() if _clock is None else _clock.now  # noqa: TID251


def call_at(moment: float, callback: Callable[[], object]) -> Timer:
    """Call ``callback`` in the loop at a moment of virtual time, unless the timer is cancelled first."""
    if _clock is not None:
        return _clock.call_at(moment, callback)
    # Another clock runs this loop, as in a test with pytest-trio's.
    timer = Timer(moment, callback)

    async def wait() -> None:
        await trio.sleep_until(moment)  # noqa: TID251
        timer.fire()

    trio.lowlevel.spawn_system_task(wait)
    return timer


def sleep(seconds: float) -> Coroutine[Any, Any, None]:
    """To be awaited at once."""
    return sleep_until(now() + seconds)


def _nothing() -> None:
    """What a timer that wakes a task calls."""


async def sleep_until(moment: float) -> None:
    if _clock is None:
        await trio.sleep_until(moment)  # noqa: TID251
    elif moment <= _clock.now:
        await trio.lowlevel.checkpoint()
    else:
        task = trio.lowlevel.current_task()
        # Twice 0.05 s is not 0.1 s; rounded, whoever should wake together does.
        moment = math.ceil(moment * SLEEP_STEPS_PER_SECOND) / SLEEP_STEPS_PER_SECOND
        timer = _clock.call_at(moment, _nothing, task)

        def abort(_: object) -> trio.lowlevel.Abort:
            timer.cancel()
            return trio.lowlevel.Abort.SUCCEEDED

        await scheduler.park(abort)


async def until(happens: Callable[[], bool], end: float, look_seconds: float = LOOK_SECONDS) -> bool:
    """Wait until something is so, however soon it passes, or to the moment ``end``; whether it was.

    Virtual time looks for itself every ``look_seconds``, without a round of the scheduler.
    """
    if _clock is None:
        while not (so := happens()) and now() < end:
            await sleep(look_seconds)
        return so
    if happens():
        return True
    clock, so = _clock, False
    task = trio.lowlevel.current_task()
    timer: Timer

    def look() -> None:
        nonlocal so, timer
        so = happens()
        if so or clock.now >= end:
            trio.lowlevel.reschedule(task)
        else:
            timer = clock.call_at(clock.now + look_seconds, look)

    def abort(_: object) -> trio.lowlevel.Abort:
        timer.cancel()
        return trio.lowlevel.Abort.SUCCEEDED

    timer = clock.call_at(clock.now + look_seconds, look)
    await scheduler.park(abort)
    return so


async def sleep_uncancelled(seconds: float) -> None:
    """Let time pass that no cancellation shortens; much cheaper than a shield. ``seconds`` must be above 0."""
    if _clock is None:
        with trio.CancelScope(shield=True):
            await sleep(seconds)
    else:
        _clock.call_at(now() + seconds, _nothing, trio.lowlevel.current_task())
        await scheduler.park(_not_aborted)


def _not_aborted(_: object) -> trio.lowlevel.Abort:
    return trio.lowlevel.Abort.FAILED


async def hang() -> None:
    """Wait until cancelled, as everything of a crashed node does."""
    await trio.sleep_forever()  # noqa: TID251


def deadline_after(seconds: float) -> trio.CancelScope:
    return trio.move_on_after(seconds)  # noqa: TID251
