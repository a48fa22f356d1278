"""Published histories with known verdicts, judged: 102 that Jepsen recorded against etcd, and six of a store.

    python -m tests.checkers.porcupine [--explain] PATH...         folders, or single files

Prints per file whether the verdict is as published, and how many are; ends with 0 only if all do. A ``.log`` file is a
Jepsen register's, its verdict is in ``expected.tsv`` in one of the folders above it. A ``.txt`` file is of a store with
get, put and append, its verdict is in its name. The moments of a history are its line numbers.
"""

import re
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

from shardkv.program import run_program
from shardkv.simulation.checkers.failing_window import explain
from shardkv.simulation.checkers.linearizability import STEPS_MAX, Model, Operation, Outcome, Result, Verdict, check

_JEPSEN: Final = re.compile(r"INFO\s+jepsen\.util - (\d+)\s+:(invoke|ok|fail|info)\s+:(read|write|cas)\s+(.*?)\s*")
_STORE: Final = re.compile(
    r'\{:process (\d+), :type :(invoke|ok), :f :(get|put|append), :key "(.*?)", :value (?:nil|"(.*)")\}\s*'
)


class Cell(NamedTuple):
    """The state of a Jepsen register; None is ``nil``."""

    value: int | None


class JepsenRegister(Model[Cell]):
    """One register: read, write and compare-and-set. A failed compare-and-set saw another value than it wanted."""

    @property
    def initial(self) -> Cell:
        return Cell(None)

    def step(self, state: Cell, operation: Operation) -> Cell | None:
        outcome, argument = operation.outcome, operation.argument
        if operation.kind == "read":
            assert outcome is not None, "a read without an answer does not belong into a history"
            return state if outcome.result == state.value else None
        if operation.kind == "write":
            return Cell(argument)
        wanted, new = argument
        matches = state.value == wanted
        if outcome is not None and outcome.result != matches:
            return None
        return Cell(new) if matches else state

    def changes(self, operation: Operation) -> bool:
        return operation.kind != "read"

    def states_after(self, operations: Iterable[Operation]) -> frozenset[Cell] | None:
        written = {Cell(each.argument) for each in operations if each.kind == "write"}
        swapped = {Cell(each.argument[1]) for each in operations if each.kind == "cas"}
        return frozenset({self.initial} | written | swapped)

    def describe_state(self, state: Cell) -> str:
        return "nil" if state.value is None else str(state.value)


class AppendStore(Model[str]):
    """The published store: every key is a text, empty at first; put replaces it, append adds to its end."""

    @property
    def initial(self) -> str:
        return ""

    def step(self, state: str, operation: Operation) -> str | None:
        if operation.kind == "put":
            return str(operation.argument)
        if operation.kind == "append":
            return state + str(operation.argument)
        assert operation.outcome is not None, "a read without an answer does not belong into a history"
        return state if state == operation.outcome.result else None

    def changes(self, operation: Operation) -> bool:
        return operation.kind != "get"


@dataclass(frozen=True)
class Case:
    """A history and what is published about it."""

    path: Path
    operations: list[Operation]
    model: Model[Cell] | Model[str]
    expected: Verdict

    def judge(self, steps_max: int = STEPS_MAX) -> Result:
        """``steps_max`` is for each key."""
        return check(self.operations, self.model, steps_max=steps_max)


def read_case(path: Path) -> Case:
    """Raises ValueError for a file that is no history, or whose verdict is not published."""
    text = path.read_text()
    if path.suffix == ".log":
        return Case(path, jepsen_history(text), JepsenRegister(), _expected(path))
    expected = {"ok": Verdict.LINEARIZABLE, "bad": Verdict.NOT_LINEARIZABLE}.get(path.stem.rpartition("-")[2])
    if expected is None:
        raise ValueError("its name says no verdict: it ends neither in -ok nor in -bad")
    return Case(path, store_history(text), AppendStore(), expected)


def _expected(path: Path) -> Verdict:
    table = next((each / "expected.tsv" for each in path.parents if (each / "expected.tsv").is_file()), None)
    if table is None:
        raise ValueError(f"no expected.tsv above {path}")
    verdicts = dict(line.split("\t") for line in table.read_text().splitlines())
    if path.stem not in verdicts:
        raise ValueError(f"{table} has no verdict for {path.stem}")
    return Verdict(verdicts[path.stem])


