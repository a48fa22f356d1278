"""How replicas begin, change their core, and come back after crashes."""

from dataclasses import replace
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from shardkv.errors import Corruption, ProtocolError
from shardkv.machine import keys
from shardkv.machine.machine import INITIAL_INDEX, INITIAL_TERM, RangeMachine, conf_state_of
from shardkv.multiraft.catalog import admit_engine
from shardkv.raft.messages import NONE, ConfState, Entry, HardState, Message, MessageType
from shardkv.raft.node import Role
from shardkv.storage.engine import WriteBatch
from shardkv.storage.wal import CompactLog, CreateGroup, LogUpdate, ResetLog, Tombstone
from shardkv.types import KeyRange, NodeId, RangeId, ReplicaId
from tests.multiraft import world as world_module
from tests.multiraft.scenes import led_by_another, split_on_two, with_log
from tests.multiraft.world import PROMISE_NS, RANGE, Host, descriptor_on, world

RIGHT = RangeId(2)


def from_right(kind: MessageType, *, to: int, sender: int, term: int = 7, **fields: Any) -> Message:
    """A message of the right half of a split, whose replicas are 101 to 103."""
    return Message(kind, to=100 + to, from_=100 + sender, term=term, **fields)


def deliver(host: Host, range_id: int, message: Message, sender: int) -> None:
    replica = host.catalog.admit(RangeId(range_id), message, NodeId(sender))
    if replica is not None:
        host.driver.step(replica, message)


async def test_trap_02_an_uninitialised_replica_votes_but_neither_campaigns_nor_owns_a_span(
    autojump_clock: MockClock,
) -> None:
    async with world(3) as hosts:
        late = await split_on_two(hosts)
        deliver(late, 2, from_right(MessageType.HEARTBEAT, to=3, sender=1), 1)
        replica = late.replica(2)
        assert replica.machine is None
        assert late.catalog.spans.owned(RIGHT) is None
        assert late.catalog.replica_for_key(b"z") is late.replica(1)
        hosts.passes = lambda source, target, range_id, message: False
        await trio.sleep(5)
        assert (replica.raft.role, replica.raft.term) == (Role.FOLLOWER, 7)
        sent: list[Message] = []
        hosts.passes = lambda source, target, range_id, message: bool(range_id == 2 and sent.append(message))
        deliver(late, 2, from_right(MessageType.VOTE, to=3, sender=2, term=8, index=10, log_term=5), 2)
        await trio.sleep(0.1)
        assert [(each.type, each.reject) for each in sent if each.from_ == 103] == [(MessageType.VOTE_RESP, False)]
        take_over = from_right(MessageType.TIMEOUT_NOW, to=3, sender=2, term=8)
        assert late.catalog.admit(RIGHT, take_over, NodeId(2)) is None


async def test_trap_02_an_answer_makes_no_replica(autojump_clock: MockClock) -> None:
    async with world(3) as hosts:
        late = await split_on_two(hosts)
        answers = (MessageType.VOTE_RESP, MessageType.PRE_VOTE_RESP, MessageType.APP_RESP, MessageType.HEARTBEAT_RESP)
        for kind in answers:
            deliver(late, 2, from_right(kind, to=3, sender=1), 1)
        assert RIGHT not in late.catalog.replicas
        assert RIGHT not in late.wal.groups


@pytest.mark.parametrize("kind", [MessageType.PRE_VOTE, MessageType.VOTE])
async def test_trap_03_a_vote_makes_no_replica_under_or_at_a_tombstone(
    kind: MessageType, autojump_clock: MockClock
) -> None:
    """TRAPS 3: the vote may be late by any time, the removal was not."""
    async with world(3) as hosts:
        late = await split_on_two(hosts)
        late.catalog.log([LogUpdate(RIGHT, tombstone=Tombstone(ReplicaId(103), b""))])
        for to in (102, 103):
            assert late.catalog.admit(RIGHT, Message(kind, to=to, from_=101, term=7), NodeId(1)) is None
        assert RIGHT not in late.catalog.replicas
        assert RIGHT not in late.wal.groups


