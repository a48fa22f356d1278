"""The data commands against a fake client: output, the JSON rules and the exit codes of DESIGN 2.2."""

import io
import json
import os
import subprocess
import sys
from typing import Any

import pytest

from shardkv import errors
from shardkv.cli import text
from shardkv.cli.bench import RECORDS_MAX
from shardkv.types import TIMESTAMP_MAX, VALUE_BYTES_MAX
from tests.cli.fakes import FIRST_VERSION, STDOUT_FULL, World, world
from tests.cli.processes import SECONDS

__all__ = ["world"]


def test_put_prints_the_version_and_get_the_value(world: World) -> None:
    assert world.run("put", "a", "1").output == f"{FIRST_VERSION + 1}\n"
    result = world.run("get", "a")
    assert (result.output, result.exit_code) == ("1\n", 0)


def test_a_key_that_is_absent_is_exit_code_one(world: World) -> None:
    """DESIGN 2.2: 1 the cluster answered with an error or the key is absent."""
    for arguments in (["get", "a"], ["del", "a"]):
        result = world.run(*arguments)
        assert result.exit_code == 1
        assert result.stdout == ""
        assert "no such key: a" in result.stderr
    result = world.run("get", "a", "--json")
    assert (json.loads(result.stdout), result.exit_code) == (None, 1)


def test_get_shows_bytes_escaped_raw_or_as_base64(world: World) -> None:
    world.client.set(b"\xff", b"a\\b\n\xfe")
    assert world.run("get", r"\xff").stdout == "a\\\\b\\x0a\\xfe\n"
    assert world.run("get", r"\xff", "--raw").stdout_bytes == b"a\\b\n\xfe"
    assert world.run("get", "/w==", "--base64").stdout == "YVxiCv4=\n"
    assert json.loads(world.run("get", r"\xff", "--json").stdout) == {
        "key_base64": "/w==",
        "value_base64": "YVxiCv4=",
        "version": str(FIRST_VERSION + 1),
    }


def test_put_does_not_read_more_of_stdin_than_a_value_may_have(world: World) -> None:
    class Endless(io.RawIOBase):
        taken = 0

        def readable(self) -> bool:
            return True

        def readinto(self, buffer: Any) -> int:
            self.taken += len(buffer)
            assert self.taken < 4 * VALUE_BYTES_MAX, "who reads to the end of this never gets there"
            return len(buffer)

    result = world.run("put", "k", "-", input=io.BufferedReader(Endless()))
    assert result.exit_code == 2
    assert "stdin has more: spread it over several keys" in result.stderr
    assert not world.client.data


def test_put_reads_a_value_of_dash_from_stdin_byte_for_byte(world: World) -> None:
    """DESIGN 2.2: `put KEY -` reads stdin."""
    assert world.run("put", "a", "-", input=b"\x00\xff\r\n").exit_code == 0
    assert world.client.data[b"a"].value == b"\x00\xff\r\n"


def test_compare_and_set_moves_only_from_the_version_given(world: World) -> None:
    assert world.run("cas", "a", "0", "1").exit_code == 0
    version = world.client.version
    assert world.run("cas", "a", str(version), "2").stdout == f"{version + 1}\n"
    result = world.run("cas", "a", str(version), "3")
    assert result.exit_code == 1
    assert str(version + 1) in result.stderr
    assert world.run("cas", "a", "-1", "3").exit_code == 2


def test_increments_may_be_negative(world: World) -> None:
    assert world.run("incr", "n").stdout == "1\n"
    assert world.run("incr", "n", "-5").stdout == "-4\n"
    assert json.loads(world.run("incr", "n", "2", "--json").stdout) == {"value": "-2"}
    assert world.run("incr", "n", "--colour").exit_code == 2
    assert world.run("incr", "n", str(1 << 63)).exit_code == 2


def test_negative_numbers_are_values_and_unknown_options_are_neither_keys_nor_values(world: World) -> None:
    assert world.run("put", "temperature", "-5").exit_code == 0
    assert world.run("get", "temperature").stdout == "-5\n"
    assert world.run("put", "-3", "-4.5").exit_code == 0
    assert world.client.data[b"-3"].value == b"-4.5"
    for number in ("-1e5", "-1.5E-7", "-.5", "-5."):
        assert world.run("put", "number", number).exit_code == 0, number
        assert world.client.data[b"number"].value == number.encode()
    before = dict(world.client.data)
    for line in ("incr --raw", "incr --raw -5", "put --jason v", "put k -v", "get -x", "put k -...", "put k -1e"):
        typed = line.split()
        result = world.run(*typed)
        assert result.exit_code == 2, typed
        assert "No such option" in result.stderr, typed
        assert "goes behind --" in result.stderr, typed
    assert world.client.data == before
    assert world.run("put", "--", "--raw", "-v").exit_code == 0
    assert world.client.data[b"--raw"].value == b"-v"
    assert world.run("scan", "--prefix", "-3").exit_code == 0, "an option's value may be anything"