def jepsen_history(text: str) -> list[Operation]:
    operations: list[Operation] = []
    open_calls: dict[str, Operation] = {}
    for moment, line in enumerate(text.splitlines()):
        match = _JEPSEN.fullmatch(line)
        if match is None:
            raise ValueError(f"line {moment + 1} is none of a Jepsen register's: {line!r}")
        process, event, kind, value = match.groups()
        if event == "invoke":
            numbers = [int(each) for each in re.findall(r"\d+", value)]
            argument = {"read": None, "write": numbers[0] if numbers else None, "cas": tuple(numbers)}[kind]
            open_calls[process] = Operation(kind, argument, called=moment, client=process)
            continue
        operation = _called(open_calls, process, moment)
        if event == "info" or value == ":timed-out":
            if event == "info" and kind != "read":
                operations.append(operation)
            continue
        result = event == "ok"
        operation.outcome = Outcome((None if value == "nil" else int(value)) if kind == "read" else result)
        operation.returned = moment
        operations.append(operation)
    return operations + [each for each in open_calls.values() if each.kind != "read"]


def store_history(text: str) -> list[Operation]:
    operations: list[Operation] = []
    open_calls: dict[str, Operation] = {}
    for moment, line in enumerate(text.splitlines()):
        match = _STORE.fullmatch(line)
        if match is None:
            raise ValueError(f"line {moment + 1} is none of the store's: {line!r}")
        process, event, kind, key, value = match.groups()
        if event == "invoke":
            open_calls[process] = Operation(kind, value, called=moment, key=key, client=process)
            continue
        operation = _called(open_calls, process, moment)
        operation.outcome, operation.returned = Outcome(value), moment
        operations.append(operation)
    return operations + [each for each in open_calls.values() if each.kind != "get"]


def _called(open_calls: dict[str, Operation], process: str, moment: int) -> Operation:
    if process not in open_calls:
        raise ValueError(f"line {moment + 1} answers a call that process {process} has not made")
    return open_calls.pop(process)


def history_files(paths: Sequence[Path]) -> list[Path]:
    """The files themselves, and the histories below folders that have a published verdict."""
    found: list[Path] = []
    for path in paths:
        if not path.is_dir():
            found.append(path)
            continue
        table = (
            next((each for each in (path, *path.parents) if (each / "expected.tsv").is_file()), path) / "expected.tsv"
        )
        judged = {line.split("\t")[0] for line in table.read_text().splitlines()} if table.is_file() else set()
        found += sorted(each for each in path.rglob("*.log") if each.stem in judged)
        found += sorted(each for each in path.rglob("*.txt") if each.stem.endswith(("-ok", "-bad")))
    return found


def main(arguments: Sequence[str]) -> int:
    explaining = "--explain" in arguments
    files = history_files([Path(each) for each in arguments if each != "--explain"])
    if "--help" in arguments:
        print(__doc__)
        return 0
    missing = [path for path in files if not path.is_file()]
    if missing or not files:
        print(
            __doc__ if not arguments else f"no history at {' '.join(map(str, missing or arguments))}", file=sys.stderr
        )
        return 2
    matching, slowest, begin = 0, 0.0, time.process_time()
    for path in files:
        before = time.process_time()
        try:
            case = read_case(path)
        except (OSError, ValueError) as problem:
            print(f"{path}: is no history with a published verdict: {problem}")
            continue
        found = case.judge()
        seconds = time.process_time() - before
        slowest = max(slowest, seconds)
        steps = sum(each.steps for each in found.findings)
        same = found.verdict is case.expected
        matching += same
        word = "match" if same else f"differ, published as {case.expected.value}"
        print(f"{path.name}: {word} ({found.verdict.value}, {steps} steps, {seconds:.3f} s)")
        if explaining and found.failing:
            print(explain(found.failing[0], case.model))
    print(f"{matching} of {len(files)} verdicts match ({time.process_time() - begin:.1f} s, worst {slowest:.2f} s)")
    return 0 if matching == len(files) else 1


if __name__ == "__main__":
    run_program(lambda: main(sys.argv[1:]))