async def test_trap_02_a_replica_made_by_a_vote_is_adopted_with_it_by_the_split_even_after_a_crash(
    autojump_clock: MockClock,
) -> None:
    """Nothing was promised before; what the vote promises is in the log before it is answered."""
    async with world(3) as hosts:
        late = await split_on_two(hosts)
        sent: list[Message] = []
        hosts.passes = lambda source, target, range_id, message: bool(range_id == 2 and sent.append(message))
        deliver(late, 2, from_right(MessageType.VOTE, to=3, sender=2, term=9, index=10, log_term=5), 2)
        await hosts.until(lambda: any(each.from_ == 103 for each in sent), "the vote")
        assert [(each.type, each.reject) for each in sent if each.from_ == 103] == [(MessageType.VOTE_RESP, False)]
        assert late.catalog.spans.owned(RIGHT) is None
        await late.restart(power=True)
        replica = late.replica(2)
        assert replica.machine is None
        assert (replica.raft.term, replica.raft.vote) == (9, 102)
        hosts.passes = lambda source, target, range_id, message: range_id == 1
        await hosts.until(lambda: late.replica(2).machine is not None, "the split on node 3")
        assert late.replica(2).raft.vote == 102
        assert late.replica(2).raft.term >= 9


async def test_trap_02_an_adopted_replica_tells_its_leader_that_it_needs_no_snapshot_any_more(
    autojump_clock: MockClock,
) -> None:
    """Its leader met it without state, and would go on only with a snapshot: none can be had here."""
    async with world(3) as hosts:
        late = await split_on_two(hosts)
        hosts.opens = lambda source, target: False
        hosts.passes = lambda source, target, range_id, message: range_id == 2
        await hosts.until(lambda: 2 in late.catalog.replicas, "the right half by a message")
        await trio.sleep(1)
        assert late.replica(2).machine is None
        hosts.passes = lambda source, target, range_id, message: True
        await hosts.agreed(2)
        await hosts.write(b"z", b"3", 2)
        await hosts.agreed(2)


async def test_trap_02_a_vote_that_waits_for_the_disk_while_the_split_adopts_its_replica_is_answered(
    autojump_clock: MockClock,
) -> None:
    """The answer went with the replica that the split replaces; without it the right half may have no leader."""
    async with world(3) as hosts:
        late = await split_on_two(hosts)
        answers: list[Message] = []

        def passes(source: int, target: int, range_id: int, message: Message) -> bool:
            if (source, range_id, message.type) == (3, 2, MessageType.VOTE_RESP):
                answers.append(message)
            return range_id == 1

        late.engine.stall = True
        hosts.passes = passes
        await hosts.until(lambda: late.driver.applier.held, "the split's commit on node 3")
        late.workers.hold_log()
        deliver(late, 2, from_right(MessageType.VOTE, to=3, sender=2, term=9, index=10, log_term=5), 2)
        await hosts.until(lambda: late.replica(2).raft.vote == 102, "the vote")
        late.engine.stall = False
        await hosts.until(lambda: late.replica(2).machine is not None, "the split on node 3")
        assert not answers, "the vote is not on disk"
        late.workers.release()
        await hosts.until(lambda: answers, "the answer")
        assert [(each.to, each.term, each.reject) for each in answers] == [(102, 9, False)]


async def test_trap_02_the_split_adopts_the_replica_and_keeps_its_vote_through_a_crash(
    autojump_clock: MockClock,
) -> None:
    """The vote was given by the replica that the split replaces; a second one in its term would make two leaders."""
    async with world(3) as hosts:
        late = await split_on_two(hosts)
        deliver(late, 2, from_right(MessageType.HEARTBEAT, to=3, sender=1, term=6), 1)
        await trio.sleep(1)
        # The vote is given, and while its record still waits behind a slow sync the split is applied.
        late.workers.hold_log()
        deliver(late, 2, from_right(MessageType.VOTE, to=3, sender=2, term=9, index=10, log_term=5), 2)
        hosts.passes = lambda source, target, range_id, message: range_id == 1
        await hosts.until(lambda: late.replica(2).raft.vote == 102, "the vote")
        late.workers.release()
        await hosts.until(lambda: late.replica(2).machine is not None, "the split on node 3")
        assert late.replica(2).raft.vote == 102
        assert late.replica(2).raft.term >= 9
        await trio.sleep(0.1)
        await late.restart(power=True)
        state = late.wal.groups[RIGHT].hard_state
        assert (state.term, state.vote) == (9, 102)


