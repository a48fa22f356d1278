"""``shardkv shell``: a read-eval-print loop over one open client.

The client lives in a trio loop in the main thread. The loop that reads lines and runs commands has a worker thread of
its own, since prompt_toolkit brings an event loop; commands reach the client through ``trio.from_thread``. Without a
terminal lines come from stdin, and the first command that fails ends the shell with its exit code, as with ``-c``.
An interrupt ends the command that runs, not the shell; prompt_toolkit is loaded only where there is a terminal.
"""

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import click
import trio

from shardkv.cli import exits, session, text
from shardkv.cli.root import Example
from shardkv.cli.root import shardkv as root
from shardkv.cli.session import Body, ShellSession
from shardkv.cli.shell_language import ALIASES, BUILT_IN, COMMANDS, SyntaxProblem, parse, quoted
from shardkv.program import tell

COMPLETION_KEYS_MAX: Final = 20
COMPLETION_SECONDS: Final = 1.0
KEY_COMMANDS: Final = frozenset({"get", "put", "del", "scan", "cas", "incr", "delete-range", "leader", "split"})
"""Commands whose first words are keys, which completion looks up in the cluster."""


_CANCELLED: Final = object()


class _Exit(Exception):
    pass


class Shell:
    """Runs lines. Lives in the shell's thread; only ``interrupt`` is called from the loop's."""

    def __init__(self, client: Any, token: trio.lowlevel.TrioToken, *, prompts: bool = False) -> None:
        self._client = client
        self._token = token
        self._scope: trio.CancelScope | None = None
        self.session = ShellSession(self._run_in_loop, prompts=prompts)

    def _run_in_loop(self, body: Body[Any]) -> Any:
        result = trio.from_thread.run(self._interruptible, body, trio_token=self._token)
        if result is _CANCELLED:
            raise KeyboardInterrupt
        return result

    async def _interruptible(self, body: Body[Any]) -> Any:
        assert self._scope is None, "two commands at once"
        with trio.CancelScope() as self._scope:
            try:
                return await body(self._client)
            finally:
                self._scope = None
        return _CANCELLED

    def interrupt(self) -> bool:
        """Cancel the command that runs; whether there is one."""
        if self._scope is None:
            return False
        self._scope.cancel()
        return True

    def run_line(self, line: str) -> int:
        """Run a line's commands up to the first that fails; its exit code, or 0. Raises _Exit for ``exit``."""
        try:
            commands = parse(line)
        except SyntaxProblem as problem:
            click.echo(f"Error: {problem}", err=True)
            return exits.USAGE
        for words in commands:
            code = self.run_command(words)
            if code:
                return code
        return exits.DONE

    def run_command(self, words: list[str]) -> int:
        name, *arguments = words
        if name in ("exit", "quit"):
            raise _Exit
        if name == "help":
            return _help(arguments, self.session)
        if name not in COMMANDS:
            return _no_command(name)
        full = [*ALIASES.get(name, (name,)), *arguments]
        try:
            result = root.main(full, prog_name="", standalone_mode=False, obj=self.session)
        except click.ClickException as problem:
            problem.show()
            return problem.exit_code
        except click.exceptions.Exit as ended:
            return ended.exit_code
        except (KeyboardInterrupt, click.Abort):
            click.echo("interrupted", err=True)
            return exits.INTERRUPTED
        return result if isinstance(result, int) else exits.DONE

    def keys_with_prefix(self, prefix: bytes) -> list[bytes]:
        """A few keys for completion; none when the cluster is slow or down."""

        async def body(client: Any) -> list[bytes]:
            found = []
            with trio.move_on_after(COMPLETION_SECONDS):
                async with client.scan(
                    prefix=prefix, limit=COMPLETION_KEYS_MAX, keys_only=True, timeout=COMPLETION_SECONDS
                ) as entries:
                    async for entry in entries:
                        found.append(entry.key)
            return found

        try:
            found: list[bytes] = trio.from_thread.run(body, self._client, trio_token=self._token)
        except Exception:  # noqa: BLE001  whatever is wrong, completion stays silent and the command will say it
            return []
        return found


def _no_command(name: str) -> int:
    click.echo(f"Error: no command {name!r}; try help", err=True)
    return exits.USAGE


def _help(arguments: list[str], shell_session: ShellSession) -> int:
    if arguments and arguments[0] in COMMANDS:
        full = [*ALIASES.get(arguments[0], (arguments[0],)), "--help"]
        with contextlib.suppress(click.exceptions.Exit):
            root.main(full, prog_name="", standalone_mode=False, obj=shell_session)
        return exits.DONE
    if arguments and arguments[0] not in (*BUILT_IN, "quit"):
        return _no_command(arguments[0])
    context = click.Context(root)
    click.echo("Commands (help COMMAND shows its options; ; separates commands, # begins a comment):")
    for name in COMMANDS:
        command: click.Command | None = root.get_command(context, ALIASES.get(name, (name,))[0])
        if isinstance(command, click.Group):
            command = command.get_command(context, name)
        assert command is not None, name
        click.echo(f"  {name:<14}{command.get_short_help_str(90)}")
    click.echo(f"  {'exit':<14}Leave the shell; so does the end of the input.")
    return exits.DONE


