"""Whether what clients saw of a key could have happened one operation after another: Wing and Gong, with Lowe's memory.

Lives here: operations, the models that say what an operation may answer, and the search. Does not live here: the
smallest part of a history that fails, and its picture (``failing_window``). The rule: what was answered is taken for
true, and nothing else is assumed; a search that comes to no end within its bound says so, and never guesses.

Every key is judged alone, for a history is linearizable if and only if each key's is (Herlihy and Wing, 1990). What is
known of an operation: when it was called, when it returned (never, if its outcome is unknown), and what it answered.
The question is whether there is one order, in which each operation takes effect at a moment between its call and its
return, that explains all answers. An operation whose outcome is unknown takes effect at any time after its call, or
never.

The search extends an order one operation at a time and remembers every (set of operations done, state) it has been to.
Three things keep it short. An answered operation that leaves the state as it is can go first whenever it fits: doing so
closes no way that was open. Of unknown operations that are alike, the one called first goes first. And behind an
unknown operation comes only one that notices it: for any other, the order without the unknown one is as good.
"""

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from math import inf
from typing import Any, Final, NamedTuple, Protocol, TypeVar

State = TypeVar("State", bound=Hashable)

STEPS_MAX: Final = 2_000_000
"""Steps of a model for one key: some seconds. Beyond it the verdict is UNDECIDED."""


class Outcome(NamedTuple):
    """What came back. ``mismatch`` is the current version that a VersionMismatch named."""

    result: Any = None
    mismatch: int | None = None


UNKNOWN: Final = None


@dataclass(slots=True)
class Operation:
    """One call of a client. What ``kind`` may be is the model's; see :class:`VersionedRegister`.

    ``called`` and ``returned`` are moments of one clock. ``outcome`` None: unknown, and then it never returned. An
    operation that certainly did not happen does not belong into a history.
    """

    kind: str
    argument: Any = None
    if_version: int | None = None
    called: float = 0.0
    returned: float = inf
    outcome: Outcome | None = UNKNOWN
    key: Hashable = None
    client: Hashable = None

    @property
    def alike(self) -> Hashable:
        """Equal for operations that do the same wherever they are put."""
        return (self.kind, self.argument, self.if_version)


class Model(Protocol[State]):
    """What the operations of one key do. States are compared and remembered, so they are values."""

    @property
    def initial(self) -> State: ...

    def step(self, state: State, operation: Operation) -> State | None:
        """The state after an operation takes effect with the outcome it had; None if it cannot have had that."""

    def partition(self, operation: Operation) -> Hashable:
        """Operations of different parts never touch each other."""
        return operation.key

    def changes(self, operation: Operation) -> bool:
        """Whether it may change the state. One that cannot, and has no answer, says nothing and is left out."""

    def tells(self, operation: Operation) -> bool:
        """Whether its answer tells if it has changed the state. One that has not is taken as early as it fits."""
        return True

    def states_after(self, operations: Iterable[Operation]) -> frozenset[State] | None:
        """Every state that any of these may leave behind, done or not and in whatever order, the initial one too.

        More than are possible do no harm; None where there is no short list.
        """
        return None

    def describe(self, operation: Operation) -> str:
        """A call and its answer in a few words."""
        argument = "" if operation.argument is None else f" {operation.argument!r}"
        answer = "unknown" if operation.outcome is UNKNOWN else repr(operation.outcome.result)
        return f"{operation.kind}{argument} -> {answer}"

    def describe_state(self, state: State) -> str:
        return repr(state)


class Register(NamedTuple):
    """What is known of one key at one moment."""

    value: bytes | None = None
    version: int | None = 0
    """0 for an absent key, None while nobody knows it."""
    above: int = 0
    """The highest version that the key certainly had: every later write gets a higher one, after a delete too."""


ABSENT: Final = Register()