async def test_appends_of_a_replaced_core_are_not_logged_after_those_of_its_successor(
    autojump_clock: MockClock,
) -> None:
    """They may set the log back: its successor has begun it anew and has told others so."""
    async with world(3) as hosts:
        late = await split_on_two(hosts)
        deliver(late, 2, from_right(MessageType.HEARTBEAT, to=3, sender=1, term=6), 1)
        await trio.sleep(1)
        old = late.replica(2)
        # A record is being synced, so what the old core wants logged waits.
        late.workers.hold_log()
        deliver(
            late, 1, Message(MessageType.VOTE, 3, 2, 50, index=1 << 40, log_term=49, context=b"CampaignTransfer"), 2
        )
        await hosts.until(lambda: late.driver.log_writer.syncing, "a sync under way")
        deliver(late, 2, from_right(MessageType.VOTE, to=3, sender=2, term=9, index=10, log_term=5), 2)
        await hosts.until(
            lambda: any(waiting is old for waiting, _ in late.driver.log_writer.appends), "a waiting append"
        )
        machine = RangeMachine.create(descriptor_on(3, range_id=2, span=KeyRange(b"m", None), first_replica=100))
        log = late.catalog._begin_log(RIGHT, ReplicaId(103), machine)
        late.catalog.replicas.pop(RIGHT, None)
        assert log.hard_state == HardState(9, 102, INITIAL_INDEX)
        late.workers.release()
        await trio.sleep(0.1)
        assert log.hard_state == HardState(9, 102, INITIAL_INDEX)
        await late.crash(power=True)
        late.prepare()
        assert late.wal.groups[RIGHT].hard_state == HardState(9, 102, INITIAL_INDEX), "the vote was only in memory"


async def test_trap_07_what_an_adopted_replica_had_promised_its_successor_keeps(autojump_clock: MockClock) -> None:
    async with world(3) as hosts:
        late = await split_on_two(hosts)
        await trio.sleep(2)
        hosts.passes = lambda source, target, range_id, message: range_id == 1
        heartbeat = from_right(MessageType.HEARTBEAT, to=3, sender=1, lease_stamp=5, lease_promise=PROMISE_NS)
        deliver(late, 2, heartbeat, 1)
        promised = late.replica(2).raft.raft.refuse_until
        assert promised > late.clock.monotonic_ns()
        old = late.replica(2)
        await hosts.until(lambda: late.catalog.replicas.get(RIGHT) is not old, "the split on node 3", 0.39)
        assert late.replica(2).raft.raft.refuse_until == promised


async def test_trap_07_a_group_that_comes_back_after_a_restart_refuses_votes_for_a_promise(
    autojump_clock: MockClock,
) -> None:
    """The crash may have lost the record of a group that had promised its vote: then a replayed split makes it anew."""
    async with world(3) as hosts:
        late = await split_on_two(hosts)
        hosts.passes = lambda source, target, range_id, message: range_id == 1
        await late.restart()
        started = late.clock.monotonic_ns()
        await hosts.until(lambda: RIGHT in late.catalog.replicas, "the split on node 3")
        made = late.clock.monotonic_ns()
        if made < started + PROMISE_NS:
            assert late.replica(2).raft.raft.refuse_until >= started + PROMISE_NS - 10_000_000


