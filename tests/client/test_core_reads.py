"""Follower and stale reads: who serves them, how old they are, and whom they do not wait for (DESIGN §2.3)."""

from typing import Any
from unittest.mock import patch

import pytest

from shardkv import errors
from shardkv.wire.requests import Method
from tests.client.fake_cluster import FakeNode
from tests.client.world import World


def test_follower_reads_stay_with_one_replica_and_leave_it_when_it_fails():
    world = World()
    world.run(world.put(b"k", b"v"))
    world.run(world.get(b"k", consistency=1))
    world.run(world.get(b"k", consistency=2))
    (reader,) = {node for node, asked in world.frames if asked[0].method == Method.GET}
    world.crash(reader)
    assert world.run(world.get(b"k", consistency=1))[0] == b"v"


def test_stale_reads_go_on_while_there_is_no_leader():
    """Any replica serves them, so a range that waits for its election does not hold them up."""
    world = World()
    world.run(world.put(b"k", b"v"))
    world.run(world.get(b"k", consistency=2))
    world.cluster.range_of(b"k").leader = None
    stuck = world.put(b"k", b"w", timeout=3.0)
    for _ in range(20):
        world.pass_time(0.02)
        started = world.now
        assert world.run(world.get(b"k", consistency=2))[0] == b"v"
        assert world.now - started < 0.004
    assert not stuck.done


def test_a_stale_read_says_how_old_its_answer_is():
    """DESIGN 2.3: the answer says how stale at most."""
    world = World()
    world.run(world.put(b"k", b"v"))
    world.cluster.range_of(b"k").leader = None
    call = world.get(b"k", consistency=2)
    assert world.run(call)[0] == b"v"
    assert call.age_us == 1_500


@pytest.mark.parametrize("seed", range(6))
def test_a_stale_read_with_a_bound_ends_at_the_leader_where_every_other_replica_is_too_old(seed: int):
    """DESIGN 4.5: a replica past the bound refuses; the next one is asked, and then the leader that was named."""
    world = World(nodes=5, seed=seed)
    world.cluster.move(b"", [1, 2, 3, 4, 5], leader=4)
    world.run(world.put(b"k", b"v"))
    for node in world.cluster.nodes.values():
        node.age_us = 5_000_000
    call = world.get(b"k", consistency=2, age_us_max=1_000_000)
    assert world.run(call)[0] == b"v"
    assert call.age_us == 0
    asked = [node for node, requests in world.frames if requests[0].method == Method.GET]
    assert asked[-1] == world.cluster.range_of(b"k").leader
    assert len(asked) <= 3
    again = world.get(b"k", consistency=2, age_us_max=1_000_000)
    world.run(again)
    assert again.age_us == 0, "and is asked from then on"


def test_stale_reads_with_different_bounds_do_not_share_a_request():
    """A request has one bound, and its answer one age."""
    world = World()
    world.run(world.put(b"k", b"v"))
    world.frames.clear()
    calls = [world.get(b"k", consistency=2, age_us_max=bound) for bound in (None, 7_000_000, None, 9_000_000)]
    for call in calls:
        world.run(call)
    asked = [each.arguments for _, requests in world.frames for each in requests if each.method == Method.GET]
    bounds_and_counts = sorted((bound or 0, len(keys)) for _, keys, bound in asked)
    assert bounds_and_counts == [(0, 2), (7_000_000, 1), (9_000_000, 1)]


@pytest.mark.parametrize("answer", [[None], [-1, [None]], [2_000_001, [None]], ["1", [None]], [1]], ids=repr)
def test_an_answer_to_a_stale_read_without_an_age_within_its_bound_ends_the_connection(answer: object):
    """Whoever asked relies on the bound, so it is checked where bytes come in."""
    world = World()
    world.run(world.put(b"k", b"v"))
    original = FakeNode._handle

    def handle(node: FakeNode, request: Any) -> Any:
        return answer if request.method == Method.GET else original(node, request)

    with patch.object(FakeNode, "_handle", handle):
        call = world.get(b"k", consistency=2, age_us_max=2_000_000, timeout=0.5)
        with pytest.raises(errors.Unavailable, match="broke the protocol"):
            world.run(call)


def test_clients_spread_their_follower_reads():
    """The first goes to who is connected; meanwhile the others are dialled."""
    readers = set()
    for seed in range(12):
        world = World(seed=seed)
        world.run(world.get(b"k", consistency=1))
        world.settle()
        world.frames.clear()
        world.run(world.get(b"k", consistency=1))
        readers |= {node for node, asked in world.frames if asked[0].method == Method.GET}
    assert readers == {1, 2, 3}