class VersionedRegister(Model[Register]):
    """A key of this database: ``get``, ``put``, ``delete``, ``delete-range`` and ``increment``, with or without
    ``if_version``.

    Answers are a get's ``(value, version)`` or None, a put's version, a delete's ``was there``, an increment's total,
    and nothing for a range's delete.
    Versions are the database's to choose; a write whose answer was lost leaves one that a later answer names.
    """

    def __init__(self, initial: Register = ABSENT) -> None:
        self._initial = initial

    @property
    def initial(self) -> Register:
        return self._initial

    def step(self, state: Register, operation: Operation) -> Register | None:
        outcome = operation.outcome
        if operation.kind == "get":
            assert outcome is not None, "a read without an answer does not belong into a history"
            return _read(state, outcome.result)
        if operation.if_version is not None:
            if outcome is not None and outcome.mismatch is not None:
                return _mismatch(state, operation.if_version, outcome.mismatch)
            if not _may_have(state, operation.if_version):
                return None if outcome is not None else state
            if state.version is None:
                state = state._replace(above=max(state.above, operation.if_version))
        return _write(state, operation, outcome)

    def changes(self, operation: Operation) -> bool:
        return operation.kind != "get"

    def tells(self, operation: Operation) -> bool:
        if operation.kind in ("put", "increment"):  # with the value that was there it leaves another version of it
            return operation.outcome is not None and operation.outcome.mismatch is not None
        return operation.kind != "delete-range"

    def states_after(self, operations: Iterable[Operation]) -> frozenset[Register] | None:
        found = {self._initial}
        for operation in operations:
            outcome = operation.outcome
            if outcome is not None and outcome.mismatch is not None:
                continue
            if operation.kind == "put":
                version = None if outcome is None else outcome.result
                found.add(Register(operation.argument, version, version or 0))
            elif operation.kind in ("delete", "delete-range"):
                found.add(ABSENT)
            elif operation.kind == "increment":
                if outcome is None:
                    return None
                found.add(Register(b"%d" % outcome.result, None))
        return frozenset(found)

    def describe(self, operation: Operation) -> str:
        words = [operation.kind]
        if operation.argument is not None:
            words.append(_short(operation.argument))
        if operation.if_version is not None:
            words.append(f"if version {operation.if_version}")
        return f"{' '.join(words)} -> {_answer(operation)}"

    def describe_state(self, state: Register) -> str:
        if state.value is None:
            return "absent"
        return _short(state.value) + (f" version {state.version}" if state.version is not None else "")


REGISTER: Final = VersionedRegister()


def _read(state: Register, found: tuple[bytes, int] | None) -> Register | None:
    if found is None:
        return state if state.value is None else None
    value, version = found
    if state.value != value:
        return None
    if state.version is None:
        return Register(value, version, version) if version > state.above else None
    return state if state.version == version else None


def _may_have(state: Register, version: int) -> bool:
    """Whether that can be the key's version: one that nobody knows is above all that were known before it."""
    return state.version == version if state.version is not None else version > state.above


def _mismatch(state: Register, wanted: int, found: int) -> Register | None:
    """A conditional write that was told the version ``found``."""
    if found == wanted:
        return None
    if state.version is None:
        return Register(state.value, found, found) if found > state.above else None
    return state if state.version == found else None


def _write(state: Register, operation: Operation, outcome: Outcome | None) -> Register | None:
    if operation.kind == "put":
        version = outcome.result if outcome is not None else None
        if version is None:
            return Register(operation.argument, None, state.above)
        return Register(operation.argument, version, version) if version > state.above else None
    if operation.kind in ("delete", "delete-range"):
        if outcome is not None and operation.kind == "delete" and outcome.result != (state.value is not None):
            return None
        return state if state.value is None else Register(None, 0, state.above)
    assert operation.kind == "increment", operation.kind
    try:
        total = int(state.value or b"0") + operation.argument
    except ValueError:
        return None if outcome is not None else state
    if outcome is not None and outcome.result != total:
        return None
    return Register(b"%d" % total, None, state.above)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:28]}... ({len(text)} characters)"


