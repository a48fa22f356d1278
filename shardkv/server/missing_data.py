"""Ranges whose data this node has lost, and which no other node brings back: said again and again, for only a person
can help.

Does not live here: how data are asked for and brought (``multiraft``), nor what a start makes of a data directory that
is not whole (``node``). The rule: a range of which a leader is heard is no matter for a person, for its data come.
"""

from typing import Any, Final

from shardkv.environment import Clock
from shardkv.multiraft.catalog import Catalog
from shardkv.raft.messages import NONE

LOOK_SECONDS: Final = 60.0
"""Time enough for the others to be started, too, and to elect leaders."""
NAMED_MAX: Final = 100
"""Ranges in one line of the log."""


async def tell_of_missing_data(catalog: Catalog, clock: Clock, log: Any) -> None:
    """Service. Returns once every range of this node has its data."""
    while any(replica.needs_snapshot for replica in catalog.replicas.values()):
        await clock.sleep(LOOK_SECONDS)
        waiting = [replica for replica in catalog.replicas.values() if replica.needs_snapshot]
        lost = [replica.range_id for replica in waiting if replica.raft.leader == NONE]
        if lost:
            log.error(
                "the data of some ranges are gone from this node, and no other node brings them: start those that have "
                "replicas of them; where there are none, restore this node's directory from a backup",
                ranges=lost[:NAMED_MAX],
                count=len(lost),
            )
