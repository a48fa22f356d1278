"""How often the core asks, looks up and dials: at once where that may help, and else after a pause (DESIGN §4.6)."""

from typing import Any

from shardkv import errors
from shardkv.wire.requests import Consistency, Method, Request
from shardkv_client.core import Settings
from tests.client.world import World


def paced(seconds: float = 1.0, first: float | None = None, **settings: Any) -> Settings:
    """Pauses of half that to all of it; in a row they double from ``first`` on, if that is given."""
    return Settings(backoff_seconds_min=first or seconds, backoff_seconds_max=seconds, **settings)


def refuse(world: World, method: Method, *nodes: int, times: int = 1_000, error: errors.ShardKVError) -> None:
    """Let these nodes answer so many requests with an error."""
    left = [times]

    def fault(request: Request) -> errors.ShardKVError | None:
        if request.method != method or not left[0]:
            return None
        left[0] -= 1
        return error

    for node in nodes:
        world.cluster.nodes[node].faults.append(fault)


def know_no_range(world: World, times: int) -> None:
    """Let node 1 name no range in answer to so many lookups."""
    node = world.cluster.nodes[1]
    handle, left = node._handle, [times]

    def answer(request: Request) -> Any:
        if request.method != Method.ROUTES or not left[0]:
            return handle(request)
        left[0] -= 1
        return []

    node._handle = answer  # type: ignore[method-assign]


def asked(world: World, method: Method) -> list[int]:
    """Which nodes have been asked that."""
    return [node for node, requests in world.frames for each in requests if each.method == method]


def test_two_hints_are_followed_at_once_and_a_third_after_a_pause():
    world = World(nodes=4, settings=paced())
    world.run(world.get(b"k"))
    world.cluster.range_of(b"k").leader = 4
    for node in (1, 2, 3):
        refuse(world, Method.WRITE, node, error=errors.NotLeader(hint=node + 1))
    call = world.put(b"k", b"v")
    world.pass_time(0.4)
    assert asked(world, Method.WRITE) == [1, 2, 3]
    world.run(call)
    assert asked(world, Method.WRITE) == [1, 2, 3, 4]


def test_the_next_replica_is_asked_at_once_and_the_one_after_it_after_a_pause():
    """Once all have been asked the range is looked up again."""
    world = World(settings=paced())
    world.run(world.get(b"k"))
    refuse(world, Method.WRITE, 1, 2, 3, error=errors.NotLeader())
    world.put(b"k", b"v")
    world.pass_time(0.4)
    assert asked(world, Method.WRITE) == [1, 2]
    assert len(asked(world, Method.ROUTES)) == 1
    world.pass_time(1.2)
    assert asked(world, Method.WRITE)[:3] == [1, 2, 3]
    assert len(asked(world, Method.ROUTES)) == 2


def test_a_busy_leader_is_asked_for_a_while_before_others_are():
    """It may have lost its leadership without knowing."""
    world = World(settings=paced())
    world.run(world.get(b"k"))
    world.cluster.range_of(b"k").leader = 2
    refuse(world, Method.WRITE, 1, error=errors.Busy("full"))
    world.run(world.put(b"k", b"v", timeout=60.0))
    assert asked(world, Method.WRITE) == [1] * 6 + [2]
    assert len(asked(world, Method.ROUTES)) == 2


def test_calls_whose_range_is_not_known_share_a_lookup():
    world = World()
    world.seconds_away[1] = 0.2
    calls = [world.put(b"k%d" % number, b"v") for number in range(5)]
    world.run(*calls)
    assert asked(world, Method.ROUTES) == [1]


def test_after_a_lookup_that_found_nothing_there_is_a_pause_for_calls_that_come_then_too():
    world = World(nodes=1, settings=paced())
    know_no_range(world, 1)
    calls = [world.put(b"k", b"v")]
    for _ in range(4):
        world.pass_time(0.1)
        calls.append(world.put(b"l", b"v"))
    world.pass_time(0.05)
    assert asked(world, Method.ROUTES) == [1]
    world.run(*calls)
    assert asked(world, Method.ROUTES) == [1, 1]


