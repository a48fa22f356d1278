"""Runs client processes side by side and adds up what they measured.

A client process that used nearly a whole core was itself the limit; :attr:`Result.client_bound` says so, and more
processes are the remedy. Workers are ended by their process id.
"""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Final

from shardkv_bench.histogram import Histogram, merged
from shardkv_bench.worker import Task

CLIENT_BOUND_FRACTION: Final = 0.85
"""A client process busier than this was the bottleneck, or close to it."""
GRACE_SECONDS: Final = 60.0
"""How long a worker may take beyond the time it was told to run."""
LOOK_SECONDS: Final = 0.25
"""How often whoever waits for client processes is told that they are still at it."""
NS_PER_MS: Final = 1e6


class WorkerFailed(Exception):
    """A client process ended early; its stderr has been passed on. ``code`` is its exit code, or 1."""

    def __init__(self, message: str, code: int = 1) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True, slots=True)
class Result:
    """What all client processes of one run measured together."""

    ops: int
    errors: int
    error_kinds: dict[str, int]
    seconds: float
    client_cpu_s: float
    server_cpu_s: float
    processes: int
    histogram: Histogram

    @property
    def throughput(self) -> float:
        """Operations per second."""
        return self.ops / self.seconds if self.seconds else 0.0

    @property
    def client_cpu_us(self) -> float:
        """Microseconds of client processor time for each operation."""
        return self.client_cpu_s / self.ops * 1e6 if self.ops else 0.0

    @property
    def server_cpu_us(self) -> float:
        return self.server_cpu_s / self.ops * 1e6 if self.ops else 0.0

    @property
    def client_bound(self) -> bool:
        return self.client_cpu_s > CLIENT_BOUND_FRACTION * self.seconds * self.processes

    def quantile_ms(self, fraction: float) -> float:
        return round(self.histogram.quantile(fraction) / NS_PER_MS, 4)

    @property
    def max_ms(self) -> float:
        return round(self.histogram.maximum / NS_PER_MS, 4)


def loading(task: Task) -> Task:
    """The task that writes every record which ``task`` will touch."""
    return replace(task, action="load", inflight=1, warmup_seconds=0.0, seconds=0.0)


def report_fields(task: Task, result: Result) -> dict[str, object]:
    """What ``bench run --json`` prints."""
    return {
        "workload": task.workload,
        "inflight": task.inflight,
        "seconds": round(result.seconds, 3),
        "ops": result.ops,
        "errors": result.errors,
        "throughput": round(result.throughput, 1),
        "p50_ms": result.quantile_ms(0.5),
        "p95_ms": result.quantile_ms(0.95),
        "p99_ms": result.quantile_ms(0.99),
        "p999_ms": result.quantile_ms(0.999),
        "max_ms": result.max_ms,
        "client_cpu_s": round(result.client_cpu_s, 3),
    }


def combine(results: list[Result]) -> Result:
    """Several runs of the same load, one after another, as one."""
    return Result(
        ops=sum(result.ops for result in results),
        errors=sum(result.errors for result in results),
        error_kinds=_summed(result.error_kinds for result in results),
        seconds=sum(result.seconds for result in results),
        client_cpu_s=sum(result.client_cpu_s for result in results),
        server_cpu_s=sum(result.server_cpu_s for result in results),
        processes=results[0].processes,
        histogram=merged(result.histogram for result in results),
    )


def run(
    task: Task,
    processes: int = 1,
    server_cpu: Callable[[], float] = lambda: 0.0,
    waiting: Callable[[], None] = lambda: None,
) -> Result:
    """Run a task in so many client processes, which share its operations in flight.

    ``server_cpu`` is read at both edges of the measured time; ``waiting`` is called now and then while it lasts. Raises
    WorkerFailed.
    """
    processes = min(processes, task.inflight) if task.action == "run" else processes
    with contextlib.ExitStack() as stack:
        workers: list[_Worker] = []
        stack.enter_context(_suspended_together(workers))
        for each in shares(task, processes):
            workers.append(stack.enter_context(_worker(each, waiting)))
        for worker in workers:
            worker.expect("ready")
        for worker in workers:
            worker.go()
        for worker in workers:
            worker.expect("measuring")
        before = server_cpu()
        for worker in workers:
            worker.expect("measured")
        used = server_cpu() - before
        answers = [worker.result() for worker in workers]
    return Result(
        ops=sum(answer["ops"] for answer in answers),
        errors=sum(answer["errors"] for answer in answers),
        error_kinds=_summed(answer["error_kinds"] for answer in answers),
        seconds=max(answer["seconds"] for answer in answers),
        client_cpu_s=sum(answer["client_cpu_s"] for answer in answers),
        server_cpu_s=used,
        processes=processes,
        histogram=merged(Histogram.from_json(answer["histogram"]) for answer in answers),
    )