def _answer(operation: Operation) -> str:
    outcome = operation.outcome
    if outcome is None:
        return "unknown"
    if outcome.mismatch is not None:
        return f"version mismatch, found {outcome.mismatch}"
    if operation.kind == "get":
        return "absent" if outcome.result is None else f"{_short(outcome.result[0])} version {outcome.result[1]}"
    return f"version {outcome.result}" if operation.kind == "put" else str(outcome.result)


class Verdict(Enum):
    LINEARIZABLE = "linearizable"
    NOT_LINEARIZABLE = "not-linearizable"
    UNDECIDED = "undecided"
    """The search was given up at its bound: nothing is known."""


class Undecided(Exception):
    """A history was neither explained nor refuted within the bound."""


class Finding(NamedTuple):
    """One key's verdict. ``longest`` is an order that explains as many answers as any that was found."""

    key: Hashable
    verdict: Verdict
    history: tuple[Operation, ...]
    longest: tuple[Operation, ...]
    steps: int


class Result(NamedTuple):
    """The verdict over all keys, the worst of any, and the keys' own."""

    verdict: Verdict
    findings: tuple[Finding, ...]

    @property
    def failing(self) -> tuple[Finding, ...]:
        return tuple(each for each in self.findings if each.verdict is Verdict.NOT_LINEARIZABLE)


def check(operations: Iterable[Operation], model: Model[Any] = REGISTER, *, steps_max: int = STEPS_MAX) -> Result:
    """Judge a history of any number of keys. Exponential in the worst case, quick in practice, bounded by ``steps_max``
    steps of the model for each key.
    """
    parts: dict[Hashable, list[Operation]] = {}
    for operation in operations:
        parts.setdefault(model.partition(operation), []).append(operation)
    findings = tuple(_finding(key, history, model, steps_max) for key, history in parts.items())
    verdicts = {each.verdict for each in findings}
    for verdict in (Verdict.NOT_LINEARIZABLE, Verdict.UNDECIDED):
        if verdict in verdicts:
            return Result(verdict, findings)
    return Result(Verdict.LINEARIZABLE, findings)


def _finding(key: Hashable, history: list[Operation], model: Model[Any], steps_max: int) -> Finding:
    history.sort(key=lambda each: each.called)
    found = search(history, model, [model.initial], steps_max)
    return Finding(key, found.verdict, tuple(history), found.longest, found.steps)


def linearizable(operations: Iterable[Operation], initial: Register = ABSENT, *, steps_max: int = STEPS_MAX) -> bool:
    """Whether some order explains the history of one key of this database. Raises Undecided."""
    found = search(list(operations), VersionedRegister(initial), [initial], steps_max)
    if found.verdict is Verdict.UNDECIDED:
        raise Undecided(f"no verdict after {found.steps} steps; {len(found.longest)} operations are explained")
    return found.verdict is Verdict.LINEARIZABLE


class Found(NamedTuple):
    verdict: Verdict
    longest: tuple[Operation, ...]
    steps: int


def search(
    history: Sequence[Operation], model: Model[State], initials: Iterable[State], steps_max: int = STEPS_MAX
) -> Found:
    """Judge one part of a history that begins in any one of ``initials``."""
    run = _Search([each for each in history if each.outcome is not UNKNOWN or model.changes(each)], model, steps_max)
    for initial in initials:
        verdict = run.explain(initial)
        if verdict is not Verdict.NOT_LINEARIZABLE:
            return Found(verdict, tuple(run.longest), run.steps)
    return Found(Verdict.NOT_LINEARIZABLE, tuple(run.longest), run.steps)


_Step = tuple[list[tuple[int, Any]], int, Any, int]


