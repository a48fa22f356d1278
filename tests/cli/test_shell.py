"""The shell over a fake client: -c, stdin lines, completion, interrupts, and a terminal's loop with prompt_toolkit."""

import contextlib
import io
import os
import pty
import select
import signal
import subprocess
import sys
from pathlib import Path

import click
import pytest
import trio

from shardkv import errors
from shardkv.cli import shell as shell_module
from shardkv.cli.shell import Shell, complete
from shardkv.cli.shell_language import ALIASES, COMMANDS
from tests.cli.fakes import STDOUT_FULL, FakeClient, World, world
from tests.cli.processes import SECONDS

__all__ = ["world"]


def test_commands_run_over_one_connection(world: World) -> None:
    result = world.run("shell", "-c", "put a 1; get a; incr n 2; scan --keys-only")
    assert result.exit_code == 0
    assert result.stdout.splitlines()[1:3] == ["1", "2"]
    assert world.client.addresses == ["127.0.0.1:7001"]


def test_a_comment_in_the_commands_given_ends_with_its_line(world: World) -> None:
    """What stood behind it was dropped, with exit code 0."""
    assert world.run("shell", "-c", "# set up\nput a 1 # the first\nput b 2\n").exit_code == 0
    assert list(world.client.data) == [b"a", b"b"]


def test_the_first_failure_stops_the_commands_with_its_exit_code(world: World) -> None:
    """DESIGN 2.2: -c stops at the first failure with its exit code."""
    result = world.run("shell", "-c", "put a 1; get b; put c 3")
    assert result.exit_code == 1
    assert list(world.client.data) == [b"a"]
    for commands, code in [("get", 2), ("colour", 2), ("get 'a", 2), ("put a 1; cas a 0 2", 1), ("put a 1; exit", 0)]:
        assert world.run("shell", "-c", commands).exit_code == code, commands
    world.client.fail = errors.OutcomeUnknown("lost")
    assert world.run("shell", "-c", "put a 1; get a").exit_code == 4
    world.client.fail = errors.Unavailable("down")
    assert world.run("shell", "-c", "get a").exit_code == 3


def test_without_a_terminal_lines_come_from_stdin(world: World) -> None:
    result = world.run("shell", input="put a 'b c'\n# nothing\n\nget a\nhelp\nexit\nput z 1\n")
    assert result.exit_code == 0
    assert result.stdout.splitlines()[1] == "b c"
    assert all(f"  {name} " in result.stdout for name in COMMANDS)
    assert b"z" not in world.client.data
    assert world.run("shell", input="get b\nput z 1\n").exit_code == 1
    assert b"z" not in world.client.data


def test_a_command_that_reads_stdin_gets_what_stands_behind_its_line(world: World) -> None:
    """It got nothing, and wrote that: the lines behind it had been read ahead."""
    assert world.run("shell", input=b"put b 1\nput a -\nhello\nget a\n\xff").exit_code == 0
    assert {key: entry.value for key, entry in world.client.data.items()} == {b"a": b"hello\nget a\n\xff", b"b": b"1"}
    assert world.run("shell", input=b'put b 2\nimport -\n{"key":"c","value":"3"}\n').exit_code == 0
    assert world.client.data[b"c"].value == b"3"


