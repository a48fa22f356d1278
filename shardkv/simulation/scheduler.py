"""Trio's scheduler, quickened for runs in virtual time: the only module that reaches into it.

Lives here: the loop that runs ready tasks, and the order in which it does. Does not live here: the clock, which says
what time it becomes when no task can run. The loop stands in for trio's while a simulated run is under way; tasks,
nurseries and cancellation are trio's own, and what runs, in which order and what it is told is as with trio's loop.
That one asks the system for events each time round, looks for instruments several times a step and makes a new outcome
for each; a simulated second is made of some hundred steps, and a tenth of its cost was that.
"""

import random  # noqa: TID251  # seeded here and in ``determinism``, and only there
from collections.abc import Awaitable, Callable, Generator, Iterator, MutableSequence
from contextlib import contextmanager
from contextvars import ContextVar
from math import inf
from types import coroutine
from typing import Any, Final, Protocol

import trio
from outcome import Error, Value
from trio._core import _run, _traps

POLL_ROUNDS: Final = 1_024
"""How often the loop goes round before it looks whether the system wants something: an interrupt by its user."""

_trio: Any = _run
"""Trio's scheduler, of which more is needed here than it shows."""


class Clock(Protocol):
    """What the loop asks of the clock of its run."""

    now: float

    def deadline_to_sleep_time(self, deadline: float) -> float:
        """Called when no task can run: let time pass to the next moment, 0, or say how long to wait for the system."""
        ...

    def look(self, rounds: int) -> None:
        """Called every :data:`POLL_ROUNDS` rounds, with how many there have been."""
        ...


class _NoInstruments(dict[str, Any]):
    """In place of trio's mapping of instruments, which is slower to look into, for as long as there are none."""

    def __init__(self, runner: Any) -> None:
        super().__init__()
        self._runner = runner

    def add_instrument(self, instrument: trio.abc.Instrument) -> None:
        runner = self._runner
        runner.instruments = _trio.Instruments(())
        runner.instruments.add_instrument(instrument)


class _Order(random.Random):
    """The scheduler's source of chance; most of what it is to shuffle is a single task."""

    def shuffle(self, x: MutableSequence[Any]) -> None:
        if len(x) > 1:
            super().shuffle(x)


class _Nothing:
    """What a task is told that is woken without a value or an error; trio makes an outcome each time."""

    __slots__ = ()

    def unwrap(self) -> None:
        return None


_NOTHING: Final = _Nothing()


class _WaitTaskRescheduled:
    """A task's wish to sleep until it is woken. Trio's own is frozen, which takes longer to make."""

    __slots__ = ("abort_func",)

    def __init__(self, abort_func: Callable[[Any], Any]) -> None:
        self.abort_func = abort_func


class Process:
    """The tasks of one simulated process: what :meth:`run_here` made of one task, and every task that comes from it.

    While it is suspended none of them takes a step; whatever wakes them, or cancels them, is kept for later. Time goes
    on, and so does all that is not a task: what comes to its sockets waits there.
    """

    def __init__(self) -> None:
        self._held: list[Any] | None = None
        """Its tasks that would have run since it was suspended, in that order; None while it runs."""

    @property
    def suspended(self) -> bool:
        return self._held is not None

    def run_here(self) -> None:
        """The task that calls this belongs to the process, and so does every task that it starts from now on."""
        _process.set(self)

    def suspend(self) -> None:
        """From the next round on. Does nothing to one that is suspended."""
        assert _trio.unrolled_run is _run_to_end, "trio's own loop suspends nobody"
        if self._held is None:
            self._held = []
            _suspended.add(self)

    def resume(self) -> None:
        """Its tasks run in the next round. Does nothing to one that runs."""
        if self._held is not None:
            held, self._held = self._held, None
            _suspended.discard(self)
            _trio.GLOBAL_RUN_CONTEXT.runner.runq.extend(held)

    def hold(self, task: Any) -> None:
        assert self._held is not None, "a task is held of a process that runs"
        self._held.append(task)


_process: ContextVar[Process | None] = ContextVar("process", default=None)
_suspended: set[Process] = set()
"""Of the run under way."""


def _without_held(tasks: list[Any]) -> list[Any]:
    """Of the tasks that are to run in this round those of processes that are not suspended."""
    batch: list[Any] = []
    for task in tasks:
        process = task.context.get(_process)
        if process is not None and process.suspended:
            process.hold(task)
        else:
            batch.append(task)
    return batch


def _reschedule(runner: Any, task: Any, next_send: Any = _NOTHING) -> None:
    """Wake a task: it runs in the next round."""
    assert task._next_send_fn is None, f"{task!r} is woken twice"
    task._next_send_fn = task.coro.send
    task._next_send = next_send if next_send is not _trio._NO_SEND else _NOTHING
    task._abort_func = None
    task.custom_sleep_data = None
    runner.runq.append(task)
    if runner.instruments:
        _tell(runner, "task_scheduled", task)


def _tell(runner: Any, event: str, *arguments: object) -> None:
    if event in runner.instruments:
        runner.instruments.call(event, *arguments)


