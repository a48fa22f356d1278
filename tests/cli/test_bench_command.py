"""``shardkv bench run``: what it says of a run. The client processes are stand-ins."""

import json
from typing import Any

import pytest
from click.testing import CliRunner, Result

from shardkv.cli.bench import RECORDS_MAX
from shardkv.cli.root import shardkv
from shardkv_bench import runner
from shardkv_bench.histogram import Histogram
from shardkv_bench.worker import ABSENT, Task
from shardkv_bench.workloads import key_of


def bench_run(monkeypatch: pytest.MonkeyPatch, ops: int, errors: dict[str, int], *arguments: str) -> Result:
    """The command, over client processes that found so many operations and errors."""

    def run(task: Task, processes: int, **how: Any) -> runner.Result:
        return runner.Result(ops, sum(errors.values()), errors, 1.0, 0.1, 0.0, processes, Histogram())

    monkeypatch.setattr(runner, "run", run)
    return CliRunner().invoke(shardkv, ["bench", "run", "--connect", "127.0.0.1:1", "--json", *arguments])


def test_operations_that_all_failed_are_not_said_to_be_under_way_still(monkeypatch: pytest.MonkeyPatch) -> None:
    """The advice was to measure for longer."""
    failed = bench_run(monkeypatch, 0, {"Unavailable": 7})
    assert failed.exit_code == 1
    assert json.loads(failed.stdout)["errors"] == 7
    assert "7 operations failed with: Unavailable" in failed.stderr
    assert "--seconds" not in failed.stderr
    slow = bench_run(monkeypatch, 0, {})
    assert slow.exit_code == 1
    assert "give more --seconds" in slow.stderr


def test_records_that_were_never_loaded_are_named_as_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    some = bench_run(monkeypatch, 5, {ABSENT: 7}, "--no-load")
    assert some.exit_code == 0
    assert "leave out --no-load" in some.stderr
    assert "--no-load" not in bench_run(monkeypatch, 5, {ABSENT: 7}).stderr


def test_records_keep_their_order_and_size_up_to_the_most_that_there_may_be() -> None:
    """Keys of more digits come before those of fewer, and scans did not find what they looked for."""
    assert key_of(RECORDS_MAX - 1) < key_of(2 * RECORDS_MAX)
    assert len(key_of(2 * RECORDS_MAX)) == 16
