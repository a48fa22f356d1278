"""The core finds the range that holds a key and the node that leads it, and finds them again (DESIGN §4.6, §4.9)."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardkv import errors
from shardkv.types import KEY_BYTES_MAX, Epoch, KeyRange, Member, NodeId, RangeDescriptor, RangeId, ReplicaId
from shardkv.wire import requests
from shardkv.wire.requests import Method
from shardkv_client.core import Settings
from shardkv_client.limits import before
from tests.client.world import World


def test_the_first_call_looks_up_the_range_and_asks_its_leader():
    """Seeds are any nodes: routes and addresses come from whichever answers."""
    world = World(seeds=[2])
    version = world.run(world.put(b"k", b"v"))
    assert world.cluster.data[b"k"] == (b"v", version)
    assert len(world.requests_to(2, Method.ROUTES)) == 1
    assert len(world.requests_to(1, Method.WRITE)) == 1
    assert not world.requests_to(2, Method.WRITE)


def test_later_calls_need_no_lookup():
    world = World()
    world.run(world.put(b"k", b"v"))
    frames = len(world.frames)
    world.run(world.get(b"k"))
    assert len(world.frames) == frames + 1


def test_a_hint_is_followed_at_once():
    """NotLeader names the leader: the next attempt goes there, without backoff."""
    world = World()
    world.run(world.get(b"k"))
    world.cluster.range_of(b"k").leader = 3
    started = world.now
    world.run(world.put(b"k", b"v"))
    assert len(world.requests_to(1, Method.WRITE)) == 1
    assert len(world.requests_to(3, Method.WRITE)) == 1
    assert world.now - started < 0.008  # one answer, one dial with its greeting, one answer
    world.run(world.put(b"k", b"w"))
    assert len(world.requests_to(1, Method.WRITE)) == 1, "the new leader is remembered"


def test_without_a_hint_the_replicas_are_tried_in_turn():
    world = World()
    world.run(world.get(b"k"))
    target = world.cluster.range_of(b"k")
    for node in world.cluster.nodes.values():
        node.faults.append(
            lambda request, node=node: (
                errors.NotLeader() if request.method == Method.WRITE and target.leader != node.id else None
            )
        )
    target.leader = 3
    world.run(world.put(b"k", b"v"))
    assert [node for node, asked in world.frames if asked[0].method == Method.WRITE] == [1, 2, 3]


def test_two_nodes_that_name_each_other_are_not_asked_in_a_tight_circle():
    """Hints are believed twice; then there is a backoff between attempts."""
    world = World()
    world.run(world.get(b"k"))
    target = world.cluster.range_of(b"k")
    for node, other in ((1, 2), (2, 1)):
        world.cluster.nodes[node].faults.append(
            lambda request, other=other: errors.NotLeader(hint=other) if request.method == Method.WRITE else None
        )
    target.leader = None
    call = world.put(b"k", b"v", timeout=2.0)
    with pytest.raises(errors.Unavailable):
        world.run(call)
    assert 4 < sum(asked[0].method == Method.WRITE for _, asked in world.frames) < 60


def test_a_leaders_death_sends_the_same_call_to_the_others():
    world = World()
    world.run(world.put(b"k", b"v"))
    world.crash(1)
    world.cluster.range_of(b"k").leader = 2
    started = world.now
    world.run(world.put(b"k", b"w"))
    assert world.now - started < 0.1
    assert world.cluster.data[b"k"][0] == b"w"


def test_a_split_is_learned_from_the_answer():
    """EpochMismatch carries the newer descriptors; no lookup is needed."""
    world = World()
    world.run(world.put(b"a", b"v"), world.put(b"z", b"v"))
    lookups = len(world.requests_to(1, Method.ROUTES))
    world.cluster.split(b"m", leader=2)
    world.run(world.put(b"z", b"w"))
    world.run(world.put(b"a", b"w"))
    assert [route.start for route in world.core.router.cache] == [b"", b"m"]
    assert len(world.requests_to(1, Method.ROUTES)) == lookups
    assert world.cluster.data[b"z"][0] == b"w"


def test_a_merge_is_learned_from_the_answer():
    world = World()
    world.cluster.split(b"m")
    world.run(world.put(b"a", b"v"), world.put(b"z", b"v"))
    world.cluster.merge(b"a")
    world.run(world.put(b"z", b"w"), world.put(b"a", b"w"))
    assert [route.start for route in world.core.router.cache] == [b""]


def test_a_range_that_moved_away_is_looked_up_again():
    """RangeNotFound from a replica that is gone."""
    world = World(nodes=5)
    world.cluster.move(b"", [1, 2], leader=1)
    world.run(world.put(b"k", b"v"))
    world.cluster.move(b"", [4, 5], leader=5)
    world.run(world.put(b"k", b"w"))
    assert world.cluster.data[b"k"][0] == b"w"
    assert world.requests_to(5, Method.WRITE)


def test_a_range_whose_known_replicas_are_all_gone_is_looked_up_again():
    """What a node that was behind said of a range names one voter; that has died, and is all that would be asked."""
    world = World(seeds=[2, 3])
    world.cluster.move(b"k", [1], leader=1)
    world.run(world.get(b"k"))
    world.cluster.move(b"k", [2, 3], leader=3)
    world.crash(1)
    call = world.put(b"k", b"v", timeout=2.0)
    world.run(call)
    assert call.error is None


def test_a_node_that_lags_behind_is_asked_again_later():
    """EpochMismatch with nothing new teaches nothing; a backoff keeps the client from asking in a circle."""
    world = World(nodes=1)
    world.run(world.put(b"k", b"v"))
    stale = [True]
    world.cluster.nodes[1].faults.append(
        lambda request: errors.EpochMismatch() if request.method == Method.WRITE and stale[0] else None
    )
    call = world.put(b"k", b"w")
    world.pass_time(1.0)
    assert not call.done
    assert 3 < call.attempts < 40
    stale[0] = False
    world.run(call)


def test_busy_is_retried_until_it_works():
    world = World(nodes=1)
    world.run(world.put(b"k", b"v"))
    busy = [5]

    def fault(request):
        if request.method == Method.WRITE and busy[0]:
            busy[0] -= 1
            return errors.Busy("full")
        return None

    world.cluster.nodes[1].faults.append(fault)
    world.run(world.put(b"k", b"w"))
    assert busy == [0]


@pytest.mark.parametrize("refusal", [errors.RangeNotFound("ask another"), errors.Unavailable("nobody answers")])
def test_a_lookup_that_the_connected_nodes_cannot_answer_goes_to_others(refusal: errors.ShardKVError):
    """A node that is cut off from the placement group knows who else there is; that it is connected is not enough."""
    world = World(nodes=4, seeds=[1])
    for node in (1, 2, 3):
        faults = world.cluster.nodes[node].faults
        faults.append(lambda request: refusal if request.method == Method.ROUTES else None)
    world.run(world.put(b"k", b"v", timeout=2.0))
    assert world.requests_to(4, Method.ROUTES)


def test_a_lookup_that_a_connected_node_leaves_unanswered_goes_to_others():
    """It passes lookups on to a node that is away, say, and waits as long as the client does."""
    world = World(nodes=2, seeds=[1], settings=Settings(lookup_seconds=1.0))
    node = world.cluster.nodes[1]
    serve = node.serve

    def serve_others(payload: bytes) -> list[bytes]:
        answered = zip(requests.decode_requests(payload), serve(payload), strict=True)
        return [answer for request, answer in answered if request.method != Method.ROUTES]

    node.serve = serve_others  # type: ignore[method-assign]
    version = world.run(world.put(b"k", b"v", timeout=3.0))
    assert world.cluster.data[b"k"] == (b"v", version)
    assert world.requests_to(1, Method.ROUTES)
    assert world.requests_to(2, Method.ROUTES)


def test_no_more_ranges_are_cached_than_set_and_all_are_found_again():
    """However many there are: a client that scans them all keeps a bounded part."""
    world = World(nodes=1, settings=Settings(ranges_cached_max=5, routes_per_lookup=3))
    for number in range(1, 20):
        world.cluster.split(b"%02d" % number)
    cache = world.core.router.cache
    for _ in range(2):
        for number in range(20):
            world.run(world.put(b"%02d" % number, b"v"))
            assert len(cache) <= 5
    calls = [world.get(b"%02d" % number) for number in range(20)]
    world.run(*calls)
    assert len(cache) <= 5
    assert all(call.result is not None for call in calls)


def test_of_two_descriptors_of_the_placement_group_the_newer_stays():
    """Who leads it in somebody's eyes fills a gap and overrides nothing that was seen."""
    cache = World().core.router.cache

    def descriptor(membership, *nodes):
        replicas = tuple(Member(NodeId(node), ReplicaId(node)) for node in nodes)
        return RangeDescriptor(RangeId(0), KeyRange(b"", b""), Epoch(membership, 1), replicas)

    assert cache.insert(descriptor(2, 1, 2), 9) == []
    placement = cache.placement
    assert placement.leader is None, "no replica of it"
    assert cache.insert(descriptor(1, 1), 1) is None
    assert (placement.nodes, placement.leader) == ((1, 2), 1)
    assert cache.insert(descriptor(3, 1, 2, 3), 2) == []
    assert (placement.nodes, placement.leader) == ((1, 2, 3), 1)
    assert cache.insert(descriptor(4, 2, 3), 8) == []
    assert (placement.nodes, placement.leader) == ((2, 3), None)
    assert cache.insert(descriptor(4, 2, 3), 3) is None
    assert placement.leader == 3
    assert cache.placement is placement


