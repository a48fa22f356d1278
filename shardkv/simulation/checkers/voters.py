"""Voters have data (Raft thesis, 4.2.1): a replica that joins a range gets its vote once it has the range's state.

Told of every learner, and of every replica that is seen to have become a voter. Two new voters without data outweigh
the one that has it: until they have it the range commits nothing.
"""

from shardkv.simulation.checkers.violation import Violation


class VotersHaveData:
    name = "voters-have-data"

    def __init__(self) -> None:
        self._learners: set[tuple[int, int]] = set()

    def saw_learner(self, range_id: int, replica_id: int) -> None:
        self._learners.add((range_id, replica_id))

    def waits(self, range_id: int, replica_id: int) -> bool:
        """Whether it was a learner when it was last heard of."""
        return (range_id, replica_id) in self._learners

    def saw_vote(self, range_id: int, replica_id: int, *, has_data: bool) -> None:
        """What was a learner is a voter now."""
        self._learners.discard((range_id, replica_id))
        if not has_data:
            raise Violation(self.name, f"replica {replica_id} of range {range_id} has a vote, and nothing of the range")

    def check(self) -> None:
        """Nothing is left to judge."""
