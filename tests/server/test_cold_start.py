"""From empty directories to the first write, in virtual time: who waits for somebody who cannot come yet loses it."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest
import structlog
import trio
from trio.testing import MockClock

from shardkv.config import RaftConfig
from shardkv.errors import Busy, ConfigError
from shardkv.server.placement_service import PlacementService
from shardkv.simulation.cluster import Cluster
from shardkv.simulation.disk import Call
from shardkv.simulation.network import SimulatedNetwork
from shardkv.simulation.node import SimulatedNode
from shardkv.types import FIRST_RANGE
from shardkv.wire.requests import Method, Request
from shardkv_placement import commands

NODES = ("n1", "n2", "n3")
PROMISE_SECONDS = RaftConfig().promise_ms / 1000


@asynccontextmanager
async def empty(*names: str) -> AsyncIterator[Cluster]:
    """Nodes of a new cluster, none of which is started; each joins whichever of the others serves first."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(50))
    try:
        async with trio.open_nursery() as nursery:
            cluster = Cluster(nursery, SimulatedNetwork(1), 1)
            for name in names:
                others = tuple(f"{other}:7000" for other in names if other != name)
                cluster.add(name, join=() if name == names[0] else others)
            yield cluster
            nursery.cancel_scope.cancel()
    finally:
        structlog.reset_defaults()


async def seconds_to_join(first: str, *joiners: str) -> float:
    """From the start of the first, for which the others wait already, until all serve."""
    async with empty(first, *joiners) as cluster:
        for name in joiners:
            cluster.nodes[name].start_soon()
        await cluster.sleep(0.3)
        started = cluster.now
        await cluster.nodes[first].start()
        for name in joiners:
            await cluster.nodes[name].ready.wait()
        return cluster.now - started


async def test_a_node_that_comes_up_last_is_found_at_once_by_those_that_wait_for_it(autojump_clock: MockClock) -> None:
    """The joiners listen before they have joined, so each accepts the other's connection and greets nobody. The one
    node that could let them in is tried again all the same.
    """
    assert await seconds_to_join(*NODES) < 1.0


async def test_many_nodes_that_wait_to_join_do_not_keep_each_other_from_it(autojump_clock: MockClock) -> None:
    """More of them than a client dials at the same time, and the one that serves is the last of everybody's list."""
    assert await seconds_to_join("n9", *(f"n{number}" for number in range(1, 9))) < 1.5


async def test_an_empty_directory_may_be_one_that_is_not_mounted(autojump_clock: MockClock) -> None:
    """To whoever starts a node again, the advice to found a cluster or join one is the wrong one."""
    async with empty("n1") as cluster:
        node = cluster.nodes["n1"]
        node.config = replace(node.config, bootstrap=False)
        with pytest.raises(ConfigError, match=r"^if this node ran before, its data directory is not mounted: /n1 "):
            await node.run_to_its_end()


@pytest.mark.parametrize("changes", [{}, {"advertise": "elsewhere:1", "join": ("n1:7000", "elsewhere:1")}])
async def test_a_node_that_is_told_to_join_itself_says_so(autojump_clock: MockClock, changes: dict[str, Any]) -> None:
    """It dialled itself for a minute, and then said that nobody answered there."""
    async with empty("n1") as cluster:
        node = cluster.nodes["n1"]
        node.config = replace(node.config, **{"bootstrap": False, "join": ("n1:7000",), **changes})
        with pytest.raises(ConfigError, match=f"^--join {', '.join(node.config.join)} is this node's own address"):
            await node.run_to_its_end()
        assert cluster.now < 1.0


async def test_a_node_may_be_told_to_join_itself_among_others(autojump_clock: MockClock) -> None:
    """One list for all of them."""
    async with empty("n1", "n2") as cluster:
        first, second = cluster.nodes.values()
        second.config = replace(second.config, join=(second.address, first.address))
        await first.start()
        await second.start()
        async with cluster.client() as kv:
            await cluster.until(kv, lambda status, ranges: status["live"] == len(cluster.nodes))


@pytest.mark.parametrize(("milliseconds", "said"), [(-5_000, "-5"), (1 << 46, r"\+70,368,744,177")])
async def test_a_cluster_begins_at_a_time_that_can_be_written_down(
    autojump_clock: MockClock, milliseconds: int, said: str
) -> None:
    """Before 1970, where a machine without a battery may believe to be, it was an error of ``struct``. The directory is
    the node's by then, and the next start goes on."""
    async with empty("n1") as cluster:
        node = cluster.nodes["n1"]
        clock = node.environment.clock
        clock.wall_offset_ms = milliseconds - clock.wall_ms()
        with pytest.raises(ConfigError, match=f"clock stands at {said} seconds from 1970.*: set it, then start"):
            await node.run_to_its_end()
        node.engine = node.engine.crash(lambda count: count)
        clock.wall_offset_ms = 0
        await node.start()
        async with cluster.client() as kv:
            await kv.put(b"k", b"v")
        # Once it has begun, what the clock says is no matter: it is not followed.
        await node.kill()
        clock.wall_offset_ms = milliseconds - clock.wall_ms()
        await node.start()