def test_a_value_of_one_dash_is_shown_as_it_must_be_typed(world: World) -> None:
    assert world.run("put", "a", r"\x2d").exit_code == 0
    assert world.client.data[b"a"].value == b"-"
    assert world.run("get", "a").stdout == "\\x2d\n"


def test_delete_says_whether_the_key_was_there(world: World) -> None:
    world.client.set(b"a", b"1")
    assert world.run("del", "a", "--if-version", "3").exit_code == 1
    assert world.run("del", "a").stdout == "deleted\n"
    assert json.loads(world.run("del", "a", "--json").stdout) == {"deleted": False}


def test_scan_prints_an_aligned_table(world: World) -> None:
    world.client.set(b"a", b"1")
    world.client.set("bé".encode(), b"22\xff")
    lines = world.run("scan").stdout.splitlines()
    assert lines[0].split() == ["KEY", "VALUE", "VERSION"]
    assert lines[1].split() == ["a", "1", str(FIRST_VERSION + 1)]
    assert lines[2].split() == ["bé", r"22\xff", str(FIRST_VERSION + 2)]
    assert len({line.index(end) for line, end in zip(lines[1:], ["1", "22"])}) == 1


def test_scan_takes_bounds_prefix_limit_and_order(world: World) -> None:
    for key in (b"a", b"b1", b"b2", b"c"):
        world.client.set(key, b"v")

    def keys(*arguments: str) -> list[str]:
        result = world.run("scan", "--json", *arguments)
        assert result.exit_code == 0, result.output
        return [row["key"] for row in json.loads(result.stdout)]

    assert keys() == ["a", "b1", "b2", "c"]
    assert keys("b1", "c") == ["b1", "b2"]
    assert keys("--prefix", "b") == ["b1", "b2"]
    assert keys("--limit", "2", "--reverse") == ["c", "b2"]
    assert keys("x") == []
    assert "value" not in json.loads(world.run("scan", "--json", "--keys-only").stdout)[0]
    assert world.run("scan", "a", "--prefix", "b").exit_code == 2


@pytest.mark.parametrize("command", ["scan", "delete-range", "export -"])
def test_bounds_in_the_wrong_order_are_shown_as_they_were_typed(world: World, command: str) -> None:
    """What was told of them was in Python's words: b'a' ends before b'b'."""
    result = world.run(*command.split(), "é", r"a\xff")
    assert result.exit_code == 2
    assert result.stderr == "Error: END, a\\xff, comes before START, é; swap them (InvalidRange)\n"
    result = world.run(*command.split(), "Yg==", "YQ==", "--base64")
    assert "END, YQ==, comes before START, Yg==" in result.stderr
    assert world.client.addresses == []


@pytest.mark.parametrize("start", ["a", ""])
@pytest.mark.parametrize(
    "command, instead",
    [
        ("scan", "leave END out"),
        ("export -", "leave END out"),
        ("delete-range", "give --to-end in its place"),
    ],
)
def test_an_empty_end_is_told_how_to_go_to_the_last_key(world: World, command: str, instead: str, start: str) -> None:
    """It was told that a key has at least one byte, as if a key had been asked for."""
    for result in (
        world.run(*command.split(), start, ""),
        world.run(*command.split(), start, "", "--base64")
        if not start
        else world.run("shell", "-c", f"{command} a ''"),
    ):
        assert result.exit_code == 2
        assert "Invalid value for END: no key comes before an empty one; to go to the last key, " in result.stderr
        assert f"to go to the last key, {instead}\n" in result.stderr
    assert world.client.calls == []


@pytest.mark.parametrize("address", ["http://127.0.0.1:7001", "h:1,https://h", "tcp://[::1]:7001"])
def test_a_url_is_no_address(world: World, address: str) -> None:
    """It was told to be an IPv6 address."""
    result = world.run("get", "--connect", address, "a")
    assert result.exit_code == 2
    assert f"'{address}' is a URL; give HOST:PORT alone, for example 127.0.0.1:7001" in result.stderr


