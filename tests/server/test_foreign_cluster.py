"""Two clusters that know an address of each other's, by mistake or because it was given to another machine."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import structlog
import trio
from trio.testing import MockClock

from shardkv.server.placement_service import PlacementExtension
from shardkv.simulation.cluster import Cluster
from shardkv.simulation.network import SimulatedNetwork
from shardkv.simulation.pipes import Link
from shardkv.types import PLACEMENT_RANGE


@asynccontextmanager
async def two_clusters() -> AsyncIterator[Cluster]:
    """Nodes ``ours`` and ``theirs``, each the first of a cluster of its own. ``ours`` reaches the other sooner than
    itself."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(50))
    try:
        async with trio.open_nursery() as nursery:
            network = SimulatedNetwork(1, link=Link(0.0001, 0.0001))
            cluster = Cluster(nursery, network, 1)
            for name in ("ours", "theirs"):
                await cluster.add(name, bootstrap=True, join=()).start()
            yield cluster
            nursery.cancel_scope.cancel()
    finally:
        structlog.reset_defaults()


async def test_a_node_tells_another_cluster_nothing_of_itself(autojump_clock: MockClock) -> None:
    """Its start would count there as one of the node with the same id, which would be taken for an old copy and end;
    and its ranges would stand in the other cluster's map."""
    async with two_clusters() as cluster:
        ours, theirs = cluster.nodes.values()
        await ours.kill()
        ours.config = replace(ours.config, bootstrap=False, join=(theirs.address,))
        link = cluster.network.link("ours", "ours")
        link.delay_seconds_min = link.delay_seconds_max = 0.01
        await ours.start()
        await cluster.sleep(10.0)
        for node, boot in ((ours, 2), (theirs, 1)):
            extension = node.inside.catalog.extension(PLACEMENT_RANGE)
            assert isinstance(extension, PlacementExtension)
            (record,) = extension.state.nodes.values()
            assert (node.alive, record.address, record.boot) == (True, node.address, boot)
