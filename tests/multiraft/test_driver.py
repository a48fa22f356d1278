"""The driver and its turns on real logs, in virtual time."""

from typing import Any

import pytest
import trio
from trio.testing import MockClock

from shardkv.errors import Busy, EpochMismatch, NotLeader, OutOfSpace, StorageError
from shardkv.machine.machine import INITIAL_TERM
from shardkv.multiraft.applier import APPLIES_LATER_MAX
from shardkv.multiraft.driver import Driver, DriverHooks
from shardkv.multiraft.log_writer import FULL_DISK_RETRY_TICKS
from shardkv.multiraft.replica import CONFIRMATIONS_MAX, Proposal, Replica, WaitingRead, WriteGroup
from shardkv.multiraft.turn import Turn
from shardkv.program import leaf
from shardkv.raft.election import CAMPAIGN_TRANSFER as TRANSFER
from shardkv.raft.messages import Entry, EntryType, Message, MessageType
from shardkv.types import PLACEMENT_RANGE, KeyRange
from tests.multiraft.world import ELECTION_TICKS, RANGE, SESSION, TICK_SECONDS, Answer, Host, descriptor_on, world


async def test_nodes_that_start_together_lead_their_shares_before_any_election_timeout(
    autojump_clock: MockClock,
) -> None:
    """Only what the processes before them may have promised is waited for."""
    async with world(3, replicas=0, started=False) as hosts:
        ranges = {1: KeyRange(b"", b"h"), 2: KeyRange(b"h", b"p"), 3: KeyRange(b"p", None)}
        for host in hosts.values():
            for range_id, span in ranges.items():
                host.begin(descriptor_on(3, range_id=range_id, span=span, first_replica=10 * range_id))
        for host in hosts.values():
            await host.start()
        await trio.sleep((ELECTION_TICKS - 1) * TICK_SECONDS)
        assert sorted(hosts.leader(range_id).node_id for range_id in ranges) == [1, 2, 3]


async def test_a_confirmed_read_of_an_idle_range_is_served_at_once(autojump_clock: MockClock) -> None:
    """Nothing may ever be applied again: a read whose index is applied already waits for nothing more."""
    async with world(3) as hosts:
        await hosts.write(b"k", b"v")
        await hosts.agreed()
        for host in hosts.values():
            assert await host.read(b"k").wait() == b"v"


async def test_a_read_at_a_follower_right_after_a_write_waits_for_no_heartbeat(autojump_clock: MockClock) -> None:
    """The leader tells the one that asks how far is committed, with the answer."""
    async with world(3) as hosts:
        await hosts.agreed()
        follower = hosts.follower()
        took = []
        for number in range(20):
            await hosts.write(b"k", b"%d" % number)
            began = trio.current_time()
            assert await follower.read(b"k").wait() == b"%d" % number
            took.append(trio.current_time() - began)
            await trio.sleep(number * TICK_SECONDS / 20)
        assert max(took) < TICK_SECONDS / 2, took


async def test_a_split_makes_two_ranges_that_both_take_writes(autojump_clock: MockClock) -> None:
    async with world(3) as hosts:
        await hosts.write(b"a", b"1")
        await hosts.write(b"m", b"2")
        leader = hosts.leader()
        await leader.split(b"m", 2).wait()
        await hosts.write(b"b", b"3")
        await hosts.write(b"n", b"4", 2)
        await hosts.agreed(1)
        await hosts.agreed(2)
        for host in hosts.values():
            assert (host.value(b"a"), host.value(b"m", 2), host.value(b"n", 2)) == (b"1", b"2", b"4")
        with pytest.raises(EpochMismatch):
            await hosts.leader().read(b"m").wait()


async def test_everything_comes_back_after_a_crash_of_all_nodes(autojump_clock: MockClock) -> None:
    async with world(3) as hosts:
        for number in range(10):
            await hosts.write(b"k%d" % number, b"v")
        for host in hosts.values():
            await host.crash(power=True)
        for host in hosts.values():
            await host.start()
        await hosts.led()
        await hosts.agreed()
        assert all(host.value(b"k9") == b"v" for host in hosts.values())
        await trio.sleep(1)


