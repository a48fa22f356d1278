"""How a program that people start ends: with an exit code and, where something was in the way, one line on stderr.

Lives here: interrupts, what cannot be written, and a wrong option, for every program that is started from a terminal.
Does not live here: what the database's errors mean to the ``shardkv`` command (``shardkv.cli.exits``).
"""

import contextlib
import math
import os
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import IO, Any, Final, NoReturn

import click

DONE: Final = 0
FAILED: Final = 1
USAGE: Final = 2
INTERRUPTED: Final = 130
_AS_INTERRUPT: Final = (signal.SIGTERM, signal.SIGHUP)


class Finite(click.FloatRange):
    """A number that has an end: neither infinite nor nan, which is within every bound."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        found = super().convert(value, param, ctx)
        if not math.isfinite(found):
            self.fail(f"{value} is no finite number.", param, ctx)
        return found


def run_program(body: Callable[[], object]) -> NoReturn:
    """Do the whole work of this process and end it.

    ``body`` returns the exit code (None is 0). A KeyboardInterrupt that it raises may say how to go on. SIGTERM and
    SIGHUP are taken as interrupts, so that whatever was started is ended and cleared away; the code is then theirs.
    """
    received: list[int] = []

    def interrupt(number: int, frame: FrameType | None) -> None:
        received.append(number)
        signal.raise_signal(signal.SIGINT)  # for whoever sees to it now: an event loop lets it in where it may

    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else it is ignored, as in the background
        for number in _AS_INTERRUPT:
            if signal.getsignal(number) is signal.SIG_DFL:
                signal.signal(number, interrupt)
    try:
        code = _code_of(body)
    except KeyboardInterrupt:  # another one, amid what was said of the first
        code = INTERRUPTED
    let_go_of(sys.stdout)
    let_go_of(sys.stderr)
    sys.exit(128 + received[0] if code == INTERRUPTED and received else code)


def _code_of(body: Callable[[], object]) -> int:
    try:
        code = body()
        if sys.stdout is not None:
            sys.stdout.flush()
        return code if isinstance(code, int) else DONE
    except SystemExit as end:
        if isinstance(end.code, str):
            tell(end.code)
            return FAILED
        return end.code or DONE
    except BaseException as error:  # noqa: BLE001  # raised again, unless it is one to tell
        return _told(error)


def _told(error: BaseException) -> int:
    match leaf(error):
        case click.exceptions.Exit() as end:
            return end.exit_code
        case click.ClickException() as problem:
            with contextlib.suppress(OSError):
                problem.show()
            return problem.exit_code
        case KeyboardInterrupt() | click.Abort() as interrupt:
            # Click raises its own instead, from the one that was raised.
            words = str(interrupt) or str(interrupt.__cause__ or "")
            tell(f"interrupted{': ' if words else ''}{words}")
            return INTERRUPTED
        case BrokenPipeError():
            return FAILED
        case OSError() as problem:
            tell(f"Error: {problem}")
            return FAILED
    raise error


def tell(words: str) -> None:
    """Say something on stderr. Where that cannot be written either, the exit code says it alone."""
    with contextlib.suppress(OSError):
        click.echo(words, err=True)


def leaf(error: BaseException) -> BaseException:
    """The error that matters in an exception group: an interrupt if there is one, else the first."""
    leaves = leaves_of(error)
    return next((each for each in leaves if isinstance(each, KeyboardInterrupt)), leaves[0])


def leaves_of(error: BaseException) -> list[BaseException]:
    """The errors in a group, however deep; an error that is no group is alone."""
    if not isinstance(error, BaseExceptionGroup):
        return [error]
    return [found for inner in error.exceptions for found in leaves_of(inner)]


def let_go_of(stream: IO[str] | None) -> None:
    """Write what is buffered, and where that fails let it and whatever comes go nowhere.

    The interpreter would try once more at its end, and end with an exit code of its own.
    """
    if stream is None:
        return
    try:
        stream.flush()
    except OSError:
        with open(os.devnull, "wb") as nowhere:  # noqa: PTH123  # the process is ending, and no node is left in it
            os.dup2(nowhere.fileno(), stream.fileno())
