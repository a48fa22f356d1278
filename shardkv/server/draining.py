"""A node's leaderships at a stop: each goes to the follower that is furthest on, before clients are sent there.

Does not live here: what a node with a slow disk does with its leaderships (``disk_health``), which is in no hurry and
may keep them. The rule: a stop waits for this only so long; whoever is left finds a new leader without it.
"""

from collections import Counter
from typing import Final

from shardkv.environment import Clock
from shardkv.multiraft.driver import Driver
from shardkv.types import NodeId, RangeId

HAND_OVER_SECONDS: Final = 5.0
POLL_SECONDS: Final = 0.02


async def hand_over_leaderships(driver: Driver, clock: Clock) -> None:
    """Transfer every leadership that somebody else could have, and wait until they have it, or time is up."""
    asked: dict[RangeId, set[int]] = {}
    given: Counter[NodeId | None] = Counter()
    with clock.deadline(HAND_OVER_SECONDS):
        while _transfer_all(driver, asked, given):
            await clock.sleep(POLL_SECONDS)


def _transfer_all(driver: Driver, asked: dict[RangeId, set[int]], given: Counter[NodeId | None]) -> bool:
    """Begin a transfer of every leadership that somebody else could have; whether any is left.

    Of those who could, each is asked once before any is asked again: one whose disk is slow, or nearly full, declines.
    Of those that are equally far on, it is the node's that was ``given`` the fewest.
    """
    left = False
    now_ns = driver.environment.clock.monotonic_ns()
    for replica in driver.catalog.replicas.values():
        if not replica.leads:
            continue
        followers = [
            (peer.match, -given[replica.node_of(replica_id)], replica_id)
            for replica_id, peer in replica.successors(now_ns)
        ]
        if followers:
            left = True
            if not replica.raft.transferee:
                declined = asked.setdefault(replica.range_id, set())
                willing = [each for each in followers if each[-1] not in declined]
                if not willing:
                    declined.clear()
                target = max(willing or followers)[-1]
                declined.add(target)
                given[replica.node_of(target)] += 1
                replica.raft.transfer_leader(target)
                driver.touch(replica)
    return left
