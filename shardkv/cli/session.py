"""How a command reaches the cluster: over a connection of its own, or over the shell's.

Commands are plain functions. Each hands an async body to a session, which runs it with a client. ``connect`` is the
one place that opens a client; tests put a fake there.
"""

import codecs
import functools
import sys
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from typing import Any, BinaryIO, Final, Protocol, TypeVar

import click
from click.core import ParameterSource

from shardkv.address import parse_addresses
from shardkv.cli import text
from shardkv.errors import ConfigError, KeyTooLarge
from shardkv.json_rules import to_json
from shardkv.program import Finite, leaf
from shardkv.types import KEY_BYTES_MAX

T = TypeVar("T")
Function = TypeVar("Function", bound=Callable[..., Any])
Client = Any
"""A ``shardkv_client`` client, or a fake in tests."""
TIMEOUT_SECONDS: Final = 10.0
Body = Callable[[Client], Awaitable[T]]


def connect(addresses: str) -> AbstractAsyncContextManager[Client]:
    """Open a client. Imported here, so that ``--help`` needs no client."""
    import shardkv_client

    client: AbstractAsyncContextManager[Client] = shardkv_client.connect(addresses)
    return client


class Session(Protocol):
    timeout: float
    """Seconds for each call to the cluster."""

    def run(self, body: Body[T]) -> T:
        """Run ``body`` with a client. Errors come out as they were raised."""
        ...

    def stdin(self) -> BinaryIO:
        """What the command reads where ``-`` was typed. Raises a usage error where the prompt reads it."""
        ...


class OneShot:
    """A session of one command: connects, runs the body, closes."""

    def __init__(self, addresses: str, timeout: float) -> None:
        self.addresses = addresses
        self.timeout = timeout

    def run(self, body: Body[T]) -> T:
        import trio

        async def connected() -> T:
            async with connect(self.addresses) as client:
                return await body(client)

        try:
            return trio.run(connected)
        except BaseExceptionGroup as group:
            raise leaf(group) from group

    def stdin(self) -> BinaryIO:
        return sys.stdin.buffer


class _ConnectOption(click.Option):
    """Not offered in the shell, which refuses it."""

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        return None if ctx.find_object(ShellSession) else super().get_help_record(ctx)


connect_option: Final = click.option(
    "--connect",
    "addresses",
    cls=_ConnectOption,
    envvar="SHARDKV_CONNECT",
    show_envvar=True,
    metavar="HOST:PORT,...",
    help="Any node's address.",
)
timeout_option: Final = click.option(
    "--timeout", type=Finite(min=0.001), metavar="SECONDS", help="For each request.  [default: 10]"
)


def connected(function: Function) -> Function:
    """Give a command ``--connect`` and ``--timeout``; it receives ``session``, which in the shell is the shell's."""

    def wrapper(ctx: click.Context, addresses: str | None, timeout: float | None, **arguments: Any) -> Any:
        shell = ctx.find_object(ShellSession)
        if shell is not None:
            if ctx.get_parameter_source("addresses") is ParameterSource.COMMANDLINE:
                raise click.UsageError("the shell is connected already; leave --connect out, or open another shell")
            session: Session = shell.with_timeout(timeout)
        else:
            session = OneShot(required(ctx, addresses), timeout or TIMEOUT_SECONDS)
        return function(session=session, **arguments)

    wrapped: Any = functools.update_wrapper(wrapper, function)
    for add in (click.pass_context, timeout_option, connect_option):
        wrapped = add(wrapped)
    result: Function = wrapped
    return result


def required(ctx: click.Context, addresses: str | None) -> str:
    """The addresses to connect to. Raises a usage error when there are none, or one is no address."""
    if not addresses:
        raise click.UsageError("give --connect HOST:PORT or set SHARDKV_CONNECT", ctx)
    if "://" in addresses:
        raise click.BadParameter(
            f"{addresses!r} is a URL; give HOST:PORT alone, for example 127.0.0.1:7001", ctx, param_hint="--connect"
        )
    try:
        parse_addresses(addresses)
    except ConfigError as problem:
        raise click.BadParameter(str(problem), ctx, param_hint="--connect") from None
    return addresses


class ShellSession:
    """The session of commands typed in the shell: bodies run in the shell's trio loop, over its open client.

    ``run_in_loop`` is called in the shell's own thread and blocks until the body is done. ``prompts`` says that lines
    come from a prompt: a command that read stdin there could not be interrupted, and would take the next line.
    """

    def __init__(
        self, run_in_loop: Callable[[Body[Any]], Any], timeout: float = TIMEOUT_SECONDS, *, prompts: bool = False
    ) -> None:
        self._run_in_loop = run_in_loop
        self._prompts = prompts
        self.timeout = timeout

    def run(self, body: Body[T]) -> T:
        result: T = self._run_in_loop(body)
        return result

    def with_timeout(self, timeout: float | None) -> "ShellSession":
        return self if timeout is None else ShellSession(self._run_in_loop, timeout, prompts=self._prompts)

    def stdin(self) -> BinaryIO:
        if self._prompts:
            raise click.UsageError(
                "the prompt reads stdin itself; instead of - give the value or a file's name,"
                " or use the command outside the shell"
            )
        return sys.stdin.buffer


json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
base64_option = click.option("--base64", "base64_text", is_flag=True, help="Keys and values are base64, in and out.")


def all_shown() -> bool:
    """Whether stdout can hold every character."""
    return codecs.lookup(sys.stdout.encoding).name == "utf-8"


def shown_json(value: object, *, compact: bool = False) -> str:
    """One JSON document for stdout. What that cannot hold is escaped as JSON has it: another escape would break it."""
    return to_json(value, compact=compact, ascii_only=not all_shown())


def read_bytes(typed: str, base64_text: bool, what: str) -> bytes:
    """A typed key or value. Raises a usage error that names ``what``."""
    try:
        return text.read(typed, base64_text)
    except ValueError as problem:
        raise click.BadParameter(str(problem), param_hint=what) from None


def read_key(typed: str, base64_text: bool, what: str = "KEY") -> bytes:
    """A typed key that must not be empty. Raises KeyTooLarge: not every request is checked by the client."""
    key = read_bytes(typed, base64_text, what)
    if not key:
        raise click.BadParameter("a key has at least one byte", param_hint=what)
    if len(key) > KEY_BYTES_MAX:
        raise KeyTooLarge(f"a key may have {KEY_BYTES_MAX} bytes; this one has {len(key)}")
    return key