def test_of_two_descriptors_that_overlap_the_newer_stays():
    """DESIGN §4.9: the larger span generation wins in clients too."""
    world = World()
    cache = world.core.router.cache
    replicas = (Member(NodeId(1), ReplicaId(1)),)

    def descriptor(range_id, start, end, generation):
        return RangeDescriptor(RangeId(range_id), KeyRange(start, end), Epoch(1, generation), replicas)

    assert cache.insert(descriptor(1, b"", None, 5), 1) == []
    assert cache.insert(descriptor(2, b"m", None, 5), 1) is None, "the same generation does not evict"
    assert cache.insert(descriptor(2, b"m", None, 4), 1) is None
    (evicted,) = cache.insert(descriptor(2, b"m", None, 6), 1)
    assert evicted.range_id == 1
    assert cache.find(b"a") is None
    assert cache.find(b"z").range_id == 2
    cache.insert(descriptor(1, b"", b"m", 6), 1)
    assert cache.find(b"a").range_id == 1
    cache.check()


@pytest.mark.parametrize(("reverse", "asked"), [(False, (b"a", b"m")), (True, (b"m", b"z"))])
def test_a_page_is_asked_of_no_more_than_the_range_is_known_to_hold(reverse, asked):
    """A replica that lags behind a split would answer with keys of the other half, which the next page brings again."""
    world = World(nodes=1)
    world.cluster.split(b"m")
    world.run(world.scan(b"a", b"z", consistency=2, reverse=reverse))
    (request,) = world.requests_to(1, Method.SCAN)
    assert tuple(request.arguments[1:3]) == asked


def test_the_child_of_a_split_is_sought_where_its_parent_was_led():
    """It is led there at first; guessing otherwise would cost a round trip for each split."""
    world = World()
    world.cluster.range_of(b"z").leader = 3
    world.run(world.put(b"z", b"v"))
    world.cluster.split(b"m")
    world.run(world.put(b"z", b"w"))
    assert {node for node, asked in world.frames if asked[0].method == Method.WRITE} == {3}


@given(st.binary(min_size=1, max_size=6), st.binary(max_size=6))
def test_a_reverse_scan_is_routed_by_the_greatest_key_below_its_end(end, other):
    """No key is longer than allowed, so every key has a predecessor; a range boundary cannot lie between the two."""
    found = before(end)
    assert found < end
    assert not found < other < end
    assert len(found) <= KEY_BYTES_MAX
