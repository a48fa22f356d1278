"""The threads of one simulated node: jobs run in the loop, in virtual time, one after another where that is promised.

The rule: a job's effect comes at one moment, after its latency, so a crash finds it done or not begun; what is half
done is for the disk to say.
"""

from collections import deque
from collections.abc import Callable
from typing import Any, TypeVar

import trio

from shardkv.environment import SerialWorker
from shardkv.simulation import determinism
from shardkv.simulation.disk import SimulatedDisk

T = TypeVar("T")

_Job = tuple[Callable[[], object], Callable[[object, BaseException | None], None]]


class SimulatedWorkers:
    """Implements :class:`shardkv.environment.Workers`.

    Args:
        disk: jobs wait while it stalls.
        latency_seconds: called for each job; how long it takes in virtual time.
        at_once: called for each job that may run in the loop at once; whether this one does.
    """

    __slots__ = ("_disk", "_fenced", "at_once", "latency_seconds")

    def __init__(
        self, disk: SimulatedDisk, latency_seconds: Callable[[], float], at_once: Callable[[], bool] = lambda: False
    ) -> None:
        self._disk = disk
        self._fenced = False
        self.latency_seconds: Callable[[], float] = latency_seconds
        self.at_once: Callable[[], bool] = at_once

    def fence(self) -> None:
        """From now on no job runs and nobody is called back: the node has crashed."""
        self._fenced = True

    async def run(self, function: Callable[..., T], *args: Any) -> T:
        # A thread cannot be cancelled, so neither can this, unless the node crashes.
        if not self._fenced and (seconds := self.latency_seconds()) > 0:
            await determinism.sleep_uncancelled(seconds)
        else:
            await trio.lowlevel.cancel_shielded_checkpoint()
        if self._disk.stalled:
            with trio.CancelScope(shield=not self._fenced):
                await self._disk.moving()
        if self._fenced:
            await determinism.hang()
        return function(*args)

    async def serial(self, name: str, *, task_status: trio.TaskStatus[SerialWorker] = trio.TASK_STATUS_IGNORED) -> None:
        worker = SimulatedSerialWorker(name, self._runs_now)
        task_status.started(worker)
        try:
            while True:
                await worker.wanted.wait()
                worker.wanted = trio.Event()
                await self._drain(worker)
        finally:
            worker.closed = True
            if not self._fenced:
                with trio.CancelScope(shield=True):
                    await self._drain(worker)

    async def _drain(self, worker: "SimulatedSerialWorker") -> None:
        jobs = worker.jobs
        while jobs:
            # The job stays queued until it has run: whoever cancels us must find it.
            await self._pass_time()
            if self._fenced:
                jobs.clear()
                return
            _carry_out(*jobs.popleft())

    async def _pass_time(self) -> None:
        seconds = self.latency_seconds()
        if seconds > 0:
            await determinism.sleep(seconds)
        else:
            await trio.lowlevel.checkpoint()
        if self._disk.stalled:
            await self._disk.moving()

    def _runs_now(self) -> bool:
        return not self._fenced and not self._disk.stalled and self.at_once()

    def yield_interpreter(self) -> None:
        """There is no other thread."""


class SimulatedSerialWorker:
    """Implements :class:`shardkv.environment.SerialWorker`."""

    __slots__ = ("_name", "_runs_now", "closed", "jobs", "wanted")

    def __init__(self, name: str, runs_now: Callable[[], bool]) -> None:
        self._name = name
        self._runs_now = runs_now
        self.jobs: deque[_Job] = deque()
        self.wanted: trio.Event = trio.Event()
        self.closed: bool = False

    def submit(self, job: Callable[[], object], done: Callable[[object, BaseException | None], None]) -> None:
        if self.closed:
            raise trio.ClosedResourceError(f"the worker {self._name} is stopping")
        self.jobs.append((job, done))
        self.wanted.set()

    @property
    def at_once(self) -> bool:
        return not self.closed and not self.jobs and self._runs_now()

    def run_now(self, job: Callable[[], object], done: Callable[[object, BaseException | None], None]) -> bool:
        if not self.at_once:
            return False
        _carry_out(job, done)
        return True


def _carry_out(job: Callable[[], object], done: Callable[[object, BaseException | None], None]) -> None:
    result: object = None
    failure: BaseException | None = None
    try:
        result = job()
    except Exception as error:  # noqa: BLE001  # handed to the callback, which decides
        failure = error
    done(result, failure)
