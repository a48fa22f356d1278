"""Reads data-driven test files: a command with arguments and input, a line of dashes, and what it must print.

The format is that of cockroachdb/datadriven. Nothing here knows what the commands mean.
"""

import re
from dataclasses import dataclass
from pathlib import Path

_ARGUMENT = re.compile(r"([^\s=()]+)(=(\([^)]*\)|[^\s()]*))?")
_SEPARATOR = "----"


@dataclass(frozen=True, slots=True)
class Argument:
    """``key``, ``key=value`` or ``key=(value, value)``."""

    key: str
    values: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Case:
    """One command of a file. ``line`` is where it stands, counted from one."""

    line: int
    command: str
    arguments: tuple[Argument, ...]
    input: str
    expected: str

    def value(self, key: str) -> str | None:
        """The single value of an argument, or None where it is absent."""
        for argument in self.arguments:
            if argument.key == key:
                (value,) = argument.values
                return value
        return None

    @property
    def positional(self) -> list[str]:
        """The arguments without a value."""
        return [argument.key for argument in self.arguments if not argument.values]


def parse_arguments(text: str) -> tuple[Argument, ...]:
    found = []
    for match in _ARGUMENT.finditer(text):
        key, given, value = match.groups()
        if given is None:
            values: tuple[str, ...] = ()
        elif value.startswith("("):
            values = tuple(part.strip() for part in value[1:-1].split(",") if part.strip())
        else:
            values = (value,)
        found.append(Argument(key, values))
    return tuple(found)


def parse_file(path: Path) -> list[Case]:
    """The commands of a file, in order. Raises ``ValueError`` for a command without its line of dashes."""
    lines = path.read_text(encoding="utf-8").split("\n")
    cases = []
    at = 0
    while at < len(lines):
        if not lines[at].strip() or lines[at].startswith("#"):
            at += 1
            continue
        start = at
        directive = lines[at].strip()
        while directive.endswith("\\"):
            at += 1
            directive = directive[:-1] + " " + lines[at].strip()
        at += 1
        given = at
        while at < len(lines) and lines[at] != _SEPARATOR:
            at += 1
        if at == len(lines):
            raise ValueError(f"{path}:{start + 1}: no {_SEPARATOR} after {directive!r}")
        text = "\n".join(lines[given:at])
        at += 1
        expected, at = _expected(lines, at)
        command, _, arguments = directive.partition(" ")
        cases.append(Case(start + 1, command, parse_arguments(arguments), text, expected))
    return cases


def _expected(lines: list[str], at: int) -> tuple[str, int]:
    """What is to be printed: up to a blank line, or between doubled dashes, where it may hold blank lines."""
    start = at
    if lines[at : at + 1] == [_SEPARATOR]:
        start = at = at + 1
        while lines[at : at + 2] != [_SEPARATOR, _SEPARATOR]:
            at += 1
            if at >= len(lines):
                raise ValueError(f"line {start}: no end of the expected output")
        return "\n".join(lines[start:at]), at + 2
    while at < len(lines) and lines[at].strip():
        at += 1
    return "\n".join(lines[start:at]), at
