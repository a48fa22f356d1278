"""How many followers are sent a write at once is the node's setting; what a follower that is slow costs."""

import pytest

from shardkv.config import RaftConfig
from shardkv.simulation import Cluster, run_deterministically, simulated_cluster
from shardkv.types import FIRST_RANGE


def last_indexes(cluster: Cluster) -> list[int]:
    """How far the first range's log goes on each node."""
    return [node.inside.catalog.replicas[FIRST_RANGE].raft.last_index for node in cluster.nodes.values()]


@pytest.mark.parametrize("entries_max,lacking", [(1, 0), (8, 1)])
def test_so_many_followers_are_sent_a_write_at_once(entries_max: int, lacking: int) -> None:
    async def main() -> None:
        async with (
            simulated_cluster(nodes=3, raft=RaftConfig(spare_entries_max=entries_max)) as cluster,
            cluster.client() as client,
        ):
            await client.put(b"k", b"v")
            await cluster.sleep(1)
            assert len(set(last_indexes(cluster))) == 1, "a heartbeat brings the others what they lack"
            await client.put(b"k", b"w")
            await cluster.sleep(0.004)
            after = last_indexes(cluster)
            assert sum(index < max(after) for index in after) == lacking

    run_deterministically(main, seed=1)