def complete(shell: Shell, before: str) -> Iterator[tuple[str, int]]:
    """What could stand where the cursor is, with the number of characters to replace.

    Commands first, then options, then keys of the cluster.
    """
    typed = before.rpartition(";")[2].lstrip()
    words = typed.split()
    last = "" if not words or typed[-1].isspace() else words[-1]
    earlier = words[:-1] if last else words
    if not earlier:
        yield from ((name, len(last)) for name in sorted({*COMMANDS, *BUILT_IN}) if name.startswith(last))
        return
    name = earlier[0]
    if name == "help":
        yield from ((each, len(last)) for each in COMMANDS if each.startswith(last))
    elif last.startswith("-"):
        yield from ((option, len(last)) for option in _options_of(name) if option.startswith(last))
    elif name in KEY_COMMANDS and len(earlier) == 1 and last[:1] not in ('"', "'"):
        try:
            prefix = text.unescape(last)
        except ValueError:
            return
        for key in shell.keys_with_prefix(prefix):
            yield quoted(text.escape(key)), len(last)


def _options_of(name: str) -> list[str]:
    context = click.Context(root)
    command: click.Command | None = root.get_command(context, ALIASES.get(name, (name,))[0])
    if isinstance(command, click.Group):
        command = command.get_command(context, name)
    if command is None:
        return []
    hidden = ("--connect",)
    return sorted(
        option
        for parameter in command.params
        for option in parameter.opts
        if option.startswith("--") and option not in hidden
    )


def read_lines(shell: Shell) -> int:
    """Lines from stdin without a terminal: the first failure ends it.

    Read as bytes, so that a command that reads stdin itself (``put KEY -``) gets what stands behind its line. The first
    line may begin with a byte order mark.
    """
    encoding = "utf-8-sig"
    while line := sys.stdin.buffer.readline():
        try:
            code = shell.run_line(line.decode(encoding, "surrogateescape"))
        except _Exit:
            return exits.DONE
        if code:
            return code
        encoding = "utf-8"
    return exits.DONE


def read_prompt(shell: Shell, banner: str) -> int:
    """Lines from a person; failures are shown and the shell goes on."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import CompleteEvent, Completer, Completion
    from prompt_toolkit.document import Document
    from prompt_toolkit.history import FileHistory, History, InMemoryHistory

    class ShellCompleter(Completer):
        def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterator[Completion]:
            for completion, replaced in complete(shell, document.text_before_cursor):
                yield Completion(completion, start_position=-replaced)

    history: History = InMemoryHistory()
    path = history_path()
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)
        history = FileHistory(str(path))
    prompt: PromptSession[str] = PromptSession(
        "shardkv> ", history=history, completer=ShellCompleter(), complete_while_typing=False
    )
    click.echo(banner)
    while True:
        try:
            shell.run_line(prompt.prompt(handle_sigint=False))
        except KeyboardInterrupt:
            continue
        except (EOFError, _Exit):
            return exits.DONE


def history_path() -> Path:
    """Where the lines typed are kept: under XDG_STATE_HOME, by default ~/.local/state."""
    state = os.environ.get("XDG_STATE_HOME") or str(Path.home() / ".local" / "state")
    return Path(state) / "shardkv" / "history"


def run_shell(addresses: str, commands: str | None = None, banner: str = "") -> int:
    """Open a client and run the shell on it until its end; the exit code."""
    try:
        return trio.run(serve, addresses, commands, banner)
    except BaseExceptionGroup as group:
        raise exits.leaf(group) from group


async def serve(addresses: str, commands: str | None, banner: str) -> int:
    """The shell, for a trio loop in the main thread; its exit code."""
    interactive = commands is None and sys.stdin.isatty() and sys.stdout.isatty()
    code = exits.INTERRUPTED
    async with session.connect(addresses) as client, trio.open_nursery() as nursery:
        shell = Shell(client, trio.lowlevel.current_trio_token(), prompts=interactive)

        def work(_held: object = sys.stdin) -> int:
            # An interrupt leaves this thread waiting for stdin, which the end of the process must not close under it:
            # that aborts it. The frame holds on to it.
            if commands is not None:
                try:
                    return shell.run_line(commands)
                except _Exit:
                    return exits.DONE
            return read_prompt(shell, banner) if interactive else read_lines(shell)

        await nursery.start(_interrupts, shell, None if interactive else nursery.cancel_scope.cancel)
        with _terminal_as_it_was() if interactive else contextlib.nullcontext():
            code = await trio.to_thread.run_sync(work, abandon_on_cancel=True)
        nursery.cancel_scope.cancel()
    return code


@contextlib.contextmanager
def _terminal_as_it_was() -> Iterator[None]:
    """The prompt sees to this itself, except where its thread is left behind."""
    import termios

    before = termios.tcgetattr(sys.stdin)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSANOW, before)


async def _interrupts(
    shell: Shell, give_up: Callable[[], None] | None, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
) -> None:
    """Service: an interrupt cancels the command that runs; without one, ``give_up``."""
    with trio.open_signal_receiver(signal.SIGINT) as signals:
        task_status.started()
        async for _ in signals:
            if not shell.interrupt() and give_up is not None:
                tell("interrupted")
                give_up()


@click.command(
    cls=Example,
    example="shardkv shell --connect 127.0.0.1:7001\nshardkv shell --connect 127.0.0.1:7001 -c 'put a 1; get a'",
)
@session.connect_option
@click.option("-c", "commands", metavar="COMMANDS", help="Run these instead of reading any; stop at the first failure.")
@click.pass_context
def shell(ctx: click.Context, addresses: str | None, commands: str | None) -> None:
    """Open the shell: get, put, scan and the other commands over one connection, with history and completion.

    Without a terminal it reads commands from stdin and stops at the first that fails, with its exit code.
    """
    wanted = session.required(ctx, addresses)
    ctx.exit(run_shell(wanted, commands, banner=f"using {wanted}; help lists the commands, Ctrl-D leaves"))