@pytest.mark.parametrize("consistency", [1, 2], ids=["follower", "stale"])
def test_follower_and_stale_reads_do_not_wait_for_a_node_that_hangs(consistency):
    """Any replica will do, so one that accepts and never greets costs nobody time, now or later."""
    for seed in range(6):
        world = World(seeds=[1, 2], seed=seed)
        world.mute.add(3)
        for _ in range(40):
            started = world.now
            world.run(world.get(b"k", consistency=consistency))
            assert world.now - started < 0.05, f"seed {seed}"
            world.pass_time(0.15)
        assert len(world.dials) < 10, "nor is it dialled all the time"


def test_the_one_replica_that_lives_is_found_while_the_others_hang():
    world = World(seeds=[1, 2, 3])
    world.mute.update((1, 2))
    call = world.get(b"k", consistency=2, timeout=1.0)
    world.run(call)
    assert len(world.requests_to(3, Method.GET)) == 1


@pytest.mark.parametrize(
    "refusal", [None, errors.Busy("this replica knows no leader"), errors.RangeNotFound("not here yet")], ids=repr
)
def test_a_near_replica_that_refuses_is_passed_over_for_a_while(refusal):
    """It is too old, knows no leader, or is new: not every read goes by way of it, and once it serves it is found."""
    for seed in range(4):
        world = World(seeds=[1, 2, 3], seed=seed)
        world.seconds_away.update({2: 0.02, 3: 0.02})
        world.cluster.range_of(b"k").leader = 3
        world.run(world.put(b"k", b"v"))
        world.pass_time(1.0)
        node = world.cluster.nodes[1]
        bound = None
        if refusal is None:
            node.age_us, bound = 60_000_000, 1_000_000
        else:
            node.faults.append(lambda request: refusal if request.method == Method.GET else None)
        consistency = 2 if bound else 1
        world.run(world.get(b"k", consistency=consistency, age_us_max=bound))
        world.frames.clear()
        for _ in range(20):
            world.run(world.get(b"k", consistency=consistency, age_us_max=bound))
        asked = [request for _, requests in world.frames for request in requests]
        assert sum(request.method == Method.GET for request in asked) == 20, f"seed {seed}"
        assert not any(request.method == Method.ROUTES for request in asked)
        node.age_us = 0
        node.faults.clear()
        world.pass_time(2.0)
        world.frames.clear()
        world.run(world.get(b"k", consistency=consistency, age_us_max=bound))
        assert [number for number, _ in world.frames] == [1]


def test_stale_reads_go_on_while_a_write_waits_for_a_leader_and_most_nodes_hang():
    """The write's failures are not theirs."""
    for seed in range(6):
        world = World(seeds=[1, 2, 3], seed=seed)
        world.run(world.put(b"k", b"v"))
        world.run(world.get(b"k", consistency=2))
        world.pass_time(0.5)
        world.mute.update((1, 2))
        world.cluster.range_of(b"k").leader = None
        stuck = world.put(b"k", b"w", timeout=60.0)
        world.pass_time(4.0)
        for _ in range(100):
            started = world.now
            assert world.run(world.get(b"k", consistency=2, timeout=1.0))[0] == b"v"
            assert world.now - started < 0.05, f"seed {seed}"
            world.pass_time(0.05)
        assert not stuck.done


def refuse_follower_reads(world, nodes):
    """As replicas do that know no leader. Whatever else, they count."""
    asked = []

    def refusal(request):
        if request.method == Method.GET and request.arguments[0] == 1:
            asked.append(request)
            return errors.Busy("this replica knows no leader")
        return None

    for number in nodes:
        world.cluster.nodes[number].faults.append(refusal)
    return asked


def test_follower_reads_that_nobody_serves_are_paced_and_turn_no_stale_read_away_from_a_near_replica():
    world = World(seeds=[1, 2, 3])
    world.seconds_away.update({2: 0.05, 3: 0.05})
    world.run(world.put(b"k", b"v"))
    world.run(world.get(b"k", consistency=2))
    world.pass_time(1.0)
    asked = refuse_follower_reads(world, (1, 2, 3))
    waiting = world.get(b"k", consistency=1, timeout=30.0)
    started = world.now
    while world.now < started + 5.0:
        read_at = world.now
        world.run(world.get(b"k", consistency=2))
        assert world.now - read_at < 0.01
    assert not waiting.done
    assert 25 < len(asked) < 150


