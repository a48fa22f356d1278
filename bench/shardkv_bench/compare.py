"""shardkv and etcd side by side: the same load, in alternating rounds of one run, on one machine.

Absolute figures drift with the machine and the minute, ratios less so; hence the alternation. Both keep their
defaults, fsync included. etcd is driven at its best: with space for all that is written, by a client that costs almost
nothing, connected to its leader.
"""

import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from shardkv_bench import runner, trials
from shardkv_bench.machine import Machine
from shardkv_bench.runner import Result
from shardkv_bench.systems import Etcd, ShardKV, System
from shardkv_bench.worker import Task

CONNECTIONS: Final = 4
INFLIGHT: Final = (1, 16, 64, 256)
SPREAD_RANGES: Final = 3
Say = Callable[[str], object]


@dataclass(frozen=True, slots=True)
class Options:
    """What a comparison measures. ``seconds`` is the length of one round of one row on one system."""

    workloads: Sequence[str] = ("write", "read")
    inflight: Sequence[int] = INFLIGHT
    seconds: float = 3.0
    warmup_seconds: float = 0.7
    rounds: int = 3
    records: int = 100_000
    value_bytes: int = 100
    ranges: int = 1
    processes: int = 1
    failover_trials: int = 0
    cold_starts: int = 1
    bulk: bool = True


@dataclass(frozen=True, slots=True)
class Row:
    """One workload at one number in flight, for both systems. A throughput is the median of the rounds."""

    workload: str
    inflight: int
    shardkv: list[Result]
    etcd: list[Result]

    def to_json(self) -> dict[str, object]:
        ours, theirs = measured(self.shardkv), measured(self.etcd)
        return {
            "workload": "put" if self.workload == "write" else "get" if self.workload == "read" else self.workload,
            "inflight": self.inflight,
            "shardkv": ours,
            "etcd": theirs,
            "throughput_ratio": ratio(ours["throughput"], theirs["throughput"]),
            "server_cpu_ratio": ratio(ours["server_cpu_us"], theirs["server_cpu_us"]) if ours["ops"] else None,
        }


def measured(rounds: list[Result]) -> dict[str, object]:
    """The figures of one system in one row."""
    total = runner.combine(rounds)
    return {
        "throughput": round(statistics.median(result.throughput for result in rounds), 1),
        "p50_ms": total.quantile_ms(0.5),
        "p99_ms": total.quantile_ms(0.99),
        "server_cpu_us": round(total.server_cpu_us, 2),
        "client_cpu_us": round(total.client_cpu_us, 2),
        "ops": total.ops,
        "errors": total.errors,
        "client_bound": any(result.client_bound for result in rounds),
    }


def ratio(one: object, other: object) -> float | None:
    """``one`` over ``other``, to two places; None where that has no meaning."""
    assert isinstance(one, int | float), one
    assert isinstance(other, int | float), other
    return round(one / other, 2) if other else None


@dataclass(slots=True)
class Report:
    """All that one comparison found."""

    machine: Machine
    options: Options
    rows: list[Row] = field(default_factory=list)
    bulk_seconds: dict[str, float] = field(default_factory=dict)
    cold_start_seconds: dict[str, list[float]] = field(default_factory=dict)
    failover_seconds: dict[str, list[float]] = field(default_factory=dict)

    def to_json(self) -> dict[str, object]:
        return {
            "machine": self.machine.to_json(),
            "ranges": self.options.ranges,
            "rows": [row.to_json() for row in self.rows],
            "bulk_seconds": rounded(self.bulk_seconds),
            "cold_start_seconds": rounded(self.cold_start_seconds),
            "failover_seconds": rounded(self.failover_seconds),
        }


def rounded(figures: dict[str, float] | dict[str, list[float]]) -> dict[str, object]:
    return {
        name: [round(each, 3) for each in value] if isinstance(value, list) else round(value, 3)
        for name, value in figures.items()
    }


def compare(directory: Path, options: Options, machine: Machine, say: Say) -> Report:
    """Run everything. ``directory`` holds the data of all nodes and is the caller's to remove."""
    report = Report(machine, options)
    _cold_starts(directory, report, say)
    with ExitStack() as stack:
        systems: list[System] = [
            ShardKV(directory / "shardkv", options.records, options.ranges),
            Etcd(directory / "etcd"),
        ]
        for system in systems:
            stack.callback(system.stop)
            system.start()
            system.prepare()
        _load(systems, report, say)
        for workload in options.workloads:
            for inflight in options.inflight:
                report.rows.append(_row(systems, workload, inflight, options, say))
        for system in systems:
            for number in range(options.failover_trials):
                seconds = trials.failover(system)
                report.failover_seconds.setdefault(system.name, []).append(seconds)
                say(f"{system.name}: failover {number + 1} of {options.failover_trials}: {seconds:.2f} s")
    return report


def _cold_starts(directory: Path, report: Report, say: Say) -> None:
    for number in range(report.options.cold_starts):
        for system in (
            ShardKV(directory / f"cold-shardkv-{number}", report.options.records),
            Etcd(directory / f"cold-etcd-{number}"),
        ):
            try:
                with _all_running(system):
                    seconds = trials.cold_start(system)
            finally:
                system.stop()
            report.cold_start_seconds.setdefault(system.name, []).append(seconds)
            say(f"{system.name}: cold start to the first write: {seconds:.2f} s")


@contextmanager
def _all_running(system: System) -> Iterator[None]:
    """Raises NodeFailed when a node of the system has ended by the end of the body, whatever else failed for that.

    What two nodes of three do is no measure of three, and the processor time of one that ended is not known.
    """
    try:
        yield
    except Exception:
        system.check_running()
        raise
    system.check_running()


def task_for(system: System, options: Options, workload: str, inflight: int) -> Task:
    return Task(
        driver=system.name,
        action="run",
        addresses=system.addresses,
        workload=workload,
        records=options.records,
        value_bytes=options.value_bytes,
        inflight=inflight,
        connections=CONNECTIONS,
        warmup_seconds=options.warmup_seconds,
        seconds=options.seconds,
        seed=1,
    )


def _load(systems: list[System], report: Report, say: Say) -> None:
    for system in systems:
        with _all_running(system):
            task = runner.loading(task_for(system, report.options, "bulk", 1))
            result = runner.run(task, 1, system.cpu_seconds)
        report.bulk_seconds[system.name] = result.seconds
        say(f"{system.name}: {result.ops:,} keys loaded in {result.seconds:.2f} s")


def _row(systems: list[System], workload: str, inflight: int, options: Options, say: Say) -> Row:
    """Rounds alternate, and so does who begins, so that neither always follows the other."""
    results: dict[str, list[Result]] = {system.name: [] for system in systems}
    for number in range(options.rounds):
        for system in systems if number % 2 == 0 else reversed(systems):
            with _all_running(system):
                system.prepare()  # leaders may have moved since the last round
                task = task_for(system, options, workload, inflight)
                results[system.name].append(runner.run(task, options.processes, system.cpu_seconds))
    row = Row(workload, inflight, results["shardkv"], results["etcd"])
    fields = row.to_json()
    say(f"{fields['workload']} at {inflight} in flight: {fields['throughput_ratio']} times etcd's throughput")
    return row
