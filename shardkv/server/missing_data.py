"""Ranges whose data this node has lost: other nodes may have them, and where none does, only a person can help.

Lives here: refusing a start after which nobody could bring them, and saying, again and again, which ranges nobody
brings. Does not live here: how data are asked for and brought (``multiraft``). The rule: a range of which a leader is
heard is no matter for a person, for its data come.
"""

from typing import Any, Final

from shardkv.environment import Clock
from shardkv.errors import Corruption
from shardkv.multiraft.catalog import Catalog
from shardkv.raft.messages import NONE
from shardkv.storage.directory import DataDirectory

LOOK_SECONDS: Final = 60.0
"""Time enough for the others to be started, too, and to elect leaders."""
NAMED_MAX: Final = 100
"""Ranges in one line of the log."""


def require_other_copies(
    catalog: Catalog, directory: DataDirectory, *, engine: str, others_known: bool, log: Any
) -> None:
    """Where the engine is gone and the log is not, other replicas bring the data back, if there may be any.

    Raises Corruption if there are none: the node would wait for them for ever.
    """
    if not catalog.engine_is_gone():
        return
    why = f"{directory.engine_path} holds nothing of them"
    remedy = f"restore all of {directory.path} from a backup"
    if engine == "memory":
        why, remedy = "an engine in memory ends with its process", "start anew with an empty data directory"
    if not others_known:
        raise Corruption(
            f"the data of this node's ranges are gone: {why}. No other node is known that could have them: {remedy}. "
            "Only if other nodes do have replicas of these ranges, give --join HOST:PORT of one of them, and they are "
            "copied from there"
        )
    log.error(
        "the data of this node's ranges are gone and are copied from other nodes; a range that has no replica there is "
        "lost unless this node's directory is restored from a backup",
        reason=why,
    )


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
