"""Virtual time, and runs that repeat: the only module that reaches into trio's scheduler and its clock.

The rule: all chance in a simulated run comes from the seed that :func:`run_deterministically` is given, including the
order in which trio runs tasks that are ready together.
"""

import random  # noqa: TID251  # seeded here, and only here
from collections.abc import Awaitable, Callable
from typing import TypeVar

import trio
import trio.testing
from trio._core import _run

T = TypeVar("T")


def run_deterministically(function: Callable[..., Awaitable[T]], *args: object, seed: int | str) -> T:
    """Like ``trio.run``, in virtual time that jumps whenever all tasks wait; the same seed gives the same run.

    Nothing inside may wait for the real world (threads, sockets): the clock would run away from it.
    """
    scheduler_random = _run._r
    deterministic = _run._ALLOW_DETERMINISTIC_SCHEDULING
    # Trio shuffles the tasks that are ready together, so that programs do not come to rely on an order. Seeding that
    # shuffle (and telling trio to sort before it) makes the order repeatable and yet arbitrary.
    _run._r = random.Random(f"scheduler {seed}")
    _run._ALLOW_DETERMINISTIC_SCHEDULING = True  # type: ignore[misc]
    try:
        return trio.run(function, *args, clock=trio.testing.MockClock(autojump_threshold=0))
    finally:
        _run._r = scheduler_random
        _run._ALLOW_DETERMINISTIC_SCHEDULING = deterministic  # type: ignore[misc]


def seeded_random(*parts: object) -> random.Random:
    """A random source of its own for each use, so that one more draw here changes nothing there."""
    return random.Random(" ".join(map(str, parts)))


SeededRandom = random.Random


def now() -> float:
    """The virtual time of the run, in seconds: one for all nodes, whatever their clocks say."""
    return trio.current_time()  # noqa: TID251


async def sleep(seconds: float) -> None:
    await trio.sleep(seconds)  # noqa: TID251


async def sleep_until(moment: float) -> None:
    await trio.sleep_until(moment)  # noqa: TID251


async def hang() -> None:
    """Wait until cancelled, as everything of a crashed node does."""
    await trio.sleep_forever()  # noqa: TID251


def deadline_after(seconds: float) -> trio.CancelScope:
    return trio.move_on_after(seconds)  # noqa: TID251


def deadline_at(moment: float) -> trio.CancelScope:
    return trio.move_on_at(moment)  # noqa: TID251