async def test_trap_20_a_group_whose_creation_was_not_synced_comes_back_from_the_engine(
    autojump_clock: MockClock,
) -> None:
    """The engine was flushed after the split's batch, and the power failed before the log's record was on the disk."""
    async with world(3) as hosts:
        late = await split_on_two(hosts)
        late.workers.hold_log()
        hosts.passes = lambda source, target, range_id, message: range_id == 1
        applied = late.machine().applied_index

        def split_applied() -> bool:
            if late.driver.log_writer.syncing and late.machine().applied_index == applied:
                # Let one record through: the entry itself must be on disk before it is applied.
                late.workers.release()
                late.workers.hold_log()
            return RIGHT in late.catalog.replicas

        await hosts.until(split_applied, "the split on node 3")
        await late.environment.workers.run(late.engine.flush)
        await late.restart(power=True)
        assert RIGHT in late.catalog.replicas
        hosts.passes = lambda source, target, range_id, message: True
        await hosts.write(b"y", b"3", 2)
        await hosts.agreed(1)
        await hosts.agreed(2)
        assert late.value(b"z", 2) == b"2"


async def test_trap_20_a_split_lost_by_the_engine_is_replayed_and_leaves_the_right_halfs_log_alone(
    autojump_clock: MockClock,
) -> None:
    async with world(3) as hosts:
        await hosts.write(b"z", b"1")
        leader = await led_by_another(hosts, 3)
        await leader.split(b"m", 2).wait()
        await hosts.write(b"z", b"2", 2)
        await hosts.agreed(2)
        follower = hosts[3]
        before = follower.wal.groups[RIGHT].hard_state
        await follower.restart(power=True, kept_batches=lambda count: 0)
        assert follower.replica(2).machine is None, "the engine has lost the split"
        after = follower.wal.groups[RIGHT].hard_state
        assert (after.term, after.vote) == (before.term, before.vote)
        await hosts.write(b"y", b"3", 2)
        await hosts.agreed(1)
        await hosts.agreed(2)
        assert follower.value(b"z", 2) == b"2"


@pytest.mark.parametrize("kept", [0, 3, 6, 100])
async def test_trap_20_any_prefix_of_the_engines_batches_comes_to_the_same(
    autojump_clock: MockClock, kept: int
) -> None:
    async with world(3) as hosts:
        for number in range(4):
            await hosts.write(b"k%d" % number, b"v")
        leader = await led_by_another(hosts, 3)
        await leader.split(b"k2", 2).wait()
        for number in range(4):
            await hosts.write(b"k%d" % number, b"w", 1 if number < 2 else 2)
        await hosts.restart_all(lambda count: min(count, kept))
        await hosts.agreed(1)
        await hosts.agreed(2)
        assert [hosts[1].value(b"k%d" % n, 1 if n < 2 else 2) for n in range(4)] == [b"w"] * 4


async def test_trap_20_an_ingested_state_above_a_log_of_another_history_begins_the_log_anew(
    autojump_clock: MockClock,
) -> None:
    """The crash came between the ingest of a snapshot and its record, and the log holds what was never committed."""
    async with world(1, started=False) as hosts:
        host = hosts[1]
        update = LogUpdate(RANGE, hard_state=HardState(6, 0, 10))
        update.entries = tuple(Entry(6, index, data=b"") for index in range(11, 31))
        host.wal.append([update])()
        batch = WriteBatch()
        machine = RangeMachine.create(descriptor_on(1), applied_index=20, applied_term=8)
        machine.write(batch)
        host.engine.write(batch)
        host.engine.flush()
        host.catalog.recover()
        log = host.wal.groups[RANGE]
        assert (log.compact_index, log.compact_term, log.last_index()) == (20, 8, 20)
        host.check()


@pytest.mark.parametrize("compacted", [True, False])
async def test_trap_20_a_node_that_has_lost_what_it_had_applied_does_not_start(
    autojump_clock: MockClock, compacted: bool
) -> None:
    """No crash leaves that, an old copy of the engine does; going on would forget what others were told."""
    async with world(1, started=False) as hosts:
        host = hosts[1]
        update = LogUpdate(RANGE, hard_state=HardState(6, 1, 30))
        update.entries = tuple(Entry(6, index, data=b"") for index in range(11, 31))
        if compacted:
            update.compact = CompactLog(25, 6)
        host.wal.append([update])()
        batch = WriteBatch()
        # Either the log has let go of what would bring the state up, or it has committed something else there.
        RangeMachine.create(descriptor_on(1), applied_index=20, applied_term=6 if compacted else 5).write(batch)
        host.engine.write(batch)
        with pytest.raises(Corruption, match="move the folder engine out" if compacted else "do not belong together"):
            host.catalog.recover()


