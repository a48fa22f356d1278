"""A voter that has never heard of the range that it votes in."""

import trio

from shardkv.simulation import run_deterministically, simulated_cluster
from shardkv.simulation.cluster import Cluster
from shardkv.simulation.node import SimulatedNode
from shardkv.types import RangeId
from shardkv.wire.requests import Method
from shardkv_client import Client

SECONDS_MAX = 10.0
"""Of virtual time, for the two that are left to elect a leader and to serve: several election timeouts."""


async def until_leads(cluster: Cluster, kv: Client, key: bytes, node: SimulatedNode) -> None:
    """Have ``node`` lead the key's range."""
    while (leader := await cluster.leader_of(kv, key)) is not node:
        replica = leader.inside.catalog.replica_for_key(key)
        if replica is not None and replica.leads:
            target = node.inside.catalog.replicas[replica.range_id].replica_id
            replica.raft.transfer_leader(target)
            leader.inside.driver.touch(replica)
        await cluster.sleep(0.5)


def range_of(node: SimulatedNode, key: bytes) -> RangeId:
    replica = node.inside.catalog.replica_for_key(key)
    assert replica is not None
    return replica.range_id


def has_span_to(node: SimulatedNode, range_id: RangeId, end: bytes) -> bool:
    replica = node.inside.catalog.replicas[range_id]
    return replica.machine is not None and not replica.installing and replica.machine.descriptor.span.end == end


def test_trap_02_a_node_that_got_the_left_half_by_a_snapshot_votes_for_the_right_halfs_next_leader() -> None:
    """It was down over the split and never applies it, so nothing but a message tells it of the right half.

    The right half's leader cannot reach it, and dies. Without its vote the right half would stay
    without a leader for as long as that node is away, though two of three live.
    """

    async def main() -> None:
        async with simulated_cluster(3, seed=1) as cluster, cluster.client("n1", "n2") as kv:
            right_leader, left_leader, late = cluster.nodes.values()
            await kv.put(b"a", b"1")
            await kv.put(b"z", b"1")
            await until_leads(cluster, kv, b"a", right_leader)
            await late.kill()
            await cluster.ask(kv, Method.SPLIT, b"m", key=b"m")
            await until_leads(cluster, kv, b"z", right_leader)
            await until_leads(cluster, kv, b"a", left_leader)
            left, right = range_of(left_leader, b"a"), range_of(right_leader, b"z")
            # The log lets go of the split, so only a snapshot brings the late one past it.
            for number in range(20):
                await kv.put(b"a", b"%d" % number)
            for node in (left_leader, right_leader):
                node.inside.maintenance.kept = (0, 0)
                await node.inside.maintenance.flush_and_compact()
            cluster.partition(["n1"], ["n3"])
            await late.start()
            with trio.fail_after(SECONDS_MAX):
                while not has_span_to(late, left, b"m"):
                    await cluster.sleep(0.1)
            assert right not in late.inside.catalog.replicas, "it has heard nothing of the right half"
            assert right not in late.inside.wal.tombstones
            leader = right_leader.inside.catalog.replicas[right]
            assert leader.leads, "the right half is led by the one that is about to die"

            await right_leader.power_off()
            await kv.put(b"z", b"2", timeout=SECONDS_MAX)
            entry = await kv.get(b"z", timeout=SECONDS_MAX)
            assert entry is not None
            assert entry.value == b"2"
            assert late.inside.catalog.replicas[right].replica_id != leader.replica_id
            for node in (left_leader, late):
                node.check()

    run_deterministically(main, seed=1)