async def test_a_stop_while_records_wait_behind_a_sync_is_no_error(autojump_clock: MockClock) -> None:
    """The log thread ends its last job and takes no more; what was waiting is written when the log is closed."""
    async with world(3) as hosts:
        leader = hosts.leader()
        leader.workers.hold_log()
        leader.put(b"a", b"1")
        await hosts.until(lambda: leader.driver.log_writer.syncing, "a sync under way")
        vote = Message(MessageType.VOTE, leader.replica().replica_id, 99, leader.replica().raft.term + 9)
        leader.driver.step(leader.replica(), Message(vote.type, vote.to, vote.from_, vote.term, context=TRANSFER))
        await hosts.until(lambda: leader.driver.log_writer.appends, "a record that waits")
        hosts.tolerant = True
        leader.scope.cancel()
        leader.workers.release()
        await leader.ended.wait()
        assert leader.error is None


async def test_writes_that_wait_when_the_disk_turns_out_to_be_full_are_refused(autojump_clock: MockClock) -> None:
    """They came while there was room; what there is now is for Raft's own records."""
    async with world(3) as hosts:
        leader = hosts.leader()
        leader.workers.hold_log()
        first = leader.put(b"a", b"1")
        await hosts.until(lambda: leader.driver.log_writer.syncing, "a sync under way")
        second = leader.put(b"b", b"2")
        leader.driver.space.failed("spare", OutOfSpace("no room for the next log segment"))
        leader.workers.release()
        await first.wait()
        with pytest.raises(OutOfSpace, match="no room for the next log segment"):
            await second.wait()


async def test_reads_that_cannot_be_asked_for_yet_keep_no_full_node_busy(autojump_clock: MockClock) -> None:
    """With as many confirmations under way as may be, the next must wait; what is refused meanwhile wakes nobody."""
    async with world(3) as hosts:
        await hosts.agreed()
        follower = hosts.follower()
        hosts.isolate(follower.node_id)
        for under_way in range(CONFIRMATIONS_MAX):
            follower.read(b"k")
            await hosts.until(lambda: len(follower.replica().reads or ()) > under_way, "a confirmation under way")  # noqa: B023
        follower.read(b"k")
        assert follower.replica().open_reads
        follower.driver.space.failed("a test", OutOfSpace("full"))
        follower.driver.wake()
        turns = follower.driver.statistics().turns
        for _ in range(100):
            await trio.lowlevel.checkpoint()
        assert follower.driver.statistics().turns - turns < 5


async def test_a_log_without_room_counts_as_full_until_what_found_none_is_written(autojump_clock: MockClock) -> None:
    """Not only between two tries: what is taken on during each would have to be logged before any vote is."""
    async with world(3) as hosts:
        leader = hosts.leader()
        leader.disk.fail("pwrite", OutOfSpace("no space left"), path_part="/wal/")
        leader.put(b"a", b"1")
        await hosts.until(lambda: leader.driver.space.full, "a write that found no room")
        leader.workers.hold_log()
        await trio.sleep(3 * FULL_DISK_RETRY_TICKS * TICK_SECONDS)
        assert not leader.driver.log_writer.roomless, "it is tried again"
        assert leader.driver.space.full
        leader.workers.release()
        await hosts.until(lambda: not leader.driver.space.full, "room")
        await hosts.agreed()


