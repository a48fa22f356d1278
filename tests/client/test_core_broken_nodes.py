"""What no sound node says costs the connection that it came by, and no call its right answer."""

import pytest

from shardkv.wire import requests
from shardkv.wire.frames import FrameKind, encode_frame
from shardkv.wire.requests import Method
from tests.client.world import World


def test_a_peer_that_breaks_the_protocol_is_dropped():
    world = World(nodes=1)
    world.run(world.put(b"k", b"v"))
    call = world.put(b"k", b"w")
    world.core.flush(world.now)
    (link,) = world.open
    world.core.link_bytes(link, encode_frame(FrameKind.RESPONSE, b"\x81\x01"), world.now)
    assert world.core.links.drops == [link]
    world.run(call)
    assert call.attempts == 2


@pytest.mark.parametrize(
    "result",
    [[], [1, 2], ["x"], [None], [[1]], 5, [True]],
    ids=repr,
)
def test_an_answer_of_another_shape_costs_the_connection_not_the_call(result):
    """Validate where bytes come in: a broken node must not make a put return nonsense."""
    world = World(nodes=1)
    world.run(world.put(b"k", b"v"))
    node = world.cluster.nodes[1]
    handle = node._handle
    broken = [True]

    def once(request):
        if request.method == Method.WRITE and broken.pop():
            node._handle = handle
            return result
        return handle(request)

    node._handle = once
    call = world.put(b"k", b"w")
    world.run(call)
    assert call.attempts == 2
    assert len(world.dials) == 2


@pytest.mark.parametrize("result", [[], [None], [None] * 3, None, [1, 1], [None, [b"v"]], [None, ["v", 1]]], ids=repr)
def test_values_of_another_shape_cost_the_connection_not_the_call(result):
    """One value short, and a call would never be answered; one too many, and another's would be taken for its own."""
    world = World(nodes=1)
    version = world.run(world.put(b"k", b"v"))
    node = world.cluster.nodes[1]
    handle = node._handle

    def once(request):
        if request.method != Method.GET:
            return handle(request)
        node._handle = handle
        return result

    node._handle = once
    calls = [world.get(b"k"), world.get(b"k")]
    world.run(*calls)
    assert [call.result for call in calls] == [[b"v", version]] * 2
    assert len(world.dials) == 2


@pytest.mark.parametrize("greeted", [True, False])
def test_an_answer_that_nobody_waits_for_costs_the_connection(greeted):
    """It may be another's, or come from a node that does not know what it does."""
    world = World(nodes=1)
    if greeted:
        world.run(world.put(b"k", b"v"))
    else:
        world.mute.add(1)
        world.get(b"k")
        world.pass_time(0.01)
    (link,) = world.open
    assert link.greeted is greeted
    answer = requests.encode_response(4711, world.cluster.clock, None)
    world.core.link_bytes(link, encode_frame(FrameKind.RESPONSE, requests.join([answer])), world.now)
    assert world.core.links.drops == [link]
    assert "broke the protocol" in str(world.core.links.problem)


@pytest.mark.parametrize(
    "page",
    [
        [[b"b", b"v", 1, b"a", b"v", 1], False],
        [[b"a", b"v", 1, b"a", b"v", 1], False],
        [[b"a", b"v", 1, b"z", b"v", 1], False],
        [[b"A", b"v", 1], False],
        [[b"a", b"v", 1, b"b", b"v", 1, b"c", b"v", 1], False],
        [[], True],
        [[b"a", b"v"], False],
        [["a", b"v", 1], False],
        [[b"a", b"v", 1]],
    ],
    ids=repr,
)
def test_a_page_that_no_scan_can_have_costs_the_connection(page):
    """Out of order, twice, outside the span, above the limit, empty but not the last: none of it reaches the caller."""
    world = World(nodes=1)
    world.run(world.put(b"b", b"v"))
    node = world.cluster.nodes[1]
    handle = node._handle
    broken = [True]

    def once(request):
        return page if request.method == Method.SCAN and broken.pop() else handle(request)

    node._handle = lambda request: once(request) if broken else handle(request)
    call = world.scan(b"a", b"d", limit=2)
    flat, more, _ = world.run(call)
    assert flat[0] == b"b"
    assert not more
    assert call.attempts == 2
