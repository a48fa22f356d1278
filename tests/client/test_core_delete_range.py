"""A range of keys is deleted piece by piece, each piece exactly once, whatever splits meanwhile (DESIGN §4.6)."""

import pytest

from shardkv import errors
from shardkv.types import Epoch, KeyRange, Member, NodeId, RangeDescriptor, RangeId, ReplicaId
from shardkv.wire.requests import Method, Request
from tests.client.world import World


def delete_everything(world, start, end):
    """What Client.delete_range does, on the core."""
    while start is not None:
        start = world.run(world.delete_range(start, end))


def filled(**options):
    world = World(**options)
    calls = [world.put(b"%02d" % i, b"v") for i in range(100)]
    world.run(*calls)
    return world


@pytest.mark.parametrize("splits", [[], [b"50"], [b"20", b"50", b"70"]], ids=str)
@pytest.mark.parametrize("span", [(b"", None), (b"10", b"90"), (b"30", b"60"), (b"50", None)], ids=repr)
def test_a_delete_range_goes_from_range_to_range(splits, span):
    world = filled()
    for key in splits:
        world.cluster.split(key)
    start, end = span
    delete_everything(world, start, end)
    kept = [b"%02d" % i for i in range(100) if not (b"%02d" % i >= start and (end is None or b"%02d" % i < end))]
    assert list(world.cluster.data) == kept


@pytest.mark.parametrize("end", [b"90", None])
@pytest.mark.parametrize("applied", [True, False])
def test_a_piece_is_cut_anew_only_when_its_owner_knows_nothing_of_it(applied, end):
    """DESIGN §4.6: after a split the same bytes are sent first; only EpochMismatch from the owner allows a new cut."""
    world = filled()
    call = world.delete_range(b"10", end)
    world.lose_answers, world.lose_requests = (1, 0) if applied else (0, 1)
    while world.lose_answers or world.lose_requests:
        world.step()
    deleted_at = len(world.cluster.applied)
    world.cluster.split(b"50")
    world.run(world.get(b"60"))  # and with it the client learns of the split, before it sends the piece again
    reached = world.run(call)
    if applied:
        assert len(world.cluster.applied) == deleted_at, "the record answers, nothing is deleted again"
        assert reached is None, "all of the piece was deleted; what was written behind the split since is another's"
    else:
        assert reached == b"50"
        delete_everything(world, reached, end)
    assert list(world.cluster.data) == [b"%02d" % i for i in range(100) if i < 10 or (end is not None and i >= 90)]


PIECE = (b"c", b"x")
"""What the piece of the tests below covers: it was cut at generation 1 of a range with replicas on nodes 1 to 3."""


@pytest.mark.parametrize(
    ("span", "generation", "nodes", "anew"),
    [
        ((b"", b"m"), 2, (1, 2, 3), True),
        ((b"c", b"m"), 2, (1,), True),
        ((b"", b"m"), 1, (1, 2, 3), False),
        ((b"", b"m"), 2, (2, 3), False),
        ((b"d", b"m"), 2, (1, 2, 3), False),
        ((b"", b"c"), 2, (1, 2, 3), False),
        ((b"", b"x"), 2, (1, 2, 3), False),
        ((b"", b"z"), 2, (1, 2, 3), False),
        ((b"", None), 2, (1, 2, 3), False),
    ],
    ids=[
        "owner",
        "owner-from-the-start-on",
        "as-old-as-the-cut",
        "says-one-that-is-no-owner",
        "begins-behind-the-start",
        "ends-before-the-start",
        "as-wide",
        "wider",
        "without-an-end",
    ],
)
def test_a_piece_keeps_its_bytes_unless_a_newer_owner_of_its_start_is_narrower(span, generation, nodes, anew):
    """DESIGN §4.6: else an earlier attempt may have been applied, and deleting again under another sequence would
    delete what was written since."""
    world = World()
    world.run(world.put(b"k", b"v"))
    replicas = tuple(Member(NodeId(node), ReplicaId(100 + node)) for node in nodes)
    told = RangeDescriptor(RangeId(1), KeyRange(*span), Epoch(9, generation), replicas)
    refused = []

    def refuse_once(request: Request) -> errors.ShardKVError | None:
        if request.method != Method.WRITE or refused:
            return None
        refused.append(request)
        return errors.EpochMismatch(current=(told,))

    world.cluster.nodes[1].faults.append(refuse_once)
    call = world.delete_range(*PIECE)
    while call.sealed is None:
        world.step()
    sealed, sequence = call.sealed, call.sequence
    while world.core.links.any_ready().inflight:
        world.step()
    assert refused
    assert (call.sealed != sealed) is anew
    world.pass_time(1.0)
    assert (call.sequence != sequence) is anew
