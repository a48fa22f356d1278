"""The serial worker: order, errors, cancellation; and that a burst costs one wake-up."""

import sys
import threading
from functools import partial
from queue import SimpleQueue
from types import SimpleNamespace
from typing import Any

import pytest
import trio

from shardkv.environment import SerialWorker
from shardkv.environment.real import workers
from shardkv.environment.real.workers import (
    RUN_NOW_NS_MAX,
    RUN_NOW_PENALTY,
    RealSerialWorker,
    RealWorkers,
    _Waker,
)


async def test_jobs_run_in_order_in_one_thread_and_callbacks_in_the_loop(nursery: trio.Nursery) -> None:
    worker: SerialWorker = await nursery.start(RealWorkers().serial, "log")
    loop_thread = threading.get_ident()
    threads = set()
    order: list[int] = []
    finished = trio.Event()

    def job(number: int) -> int:
        threads.add(threading.get_ident())
        return number

    def done(result: object, error: BaseException | None) -> None:
        assert threading.get_ident() == loop_thread
        assert error is None
        assert isinstance(result, int)
        order.append(result)
        if result == 99:
            finished.set()

    for number in range(100):
        worker.submit(partial(job, number), done)
    await finished.wait()
    assert order == list(range(100))
    assert len(threads) == 1
    assert threads != {loop_thread}
    nursery.cancel_scope.cancel()


