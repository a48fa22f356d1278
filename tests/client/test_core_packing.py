"""What travels together, and how much of it at most: calls in a request, requests in a frame and on their way."""

import pytest

from shardkv import errors
from shardkv.wire import commands
from shardkv.wire.requests import Method
from shardkv_client.core import Settings
from tests.client.world import World


def test_calls_of_one_moment_share_a_request_and_a_frame():
    """DESIGN §5: the cost is per batch. Writes of one range share a WRITE, gets a GET, both a frame."""
    world = World()
    world.run(world.put(b"k", b"v"))
    before = len(world.frames)
    calls = [world.put(b"p%d" % i, b"v") for i in range(50)] + [world.get(b"p%d" % i) for i in range(50)]
    world.run(*calls)
    ((node, asked),) = world.frames[before:]
    assert node == 1
    assert sorted(each.method for each in asked) == [Method.WRITE, Method.GET]


def test_it_is_known_whether_more_than_one_node_owes_answers():
    """Only then does a flush wait once round the loop for what others answer."""
    world = World()
    world.cluster.split(b"m", leader=2)
    world.run(world.put(b"a", b"v"), world.put(b"z", b"v"))
    assert not world.core.links.several_owe
    one = [world.get(b"a"), world.get(b"b")]
    world.core.flush(world.now)
    assert not world.core.links.several_owe
    other = world.get(b"z")
    world.core.flush(world.now)
    assert world.core.links.several_owe
    world.run(*one, other)
    assert not world.core.links.several_owe


def test_reads_and_writes_respect_each_others_timestamps():
    """DESIGN §4.4: every request carries the highest timestamp that the client has seen."""
    world = World()
    version = world.run(world.put(b"k", b"v"))
    world.run(world.get(b"k"))
    assert world.cluster.nodes[1].timestamps[-1] >= version


@pytest.mark.parametrize(
    "bound",
    [
        {"commands_per_write_max": 7},
        {"bytes_per_write_max": 5_000},
        {"bytes_per_write_max": 1, "requests_per_frame_max": 7},
        {"bytes_per_write_max": 1, "frame_bytes_target": 5_000},
    ],
    ids=str,
)
def test_requests_and_frames_hold_no_more_than_set(bound):
    """Nodes refuse those that hold more than they take, whole."""
    world = World(nodes=1, settings=Settings(**bound))
    world.run(world.put(b"k", b"v"))
    frames, bytes_of_frames = len(world.frames), []
    answer = world._answer

    def measured(link, node, kind, payload):
        bytes_of_frames.append(len(payload))
        return answer(link, node, kind, payload)

    world._answer = measured
    calls = [world.put(b"%04d" % number, bytes(500)) for number in range(100)]
    world.run(*calls)
    asked = [each for _, each in world.frames[frames:]]
    writes = [request.arguments[1] for each in asked for request in each]
    one = 600
    if "commands_per_write_max" in bound:
        assert max(len(commands.decode(write)) for write in writes) == 7
    if "requests_per_frame_max" in bound:
        assert max(map(len, asked)) == 7
    if bound.get("bytes_per_write_max") == 5_000:
        assert 4_000 < max(map(len, writes)) < 5_000 + one
    if "frame_bytes_target" in bound:
        assert 4_000 < max(bytes_of_frames) < 5_000 + one


def test_unanswered_requests_to_a_node_are_bounded_as_it_asked():
    """Welcome.inflight_max: beyond it the node stops reading, so the rest waits here."""
    world = World(nodes=1, settings=Settings(keys_per_get_max=1))
    world.inflight_max = 4
    world.run(world.put(b"k", b"v"))
    calls = [world.get(b"k%d" % i) for i in range(50)]
    most = 0
    while not all(call.done for call in calls):
        world.step()
        most = max(most, max((len(link.inflight) for link in world.open), default=0))
    assert most == 4


def test_a_get_that_is_too_large_together_is_asked_in_halves():
    """A node refuses an answer above its frame bound; one at a time always fits."""
    world = World(nodes=1)
    world.run(world.put(b"k", b"v"))
    world.cluster.nodes[1].faults.append(
        lambda request: (
            errors.ValueTooLarge("more than a frame")
            if request.method == Method.GET and len(request.arguments[1]) > 3
            else None
        )
    )
    calls = [world.get(b"k") for _ in range(40)]
    world.run(*calls)
    assert all(call.result[0] == b"v" for call in calls)


def test_a_get_that_is_refused_alone_is_refused_for_good():
    world = World(nodes=1)
    world.run(world.put(b"k", b"v"))
    world.cluster.nodes[1].faults.append(
        lambda request: errors.ValueTooLarge("more than a frame") if request.method == Method.GET else None
    )
    with pytest.raises(errors.ValueTooLarge):
        world.run(world.get(b"k"))
    assert len(world.requests_to(1, Method.GET)) == 1
