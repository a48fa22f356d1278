"""Two nodes with one address: where it is a mistake both the node and the placement leader say so; else nobody does."""

from dataclasses import replace
from typing import Any

from trio.testing import MockClock

from tests.server.world import three_nodes

OWN, ALL = "this node's address is that of another node", "live nodes have the same address"
OVER = "no two live nodes have the same address any more"


def about_addresses(lines: list[Any]) -> list[tuple[str, str]]:
    """Who said what of addresses, in this order."""
    events = [event for line in lines for event in (OWN, ALL, OVER) if line["event"].startswith(event)]
    nodes = [line["node"] for line in lines if line["event"].startswith((OWN, ALL, OVER))]
    return list(zip(nodes, events))


async def test_a_node_that_says_another_ones_address_is_told_of_there_and_by_the_placement_leader(
    autojump_clock: MockClock,
) -> None:
    async with three_nodes() as (cluster, lines):
        async with cluster.client("n1") as kv:
            leader = f"n{(await kv.status())['placement_leader']}"
        second = cluster.nodes["n2"]
        fourth = cluster.add("n4", advertise=second.address)
        fourth.start_soon()
        await cluster.sleep(60.0)
        assert about_addresses(lines) == [("n4", OWN), (leader, ALL)]
        (line,) = [line for line in lines if line["event"].startswith(ALL)]
        assert (line["log_level"], line["nodes"], line["addresses"]) == ("error", [2, 4], [second.address])
        await fourth.kill()
        fourth.config = replace(fourth.config, advertise=None)
        await fourth.start()
        await cluster.sleep(30.0)
        assert about_addresses(lines)[2:] == [(leader, OVER)]


async def test_a_node_may_take_over_the_address_of_one_that_is_lost(autojump_clock: MockClock) -> None:
    async with three_nodes() as (cluster, lines):
        lost = cluster.nodes["n3"]
        await lost.kill()
        fourth = cluster.add("n4", listen=lost.address)
        await fourth.start()
        await cluster.sleep(60.0)
        async with cluster.client("n1") as kv:
            states = [(row["address"], row["state"]) for row in (await kv.status())["node_table"]]
        assert states[2:] == [(lost.address, "down"), (lost.address, "live")]
        assert about_addresses(lines) == []


async def test_two_nodes_may_swap_their_addresses(autojump_clock: MockClock) -> None:
    async with three_nodes() as (cluster, lines):
        second, third = cluster.nodes["n2"], cluster.nodes["n3"]
        addresses = {"n2": third.address, "n3": second.address}
        for node in (second, third):
            await node.kill()
        for node in (second, third):
            node.config = replace(node.config, listen=addresses[node.name])
            node.start_soon()
            await cluster.sleep(3.0)
        await cluster.sleep(60.0)
        async with cluster.client("n1") as kv:
            rows = (await kv.status())["node_table"]
        assert {row["name"]: row["address"] for row in rows} == {"n1": cluster.nodes["n1"].address, **addresses}
        assert all(row["state"] == "live" for row in rows)
        assert about_addresses(lines) == []