def test_delete_range_needs_an_end_or_says_that_there_is_none(world: World) -> None:
    """Forgetting the end must not delete everything."""
    for arguments in ([], ["a"], ["a", "b", "--to-end"], ["--prefix", "a", "--to-end"], ["--prefix", ""]):
        assert world.run("delete-range", *arguments).exit_code == 2, arguments
    assert world.client.calls == []
    assert world.run("delete-range", "a", "b").exit_code == 0
    assert world.run("delete-range", "a", "--to-end").exit_code == 0
    assert world.run("delete-range", "--prefix", r"a\xff").exit_code == 0
    assert world.run("delete-range", "--prefix", r"\xff").exit_code == 0
    assert world.client.calls == [
        ("delete_range", b"a", b"b"),
        ("delete_range", b"a", None),
        ("delete_range", b"a\xff", b"b"),
        ("delete_range", b"\xff", None),
    ]


@pytest.mark.parametrize(
    "error, code",
    [
        (errors.Unavailable("no leader"), 3),
        (errors.OutcomeUnknown("the answer was lost"), 4),
        (errors.Conflict("beaten"), 1),
        (errors.NotAnInteger("not a number"), 1),
        (errors.KeyTooLarge("too large"), 2),
        (ConnectionRefusedError("refused"), 3),
        (KeyboardInterrupt(), 130),
        (BaseExceptionGroup("group", [errors.OutcomeUnknown("lost")]), 4),
        (BaseExceptionGroup("group", [errors.Conflict("x"), BaseExceptionGroup("g", [KeyboardInterrupt()])]), 130),
    ],
)
def test_every_kind_of_failure_has_its_exit_code(world: World, error: BaseException, code: int) -> None:
    """DESIGN 2.2: 0 done, 1 error or absent, 2 usage, 3 not reached in time, 4 outcome unknown, 130 interrupted."""
    world.client.fail = error
    result = world.run("put", "a", "1")
    assert result.exit_code == code
    assert result.stdout == ""
    assert result.stderr


def test_a_bug_shows_its_traceback(world: World) -> None:
    world.client.fail = ZeroDivisionError()
    assert isinstance(world.run("put", "a", "1").exception, ZeroDivisionError)


@pytest.mark.parametrize(
    "arguments",
    [
        ["get"],
        ["get", ""],
        ["get", r"\q"],
        ["get", "?", "--base64"],
        ["get", "a", "--colour"],
        ["put", "a"],
        ["put", "a", r"\q"],
        ["cas", "a", "x", "1"],
        ["cas", "a", str(TIMESTAMP_MAX + 1), "1"],
        ["put", "a", "1", "--if-version", str(TIMESTAMP_MAX + 1)],
        ["del", "a", "--if-version", str(TIMESTAMP_MAX + 1)],
        ["del", "a", "--if-version", "-1"],
        ["scan", "--limit", "-1"],
        ["get", "a", "--timeout", "0"],
        ["get", "a", "--timeout", "-1"],
        ["get", "a", "--timeout", "inf"],
        ["get", "a", "--timeout", "nan"],
        ["get", "a", "--consistency", "stale", "--max-age", "nan"],
        ["bench", "run", "--seconds", "inf", "--connect", "127.0.0.1:1"],
        ["bench", "run", "--warmup", "nan", "--connect", "127.0.0.1:1"],
        ["bench", "run", "--records", str(RECORDS_MAX + 1), "--connect", "127.0.0.1:1"],
        ["get", "a", "--connect", "somewhere"],
        ["colour"],
    ],
)
def test_wrong_usage_is_exit_code_two_and_reaches_no_cluster(world: World, arguments: list[str]) -> None:
    assert world.run(*arguments).exit_code == 2
    assert world.client.addresses == []


def test_the_address_comes_from_the_option_else_from_the_environment(world: World) -> None:
    """DESIGN 2.2: --connect falls back to SHARDKV_CONNECT."""
    world.client.set(b"a", b"1")
    world.run("get", "a")
    world.run("get", "a", "--connect", "h:1,h:2")
    assert world.client.addresses == ["127.0.0.1:7001", "h:1,h:2"]
    result = world.run("get", "a", connect=False)
    assert result.exit_code == 2
    assert "SHARDKV_CONNECT" in result.stderr


def test_timeout_and_consistency_reach_the_client(world: World) -> None:
    world.client.set(b"a", b"1")
    world.run("get", "a", "--timeout", "2.5", "--consistency", "follower")
    assert world.client.calls == [("get", b"a", "follower", 2.5)]


@pytest.mark.parametrize("key", ["a", "absent"])
def test_a_stale_get_says_on_stderr_how_old_it_is(world: World, key: str) -> None:
    """DESIGN 2.3: the answer says how stale at most; on stdout stands the value alone, for scripts."""
    world.client.set(b"a", b"1")
    result = world.run("get", key, "--consistency", "stale", "--max-age", "1.5")
    assert world.client.calls == [("get", key.encode(), 1.5)]
    assert result.stdout == ("1\n" if key == "a" else "")
    assert "at most 0.250 s old" in result.stderr


