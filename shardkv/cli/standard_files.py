"""stdin, stdout and stderr of a command: each is there, and an error of the first two says which it was.

What a process was not given cannot be read, not even as an empty value, nor written: what goes nowhere is not done.
Only stderr may be missing; then the exit code alone says how it went.
"""

import contextlib
import errno
import io
import os
import sys
from collections.abc import Iterator
from typing import Any, Final, cast

_MISSING: Final = (os.O_WRONLY, os.O_RDONLY, os.O_WRONLY)
"""How the null device is opened in place of each: so that stdin cannot be read, nor stdout written."""


def open_standard_files() -> None:
    """Where this process was given no stdin, stdout or stderr, give it one.

    Else a node's own files would take their numbers, and what a library tells on stderr would be in the log.
    """
    for number, mode in enumerate(_MISSING):
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, mode)
            assert opened == number, (opened, number)  # the least that is free
    sys.stdin = _text(0, "standard input", sys.stdin)
    sys.stdout = _text(1, "standard output", sys.stdout)
    sys.stderr = cast(Any, sys.stderr) or os.fdopen(2, "w", closefd=False)


class _StandardFile(io.FileIO):
    """An error of the system's names its file by number, or not at all."""

    def __init__(self, number: int, title: str) -> None:
        super().__init__(number, "w" if number else "r", closefd=False)
        self._title = title

    def write(self, data: Any, /) -> int:
        with self._named("written"):
            return super().write(data)

    def readinto(self, buffer: Any, /) -> int:
        with self._named("read"):
            return super().readinto(buffer)

    def readall(self) -> bytes:
        with self._named("read"):
            return super().readall()

    @contextlib.contextmanager
    def _named(self, done: str) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError:  # whose reader has gone, which is no news
            raise
        except OSError as problem:
            closed = problem.errno == errno.EBADF
            why = "it is closed; give it a" if closed else f"{problem.strerror}; give it another"
            raise OSError(f"{self._title} cannot be {done}: {why} file or a pipe") from None


def _text(number: int, title: str, given: Any) -> io.TextIOWrapper:
    """The file as text, as the interpreter made it of ``given``; None where it was not there."""
    file: Any = _StandardFile(number, title)
    if given is None or not isinstance(given.buffer, io.FileIO):  # which it is under python -u
        file = io.BufferedWriter(file) if number else io.BufferedReader(file)
    return io.TextIOWrapper(
        file,
        encoding=given and given.encoding,
        errors=given and given.errors,
        line_buffering=given is not None and given.line_buffering,
        write_through=given is not None and given.write_through,
    )
