"""Threads: the general hop, and the serial worker whose hand-off is cheap enough for every turn.

The rule: a job runs in a thread, its callback in the loop, and nothing else is shared between the two but a queue each
way. What the jobs do is the caller's.
"""

import os
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any, Final, TypeVar

import trio

from shardkv.environment import SerialWorker

T = TypeVar("T")

THREADS_MAX: Final = 8
"""How many general jobs run at once; more wait. They are flushes, compressions and the like."""

YIELD_SECONDS_MAX: Final = 0.0005
"""The loop gives the interpreter away for no longer, should the system not run the other thread in this time."""

RUN_NOW_NS_MAX: Final = 1_000_000
"""When jobs in the loop take longer, the next ones go to the thread. One that was slow among quick ones does not count:
on a busy machine it may only have waited for a processor, and the thread would have to wait for two."""
RUN_NOW_WEIGHT: Final = 4
"""The newest job in the loop counts one in so many in what jobs take."""
RUN_NOW_PENALTY: Final = 20
"""For so many times as long: so a disk that is always slow holds up the loop for less than a twentieth of the time."""
RUN_NOW_PENALTY_NS_MAX: Final = 60_000_000_000

_Done = Callable[[object, BaseException | None], None]
_Job = tuple[Callable[[], object], _Done]


class RealWorkers:
    """Implements :class:`shardkv.environment.Workers`."""

    __slots__ = ("_handed_over", "_limiter")

    def __init__(self) -> None:
        self._limiter = trio.CapacityLimiter(THREADS_MAX)
        self._handed_over: RealSerialWorker | None = None
        """The idle worker that was given a job last and may not have begun it."""

    async def run(self, function: Callable[..., T], *args: Any) -> T:
        return await trio.to_thread.run_sync(function, *args, limiter=self._limiter)

    async def serial(self, name: str, *, task_status: trio.TaskStatus[SerialWorker] = trio.TASK_STATUS_IGNORED) -> None:
        worker = RealSerialWorker(name, self._note_handed_over)
        await worker.run(task_status=task_status)

    def yield_interpreter(self) -> None:
        """As in the protocol: wait until the worker that was given a job last has begun it.

        A plain ``time.sleep(0)`` would do, but sleeps through the kernel's timer slack (85 µs instead of 40), and on
        newer interpreters hardly gives the lock away at all.
        """
        worker = self._handed_over
        if worker is not None:
            self._handed_over = None
            worker.wait_begun()

    def _note_handed_over(self, worker: "RealSerialWorker") -> None:
        self._handed_over = worker