async def test_trap_20_what_recovery_makes_of_the_log_is_recorded(autojump_clock: MockClock) -> None:
    """A later record rests on it: compacting to an entry that only memory knew to be committed cannot be replayed."""
    async with world(1, started=False) as hosts:
        host = hosts[1]
        update = LogUpdate(RANGE, hard_state=HardState(6, 1, 10))
        update.entries = tuple(Entry(6, index, data=b"") for index in range(11, 31))
        host.wal.append([update])()
        batch = WriteBatch()
        RangeMachine.create(descriptor_on(1), applied_index=25, applied_term=6).write(batch)
        host.engine.write(batch)
        host.engine.flush()
        host.catalog.recover()
        assert host.wal.groups[RANGE].hard_state == HardState(6, 1, 25)
        host.disk.crash()
        host.disk = host.disk.restart()
        host.prepare()
        assert host.wal.groups[RANGE].hard_state == HardState(6, 1, 25)


async def test_a_reincarnated_replica_keeps_term_vote_and_promise_on_disk_too(autojump_clock: MockClock) -> None:
    async with world(3) as hosts:
        await hosts.write(b"k", b"v")
        leader = await led_by_another(hosts, 3)
        host = hosts[3]
        hosts.passes = lambda source, target, range_id, message: False
        replica = host.replica()
        raft = replica.raft.raft
        promised = raft.refuse_until
        raft.become_follower(40, 0)
        raft.vote = 2
        index, term = host.machine().applied_index, host.machine().applied_term
        host.catalog.reincarnate(replica, LogUpdate(RANGE, reset=ResetLog(index, term, host.machine().conf_state)))
        await trio.sleep(0.05)
        assert host.replica() is not replica
        assert host.replica().raft.raft.refuse_until >= promised
        await host.restart(power=True, kept_batches=lambda count: count)
        assert host.wal.groups[RANGE].hard_state == HardState(40, 2, index)
        assert leader.alive


async def test_a_bootstrap_is_idempotent_and_brings_nothing_back_that_has_ended(autojump_clock: MockClock) -> None:
    async with world(1, started=False) as hosts:
        host = hosts[1]
        host.catalog.bootstrap([descriptor_on(1)], 0)
        assert list(host.wal.groups) == [RANGE]
        other = descriptor_on(1, range_id=9, span=KeyRange(b"x", b"x"))
        host.wal.append([LogUpdate(RangeId(9), tombstone=Tombstone(ReplicaId(1)))])()
        host.catalog.bootstrap([other], 0)
        assert RangeId(9) not in host.wal.groups


async def test_a_state_of_a_later_term_than_the_replica_knew_brings_it_into_that_term_without_a_vote(
    autojump_clock: MockClock,
) -> None:
    async with world(1, started=False) as hosts:
        host = hosts[1]
        replica = with_log(host, commit=15)
        host.catalog.reincarnate(replica, LogUpdate(RANGE, reset=ResetLog(20, 8, conf_state_of(descriptor_on(1)))))
        assert host.wal.groups[RANGE].hard_state == HardState(8, NONE, 20)


@pytest.mark.parametrize(("commit", "kept"), [(15, 20), (25, 25)])
async def test_what_a_replica_knew_to_be_committed_stays_so_with_the_state_that_it_is_given(
    autojump_clock: MockClock, commit: int, kept: int
) -> None:
    async with world(1, started=False) as hosts:
        host = hosts[1]
        replica = with_log(host, commit=commit)
        host.catalog.reincarnate(replica, LogUpdate(RANGE, compact=CompactLog(20, 6)))
        assert host.wal.groups[RANGE].hard_state == HardState(6, 1, kept)


