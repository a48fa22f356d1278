"""The inventory under faults: real nodes and a real client, in virtual time."""

import pytest
import trio
from orders.inventory import Inventory, SoldOut

from shardkv.errors import Unavailable
from shardkv.simulation import Cluster


async def test_a_sale_leaves_one_less(shardkv_cluster: Cluster) -> None:
    async with shardkv_cluster.client() as kv:
        inventory = Inventory(kv)
        await inventory.stock("lamp", 2)
        assert await inventory.sell("lamp", "ada") == 1
        assert await inventory.sell("lamp", "ada") == 1, "who has one already buys none"
        assert await inventory.sell("lamp", "bob") == 0
        with pytest.raises(SoldOut):
            await inventory.sell("lamp", "eve")


async def test_nothing_is_sold_twice_while_nodes_crash(shardkv_cluster: Cluster) -> None:
    """Ten buyers for five lamps, and the leader's machine dies in the middle of it, twice."""
    sold: list[str] = []

    async def buy(buyer: str) -> None:
        async with shardkv_cluster.client() as kv:
            try:
                await Inventory(kv).sell("lamp", buyer)
                sold.append(buyer)
            except SoldOut:
                pass

    async with shardkv_cluster.client() as kv:
        await Inventory(kv).stock("lamp", 5)
        async with trio.open_nursery() as nursery:
            for number in range(10):
                nursery.start_soon(buy, f"buyer{number}")
            for _ in range(2):
                leader = await shardkv_cluster.leader_of(kv, b"stock/lamp")
                await leader.power_off()
                await shardkv_cluster.sleep(1.5)
                await leader.start()
        assert len(sold) == 5
        assert sorted(await Inventory(kv).buyers("lamp")) == sorted(sold)


@pytest.mark.shardkv_cluster(nodes=5)
async def test_a_crash_inside_any_call_of_the_leader_sells_nothing_twice(shardkv_cluster: Cluster) -> None:
    """The leader dies inside one of its next calls of disk, network or sleep, wherever that is."""
    async with shardkv_cluster.client() as kv:
        inventory = Inventory(kv)
        await inventory.stock("lamp", 100)
        for number in range(5):
            leader = await shardkv_cluster.leader_of(kv, b"stock/lamp")
            leader.crash_at_call(leader.environment.calls.count + 7 * number + 1, power=True)
            await inventory.sell("lamp", f"buyer{number}")
            await leader.buried()
            leader.start_soon()
        assert await inventory.buyers("lamp") == [f"buyer{number}" for number in range(5)]


async def test_a_shop_that_is_cut_off_says_so(shardkv_cluster: Cluster) -> None:
    async with shardkv_cluster.client() as kv:
        await Inventory(kv).stock("lamp", 1)
        shardkv_cluster.partition(["client2"], list(shardkv_cluster.nodes))
        began = shardkv_cluster.now
        with pytest.raises(Unavailable):
            await Inventory(kv).buyers("lamp")
        assert shardkv_cluster.now - began < 11, "ten seconds, and none of them real"
        shardkv_cluster.heal()
        assert await Inventory(kv).buyers("lamp") == []


def test_a_scenario_run_twice_is_the_same(shardkv_cluster) -> None:  # type: ignore[no-untyped-def]
    """A test that is no coroutine runs scenarios itself."""

    async def scenario(cluster: Cluster) -> float:
        async with cluster.client() as kv:
            await Inventory(kv).stock("lamp", 1)
            await cluster.nodes["n2"].kill()
            await Inventory(kv).sell("lamp", "ada")
        return cluster.now

    assert shardkv_cluster.run(scenario) == shardkv_cluster.run(scenario)