async def test_what_a_job_raised_is_handed_to_its_callback_and_the_next_one_runs(nursery: trio.Nursery) -> None:
    worker: SerialWorker = await nursery.start(RealWorkers().serial, "log")
    seen: list[object] = []
    finished = trio.Event()
    worker.submit(lambda: 1 // 0, lambda result, error: seen.append(error))
    worker.submit(lambda: 7, lambda result, error: (seen.append(result), finished.set()))
    await finished.wait()
    assert isinstance(seen[0], ZeroDivisionError)
    assert seen[1] == 7
    nursery.cancel_scope.cancel()


async def test_cancelling_finishes_the_queued_jobs_first() -> None:
    """A node that stops in order must not lose a sync that it has handed over."""
    gate = threading.Event()
    finished: list[object] = []
    async with trio.open_nursery() as nursery:
        worker: SerialWorker = await nursery.start(RealWorkers().serial, "log")
        worker.submit(gate.wait, lambda result, error: finished.append(result))
        for number in range(5):
            worker.submit(lambda number=number: number, lambda result, error: finished.append(result))  # type: ignore[misc]
        nursery.cancel_scope.cancel()
        gate.set()
    assert finished == [True, 0, 1, 2, 3, 4]
    with pytest.raises(trio.ClosedResourceError, match="log is stopping"):
        worker.submit(lambda: None, lambda result, error: None)


async def test_no_thread_outlives_its_service() -> None:
    def names() -> list[str]:
        return [thread.name for thread in threading.enumerate()]

    async with trio.open_nursery() as nursery:
        await nursery.start(RealWorkers().serial, "short-lived")
        assert "shardkv-short-lived" in names()
        nursery.cancel_scope.cancel()
    assert "shardkv-short-lived" not in names()


async def test_a_burst_of_completions_wakes_the_loop_once(
    nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One wake-up drains all completions (DESIGN 4.2)."""
    wakes = 0
    real = _Waker.wake

    def count(self: _Waker) -> None:
        nonlocal wakes
        wakes += 1
        real(self)

    monkeypatch.setattr(_Waker, "wake", count)
    worker: SerialWorker = await nursery.start(RealWorkers().serial, "log")
    ran = threading.Event()
    delivered: list[object] = []
    for number in range(50):
        worker.submit(lambda number=number: number, lambda result, error: delivered.append(result))  # type: ignore[misc]
    worker.submit(ran.set, lambda result, error: delivered.append(result))
    # The loop does not run while we wait here, so all completions meet one look.
    ran.wait()
    while len(delivered) < 51:
        await trio.lowlevel.checkpoint()
    assert wakes <= 2
    nursery.cancel_scope.cancel()


async def test_yielding_lets_the_idle_worker_begin_the_job(
    nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise the sync starts only when the loop gives the interpreter up by itself (DESIGN 4.2)."""
    monkeypatch.setattr("shardkv.environment.real.workers.YIELD_SECONDS_MAX", 60)
    workers = RealWorkers()
    worker: SerialWorker = await nursery.start(workers.serial, "log")
    assert isinstance(worker, RealSerialWorker)
    while not worker._idle:
        await trio.to_thread.run_sync(lambda: None)
    began: list[bool] = []
    release = threading.Event()
    interval = sys.getswitchinterval()
    sys.setswitchinterval(10)  # the interpreter changes hands only where its holder waits
    try:
        worker.submit(lambda: (began.append(True), release.wait()), lambda result, error: None)
        workers.yield_interpreter()
        assert began
        # The worker is busy now: a further job must not make the loop wait for it.
        worker.submit(lambda: None, lambda result, error: None)
        assert workers._handed_over is None
        workers.yield_interpreter()
    finally:
        sys.setswitchinterval(interval)
        release.set()  # else the service could not end
    nursery.cancel_scope.cancel()


async def test_sockets_wake_the_loop_where_there_is_no_eventfd(
    nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr("os.eventfd")
    worker: SerialWorker = await nursery.start(RealWorkers().serial, "log")
    finished = trio.Event()
    delivered: list[object] = []

    def done(result: int | None, error: BaseException | None) -> None:
        delivered.append((result, error))
        finished.set()

    worker.submit(lambda: 7, done)
    await finished.wait()
    assert delivered == [(7, None)]
    nursery.cancel_scope.cancel()


async def test_a_general_job_returns_and_raises() -> None:
    workers = RealWorkers()
    assert await workers.run(divmod, 7, 2) == (3, 1)
    with pytest.raises(ZeroDivisionError):
        await workers.run(divmod, 7, 0)


async def idle(worker: SerialWorker) -> None:
    """Wait until the thread is waiting for a job and everything before has been called back."""
    while not worker.at_once:  # noqa: ASYNC110  # the thread says nothing when it begins to wait
        await trio.sleep(0.001)


async def test_a_quick_job_may_run_in_the_loop_at_once(nursery: trio.Nursery) -> None:
    worker: SerialWorker = await nursery.start(RealWorkers().serial, "log")
    await idle(worker)
    seen: list[object] = []
    assert worker.run_now(threading.get_ident, lambda result, error: seen.append((result, error)))
    assert seen == [(threading.get_ident(), None)]
    assert worker.run_now(lambda: 1 // 0, lambda result, error: seen.append(error))
    assert isinstance(seen[1], ZeroDivisionError)
    nursery.cancel_scope.cancel()


async def test_a_job_runs_in_the_loop_only_when_none_before_it_waits_for_its_callback(nursery: trio.Nursery) -> None:
    """What is logged later must not be on disk, nor be told of, before what was logged earlier."""
    worker: SerialWorker = await nursery.start(RealWorkers().serial, "log")
    await idle(worker)
    gate = threading.Event()
    finished = trio.Event()
    order: list[str] = []

    def no_callback(result: object, error: BaseException | None) -> None:
        raise AssertionError("it ran out of its turn")

    worker.submit(gate.wait, lambda result, error: (order.append("first"), finished.set()))
    assert not worker.run_now(lambda: order.append("too early"), no_callback)
    gate.set()
    while not worker._completed:  # type: ignore[attr-defined]  # the thread is done and the loop has not looked yet
        pass
    assert not worker.run_now(lambda: order.append("too early"), no_callback)
    await finished.wait()
    assert order == ["first"]
    nursery.cancel_scope.cancel()


async def test_no_job_runs_in_the_loop_beside_one_that_the_thread_has_just_taken(nursery: trio.Nursery) -> None:
    """The thread may lose the interpreter between taking a job and saying so. Two jobs of the log at once would each
    take records off the queue that the other has written, and lose some."""

    class Slow(SimpleQueue[Any]):
        """Where the thread stands still with the second job in its hands."""

        def __init__(self) -> None:
            self.taken = 0
            self.second = threading.Event()
            self.resume = threading.Event()

        def get(self, block: bool = True, timeout: float | None = None) -> Any:
            item = super().get(block, timeout)
            self.taken += 1
            if self.taken == 2:
                self.second.set()
                self.resume.wait()
            return item

    worker = RealSerialWorker("log", lambda worker: None)
    worker._jobs = queue = Slow()
    await nursery.start(worker.run)
    gate = threading.Event()
    called_back = trio.Event()
    finished = trio.Event()
    order: list[str] = []
    worker.submit(gate.wait, lambda result, error: called_back.set())
    worker.submit(lambda: order.append("second"), lambda result, error: finished.set())
    gate.set()
    await called_back.wait()
    await trio.to_thread.run_sync(queue.second.wait)
    try:
        assert not worker.run_now(lambda: order.append("beside it"), lambda result, error: None)
    finally:
        queue.resume.set()
    await finished.wait()
    assert order == ["second"]
    assert worker.run_now(lambda: order.append("after it"), lambda result, error: None)
    nursery.cancel_scope.cancel()


async def test_after_slow_jobs_the_next_ones_go_to_the_thread(
    nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loop serves everybody: a disk that is slow must not hold it up more than now and then."""
    worker: SerialWorker = await nursery.start(RealWorkers().serial, "log")
    assert isinstance(worker, RealSerialWorker)
    await idle(worker)
    now_ns = 0
    monkeypatch.setattr(workers, "time", SimpleNamespace(monotonic_ns=lambda: now_ns))

    def run(took_ns: int) -> bool:
        def job() -> None:
            nonlocal now_ns
            now_ns += took_ns

        return worker.run_now(job, lambda result, error: None)

    quick, slow = RUN_NOW_NS_MAX // 5, 2 * RUN_NOW_NS_MAX
    for took in [*[quick] * 20, slow] * 5:
        assert run(took), "one that was slow among quick ones waited for a processor, say"
    held_up, began = 0, now_ns
    for _ in range(1_000):
        if run(slow):
            held_up += slow
        else:
            now_ns += quick
    assert held_up < (now_ns - began) // RUN_NOW_PENALTY + 5 * slow
    for _ in range(200):
        now_ns += RUN_NOW_PENALTY * slow
        assert run(quick)
    assert run(quick), "quick again"
    nursery.cancel_scope.cancel()


async def test_a_worker_that_is_stopping_runs_nothing_in_the_loop() -> None:
    async with trio.open_nursery() as nursery:
        worker: SerialWorker = await nursery.start(RealWorkers().serial, "log")
        await idle(worker)
        nursery.cancel_scope.cancel()
    assert not worker.run_now(lambda: None, lambda result, error: None)