@pytest.mark.parametrize(("logged", "kept"), [(False, 30), (True, 35)])
async def test_a_replica_leaves_its_successor_as_committed_what_its_log_holds_and_no_more(
    autojump_clock: MockClock, logged: bool, kept: int
) -> None:
    """What it had not logged yet is lost with it. What is on its way to the disk is in the log already."""
    async with world(3, started=False) as hosts:
        host = hosts[1]
        replica = with_log(host, commit=15)
        more = tuple(Entry(6, index, data=b"") for index in range(31, 36))
        append = Message(MessageType.APP, 1, 2, 6, log_term=6, index=30, entries=more, commit=35)
        host.driver.step(replica, append)
        assert replica.raft.committed == 35
        if logged:
            host.wal.append([LogUpdate(RANGE, hard_state=HardState(6, 1, 35), entries=more)])()
        host.catalog.reincarnate(replica, LogUpdate(RANGE, compact=CompactLog(20, 6)))
        assert host.wal.groups[RANGE].hard_state == HardState(6, 1, kept)


async def test_a_split_leaves_nothing_of_a_right_half_that_has_ended_here(autojump_clock: MockClock) -> None:
    """Its keys stood in the left half's span, which ends before them from now on: nobody else would remove them."""
    async with world(3) as hosts:
        late = await split_on_two(hosts)
        late.catalog.log([LogUpdate(RIGHT, tombstone=Tombstone(ReplicaId(103)))])
        assert late.value(b"z") == b"2"
        hosts.passes = lambda source, target, range_id, message: range_id == 1
        await hosts.until(lambda: late.machine().descriptor.span.end == b"m", "the split on node 3")
        assert RIGHT not in late.catalog.replicas
        assert list(late.engine.scan(keys.user_key(b"m"), keys.USER_END)) == []


async def test_trap_20_the_data_of_a_bootstrap_are_durable_before_the_log_knows_of_them(
    autojump_clock: MockClock,
) -> None:
    """A group without its data would wait for a snapshot that nobody can send: it is the only replica."""
    async with world(1, replicas=0, started=False) as hosts:
        host = hosts[1]
        host.catalog.bootstrap([descriptor_on(1)], 0)
        host.engine = host.engine.crash(lambda count: 0)
        host.prepare()
        host.catalog.recover()
        assert host.machine().applied_index == INITIAL_INDEX


async def test_a_node_that_has_only_been_asked_for_its_vote_has_lost_no_engine(autojump_clock: MockClock) -> None:
    """A replica without state has a log and no rows; a node that took that for a loss would not start again."""
    async with world(1, replicas=0, started=False) as hosts:
        host = hosts[1]
        host.wal.append([LogUpdate(RIGHT, create=CreateGroup(ReplicaId(101), 0, 0, ConfState()))])()
        assert not host.catalog.engine_is_gone()
        assert admit_engine(host.wal, host.engine)
        host.wal.append(
            [LogUpdate(RANGE, create=CreateGroup(ReplicaId(1), INITIAL_INDEX, INITIAL_TERM, ConfState()))]
        )()
        assert host.catalog.engine_is_gone()
        assert not admit_engine(host.wal, host.engine)
        host.begin(descriptor_on(1, range_id=3))
        assert not host.catalog.engine_is_gone()
        assert admit_engine(host.wal, host.engine)


@pytest.mark.parametrize("ended", [True, False])
async def test_trap_03_rows_that_a_removed_replica_has_left_bring_it_not_back(
    autojump_clock: MockClock, ended: bool
) -> None:
    """Nor do those of a range that has no replica on this node."""
    async with world(1, replicas=0, started=False) as hosts:
        host = hosts[1]
        batch = WriteBatch()
        descriptor = descriptor_on(1) if ended else replace(descriptor_on(3), replicas=descriptor_on(3).replicas[1:])
        RangeMachine.create(descriptor).write(batch)
        host.engine.write(batch)
        if ended:
            host.wal.append([LogUpdate(RANGE, tombstone=Tombstone(ReplicaId(1)))])()
        host.catalog.recover()
        assert not host.catalog.replicas
        assert not host.wal.groups


