"""Whether a history of one key's operations is linearizable: a search after Wing and Gong, with Lowe's memory.

Every key is a register of its own, so each key's history is judged alone. What is known of an operation: when it was
called, when it returned (never, if its outcome is unknown), and what it answered. The question is whether there is one
order, in which each operation takes effect at a moment between its call and its return, that explains all answers. An
operation whose outcome is unknown may take effect at any time after its call, or never.

The state of a register is its value and its version. Versions are the database's to choose; a put whose answer was lost
leaves a version that the next answer names.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from math import inf
from typing import Any, Final, NamedTuple


class Outcome(NamedTuple):
    """What came back. ``mismatch`` is the current version that a VersionMismatch named."""

    result: Any = None
    mismatch: int | None = None


UNKNOWN: Final = None


@dataclass(slots=True)
class Operation:
    """One call. ``kind`` is put, get, delete or increment; a put with ``if_version`` is a compare-and-swap.

    ``outcome`` None: unknown. An operation that certainly did not happen does not belong into a history.
    """

    kind: str
    argument: Any = None
    if_version: int | None = None
    called: float = 0.0
    returned: float = inf
    outcome: Outcome | None = UNKNOWN


class State(NamedTuple):
    value: bytes | None = None
    version: int | None = 0
    """0 for an absent key, None while nobody knows it."""


ABSENT: Final = State()


def step(state: State, operation: Operation) -> State | None:
    """The state after an operation takes effect with the outcome it had; None if it cannot have had that outcome."""
    outcome = operation.outcome
    if operation.kind == "get":
        assert outcome is not None, "a read without an answer does not belong into a history"
        found = outcome.result
        if found is None:
            return state if state.value is None else None
        value, version = found
        if state.value != value or state.version not in (None, version):
            return None
        return State(value, version)
    if operation.if_version is not None:
        matches = state.version is None or state.version == operation.if_version
        if outcome is not None and outcome.mismatch is not None:
            known = state.version
            if known is None:
                return None if outcome.mismatch == operation.if_version else State(state.value, outcome.mismatch)
            return state if known == outcome.mismatch != operation.if_version else None
        if not matches:
            return None if outcome is not None else state
    return _write(state, operation, outcome)


def _write(state: State, operation: Operation, outcome: Outcome | None) -> State | None:
    if operation.kind == "put":
        version = outcome.result if outcome is not None else None
        if version is not None and state.version is not None and version <= state.version:
            return None  # versions grow with every write of a key
        return State(operation.argument, version)
    if operation.kind == "delete":
        if outcome is not None and outcome.result != (state.value is not None):
            return None
        return ABSENT
    assert operation.kind == "increment", operation.kind
    total = int(state.value or b"0") + operation.argument
    if outcome is not None and outcome.result != total:
        return None
    return State(b"%d" % total, None)


def linearizable(operations: Iterable[Operation], initial: State = ABSENT) -> bool:
    """Whether some order explains the history of one key. Exponential in the worst case, quick in practice."""
    history = sorted(operations, key=lambda each: each.called)
    count = len(history)
    certain = sum(1 << position for position, each in enumerate(history) if each.outcome is not UNKNOWN)
    seen: set[tuple[int, State]] = set()
    todo = [(0, initial)]
    while todo:
        done, state = todo.pop()
        if done & certain == certain:
            return True
        if (done, state) in seen:
            continue
        seen.add((done, state))
        # Whoever goes next was called before any of those that are left returned.
        earliest = min(each.returned for position, each in enumerate(history) if not done >> position & 1)
        for position in range(count):
            operation = history[position]
            if operation.called > earliest:
                break
            if not done >> position & 1:
                after = step(state, operation)
                if after is not None:
                    todo.append((done | 1 << position, after))
    return False
