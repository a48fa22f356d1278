"""Exactly-once of increments (DESIGN 4.6): each increment counts once, however often it was sent.

For keys that are only ever incremented by one, every answer is the number of increments that took effect up to it. So
no two answers are equal, none exceeds what had been called by then, a client sees its own answers rise, and in the end
the value lies between the answered and the called. And what is counted and was answered to nobody are increments of
unknown outcome, called by then: one that was called later hides none that was applied twice.
"""

from bisect import bisect_right
from dataclasses import dataclass, field
from typing import Any

from shardkv.simulation.checkers.violation import Violation


@dataclass(slots=True)
class _Counter:
    called: int = 0
    certain: int = 0
    """Calls that returned a count."""
    refused: int = 0
    """Calls that certainly did not happen."""
    answers: dict[int, int] = field(default_factory=dict)
    """Each total that was answered, and the last ticket given out by then."""
    seen: dict[int, int] = field(default_factory=dict)
    """Each total that a read showed, likewise when it did first."""
    doubtful: list[int] = field(default_factory=list)
    """The tickets of calls of unknown outcome."""
    highest: int = 0
    floors: dict[int, int] = field(default_factory=dict)
    """Of a call under way: the highest answer when it was made."""


class ExactlyOnce:
    name = "exactly-once"

    def __init__(self) -> None:
        self._counters: dict[Any, _Counter] = {}
        self._tickets = 0

    @property
    def keys(self) -> list[Any]:
        """Every key that anybody has incremented or read."""
        return list(self._counters)

    def called(self, key: Any) -> int:
        """An increment is about to be sent; the ticket to settle it with."""
        counter = self._counters.setdefault(key, _Counter())
        counter.called += 1
        self._tickets += 1
        counter.floors[self._tickets] = counter.highest
        return self._tickets

    def answered(self, key: Any, ticket: int, total: int) -> None:
        """It counted, and this is what it came to."""
        counter = self._counters[key]
        floor = counter.floors.pop(ticket)
        if total in counter.answers:
            raise Violation(self.name, f"{key!r}: two increments were answered {total}")
        if total <= floor:
            raise Violation(self.name, f"{key!r}: answered {total}, called when {floor} had been answered already")
        counter.answers[total] = self._tickets
        counter.certain += 1
        counter.highest = max(counter.highest, total)
        self._bound(key, counter, total)

    def refused(self, key: Any, ticket: int) -> None:
        """It certainly did not happen."""
        counter = self._counters[key]
        counter.floors.pop(ticket)
        counter.refused += 1

    def unknown(self, key: Any, ticket: int) -> None:
        """It may have happened, or may yet."""
        self._counters[key].floors.pop(ticket)
        self._counters[key].doubtful.append(ticket)

    def saw_total(self, key: Any, total: int, floor: int = 0) -> None:
        """A linearizable read; ``floor`` is what :meth:`floor` said before it was called."""
        counter = self._counters.setdefault(key, _Counter())
        if total < floor:
            raise Violation(self.name, f"{key!r}: read {total}, after {floor} had been answered")
        counter.highest = max(counter.highest, total)
        counter.seen.setdefault(total, self._tickets)
        self._bound(key, counter, total)

    def floor(self, key: Any) -> int:
        """What a linearizable read that is called now must not fall short of."""
        counter = self._counters.get(key)
        return max(counter.highest, counter.certain) if counter is not None else 0

    def _bound(self, key: Any, counter: _Counter, total: int) -> None:
        possible = counter.called - counter.refused
        if total > possible:
            raise Violation(self.name, f"{key!r}: {total} counted, {possible} increments can have happened")

    def check(self) -> None:
        for key, counter in self._counters.items():
            if counter.certain != len(counter.answers):
                raise Violation(self.name, f"{key!r}: {counter.certain} answers, {len(counter.answers)} different")
            self._bound(key, counter, counter.highest)
            doubtful = sorted([*counter.doubtful, *counter.floors])
            answers = sorted(counter.answers)
            for total, moment in (*counter.answers.items(), *counter.seen.items()):
                certain, others = bisect_right(answers, total), bisect_right(doubtful, moment)
                if total > certain + others:
                    raise Violation(
                        self.name,
                        f"{key!r}: {total} counted, {certain} of them answered, and {others} more can have happened by "
                        "then",
                    )