def test_a_stale_scan_says_how_old_its_oldest_page_is(world: World) -> None:
    world.client.set(b"a", b"1")
    result = world.run("scan", "--consistency", "stale", "--max-age", "2")
    assert world.client.calls == [("scan", "stale", 2.0)]
    assert "at most 0.500 s old" in result.stderr


@pytest.mark.parametrize("command", ["get a", "get a --consistency follower", "scan"])
def test_an_age_without_a_stale_read_is_wrong_usage(world: World, command: str) -> None:
    result = world.run(*command.split(), "--max-age", "1")
    assert result.exit_code == 2
    assert "--consistency stale" in result.stderr


def test_a_value_is_either_raw_or_in_a_document(world: World) -> None:
    """It was raw, and --json was forgotten."""
    world.client.set(b"a", b"1")
    result = world.run("get", "a", "--json", "--raw")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "--raw excludes --json" in result.stderr


ENCODED = """
import sys
from contextlib import asynccontextmanager
from shardkv.cli import session
from tests.cli.fakes import FakeClient
client = FakeClient()
client.set("käse".encode(), "ä → 😀".encode())
@asynccontextmanager
async def connect(addresses):
    yield client
session.connect = connect
from shardkv.cli.root import main
main()
"""


@pytest.mark.parametrize("encoding", ["ascii", "ascii:surrogateescape", "latin-1", "utf-8"])
@pytest.mark.parametrize(
    "command", [["get", "käse"], ["get", "käse", "--json"], ["scan"], ["scan", "--json"], ["ranges"]], ids=" ".join
)
def test_what_the_encoding_of_stdout_lacks_is_escaped(command: list[str], encoding: str) -> None:
    """DESIGN 2.2: keys and values are UTF-8 with escapes; they can be typed back in. JSON has escapes of its own."""
    variables = {**os.environ, "PYTHONIOENCODING": encoding, "PYTHONUTF8": "1", "SHARDKV_CONNECT": "n1:7001"}
    done = subprocess.run(
        [sys.executable, "-c", ENCODED, *command], env=variables, stdout=subprocess.PIPE, timeout=SECONDS, check=True
    )
    shown = done.stdout.decode(encoding.partition(":")[0])
    if "--json" in command:
        found = json.loads(done.stdout.decode("utf-8"))
        assert (found if command[0] == "get" else found[0])["value"] == "ä → 😀"
    elif command[0] == "get":
        assert text.unescape(shown.rstrip("\n")).decode() == "ä → 😀"
    elif command[0] == "scan":
        key, *value, _ = shown.splitlines()[1].split()
        assert text.unescape(" ".join([key, *value])).decode() == "käse ä → 😀"
    else:
        assert ("∞" in shown) == (encoding == "utf-8")


STDIN_CLOSED = "Error: standard input cannot be read: it is closed; give it a file or a pipe (OSError)\n"
STDOUT_CLOSED = "Error: standard output cannot be written: it is closed; give it a file or a pipe (OSError)\n"


@pytest.mark.parametrize(
    "command, closed, told, code",
    [
        ("put k -", "<&-", STDIN_CLOSED, 1),
        ("import -", "<&-", STDIN_CLOSED, 1),
        ("shell", "<&-", STDIN_CLOSED, 1),
        ("put k v", "<&-", "", 0),
        ("get --raw käse", ">&-", STDOUT_CLOSED, 1),
        ("get käse", ">&-", STDOUT_CLOSED, 1),
        ("scan", ">&-", STDOUT_CLOSED, 1),
        ("nodes", ">&-", STDOUT_CLOSED, 1),
        ("leader", ">&-", STDOUT_CLOSED, 1),
        ("export -", ">&-", STDOUT_CLOSED, 1),
        ("export -", ">/dev/full", STDOUT_FULL.decode(), 1),
        ("get --raw käse", ">/dev/full", STDOUT_FULL.decode(), 1),
        ("export -", "2>&-", "", 0),
        ("get käse", "<&- >&- 2>&-", "", 1),
    ],
)
def test_a_standard_file_that_is_missing_or_full_is_named_in_one_line(
    command: str, closed: str, told: str, code: int
) -> None:
    """What was not given cannot be read, not even as an empty value, nor written: an export said that it was done."""
    line = ["sh", "-c", f'exec "$@" {closed}', "sh", sys.executable, "-c", ENCODED, *command.split()]
    variables = {**os.environ, "PYTHONUTF8": "1", "SHARDKV_CONNECT": "n1:7001"}
    done = subprocess.run(line, env=variables, input=b"", capture_output=True, timeout=SECONDS)
    assert (done.stderr.decode(), done.returncode) == (told, code)