@pytest.mark.parametrize("command", ["put a -", "put a - --timeout 5", "cas a 0 -", "import -"])
async def test_no_command_reads_stdin_where_a_person_types_the_lines(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An interrupt did not end it, and the next line became the value."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b'{"key":"a","value":"1"}\n')))
    client = FakeClient()
    shell = Shell(client, trio.lowlevel.current_trio_token(), prompts=True)
    assert await trio.to_thread.run_sync(shell.run_line, command) == 2
    assert (
        "instead of - give the value or a file's name, or use the command outside the shell" in capsys.readouterr().err
    )
    assert not client.data


def test_a_line_of_stdin_that_is_not_utf8_means_its_bytes(world: World) -> None:
    assert world.run("shell", input=b"put \xff \xfe\r\n").exit_code == 0
    assert world.client.data[b"\xff"].value == b"\xfe"


def test_the_lines_of_stdin_may_begin_with_a_byte_order_mark(world: World) -> None:
    """As programs on Windows write it; it was taken for a part of the first command."""
    assert world.run("shell", input="\ufeffput a 1\nput \ufeffb 2\n").exit_code == 0
    assert list(world.client.data) == [b"a", "\ufeffb".encode()]


def test_the_shell_takes_operations_without_admin(world: World) -> None:
    assert (
        world.run("shell", "-c", "split m; transfer 3 n2; snapshot 3; nodes; ranges; status; leader a").exit_code == 0
    )
    assert "first key of a range" in world.run("shell", "-c", "help split").stdout
    assert world.run("shell", "-c", "help").exit_code == 0


def test_commands_may_stand_right_behind_their_option(world: World) -> None:
    """As in every program of the kind; it was told to be no option."""
    result = world.run("shell", "-cput a 1; get a")
    assert (result.exit_code, result.stdout.splitlines()[1:]) == (0, ["1"])
    assert world.run("shell", "-hx").exit_code == 2, "an option without a value has none behind it either"


def test_help_about_what_is_no_command_is_an_error(world: World) -> None:
    result = world.run("shell", input="help bogus\nput a 1\n")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "no command 'bogus'" in result.stderr
    assert not world.client.data
    for name in ("help", "exit", "quit"):
        assert "exit          Leave the shell" in world.run("shell", "-c", f"help {name}").stdout


def test_a_missing_address_is_wrong_usage(world: World) -> None:
    assert world.run("shell", "-c", "get a", connect=False).exit_code == 2


def test_a_command_in_the_shell_cannot_go_to_another_cluster(world: World) -> None:
    """It went to the shell's, whatever was typed."""
    result = world.run("shell", "-c", "put --connect 10.0.0.9:7001 a 1")
    assert result.exit_code == 2
    assert "connected already" in result.stderr
    assert not world.client.data


@pytest.mark.parametrize("name", COMMANDS)
def test_the_shells_help_shows_what_can_be_typed_in_it(world: World, name: str) -> None:
    """It offered --connect, which the shell refuses, and examples of another shell."""
    shown = world.run("shell", "-c", f"help {name}").stdout
    assert "--connect" not in shown
    assert "--timeout" in shown
    examples = [line.strip() for line in shown.partition("Example")[2].splitlines()[1:]]
    assert examples
    assert all(line.startswith(f"{name} ") or line == name for line in examples), examples


def test_every_command_of_the_shell_is_a_command() -> None:
    context = click.Context(shell_module.root)
    for name in COMMANDS:
        assert shell_module.root.get_command(context, ALIASES.get(name, (name,))[0]) is not None


async def completions(client: FakeClient, before: str) -> list[str]:
    shell = Shell(client, trio.lowlevel.current_trio_token())
    found = await trio.to_thread.run_sync(lambda: list(complete(shell, before)))
    return [completion for completion, _ in found]


async def test_completion_knows_commands_options_and_keys() -> None:
    client = FakeClient()
    for key in (b"apple", b"a b", b"a\xff", b"b"):
        client.set(key, b"1")
    assert await completions(client, "de") == ["del", "delete-range"]
    assert await completions(client, "get x; pu") == ["put"]
    assert await completions(client, "help tr") == ["transfer"]
    assert await completions(client, "scan --re") == ["--reverse"]
    assert await completions(client, "split --b") == ["--base64"]
    assert "--connect" not in await completions(client, "get --")
    assert await completions(client, "get a") == ['"a b"', "apple", r"a\xff"]
    assert await completions(client, "get a\\q") == []
    assert await completions(client, "put a ") == []
    assert await completions(client, "colour --") == []


async def test_completion_is_silent_when_the_cluster_does_not_answer() -> None:
    client = FakeClient()
    client.fail = errors.Unavailable("down")
    assert await completions(client, "get a") == []


async def test_an_interrupt_ends_the_command_and_not_the_shell(capsys: pytest.CaptureFixture[str]) -> None:
    client = FakeClient()
    client.set(b"a", b"1")
    waiting = trio.Event()

    async def hang(key: bytes, **options: object) -> None:
        waiting.set()
        await trio.sleep_forever()

    shell = Shell(client, trio.lowlevel.current_trio_token())
    codes: list[int] = []
    assert not shell.interrupt()
    original, client.get = client.get, hang  # type: ignore[method-assign, assignment]
    async with trio.open_nursery() as nursery:

        async def run() -> None:
            codes.append(await trio.to_thread.run_sync(shell.run_line, "get a; get a"))

        nursery.start_soon(run)
        await waiting.wait()
        assert shell.interrupt()
    assert codes == [130]
    client.get = original  # type: ignore[method-assign]
    assert await trio.to_thread.run_sync(shell.run_line, "get a") == 0
    assert capsys.readouterr().out == "1\n"


SCRIPT = """
import sys
from contextlib import asynccontextmanager
from shardkv.cli import session
from shardkv.cli.root import main
from tests.cli.fakes import FakeClient

client = FakeClient()

@asynccontextmanager
async def connect(addresses):
    async def get(key, **options):
        import trio
        print("hanging", flush=True)
        await trio.sleep_forever()
    if "hang" in sys.argv[-1]:
        client.get = get
    yield client

session.connect = connect
main()
"""


def start(arguments: list[str], **streams: object) -> "subprocess.Popen[bytes]":
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root), "SHARDKV_CONNECT": "h:1", "TERM": "dumb"}
    environment |= {"XDG_STATE_HOME": str(streams.pop("state", "/nonexistent")), "PYTHONUNBUFFERED": ""}
    return subprocess.Popen([sys.executable, "-c", SCRIPT, "shell", *arguments], env=environment, **streams)  # type: ignore[call-overload, no-any-return]


