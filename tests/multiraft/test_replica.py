"""A replica's queues and their bounds, and what a turn of the driver makes of several groups, without a network."""

from typing import Any

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from shardkv.errors import Busy, NotLeader, OutOfSpace
from shardkv.multiraft import replica as replica_module
from shardkv.multiraft.outgoing import PEER_FRAME_BYTES, _pieces
from shardkv.multiraft.replica import (
    CONFIRMATIONS_MAX,
    GATHER_NS,
    PIPELINE_BYTES,
    PIPELINE_NS,
    WAITING_READS_MAX,
    Proposal,
    Replica,
    WaitingRead,
    WriteGroup,
)
from shardkv.multiraft.turn import gather
from shardkv.raft.messages import MessageType
from shardkv.storage.group_log import GroupLog
from shardkv.wire.raft_codec import MESSAGES_PER_FRAME_MAX
from tests.multiraft.world import SESSION, TICK_SECONDS, Answer, world


class Raft:
    """As much of a Raft core as the queues look at."""

    role = replica_module.Role.LEADER
    leader = 1

    @property
    def raft(self) -> "Raft":
        return self


def a_replica() -> Replica:
    return Replica(1, 1, Raft(), None, None)  # type: ignore[arg-type]


def group(size: int, commands: int = 1) -> WriteGroup:
    return WriteGroup(Answer(), 0, SESSION, bytes(size), [[] for _ in range(commands)])


def reading(answer: Answer | None = None) -> WaitingRead:
    return WaitingRead(answer or Answer(), 0, lambda replica: "read")


def test_waiting_writes_are_bounded_in_bytes_and_the_next_is_told_busy() -> None:
    replica = a_replica()
    while replica.waiting_bytes <= replica_module.WAITING_BYTES_MAX:
        replica.enqueue(group(1 << 20))
    with pytest.raises(Busy):
        replica.enqueue(group(1))
    assert replica.waiting_bytes <= replica_module.WAITING_BYTES_MAX + (1 << 20)


def test_a_follower_queues_no_write() -> None:
    replica = a_replica()
    replica.raft.role = replica_module.Role.FOLLOWER  # type: ignore[misc]
    with pytest.raises(NotLeader):
        replica.enqueue(group(1))
    replica.raft.role = replica_module.Role.LEADER  # type: ignore[misc]


