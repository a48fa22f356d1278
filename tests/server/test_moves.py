"""Nodes that come back at other addresses, all at once."""

from dataclasses import replace

import trio
from trio.testing import MockClock

from shardkv.environment import Stream
from shardkv.simulation.environment import simulated_environment
from shardkv.transport.connection import Connection
from shardkv.transport.handshake import KnownBoots, accept
from shardkv.types import NodeId
from shardkv.wire.frames import FrameDecoder
from tests.server.world import PORT, world


async def test_a_cluster_whose_nodes_have_all_moved_is_found_again_by_join(autojump_clock: MockClock) -> None:
    async with world(3) as cluster, cluster.client() as kv:
        await kv.put(b"kept", b"1")
        for node in cluster.nodes.values():
            await node.kill()
        there = [f"new{name}:{PORT}" for name in cluster.nodes]
        for node, address in zip(cluster.nodes.values(), there):
            others = tuple(each for each in there if each != address)
            node.config = replace(node.config, listen=address, bootstrap=False, join=others)
            await node.start()
        with trio.fail_after(60):
            async with cluster.client() as again:
                found = await again.get(b"kept", timeout=50)
                assert found is not None


async def test_a_copy_that_was_met_by_join_is_held_against_nobody_after_a_restart_of_who_met_it(
    autojump_clock: MockClock,
) -> None:
    """Trap 24: what it said of its earlier starts is noted, too, so that what the group agreed on tells it apart."""
    async with world(3) as cluster, cluster.client("n2", "n3") as kv:
        await cluster.formed(kv)
        n1, n3 = cluster.nodes["n1"], cluster.nodes["n3"]
        mine = n3.inside.listener._identity
        await n1.kill()
        await n3.kill()
        await n3.start()
        await trio.sleep(3)
        earlier = (b"d" * 16, mine.start_token, *mine.earlier_tokens)
        copy = replace(mine, boot=mine.boot + 2, start_token=b"c" * 16, earlier_tokens=earlier)
        twins = simulated_environment("twins", seed=1, network=cluster.network)

        async def greet(stream: Stream) -> None:
            connection = Connection(stream, clock=twins.clock)
            await accept(
                connection,
                FrameDecoder(),
                clock=twins.clock,
                identity=copy,
                known_boots=KnownBoots(),
                timestamp=lambda: 0,
                inflight_max=1,
            )
            await connection.aclose()

        cluster.partition(["n1", "twins"], ["n2", "n3"])
        async with trio.open_nursery() as nursery:
            await nursery.start(twins.network.listen, f"twins:{PORT}", greet)
            before = n1.config
            n1.config = replace(before, bootstrap=False, join=(f"twins:{PORT}",))
            n1.start_soon()
            await trio.sleep(5)
            assert dict(n1.inside.placement._address_book)[NodeId(3)].boot == copy.boot
            nursery.cancel_scope.cancel()
        await n1.kill()
        n1.config = before
        cluster.heal()
        await n1.start()
        await trio.sleep(30)
        await n3.kill()
        await n3.start()
        await trio.sleep(10)
        assert n3.alive
        assert n3.inside.pool.connected(NodeId(1))
