"""A write is applied exactly once, and its outcome is what DESIGN §2.4 and §4.6 promise."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardkv import errors
from shardkv.wire.commands import Op
from shardkv.wire.requests import Method
from tests.client.world import CAME_TO_NOTHING, IN_DOUBT, World, refusing


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
