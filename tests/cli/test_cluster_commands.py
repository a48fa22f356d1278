"""status, nodes, ranges, leader and admin against a fake client; help, completion and what starting costs."""

import json
import os
import subprocess
import sys

import click
import pytest

from shardkv import errors
from shardkv.cli.cluster import OPERATORS_SHOWN_MAX
from shardkv.cli.reference import commands, help_of
from shardkv.cli.root import Example, ExampleGroup
from shardkv.cli.table import WIDTH_ROWS_MAX, TableWriter, render, width
from shardkv.types import KEY_BYTES_MAX
from shardkv.wire.requests import Method
from tests.cli.fakes import STDOUT_FULL, World, world

__all__ = ["world"]


def test_status_tells_the_cluster_in_short(world: World) -> None:
    output = world.run("status").stdout
    assert "placement leader  1" in output
    assert "01ff" in output
    assert "nodes             2\nlive              1\n" in output
    document = json.loads(world.run("status", "--json").stdout)
    assert document["cluster_id"] == "01ff"
    assert len(document["node_table"]) == document["nodes"] == 2


def test_status_says_why_a_cluster_is_not_settled_and_what_is_being_done(world: World) -> None:
    growth = {"kind": "grow", "reason": "it has 1 of 3 voters; nodes 2 and 3 join"}
    world.client.status = {
        "settled": False,
        "unsettled": "range 1: it has 1 of 3 voters",
        "operators": [{"id": number, "range": 10 + number, **growth} for number in range(OPERATORS_SHOWN_MAX + 2)],
    }
    lines = world.run("status").stdout.splitlines()
    assert "settled           False, range 1: it has 1 of 3 voters" in lines
    assert "operator 7: grow range 17, it has 1 of 3 voters; nodes 2 and 3 join" in lines
    assert lines[-1] == "and 2 more operators, with --json all of them"
    world.client.status = {"settled": True, "unsettled": None, "operators": []}
    assert world.run("status").stdout.splitlines()[-1] == "settled           True"


def test_ranges_tells_learners_from_voters(world: World) -> None:
    """A learner has no vote; without a mark a range with one voter looked replicated."""
    assert "learner" not in world.run("ranges").stdout
    world.client.learners = [2]
    lines = world.run("ranges").stdout.splitlines()
    assert lines[1].split()[4] == "1,2*"
    assert lines[-1] == "* a learner: it has no vote (yet)"
    assert json.loads(world.run("ranges", "--json").stdout)[0]["learners"] == [2]


def test_nodes_is_a_table_by_id(world: World) -> None:
    """DESIGN 2.2: nodes: name, id, address, state, replicas, leaders."""
    lines = world.run("nodes").stdout.splitlines()
    assert lines[0].split() == ["ID", "NAME", "ADDRESS", "STATE", "REPLICAS", "LEADERS"]
    assert lines[1].split() == ["1", "n1", "h:1", "up", "2", "1"]
    rows = json.loads(world.run("nodes", "--json").stdout)
    assert [row["name"] for row in rows] == ["n1", "n2"]
    assert set(rows[0]) == {"id", "name", "address", "state", "replicas", "leaders"}


def test_ranges_is_a_table_by_start_and_an_unbounded_end_is_null_in_json(world: World) -> None:
    """DESIGN 2.2: ranges: id, start, end, leader, replicas, epoch, bytes; an unbounded end is null."""
    lines = world.run("ranges").stdout.splitlines()
    assert lines[0].split() == ["ID", "START", "END", "LEADER", "REPLICAS", "EPOCH", "BYTES"]
    assert lines[1].split() == ["1", '""', r"m\xff", "1", "1,2", "1.2", "3.0", "MiB"]
    assert lines[2].split() == ["3", r"m\xff", "∞", "-", "1,2", "1.2", "3.0", "MiB"]
    first, second = json.loads(world.run("ranges", "--json").stdout)
    assert first == {
        "id": 1,
        "start": "",
        "end_base64": "bf8=",
        "leader": 1,
        "replicas": [1, 2],
        "epoch": [1, 2],
        "bytes": 3 * 1024 * 1024,
    }
    assert second["end"] is None


def test_leader_names_the_node_that_leads_a_key(world: World) -> None:
    [row] = json.loads(world.run("leader", "a", "--json").stdout)
    assert row == {"range": 1, "leader": 1, "name": "n1", "address": "h:1"}
    [row] = json.loads(world.run("leader", "--json").stdout)
    assert (row["range"], row["name"]) == (0, "n1")
    result = world.run("leader", "z")
    assert result.exit_code == 1
    assert "no leader" in result.stderr


def test_leader_waits_while_leadership_passes_from_one_node_to_another(world: World) -> None:
    """Right after a transfer nobody has reported to lead."""
    world.client.asks_until_elected = 2
    [row] = json.loads(world.run("leader", "z", "--json").stdout)
    assert (row["range"], row["leader"]) == (3, 2)


def test_operations_name_what_they_are_about(world: World) -> None:
    assert world.run("admin", "split", r"m\x00").stdout == "range 1 ends at m\\x00, where range 4 begins\n"
    assert world.run("admin", "transfer", "3", "n2").exit_code == 0
    assert world.run("admin", "transfer", "3", "2").exit_code == 0
    assert world.run("admin", "snapshot", "3").exit_code == 0
    sent = [call for call in world.client.calls if call[0] is not Method.STATUS]
    assert sent == [
        (Method.SPLIT, (b"m\x00",), {"key": b"m\x00"}),
        (Method.TRANSFER, (3, 2), {"range_id": 3}),
        (Method.TRANSFER, (3, 2), {"range_id": 3}),
        (Method.SNAPSHOT, (3,), {"range_id": 3}),
    ]
    result = world.run("admin", "transfer", "3", "n9")
    assert result.exit_code == 2
    assert "there are 1 (n1), 2 (n2)" in result.stderr