async def test_a_new_cluster_waits_for_no_promise_that_nobody_can_have_made(autojump_clock: MockClock) -> None:
    """A directory that was never used before holds no forgotten promise, so its only voter elects itself at once."""
    async with empty("n1") as cluster:
        node = cluster.nodes["n1"]
        await node.start()
        assert cluster.now < PROMISE_SECONDS
        async with cluster.client() as kv:
            await kv.put(b"k", b"v")


async def test_trap_07_a_second_start_waits_for_what_the_first_may_have_promised(autojump_clock: MockClock) -> None:
    """Even when the first start ended before it promised anything: nobody can tell."""
    async with empty("n1") as cluster:
        node = cluster.nodes["n1"]
        node.start_soon()
        while not node.composed:
            await cluster.sleep(0.001)
        await node.kill()
        started = cluster.now
        node.start_soon()
        while not node.composed:
            await cluster.sleep(0.001)
        for replica in node.inside.catalog.replicas.values():
            assert replica.raft.raft.refuse_until >= node.environment.clock.monotonic_ns() + PROMISE_SECONDS * 0.9e9
        async with cluster.client() as kv:
            await kv.put(b"k", b"v")
        assert cluster.now - started >= PROMISE_SECONDS


@pytest.mark.parametrize("stagger_seconds", [0.0, 0.3])
async def test_a_new_node_that_is_ready_is_in_what_the_cluster_says_of_itself(
    autojump_clock: MockClock, stagger_seconds: float
) -> None:
    """Whoever waits for ``ready`` and then asks who is there, or who leads, gets this node for an answer."""
    async with empty(*NODES) as cluster:
        for node in cluster.nodes.values():
            node.start_soon()
            await cluster.sleep(stagger_seconds)
        for node in cluster.nodes.values():
            await node.ready.wait()
            async with cluster.client(node.name) as kv:
                status = await kv.call(Method.STATUS)
                states = {each["name"]: each["state"] for each in status["node_table"]}
                assert states[node.name] == "live"
                assert all(each["leader"] is not None for each in await kv.call(Method.RANGES))
                assert node.name in [each[1] for each in await kv.call(Method.NODES)]


@pytest.mark.parametrize("founds", [False, True])
async def test_a_new_node_whose_first_start_came_to_nothing_is_ready_no_sooner(
    autojump_clock: MockClock, founds: bool
) -> None:
    """Its address was in use, or nobody was there to join: it is as new at its second start."""
    async with empty(*NODES) as cluster:
        first, second, _ = cluster.nodes.values()
        node = first if founds else second
        node.crash_at_call(12)
        node.start_soon()
        await cluster.sleep(1.0)
        if node.alive:
            await node.kill()
        await node.buried()
        assert not node.composed
        await first.start()
        await node.start() if node is not first else None
        async with cluster.client(node.name) as kv:
            if founds:
                replica = node.inside.catalog.replicas[FIRST_RANGE]
                assert replica.raft.committed_in_term
            states = {each["name"]: each["state"] for each in (await kv.call(Method.STATUS))["node_table"]}
            assert states[node.name] == "live"


async def being_made(first: SimulatedNode) -> PlacementService:
    """Start the first node of a cluster, until it leads a placement group without a state."""
    first.start_soon()
    while not (first.composed and first.inside.placement.group.leads):
        await first.cluster.sleep(0.001)
    return first.inside.placement


@pytest.mark.parametrize("bootstrap", [True, False])
async def test_a_first_node_that_died_amid_making_the_cluster_is_ready_no_sooner(
    autojump_clock: MockClock, bootstrap: bool
) -> None:
    """Its directory is its own by then, and nobody has heard of it: it said `ready` before there was a cluster."""
    async with empty("n1") as cluster:
        node = cluster.nodes["n1"]
        await being_made(node)
        await node.kill()
        node.config = replace(node.config, bootstrap=bootstrap)
        await node.start()
        assert node.inside.placement_extension.state.bootstrapped
        assert node.inside.catalog.replicas[FIRST_RANGE].raft.committed_in_term
        async with cluster.client() as kv:
            status = await kv.call(Method.STATUS)
            assert [(each["name"], each["state"]) for each in status["node_table"]] == [("n1", "live")]
            assert all(each["leader"] is not None for each in await kv.call(Method.RANGES))


