"""Sequences, windows and stamps: what servers may forget, and the time that commands are issued by (DESIGN §4.6)."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardkv import errors
from shardkv.types import SESSION_WINDOW_MAX, timestamp_at
from shardkv.wire.requests import Method, Request
from shardkv_client.core import Settings
from shardkv_client.core.session import Session
from tests.client.fake_cluster import BASE_MS
from tests.client.world import World


def test_a_write_that_is_issued_too_far_ahead_is_tried_now_and_then():
    """Until the node's time has caught up with what the client was told elsewhere; each attempt is logged."""
    world = World(nodes=1)
    world.run(world.put(b"k", b"v"))
    world.core.session.rebase(world.cluster.clock + timestamp_at(3_000), world.now)
    world.core.session.issued_at_ms(world.now)
    before = len(world.cluster.issued)
    world.run(world.put(b"k", b"w"))
    assert len(world.cluster.issued) - before < 40
    assert len(world.cluster.windows) == len({sequence for sequence, _ in world.cluster.windows})
    assert world.core.session.unsettled == set()


def issued_an_hour_ahead() -> World:
    """A client whose last command was issued an hour ahead of what its node says: most nodes stood still so long."""
    world = World(nodes=2)
    world.cluster.split(b"m", leader=2)
    world.run(world.put(b"k", b"v"), world.put(b"z", b"v"))
    session = world.core.session
    session.rebase(world.cluster.clock + timestamp_at(3_600_000), world.now)
    session.issued_at_ms(world.now)
    return world


def test_a_client_goes_by_the_nodes_time_again_once_they_have_refused_its_own():
    """Else nothing that it writes is executed until they are where it was, for as long as they stood still."""
    world = issued_an_hour_ahead()
    world.run(*[world.put(b"%d" % number, b"w") for number in range(3)])
    assert world.now < 101.0
    ahead, *later = [issued_at for _, issued_at in world.cluster.issued[-6::3]]
    assert later[0] < ahead


def test_a_client_goes_by_the_nodes_earlier_time_only_after_all_its_commands_are_settled():
    """So whatever was issued by the later time is below what the first command after it says is settled."""
    world = issued_an_hour_ahead()
    world.mute.add(2)
    doubtful = world.put(b"z", b"w", timeout=2.0)
    calls = [world.put(b"%d" % number, b"w") for number in range(3)]
    world.run(*calls)
    assert isinstance(doubtful.error, errors.OutcomeUnknown)
    ahead_ms = BASE_MS + 3_600_000
    issued = world.cluster.issued[2:]
    first = next(number for number, (_, issued_at) in enumerate(issued) if issued_at < ahead_ms)
    assert all(issued_at < ahead_ms for _, issued_at in issued[first:])
    sequence, below = world.cluster.windows[2:][first]
    assert sequence == below == calls[0].sequence
    assert doubtful.sequence < below


def test_a_client_that_is_little_ahead_waits_for_the_nodes_time_and_not_for_a_command_in_doubt():
    world = World(nodes=2)
    world.cluster.split(b"m", leader=2)
    world.run(world.put(b"k", b"v"), world.put(b"z", b"v"))
    world.core.session.rebase(world.cluster.clock + timestamp_at(2_000), world.now)
    world.mute.add(2)
    doubtful = world.put(b"z", b"w", timeout=60.0)
    calls = [world.put(b"%d" % number, b"w") for number in range(3)]
    world.run(*calls)
    assert [call.error for call in calls] == [None] * 3
    assert not doubtful.done
    assert world.now < 103.0


def test_a_command_that_is_refused_as_too_old_moves_no_stamp_back():
    """A client that was suspended is behind, and a server whose clock is a little behind is not believed for that."""
    session = Session(b"s" * 16)
    session.rebase(timestamp_at(BASE_MS), 0.0)
    session.issued_at_ms(0.0)
    session.rebase(timestamp_at(BASE_MS + 90_000), 1.0)
    session.too_old(1.0)
    assert session.open
    assert session.issued_at_ms(1.0) == BASE_MS + 90_000
    session.rebase(timestamp_at(BASE_MS), 1.0)
    assert session.issued_at_ms(1.0) == BASE_MS + 90_000


def test_acknowledged_below_is_the_lowest_unsettled_sequence():
    """DESIGN §4.6: what the server may forget."""
    world = World(nodes=2)
    world.cluster.split(b"m", leader=2)
    world.run(world.put(b"a", b"v"), world.put(b"z", b"v"))
    world.mute.add(2)
    stuck = world.put(b"z", b"w", timeout=5.0)
    world.core.flush(world.now)
    world._perform()
    for _ in range(3):
        world.run(world.put(b"a", b"v"))
    assert world.cluster.windows[-3:] == [(4, 3), (5, 3), (6, 3)]
    with pytest.raises(errors.OutcomeUnknown):
        world.run(stuck)
    world.run(world.put(b"a", b"v"))
    assert world.cluster.windows[-1] == (7, 7), "an unknown outcome is never retried, so it is settled"


