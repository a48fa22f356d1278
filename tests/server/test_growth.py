"""Growing while nodes die, in virtual time: replicas that were begun must not keep a range from having enough."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import structlog
import trio
from structlog.testing import capture_logs
from trio.testing import MockClock

from shardkv.config import SnapshotsConfig
from shardkv.simulation.cluster import Cluster
from shardkv.simulation.network import SimulatedNetwork
from shardkv.simulation.node import SimulatedNode
from shardkv.types import FIRST_RANGE, PLACEMENT_RANGE, RangeId, ReplicaRole
from shardkv.wire.requests import Method
from shardkv_client import Client
from tests.server.world import MIB, STORAGE, leave, world

SLOW_SNAPSHOTS = SnapshotsConfig(snapshot_send_bytes_per_second=MIB, snapshot_receive_bytes_per_second=MIB)
GROWING_SECONDS = 120.0
"""An operator that failed is made up for after half a minute."""


@asynccontextmanager
async def one_node(level: int = 50) -> AsyncIterator[Cluster]:
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(level))
    try:
        async with trio.open_nursery() as nursery:
            cluster = Cluster(nursery, SimulatedNetwork(1), 1)
            await cluster.add("n1").start()
            yield cluster
            nursery.cancel_scope.cancel()
    finally:
        structlog.reset_defaults()


def members(node: SimulatedNode, role: ReplicaRole, range_id: RangeId = FIRST_RANGE) -> list[int]:
    """The nodes that hold a voter, or a learner, of a range, as its leader has it."""
    machine = node.inside.catalog.replicas[range_id].machine
    assert machine is not None
    return [int(replica.node_id) for replica in machine.descriptor.replicas if replica.role is role]


async def dead_learner(cluster: Cluster) -> None:
    """Nodes 2 and 3 join, and node 3 dies as soon as the first range has a learner there, which has nothing yet."""
    await cluster.add("n2").start()
    dying = cluster.add("n3")
    dying.start_soon()
    while 3 not in members(cluster.nodes["n1"], ReplicaRole.LEARNER):
        await cluster.sleep(0.001)
    await dying.kill()


async def test_a_replica_that_has_nothing_of_its_range_yet_gets_no_vote(autojump_clock: MockClock) -> None:
    """A young log is short, so whoever has none of it lags by few entries. With its vote and the other new one's the
    range would commit nothing until a snapshot has come through."""
    async with one_node() as cluster:
        await dead_learner(cluster)
        await cluster.sleep(5.0)
        assert members(cluster.nodes["n1"], ReplicaRole.VOTER) == [1]
        assert members(cluster.nodes["n1"], ReplicaRole.LEARNER) == [2, 3]


async def test_a_node_that_dies_while_a_range_grows_to_it_is_made_up_for_by_another(autojump_clock: MockClock) -> None:
    """It leaves a learner that never follows. The growth must not wait for that one's removal, which no node can carry
    out yet: a learner has no vote."""
    async with one_node() as cluster:
        await dead_learner(cluster)
        await cluster.add("n4").start()
        with trio.move_on_after(GROWING_SECONDS):
            while len(members(cluster.nodes["n1"], ReplicaRole.VOTER)) < 3:
                await cluster.sleep(1.0)
        assert members(cluster.nodes["n1"], ReplicaRole.VOTER) == [1, 2, 4]


async def test_a_node_that_nobody_can_reach_is_made_up_for_by_another(autojump_clock: MockClock) -> None:
    """It said a wrong address, and counts as live, for its own heartbeats arrive. Its learner was waited for, for ever,
    while enough other nodes had nothing to do."""
    async with one_node() as cluster:
        await cluster.add("n2").start()
        cluster.add("n3", advertise="nowhere:7000").start_soon()
        await cluster.sleep(5.0)
        first = cluster.nodes["n1"]
        assert members(first, ReplicaRole.LEARNER) == [2, 3]
        await cluster.add("n4").start()
        await cluster.sleep(GROWING_SECONDS)
        for range_id in (FIRST_RANGE, PLACEMENT_RANGE):
            assert members(first, ReplicaRole.VOTER, range_id) == [1, 2, 4]


async def test_a_cluster_whose_ranges_cannot_grow_says_so(autojump_clock: MockClock) -> None:
    """Each range has one voter, and the loss of node 1 all data: it must not look replicated and settled."""
    with capture_logs() as lines:
        async with one_node(level=30) as cluster, cluster.client("n1") as kv:
            await cluster.add("n2").start()
            cluster.add("n3", advertise="nowhere:7000").start_soon()
            await cluster.sleep(GROWING_SECONDS)
            for _ in range(60):
                status, (row,) = await kv.status(), await kv.call(Method.RANGES)
                assert not status["settled"]
                assert "1 of 3 voters" in status["unsettled"]
                assert (row["replicas"], row["learners"]) == ([1, 2, 3], [2, 3])
                await cluster.sleep(1.0)
    failed = [line for line in lines if line["event"] == "what was to be done about a range has failed"]
    assert all(line["log_level"] == "warning" and line["node"] == "n1" for line in failed)
    assert sorted(line["range"] for line in failed) == [0, 1], "once each, although it is tried again"
    assert all("node 3 acknowledges nothing" in line["reason"] for line in failed)


async def test_a_node_whose_disk_fills_up_while_a_range_grows_to_it_is_made_up_for_by_another(
    autojump_clock: MockClock,
) -> None:
    """It refuses the range's snapshot, for as long as it has no room."""
    async with world(1, seed=1, storage=STORAGE, snapshots=SLOW_SNAPSHOTS) as cluster, cluster.client("n1") as kv:
        for number in range(8):
            await kv.put(b"%d" % number, bytes(MIB // 2))
        first = cluster.nodes["n1"]
        await first.inside.maintenance.flush_and_compact()
        await cluster.add("n2", storage=STORAGE, snapshots=SLOW_SNAPSHOTS).start()
        filling = cluster.add("n3", storage=STORAGE, snapshots=SLOW_SNAPSHOTS)
        filling.start_soon()
        while 3 not in members(first, ReplicaRole.LEARNER):
            await cluster.sleep(0.01)
        leave(filling, MIB // 2)
        await cluster.add("n4", storage=STORAGE, snapshots=SLOW_SNAPSHOTS).start()
        await cluster.sleep(GROWING_SECONDS / 2)
        assert members(first, ReplicaRole.VOTER) == [1, 2, 4]


async def test_a_node_that_is_being_sent_a_large_range_is_waited_for(autojump_clock: MockClock) -> None:
    """Until it has all, the leader knows no more of it than of one that nobody can reach."""
    async with world(1, seed=1, snapshots=SLOW_SNAPSHOTS) as cluster, cluster.client("n1") as kv:
        await loaded(cluster, kv, 10)
        await cluster.add("n4", snapshots=SLOW_SNAPSHOTS).start()
        first = cluster.nodes["n1"]
        await cluster.sleep(20)
        assert members(first, ReplicaRole.LEARNER) == [2, 3]
        status = await kv.status()
        assert status["unsettled"].endswith("; nodes 2 and 3 receive the range's data"), status["unsettled"]
        await cluster.sleep(GROWING_SECONDS / 2)
        assert members(first, ReplicaRole.VOTER) == [1, 2, 3]
        assert members(first, ReplicaRole.LEARNER) == []


async def test_what_no_node_can_carry_out_is_not_begun(autojump_clock: MockClock) -> None:
    """With two nodes left its learners are to go; no node can do that yet, and their range is free for what can be
    done as soon as the third is back."""
    async with one_node() as cluster:
        await dead_learner(cluster)
        first, _, dead = cluster.nodes.values()
        await cluster.sleep(GROWING_SECONDS / 2)  # the growth fails, for a node is gone
        async with cluster.client("n1") as kv:
            for _ in range(400):
                assert not (await kv.status())["operators"]
                await cluster.sleep(0.1)
        await dead.start()
        await cluster.sleep(5.0)
        assert members(first, ReplicaRole.VOTER) == [1, 2, 3]


def without_data(cluster: Cluster) -> list[tuple[int, int]]:
    """The ranges, and their voters, of which their leader knows that they have nothing of it."""
    return [
        (int(replica.range_id), replica_id)
        for node in cluster.nodes.values()
        for replica in (node.inside.catalog.replicas.values() if node.alive else ())
        if replica.leads
        for replica_id, peer in replica.raft.status().progress.items()
        if not peer.is_learner and peer.match == 0
    ]


async def write_for(cluster: Cluster, kv: Client, keys: Sequence[bytes], seconds: float) -> None:
    """Each put must be answered in the time of a few elections, and no voter be without data, all along."""
    end = cluster.now + seconds
    while cluster.now < end:
        for key in keys:
            await kv.put(key, b"meanwhile", timeout=3)
        assert not without_data(cluster)
        await cluster.sleep(0.2)


async def loaded(cluster: Cluster, kv: Client, seconds: int) -> None:
    """Two nodes join, and the range's snapshots are under way; each half would take ``seconds`` alone."""
    for half in (b"a", b"z"):
        for number in range(2 * seconds):
            await kv.put(half + b"%d" % number, bytes(MIB // 2))
    first = cluster.nodes["n1"]
    await first.inside.maintenance.flush_and_compact()
    for name in ("n2", "n3"):
        cluster.add(name, snapshots=SLOW_SNAPSHOTS)
        await cluster.nodes[name].start()
    while members(first, ReplicaRole.LEARNER) != [2, 3]:
        await cluster.sleep(0.05)
    await cluster.sleep(1)


async def voters(kv: Client) -> list[int]:
    return sorted(len(row["replicas"]) for row in await kv.call(Method.RANGES))


async def test_the_halves_of_a_range_that_is_just_growing_take_writes_all_along(autojump_clock: MockClock) -> None:
    """The right half has the left's learners, under new ids and without its data, and no operator of its own."""
    async with world(1, seed=1, snapshots=SLOW_SNAPSHOTS) as cluster, cluster.client("n1") as kv:
        await loaded(cluster, kv, 4)
        await cluster.ask(kv, Method.SPLIT, b"m", key=b"m")
        await write_for(cluster, kv, [b"a", b"z"], 30)
        assert await voters(kv) == [3, 3]


async def test_a_range_takes_writes_while_growth_that_failed_half_way_is_taken_up_again(
    autojump_clock: MockClock,
) -> None:
    """The learners are there, and one of them has been restarted without anything of the range."""
    async with world(1, seed=2, snapshots=SLOW_SNAPSHOTS) as cluster, cluster.client("n1") as kv:
        await loaded(cluster, kv, 30)
        await cluster.nodes["n3"].kill()
        await write_for(cluster, kv, [b"a"], 15)
        await cluster.nodes["n3"].start()
        await write_for(cluster, kv, [b"a"], 60)
