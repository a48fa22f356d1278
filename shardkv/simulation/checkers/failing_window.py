"""The smallest part of a history that cannot have happened, and a picture of it that a person can read.

Lives here: shrinking and rendering. Does not live here: judging (``linearizability``). The rule: a window never claims
more than the history does. What is left out of it is not forgotten: a write that is left out may still have happened at
any time after its call, or never, and one that ended before the window begins counts by the states that it may have
left. So whatever the operations that are not shown did, those that are shown contradict each other.

Three steps, each of which keeps the contradiction. The end: the earliest moment at which the history up to there has
no explanation. The beginning: the latest moment from which on there is none, whatever stood there before. Then
operations one by one, in chunks that get smaller.
"""

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from math import inf
from typing import Any, Final

from shardkv.simulation.checkers.linearizability import (
    UNKNOWN,
    Finding,
    Model,
    Operation,
    Result,
    Verdict,
    search,
)

ATTEMPT_STEPS_MAX: Final = 100_000
"""Steps of the model for one try; one that is not decided by then is taken for a window too small."""
SHRINK_STEPS_MAX: Final = 4_000_000
"""For all tries together; then the window stays as it is: sound, but not the smallest."""
TIMELINE_COLUMNS: Final = 40
STATES_SHOWN_MAX: Final = 6


@dataclass(frozen=True, slots=True)
class Window:
    """Operations of one key that contradict each other.

    ``operations`` are in order of their calls. ``before`` are the states in which the window may begin, and
    ``left_out`` counts the key's operations that are not shown. ``longest`` is an order that explains as many of
    ``operations`` as any that was tried, with the help of those left out where it needs it.
    """

    key: Hashable
    operations: tuple[Operation, ...]
    before: tuple[Any, ...]
    left_out: int
    longest: tuple[Operation, ...]


