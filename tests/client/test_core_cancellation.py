"""Calls that are cancelled: what is not sent any more, what may still apply, and what settles it."""

import pytest

from shardkv import errors
from shardkv.wire import commands
from shardkv.wire.requests import Method
from shardkv_client.core import Settings
from tests.client.world import CAME_TO_NOTHING, World, refusing


def test_a_write_that_waits_to_be_issued_anew_can_be_cancelled_and_times_out():
    world = World(nodes=1)
    world.run(world.put(b"k", b"v"))
    world.cluster.nodes[1].faults.append(
        lambda request: errors.TooOld("old") if request.method == Method.WRITE else None
    )
    call = world.put(b"k", b"w", timeout=3.0)
    world.pass_time(0.3)
    world.core.cancel(call)
    world.pass_time(1.0)
    assert call.done
    with pytest.raises(errors.Unavailable, match="nothing was applied"):
        world.run(world.put(b"k", b"x", timeout=2.03))


def test_a_cancelled_write_keeps_its_place_until_it_is_answered():
    """It is settled at once, for it is never sent again; its bytes in flight may be executed all the same."""
    world = World(nodes=1)
    world.run(world.put(b"k", b"v"))
    call = world.put(b"k", b"w")
    world.core.flush(world.now)
    world.core.cancel(call)
    assert not call.done
    assert world.core.ledger.calls_active == 1
    assert world.core.session.unsettled == set()
    world._perform()
    world.settle()
    assert call.done
    assert world.core.ledger.calls_active == 0
    assert world.cluster.data[b"k"][0] == b"w", "a cancelled write may still apply"


def test_a_cancelled_write_is_not_sent_again():
    world = World(nodes=1)
    world.run(world.put(b"k", b"v"))
    world.lose_requests = 1
    call = world.put(b"k", b"w")
    world.core.flush(world.now)
    world.core.cancel(call)
    world._perform()
    world.pass_time(1.0)
    assert call.done
    assert call.attempts == 1
    assert world.cluster.data[b"k"][0] == b"v"


def test_a_further_write_of_its_client_settles_a_cancelled_one():
    """docs/client.md: once that is answered, the cancelled one has been applied before it or never will be. Its bytes
    may still be on their way to a leader, and reach it after the answer."""
    world = World()
    world.run(world.put(b"k", b"v"))
    world.mute.add(1)
    cancelled = world.put(b"k", b"cancelled")
    world.pass_time(0.2)
    late = cancelled.sealed
    world.core.cancel(cancelled)
    further = world.put(b"k", b"further")
    world.pass_time(0.2)
    world.cluster.range_of(b"k").leader = 2
    world.run(further)
    target = world.cluster.range_of(b"k")
    (command,) = commands.decode(commands.join([late]))
    world.cluster.apply(target, b"s" * 16, target.descriptor.epoch.span, command, late)
    assert world.cluster.data[b"k"][0] == b"further"


@pytest.mark.parametrize("error", CAME_TO_NOTHING, ids=repr)
def test_a_cancelled_write_of_which_nothing_came_is_not_sent_again(error):
    world = refusing(error)
    call = world.put(b"k", b"w")
    world.core.flush(world.now)
    world.core.cancel(call)
    world._perform()
    world.pass_time(1.0)
    assert call.done
    assert world.core.session.unsettled == set()
    assert world.cluster.data[b"k"][0] == b"v"


def test_a_cancelled_read_gives_its_place_to_the_next_at_once():
    """Nothing follows from it: whoever waits for a place must not wait for an answer that nobody wants."""
    world = World(nodes=1, settings=Settings(calls_in_flight_max=1))
    world.run(world.put(b"k", b"v"))
    world.mute.add(1)
    first, second = world.get(b"k"), world.get(b"k")
    world.core.flush(world.now)
    assert (first.attempts, second.admitted) == (1, False)
    world.core.cancel(first)
    assert first.done
    assert second.admitted


def test_a_cancelled_write_that_was_not_sent_never_is():
    world = World(nodes=1)
    call = world.put(b"k", b"w")
    world.core.cancel(call)
    assert call.done
    world.pass_time(1.0)
    assert not world.cluster.data
