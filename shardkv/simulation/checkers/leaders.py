"""One leader per term (Raft paper, 5.2, Election Safety): in each range, no term has two leaders.

Told of every replica that leads, when it begins to and whenever somebody looks. A replica that led, crashed and leads
the same term again is a second leader: it may have forgotten what it did as the first.
"""

from typing import NamedTuple

from shardkv.simulation.checkers.violation import Violation


class Leader(NamedTuple):
    """A replica, how often its node had been started when it led, and the index at which its term begins."""

    replica_id: int
    start: int
    first_index: int


class OneLeaderPerTerm:
    name = "one-leader-per-term"

    def __init__(self) -> None:
        self._leaders: dict[int, dict[int, Leader]] = {}

    def saw_leader(self, range_id: int, term: int, leader: Leader) -> None:
        known = self._leaders.setdefault(range_id, {}).setdefault(term, leader)
        if known != leader:
            raise Violation(self.name, f"range {range_id}, term {term}: {known} and {leader} both lead")

    def check(self) -> None:
        """Nothing is left to judge."""
