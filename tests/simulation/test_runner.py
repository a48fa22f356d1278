"""Whole runs: a small fixed swarm, that equal seeds are equal runs, and that a swarm resumes where it stopped."""

import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click
import pytest
import trio
from click.testing import CliRunner

from shardkv.config import NodeConfig
from shardkv.errors import Busy
from shardkv.machine import execution, reads
from shardkv.machine.envelope import FORMAT, pack_head
from shardkv.machine.keys import USER_PREFIX
from shardkv.multiraft.proposer import Proposer
from shardkv.multiraft.replica import Replica
from shardkv.simulation import determinism, run_deterministically, scheduler, simulated_cluster
from shardkv.simulation import node as node_module
from shardkv.simulation import swarm as swarm_module
from shardkv.simulation.checkers.violation import Violation
from shardkv.simulation.command import simulation
from shardkv.simulation.faults import KINDS, Faults
from shardkv.simulation.observing import apart
from shardkv.simulation.runner import RunSettings, run
from shardkv.simulation.swarm import SwarmFileError, SwarmSettings, load, swarm
from shardkv.simulation.workload import WORKLOADS, Workload
from shardkv.storage.wal import Wal
from shardkv.types import RangeId
from shardkv.wire.commands import Op
from shardkv.wire.requests import Method
from shardkv_client import Client
from shardkv_client.core import Core, Link
from shardkv_client.scan import Scan


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_everything_holds_under_all_faults(seed: int) -> None:
    """The fixed part of the swarm; a failure prints the command that repeats it."""
    settings = RunSettings(seed, minutes=0.25)
    result = run(settings)
    assert result.violation is None, f"{result.violation}\nto repeat it: {settings.command()}"
    assert result.answered > 50
    assert result.faults > 3


def test_a_run_in_which_time_stands_still_ends_and_says_who_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(determinism, "STANDSTILL_ROUNDS", 2 * scheduler.POLL_ROUNDS)

    async def spin(faults: Faults, seconds: float) -> None:
        while True:
            await trio.lowlevel.checkpoint()

    monkeypatch.setattr(Faults, "run", spin)
    result = run(RunSettings(1, minutes=0.1))
    assert result.violation is not None
    assert result.violation.startswith("Standstill: time has stood still at ")
    assert "runner.Run.main" in result.violation, "the task that spins"


@pytest.mark.parametrize("option, names", [("--workload", WORKLOADS), ("--faults", ("all", "none", *KINDS))])
def test_the_guide_names_everything_to_choose_from(option: str, names: Iterable[str]) -> None:
    guide = (Path(__file__).parents[2] / "docs" / "simulation.md").read_text()
    listed = re.search(rf"`{option}`[\s(]*\(([^)]*)\)", guide)
    assert listed is not None
    assert set(re.findall(r"[a-z-]+", listed[1].replace("or names", ""))) == set(names)


def test_everything_holds_with_five_nodes_and_another_workload() -> None:
    settings = RunSettings(4, minutes=0.2, nodes=5, workload="bulk")
    result = run(settings)
    assert result.violation is None, f"{result.violation}\nto repeat it: {settings.command()}"


def simulate(*arguments: str, hash_seed: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "shardkv.simulation", "--json", *arguments],
        env={**os.environ, "PYTHONHASHSEED": hash_seed},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_equal_seeds_are_equal_runs_whatever_the_process() -> None:
    """Under different hash seeds too; and another seed is another run."""
    one = simulate("--seed", "11", "--minutes", "0.1", hash_seed="1")
    two = simulate("--seed", "11", "--minutes", "0.1", hash_seed="2")
    other = simulate("--seed", "12", "--minutes", "0.1", hash_seed="1")
    assert one["events"] > 1_000
    assert (one["digest"], one["events"], one["calls"]) == (two["digest"], two["events"], two["calls"])
    assert one["digest"] != other["digest"]


def test_a_violation_is_the_runs_result(monkeypatch: pytest.MonkeyPatch) -> None:
    async def broken(faults: Faults, one: object, two: object) -> None:
        raise Violation("a-rule", "it does not hold")

    monkeypatch.setitem(KINDS, "drop", broken)
    result = run(RunSettings(1, minutes=0.1, faults=("drop",)))
    assert result.violation is not None
    assert "a-rule: it does not hold" in result.violation
    assert result.history[-1].split()[1] == "drop"


