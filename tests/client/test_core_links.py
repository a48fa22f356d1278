"""Connections to nodes: when one is waited for, kept, drained and given up (DESIGN §4.6)."""

import pytest

from shardkv import errors
from shardkv.wire.frames import FrameKind, encode_frame
from shardkv.wire.requests import Method
from shardkv_client.core import Settings
from tests.client.world import World


def test_a_mute_leader_is_given_up_after_its_silence():
    """A node that hangs keeps its connections: a ping that is not answered ends them."""
    world = World()
    world.run(world.put(b"k", b"v"))
    world.mute.add(1)
    world.cluster.range_of(b"k").leader = 2
    started = world.now
    world.run(world.put(b"k", b"w"))
    assert 1.4 < world.now - started < 2.0


@pytest.mark.parametrize("pauses", [(5.0,), (0.6, 5.0)], ids=["before the ping", "after the ping"])
def test_a_program_that_stood_still_asks_a_node_and_reads_before_it_gives_it_up(pauses: tuple[float, ...]):
    """Its timers come due before it has read the answers that lie in the socket; one that computes in long pieces
    meets its timer and the answer to its ping at the same moment, every time."""
    world = World(nodes=1)
    world.run(world.put(b"k", b"v"))
    call = world.put(b"k", b"w")
    world.core.flush(world.now)
    world._perform()
    for pause in pauses:
        world.now += pause
        world.core.tick(world.now)
        world._perform()
    world.run(call)
    assert call.attempts == 1
    assert len(world.dials) == 1


def test_a_slow_node_that_answers_pings_is_kept():
    """Silence means no bytes at all, not a late answer."""
    world = World(nodes=1)
    world.run(world.put(b"k", b"v"))
    answer = world._answer
    world._answer = lambda link, node, kind, payload: (  # type: ignore[method-assign]
        answer(link, node, kind, payload) if kind is not FrameKind.REQUEST else None
    )
    call = world.put(b"k", b"w", timeout=8.0)
    with pytest.raises(errors.OutcomeUnknown):
        world.run(call)
    assert len(world.dials) == 1
    assert call.attempts == 1


def test_a_node_that_says_goodbye_gets_nothing_new_but_may_answer():
    world = World()
    world.run(world.put(b"k", b"v"))
    (link,) = (link for link, node in world.open.items() if node.id == 1)
    call = world.put(b"k", b"w")
    world.core.flush(world.now)
    world.core.link_bytes(link, encode_frame(FrameKind.GOODBYE, b""), world.now)
    world.cluster.range_of(b"k").leader = 1
    world._perform()
    world.run(call)
    assert call.attempts == 1
    world.cluster.range_of(b"k").leader = 2
    written = len(world.requests_to(1, Method.WRITE))
    dialled = world.dials.count(link.address)
    world.run(world.put(b"k", b"x"))
    assert world.requests_to(2, Method.WRITE)
    assert len(world.requests_to(1, Method.WRITE)) == written
    assert world.dials.count(link.address) == dialled, "nor is it dialled at once"


def test_a_link_that_drains_is_kept_once_and_until_it_ends():
    """Else a client would outlive its nodes' restarts with more and more of them."""
    world = World()
    world.run(world.put(b"k", b"v"))
    links = world.core.links
    (link,) = (link for link, node in world.open.items() if node.id == 1)
    for _ in range(2):
        world.core.link_bytes(link, encode_frame(FrameKind.GOODBYE, b""), world.now)
        assert links.close().count(link) == 1
    world.cut(link)
    assert link not in links.close()
    world.core.link_bytes(link, encode_frame(FrameKind.GOODBYE, b""), world.now)
    assert link not in links.close()


def test_a_node_that_asks_whether_this_client_lives_is_answered():
    world = World(nodes=1)
    world.run(world.put(b"k", b"v"))
    (link,) = world.open
    world.core.link_bytes(link, encode_frame(FrameKind.PING, b"7"), world.now)
    assert link.output == [encode_frame(FrameKind.PONG, b"7")]


def test_calls_that_waited_for_room_at_a_node_that_says_goodbye_and_dies_go_elsewhere():
    world = World(settings=Settings(keys_per_get_max=1))
    world.inflight_max = 1
    world.run(world.put(b"k", b"v"))
    (link,) = (link for link, node in world.open.items() if node.id == 1)
    world.mute.add(1)
    calls = [world.get(b"k") for _ in range(3)]
    world.settle()
    assert len(link.peer.waiting) == 2
    world.core.link_bytes(link, encode_frame(FrameKind.GOODBYE, b""), world.now)
    world.crash(1)
    world.cluster.range_of(b"k").leader = 2
    world.run(*calls)
    assert [call.error for call in calls] == [None] * 3


def test_a_node_that_accepts_but_never_greets_is_given_up():
    """The dial and its greeting have a bound of their own; the call goes elsewhere after it."""
    world = World()
    world.cluster.range_of(b"k").leader = 3
    world.mute.add(3)
    call = world.put(b"k", b"v")
    world.pass_time(1.0)
    assert not call.done
    world.cluster.range_of(b"k").leader = 2
    started = world.now
    world.run(call)
    assert world.now - started < 1.5
    assert call.attempts >= 1


def test_a_node_that_never_greets_keeps_nobody_from_being_dialled_again():
    """Nodes of a new cluster listen before they serve. While one of them is waited for, the one that was not up yet is
    tried again as soon as its backoff is over, not when the wait has been given up.
    """
    world = World(seeds=[1, 3])
    world.down.add(1)
    world.mute.add(3)
    call = world.admin(Method.STATUS)
    world.pass_time(0.3)
    assert not call.done
    world.down.clear()
    started = world.now
    assert world.run(call)["node"] == 1
    assert world.now - started <= world.core.settings.backoff_seconds_max + 0.01


def test_nodes_that_never_greet_leave_places_to_those_that_would():
    """``dials_at_once_max`` bounds how many are tried at a time; a dial without an answer gives its place up soon."""
    world = World(nodes=6, seeds=[1, 2, 3, 4, 5, 6], settings=Settings(dials_at_once_max=2))
    world.mute.update([1, 2, 3, 4, 5])
    started = world.now
    assert world.run(world.admin(Method.STATUS))["node"] == 6
    assert world.now - started < 1.0
    assert len(world.dials) == 6, "nobody is dialled twice while he is waited for"


def test_calls_that_wait_for_any_node_share_one_timer():
    """However many wait, and however often a dial fails meanwhile, time is looked at once for each attempt."""
    world = World(seeds=[1, 3])
    world.down.add(1)
    world.mute.add(3)
    calls = [world.admin(Method.STATUS) for _ in range(50)]
    world.pass_time(1.0)
    core = world.core
    assert sum(action == core._dispatcher.retry_anywhere for _, _, action in core.timers._actions) == 1
    world.down.clear()
    world.run(*calls)
