"""Identical state machines (Raft paper, 5.4.3, State Machine Safety): the same index applied gives the same state.

Told of a digest of all that a replica holds of its range, with the index it has applied. Replicas need not stand at the
same index at the same time: whoever gets there later is compared with who was there before.
"""

from shardkv.simulation.checkers.violation import Violation


class IdenticalMachines:
    name = "identical-machines"

    def __init__(self) -> None:
        self._digests: dict[tuple[int, int], tuple[str, str]] = {}

    def saw_state(self, range_id: int, applied_index: int, digest: str, where: str) -> None:
        known, elsewhere = self._digests.setdefault((range_id, applied_index), (digest, where))
        if known != digest:
            raise Violation(
                self.name,
                f"range {range_id} at index {applied_index}: {elsewhere} and {where} hold different states",
            )

    def check(self) -> None:
        """Nothing is left to judge."""