def test_bytes_and_tables_come_out_in_the_order_of_their_commands() -> None:
    with start(["-c", "put a v; scan --keys-only; get --raw a; scan --keys-only"], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        version, head, row, again, _ = child.stdout.read().splitlines()
        assert row == b"a    " + version
        assert again == b"v" + head
        assert child.wait(SECONDS) == 0


@pytest.mark.parametrize("command", ["nodes", "put a 1", "nodes; put a 1; get --raw a"])
def test_what_cannot_be_written_is_told_once_and_is_exit_code_1(command: str) -> None:
    """DESIGN 2.2. What was still buffered failed as the process ended, with an exit code that nobody knows."""
    with open("/dev/full", "wb") as full, start(["-c", command], stdout=full, stderr=subprocess.PIPE) as child:
        _, told = child.communicate(timeout=SECONDS)
    assert child.returncode == 1
    assert told == STDOUT_FULL


def test_a_reader_that_has_gone_ends_the_command_silently() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with start(["-c", "nodes"], stdout=writer, stderr=subprocess.PIPE) as child:
        os.close(writer)
        _, told = child.communicate(timeout=SECONDS)
    assert (child.returncode, told) == (1, b"")


def test_an_interrupt_of_the_commands_given_is_exit_code_130() -> None:
    """DESIGN 2.2: 130 interrupted."""
    with start(["-c", "get hang"], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"hanging\n"
        child.send_signal(signal.SIGINT)
        assert child.wait(SECONDS) == 130


@pytest.mark.parametrize("typed", [b"put a 1\n", b"put a 1\nput b -\n"], ids=["by the shell", "by a command"])
def test_an_interrupt_while_stdin_is_read_is_exit_code_130(typed: bytes) -> None:
    with start([], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        assert child.stderr is not None
        child.stdin.write(typed)
        child.stdin.flush()
        assert child.stdout.readline()
        child.send_signal(signal.SIGINT)
        assert child.wait(SECONDS) == 130
        assert child.stderr.read() == b"interrupted\n"


def test_a_terminal_gets_a_prompt_results_and_a_history(tmp_path: Path) -> None:
    """LIBRARIES: prompt_toolkit's loop in a worker thread."""
    ours, theirs = pty.openpty()
    with start([], stdin=theirs, stdout=theirs, stderr=theirs, state=tmp_path) as child:
        os.close(theirs)
        seen = b""

        def until(words: bytes) -> None:
            nonlocal seen
            while words not in seen:
                if not select.select([ours], [], [], SECONDS)[0]:
                    child.kill()
                    pytest.fail(f"the terminal shows no {words!r} but {seen!r}")
                seen += os.read(ours, 4096)
            seen = seen[seen.index(words) + len(words) :]

        until(b"using h:1; help lists the commands")  # nothing was connected to yet
        for typed, answer in [
            (b"put a hello\r", b"467213411123200001"),
            (b"put b -\r", b"or use the command outside the shell"),
            (b"get b\r", b"no such key: b"),
            (b"get a\r", b"hello"),
        ]:
            until(b"shardkv>")
            os.write(ours, typed)
            until(answer)
        until(b"shardkv>")
        os.write(ours, b"exit\r")
        with contextlib.suppress(OSError):  # a terminal that nobody reads would hold up the end
            while os.read(ours, 4096):
                pass
        assert child.wait(SECONDS) == 0
    os.close(ours)
    history = (tmp_path / "shardkv" / "history").read_text()
    assert "+put a hello" in history