class _Search:
    """The calls and returns that are left, in order of time, as a linked list; node 0 is its head and its end.

    An operation that is done is taken out with its return, so that whatever stands before the list's first return may
    go next.
    """

    def __init__(self, history: list[Operation], model: Model[Any], steps_max: int) -> None:
        self._model = model
        self._steps_max = steps_max
        self._history = history
        self._certain = sum(each.outcome is not UNKNOWN for each in history)
        self._seen: set[tuple[int, Any]] = set()
        self.steps = 0
        self.longest: list[Operation] = []
        self._longest_certain = -1
        # A call comes before a return of the same moment: the two operations overlap.
        events = sorted(
            [(each.called, 0, number) for number, each in enumerate(history)]
            + [(each.returned, 1, number) for number, each in enumerate(history) if each.outcome is not UNKNOWN]
        )
        count = len(events) + 1
        self._next = [*range(1, count), 0]
        self._previous = [count - 1, *range(count - 1)]
        self._operation = [-1] * count
        """The operation that a node calls; -1 for a return, and for the end of the list."""
        self._return = [0] * len(history)
        for node, (_, is_return, number) in enumerate(events, 1):
            if is_return:
                self._return[number] = node
            else:
                self._operation[node] = number

    def explain(self, initial: Any) -> Verdict:
        """Depth first from one state, without recursion."""
        done, state, left = 0, initial, self._certain
        candidates = self._candidates(state, None)
        # For each step taken: what to try instead, what was done and what the state was before, which node it took out.
        path: list[_Step] = []
        history, operation, seen = self._history, self._operation, self._seen
        self._note(path, left)
        while left:
            if self.steps > self._steps_max:
                return Verdict.UNDECIDED
            while candidates:
                node, after_state = candidates.pop()
                number = operation[node]
                after = done | 1 << number
                if (after, after_state) not in seen:
                    break
            else:
                if not path:
                    return Verdict.NOT_LINEARIZABLE
                candidates, done, state, node = path.pop()
                left += self._restore(node)
                continue
            seen.add((after, after_state))
            path.append((candidates, done, state, node))
            unnoticed = state if history[number].outcome is UNKNOWN else None
            done, state = after, after_state
            left -= self._take_out(node)
            self._note(path, left)
            candidates = self._candidates(state, unnoticed)
        self.longest = [history[operation[node]] for *_, node in path]
        return Verdict.LINEARIZABLE

    def _candidates(self, state: Any, unnoticed: Any | None) -> list[tuple[int, Any]]:
        """Which calls can go next and the states they leave, the earliest last; a single one where that will do.

        ``unnoticed`` is the state before the unknown operation that came last, if one did.
        """
        step, history, following, operation = self._model.step, self._history, self._next, self._operation
        found: list[tuple[int, Any]] = []
        unknown: set[Hashable] = set()
        node = following[0]
        while (number := operation[node]) >= 0:
            each = history[number]
            self.steps += 1
            after = step(state, each)
            if unnoticed is not None and after is not None and after == step(unnoticed, each):
                pass
            elif each.outcome is UNKNOWN:
                if after is not None and after != state and each.alike not in unknown:
                    unknown.add(each.alike)
                    found.append((node, after))
            elif after is not None:
                if after == state and self._model.tells(each):
                    return [(node, after)]
                found.append((node, after))
            node = following[node]
        found.reverse()
        return found

    def _take_out(self, node: int) -> int:
        """Unlink a call and its return; 1 if it has one."""
        following, previous = self._next, self._previous
        before, behind = previous[node], following[node]
        following[before], previous[behind] = behind, before
        node = self._return[self._operation[node]]
        if not node:
            return 0
        before, behind = previous[node], following[node]
        following[before], previous[behind] = behind, before
        return 1

    def _restore(self, node: int) -> int:
        """Undo the latest :meth:`_take_out`."""
        following, previous = self._next, self._previous
        end = self._return[self._operation[node]]
        if end:
            following[previous[end]] = previous[following[end]] = end
        following[previous[node]] = previous[following[node]] = node
        return 1 if end else 0

    def _note(self, path: list[_Step], left: int) -> None:
        if self._certain - left > self._longest_certain:
            self._longest_certain = self._certain - left
            self.longest = [self._history[self._operation[node]] for *_, node in path]
