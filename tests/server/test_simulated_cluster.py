"""Whole clusters in virtual time: that they form, serve, and lose nothing when nodes die."""

from trio.testing import MockClock

from shardkv.errors import ShardKVError
from tests.server.world import world


async def test_three_nodes_form_a_cluster_and_serve_reads_and_writes(autojump_clock: MockClock) -> None:
    async with world(3) as cluster, cluster.client() as kv:
        version = await kv.put(b"k", b"v")
        entry = await kv.get(b"k")
        assert entry is not None
        assert (entry.key, entry.value, entry.version) == (b"k", b"v", version)
        assert await kv.increment(b"n", 5) == 5
        assert await kv.delete(b"k") is True
        assert await kv.get(b"k") is None


async def test_acknowledged_writes_survive_the_leader_being_killed(autojump_clock: MockClock) -> None:
    async with world(3) as cluster, cluster.client() as kv:
        for number in range(20):
            await kv.put(b"key%d" % number, b"value")
        leader = await cluster.leader_of(kv, b"key0")
        await leader.kill()
        for number in range(20):
            assert await kv.get(b"key%d" % number) is not None, number
        await kv.put(b"after", b"v")
        await leader.start()
        assert await kv.get(b"after") is not None


async def test_acknowledged_writes_survive_all_nodes_losing_power_at_once(autojump_clock: MockClock) -> None:
    """What was not synced is gone from every disk and nothing was flushed to any engine (trap 20)."""
    async with world(3) as cluster, cluster.client() as kv:
        acknowledged = []
        for number in range(50):
            try:
                await kv.put(b"key%d" % number, b"value%d" % number)
                acknowledged.append(number)
            except ShardKVError:
                break
        for node in cluster.nodes.values():
            await node.power_off()
        for node in cluster.nodes.values():
            await node.start()
        for number in acknowledged:
            entry = await kv.get(b"key%d" % number)
            assert entry is not None, number
            assert entry.value == b"value%d" % number


async def test_a_client_of_the_first_node_goes_on_without_it_once_the_cluster_has_grown(
    autojump_clock: MockClock,
) -> None:
    """It was told of one node when it began, and nothing that it did since showed it the others."""
    async with world(1) as cluster, cluster.client("n1") as kv:
        await kv.put(b"k", b"v")
        for name in ("n2", "n3"):
            await cluster.add(name).start()
        await cluster.grown()
        await cluster.sleep(60)
        await kv.put(b"k", b"w")
        await cluster.nodes["n1"].power_off()
        version = await kv.put(b"k", b"x", timeout=5)
        entry = await kv.get(b"k", timeout=5)
        assert entry is not None
        assert (entry.value, entry.version) == (b"x", version)
