"""Two clusters that know an address of each other's, by mistake or because it was given to another machine."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest
import structlog
import trio
from structlog.testing import capture_logs
from trio.testing import MockClock

from shardkv.errors import DataDirectoryError, WrongCluster
from shardkv.server.other_nodes import YOUNG_SECONDS
from shardkv.server.placement_group import PlacementExtension
from shardkv.simulation.cluster import Cluster
from shardkv.simulation.network import SimulatedNetwork
from shardkv.simulation.pipes import Link
from shardkv.types import PLACEMENT_RANGE, NodeId
from shardkv.wire.handshake import Hello, Role, encode_hello
from tests.server.world import world


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


async def test_a_node_whose_data_are_gone_makes_no_second_cluster_at_its_address(autojump_clock: MockClock) -> None:
    """Its disk was not mounted, and it was started as at the first time: clients came to either cluster, and each
    acknowledged what they wrote."""
    with capture_logs() as lines:
        async with world(3) as cluster, cluster.client("n2", "n3") as kv:
            await kv.put(b"account", b"100")
            first = cluster.nodes["n1"]
            await first.kill()
            first.wipe()
            with pytest.raises(WrongCluster, match="data directory is gone or not mounted"):
                await first.run_to_its_end()
            with pytest.raises(DataDirectoryError):  # nor does the next start
                await first.run_to_its_end()
            entry = await kv.get(b"account")
            assert entry is not None
            assert entry.value == b"100"
    told = {line["event"].split(":")[0] for line in lines if line["log_level"] == "error"}
    assert "a node of another cluster takes this address for one of its cluster's" in told
    assert "somebody else is at a node's address" in told


async def test_a_cluster_that_is_no_longer_new_goes_on_whoever_dials_it(autojump_clock: MockClock) -> None:
    """It has data by then that are nowhere else."""
    async with two_clusters() as cluster:
        ours, theirs = cluster.nodes.values()
        await cluster.sleep(YOUNG_SECONDS + 1)
        hello = Hello(Role.PEER, cluster_id=bytes(16), node_id=NodeId(2), destination_node_id=NodeId(1), boot=1)
        stream = await cluster.network.node("theirs").dial(ours.address)
        await stream.send_all(encode_hello(hello))
        assert await stream.receive(65536)
        await cluster.sleep(10)
        assert ours.alive
        assert theirs.alive