def test_the_pause_after_a_lookup_that_found_nothing_is_short_again_once_one_has():
    world = World(nodes=1, settings=paced(10.0, 0.01, routes_per_lookup=1))
    world.cluster.split(b"m")
    know_no_range(world, 8)
    began = world.now
    world.run(world.put(b"a", b"v"))
    assert world.now - began > 1.0, "each is twice the one before"
    know_no_range(world, 1)
    began = world.now
    world.run(world.put(b"z", b"v"))
    assert world.now - began < 0.1


def test_only_so_many_lookups_are_out_at_a_time():
    world = World(nodes=1, settings=Settings(lookups_at_once_max=2))
    keys = [b"a", b"c", b"e", b"g", b"i", b"k"]
    for key in keys[1:]:
        world.cluster.split(key)
    world.run(*[world.put(key, b"v") for key in keys])
    refuse(world, Method.WRITE, 1, times=len(keys), error=errors.RangeNotFound())
    before = len(asked(world, Method.ROUTES))
    world.seconds_away[1] = 0.2
    calls = [world.put(key, b"v") for key in keys]
    world.pass_time(0.3)
    assert len(asked(world, Method.ROUTES)) == before + 2
    world.run(*calls)


def test_where_a_node_is_that_nobody_has_named_is_asked_again_soon():
    world = World(nodes=1, settings=Settings(moved_seconds=5.0))
    world.run(world.put(b"k", b"v"))
    world.cluster.move(b"", [2], leader=2)
    world.put(b"k", b"w", timeout=3.0)
    before = len(asked(world, Method.NODES))
    world.pass_time(2.0)
    assert 10 < len(asked(world, Method.NODES)) - before <= 21


def test_where_a_node_is_that_does_not_answer_is_asked_now_and_then():
    """It is likely to be down; that it has moved is rare."""
    world = World(seeds=[2])
    world.run(world.put(b"k", b"v"))
    world.crash(1)
    world.put(b"k", b"w", timeout=10.0)
    before = len(asked(world, Method.NODES))
    world.pass_time(5.0)
    assert 3 < len(asked(world, Method.NODES)) - before <= 6


def test_calls_that_wait_for_the_address_of_a_node_go_on_as_soon_as_it_is_known():
    world = World(nodes=2, settings=paced(10.0))
    world.cluster.move(b"", [2], leader=2)
    added = world.cluster.nodes.pop(2)
    world.run(world.admin(Method.STATUS))
    world.pass_time(11.0)
    world.cluster.nodes[2] = added
    began = world.now
    world.run(world.put(b"k", b"w", timeout=60.0))
    assert world.now - began < 1.0


def test_calls_of_a_range_that_is_found_to_be_another_wait_no_longer():
    """They had been put off by the old one's leader."""
    world = World(nodes=2, settings=paced(10.0))
    world.cluster.split(b"m", leader=2)
    world.run(world.put(b"a", b"v"), world.put(b"z", b"v"))
    refuse(world, Method.WRITE, 2, error=errors.Busy("full"))
    began = world.now
    waits = world.put(b"z", b"w", timeout=60.0)
    world.pass_time(0.1)
    world.cluster.merge(b"a")
    world.run(world.put(b"a", b"w", timeout=60.0), waits)
    assert world.now - began < 1.0


def test_a_call_waits_no_longer_than_until_one_of_the_nodes_may_be_dialled_again():
    world = World(nodes=1, settings=paced(10.0, 0.01))
    world.run(world.put(b"k", b"v"))
    world.crash(1)
    call = world.put(b"k", b"w")
    world.pass_time(0.001)
    world.down.clear()
    began = world.now
    world.run(call)
    assert world.now - began < 0.2


def test_a_replica_that_is_away_is_not_dialled_for_each_read_that_others_serve():
    world = World(seeds=[1, 2, 3])
    for _ in range(3):
        world.run(world.get(b"k", Consistency.STALE))
    world.crash(3)
    before = len(world.dials)
    for _ in range(500):
        world.run(world.get(b"k", Consistency.STALE))
        world.pass_time(0.01)
    assert 3 < world.dials[before:].count("n3:1") <= 7