class _Shrinking:
    """The operations that still count in full, and those that only may have happened."""

    def __init__(self, finding: Finding, model: Model[Any]) -> None:
        self.model = model
        self.kept = list(finding.history)
        self.optional: list[Operation] = []
        self.initials: tuple[Any, ...] = (model.initial,)
        self._steps_left = SHRINK_STEPS_MAX

    def fails(self, kept: Iterable[Operation], optional: Iterable[Operation], initials: Iterable[Any]) -> bool:
        if self._steps_left <= 0:
            return False
        found = search([*kept, *optional], self.model, initials, min(ATTEMPT_STEPS_MAX, self._steps_left))
        self._steps_left -= found.steps
        return found.verdict is Verdict.NOT_LINEARIZABLE

    def weakened(self, operations: Iterable[Operation]) -> list[Operation]:
        """What is left of operations that count no more: writes that may have happened."""
        return [replace(each, outcome=UNKNOWN, returned=inf) for each in operations if self.model.changes(each)]

    def cut_end(self) -> None:
        """Forget what was called after the earliest return at which it fails, and what had not returned by then."""
        moments = sorted({each.returned for each in self.kept if each.outcome is not UNKNOWN})
        low, high = 0, len(moments) - 1
        while low < high:
            middle = (low + high) // 2
            if self.fails(*self._until(moments[middle]), self.initials):
                high = middle
            else:
                low = middle + 1
        kept, optional = self._until(moments[high])
        if self.fails(kept, optional, self.initials):
            self.kept, self.optional = kept, optional

    def _until(self, moment: float) -> tuple[list[Operation], list[Operation]]:
        called = [each for each in self.kept if each.called <= moment]
        kept = [each for each in called if each.returned <= moment]
        return kept, self.weakened(each for each in called if each.returned > moment)

    def cut_beginning(self) -> None:
        """Let what ended before the latest call that still fails count by the states that it may have left."""
        moments = sorted({each.called for each in self.kept})
        low, high = 0, len(moments) - 1
        while low < high:
            middle = (low + high + 1) // 2
            if self._fails_from(moments[middle]):
                low = middle
            else:
                high = middle - 1
        if low > 0 and self._fails_from(moments[low]):
            self.kept, self.optional, self.initials = self._from(moments[low])

    def _fails_from(self, moment: float) -> bool:
        kept, optional, initials = self._from(moment)
        return bool(initials) and self.fails(kept, optional, initials)

    def _from(self, moment: float) -> tuple[list[Operation], list[Operation], tuple[Any, ...]]:
        kept = [each for each in self.kept if each.called >= moment]
        across = [each for each in self.kept if each.called < moment <= each.returned]
        optional = self.optional + self.weakened(across)
        before = [each for each in (*self.kept, *self.optional) if each.called < moment]
        states = self.model.states_after(before)
        initials = () if states is None else tuple(sorted(states, key=repr))
        return kept, optional, initials

    def remove(self) -> None:
        """Weaken operations as long as what is left still fails, many at once at first."""
        self.optional += [each for each in self.kept if each.outcome is UNKNOWN]
        self.kept = [each for each in self.kept if each.outcome is not UNKNOWN]
        size = max(1, len(self.kept) // 2)
        while True:
            start = 0
            while start < len(self.kept):
                chunk = self.kept[start : start + size]
                kept = self.kept[:start] + self.kept[start + size :]
                optional = self.optional + self.weakened(chunk)
                if kept and self.fails(kept, optional, self.initials):
                    self.kept, self.optional = kept, optional
                else:
                    start += size
            if size == 1:
                return
            size //= 2


def smallest_window(finding: Finding, model: Model[Any]) -> Window:
    """Shrink a finding that is not linearizable. Bounded by SHRINK_STEPS_MAX; what is left is a contradiction."""
    assert finding.verdict is Verdict.NOT_LINEARIZABLE, f"a window of a history that is {finding.verdict.value}"
    shrinking = _Shrinking(finding, model)
    shrinking.cut_end()
    shrinking.cut_beginning()
    shrinking.remove()
    originals = {(each.called, each.client, each.alike): each for each in finding.history}

    def original(operation: Operation) -> Operation:
        return originals[operation.called, operation.client, operation.alike]

    found = search([*shrinking.kept, *shrinking.optional], model, shrinking.initials, ATTEMPT_STEPS_MAX)
    # An unknown write is worth showing where an explanation makes use of it.
    used = [original(each) for each in found.longest if original(each).outcome is UNKNOWN]
    shown = sorted([*shrinking.kept, *used], key=lambda each: each.called)
    shown_ids = {id(each) for each in shown}
    longest = tuple(original(each) for each in found.longest if id(original(each)) in shown_ids)
    return Window(finding.key, tuple(shown), shrinking.initials, len(finding.history) - len(shown), longest)


def explain(finding: Finding, model: Model[Any]) -> str:
    """The smallest failing window of a finding as text."""
    return render(smallest_window(finding, model), model)


def explain_result(result: Result, model: Model[Any]) -> str:
    """What is wrong with a whole history: a window for each key that fails, a line for each that is undecided."""
    undecided = [
        f"key {each.key!r}: undecided after {each.steps} steps; {len(each.longest)} of {len(each.history)} operations "
        "are explained"
        for each in result.findings
        if each.verdict is Verdict.UNDECIDED
    ]
    return "\n\n".join([*(explain(each, model) for each in result.failing), *undecided])


def render(window: Window, model: Model[Any]) -> str:
    """A window as text: who called what when, what came back, and which operations overlapped."""
    count, total = len(window.operations), len(window.operations) + window.left_out
    verb = "cannot have happened" if count == 1 else "cannot have happened one after the other"
    others = f", whatever the other {window.left_out} did" if window.left_out else ""
    lines = [f"key {window.key!r}: {count} of {total} operations {verb}{others}"]
    states = [model.describe_state(state) for state in window.before]
    more = f"; or one of {len(states) - STATES_SHOWN_MAX} more" if len(states) > STATES_SHOWN_MAX else ""
    lines.append(f"  before them: {'; or '.join(states[:STATES_SHOWN_MAX])}{more}")
    lines += _table(window.operations, model)
    lines.append(
        "  the longest order that explains its answers: "
        + ("; then ".join(map(model.describe, window.longest)) or "none")
    )
    done = {id(each) for each in window.longest}
    left = [each for each in window.operations if id(each) not in done and each.outcome is not UNKNOWN]
    lines.append("  which leaves unexplained: " + "; ".join(map(model.describe, left)))
    return "\n".join(lines)


def _table(operations: Sequence[Operation], model: Model[Any]) -> list[str]:
    moments = sorted({each.called for each in operations} | {each.returned for each in operations} - {inf})
    step = max(1, TIMELINE_COLUMNS // max(1, len(moments) - 1))
    column = {moment: place * step for place, moment in enumerate(moments)}
    width = (len(moments) - 1) * step + 1
    rows = []
    for each in operations:
        start = column[each.called]
        if each.returned == inf:
            bar = " " * start + "|" + "=" * (width - start) + "..."
        else:
            end = column[each.returned]
            bar = " " * start + "|" + "=" * max(0, end - start - 1) + "|" * (end > start)
        returned = "never" if each.returned == inf else f"{each.returned:g}"
        rows.append((f"client {each.client}", f"{each.called:g}", returned, bar, model.describe(each)))
    widths = [max(len(row[place]) for row in rows) for place in range(4)]
    return [
        f"  {who:<{widths[0]}}  {called:>{widths[1]}} to {returned:>{widths[2]}}  {bar:<{widths[3]}}  {text}"
        for who, called, returned, bar, text in rows
    ]