def test_stale_reads_with_a_bound_that_no_replica_meets_keep_none_from_the_others_without_one():
    """They shared one backoff, and whoever was too old for the ones was passed over for the others as well."""
    for seed in range(4):
        world = World(seeds=[1, 2, 3], seed=seed)
        world.seconds_away.update({2: 0.05, 3: 0.05})
        world.run(world.put(b"k", b"v"))
        world.run(world.get(b"k", consistency=2))
        world.pass_time(1.0)
        for node in world.cluster.nodes.values():
            node.age_us = 5_000_000
        world.cluster.range_of(b"k").leader = None
        waiting = world.get(b"k", consistency=2, age_us_max=1_000_000, timeout=30.0)
        for _ in range(50):
            started = world.now
            world.run(world.get(b"k", consistency=2))
            assert world.now - started < 0.01, f"seed {seed}"
            world.pass_time(0.05)
        assert not waiting.done
        world.cluster.range_of(b"k").leader = 3
        world.run(waiting)
        assert waiting.age_us == 0


def test_stale_reads_of_a_range_that_nobody_serves_keep_none_of_other_ranges_waiting():
    world = World(seeds=[1, 2, 3])
    world.run(world.put(b"k", b"v"))
    refusing = world.cluster.range_of(b"k")
    world.cluster.split(b"m")
    world.run(world.put(b"z", b"v"))
    world.run(world.get(b"z", consistency=2))
    world.pass_time(1.0)
    range_id = refusing.descriptor.range_id

    def refusal(request):
        refused = request.method == Method.GET and request.range_id == range_id
        return errors.Busy("this replica has nothing of the range yet") if refused else None

    for node in world.cluster.nodes.values():
        node.faults.append(refusal)
    waiting = world.get(b"k", consistency=2, timeout=30.0)
    for _ in range(50):
        started = world.now
        world.run(world.get(b"z", consistency=2))
        assert world.now - started < 0.004
        world.pass_time(0.05)
    assert not waiting.done


def test_what_waits_for_one_reason_is_not_let_go_for_another():
    """Each has its backoff: writes without a leader are not tried more often because follower reads wait as well."""
    world = World(seeds=[1, 2, 3])
    world.run(world.put(b"k", b"v"))
    world.cluster.range_of(b"k").leader = None
    asked = refuse_follower_reads(world, (1, 2, 3))
    calls = [world.put(b"k", b"w", timeout=30.0), world.get(b"k", consistency=1, timeout=30.0)]
    world.frames.clear()
    world.pass_time(10.0)
    assert not any(call.done for call in calls)
    written = sum(request.method == Method.WRITE for _, requests in world.frames for request in requests)
    assert 50 < written < 200
    assert 50 < len(asked) < 200


def test_while_all_that_are_connected_refuse_the_others_are_dialled_as_soon_as_may_be():
    world = World(seeds=[1, 2, 3])
    world.run(world.put(b"k", b"v"))
    world.run(world.get(b"k", consistency=2))
    world.pass_time(1.0)
    refuse_follower_reads(world, (1,))
    world.crash(2)
    world.crash(3)
    world.pass_time(0.3)
    call = world.get(b"k", consistency=1, timeout=30.0)
    world.pass_time(0.05)
    world.down.clear()
    started = world.now
    world.run(call)
    assert world.now - started < 0.3


def test_a_round_trip_is_that_of_one_ping():
    """A second one that is sent before the first is answered must not pass for quick."""
    world = World(seeds=[1, 3])
    world.seconds_away[3] = 0.7
    world.cluster.range_of(b"k").leader = 3
    world.run(world.put(b"k", b"v"))
    world.pass_time(5.0)
    link = world.core.links.peer_of(3).link
    assert 0.7 <= link.round_trip_seconds < 0.71
    world.seconds_away[3] = 0.0
    world.pass_time(60.0)
    world.run(world.put(b"k", b"v"))
    assert link.round_trip_seconds < 0.01, "what was held up once is measured anew"


def test_a_node_that_takes_long_to_greet_is_not_taken_for_far():
    """One that starts accepts at once and greets when it can serve."""
    world = World(seeds=[1, 2, 3])
    world.seconds_away.update({2: 0.02, 3: 0.02})
    world.greeting_seconds[1] = 0.5
    world.run(world.put(b"k", b"v"))
    world.pass_time(2.0)
    world.frames.clear()
    for _ in range(5):
        world.run(world.get(b"k", consistency=1))
    assert [number for number, _ in world.frames] == [1] * 5


@pytest.mark.parametrize("far", [1, 2, 3])
def test_follower_reads_go_to_a_near_replica(far):
    """DESIGN 2.3. How near it is, a round trip has told; what is about as near shares the reads of all clients."""
    readers = set()
    for seed in range(12):
        world = World(seeds=[1, 2, 3], seed=seed)
        world.seconds_away[far] = 0.01
        world.run(world.get(b"k", consistency=1))
        world.pass_time(0.1)
        world.frames.clear()
        world.run(world.get(b"k", consistency=1))
        readers |= {node for node, _ in world.frames}
    assert readers == {1, 2, 3} - {far}