def _run_to_end(
    runner: Any,
    function: Callable[..., Awaitable[object]],
    arguments: Any,
    host_uses_signal_set_wakeup_fd: bool = False,
) -> Generator[float, Any, None]:
    """The loop. Yields how long to wait for events of the system, and is sent those that came."""
    assert not host_uses_signal_set_wakeup_fd, "a simulated run is nobody's guest"
    try:
        runner.entry_queue.wakeup.wakeup_on_signals()
        runner.clock.start_clock()
        if not runner.instruments.get("_all"):
            runner.instruments = _NoInstruments(runner)
        runner.init_task = runner.spawn_impl(runner.init, (function, arguments), None, "<init>", system_task=True)
        yield from _rounds(runner, runner.clock)
    except trio.TrioInternalError:
        raise
    except BaseException as error:
        raise trio.TrioInternalError("the scheduler of a simulated run failed") from error
    finally:
        runner.close()
        _trio.GLOBAL_RUN_CONTEXT.__dict__.clear()
        if runner.ki_pending:  # it came when there was no task left to tell
            interrupt = KeyboardInterrupt()
            if isinstance(runner.main_task_outcome, Error):
                interrupt.__context__ = runner.main_task_outcome.error
            runner.main_task_outcome = Error(interrupt)


def _rounds(runner: Any, clock: Clock) -> Generator[float, Any, None]:
    tasks, runq, deadlines, idle = runner.tasks, runner.runq, runner.deadlines, runner.waiting_for_idle
    order, step = _trio._r, _step
    rounds = 0
    while tasks:
        rounds += 1
        seconds = 0.0
        if not runq:
            seconds = clock.deadline_to_sleep_time(deadlines.next_deadline() if deadlines._heap else inf)
            if idle:
                seconds = min(seconds, idle.keys()[0][0])
        if seconds > 0 or idle or rounds % POLL_ROUNDS == 0:
            clock.look(rounds)
            runner.io_manager.process_events((yield min(seconds, _trio._MAX_TIMEOUT)))
            deadlines.expire(clock.now)
            if idle and not runq:
                _wake_idle(runner)
        elif deadlines._heap and deadlines._heap[0][0] <= clock.now:
            deadlines.expire(clock.now)
        if len(runq) == 1 and not _suspended:
            step(runner, runq.popleft())
            continue
        batch = list(runq)
        runq.clear()
        if len(batch) > 1:
            # Sorted before it is shuffled: the order is arbitrary, and repeats.
            batch.sort(key=_age)
            order.shuffle(batch)
        if _suspended:
            batch = _without_held(batch)
        while batch:
            step(runner, batch.pop())


def _age(task: Any) -> int:
    age: int = task._counter
    return age


def _wake_idle(runner: Any) -> None:
    """Every task waits: wake those that wait for just that, the most impatient of them."""
    idle = runner.waiting_for_idle
    cushion = idle.keys()[0][0]
    while idle and idle.keys()[0][0] == cushion:
        runner.reschedule(idle.popitem(0)[1])


def _step(runner: Any, task: Any) -> None:
    """Run a task until it wants to wait, or ends."""
    _trio.GLOBAL_RUN_CONTEXT.task = task
    if runner.instruments:
        _tell(runner, "before_task_step", task)
    send, message = task._next_send_fn, task._next_send
    task._next_send_fn = task._next_send = None
    end: Value[object] | Error | None = None
    try:
        wish = task.context.run(send, message)
    except StopIteration as stop:
        end = Value(stop.value)
    except BaseException as error:  # noqa: BLE001  # whatever ends a task is for its nursery
        trace = error.__traceback__
        end = Error(error.with_traceback(trace.tb_next if trace is not None else None))
        del trace
    if end is not None:
        runner.task_exited(task, end)
    else:
        task._schedule_points += 1
        if type(wish) is _WaitTaskRescheduled:
            task._cancel_points += 1
            task._abort_func = wish.abort_func
            if runner.ki_pending and task is runner.main_task:
                task._attempt_delivery_of_pending_ki()
            if task._cancel_status.effectively_cancelled:
                task._attempt_delivery_of_any_pending_cancel()
        elif wish is _trio.CancelShieldedCheckpoint:
            runner.reschedule(task)
        elif type(wish) is _trio.PermanentlyDetachCoroutineObject:
            runner.task_exited(task, wish.final_outcome)
        else:
            runner.reschedule(task, TypeError(f"trio cannot {wish!r}: was it asked by another framework's library?"))
            task._next_send_fn = task.coro.throw
    if runner.instruments:
        _tell(runner, "after_task_step", task)
    del _trio.GLOBAL_RUN_CONTEXT.task


@coroutine
def park(abort: Callable[[Any], trio.lowlevel.Abort]) -> Generator[Any, Any, None]:
    """Trio's ``wait_task_rescheduled`` at half its cost, for who is woken without a value. To be awaited at once."""
    (yield _traps.WaitTaskRescheduled(abort)).unwrap()


def current_runner() -> Any:
    """Of the run whose task or clock is asking."""
    return _trio.GLOBAL_RUN_CONTEXT.runner


@contextmanager
def quickened(seed: str) -> Iterator[None]:
    """While it lasts, ``trio.run`` has this module's loop, and shuffles tasks that are ready together by the seed.

    Its clock must be a :class:`Clock`.
    """
    # Trio shuffles the tasks that are ready together, so that programs do not come to rely on an order.
    replaced = (
        (_trio, "_r", _Order(seed)),
        (_trio, "unrolled_run", _run_to_end),
        (_trio.Runner, "reschedule", _reschedule),
        (_trio, "WaitTaskRescheduled", _WaitTaskRescheduled),
        (_traps, "WaitTaskRescheduled", _WaitTaskRescheduled),
    )
    before = [getattr(owner, name) for owner, name, _ in replaced]
    _suspended.clear()
    for owner, name, ours in replaced:
        setattr(owner, name, ours)
    try:
        yield
    finally:
        for (owner, name, _), theirs in zip(replaced, before, strict=True):
            setattr(owner, name, theirs)
