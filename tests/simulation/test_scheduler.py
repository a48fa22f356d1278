"""The loop of simulated runs against trio's own: the same tasks, in the same order, told the same things."""

import types
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import trio
import trio.testing
from trio._core import _run

from shardkv.simulation import determinism, run_deterministically, scheduler

Trace = list[tuple[object, ...]]
Program = Callable[[Trace], Any]


@contextmanager
def trios_own(seed: str) -> Iterator[None]:
    """In place of :func:`scheduler.quickened`: trio's loop, made to repeat."""
    loop: Any = _run
    before = loop._r, loop._ALLOW_DETERMINISTIC_SCHEDULING
    loop._r, loop._ALLOW_DETERMINISTIC_SCHEDULING = scheduler._Order(seed), True
    try:
        yield
    finally:
        loop._r, loop._ALLOW_DETERMINISTIC_SCHEDULING = before


def traced(program: Program, seed: int) -> Trace:
    trace: Trace = []
    try:
        run_deterministically(program, trace, seed=seed)
    except BaseExceptionGroup as group:
        trace.append(("ended by", repr(group)))
    return trace


class Steps(trio.abc.Instrument):
    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self.scheduled: list[str] = []
        """An event wakes its waiters in no particular order; they are sorted before they run."""

    def task_scheduled(self, task: trio.lowlevel.Task) -> None:
        self.scheduled.append(task.name)

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        self.trace.append(("before", task.name, determinism.now()))

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        self.trace.append(("after", task.name))

    def task_exited(self, task: trio.lowlevel.Task) -> None:
        self.trace.append(("exited", task.name))


async def sleeps_and_events(trace: Trace) -> None:
    """Sleepers, waiters and senders that meet at the same moments, some under deadlines, some cancelled."""
    dice = determinism.seeded_random("program")
    send, receive = trio.open_memory_channel[int](2)
    event = trio.Event()

    def note(*what: object) -> None:
        trace.append((determinism.now(), *what))

    async def sleeper(name: int) -> None:
        for turn in range(8):
            with determinism.deadline_after(dice.choice((0.0, 0.01, 0.02, 5.0))) as scope:
                await determinism.sleep(dice.choice((0.0, 0.01, 0.02)))
            note("slept", name, turn, scope.cancelled_caught)

    async def sender(name: int, mine: trio.MemorySendChannel[int]) -> None:
        async with mine:
            for turn in range(5):
                await mine.send(turn)
                note("sent", name, turn)
                await trio.lowlevel.checkpoint()

    async def receiver(name: int, mine: trio.MemoryReceiveChannel[int]) -> None:
        async for value in mine:
            note("received", name, value)
            if dice.random() < 0.3:
                await determinism.sleep(0.01)

    async def waiter(name: int) -> None:
        try:
            await event.wait()
            note("woken", name)
            await determinism.hang()
        finally:
            with trio.CancelScope(shield=True):
                await determinism.sleep(0.005)
            note("left", name)

    async with trio.open_nursery() as outer:
        async with trio.open_nursery() as nursery:
            for name in range(4):
                nursery.start_soon(sleeper, name, name=f"sleeper {name}")
                nursery.start_soon(sender, name, send.clone(), name=f"sender {name}")
                nursery.start_soon(receiver, name, receive.clone(), name=f"receiver {name}")
                outer.start_soon(waiter, name, name=f"waiter {name}")
            send.close()
            receive.close()
        event.set()
        await trio.testing.wait_all_tasks_blocked()
        note("all wait")
        outer.cancel_scope.cancel()


async def instrumented(trace: Trace) -> None:
    steps = Steps(trace)
    trio.lowlevel.add_instrument(steps)
    await sleeps_and_events([])
    trio.lowlevel.remove_instrument(steps)
    trace += sorted((name,) for name in steps.scheduled)


async def failing(trace: Trace) -> None:
    """One task fails; its siblings are cancelled, and fail in their turn."""

    async def fails(delay: float) -> None:
        try:
            await determinism.sleep(delay)
            raise ValueError(delay)
        except trio.Cancelled:
            trace.append(("cancelled", delay))
            raise KeyError(delay) from None

    async with trio.open_nursery() as nursery:
        for delay in (0.03, 0.01, 0.02, 0.01):
            nursery.start_soon(fails, delay)


async def of_another_framework(trace: Trace) -> None:
    """What awaits something that trio does not know is told so, and may go on."""

    @types.coroutine
    def foreign() -> Generator[object, Any, None]:
        yield "something else"

    try:
        await foreign()
    except TypeError:
        trace.append(("told",))
    await determinism.sleep(1)
    trace.append((determinism.now(),))


@pytest.mark.parametrize("program", [sleeps_and_events, instrumented, failing, of_another_framework])
@pytest.mark.parametrize("seed", range(10))
def test_tasks_run_as_with_trios_own_loop(program: Program, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = traced(program, seed)
    monkeypatch.setattr(scheduler, "quickened", trios_own)
    assert ours == traced(program, seed)
    assert ours


def test_the_order_of_tasks_that_are_ready_together_follows_from_the_seed() -> None:
    traces = [traced(sleeps_and_events, seed) for seed in range(5)]
    assert traces == [traced(sleeps_and_events, seed) for seed in range(5)]
    assert len({str(trace) for trace in traces}) == 5


def test_trio_has_its_own_loop_again_after_a_run() -> None:
    def parts() -> list[object]:
        loop: Any = _run
        return [loop.unrolled_run, loop.Runner.reschedule, loop.WaitTaskRescheduled, loop._r]

    before = parts()
    run_deterministically(sleeps_and_events, [], seed=1)
    assert parts() == before


def test_a_suspended_process_takes_no_step_while_time_and_others_go_on() -> None:
    steps: list[tuple[float, str]] = []

    async def ticks(name: str) -> None:
        while True:
            steps.append((round(trio.current_time(), 3), name))
            await determinism.sleep(1)

    async def main() -> None:
        process = scheduler.Process()

        async def program() -> None:
            process.run_here()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(ticks, "child")
                with trio.move_on_after(2.5):
                    await trio.sleep_forever()
                steps.append((trio.current_time(), "deadline"))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(program)
            nursery.start_soon(ticks, "other")
            await determinism.sleep(1.5)
            process.suspend()
            process.suspend()
            assert process.suspended
            await determinism.sleep(2)
            process.resume()
            process.resume()
            assert not process.suspended
            await determinism.sleep(1.2)
            nursery.cancel_scope.cancel()

    run_deterministically(main, seed=1)
    assert [at for at, name in steps if name == "other"] == [0, 1, 2, 3, 4]
    assert [at for at, name in steps if name == "child"] == [0, 1, 3.5, 4.5]
    assert [at for at, name in steps if name == "deadline"] == [3.5]


def test_a_process_that_is_cancelled_while_it_is_suspended_ends_once_it_goes_on() -> None:
    async def main() -> None:
        process = scheduler.Process()
        scope = trio.CancelScope()
        ended: list[float] = []

        async def program() -> None:
            process.run_here()
            with scope:
                await trio.sleep_forever()
            ended.append(trio.current_time())

        async with trio.open_nursery() as nursery:
            nursery.start_soon(program)
            await determinism.sleep(1)
            process.suspend()
            scope.cancel()
            await determinism.sleep(1)
            assert not ended
            process.resume()
        assert ended == [2]

    run_deterministically(main, seed=1)