async def test_writes_that_wait_for_a_sync_join_the_next_one(autojump_clock: MockClock) -> None:
    """DESIGN 4.2: when it ends, all that has collected is proposed and appended as one record. The record must not go
    without them: where other leaders always send something, a node with a slow disk would never propose anything."""
    async with world(3) as hosts:
        leader = hosts.leader()
        await leader.split(b"m", 2).wait()
        other = await hosts.led(2)
        target = hosts.follower()
        other.replica(2).raft.transfer_leader(target.replica(2).replica_id)
        other.driver.touch(other.replica(2))
        await hosts.until(lambda: target.replica(2).leads, "another leader of the other range")
        await hosts.write(b"m", b"0", 2)
        leader.workers.hold_log()
        await hosts.write(b"m", b"1", 2)
        await hosts.until(lambda: leader.driver.log_writer.syncing, "a sync of what the other leader sent")
        waits = leader.put(b"a", b"1")
        await hosts.write(b"m", b"2", 2)
        await hosts.until(lambda: leader.driver.log_writer.must_sync, "more of it")
        leader.workers.release()
        leader.workers.hold_log()  # the sync under way ends, and the next one does not
        await hosts.until(lambda: leader.replica().proposals, "the write is in that one")
        leader.workers.release()
        await waits.wait()


async def test_that_more_is_committed_costs_no_sync_of_its_own(autojump_clock: MockClock) -> None:
    """The commit index may be forgotten by a crash; it rides with the next record that somebody waits for."""
    async with world(3) as hosts:
        await hosts.write(b"k", b"v")
        leader = hosts.leader()
        before = leader.driver.statistics().syncs
        for number in range(5):
            await hosts.write(b"k%d" % number, b"v")
        assert leader.driver.statistics().syncs - before == 5
        log, raft = leader.replica().log, leader.replica().raft
        assert log.hard_state.commit == raft.committed - 1, "the last one has no other to ride with"
        await hosts.commit_handed_out(leader)
        leader.driver.log_writer.write_all()
        await hosts.agreed()
        assert log.hard_state.commit == raft.committed


async def test_what_a_follower_applies_waits_for_company_until_the_next_tick(autojump_clock: MockClock) -> None:
    """Nobody waits for it; several entries in one batch of the engine cost hardly more than one."""
    async with world(3) as hosts:
        await hosts.write(b"k", b"v")
        await hosts.agreed()
        follower = hosts.follower()
        written: list[int] = []
        write = follower.engine.write
        follower.engine.write = lambda batch: (written.append(len(batch.changes)), write(batch))[1]  # type: ignore
        began = trio.current_time()
        for number in range(APPLIES_LATER_MAX):
            await hosts.write(b"k%d" % number, b"v")
        assert trio.current_time() - began < TICK_SECONDS, "the entries came between two ticks"
        waiting = len(follower.driver.applier.later)
        assert waiting > 1
        await hosts.agreed()
        assert len(written) <= 1 + APPLIES_LATER_MAX // waiting
        assert not follower.driver.applier.later
        assert follower.rows() == hosts.leader().rows()


def next_entry(replica: Replica) -> tuple[Replica, Message]:
    """An entry behind the last, as a group hands it out to be applied."""
    entry = Entry(replica.raft.term, replica.raft.last_index + 1)
    return replica, Message(MessageType.STORAGE_APPLY, entries=(entry,))


