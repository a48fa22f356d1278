"""Nothing grows without bound: every queue, cache, file and list of tasks stays under a limit that has a name.

The limits are the run's, for they depend on its workload; what is told of a size that has none is a mistake of the
caller, not of the database. The highest of each is kept, for people who set limits.
"""

from collections.abc import Mapping

from shardkv.simulation.checkers.violation import Violation


class NothingGrows:
    name = "nothing-grows"

    def __init__(self, limits: Mapping[str, int]) -> None:
        self._limits = dict(limits)
        self.highest: dict[str, int] = dict.fromkeys(limits, 0)

    def saw_size(self, what: str, size: int, where: str) -> None:
        limit = self._limits.get(what)
        assert limit is not None, f"no limit is named for {what!r}"
        if size > self.highest[what]:
            self.highest[what] = size
        if size > limit:
            raise Violation(self.name, f"{what} on {where}: {size}, and the limit is {limit}")

    def check(self) -> None:
        """Nothing is left to judge."""