class RealSerialWorker:
    """One thread that runs jobs in order. Implements :class:`shardkv.environment.SerialWorker`."""

    __slots__ = (
        "_begun",
        "_closed",
        "_completed",
        "_idle",
        "_jobs",
        "_name",
        "_on_hand_over",
        "_outstanding",
        "_run_now_from_ns",
        "_run_now_ns",
        "_signalled",
        "_waker",
    )

    def __init__(self, name: str, on_hand_over: "Callable[[RealSerialWorker], None]") -> None:
        self._name = name
        self._on_hand_over = on_hand_over
        self._idle = False
        """The thread waits for a job, so the next one is begun as soon as it gets the interpreter. Only a hint: it may
        also have taken a job a moment ago and not said so yet."""
        self._outstanding = 0
        """Jobs that were submitted and whose callback has not run yet. The loop's alone."""
        self._begun = threading.Lock()
        """Taken by the loop, released by the thread when it begins a job."""
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        """None ends the thread."""
        self._completed: deque[tuple[_Done, object, BaseException | None] | None] = deque()
        """Filled by the thread, emptied by the loop; None says that the thread has ended."""
        self._signalled = False
        """The loop has been woken and has not looked yet, so that a burst of completions costs one system call."""
        self._closed = False
        self._run_now_ns = 0
        """About how long a job in the loop takes."""
        self._run_now_from_ns = 0
        """From when jobs may run in the loop again, after slow ones."""
        self._waker = _Waker()

    def submit(self, job: Callable[[], object], done: _Done) -> None:
        """As in the protocol. Raises trio.ClosedResourceError once the service has been cancelled."""
        if self._closed:
            raise trio.ClosedResourceError(f"the worker {self._name} is stopping")
        self._outstanding += 1
        if self._idle:
            self._idle = False
            self._begun.acquire(blocking=False)
            self._on_hand_over(self)
        self._jobs.put((job, done))

    @property
    def at_once(self) -> bool:
        """As in the protocol."""
        return not self._outstanding and not self._closed and time.monotonic_ns() >= self._run_now_from_ns

    def run_now(self, job: Callable[[], object], done: _Done) -> bool:
        """As in the protocol."""
        if not self.at_once:
            return False
        result: object = None
        failure: Exception | None = None
        began_ns = time.monotonic_ns()
        try:
            result = job()
        except Exception as error:  # noqa: BLE001  # handed to the callback, which decides
            failure = error
        ended_ns = time.monotonic_ns()
        took_ns = ended_ns - began_ns
        self._run_now_ns += (took_ns - self._run_now_ns) // RUN_NOW_WEIGHT
        if self._run_now_ns > RUN_NOW_NS_MAX:
            self._run_now_from_ns = ended_ns + min(RUN_NOW_PENALTY * took_ns, RUN_NOW_PENALTY_NS_MAX)
        done(result, failure)
        return True

    def wait_begun(self) -> None:
        """Block, briefly, until the thread has begun the job that :meth:`submit` gave it while it was idle."""
        self._begun.acquire(timeout=YIELD_SECONDS_MAX)

    async def run(self, *, task_status: trio.TaskStatus[SerialWorker] = trio.TASK_STATUS_IGNORED) -> None:
        thread = threading.Thread(target=self._work, name=f"shardkv-{self._name}", daemon=True)
        thread.start()
        try:
            task_status.started(self)
            try:
                while True:
                    await self._waker.wait()
                    self._deliver()
            finally:
                self._closed = True
                self._jobs.put(None)
                with trio.CancelScope(shield=True):
                    while not self._deliver():
                        await self._waker.wait()
        finally:
            thread.join()
            self._waker.close()

    def _deliver(self) -> bool:
        """Call back for what has completed; whether the thread has ended."""
        self._waker.clear()
        # Reset first: a completion that comes after this line wakes the loop again.
        self._signalled = False
        completed = self._completed
        while completed:
            item = completed.popleft()
            if item is None:
                return True
            done, result, error = item
            self._outstanding -= 1
            done(result, error)
        return False

    def _work(self) -> None:
        get = self._jobs.get
        completed = self._completed
        begun = self._begun
        while True:
            self._idle = True
            item = get()
            if item is None:
                break
            self._idle = False
            if begun.locked():
                begun.release()
            job, done = item
            result: object = None
            error: BaseException | None = None
            try:
                result = job()
            except BaseException as caught:  # noqa: BLE001  # handed to the callback, which decides
                error = caught
            completed.append((done, result, error))
            # Not kept alive by this frame until the next job comes.
            del item, job, done, result, error
            if not self._signalled:
                self._signalled = True
                self._waker.wake()
        completed.append(None)
        self._waker.wake()


class _Waker:
    """Wakes the loop from another thread: an eventfd on Linux, else a pair of sockets."""

    __slots__ = ("_eventfd", "_reader", "_writer")

    def __init__(self) -> None:
        self._eventfd = -1
        if hasattr(os, "eventfd"):
            self._eventfd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
            return
        self._reader, self._writer = socket.socketpair()
        self._reader.setblocking(False)
        self._writer.setblocking(False)

    def wake(self) -> None:
        if self._eventfd >= 0:
            os.eventfd_write(self._eventfd, 1)
            return
        try:
            self._writer.send(b"\0")
        except BlockingIOError:
            pass  # Full of wake-ups that the loop has not read yet; one is enough.

    async def wait(self) -> None:
        await trio.lowlevel.wait_readable(self._eventfd if self._eventfd >= 0 else self._reader)

    def clear(self) -> None:
        try:
            if self._eventfd >= 0:
                os.eventfd_read(self._eventfd)
            else:
                self._reader.recv(4096)
        except BlockingIOError:
            pass  # Nothing had been signalled.

    def close(self) -> None:
        if self._eventfd >= 0:
            trio.lowlevel.notify_closing(self._eventfd)
            os.close(self._eventfd)
        else:
            self._reader.close()
            self._writer.close()