@pytest.mark.parametrize("command", ["transfer {} n2", "snapshot {}"])
def test_a_range_that_no_request_can_name_is_wrong_usage(world: World, command: str) -> None:
    """The request could not be encoded, which showed as a bug."""
    assert world.run("admin", *command.format((1 << 63) - 1).split()).exit_code == 0
    world.client.addresses.clear()
    assert world.run("admin", *command.format(1 << 63).split()).exit_code == 2
    assert world.client.addresses == []


@pytest.mark.parametrize("command", ["get", "put", "leader", "admin split", "scan a", "delete-range a"])
def test_a_key_that_is_too_long_is_refused_before_anything_is_sent(world: World, command: str) -> None:
    """Requests about a key that are no data requests went out, and the answer was of no such key."""
    value = ["v"] if command == "put" else []
    result = world.run(*command.split(), "k" * (KEY_BYTES_MAX + 1), *value)
    assert result.exit_code == 2
    assert result.stderr == "Error: a key may have 4096 bytes; this one has 4097 (KeyTooLarge)\n"
    assert world.client.addresses == []


def test_a_split_where_a_range_begins_already_is_the_clusters_answer(world: World) -> None:
    """DESIGN 2.2: 1 the cluster answered with an error, 2 wrong usage; a script that splits may be run again."""
    world.client.fail = errors.InvalidRange("there is a range that starts at this key already")
    result = world.run("admin", "split", "m")
    assert result.exit_code == 1
    assert result.stderr == "Error: there is a range that starts at this key already\n"


@pytest.mark.parametrize("name, command", list(commands()), ids=[name for name, _ in commands()])
def test_every_command_has_help_with_an_example(name: str, command: click.Command) -> None:
    """DESIGN 2.2: every command has --help with an example."""
    assert isinstance(command, Example | ExampleGroup)
    assert name in command.example
    assert command.help
    assert "Example" in help_of(name, command)
    for parameter in command.params:
        if isinstance(parameter, click.Option) and not parameter.hidden:
            assert parameter.help, (name, parameter.name)


@pytest.mark.parametrize("shell, words", [("bash", "complete -o"), ("zsh", "#compdef"), ("fish", "complete ")])
def test_completion_prints_a_script(world: World, shell: str, words: str) -> None:
    result = world.run("completion", shell)
    assert result.exit_code == 0
    assert words in result.stdout
    assert "_SHARDKV_COMPLETE" in result.stdout
    assert world.run("completion", "tcsh").exit_code == 2


def test_a_data_command_starts_without_rich_prompt_toolkit_or_the_node() -> None:
    """Work order: startup of `shardkv get` must stay light."""
    script = """
import sys
from shardkv.cli.root import shardkv
try:
    shardkv(["get", "a"])
except SystemExit as ended:
    assert ended.code == 2, ended.code
heavy = {"rich", "prompt_toolkit", "structlog", "rocksdict", "zstandard", "shardkv_bench", "shardkv.server"}
print(*sorted(heavy & set(sys.modules)))
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env={})
    assert result.stdout == "\n"


MAIN = [sys.executable, "-c", "from shardkv.cli import main; main()"]
BEFORE_COMMANDS = [(["--help"], {}), (["--version"], {}), ([], {"_SHARDKV_COMPLETE": "zsh_source"})]
"""What is written before any command begins."""


@pytest.mark.parametrize("arguments, variables", [*BEFORE_COMMANDS, (["get", "--help"], {})])
def test_a_full_disk_under_stdout_is_told_in_one_line(arguments: list[str], variables: dict[str, str]) -> None:
    """DESIGN 2.2: exit codes. No traceback."""
    with open("/dev/full", "wb") as full:
        ended = subprocess.run([*MAIN, *arguments], stdout=full, stderr=subprocess.PIPE, env=variables)
    assert ended.stderr == STDOUT_FULL
    assert ended.returncode == 1


@pytest.mark.parametrize("arguments, variables", BEFORE_COMMANDS)
def test_a_reader_of_the_help_that_has_gone_ends_it_silently(arguments: list[str], variables: dict[str, str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    ended = subprocess.run([*MAIN, *arguments], stdout=writer, stderr=subprocess.PIPE, env=variables)
    os.close(writer)
    assert (ended.returncode, ended.stderr) == (1, b"")


def test_the_exit_code_holds_where_the_error_cannot_be_written() -> None:
    """DESIGN 2.2: 3, the cluster could not be reached in time."""
    with open("/dev/full", "wb") as full:
        command = [*MAIN, "get", "--connect", "127.0.0.1:1", "--timeout", "0.001", "a"]
        assert subprocess.run(command, stderr=full, env={}).returncode == 3


def test_wide_and_combining_characters_keep_columns_aligned() -> None:
    assert [width(text) for text in ("abc", "日本", "e\u0301")] == [3, 4, 1]
    lines = render(["k", "v"], [["日本", "1"], ["ab", "2"]]).splitlines()
    assert [width(line[: line.index(end)]) for line, end in zip(lines[1:], ["1", "2"])] == [6, 6]


def test_a_long_table_streams_after_its_first_rows() -> None:
    """A scan of millions of keys is not held in memory for its column widths."""
    written: list[str] = []
    table = TableWriter(["n"], written.append, numeric=["n"])
    for number in range(WIDTH_ROWS_MAX - 1):
        table.add([str(number)])
    assert written == []
    table.add(["x"])
    assert len(written) == WIDTH_ROWS_MAX + 1
    table.add(["wider than before"])
    table.close()
    assert written[-1] == "wider than before\n"
