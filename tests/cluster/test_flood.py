"""A slow or dead client pays for itself (DESIGN 4.2): memory stays bounded and others are served."""

from collections.abc import Iterator

import pytest

from tests.cluster.flood import MIB, flood
from tests.cluster.harness import LocalCluster, client, settled, started

pytestmark = pytest.mark.cluster

GROWTH_MAX = 64 * MIB
GROWTH_MAX_READS = 96 * MIB
"""With large reads among them the answers' own bound comes on top."""


@pytest.fixture
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    with started(tmp_path_factory.mktemp("flood")) as running:
        yield running


@pytest.mark.parametrize("value_bytes, get_every", [(64 * 1024, 0), (MIB, 0), (256 * 1024, 2)])
async def test_a_hundred_clients_that_never_read_cost_a_node_less_than_64_mib(
    world: LocalCluster, value_bytes: int, get_every: int
) -> None:
    """256 MiB here, of writes or of writes and large reads; `python -m tests.cluster.soak flood` sends 1 GiB."""
    async with client(world) as kv:
        await settled(kv)
    found = await flood(world, 256 * MIB, value_bytes=value_bytes, get_every=get_every)
    assert found.growth < (GROWTH_MAX_READS if get_every else GROWTH_MAX), found.describe()
    assert found.served_in_flood > 0, found.describe()