async def test_a_message_that_names_no_sender_makes_no_replica(autojump_clock: MockClock) -> None:
    async with world(3) as hosts:
        late = await split_on_two(hosts)
        for sender in (NONE, 103):
            message = Message(MessageType.HEARTBEAT, to=103, from_=sender, term=7)
            with pytest.raises(ProtocolError):
                late.catalog.admit(RIGHT, message, NodeId(1))
        assert RIGHT not in late.wal.groups


async def test_no_node_speaks_for_a_replica_of_this_one_or_of_another(autojump_clock: MockClock) -> None:
    """Else a vote, or an acknowledgement, could be given in a voter's name."""
    async with world(3, started=False) as hosts:
        host = hosts[1]
        host.catalog.recover()
        for sender, replica_id in ((2, 1), (2, 3), (2, NONE)):
            message = Message(MessageType.VOTE_RESP, to=1, from_=replica_id, term=INITIAL_TERM)
            with pytest.raises(ProtocolError):
                host.catalog.admit(RANGE, message, NodeId(sender))


async def test_a_replica_without_state_keeps_its_configuration_in_the_log(autojump_clock: MockClock) -> None:
    """What its core is told, that it has no members, must not be what a checkpoint of the log says."""
    async with world(1, started=False) as hosts:
        host = hosts[1]
        conf_state = conf_state_of(descriptor_on(1))
        host.wal.append([LogUpdate(RangeId(5), create=CreateGroup(ReplicaId(9), 10, INITIAL_TERM, conf_state))])()
        host.catalog.recover()
        assert host.replica(5).raft.configuration == ConfState()
        assert host.wal.groups[RangeId(5)].conf_state == conf_state


async def test_trap_07_a_lowered_promise_refuses_votes_for_the_longest_that_may_still_last(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was promised before the restart was promised for as long as the setting said then, and so was what was
    promised before the restart before that, if both came quickly."""

    def refuses_ns(host: Host) -> int:
        return host.replica().raft.raft.refuse_until - host.clock.monotonic_ns()

    async with world(3) as hosts:
        host = hosts[3]
        hosts.isolate(3)
        monkeypatch.setattr(world_module, "PROMISE_NS", PROMISE_NS // 4)
        for _ in range(2):
            await host.restart()
            assert refuses_ns(host) == PROMISE_NS
            await host.maintenance.flush_and_compact()
        await trio.sleep(PROMISE_NS / 1e9)
        await host.maintenance.flush_and_compact()
        await host.restart()
        assert refuses_ns(host) == PROMISE_NS // 4
        monkeypatch.setattr(world_module, "PROMISE_NS", PROMISE_NS)
        await host.restart()
        assert refuses_ns(host) == PROMISE_NS
        monkeypatch.setattr(world_module, "PROMISE_NS", PROMISE_NS // 4)
        await host.restart(power=True)
        assert refuses_ns(host) == PROMISE_NS


async def test_trap_07_a_longer_promise_that_cannot_be_put_on_record_is_not_given(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a crash nobody would know of it, and with the setting put back nobody would wait for its end."""
    async with world(3) as hosts:
        host = hosts[3]
        monkeypatch.setattr(world_module, "PROMISE_NS", 10 * PROMISE_NS)
        host.disk.leave(0)
        await host.restart()
        lease = host.replica().raft.raft.settings.lease
        assert lease is not None
        assert lease.promise_ns == PROMISE_NS


async def test_trap_07_what_was_promised_is_known_without_the_engine(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be in memory only, or have been removed, to be filled again by other nodes."""
    async with world(3) as hosts:
        host = hosts[3]
        hosts.isolate(3)
        monkeypatch.setattr(world_module, "PROMISE_NS", PROMISE_NS // 4)
        start, end = keys.LOCAL_PREFIX, keys.SYSTEM_PREFIX
        batch = WriteBatch()
        batch.delete_range(start, end)
        host.engine.write(batch)
        host.engine.flush()
        await host.restart()
        assert host.replica().raft.raft.refuse_until - host.clock.monotonic_ns() == PROMISE_NS