def test_an_entry_takes_what_waits_up_to_its_bounds_and_never_nothing() -> None:
    replica = a_replica()
    sizes = [600_000, 500_000, 10, 2_000_000, 10]
    for size in sizes:
        replica.enqueue(group(size))
    taken = []
    while replica.waiting:
        taken.append([len(each.commands) for each in replica.take_waiting()])
        assert replica.waiting_bytes == sum(len(each.commands) for each in replica.waiting)
        assert replica.waiting_commands == sum(len(each.decoded) for each in replica.waiting)
    assert taken == [[600_000], [500_000, 10], [2_000_000], [10]]
    for _ in range(3):
        replica.enqueue(group(10, commands=replica_module.ENTRY_COMMANDS_MAX // 2))
    assert [len(replica.take_waiting()), len(replica.take_waiting())] == [2, 1]


def test_waiting_reads_share_a_confirmation_and_a_later_one_never_joins_it() -> None:
    """Its index was fixed when the leader took it; a write acknowledged since then would be missed."""
    replica = a_replica()
    first, second, late = Answer(), Answer(), Answer()
    replica.await_read(reading(first))
    replica.await_read(reading(second))
    context = replica.take_open_reads(5)
    assert context is not None
    replica.await_read(reading(late))
    replica.confirm_reads(context, 3)
    assert [len(batch) for _, batch, _ in replica.confirmed or []] == [2]
    assert replica.open_reads is not None
    assert [each.requester for each in replica.open_reads] == [late]
    assert replica.take_open_reads(6) != context


def test_waiting_reads_and_confirmations_are_bounded() -> None:
    replica = a_replica()
    for _ in range(CONFIRMATIONS_MAX):
        replica.await_read(reading())
        assert replica.take_open_reads(0) is not None
    for _ in range(WAITING_READS_MAX):
        replica.await_read(reading())
    assert replica.take_open_reads(0) is None
    with pytest.raises(Busy):
        replica.await_read(reading())


def test_reads_whose_confirmation_was_lost_expire() -> None:
    replica = a_replica()
    old, new = Answer(), Answer()
    replica.await_read(reading(old))
    replica.take_open_reads(100)
    replica.await_read(reading(new))
    replica.take_open_reads(200)
    replica.expire_reads(150)
    assert isinstance(old.error, Busy)
    assert not new.arrived


def test_a_confirmed_read_waits_while_its_replica_has_no_state() -> None:
    """Entries that were on their way to be applied when an install began are acknowledged in the middle of it."""
    replica, answer = a_replica(), Answer()
    replica.await_read(reading(answer))
    context = replica.take_open_reads(0)
    assert context is not None
    replica.confirm_reads(context, 5)
    replica.serve_confirmed()
    assert not answer.arrived
    assert replica.confirmed


def test_a_confirmed_read_is_answered_once_however_often_its_replica_looks() -> None:
    """Its connection counts what it owes: a second answer would be one to nobody, and let too much in."""

    class Machine:
        applied_index = 5

    replica = a_replica()
    replica.machine = Machine()  # type: ignore[assignment]
    now, later = Answer(), Answer()
    for moment, (answer, index) in enumerate(((now, 5), (later, 6))):
        replica.await_read(reading(answer))
        context = replica.take_open_reads(moment)
        assert context is not None
        replica.confirm_reads(context, index)
    replica.serve_confirmed()
    replica.serve_confirmed()
    assert (now.count, later.count) == (1, 0)
    Machine.applied_index = 6
    replica.serve_confirmed()
    replica.serve_confirmed()
    assert (now.count, later.count) == (1, 1)


def test_whoever_waits_is_refused_once_when_a_replica_is_given_up() -> None:
    replica = a_replica()
    answers = [Answer() for _ in range(4)]
    replica.enqueue(WriteGroup(answers[0], 0, SESSION, b"x", [[]]))
    replica.proposals[5] = replica_module.Proposal(1, ((answers[1], 0),))
    replica.await_read(reading(answers[2]))
    replica.take_open_reads(0)
    replica.await_read(reading(answers[3]))
    replica.abandon()
    replica.abandon()
    assert [answer.count for answer in answers] == [1, 1, 1, 1]
    errors = [answer.error for answer in answers]
    assert [isinstance(error, NotLeader) and error.logged for error in errors] == [False, True, False, False]


def test_frames_to_a_peer_are_cut_in_bytes_and_in_messages() -> None:
    """A receiver refuses a frame with more messages than it is bound to take, and with it the whole connection."""
    assert [len(piece) for piece in _pieces([b"x"] * (MESSAGES_PER_FRAME_MAX + 5))] == [MESSAGES_PER_FRAME_MAX, 5]
    big = bytes(PEER_FRAME_BYTES - 10)
    assert [len(piece) for piece in _pieces([big, b"1" * 20, b"2"])] == [1, 2]
    assert list(_pieces([b"one"])) == [[b"one"]]


async def test_a_turn_makes_one_record_one_sync_and_one_frame_a_peer_for_all_groups(autojump_clock: MockClock) -> None:
    async with world(3) as hosts:
        for number in range(3):
            leader = await hosts.led(1)
            await leader.split(b"%c" % (ord("x") - number), 2 + number, first_replica=100 * (number + 1)).wait()
        for range_id in range(1, 5):
            await hosts.led(range_id)
        await trio.sleep(1)
        leader = hosts.leader()
        led = [each for each in range(1, 5) if hosts.leader(each) is leader]
        assert len(led) > 1, "the splitting leader leads the halves too"
        before = leader.wal.statistics(), leader.driver.statistics()
        leader.peers.frames.clear()
        answers = [leader.put(leader.machine(each).descriptor.span.start or b"a", b"v", each) for each in led]
        for answer in answers:
            assert not answer.arrived
        leader.driver._turn()
        after = leader.wal.statistics(), leader.driver.statistics()
        assert after[0].records - before[0].records == 1
        assert after[1].syncs - before[1].syncs == 1
        assert leader.peers.frames == [(hosts.relied_on().node_id, len(led))]
        for answer in answers:
            await answer.wait()


async def test_while_a_sync_runs_proposals_collect_and_acknowledgements_commits_and_applies_go_on(
    autojump_clock: MockClock,
) -> None:
    async with world(3) as hosts:
        leader = hosts.leader()
        await hosts.write(b"k", b"v")
        await hosts.until(lambda: not leader.driver.log_writer.syncing)
        first = leader.put(b"a", b"1")
        leader.driver._turn()
        leader.workers.hold_log()
        assert leader.driver.log_writer.syncing
        last = leader.replica().raft.last_index
        more = [leader.put(b"b%d" % number, b"2") for number in range(5)]
        await trio.sleep(0.1)
        assert leader.replica().raft.last_index == last, "nothing was proposed meanwhile"
        assert len(leader.replica().waiting) == 5
        assert leader.replica().raft.committed >= last, "two others have it: it is committed"
        leader.workers.release()
        await first.wait()
        for answer in more:
            await answer.wait()
        assert leader.replica().raft.last_index == last + 1, "what had collected became one entry"


async def test_a_stalled_engine_holds_applies_back_and_nothing_is_answered_or_lost(autojump_clock: MockClock) -> None:
    async with world(3) as hosts:
        leader = hosts.leader()
        leader.engine.stall = True
        answers = [leader.put(b"k%d" % number, b"v") for number in range(3)]
        await trio.sleep(0.5)
        assert leader.driver.applier.held
        assert not any(answer.arrived for answer in answers)
        assert leader.replica().leads, "a stall of the engine alone costs no leadership"
        leader.engine.stall = False
        for answer in answers:
            await answer.wait()
        assert leader.value(b"k2") == b"v"


async def test_a_follower_whose_engine_is_stalled_keeps_little_of_its_log_in_memory(autojump_clock: MockClock) -> None:
    """The others make a majority and do not wait for it, for it acknowledges what is in its log; so may one that waits
    for its data. What is in the log can be read from there when the time comes."""
    async with world(3) as hosts:
        follower = hosts.follower()
        follower.engine.stall = True
        for number in range(96):
            await hosts.write(b"%d" % number, bytes(256 * 1024))
        log = follower.replica().raft.raft.log
        assert log.stable - log.applied >= 90
        kept = sum(len(entry.data) for entry in log.tail)
        assert kept <= 2 * log.applying_bytes_max, f"{kept >> 20} MiB of one group are in memory"
        follower.engine.stall = False
        await hosts.agreed()
        assert follower.value(b"95") == bytes(256 * 1024)


async def test_a_campaign_reads_nothing_back_of_what_is_not_applied(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It asks each time for a membership change among that, in the loop, and where an engine stalls that may be all of
    the log, of all ranges at once."""
    async with world(3) as hosts:
        follower = hosts.follower()
        follower.engine.stall = True
        for number in range(96):
            await hosts.write(b"%d" % number, bytes(256 * 1024))
        read = 0
        entries = GroupLog.entries

        def counted(self: GroupLog, lo: int, hi: int, bytes_max: int) -> Any:
            nonlocal read
            found = entries(self, lo, hi, bytes_max)
            read += sum(len(entry.data) for entry in found)
            return found

        monkeypatch.setattr(GroupLog, "entries", counted)
        raft = follower.replica().raft
        raft.campaign(follower.environment.clock.monotonic_ns())
        monkeypatch.undo()
        assert read == 0, f"{read >> 20} MiB"
        follower.engine.stall = False


async def test_what_was_under_way_when_the_disk_became_full_is_applied_so_that_reads_go_on(
    autojump_clock: MockClock,
) -> None:
    """It may stay full for ever. The engine keeps in memory what it has no room for, and little more is to come, for
    the node refuses writes; until it does, nothing is added."""
    async with world(3) as hosts:
        leader = hosts.leader()
        leader.engine.stall = leader.engine.full = True
        answer = leader.put(b"k", b"v")
        await trio.sleep(0.5)
        assert not answer.arrived, "the node takes writes still: the engine's memory has no bound"
        leader.driver.space.failed("log", OutOfSpace("no room"))
        await answer.wait()
        assert await leader.read(b"k").wait() == b"v"
        leader.engine.stall = leader.engine.full = False


def test_a_turn_leaves_resting_groups_alone_and_takes_one_hand_out_of_each() -> None:
    class Busy:
        role = replica_module.Role.FOLLOWER
        leader = 0
        taken = 0

        def has_ready(self) -> bool:
            return True

        def ready(self) -> Any:
            from shardkv.raft.messages import Message
            from shardkv.raft.node import Ready

            self.taken += 1
            return Ready(None, None, (), (), None, (), [Message(MessageType.HEARTBEAT, 2, 1, 1)], False)

    busy, resting = Busy(), Busy()
    one = Replica(1, 1, busy, None, None)  # type: ignore[arg-type]
    two = Replica(2, 1, resting, None, None)  # type: ignore[arg-type]
    two.installing = True
    turn = gather([one, two])
    assert (busy.taken, resting.taken, len(turn.messages)) == (1, 0, 1)


async def test_writes_collect_behind_an_entry_under_way_but_not_for_long_and_not_without_bound(
    autojump_clock: MockClock,
) -> None:
    """An entry costs the same whatever it holds; a distant follower must not make each entry wait for the last."""
    async with world(3) as hosts:
        await hosts.write(b"k", b"v")
        replica = hosts.leader().replica()
        now = 1_000_000_000
        assert not replica.proposals
        assert replica.may_propose(now)
        replica.proposals[99] = Proposal(1, ())
        replica.proposed_ns = now
        assert not replica.may_propose(now + PIPELINE_NS - 1)
        assert replica.may_propose(now + PIPELINE_NS)
        replica.waiting_bytes = PIPELINE_BYTES
        assert replica.may_propose(now)
        replica.waiting_bytes = 0
        replica.proposals.clear()


async def test_an_entry_waits_a_moment_for_those_who_were_just_answered(autojump_clock: MockClock) -> None:
    """Several clients are never heard at the same moment; whoever is alone is not made to wait."""
    async with world(3) as hosts:
        await hosts.write(b"k", b"v")
        replica = hosts.leader().replica()
        now = 1_000_000_000
        group = WriteGroup(Answer(), 1, SESSION, b"", [None] * 10)  # type: ignore[list-item]
        replica.answered(30, now)
        replica.enqueue(group)
        assert not replica.may_propose(now + GATHER_NS - 1), "20 of 30 are still to come"
        assert replica.may_propose(now + GATHER_NS), "they may never come"
        replica.enqueue(group)
        replica.enqueue(group)
        assert replica.may_propose(now), "all are here"
        replica.take_waiting()
        replica.answered(1, now)
        replica.enqueue(group)
        assert replica.may_propose(now), "one caller, and it is here"
        replica.take_waiting()


async def test_writes_that_wait_for_company_are_proposed_though_nobody_comes(autojump_clock: MockClock) -> None:
    async with world(3) as hosts:
        await hosts.write(b"k", b"v")
        replica = hosts.leader().replica()
        waited = 0.0
        for _ in range(5):
            await trio.sleep(5 * GATHER_NS / 1e9)
            began = trio.current_time()
            replica.answered(1000, hosts.leader().environment.clock.monotonic_ns())
            await hosts.leader().put(b"alone", b"1").wait()
            waited += trio.current_time() - began
        assert waited < TICK_SECONDS, "each waited for the next tick"


async def test_writes_that_can_only_wait_cost_no_turn(autojump_clock: MockClock) -> None:
    """Each would go round every group with writes and flush every connection, for nothing."""
    async with world(3) as hosts:
        await hosts.write(b"k", b"v")
        leader = hosts.leader()
        replica = leader.replica()
        hosts.passes = lambda source, target, range_id, message: leader.node_id not in (source, target)
        under_way = leader.put(b"k", b"0")
        await trio.sleep(0.001)
        assert len(replica.proposals) == 1
        turns = leader.driver.statistics().turns
        later = [leader.put(b"k", b"%d" % number) for number in range(1, 20)]
        await trio.sleep(0.001)
        assert leader.driver.statistics().turns == turns
        hosts.passes = lambda source, target, range_id, message: True
        for answer in (under_way, *later):
            await answer.wait()


async def test_the_end_of_a_sync_costs_no_turn_for_writes_that_must_still_wait(autojump_clock: MockClock) -> None:
    """The entry under way is on this disk, and not yet on another."""
    async with world(3) as hosts:
        await hosts.write(b"k", b"v")
        leader = hosts.leader()
        await trio.sleep(5 * GATHER_NS / 1e9)
        hosts.passes = lambda source, target, range_id, message: leader.node_id not in (source, target)
        leader.workers.hold_log()
        answers = [leader.put(b"k", b"0")]
        await trio.sleep(0.001)
        answers += [leader.put(b"k", b"%d" % number) for number in range(1, 5)]
        await trio.sleep(0.001)
        assert leader.driver.log_writer.syncing
        turns = leader.driver.statistics().turns
        leader.workers.release()
        await trio.sleep(0.001)
        assert not leader.driver.log_writer.syncing
        assert leader.driver.statistics().turns == turns
        hosts.passes = lambda source, target, range_id, message: True
        for answer in answers:
            await answer.wait()


async def test_those_just_answered_wake_the_loop_when_they_are_all_here(autojump_clock: MockClock) -> None:
    async with world(3) as hosts:
        await hosts.write(b"k", b"v")
        leader = hosts.leader()
        replica = leader.replica()
        clock = leader.environment.clock
        replica.answered(10, clock.monotonic_ns())
        turns = leader.driver.statistics().turns
        answers = [leader.put(b"k", b"first")]
        await trio.testing.wait_all_tasks_blocked()
        armed = leader.driver.statistics().turns
        assert armed <= turns + 1, "one sets the time"
        answers += [leader.put(b"k", b"%d" % number) for number in range(6)]
        await trio.testing.wait_all_tasks_blocked()
        assert leader.driver.statistics().turns == armed, "the others wait with it"
        assert not replica.proposals
        answers += [leader.put(b"k", b"last") for _ in range(3)]
        await trio.testing.wait_all_tasks_blocked()
        assert replica.proposals, "all are here"
        for answer in answers:
            await answer.wait()


async def test_a_time_for_gathering_that_nobody_uses_passes_once(autojump_clock: MockClock) -> None:
    """Set for those just answered, none of whom comes back; the loop would go round on it for ever."""
    async with world(3) as hosts:
        leader = hosts.leader()
        replica = leader.replica()
        await leader.put(b"k", b"v").wait()
        replica.expected = 5
        leader.driver.proposer.gather(replica)
        turns = leader.driver.statistics().turns
        leader.driver.wake()
        await trio.sleep(10 * GATHER_NS / 1e9)
        assert leader.driver.statistics().turns == turns + 1, "only the one that was asked for"


@pytest.mark.parametrize("together", [1, 2])
async def test_a_single_writer_is_not_waited_for(autojump_clock: MockClock, together: int) -> None:
    """It gathers with nobody, and the loop need not wake to find that out. Of several, most are waited for."""
    async with world(1) as hosts:
        leader = hosts.leader()
        await trio.sleep(5 * GATHER_NS / 1e9)
        assert leader.driver.proposer.gather_until_ns is None
        for answer in [leader.put(b"k", b"%d" % number) for number in range(together)]:
            await answer.wait()
        assert (leader.driver.proposer.gather_until_ns is None) == (together == 1)


async def test_what_arrives_a_moment_later_shares_the_turn(autojump_clock: MockClock) -> None:
    """On another connection, in the loop's next round: two entries would cost each node two turns and two syncs."""
    async with world(1) as hosts:
        await hosts.write(b"k", b"v")
        leader = hosts.leader()
        for number in range(20):
            await trio.sleep(5 * GATHER_NS / 1e9)
            leader.replica().expected = 0
            applied = leader.driver.statistics().entries_applied
            first = leader.put(b"k", b"%d" % number)
            await trio.lowlevel.checkpoint()
            second = leader.put(b"l", b"%d" % number)
            await first.wait()
            await second.wait()
            assert leader.driver.statistics().entries_applied == applied + 1


async def test_one_of_those_just_answered_waits_for_the_others_no_longer_than_they_are_given(
    autojump_clock: MockClock,
) -> None:
    """Also where a follower's acknowledgement was what let them be answered."""
    async with world(3) as hosts:
        await hosts.write(b"k", b"v")
        leader = hosts.leader()
        waited = 0.0
        for _ in range(5):
            await trio.sleep(5 * GATHER_NS / 1e9)
            for answer in [leader.put(b"k", b"%d" % number) for number in range(10)]:
                await answer.wait()
            began = trio.current_time()
            await leader.put(b"alone", b"1").wait()
            waited += trio.current_time() - began
        assert waited < TICK_SECONDS, "each waited for the next tick"
