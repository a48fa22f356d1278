"""A slow or dead client pays for itself (DESIGN 4.2): memory stays bounded and others are served."""

from collections.abc import Iterator

import pytest

from tests.cluster.flood import FLOODS, GROWTH_MAX, MIB, flood
from tests.cluster.harness import LocalCluster, client, settled, started

pytestmark = pytest.mark.cluster


@pytest.fixture
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    with started(tmp_path_factory.mktemp("flood")) as running:
        yield running


@pytest.mark.parametrize("name", ["puts of 64 KiB", "a mix, values of 256 KiB"])
async def test_a_hundred_clients_that_never_read_cost_a_node_less_than_64_mib(world: LocalCluster, name: str) -> None:
    """256 MiB of writes, or asked for, here; `python -m tests.cluster.soak flood` asks for 1 GiB in every way."""
    async with client(world) as kv:
        await settled(kv)
    found = await flood(world, 256 * MIB, FLOODS[name])
    assert found.growth < GROWTH_MAX, found.describe()
    assert found.served_in_flood > 0, found.describe()
    assert found.large_served > 0, found.describe()
