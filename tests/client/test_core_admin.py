"""Admin calls: which node is asked, and what is known of their outcome."""

import pytest

from shardkv import errors
from shardkv.types import Epoch, KeyRange, RangeDescriptor, RangeId
from shardkv.wire.requests import Method
from tests.client.world import World


def test_admin_calls_go_where_they_are_told():
    world = World()
    world.cluster.split(b"m", leader=2)
    world.cluster.add_range(b"", b"").descriptor  # noqa: B018 - the next id is taken
    del world.cluster.ranges[3]
    placement = world.cluster.ranges[1].descriptor
    world.cluster.ranges[0] = type(world.cluster.ranges[1])(
        RangeDescriptor(RangeId(0), KeyRange(b"", b""), Epoch(1, 1), placement.replicas), 3
    )
    assert world.run(world.admin(Method.SPLIT, b"x", key=b"z"))["node"] == 2
    assert world.run(world.admin(Method.SPLIT, b"x", range_id=2))["node"] == 2
    assert world.run(world.admin(Method.PLACEMENT, 1, range_id=0)) == {"node": 3, "range": 0, "arguments": [1]}
    assert world.run(world.admin(Method.NODE_STATUS, node_id=3))["node"] == 3
    assert "node" in world.run(world.admin(Method.STATUS))
    with pytest.raises(errors.NotFound):
        world.run(world.admin(Method.NODE_STATUS, node_id=77))
    with pytest.raises(errors.NotFound):
        world.run(world.admin(Method.SPLIT, b"x", range_id=77))


def test_an_admin_call_that_is_not_repeatable_is_never_sent_twice():
    """Its outcome is unknown as soon as its answer is lost."""
    world = World(nodes=1)
    world.run(world.put(b"k", b"v"))
    call = world.admin(Method.SPLIT, b"x", key=b"k")
    world.core.flush(world.now)
    (link,) = world.open
    world.cut(link)
    with pytest.raises(errors.OutcomeUnknown):
        world.run(call)
    again = world.admin(Method.STATUS, repeatable=True)
    world.core.flush(world.now)
    assert world.run(again)["node"] == 1


@pytest.mark.parametrize(
    "refusal", [errors.Busy("full"), errors.EpochMismatch(), errors.NotLeader(), errors.RangeNotFound("gone")]
)
def test_an_admin_call_that_every_node_refused_was_certainly_not_carried_out(refusal):
    world = World(nodes=1)
    world.run(world.put(b"k", b"v"))
    world.cluster.nodes[1].faults.append(lambda request: refusal if request.method == Method.SPLIT else None)
    call = world.admin(Method.SPLIT, b"x", key=b"k", timeout=2.0)
    with pytest.raises(errors.Unavailable):
        world.run(call)
    assert len(world.requests_to(1, Method.SPLIT)) > 1
    world.core.check()


@pytest.mark.parametrize("doubtful", [errors.NotLeader(logged=True), errors.Unavailable("not over in time")])
def test_an_admin_call_that_a_node_had_begun_may_have_been_carried_out(doubtful):
    world = World(nodes=1)
    world.run(world.put(b"k", b"v"))
    answers = [doubtful]
    world.cluster.nodes[1].faults.append(
        lambda request: (answers.pop() if answers else errors.Busy("full")) if request.method == Method.SPLIT else None
    )
    with pytest.raises(errors.OutcomeUnknown):
        world.run(world.admin(Method.SPLIT, b"x", key=b"k", timeout=2.0))


@pytest.mark.parametrize("repeatable", [False, True])
def test_an_admin_call_whose_outcome_a_node_does_not_know_is_only_sent_again_where_that_is_safe(repeatable):
    world = World(nodes=1)
    world.run(world.put(b"k", b"v"))
    answers = [errors.OutcomeUnknown("it was under way")]
    world.cluster.nodes[1].faults.append(
        lambda request: answers.pop() if request.method == Method.SPLIT and answers else None
    )
    call = world.admin(Method.SPLIT, b"x", key=b"k", repeatable=repeatable)
    if repeatable:
        assert world.run(call)["node"] == 1
    else:
        with pytest.raises(errors.OutcomeUnknown):
            world.run(call)
    assert len(world.requests_to(1, Method.SPLIT)) == 1 + repeatable


def test_an_admin_call_that_may_be_repeated_outlives_its_connection():
    world = World(nodes=1)
    world.run(world.put(b"k", b"v"))
    call = world.admin(Method.STATUS, repeatable=True)
    world.core.flush(world.now)
    (link,) = world.open
    assert link.inflight
    world.cut(link)
    assert world.run(call)["node"] == 1
