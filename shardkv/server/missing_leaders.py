"""Ranges that nobody leads: said once when they have had no leader for a while, and once when all have one again.

Does not live here: why there is none, which elections (``raft``) and connections (``transport``) tell. The rule: what
this node's own replicas know counts, and however many ranges it are, it is one line. They are looked at with each
heartbeat, which looks at every replica anyway (``reporting``).
"""

from collections.abc import Iterable
from typing import Any, Final

from shardkv.multiraft.replica import Replica
from shardkv.outage import Outage
from shardkv.raft.messages import NONE
from shardkv.types import RangeId

LEADERLESS_SECONDS: Final = 10.0
"""Elections are over long before."""
NAMED_MAX: Final = 10
"""Ranges in one line of the log."""


class MissingLeaders:
    """A node's."""

    def __init__(self, log: Any) -> None:
        self._log = log
        self._since: dict[RangeId, float] = {}
        """From when on each range that has no leader has had none."""
        self._outage = Outage(0.0)

    def look(self, replicas: Iterable[Replica], now: float) -> None:
        leaderless = [replica.range_id for replica in replicas if replica.raft.leader == NONE]
        self._since = {range_id: self._since.get(range_id, now) for range_id in leaderless}
        lasting = [range_id for range_id, since in self._since.items() if now - since >= LEADERLESS_SECONDS]
        if not lasting:
            if self._outage.end():
                self._log.info("every range of this node has a leader again")
        elif self._outage.lasts(now):
            self._log.warning(
                f"ranges have had no leader for {LEADERLESS_SECONDS:g} s, and their keys cannot be used: a majority of "
                "the nodes that have replicas of them must run and reach each other",
                ranges=lasting[:NAMED_MAX],
                count=len(lasting),
            )
