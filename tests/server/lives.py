"""The life of one node with its disk: a first start, a run with rotations and collections, a stop, a second start."""

from collections import defaultdict
from typing import Any

import trio

from shardkv.config import StorageConfig
from shardkv.errors import ShardKVError
from shardkv.simulation import run_deterministically
from shardkv.simulation.cluster import Cluster
from shardkv.simulation.network import SimulatedNetwork
from shardkv.simulation.node import SimulatedNode

STORAGE = StorageConfig(engine="memory", segment_bytes=64 * 1024)
PUTS = 340
"""Enough for segments to be freed: the last 256 entries are always kept, and more than six segments are a flush."""
VALUE_BYTES = 2_000


class Life:
    """What a node was told to keep, and what it did not say."""

    def __init__(self) -> None:
        self.acknowledged: dict[bytes, bytes] = {}
        self.doubtful: dict[bytes, set[bytes]] = defaultdict(set)

    async def write(self, cluster: Cluster, node: SimulatedNode, puts: int) -> None:
        """Ends early when the node does."""
        async with cluster.client() as kv:
            for number in range(puts):
                key, value = b"k%02d" % (number % 40), b"%010d" % number * (VALUE_BYTES // 10)
                try:
                    await kv.put(key, value, timeout=1)
                except ShardKVError:
                    self.doubtful[key].add(value)
                else:
                    self.acknowledged[key] = value
                if not node.alive:
                    return

    async def check_all_there(self, cluster: Cluster) -> None:
        async with cluster.client() as kv:
            for key, value in self.acknowledged.items():
                entry = await kv.get(key, timeout=10)
                assert entry is not None, f"{key!r} is lost"
                assert entry.value == value or entry.value in self.doubtful[key], f"{key!r} has an old value"
            await kv.put(b"and it goes on", b"v", timeout=10)


async def started(node: SimulatedNode) -> bool:
    """Start a node, and say whether it came to serve."""
    node.start_soon()
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:

            async def until(event: trio.Event) -> None:
                await event.wait()
                nursery.cancel_scope.cancel()

            nursery.start_soon(until, node.ready)
            nursery.start_soon(until, node.ended)
    return node.alive


async def live(cluster: Cluster, node: SimulatedNode, life: Life) -> None:
    """Everything that a node does with its disk, until it is done or has ended by itself."""
    if await started(node):
        await life.write(cluster, node, PUTS)
        await trio.sleep(2)
    if node.alive:
        hook = node.environment.disk
        await node.shut_down()
        node.environment.disk.on_call, node.environment.disk.trace = hook.on_call, hook.trace
        node.environment.disk.calls = hook.calls
        if await started(node):
            await life.write(cluster, node, 5)


def in_a_cluster(main: Any) -> None:
    async def run() -> None:
        async with trio.open_nursery() as nursery:
            cluster = Cluster(nursery, SimulatedNetwork(1), 1)
            await main(cluster, cluster.add("n1", storage=STORAGE))
            nursery.cancel_scope.cancel()

    run_deterministically(run, seed=1)
