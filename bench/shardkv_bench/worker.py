"""One client process of a load: warms up, measures for so many seconds, reports. ``python -m shardkv_bench.worker``.

The parent speaks lines: the worker gets its task as JSON in its argument, prints ``ready`` once it is connected, waits
for ``go`` on stdin, prints ``measuring`` and ``measured`` at the edges of the measured time, so that the parent can
read the servers' processor time there, and at last its result as one JSON line. It ends when stdin is closed before
that, as by the parent's death.
"""

import gc
import json
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Final

from shardkv_bench.histogram import Histogram

ERRORS_SHOWN_MAX: Final = 5
ABSENT: Final = "no such record"
"""Why an operation failed that did not find what was loaded: that costs less than what was asked."""


@dataclass(frozen=True, slots=True)
class Task:
    """What one client process does. ``inflight`` operations are under way at a time, over ``connections``."""

    driver: str
    """``shardkv`` or ``etcd``."""
    action: str
    """``run`` a workload for some seconds, or ``load`` all records once."""
    addresses: str
    workload: str
    records: int
    value_bytes: int
    inflight: int
    connections: int
    warmup_seconds: float
    seconds: float
    seed: int = 0
    process: int = 0
    processes: int = 1

    def to_json(self) -> str:
        return json.dumps(asdict(self))


class Measurement:
    """What ends between ``begin`` and ``end``. Operations that end outside are counted nowhere."""

    def __init__(self) -> None:
        self.active = False
        self.histogram = Histogram()
        self.ops = 0
        self.errors: Counter[str] = Counter()
        self._cpu = 0.0
        self._started = 0.0
        self.seconds = 0.0
        self.cpu_seconds = 0.0

    def begin(self) -> None:
        gc.freeze()
        say("measuring")
        self._cpu, self._started = time.process_time(), time.perf_counter()
        self.active = True

    def end(self, under_way: Iterable[int] = ()) -> None:
        """``under_way`` is when the operations began that have not ended, in ns of the performance counter.

        Those that have taken longer by now than any that ended stand among the latencies, else a stall that lasts would
        leave no trace in them. They count as no operations. Where all that ended failed, there are no latencies.
        """
        self.active = False
        self.seconds = time.perf_counter() - self._started
        self.cpu_seconds = time.process_time() - self._cpu
        say("measured")
        if self.errors and not self.ops:
            return
        now, longest = time.perf_counter_ns(), self.histogram.maximum
        for started in under_way:
            if now - started > longest:
                self.histogram.record(now - started)

    def done(self, started_ns: int, ops: int = 1) -> None:
        """An operation that began at ``started_ns`` of the performance counter has succeeded."""
        if self.active:
            self.ops += ops
            self.histogram.record(time.perf_counter_ns() - started_ns)

    def failed(self, why: str) -> None:
        if self.active:
            self.errors[why] += 1

    def to_json(self) -> dict[str, object]:
        return {
            "ops": self.ops,
            "errors": sum(self.errors.values()),
            "error_kinds": dict(self.errors.most_common(ERRORS_SHOWN_MAX)),
            "seconds": self.seconds,
            "client_cpu_s": self.cpu_seconds,
            "histogram": self.histogram.to_json(),
        }


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def wait_for_go() -> None:
    """Say that this worker is ready and wait for its parent. Ends the process when the parent is gone, now or later."""
    gc.collect()  # once operations are under way, it would be a pause in the latency of each
    say("ready")
    if sys.stdin.readline().strip() != "go":
        raise SystemExit(1)
    threading.Thread(target=_end_with_stdin, args=(sys.stdin.fileno(),), name="parent-watch", daemon=True).start()


def _end_with_stdin(descriptor: int) -> None:
    """End this process at once when stdin ends. It is read below its buffer, whose lock the interpreter's end needs."""
    while os.read(descriptor, 1):
        pass
    os._exit(1)


def main(argument: str) -> None:
    task = Task(**json.loads(argument))
    if task.driver == "shardkv":
        from shardkv_bench import shardkv_driver

        result = shardkv_driver.perform(task)
    else:
        from shardkv_bench import etcd_driver

        result = etcd_driver.perform(task)
    say(json.dumps(result.to_json()))


def failed(error: Exception) -> int:
    """Say it in one line; the exit code, 0 for a bug: neither the cluster's answer nor its silence."""
    from shardkv.errors import ShardKVError

    sys.stderr.write(f"client process: {type(error).__name__}: {error}\n")
    code = _exit_code(error)
    return 0 if code == 1 and not isinstance(error, ShardKVError) else code


def _exit_code(error: BaseException) -> int:
    """The command line's codes: 3 for a cluster that could not be reached, 4 for an unknown outcome, 1 else."""
    from shardkv.errors import OutcomeUnknown, Unavailable

    if isinstance(error, BaseExceptionGroup):
        return max(_exit_code(inner) for inner in error.exceptions)
    cause = error.__cause__
    if isinstance(error, Unavailable | ConnectionError) or isinstance(cause, Unavailable):
        return 3
    return 4 if isinstance(error, OutcomeUnknown) or isinstance(cause, OutcomeUnknown) else 1


if __name__ == "__main__":
    try:
        main(sys.argv[1])
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if not (code := failed(error)):
            raise
        sys.exit(code)
