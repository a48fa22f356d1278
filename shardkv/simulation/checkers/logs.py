"""Log matching (Raft paper, 5.3) and leader completeness (5.4.3), as far as logs on nodes show them.

Two logs that have an entry of the same index and term are the same up to it. By induction that holds everywhere if
each (index, term) has one content and one predecessor wherever it is seen. And an index that is committed has one
entry for ever, whoever says so, whenever.
"""

from typing import NamedTuple

from shardkv.simulation.checkers.violation import Violation


class Seen(NamedTuple):
    """What is compared of an entry: all but where it lies."""

    size: int
    checksum: int
    previous_term: int | None
    """None where the log begins with this entry, and its predecessor's term is known only by hearsay."""


class LogMatching:
    name = "log-matching"

    def __init__(self) -> None:
        self._entries: dict[int, dict[tuple[int, int], Seen]] = {}
        self._committed: dict[int, dict[int, int]] = {}

    def saw_entry(self, range_id: int, index: int, term: int, seen: Seen, where: str) -> None:
        """An entry in the log of a replica."""
        entries = self._entries.setdefault(range_id, {})
        known = entries.get((index, term))
        if known is None or (known.previous_term is None and seen[:2] == known[:2]):
            entries[index, term] = seen
        elif known[:2] != seen[:2] or seen.previous_term not in (None, known.previous_term):
            raise Violation(
                self.name, f"range {range_id}, entry {index} of term {term}: {known} elsewhere, {seen} on {where}"
            )

    def saw_committed(self, range_id: int, index: int, term: int, where: str) -> None:
        """An index that a replica holds for committed, and the term of its entry."""
        known = self._committed.setdefault(range_id, {}).setdefault(index, term)
        if known != term:
            raise Violation(
                self.name, f"range {range_id}: entry {index} was committed in term {known}, on {where} in term {term}"
            )

    def check(self) -> None:
        """Terms never fall along the committed log."""
        for range_id, terms in self._committed.items():
            last = 0
            for index in sorted(terms):
                if terms[index] < last:
                    raise Violation(self.name, f"range {range_id}: entry {index} of term {terms[index]} after {last}")
                last = terms[index]
