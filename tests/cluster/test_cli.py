"""The command line against a real cluster: exit codes, JSON, and what each command did."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest

from tests.cluster.harness import SECONDS_MAX, LocalCluster, started_and_settled

pytestmark = pytest.mark.cluster

T = TypeVar("T")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    with started_and_settled(tmp_path_factory.mktemp("cli")) as running:
        yield running


def code_of(world: LocalCluster | None, *arguments: str) -> int:
    return start(world, *arguments).returncode


def run(world: LocalCluster, *arguments: str, stdin: bytes = b"", code: int = 0) -> str:
    """A command's stdout; its exit code must be ``code``."""
    done = start(world, *arguments, stdin=stdin)
    assert done.returncode == code, f"{arguments}: {done.returncode}, {done.stdout!r}, {done.stderr!r}"
    return done.stdout.decode()


def start(world: LocalCluster | None, *arguments: str, stdin: bytes = b"") -> "subprocess.CompletedProcess[bytes]":
    """A command that has ended, and showed no traceback."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("SHARDKV_")}
    if world is not None:
        inherited["SHARDKV_CONNECT"] = world.connect
        if arguments[0] not in ("bench", "shell"):
            arguments = (*arguments, "--timeout", str(SECONDS_MAX))
    done = subprocess.run(
        [sys.executable, "-m", "shardkv.cli", *arguments],
        input=stdin,
        capture_output=True,
        timeout=SECONDS_MAX,
        env=inherited,
    )
    assert b"Traceback" not in done.stderr, done.stderr.decode()
    return done


def run_json(world: LocalCluster, *arguments: str) -> Any:
    return json.loads(run(world, *arguments, "--json"))


def eventually(found: Callable[[], T]) -> T:
    """What is found once it is there: nodes hear of a new range one after another, and a command asks any of them."""
    given_up_at = time.monotonic() + SECONDS_MAX
    while not (answer := found()):
        assert time.monotonic() < given_up_at, f"still {answer!r}"
    return answer


def test_one_shot_commands_read_what_they_wrote(world: LocalCluster) -> None:
    """DESIGN 2.2: 0 done, 1 the cluster answered with an error or the key is absent."""
    version = run(world, "put", "greeting", "hello").strip()
    assert run(world, "get", "greeting") == "hello\n"
    assert run_json(world, "get", "greeting") == {"key": "greeting", "value": "hello", "version": version}
    run(world, "get", "no such key", code=1)
    run(world, "cas", "greeting", "1", "no", code=1)
    run(world, "cas", "greeting", version, "again")
    assert run(world, "incr", "visits", "5") == "5\n"
    assert run(world, "incr", "visits") == "6\n"
    run(world, "incr", "greeting", code=1)
    run(world, "put", "binary", "-", stdin=b"\x00\xff\n")
    assert run_json(world, "get", "binary")["value_base64"] == "AP8K"
    assert [row["key"] for row in run_json(world, "scan", "--prefix", "gree")] == ["greeting"]
    run(world, "del", "greeting")
    run(world, "del", "greeting", code=1)


def test_wrong_usage_is_two_and_an_absent_cluster_three(world: LocalCluster) -> None:
    assert code_of(world, "frobnicate") == 2
    assert code_of(world, "get") == 2
    assert code_of(world, "put", "", "v") == 2
    assert code_of(None, "get", "a") == 2
    assert code_of(None, "get", "a", "--connect", "127.0.0.1:1", "--timeout", "0.5") == 3
    assert code_of(None, "put", "a", "b", "--connect", "127.0.0.1:1", "--timeout", "0.5") == 3


def test_the_shell_runs_commands_and_stops_at_the_first_failure(world: LocalCluster) -> None:
    assert "1" in run(world, "shell", "-c", "put shell/a 1; get shell/a")
    run(world, "shell", "-c", "get shell/absent; put shell/b 1", code=1)
    run(world, "get", "shell/b", code=1)


def test_export_and_import_carry_everything(world: LocalCluster, tmp_path: Path) -> None:
    lines = "".join(json.dumps({"key": f"bulk/{number:04}", "value": "v" * 20}) + "\n" for number in range(500))
    (tmp_path / "in.jsonl").write_text(lines)
    run(world, "import", str(tmp_path / "in.jsonl"))
    assert len(run_json(world, "scan", "--prefix", "bulk/")) == 500
    run(world, "export", "--prefix", "bulk/", str(tmp_path / "out.jsonl"))
    exported = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [(row["key"], row["value"]) for row in exported] == [(f"bulk/{n:04}", "v" * 20) for n in range(500)]


def test_the_cluster_is_shown_as_it_is(world: LocalCluster) -> None:
    """DESIGN 2.2: the fields of `nodes` and `ranges` are fixed."""
    status = run_json(world, "status")
    assert status["nodes"] == 3
    nodes = run_json(world, "nodes")
    assert sorted(row["name"] for row in nodes) == ["n1", "n2", "n3"]
    assert set(nodes[0]) == {"name", "id", "address", "state", "replicas", "leaders"}
    ranges = run_json(world, "ranges")
    assert set(ranges[0]) == {"id", "start", "end", "leader", "replicas", "epoch", "bytes"}
    assert ranges[0]["start"] == ""
    assert ranges[-1]["end"] is None
    leader = run_json(world, "leader", "some key")
    assert leader[0]["leader"] in {row["id"] for row in nodes}
    for command in ("status", "nodes", "ranges", "leader"):
        assert run(world, command)


def test_ranges_are_split_transferred_and_snapshotted(world: LocalCluster) -> None:
    run(world, "admin", "split", "m")
    (right,) = eventually(lambda: [row for row in run_json(world, "ranges") if row["start"] == "m"])
    run(world, "admin", "split", "m", code=1)
    other = next(row for row in run_json(world, "nodes") if row["id"] != right["leader"])
    # A node that has no time to answer its leader is not given the range.
    eventually(lambda: code_of(world, "admin", "transfer", str(right["id"]), other["name"]) == 0)
    eventually(lambda: run_json(world, "leader", "m")[0]["range"] == right["id"])
    eventually(lambda: code_of(world, "admin", "snapshot", str(right["id"])) == 0)
    run(world, "admin", "snapshot", "4711", code=1)
    run(world, "admin", "transfer", str(right["id"]), "nobody", code=2)


def test_a_short_benchmark_reports_its_numbers(world: LocalCluster) -> None:
    """DESIGN 2.2: the fields of `bench run --json`."""
    for seconds in ("1", "30"):  # the longer one only where the machine is too slow for a single write in the other
        report = run_json(world, "bench", "run", "--workload", "write", "--inflight", "8", "--seconds", seconds)
        if report["ops"]:
            break
    fields = {"workload", "inflight", "seconds", "ops", "errors", "throughput", "p50_ms", "p95_ms", "p99_ms"}
    assert fields | {"p999_ms", "max_ms", "client_cpu_s"} <= set(report)
    assert report["ops"] > 0
    assert report["errors"] == 0