def _summed(counts: Iterable[dict[str, int]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for each in counts:
        total.update(each)
    return dict(total)


def shares(task: Task, processes: int) -> list[Task]:
    """A task cut for so many processes: operations in flight and connections are split, nothing is lost."""
    return [
        replace(
            task,
            process=number,
            processes=processes,
            inflight=max(1, len(range(number, task.inflight, processes))),
            connections=max(1, len(range(number, task.connections, processes))),
        )
        for number in range(processes)
    ]


@contextlib.contextmanager
def _suspended_together(workers: "list[_Worker]") -> Iterator[None]:
    """Meanwhile, what suspends this process from its terminal (^Z) suspends ``workers`` with it.

    Each is in a process group of its own, so the terminal does not, and they would go on with their load. When this
    process goes on, whatever stopped it, WorkerFailed is raised: the suspension stands in what they measure, or they
    went on while nobody looked.
    """

    def suspend(number: int, frame: object) -> None:
        for worker in workers:
            worker.suspend()
        signal.signal(signal.SIGTSTP, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTSTP)

    def go_on(number: int, frame: object) -> None:
        signal.signal(signal.SIGCONT, signal.SIG_DFL)
        raise WorkerFailed("the run was suspended: it is void; start it again")

    handlers = {signal.SIGTSTP: suspend, signal.SIGCONT: go_on}
    mine = threading.current_thread() is threading.main_thread()  # no other can say what a signal does
    if not mine or any(signal.getsignal(number) is not signal.SIG_DFL for number in handlers):
        yield
        return
    for number, handler in handlers.items():
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number in handlers:
            signal.signal(number, signal.SIG_DFL)


class _Worker:
    def __init__(self, child: "subprocess.Popen[bytes]", waiting: Callable[[], None]) -> None:
        self._child = child
        self._waiting = waiting

    def expect(self, wanted: str) -> None:
        line = self._line()
        if line.strip() != wanted:
            raise WorkerFailed(f"a client process said {line!r} instead of {wanted!r}")

    def suspend(self) -> None:
        """Return once it does nothing any more."""
        self._child.send_signal(signal.SIGSTOP)
        with contextlib.suppress(ChildProcessError):
            os.waitid(os.P_PID, self._child.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)

    def go(self) -> None:
        assert self._child.stdin is not None
        self._child.stdin.write(b"go\n")

    def result(self) -> dict[str, Any]:
        answer: dict[str, Any] = json.loads(self._line())
        return answer

    def _line(self) -> str:
        assert self._child.stdout is not None
        # The pipe is read without a buffer, in which a line could stand that select knows nothing of.
        while not select.select([self._child.stdout], [], [], LOOK_SECONDS)[0]:
            self._waiting()
        line = self._child.stdout.readline().decode()
        if not line:
            code = self._child.wait(GRACE_SECONDS)
            raise WorkerFailed(f"a client process ended with {code}", code if code > 0 else 1)
        return line


@contextlib.contextmanager
def _worker(task: Task, waiting: Callable[[], None]) -> Iterator[_Worker]:
    child = subprocess.Popen(
        [sys.executable, "-m", "shardkv_bench.worker", task.to_json()],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        bufsize=0,
        process_group=0,  # an interrupt at the terminal is this process's, which ends the worker
    )
    try:
        yield _Worker(child, waiting)
        child.wait(GRACE_SECONDS)
    finally:
        child.kill()
        child.wait()
        for pipe in (child.stdin, child.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