def test_the_window_is_never_exceeded():
    """A sequence at most 1,024 above the lowest unsettled; the fake cluster asserts it for each command."""
    world = World(nodes=2, settings=Settings(calls_in_flight_max=5_000))
    world.cluster.split(b"m", leader=2)
    world.run(world.put(b"a", b"v"), world.put(b"z", b"v"))
    world.mute.add(2)
    stuck = world.put(b"z", b"w", timeout=1.0)
    calls = [world.put(b"a%d" % i, b"v", timeout=5.0) for i in range(2_000)]
    world.core.flush(world.now)
    world._perform()
    world.settle()
    assert sum(call.done for call in calls) == SESSION_WINDOW_MAX
    assert not stuck.done
    world.run(*calls)
    assert all(call.error is None for call in calls)
    assert max(sequence - below for sequence, below in world.cluster.windows) == SESSION_WINDOW_MAX


def test_the_command_that_the_window_waits_for_does_not_wait_for_the_window():
    """It is sent again when there is room, also where new commands stand before it."""
    world = World(nodes=2, settings=Settings(calls_in_flight_max=5_000, bytes_per_write_max=1))
    world.cluster.split(b"m", leader=2)
    world.run(world.put(b"a", b"v"), world.put(b"z", b"v"))

    def refuse_once_and_fall_silent(request: Request) -> errors.ShardKVError | None:
        if request.method != Method.WRITE or 2 in world.mute:
            return None
        world.mute.add(2)
        return errors.OutcomeUnknown("not now")

    world.cluster.nodes[2].faults.append(refuse_once_and_fall_silent)
    retried = []
    for i in range(3):
        retried.append(world.put(b"z%d" % i, b"v"))
        world.core.flush(world.now)
        world._perform()
    lowest, *later = retried
    world.pass_time(0.1)
    assert [call.attempts for call in retried] == [2, 1, 1]  # the lowest went out last
    filling = [world.put(b"a%d" % i, b"v") for i in range(SESSION_WINDOW_MAX)]
    world.run(filling[0], *filling[: SESSION_WINDOW_MAX - len(later)])
    assert not world.core.session.open
    new = world.put(b"z9", b"v")
    for link, node in list(world.open.items()):
        if node.id == 1:
            link.inflight_max = 2
        else:
            world.cut(link)
    world.mute.clear()
    world.cluster.nodes[2].faults.clear()
    world.run(lowest, *later, new, *filling)
    assert [call.error for call in (*retried, new)] == [None] * 4


def test_what_the_window_held_back_is_let_go_once():
    """Else it would go out twice, and what is held would grow for ever."""
    world = World(nodes=2, settings=Settings(calls_in_flight_max=5_000))
    world.cluster.split(b"m", leader=2)
    world.run(world.put(b"a", b"v"), world.put(b"z", b"v"))
    world.mute.add(2)
    world.put(b"z", b"w", timeout=1.0)
    calls = [world.put(b"a%d" % i, b"v", timeout=5.0) for i in range(SESSION_WINDOW_MAX + 100)]
    world.settle()
    held = set(world.core.ledger.held)
    assert len(held) == 100
    world.run(*calls)
    assert not world.core.ledger.held
    assert {call.attempts for call in held} == {1}
    sequences = [sequence for sequence, _ in world.cluster.windows]
    assert len(sequences) == len(set(sequences))


STEPS = ["issue", "settle", "rebase", "wait", "too old"]


@given(st.lists(st.tuples(st.sampled_from(STEPS), st.integers(0, 2_000)), max_size=80))
def test_stamps_decrease_while_sequences_grow_only_where_all_before_are_settled(steps):
    """DESIGN §4.6, whatever the servers' clocks say and in whatever order commands are settled."""
    session = Session(b"s" * 16)
    session.rebase(timestamp_at(BASE_MS), 0.0)
    now, last, refused = 0.0, 0, False
    for action, amount in steps:
        if action == "issue":
            stamp = session.issued_at_ms(now)
            if session.open:
                assert stamp >= last or (refused and not session.unsettled)
                session.issue()
                last, refused = stamp, False
        elif action == "settle" and session.unsettled:
            session.settle(sorted(session.unsettled)[amount % len(session.unsettled)])
        elif action == "rebase":
            session.rebase(timestamp_at(BASE_MS + amount - 1_000), now)
        elif action == "wait":
            now += amount / 1_000
        elif action == "too old":
            session.too_old(now)
            refused = True
        session.check()


def test_the_first_write_is_stamped_by_the_servers_clock():
    """The welcome tells the time; the client has no wall clock of its own (DESIGN §4.4)."""
    world = World(nodes=1)
    world.run(world.put(b"k", b"v"))
    ((_, issued_at),) = world.cluster.issued
    assert abs(issued_at - (BASE_MS + world.cluster.now_ms)) < 10
