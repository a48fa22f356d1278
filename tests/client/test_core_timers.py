"""Deadlines in one heap, at a constant cost and a bounded size."""

from math import inf

from shardkv_client.core.calls import Call
from shardkv_client.core.timers import DEAD_ENTRIES_MIN, Timers
from tests.client.world import World


def test_calls_that_ended_do_not_pile_up():
    """At 20,000 calls a second and 10 s each, a heap that only grew would hold 200,000 dead calls."""
    timers = Timers(lambda: None)
    live = [Call(None, 5.0, 0) for _ in range(10)]
    for call in live:
        timers.add_deadline(call)
    for step in range(50_000):
        call = Call(None, 10.0 + step / 20_000, 0)
        timers.add_deadline(call)
        call.done = True
        assert len(timers._deadlines) <= 2 * (len(live) + 1 + DEAD_ENTRIES_MIN)
    timers.check()
    assert timers.live() == live


def test_what_is_due_is_known_and_the_timer_is_woken_only_for_something_earlier():
    woken = []
    timers = Timers(lambda: woken.append(timers.due))
    first, second, third = Call(None, 5.0, 0), Call(None, 7.0, 0), Call(None, 3.0, 0)
    for call in (first, second, third):
        timers.add_deadline(call)
    assert woken == [5.0, 3.0]
    third.done = True
    expired = []
    timers.run(6.0, expired.append)
    assert expired == [first]
    assert timers.due == 6.5, "others may come, and be due earlier"
    timers.run(6.5, expired.append)
    assert timers.due == 7.0, "none came"
    second.done = True
    timers.run(6.6, expired.append)
    assert timers.due == inf
    timers.check()


def test_the_timer_is_not_set_anew_for_every_call_of_a_few_a_second():
    """Each call is due before nothing at all, and its ping before it; both woke the timer's task, for each call."""
    woken = []
    timers = Timers(lambda: woken.append(timers.due))
    for step in range(200):
        now = 0.1 * step
        call = Call(None, now + 10.0, 0)
        timers.add_deadline(call)
        timers.at(now + 0.5, lambda at: None)
        call.done = True
        while timers.due <= now + 0.1:
            timers.run(timers.due, lambda call: None)
    assert len(woken) == 2


def test_a_large_value_gets_through_a_slow_network():
    """The node cannot answer before it has the request, nor the ping that stands behind it; that is no silence."""
    world = World()
    world.run(world.put(b"first", b""))
    dials = len(world.dials)
    world.bytes_per_second = 400_000
    call = world.put(b"large", bytes(1_000_000), timeout=10.0)
    world.run(call)
    assert call.error is None
    assert call.attempts == 1
    assert len(world.dials) == dials


def test_a_node_that_is_gone_is_given_up_however_much_was_sent_to_it():
    world = World()
    world.run(world.put(b"first", b""))
    world.cluster.ranges[1].leader = 1
    began = world.now
    world.mute.add(1)
    calls = [world.put(b"large/%d" % number, bytes(1_000_000), timeout=20.0) for number in range(8)]
    world.pass_time(1.4)
    world.cluster.ranges[1].leader = 2
    for call in calls:
        world.run(call)
        assert call.error is None
    assert 1.5 < world.now - began < 6.5