def test_a_bug_of_a_client_that_its_callers_do_not_see_is_a_violation(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client logs it, gives the connection up, and asks again through another."""
    original = Core.link_bytes
    received = itertools.count(1)

    def link_bytes(core: Core, link: Link, data: bytes, now: float) -> None:
        assert next(received) % 60, "a mistake"
        original(core, link, data, now)

    monkeypatch.setattr(Core, "link_bytes", link_bytes)
    result = run(RunSettings(1, minutes=0.1, faults=()))
    assert result.violation is not None
    assert result.violation.startswith("Violation: client-bug: the connection to n")
    assert "AssertionError: a mistake" in result.violation


HANGING: dict[str, tuple[type, str, str]] = {
    # Whose method it is and how it is called, and the workload that calls it.
    "a range delete": (Client, "delete_range", "errands"),
    "a page of a scan": (Scan, "_fetch", "bulk"),
    "a stale read": (Client, "get_many", "stale"),
}


@pytest.mark.parametrize("what", HANGING)
def test_a_call_that_hangs_until_its_caller_gives_up_is_a_violation(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every call ends by its own timeout; that whoever made it gives it up some day is no answer."""
    owner, method, workload = HANGING[what]

    async def hang(*arguments: object, **options: object) -> None:
        await determinism.hang()

    monkeypatch.setattr(owner, method, hang)
    result = run(RunSettings(1, minutes=0.1, rate=40, workload=workload, faults=()))
    assert result.violation is not None
    assert result.violation.startswith("Violation: every-call-ends: ")


def test_a_range_that_takes_no_writes_is_a_violation_though_no_key_in_use_lies_in_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its reads are answered. All but the range of the first keys refuse what is written after the last fault."""
    healing: list[Faults] = []
    heal_for_good, propose_writes = Faults.heal_for_good, Proposer._propose_writes

    async def healed(faults: Faults) -> None:
        async with faults.cluster.client() as kv:
            await kv.call(Method.SPLIT, b"zz", key=b"zz")
        await heal_for_good(faults)
        healing.append(faults)

    def refuse(proposer: Proposer, replica: Replica) -> None:
        if healing and replica.machine is not None and replica.machine.descriptor.span.contains(b"zzz"):
            for group in replica.take_waiting():
                group.requester.refuse(group.request_id, Busy("asleep"))
        else:
            propose_writes(proposer, replica)

    monkeypatch.setattr(Faults, "heal_for_good", healed)
    monkeypatch.setattr(Proposer, "_propose_writes", refuse)
    result = run(RunSettings(1, minutes=0.05, workload="ledger", faults=()))
    assert result.violation is not None
    assert result.violation.startswith("Violation: liveness: writes do not all go on")


def test_a_large_value_that_is_not_what_was_put_is_a_violation(monkeypatch: pytest.MonkeyPatch) -> None:
    execute = execution._General._execute

    def damaged(general: Any, command: list[Any]) -> tuple[int, int]:
        """A byte of each large value is another before it is written."""
        if command[0] == Op.PUT and len(command[6]) > 16_000:
            command = [*command[:6], command[6][:8_000] + b"?" + command[6][8_001:], *command[7:]]
        return execute(general, command)

    monkeypatch.setattr(execution._General, "_execute", damaged)
    for shortcut in "_run_plain_put", "_run_plain_puts":
        monkeypatch.setattr(execution, shortcut, lambda *arguments: None)
    result = run(RunSettings(1, minutes=0.1, rate=40, workload="errands", faults=()))
    assert result.violation is not None
    assert result.violation.startswith("Violation: errand-answered: ")


def test_a_node_that_ends_without_being_told_to_is_a_violation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody starts it again before some fault hits it; from then on it is as if that had ended it."""
    original = node_module.run_node

    async def run_node(config: NodeConfig, *arguments: Any, **how: Any) -> None:
        early = config.name == "n2" and 3 < trio.current_time() < 10
        with trio.move_on_after(0.5 if early else math.inf):
            await original(config, *arguments, **how)

    monkeypatch.setattr(node_module, "run_node", run_node)
    result = run(RunSettings(4, minutes=0.2, faults=("kill", "transfer")))
    assert result.violation is not None
    assert result.violation.startswith("AssertionError: n2 ended by itself")


@pytest.mark.parametrize("family, checker", [(b"r", "linearizability"), (b"c", "exactly-once")])
def test_a_scan_that_shows_a_key_as_it_was_once_is_a_violation(
    family: bytes, checker: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    page, first = reads.scan_page, dict[bytes, list[Any]]()

    def old(*arguments: Any) -> tuple[list[Any], bool]:
        found, more = page(*arguments)
        for place in range(0, len(found), 3):
            if found[place][1:2] == family:
                found[place : place + 3] = first.setdefault(found[place], found[place : place + 3])
        return found, more

    monkeypatch.setattr(reads, "scan_page", old)
    result = run(RunSettings(1, minutes=0.1, rate=40, faults=()))
    assert result.violation is not None
    assert result.violation.startswith(f"Violation: {checker}: ")


@pytest.mark.parametrize("lost", [False, True])
def test_what_becomes_of_a_register_after_it_was_judged_is_seen_by_scans(
    lost: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that was deleted is there again, or one that was put is gone, long after anybody touched it."""
    judge = Workload.judge

    def judged(workload: Workload, *, everything: bool = False) -> None:
        before = set(workload.registers.lasting)
        judge(workload, everything=everything)
        for key in sorted(set(workload.registers.lasting) - before):
            for node in workload.cluster.nodes.values() if not everything else ():
                envelope = node.engine.get(USER_PREFIX + key)
                if lost and envelope is not None:
                    node.engine._data.pop(USER_PREFIX + key)
                elif not lost and envelope is None:
                    node.engine._data[USER_PREFIX + key] = pack_head(FORMAT, 7) + b"again"

    monkeypatch.setattr(Workload, "judge", judged)
    result = run(RunSettings(1, minutes=0.6, rate=10, workload="mixed", faults=()))
    assert result.violation is not None
    assert result.violation.startswith("Violation: linearizability: ")


def test_a_last_read_of_a_register_that_fails_is_a_violation(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cluster is whole then: a key that nobody can read any more is lost, not unavailable."""
    original = Workload.register_call

    async def register_call(workload: Workload, *arguments: Any, **how: Any) -> bool:
        return False if workload.stopped else await original(workload, *arguments, **how)

    monkeypatch.setattr(Workload, "register_call", register_call)
    result = run(RunSettings(1, minutes=0.05, workload="registers", faults=()))
    assert result.violation is not None
    assert "liveness: a read of" in result.violation


def test_a_cluster_in_which_a_replica_is_missing_is_not_whole() -> None:
    """Its range's other replicas agree, and hold everything; one more loss of a node and the range is gone."""

    async def main() -> None:
        async with simulated_cluster(3, seed=1) as cluster:
            await cluster.sleep(2)
            assert apart(cluster) is None
            replicas = cluster.nodes["n2"].inside.catalog.replicas
            lost = replicas.pop(RangeId(1))
            assert "and should have" in (apart(cluster) or "")
            replicas[RangeId(1)] = lost

    run_deterministically(main, seed=1)


BROKEN: dict[str, tuple[str, dict[str, Any]]] = {
    # The rule that must be broken ("" is any: it depends on which crash is the first), and what shows it soonest.
    "a lease that is not looked at": (
        "linearizability",
        {"workload": "registers", "rate": 100.0, "faults": ("depose",)},
    ),
    "a log that is not synced": ("", {"faults": ("blackout", "sudden", "power")}),
}


@pytest.mark.parametrize("guard", BROKEN)
def test_a_guard_that_is_taken_out_is_missed(guard: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What shows that a run proves something: broken databases do not pass it (traps 7 and 10)."""
    rule, changes = BROKEN[guard]
    if rule == "linearizability":
        monkeypatch.setattr(Replica, "can_read", lambda self, now_ns: self.machine is not None and self.leads)
    else:
        monkeypatch.setattr(Wal, "_sync", lambda *_: None)
    violations = (run(RunSettings(seed, minutes=0.3, **changes)).violation for seed in range(1, 6))
    assert any(violation is not None and rule in violation for violation in violations), f"no run misses {guard}"


LINE = ("calls", "answered", "unknown", "faults", "heal_seconds", "virtual_seconds", "real_seconds")
"""What is shown of a result."""


def settings_of(path: Path, count: int, **changes: Any) -> SwarmSettings:
    return SwarmSettings(RunSettings(1, minutes=0.01, faults=(), **changes), count, jobs=1, path=path)


async def test_a_swarm_resumes_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is in the file is not run again; a line that a crash cut short is."""
    monkeypatch.setattr(swarm_module, "code_fingerprint", lambda: "the same")
    path = tmp_path / "swarm.jsonl"
    shown: list[str] = []
    first = await swarm(settings_of(path, 1), shown.append)
    assert [each["seed"] for each in first] == [1]
    whole = path.read_text()
    path.write_text(whole + '{"seed": 2, "violat')
    second = await swarm(settings_of(path, 2), shown.append)
    assert [each["seed"] for each in second] == [1, 2]
    assert second[0] == first[0], "taken from the file"
    assert shown[1] == "resuming: 1 of 2 seeds are done"
    assert path.read_text().startswith(whole)
    assert load(settings_of(path, 2)).keys() == {1, 2}


def test_results_of_other_code_or_other_settings_are_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(swarm_module, "code_fingerprint", lambda: "the same")
    path = tmp_path / "swarm.jsonl"
    path.write_text(json.dumps(settings_of(path, 1).parameters()) + "\n")
    assert load(settings_of(path, 7)) == {}
    with pytest.raises(SwarmFileError, match="other settings"):
        load(settings_of(path, 1, nodes=5))
    monkeypatch.setattr(swarm_module, "code_fingerprint", lambda: "another")
    with pytest.raises(SwarmFileError, match="other code"):
        load(settings_of(path, 1))


async def test_a_swarm_whose_code_changes_while_it_runs_keeps_no_result_of_the_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each seed's process reads the sources when it starts, hours after the swarm said which they are."""
    code = "the first"
    ran = []

    async def one(self: object, run: RunSettings) -> dict[str, Any]:
        nonlocal code
        ran.append(run.seed)
        if run.seed == 2:
            code = "edited"
        return {"seed": run.seed, "violation": None, **dict.fromkeys(LINE, 0), "digest": ""}

    monkeypatch.setattr(swarm_module, "code_fingerprint", lambda: code)
    monkeypatch.setattr(swarm_module._Swarm, "_one", one)
    path = tmp_path / "swarm.jsonl"
    with pytest.raises(SwarmFileError, match="changed while the swarm ran"):
        await swarm(settings_of(path, 4), lambda text: None)
    assert ran == [1, 2]
    code = "the first"
    assert load(settings_of(path, 4)).keys() == {1}


def test_a_violation_ends_a_swarm_with_the_command_that_repeats_it(tmp_path: Path) -> None:
    """Known from the file; nothing more is run."""
    path = tmp_path / "swarm.jsonl"
    settings = settings_of(path, 2)
    found = {"seed": 1, "violation": "a-rule: broken", "virtual_seconds": 1.0, "real_seconds": 1.0, "faults": 0}
    path.write_text(json.dumps(settings.parameters()) + "\n" + json.dumps(found) + "\n")
    arguments = ["--swarm", "2", "--minutes", "0.01", "--faults", "none", "--resume", str(path)]
    done = subprocess.run(
        [sys.executable, "-m", "shardkv.simulation", *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "python -m shardkv.simulation --seed 1 --minutes 0.01 --faults none" in done.stdout


def test_an_interrupted_run_is_no_violation() -> None:
    """What leaves the simulation is a group with the interrupt in it; it was the run's finding."""
    with pytest.raises(KeyboardInterrupt):
        run(RunSettings(1, minutes=0.1), progress=lambda seconds: signal.raise_signal(signal.SIGINT))


def test_an_interrupted_swarm_says_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def one(self: object, run: RunSettings) -> dict[str, Any]:
        if run.seed == 2:
            signal.raise_signal(signal.SIGINT)
            await trio.sleep_forever()
        return {"seed": run.seed, "violation": None, **dict.fromkeys(LINE, 0), "digest": ""}

    monkeypatch.setattr(swarm_module._Swarm, "_one", one)
    path = tmp_path / "swarm.jsonl"
    arguments = ["--swarm", "3", "--minutes", "0.01", "--faults", "none", "--jobs", "1", "--resume", str(path)]
    with pytest.raises(click.Abort) as raised:
        simulation.main(arguments, standalone_mode=False)
    assert str(raised.value.__cause__) == f"the same command goes on from what {path} has"
    assert load(settings_of(path, 3)).keys() == {1}


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT, signal.SIGTERM])
async def test_a_run_that_somebody_ended_is_no_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    async def run_process(command: object, **options: Any) -> "subprocess.CompletedProcess[bytes]":
        assert options["process_group"] == 0, "the terminal's interrupt would reach it, too"
        return subprocess.CompletedProcess([], 128 + number, b"", b"interrupted")

    monkeypatch.setattr(trio, "run_process", run_process)
    path = tmp_path / "swarm.jsonl"
    with pytest.raises(BaseExceptionGroup) as raised:
        await swarm(settings_of(path, 1), lambda text: None)
    assert raised.group_contains(KeyboardInterrupt)
    assert load(settings_of(path, 1)) == {}


NO_RESULTS = [b"hello", b"hello\n", b"[]\n", b"\x93\xfa\x00", b"root:x:0\nbin:x:1\n", b'{"version": 1}']


@pytest.mark.parametrize("found", NO_RESULTS)
async def test_a_file_that_has_no_results_is_refused_and_left_as_it_is(tmp_path: Path, found: bytes) -> None:
    """A file of one line was taken for one that a crash had cut short, and overwritten."""
    path = tmp_path / "notes.txt"
    path.write_bytes(found)
    with pytest.raises(SwarmFileError, match=r"notes\.txt .*--resume"):
        await swarm(settings_of(path, 1), lambda text: None)
    assert path.read_bytes() == found


def test_a_line_that_is_no_result_is_named(tmp_path: Path) -> None:
    path = tmp_path / "swarm.jsonl"
    path.write_text(json.dumps(settings_of(path, 1).parameters()) + '\n{"found": 7}\n')
    with pytest.raises(SwarmFileError, match=r"line 2 of .* is no result of a swarm"):
        load(settings_of(path, 1))


async def test_a_file_that_cannot_be_written_is_said_before_anything_runs(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent" / "swarm.jsonl", Path("/dev/full")):
        with pytest.raises(SwarmFileError, match=r"cannot be written: .*; name another with --resume"):
            await swarm(settings_of(path, 1), lambda text: None)


async def test_two_swarms_do_not_write_to_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def one(self: object, run: RunSettings) -> dict[str, Any]:
        with pytest.raises(SwarmFileError, match="another swarm is writing"):
            await swarm(settings_of(path, 4), lambda text: None)
        return {"seed": run.seed, "violation": None, **dict.fromkeys(LINE, 0), "digest": ""}

    monkeypatch.setattr(swarm_module._Swarm, "_one", one)
    path = tmp_path / "swarm.jsonl"
    assert len(await swarm(settings_of(path, 1), lambda text: None)) == 1


async def test_results_of_other_seeds_stay_and_do_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def one(self: object, run: RunSettings) -> dict[str, Any]:
        return {"seed": run.seed, "violation": None, **dict.fromkeys(LINE, 0), "digest": ""}

    monkeypatch.setattr(swarm_module._Swarm, "_one", one)
    path = tmp_path / "swarm.jsonl"
    await swarm(settings_of(path, 3), lambda text: None)
    shown: list[str] = []
    other = SwarmSettings(RunSettings(9, minutes=0.01, faults=()), 2, jobs=1, path=path)
    assert [each["seed"] for each in await swarm(other, shown.append)] == [9, 10]
    assert [text.split()[0] for text in shown] == ["[1/2]", "[2/2]"]
    assert load(other).keys() == {1, 2, 3, 9, 10}


@pytest.mark.parametrize("minutes", [0.1234567, 5.0, 1234567.5, 1e20])
def test_the_command_that_repeats_a_run_names_its_length_to_the_last_digit(minutes: float) -> None:
    """Six digits were kept, and another length is another run."""
    words = RunSettings(1, minutes=minutes).command().split()
    assert float(words[words.index("--minutes") + 1]) == minutes


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--minutes", "nan"], "nan is no finite number"),
        (["--minutes", "inf"], "inf is no finite number"),
        (["--rate", "nan"], "nan is no finite number"),
        (["--rate", "1e300"], "not in the range"),
        (["--resume", "x"], "--resume goes with --swarm"),
        (["--jobs", "2"], "--jobs goes with --swarm"),
        (["--keep-going"], "--keep-going goes with --swarm"),
        (["--swarm", "1", "--json"], "--json is of one run"),
        (["--swarm", "1", "--trace", "x"], "--trace is of one run"),
        (["--trace", "/absent/x"], "/absent/x cannot be written: No such file or directory"),
    ],
)
def test_options_that_mean_nothing_are_refused(arguments: list[str], said: str) -> None:
    found = CliRunner().invoke(simulation, arguments)
    assert (found.exit_code, said in found.output) == (2, True), found.output


def test_a_trace_that_cannot_be_written_is_no_violation() -> None:
    """The seed held; that the disk was full has nothing to do with it."""
    found = CliRunner().invoke(
        simulation, ["--seed", "1", "--minutes", "0.05", "--faults", "none", "--trace", "/dev/full"]
    )
    assert found.exit_code == 1
    assert "seed 1 ok" in found.output
    assert "Error: /dev/full is not whole: No space left on device" in found.output
