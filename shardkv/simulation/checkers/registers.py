"""Every key's calls, and what scans show of it, have an order that explains all answers.

Lives here: the histories of a run's keys until they are judged, and what is known of a key from then on. Does not live
here: the search for an order (``linearizability``), and when a key is used no more (the workload's generations). There
are *registers*, of which each call is remembered, and keys that are put in bulk and read by scans alone. The rule: a
history is judged once, when nothing that could touch its key is under way, and then forgotten but for its last writes.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from shardkv.simulation.checkers.failing_window import explain_result
from shardkv.simulation.checkers.linearizability import REGISTER, Operation, Outcome, Verdict, check
from shardkv.simulation.checkers.violation import Violation


class Registers:
    name = "linearizability"

    def __init__(self) -> None:
        self.histories: dict[bytes, list[Operation]] = {}
        """Of the registers that are not judged yet."""
        self._batches: dict[bytes, list[Operation]] = {}
        """Of the bulk keys that are not judged yet: what was put, and what scans showed."""
        self.lasting: dict[bytes, tuple[Operation, ...]] = {}
        """Of those that were judged: the writes of which one is what the key holds from then on; none: it is absent."""

    def history(self, key: bytes) -> list[Operation]:
        """Of a register that is about to be called; the call is added to it when it has ended."""
        return self.histories.setdefault(key, [])

    def put_in_bulk(self, key: bytes, operation: Operation) -> None:
        """A put among many was answered, or will never be."""
        self._batches.setdefault(key, []).append(operation)

    def versions(self, key: bytes) -> list[int]:
        """Those that a register has had lately."""
        recent = self.histories.get(key, [])[-8:]
        return [each.outcome.result for each in recent if each.kind == "put" and each.outcome and each.outcome.result]

    def scanned(
        self,
        found: Mapping[bytes, Any],
        covers: Callable[[bytes], bool],
        judged: Iterable[bytes],
        called: float,
        now: float,
    ) -> None:
        """A scan was answered; ``judged`` are the keys of ``lasting`` when it was called."""
        for key, history in (*self.histories.items(), *self._batches.items()):
            if covers(key):
                entry = found.get(key)
                outcome = Outcome((entry.value, entry.version) if entry is not None else None)
                history.append(Operation("get", called=called, returned=now, outcome=outcome, key=key))
        for key in judged:
            if covers(key) and not _may_last(self.lasting[key], found.get(key)):
                raise Violation(self.name, f"{key!r}: is {found.get(key)}, long after {self.lasting[key]}")

    def judge(self, over: Callable[[bytes], bool]) -> None:
        """Look for an order of the calls of every key that is used no more."""
        for histories, key in [(each, key) for each in (self.histories, self._batches) for key in each]:
            if not over(key):
                continue
            history = histories.pop(key)
            self.lasting[key] = _lasting(history)
            result = check(history, REGISTER)
            if result.verdict is not Verdict.LINEARIZABLE:
                raise Violation(self.name, f"{key!r}: {result.verdict.value}\n{explain_result(result, REGISTER)}")


def _lasting(history: list[Operation]) -> tuple[Operation, ...]:
    """The writes that no other write certainly came after."""
    writes = [
        each for each in history if each.kind != "get" and (each.outcome is None or each.outcome.mismatch is None)
    ]
    latest = max((each.called for each in writes if each.outcome is not None), default=0.0)
    return tuple(each for each in writes if each.returned >= latest)


def _may_last(lasting: tuple[Operation, ...], entry: Any) -> bool:
    """Whether a key may be found so, that was written last by any one of these."""
    if entry is None:
        return any(each.kind != "put" for each in lasting) or all(each.outcome is None for each in lasting)
    puts = [each for each in lasting if each.kind == "put" and each.argument == entry.value]
    return any(each.outcome is None or each.outcome.result in (None, entry.version) for each in puts)
