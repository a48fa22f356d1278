"""Replays the published data-driven files of etcd-io/raft against this core, and compares what they print.

    python -m tests.conformance.etcd_raft PATH…

A path is a file, or a folder that is searched for ``.txt`` files. For each file it prints ``match``, or where the first
difference is and what it is; at the end ``N of M files match``. The exit code is 0 only when all do.

The library's own log lines (``INFO 1 became leader at term 1``) are left out of the comparison, for the core logs
nothing; everything else must be the same to the letter.
"""

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from shardkv.program import run_program
from tests.conformance.datadriven import Case, parse_file
from tests.conformance.interaction import World
from tests.conformance.tables import MembershipTable, QuorumTable

_LOG_LINE = re.compile(r"^\s*(DEBUG|INFO|WARN|ERROR|FATAL) ")
_QUORUM_COMMANDS = {"committed", "vote"}
_MEMBERSHIP_COMMANDS = {"simple", "enter-joint", "leave-joint"}


class Runner(Protocol):
    def handle(self, case: Case) -> str: ...


@dataclass(frozen=True, slots=True)
class Difference:
    """The first command of a file that printed something else."""

    path: Path
    case: Case
    expected: list[str]
    actual: list[str]

    def __str__(self) -> str:
        at = next(
            (at for at, (wanted, got) in enumerate(zip(self.expected, self.actual)) if wanted != got),
            min(len(self.expected), len(self.actual)),
        )
        wanted = self.expected[at] if at < len(self.expected) else "(nothing more)"
        got = self.actual[at] if at < len(self.actual) else "(nothing more)"
        arguments = " ".join(
            argument.key + (f"=({','.join(argument.values)})" if argument.values else "")
            for argument in self.case.arguments
        )
        return (
            f"{self.path}:{self.case.line}: {self.case.command} {arguments}\n"
            f"  line {at + 1} of its output\n"
            f"    expected: {wanted}\n"
            f"    printed:  {got}"
        )


def runner_for(cases: Sequence[Case]) -> Runner:
    """What runs a file, told by the commands in it."""
    commands = {case.command for case in cases}
    if commands & _QUORUM_COMMANDS:
        return QuorumTable()
    if commands & _MEMBERSHIP_COMMANDS:
        return MembershipTable()
    return World()


def without_log_lines(text: str) -> list[str]:
    """The lines that count. Where a command logged and printed nothing else, it counts as having printed ``ok``."""
    lines = text.split("\n")
    while lines and not lines[-1]:
        lines.pop()
    kept = [line for line in lines if not _LOG_LINE.match(line)]
    return kept or ["ok"]


def replay(path: Path) -> Difference | None:
    """Run a file from its beginning; None when everything it prints is as published.

    Raises ValueError for a file of another format, or without a command.
    """
    cases = parse_file(path)
    if not cases:
        raise ValueError("it has no command")
    runner = runner_for(cases)
    for case in cases:
        expected = without_log_lines(case.expected)
        try:
            actual = without_log_lines(runner.handle(case))
        except Exception as error:
            return Difference(path, case, expected, [f"{type(error).__name__}: {error}"])
        if actual != expected:
            return Difference(path, case, expected, actual)
    return None


def data_files(paths: Sequence[Path]) -> list[Path]:
    """The files themselves, and the ``.txt`` files below folders."""
    found: list[Path] = []
    for path in paths:
        found += sorted(path.rglob("*.txt")) if path.is_dir() else [path]
    return found


def main(arguments: Sequence[str]) -> int:
    if not arguments or "--help" in arguments:
        print(__doc__, file=sys.stdout if arguments else sys.stderr)
        return 0 if arguments else 2
    files = data_files([Path(argument) for argument in arguments])
    missing = [path for path in files if not path.is_file()]
    if missing or not files:
        print(f"no such file: {', '.join(map(str, missing)) or ' '.join(arguments)}", file=sys.stderr)
        return 2
    matching = 0
    for path in files:
        try:
            difference: object = replay(path)
        except (OSError, ValueError) as problem:
            difference = f"{path}: is no data-driven file: {problem}"
        if difference is None:
            matching += 1
        print(f"{path}: match" if difference is None else difference)
    print(f"{matching} of {len(files)} files match")
    return 0 if matching == len(files) else 1


if __name__ == "__main__":
    run_program(lambda: main(sys.argv[1:]))