async def test_a_cluster_that_is_just_being_made_does_not_describe_itself(autojump_clock: MockClock) -> None:
    """Its first node leads the placement group a moment before the group's state begins. An empty list of nodes then
    would make a client forget whom it is connected to.
    """
    async with empty("n1") as cluster:
        node = cluster.nodes["n1"]
        placement = await being_made(node)
        for method, ask in ((Method.NODES, placement.nodes), (Method.STATUS, placement.status)):
            with pytest.raises(Busy):
                await ask(Request(1, method, 0, 0, 0, []))
        with pytest.raises(Busy):
            await placement.ranges(Request(1, Method.RANGES, 0, 0, 0, []))
        await node.ready.wait()
        async with cluster.client() as kv:
            assert [each[1] for each in await kv.call(Method.NODES)] == ["n1"]


async def test_a_node_that_wants_to_join_a_cluster_that_is_just_being_made_tries_again(
    autojump_clock: MockClock,
) -> None:
    """It may ask through a node that passes the request on, and the group's leader is there before its state. Told that
    its request was wrong, it would end.
    """
    async with empty("n1") as cluster:
        node = cluster.nodes["n1"]
        placement = await being_made(node)
        labels: list[list[str]] = []
        with pytest.raises(Busy):
            await placement.join(Request(1, Method.JOIN, 0, 0, 0, ["n2", "n2:7000", b"t" * 16, labels]))
        command = commands.RegisterNode("n2", "n2:7000", b"t" * 16, ())
        with pytest.raises(Busy):
            await placement.command(Request(1, Method.PLACEMENT, 0, 0, 0, [commands.encode(command)]))
        await node.ready.wait()


async def test_nodes_that_come_back_are_ready_before_there_is_a_placement_group(autojump_clock: MockClock) -> None:
    """A cluster that was stopped is started one node after the other, each waited for; two thirds of it are down."""
    async with empty(*NODES) as cluster:
        for node in cluster.nodes.values():
            await node.start()
        async with cluster.client() as kv:
            await cluster.formed(kv)
        for node in cluster.nodes.values():
            await node.power_off()
        started = cluster.now
        await cluster.nodes["n2"].start()
        assert cluster.now - started < 1.0


async def _joins_and_crashes(at_call: int | None, moments: list[int]) -> None:
    """A node that joins dies at a call, and is started again without being told whom to join, if it has joined."""
    async with empty("n1", "n2") as cluster:
        first, node = cluster.nodes.values()
        await first.start()
        calls = node.environment.calls
        if at_call is None:

            def note(call: Call) -> None:
                if call.path.startswith(("/n2/identity", "/n2/peers")):
                    moments.append(calls.count)

            node.environment.disk.on_call = note
            await node.start()
            return
        node.crash_at_call(at_call)
        node.start_soon()
        await node.ended.wait()
        await node.buried()
        joined = node.config
        node.config = replace(joined, join=())
        cluster.tolerates = lambda node, error: isinstance(error, ConfigError)
        node.start_soon()
        await cluster.sleep(5)
        if not node.alive:
            node.config = joined
            node.start_soon()
            await cluster.sleep(5)
        assert node.composed, "it does not start"
        heard = node.inside.placement.reporting.introduced(None)
        assert heard, f"the cluster has not heard of it, after a crash at {at_call}"


async def test_a_crash_at_any_moment_of_joining_leaves_a_node_that_finds_its_cluster(
    autojump_clock: MockClock,
) -> None:
    """DESIGN 2.2: a second start carries on without --join. So who has joined must know where the others are."""
    moments: list[int] = []
    await _joins_and_crashes(None, moments)
    assert len(moments) > 8, "not every call of a join was seen"
    for at_call in range(moments[0], moments[-1] + 2):
        await _joins_and_crashes(at_call, [])


@pytest.mark.parametrize("moment", [0.0, 0.3, 3.0])
async def test_a_node_that_is_told_to_stop_while_it_waits_to_join_stops_at_once_and_without_an_error(
    autojump_clock: MockClock, moment: float
) -> None:
    """Whoever stops it does not want to hear that it could not join."""
    async with empty(*NODES) as cluster:
        node = cluster.nodes["n2"]
        node.start_soon()
        await cluster.sleep(moment)
        told = cluster.now
        await node.shut_down()
        assert cluster.now - told < 0.5
        assert node.error is None
        node.start_soon()
        await cluster.nodes["n1"].start()
        await node.ready.wait()


async def test_a_node_that_joined_and_died_before_anybody_had_heard_of_it_is_ready_no_sooner(
    autojump_clock: MockClock,
) -> None:
    """Its directory is a node's by then, but it never was in what the cluster says of itself."""
    async with empty(*NODES) as cluster:
        first, node, _ = cluster.nodes.values()
        await first.start()
        node.start_soon()
        while not node.composed:
            await cluster.sleep(0.0005)
        await node.kill()
        await node.start()
        assert node.inside.placement.reporting.introduced(None)
