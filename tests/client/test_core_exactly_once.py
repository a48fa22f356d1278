"""A write is applied exactly once, and its outcome is what DESIGN §2.4 and §4.6 promise."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardkv import errors
from shardkv.server.requests import COMMANDS_PER_REQUEST_MAX
from shardkv.types import (
    KEY_BYTES_MAX,
    SESSION_WINDOW_MAX,
    Epoch,
    KeyRange,
    Member,
    NodeId,
    RangeDescriptor,
    RangeId,
    ReplicaId,
    timestamp_at,
)
from shardkv.wire import commands
from shardkv.wire.commands import Op
from shardkv.wire.frames import FRAME_BYTES_MAX
from shardkv.wire.requests import REQUESTS_PER_FRAME_MAX, Method, Request
from shardkv_client.core import Settings
from shardkv_client.core.session import Session
from tests.client.fake_cluster import BASE_MS
from tests.client.world import World


def test_trap_12_a_write_whose_answer_is_lost_is_applied_once():
    """TRAPS 12: the same bytes under the same sequence; the fake cluster asserts that they never differ."""
    world = World()
    world.run(world.put(b"k", b"v"))
    world.lose_answers = 3
    call = world.increment(b"n", 5)
    assert world.run(call) == 5
    assert call.attempts == 4
    assert [op for _, _, op in world.cluster.applied].count(Op.INCREMENT) == 1


@pytest.mark.parametrize("sent_before", [False, True])
def test_a_core_that_was_disowned_sends_nothing_more_under_its_session(sent_before):
    """The child of a fork would issue other commands under the sequences that its parent is about to issue."""
    world = World(nodes=1)
    world.run(world.put(b"k", b"v"))
    world.cluster.range_of(b"k").leader = None
    calls = [world.increment(b"a")]
    if sent_before:
        world.pass_time(0.5)
        world.settle()
    calls.append(world.increment(b"b"))
    world.core.disown()
    frames = len(world.frames)
    world.cluster.range_of(b"k").leader = 1
    world.core.flush(world.now)
    world.core.tick(world.now + 60)
    world.pass_time(60)
    assert len(world.frames) == frames
    assert not any(call.done for call in calls), "nobody is told, who may be in another process"
    assert world.core.due > world.now + 1e9, "a loop that goes on has nothing to do"


def test_a_retry_after_a_split_finds_its_record_in_the_other_half():
    world = World()
    world.run(world.put(b"z", b"v"))
    world.lose_answers = 1
    call = world.increment(b"z1", 5)
    while call.attempts == 0 or world.lose_answers:
        world.step()
    world.cluster.split(b"m", leader=3)
    assert world.run(call) == 5
    assert world.cluster.data[b"z1"][0] == b"5"


IN_DOUBT = [errors.NotLeader(logged=True), errors.OutcomeUnknown("stepped down"), errors.RangeNotFound("gone")]
CAME_TO_NOTHING = [errors.NotLeader(), errors.Busy("full"), errors.Unavailable("check the clocks")]


def refusing(*refusals: errors.ShardKVError) -> World:
    """Nodes that refuse the next writes so, whoever is asked; after those they take them."""
    world = World()
    world.run(world.put(b"k", b"v"))
    left = list(refusals)
    for node in world.cluster.nodes.values():
        node.faults.append(lambda request: left.pop(0) if request.method == Method.WRITE and left else None)
    return world


@pytest.mark.parametrize("error", IN_DOUBT, ids=repr)
@pytest.mark.parametrize("other", IN_DOUBT + CAME_TO_NOTHING, ids=repr)
def test_a_refusal_that_leaves_doubt_is_retried_with_the_same_bytes(error, other):
    """Whatever the refusals after it say: an earlier attempt may still be applied."""
    world = refusing(error, other, other, error)
    sequence = world.core.session.next_sequence
    assert world.run(world.increment(b"n")) == 1
    assert world.core.session.next_sequence == sequence + 1


@pytest.mark.parametrize("error", CAME_TO_NOTHING, ids=repr)
def test_a_write_of_which_nothing_came_for_certain_is_issued_anew(error):
    """A command that waits for a leader does not grow too old: by then it is stamped with the time that the leader
    told."""
    world = refusing(error, error)
    first = len(world.cluster.issued)
    assert world.run(world.increment(b"n")) == 1
    assert len(world.cluster.issued) == first + 1
    assert world.core.session.next_sequence == world.cluster.issued[-1][0] + 1
    assert world.core.session.unsettled == set()


@pytest.mark.parametrize("error", CAME_TO_NOTHING, ids=repr)
def test_a_write_of_which_nothing_came_until_the_timeout_is_unavailable(error):
    """DESIGN §2.4: of unknown outcome is only what a leader may have logged."""
    world = refusing(*[error] * 10_000)
    with pytest.raises(errors.Unavailable, match="nothing was applied"):
        world.run(world.put(b"k", b"w", timeout=3.0))
    doubted = refusing(IN_DOUBT[0], *[error] * 10_000)
    with pytest.raises(errors.OutcomeUnknown, match="may have been applied"):
        doubted.run(doubted.put(b"k", b"w", timeout=3.0))


def test_a_read_that_ends_by_its_deadline_is_unavailable():
    world = World(nodes=1)
    world.run(world.put(b"k", b"v"))
    world.mute.add(1)
    with pytest.raises(errors.Unavailable):
        world.run(world.get(b"k", timeout=3.0))
    assert world.now == pytest.approx(103.0, abs=0.1)


def test_a_write_that_was_never_sent_is_unavailable():
    """DESIGN §2.4: certainly not applied."""
    world = World(nodes=1)
    world.down.add(1)
    call = world.put(b"k", b"v", timeout=3.0)
    with pytest.raises(errors.Unavailable, match="nothing was applied"):
        world.run(call)
    assert call.attempts == 0
    assert world.core.session.next_sequence == 1, "no sequence is used up by what is never sent"


def test_a_write_that_was_sent_is_of_unknown_outcome():
    world = World(nodes=1)
    world.run(world.put(b"k", b"v"))
    world.mute.add(1)
    with pytest.raises(errors.OutcomeUnknown, match="may have been applied"):
        world.run(world.put(b"k", b"w", timeout=3.0))


@pytest.mark.parametrize("stale", [errors.TooOld("old"), errors.SequenceReused("settled")], ids=repr)
def test_a_retry_that_is_too_old_is_of_unknown_outcome(stale):
    """The first attempt may have been applied, and its record dropped."""
    world = World(nodes=1)
    world.run(world.put(b"k", b"v"))
    world.lose_requests = 1
    world.cluster.nodes[1].faults.append(lambda request: stale if request.method == Method.WRITE else None)
    with pytest.raises(errors.OutcomeUnknown):
        world.run(world.put(b"k", b"w"))


def test_a_first_attempt_that_is_too_old_is_issued_again():
    """It was certainly not applied: a client that was suspended carries on with a new sequence."""
    world = World(nodes=1)
    world.run(world.put(b"k", b"v"))
    refusals = [errors.TooOld("old")]
    world.cluster.nodes[1].faults.append(
        lambda request: refusals.pop() if request.method == Method.WRITE and refusals else None
    )
    world.run(world.put(b"k", b"w"))
    assert [sequence for sequence, _ in world.cluster.windows] == [1, 3]


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


def test_an_answer_of_the_database_is_raised_and_not_retried():
    world = World(nodes=1)
    version = world.run(world.put(b"k", b"v"))
    call = world.put(b"k", b"w", if_version=version - 1)
    with pytest.raises(errors.VersionMismatch) as caught:
        world.run(call)
    assert caught.value.current == version
    assert call.attempts == 1
    world.run(world.put(b"n", b"text"))
    with pytest.raises(errors.NotAnInteger):
        world.run(world.increment(b"n"))


def test_trap_25_a_conditional_write_that_failed_stays_failed():
    """TRAPS 25: its duplicate after the key changed gets the recorded outcome."""
    world = World(nodes=1)
    world.run(world.put(b"k", b"v"))
    world.lose_answers = 1
    call = world.put(b"k", b"w", if_version=0)
    while not world.cluster.windows[1:]:
        world.step()
    del world.cluster.data[b"k"]
    with pytest.raises(errors.VersionMismatch):
        world.run(call)


def test_a_refusal_on_a_retry_does_not_hide_that_the_first_may_have_applied():
    """A node without space refuses; the earlier attempt may have been applied elsewhere."""
    world = World(nodes=1)
    world.run(world.put(b"k", b"v"))
    world.cluster.nodes[1].faults.append(
        lambda request: errors.OutOfSpace("full") if request.method == Method.WRITE else None
    )
    with pytest.raises(errors.OutOfSpace):
        world.run(world.put(b"k", b"w"))
    world.lose_requests = 1
    with pytest.raises(errors.OutcomeUnknown, match="full"):
        world.run(world.put(b"k", b"w"))


# --- sequences, windows, stamps -----------------------------------------------------------------------------------


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


@pytest.mark.parametrize("kind", ["put", "get"])
def test_calls_beyond_the_bytes_in_flight_wait_their_turn(kind):
    """Their bytes are the client's memory, and the nodes'."""
    world = World(nodes=1, settings=Settings(bytes_in_flight_max=10_000))
    world.run(world.put(b"k", b"v"))
    key = b"k" * 1_000
    calls = [world.put(key, bytes(1_000)) if kind == "put" else world.get(key) for _ in range(60)]
    most = 0
    while not all(call.done for call in calls):
        active = [call for call in calls if call.admitted and not call.done]
        most = max(most, sum(call.size for call in active))
        world.step()
    assert 8_000 < most < 10_000 + calls[0].size


def test_calls_beyond_the_in_flight_bound_wait_their_turn():
    world = World(nodes=1, settings=Settings(calls_in_flight_max=10))
    world.run(world.put(b"k", b"v"))
    calls = [world.put(b"k%d" % i, b"v") for i in range(35)]
    before = len(world.frames)
    world.run(*calls)
    assert [len(world.cluster.windows), len(world.frames) - before] == [36, 4]


def test_a_call_that_waits_for_its_turn_ends_by_its_deadline():
    world = World(nodes=1, settings=Settings(calls_in_flight_max=1))
    world.run(world.put(b"k", b"v"))
    world.mute.add(1)
    first, second = world.put(b"k", b"1", timeout=5.0), world.put(b"k", b"2", timeout=1.0)
    with pytest.raises(errors.Unavailable):
        world.run(second)
    assert not first.done


def test_a_call_that_found_no_place_says_so():
    """The addresses are not to blame."""
    world = World(nodes=1, settings=Settings(calls_in_flight_max=3))
    world.run(world.put(b"k", b"v"))
    world.mute.add(1)
    for _ in range(3):
        world.put(b"k", b"1", timeout=5.0)
    with pytest.raises(errors.Unavailable, match=r"^3 calls of this client were in flight.*make fewer at once"):
        world.run(world.put(b"k", b"2", timeout=1.0))


def test_what_needs_no_leader_finds_a_place_however_many_calls_wait_for_one():
    """Stale reads go on while a range has no leader, as do requests to any node."""
    world = World(settings=Settings(calls_in_flight_max=10))
    world.run(world.put(b"k", b"v"))
    for node in world.cluster.nodes.values():
        node.faults.append(
            lambda request: (
                errors.NotLeader()
                if request.method == Method.WRITE or (request.method == Method.GET and request.arguments[0] < 2)
                else None
            )
        )
    stuck = [world.put(b"k", b"w") for _ in range(40)] + [world.get(b"k") for _ in range(40)]
    world.pass_time(1.0)
    started = world.now
    assert world.run(world.get(b"k", consistency=2))[0] == b"v"
    assert world.run(world.admin(Method.STATUS))
    assert world.now - started < 0.5
    assert not any(call.done for call in stuck)


def test_calls_that_end_while_they_wait_for_a_place_are_not_kept():
    world = World(nodes=1, settings=Settings(calls_in_flight_max=2))
    world.run(world.put(b"k", b"v"))
    world.mute.add(1)
    for _ in range(2):
        world.put(b"k", b"1", timeout=50.0)
    lane = world.core.ledger._writes
    for _ in range(50):
        for call in [world.put(b"k", b"2", timeout=40.0) for _ in range(100)]:
            world.core.cancel(call)
            world.core.check()
    assert len(lane.backlog) < 1_000
    last = world.put(b"k", b"3", timeout=30.0)
    world.mute.clear()
    world.run(last)
    assert world.cluster.data[b"k"][0] == b"3"


@pytest.mark.parametrize(
    "changed",
    [
        {"commands_per_write_max": 0},
        {"bytes_per_write_max": 0},
        {"calls_in_flight_max": -1},
        {"commands_per_write_max": COMMANDS_PER_REQUEST_MAX + 1},
        {"bytes_per_write_max": FRAME_BYTES_MAX},
        {"frame_bytes_target": FRAME_BYTES_MAX + 1},
        {"requests_per_frame_max": REQUESTS_PER_FRAME_MAX + 1},
        {"keys_per_get_max": FRAME_BYTES_MAX // KEY_BYTES_MAX},
        {"keys_per_get_max": 1.5},
        {"dials_at_once_max": True},
        {"dial_seconds": 0},
        {"moved_seconds": float("nan")},
        {"lookup_seconds": float("inf")},
        {"lookup_seconds": "5"},
        {"backoff_seconds_min": 1.0},
        {"ping_after_seconds": 2.0},
        {"cluster_id": b"short"},
    ],
    ids=repr,
)
def test_settings_that_no_client_could_work_with_are_refused(changed):
    """With some of them a call spun for ever, past every timeout; with others nodes refused sound calls for having come
    too many together."""
    with pytest.raises(errors.ConfigError, match=next(iter(changed))):
        Settings(**changed)


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


# --- delete_range ---------------------------------------------------------------------------------------------------


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


# --- everything at once ---------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.lists(st.integers(0, 7), min_size=5, max_size=40))
def test_counters_add_up_whatever_breaks(seed, happenings):
    """Increments under cuts, crashes, leader changes, splits: one that succeeded counts once, others at most once."""
    world = World(seeds=[1, 2, 3], seed=seed)
    keys = [b"a", b"h", b"m", b"t"]
    calls = []
    for index, happening in enumerate(happenings):
        calls += [world.increment(key, 1, timeout=6.0) for key in keys]
        world.pass_time(0.0013 * (seed % 7 + 1))
        target = world.cluster.range_of(keys[index % 4])
        match happening:
            case 0:
                world.lose_requests += 1
            case 1:
                world.lose_answers += 1
            case 2:
                target.leader = seed % 3 + 1
            case 3:
                for link in list(world.open):
                    world.cut(link)
                world._perform()
            case 4:
                key = b"%c" % (100 + index)
                if world.cluster.range_of(key).descriptor.span.start != key:
                    world.cluster.split(key)
            case 5:
                world.crash(2)
                for each in world.cluster.ranges.values():
                    each.leader = 1 if each.leader == 2 else each.leader
            case 6:
                world.down.clear()
            case 7:
                if target.descriptor.span.end is not None:
                    world.cluster.merge(keys[index % 4])
    for call in calls:
        try:
            world.run(call)
        except errors.ShardKVError:
            assert isinstance(call.error, (errors.OutcomeUnknown, errors.Unavailable))
    for key in keys:
        mine = [call for call in calls if call.key == key]
        certain = sum(call.error is None for call in mine)
        possible = certain + sum(isinstance(call.error, errors.OutcomeUnknown) for call in mine)
        assert certain <= int(world.cluster.data.get(key, (b"0", 0))[0]) <= possible
        results = [call.result for call in mine if call.error is None]
        assert len(set(results)) == len(results)
    issued = sorted(set(world.cluster.issued))
    assert [stamp for _, stamp in issued] == sorted(stamp for _, stamp in issued)


def test_closing_fails_pending_calls_as_their_deadline_would():
    world = World(nodes=1)
    world.run(world.put(b"k", b"v"))
    world.mute.add(1)
    sent = world.put(b"k", b"w")
    world.core.flush(world.now)
    unsent, read = world.put(b"k", b"x"), world.get(b"k")
    world.core.close(world.now)
    assert isinstance(sent.error, errors.OutcomeUnknown)
    assert isinstance(unsent.error, errors.Unavailable)
    assert isinstance(read.error, errors.Unavailable)
    with pytest.raises(errors.ClientClosed):
        world.put(b"k", b"y")


def test_the_first_write_is_stamped_by_the_servers_clock():
    """The welcome tells the time; the client has no wall clock of its own (DESIGN §4.4)."""
    world = World(nodes=1)
    world.run(world.put(b"k", b"v"))
    ((_, issued_at),) = world.cluster.issued
    assert abs(issued_at - (BASE_MS + world.cluster.now_ms)) < 10