async def test_what_a_follower_applies_waits_no_longer_for_turns_that_always_find_more_to_do(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A turn that uses up its rounds applies what is due all the same."""
    async with world(3) as hosts:
        await hosts.agreed()
        follower = hosts.follower()
        driver, replica = follower.driver, follower.replica()
        one = next_entry(replica)
        applied: list[object] = []
        monkeypatch.setattr(driver.applier, "_apply", applied.append)
        monkeypatch.setattr(driver, "_perform", lambda turn: driver.touch(replica))
        driver.applier.apply([one])
        driver.touch(replica)
        driver._turn()
        assert not applied
        assert driver.applier.tick()
        driver._turn()
        assert driver._ready
        assert applied == [[one]]
        hosts.tolerant = True


async def test_a_read_that_waits_at_a_follower_has_what_it_waits_for_applied_at_once(
    autojump_clock: MockClock,
) -> None:
    async with world(3) as hosts:
        await hosts.agreed()
        follower = hosts.follower()
        driver, replica = follower.driver, follower.replica()
        one = next_entry(replica)
        applied: list[object] = []
        driver.applier._apply = applied.append  # type: ignore[method-assign, assignment]
        driver.applier.apply([one])
        assert not applied
        replica.confirmed = [(replica.raft.last_index + 1, [], 0)]
        driver._perform(Turn(confirmed=[replica]))
        assert applied == [[one]], "the read came behind the entry"
        driver.applier.apply([one])
        assert applied == [[one], [one]], "the entry came behind the read"
        hosts.tolerant = True


async def test_a_confirmed_read_does_not_wait_for_ever_at_a_replica_that_is_cut_off(
    autojump_clock: MockClock,
) -> None:
    """The leader said at which index it may be served, and then what stands there did not come."""
    async with world(3) as hosts:
        await hosts.write(b"k", b"v")
        await hosts.agreed()
        follower = hosts.follower()
        kept = (MessageType.READ_INDEX, MessageType.READ_INDEX_RESP)
        hosts.passes = lambda source, target, range_id, message: (
            follower.node_id not in (source, target) or message.type in kept
        )
        await hosts.write(b"k", b"w")
        read = follower.read(b"k")
        await hosts.until(lambda: follower.replica().confirmed, "a confirmed read")
        hosts.isolate(follower.node_id)
        with pytest.raises(Busy):
            await read.wait()
        assert not follower.replica().confirmed


async def test_an_answer_to_a_read_from_before_a_restart_confirms_none_from_after_it(
    autojump_clock: MockClock,
) -> None:
    """A leader may hold it back until a quorum answers, and that may be the very replica that has restarted."""
    async with world(3) as hosts:
        await hosts.write(b"k", b"old")
        await hosts.agreed()
        follower = hosts.follower()
        leader = hosts.leader()
        held: list[Message] = []

        def passes(source: int, target: int, range_id: int, message: Message) -> bool:
            if target != follower.node_id:
                return True
            if message.type is MessageType.READ_INDEX_RESP:
                held.append(message)
            return message.type is MessageType.HEARTBEAT and message.commit <= committed

        committed = leader.replica().raft.committed
        hosts.passes = passes
        follower.read(b"k")
        await hosts.until(lambda: held, "the leader's answer")
        await follower.restart()
        await hosts.write(b"k", b"new")
        await hosts.until(lambda: follower.replica().raft.leader, "a leader that is known")
        read = follower.read(b"k")
        await hosts.until(lambda: follower.replica().reads, "a read that was asked for")
        follower.driver.step(follower.replica(), held[0])
        with pytest.raises(Busy):
            await read.wait()


@pytest.mark.parametrize("sync_ticks", [0.1, 1.2, 3])
async def test_a_first_leader_is_elected_in_its_first_term_however_slow_the_logs_are(
    autojump_clock: MockClock, sync_ticks: float
) -> None:
    """Whoever campaigns at each tick must not give up an election that waits for votes to be on disk."""
    async with world(3, started=False) as hosts:
        for host in hosts.values():
            host.workers.latency_seconds = lambda: sync_ticks * TICK_SECONDS
            await host.start()
        leader = await hosts.led()
        assert leader.replica().raft.term == INITIAL_TERM + 1
        await leader.split(b"m", 2).wait()
        leader = await hosts.led(2)
        assert leader.replica(2).raft.term == INITIAL_TERM + 1


async def test_a_follower_applies_a_change_of_the_members_at_once(autojump_clock: MockClock) -> None:
    """Raft lets no replica campaign that has such a change committed and not applied."""
    async with world(3) as hosts:
        follower = hosts.follower()
        driver, replica = follower.driver, follower.replica()
        await hosts.agreed()
        change = Entry(replica.raft.term, replica.raft.last_index + 1, EntryType.CONF_CHANGE_V2)
        applied: list[object] = []
        driver.applier._apply = applied.append  # type: ignore[method-assign, assignment]
        plain = Message(MessageType.STORAGE_APPLY, entries=(change._replace(type=EntryType.NORMAL),))
        driver.applier.apply([(replica, plain)])
        assert not applied
        other = Message(MessageType.STORAGE_APPLY, entries=(change,))
        driver.applier.apply([(replica, other)])
        assert applied == [[(replica, plain), (replica, other)]], "in their order"
        hosts.tolerant = True


@pytest.mark.parametrize("applies", ["apply", "apply_later"], ids=["takes", "applies what is due"])
async def test_a_follower_acknowledges_before_it_applies_what_was_committed_before(
    applies: str, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a quick disk both are done in one turn; the leader, and all its clients, wait for the first only."""
    async with world(3) as hosts:
        await hosts.write(b"k", b"v")
        leader = hosts.leader()
        driver = hosts.relied_on().driver
        done: list[str] = []

        def noted(owner: object, name: str) -> None:
            original = getattr(owner, name)

            def call(*args: Any, **options: Any) -> Any:
                done.append(name)
                return original(*args, **options)

            monkeypatch.setattr(owner, name, call)

        for owner, name in (
            (driver, "_turn"),
            (driver.peers, "send"),
            (driver.peers, "flush"),
            (driver.applier, applies),
        ):
            noted(owner, name)
        monkeypatch.setattr(driver.environment.workers, "at_once", lambda: True)
        for number in range(5):
            driver.applier.tick()
            await leader.put(b"k", b"%d" % number).wait()
        turns = [turn.split() for turn in " ".join(done).split("_turn")]
        both = [turn for turn in turns if "send" in turn and applies in turn]
        assert both
        for turn in both:
            assert "flush" in turn[turn.index("send") : turn.index(applies)], turn


async def test_only_ranges_that_the_lost_node_leads_doubt_their_leader(autojump_clock: MockClock) -> None:
    """Doubt is an election at hand; where another node leads, the loss of a connection says nothing."""
    async with world(3) as hosts:
        leader = hosts.leader()
        one, other = (host for host in hosts.values() if host is not leader)
        one.driver.doubt_node(other.node_id)
        leader.driver.doubt_node(one.node_id)
        assert not any(host.replica().raft.raft.doubted for host in hosts.values())
        assert leader.replica().leads
        one.driver.doubt_node(leader.node_id)
        assert one.replica().raft.raft.doubted


async def test_after_a_start_no_stamp_is_below_what_the_ranges_here_have_applied(autojump_clock: MockClock) -> None:
    """Who answers from their state does so with a stamp no lower than the versions in it, however little has come."""
    async with world(1, replicas=0, started=False) as hosts:
        host = hosts[1]
        applied = host.hybrid_clock.now() + (1 << 20)
        host.catalog.bootstrap([descriptor_on(1)], applied)
        host.catalog.recover()
        hooks = DriverHooks(leadership=lambda replica: None, descriptor=lambda replica: None, flush=lambda: None)
        parts = (host.catalog, host.wal, host.engine, host.environment, host.hybrid_clock, host.peers, hooks)
        Driver(*parts, tick_seconds=TICK_SECONDS, read_expiry_seconds=1.0)
        assert host.hybrid_clock.last >= applied


async def test_a_full_node_still_takes_what_the_placement_group_decides(autojump_clock: MockClock) -> None:
    """Room is made by what it decides; and it is little."""
    async with world(1, replicas=0, started=False) as hosts:
        host = hosts[1]
        host.begin(descriptor_on(3))
        host.begin(descriptor_on(3, range_id=PLACEMENT_RANGE, span=KeyRange(b"", b"")))
        host.catalog.recover()
        host.driver.space.failed("a test", OutOfSpace("full"))
        taken = []
        for range_id in (RANGE, PLACEMENT_RANGE):
            replica = host.replica(range_id)
            last = replica.raft.last_index
            entries = (Entry(INITIAL_TERM, last + 1, data=b"data"),)
            message = Message(MessageType.APP, 1, 2, INITIAL_TERM, log_term=INITIAL_TERM, index=last, entries=entries)
            host.driver.step(replica, message)
            taken.append(replica.raft.last_index - last)
        assert taken == [0, 1]


@pytest.mark.parametrize("what", ["waiting", "proposals", "reads", "open_reads"])
async def test_whoever_waits_at_a_replica_that_follows_another_is_told_at_once(
    autojump_clock: MockClock, what: str
) -> None:
    """However short it led, and if it did not: the leader that its reads were handed to may be gone."""
    async with world(3) as hosts:
        follower = hosts.follower()
        driver, replica = follower.driver, follower.replica()
        answer = Answer()
        read = WaitingRead(answer, 0, lambda replica: None)
        match what:
            case "waiting":
                replica.waiting = [WriteGroup(answer, 0, SESSION, b"", [])]
            case "proposals":
                replica.proposals[1 << 40] = Proposal(9, ((answer, 0),))
            case "reads":
                replica.reads = {b"context.": (0, [read])}
            case "open_reads":
                replica.open_reads = [read]
                replica.led = True
        driver._perform(Turn(changed=[replica]))
        assert answer.count == 1
        assert isinstance(answer.error, NotLeader)
        assert answer.error.hint == hosts.leader().node_id


async def test_what_a_replaced_replica_had_synced_is_told_to_nobody(autojump_clock: MockClock) -> None:
    """Its successor may have begun the log anew; and the turns must not go on with the one that is gone."""
    async with world(3) as hosts:
        await hosts.agreed()
        follower = hosts.follower()
        driver, replaced = follower.driver, follower.replica()
        term, index = replaced.raft.term, replaced.raft.last_index
        successor = Replica(RANGE, replaced.replica_id, replaced.raft, replaced.log, replaced.machine)
        follower.catalog.replicas[RANGE] = successor
        follower.peers.frames.clear()
        answer = Message(MessageType.APP_RESP, replaced.raft.leader, replaced.replica_id, term, index=index)
        driver._synced([(replaced, Message(MessageType.STORAGE_APPEND, responses=(answer,)))])
        assert not follower.peers.frames
        driver._synced([(successor, Message(MessageType.STORAGE_APPEND, responses=(answer,)))])
        assert [node_id for node_id, _ in follower.peers.frames] == [hosts.leader().node_id]


async def test_a_message_for_a_replica_whose_node_is_not_known_is_dropped(autojump_clock: MockClock) -> None:
    """As if it were lost: Raft sends another, and whoever speaks for that replica makes its node known."""
    async with world(1) as hosts:
        host = hosts[1]
        host.driver._outgoing.messages([(host.replica(), Message(MessageType.HEARTBEAT, 77, 1, 1))])
        assert host.peers.frames == []


async def test_what_waits_for_a_sync_is_synced_whatever_comes_to_it(autojump_clock: MockClock) -> None:
    """How much is committed may wait for the next record that somebody waits for, but makes no such record wait."""
    async with world(1) as hosts:
        host = await hosts.led()
        await hosts.write(b"k", b"v")
        await hosts.until(lambda: not host.driver.log_writer.syncing, "rest")
        writer, append = host.driver.log_writer, (host.replica(), Message(MessageType.STORAGE_APPEND))
        writer.add(Turn(appends=[append]))
        writer.write()
        assert not writer.syncing
        writer.add(Turn(appends=[append], must_sync=True))
        writer.add(Turn(appends=[append]))
        writer.write()
        assert writer.syncing
        assert not writer.appends


def from_leader(leader: Host, follower: Host, kind: MessageType, entries: tuple[Entry, ...] = ()) -> Message:
    """What the leader could send next."""
    own, other = leader.replica(), follower.replica()
    last, term = other.raft.last_index, own.raft.term
    return Message(
        kind, from_=own.replica_id, to=other.replica_id, term=term, log_term=term, index=last, entries=entries
    )


async def test_a_heartbeat_is_answered_where_it_is_read_and_an_append_shares_a_turn(autojump_clock: MockClock) -> None:
    """A heartbeat has nothing to share, and another task's turn costs two wakes more."""
    async with world(3) as hosts:
        await hosts.agreed()
        leader, follower = hosts.leader(), hosts.follower()
        driver = follower.driver
        frames, turns = len(follower.peers.frames), driver.statistics().turns
        driver.step(follower.replica(), from_leader(leader, follower, MessageType.HEARTBEAT))
        driver.settle()
        assert follower.peers.frames[frames:] == [(leader.node_id, 1)]
        assert driver.statistics().turns == turns + 1
        driver.settle()
        entry = Entry(leader.replica().raft.term, follower.replica().raft.last_index + 1)
        driver.step(follower.replica(), from_leader(leader, follower, MessageType.APP, (entry,)))
        driver.step(follower.replica(), from_leader(leader, follower, MessageType.HEARTBEAT))
        driver.settle()
        assert driver.statistics().turns == turns + 1, "the turn of the append answers the heartbeat, too"
        await trio.testing.wait_all_tasks_blocked()
        assert driver.statistics().turns == turns + 2


async def test_what_fails_in_a_turn_ends_the_node_and_not_the_connection_that_gave_cause(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever reads from a peer forgives errors of the peer's."""
    async with world(3) as hosts:
        await hosts.agreed()
        leader, follower = hosts.leader(), hosts.follower()

        def broken() -> None:
            raise StorageError("the engine is broken")

        hosts.tolerant = True
        monkeypatch.setattr(follower.driver, "_turn", broken)
        follower.driver.step(follower.replica(), from_leader(leader, follower, MessageType.HEARTBEAT))
        follower.driver.settle()
        await follower.ended.wait()
        with pytest.raises(StorageError, match="the engine is broken"):
            raise leaf(follower.error)


async def test_a_turn_where_work_was_found_may_ask_for_another_and_set_a_time_for_gathering(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever waits for either waits for both."""
    async with world(1) as hosts:
        await hosts.agreed()
        driver, replica = hosts[1].driver, hosts[1].replica()
        turn = driver._turn

        def busy() -> None:
            turn()
            driver.wake()
            replica.answered(30, driver.environment.clock.monotonic_ns())
            driver.proposer.gather(replica)

        with monkeypatch.context() as patched:
            patched.setattr(driver, "_turn", busy)
            driver._turn_here()
        turns = driver.statistics().turns
        await trio.testing.wait_all_tasks_blocked()
        assert driver.statistics().turns == turns + 1


async def test_a_time_for_gathering_that_is_set_where_work_was_found_costs_no_turn(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with world(1) as hosts:
        await hosts.agreed()
        driver, replica = hosts[1].driver, hosts[1].replica()

        def answering() -> None:
            replica.answered(30, driver.environment.clock.monotonic_ns())
            driver.proposer.gather(replica)

        turns = driver.statistics().turns
        for _ in range(3):
            with monkeypatch.context() as patched:
                patched.setattr(driver, "_turn", answering)
                driver._turn_here()
            await trio.testing.wait_all_tasks_blocked()
        assert driver.statistics().turns == turns


async def test_nothing_is_done_after_a_turn_that_failed_while_the_log_still_ends(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it had applied and not written would be missing below whatever the next one writes."""
    async with world(3) as hosts:
        await hosts.agreed()
        hosts.tolerant = True
        leader, follower = hosts.leader(), hosts.follower()
        driver = follower.driver
        turns = []

        def broken() -> None:
            turns.append(driver.statistics().turns)
            raise StorageError("the engine is broken")

        monkeypatch.setattr(driver, "_turn", broken)
        follower.workers.hold_log()
        driver.log_writer.append([])
        driver.wake()
        await trio.testing.wait_all_tasks_blocked()
        assert len(turns) == 1
        driver.step(follower.replica(), from_leader(leader, follower, MessageType.HEARTBEAT))
        driver.settle()
        assert len(turns) == 1
        follower.workers.release()
        await follower.ended.wait()
        with pytest.raises(StorageError, match="the engine is broken"):
            raise leaf(follower.error)
