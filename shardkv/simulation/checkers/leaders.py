"""One leader per term (Raft paper, 5.2, Election Safety): in each range, no term has two leaders.

Told of every replica that leads, when it begins to and whenever somebody looks. A replica that led, crashed and leads
again is a second leader only in the same term.
"""

from shardkv.simulation.checkers.violation import Violation


class OneLeaderPerTerm:
    name = "one-leader-per-term"

    def __init__(self) -> None:
        self._leaders: dict[int, dict[int, int]] = {}

    def saw_leader(self, range_id: int, term: int, replica_id: int) -> None:
        known = self._leaders.setdefault(range_id, {}).setdefault(term, replica_id)
        if known != replica_id:
            raise Violation(self.name, f"range {range_id}, term {term}: replicas {known} and {replica_id} both lead")

    def check(self) -> None:
        """Nothing is left to judge."""
