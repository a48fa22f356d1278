"""Nodes that come back at other addresses, all at once."""

from dataclasses import replace

import trio
from trio.testing import MockClock

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
