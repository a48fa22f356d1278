"""What multi-Raft implementations get wrong, tried on whole nodes without a server. See also the other modules here."""

from itertools import pairwise
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from shardkv import errors
from shardkv.errors import Busy, EpochMismatch, NotLeader, RequestError, StorageError
from shardkv.machine import keys
from shardkv.machine.entries import encode_membership
from shardkv.raft import Role
from shardkv.raft.messages import ConfChange, ConfChangeSingle, ConfChangeType, Message, MessageType
from shardkv.storage.wal import CompactLog, LogUpdate
from shardkv.types import RangeId, ReplicaRole
from shardkv.wire import commands
from tests.multiraft.scenes import behind, led_by_another
from tests.multiraft.world import PROMISE_NS, RANGE, Answer, Host, Hosts, world


def can_read(host: Host, range_id: int = RANGE) -> bool:
    return host.replica(range_id).can_read(host.clock.monotonic_ns())


async def hand_over(hosts: Hosts, leader: Host, target: int) -> None:
    leader.replica().raft.transfer_leader(target)
    leader.driver.touch(leader.replica())
    await hosts.until(lambda: hosts[target].replica().leads, f"node {target} leading")


async def test_trap_04_a_write_proposed_before_a_split_is_judged_again_when_applied(autojump_clock: MockClock) -> None:
    """It was right when it was proposed, and stands behind the split in the log."""
    async with world(3) as hosts:
        await hosts.write(b"z", b"old")
        leader = hosts.leader()
        split = leader.split(b"m", 2)
        leader.replica().proposed_ns = -(1 << 62)  # long ago: the writes need not wait for the split
        late, early = leader.put(b"z", b"lost"), leader.put(b"a", b"kept?")
        await split.wait()
        for answer in (late, early):
            (outcome,) = await answer.wait()
            assert isinstance(errors.from_wire(outcome), EpochMismatch)
        await hosts.led(2)
        await hosts.agreed(2)
        assert leader.value(b"z", 2) == b"old"


async def test_trap_06_a_transfer_that_was_given_up_gives_the_lease_not_back(autojump_clock: MockClock) -> None:
    """Its TimeoutNow may still arrive, and bypasses every promise."""
    async with world(3) as hosts:
        leader = hosts.leader()
        await hosts.write(b"k", b"v")
        await hosts.until(lambda: can_read(leader), "a lease")
        other = next(each for each in hosts if each != leader.node_id)
        term = leader.replica().raft.term
        hosts.passes = lambda source, target, range_id, message: message.type is not MessageType.TIMEOUT_NOW
        leader.replica().raft.transfer_leader(other)
        leader.driver.touch(leader.replica())
        await trio.sleep(0.02)
        for _ in range(30):
            assert not can_read(leader)
            await trio.sleep(0.1)
        assert (leader.replica().raft.term, leader.replica().leads) == (term, True)
        assert not leader.replica().raft.transferee
        assert await leader.read(b"k").wait() == b"v", "reads go on by ReadIndex"


async def test_trap_07_a_lease_does_not_outlive_a_suspension_of_its_machine(autojump_clock: MockClock) -> None:
    """The process does not notice that it slept; the clock does, at the moment of serving."""
    async with world(3) as hosts:
        leader = hosts.leader()
        await hosts.write(b"k", b"v")
        await hosts.until(lambda: can_read(leader), "a lease")
        leader.clock.suspend(5)
        assert not can_read(leader)
        hosts.isolate(leader.node_id)
        await trio.sleep(0.3)
        assert not can_read(leader)


async def test_trap_07_a_voter_that_was_suspended_promises_from_when_it_wakes_up(autojump_clock: MockClock) -> None:
    """From its last tick on, the promise would be over before the lease that rests on it has begun."""
    async with world(3) as hosts:
        leader = await led_by_another(hosts, 3)
        voter = hosts[3]
        hosts.passes = lambda source, target, range_id, message: False
        voter.clock.suspend(5)
        now, replica = voter.clock.monotonic_ns(), voter.replica()
        heartbeat = Message(MessageType.HEARTBEAT, replica.replica_id, leader.replica().replica_id, replica.raft.term)
        heartbeat.lease_stamp = leader.clock.monotonic_ns()
        heartbeat.lease_promise = PROMISE_NS
        voter.driver.step(replica, heartbeat)
        assert replica.raft.raft.refuse_until >= now + PROMISE_NS


async def test_trap_07_a_lease_ends_with_its_leaders_contact_to_a_quorum_whatever_the_drift(
    autojump_clock: MockClock,
) -> None:
    async with world(3) as hosts:
        leader = hosts.leader()
        await hosts.write(b"k", b"v")
        await hosts.until(lambda: can_read(leader), "a lease")
        leader.clock.set_drift(-0.009)
        await trio.sleep(1)
        hosts.isolate(leader.node_id)
        rest = [host for host in hosts.values() if host is not leader]
        with trio.fail_after(20):
            while not any(host.replica().leads for host in rest):  # noqa: ASYNC110
                await trio.sleep(0.001)
        assert not can_read(leader)


async def test_trap_08_a_new_leader_serves_no_read_before_an_entry_of_its_term_is_applied(
    autojump_clock: MockClock,
) -> None:
    async with world(3) as hosts:
        await hosts.write(b"k", b"v")
        leader = hosts.leader()
        target = hosts.relied_on().node_id
        hosts.passes = lambda source, to, range_id, message: message.type is not MessageType.APP_RESP
        await hand_over(hosts, leader, target)
        new = hosts[target]
        read = new.read(b"k")
        await trio.sleep(0.2)
        assert not new.replica().raft.committed_in_term
        assert not can_read(new)
        assert not read.arrived
        hosts.passes = lambda source, to, range_id, message: True
        assert await read.wait() == b"v"


async def test_trap_08_pending_reads_end_when_the_leader_changes(autojump_clock: MockClock) -> None:
    async with world(3) as hosts:
        await hosts.write(b"k", b"v")
        leader = hosts.leader()
        target = next(each for each in hosts if each != leader.node_id)
        hosts.passes = lambda source, to, range_id, message: message.type is not MessageType.HEARTBEAT_RESP
        read = leader.read(b"k")
        await trio.sleep(0.05)
        assert not read.arrived
        await hand_over(hosts, leader, target)
        with pytest.raises(NotLeader):
            await read.wait()


async def test_trap_08_pending_reads_end_when_their_range_is_split(autojump_clock: MockClock) -> None:
    async with world(3) as hosts:
        await hosts.write(b"z", b"v")
        leader = hosts.leader()
        hosts.passes = lambda source, to, range_id, message: message.type is not MessageType.HEARTBEAT_RESP
        read = leader.read(b"z")
        await trio.sleep(0.02)
        await leader.split(b"m", 2).wait()
        with pytest.raises(EpochMismatch):
            await read.wait()


def change(kind: ConfChangeType, *ids: int, added: list[tuple[int, int]] | None = None) -> ConfChange:
    singles = tuple(ConfChangeSingle(kind, each) for each in ids)
    return ConfChange(singles, context=encode_membership(added or []))


async def test_trap_09_one_replica_becomes_three_by_one_joint_change_never_through_two_voters(
    autojump_clock: MockClock,
) -> None:
    async with world(3, replicas=1) as hosts:
        await hosts.write(b"k", b"v")
        host = hosts[1]
        seen: set[tuple[int, int]] = set()
        answer = Answer()
        learners = change(ConfChangeType.ADD_LEARNER_NODE, 12, 13, added=[(2, 12), (3, 13)])
        host.driver.proposer.membership(host.replica(), learners, answer, 0)
        with pytest.raises(Busy):
            host.driver.proposer.membership(host.replica(), learners, Answer(), 0)
        await answer.wait()
        await hosts.until(
            lambda: all(RANGE in each.catalog.replicas and each.replica().machine for each in hosts.values()),
            "a snapshot on both learners",
        )
        await hosts.agreed()
        assert hosts[3].value(b"k") == b"v"

        async def watch() -> None:
            while True:
                for each in hosts.values():
                    conf_state = each.machine().conf_state
                    seen.add((len(conf_state.voters), len(conf_state.voters_outgoing)))
                await trio.sleep(0.0002)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(watch)
            answer = Answer()
            host.driver.proposer.membership(host.replica(), change(ConfChangeType.ADD_NODE, 12, 13), answer, 0)
            await answer.wait()
            await hosts.until(lambda: all(not each.machine().joint for each in hosts.values()), "the end of the change")
            await trio.sleep(0.05)
            nursery.cancel_scope.cancel()
        assert seen == {(1, 0), (3, 1), (3, 0)}
        await hosts.agreed()
        roles = {member.role for member in hosts[2].machine().descriptor.replicas}
        assert roles == {ReplicaRole.VOTER}
        await hosts[1].crash()
        await hosts.write(b"k", b"w")


async def test_trap_09_a_change_that_fits_nobody_is_applied_as_nothing_by_everybody(autojump_clock: MockClock) -> None:
    """An entry in the log cannot be refused any more; every replica must come to the same, and none must stop."""
    async with world(3) as hosts:
        leader = hosts.leader()
        before = leader.machine().descriptor
        remove_all = ConfChange(tuple(ConfChangeSingle(ConfChangeType.REMOVE_NODE, each) for each in (1, 2, 3)))
        answer = Answer()
        leader.driver.proposer.membership(leader.replica(), remove_all, answer, 0)
        with pytest.raises(RequestError):
            await answer.wait()
        await hosts.agreed()
        assert all(host.machine().descriptor == before for host in hosts.values())
        await hosts.write(b"k", b"v")


def sent_by(hosts: Hosts, node_id: int) -> list[MessageType]:
    """What the node sends from now on."""
    sent: list[MessageType] = []

    def passes(source: int, target: int, range_id: int, message: Message) -> bool:
        if source == node_id:
            sent.append(message.type)
        return True

    hosts.passes = passes
    return sent


async def test_trap_10_nothing_that_follows_from_a_write_leaves_before_its_sync(autojump_clock: MockClock) -> None:
    async with world(3) as hosts:
        leader = await led_by_another(hosts, 3)
        follower = hosts[3]
        follower.workers.hold_log()
        sent = sent_by(hosts, 3)
        await leader.put(b"k", b"v").wait()
        await trio.sleep(0.1)
        assert follower.driver.log_writer.syncing
        assert MessageType.HEARTBEAT_RESP in sent, "what needs no write is not made to wait"
        assert MessageType.APP_RESP not in sent
        follower.workers.release()
        await hosts.until(lambda: MessageType.APP_RESP in sent)


async def test_trap_10_a_whole_node_asks_for_votes_when_its_own_is_on_disk(autojump_clock: MockClock) -> None:
    """Else it could lead a term, lose that it did in a crash, and be elected for the same term once more."""
    async with world(3) as hosts:
        leader = await led_by_another(hosts, 3)
        candidate = hosts[3]
        candidate.workers.hold_log()
        sent = sent_by(hosts, 3)
        leader.replica().raft.transfer_leader(3)
        leader.driver.touch(leader.replica())
        await hosts.until(lambda: candidate.replica().raft.role is Role.CANDIDATE, "a campaign")
        await trio.sleep(0.1)
        assert candidate.driver.log_writer.syncing
        assert MessageType.VOTE not in sent
        candidate.workers.release()
        await hosts.until(lambda: candidate.replica().leads, "an election")
        assert MessageType.VOTE in sent


async def test_trap_10_a_failed_sync_ends_the_node_though_nothing_else_is_written(autojump_clock: MockClock) -> None:
    """The next write would find the log closed; until there is one, the node would look well and never answer."""
    async with world(1) as hosts:
        hosts.tolerant = True
        host = hosts[1]
        await host.put(b"k", b"v").wait()
        host.disk.fail("sync", StorageError("the disk is broken"), path_part="/wal/")
        answer = host.put(b"k", b"w")
        await hosts.until(lambda: not host.alive, "the end of the node")
        assert not answer.arrived
        assert "the disk is broken" in repr(host.error)


async def test_trap_10_a_failed_sync_of_what_belongs_to_no_turn_ends_the_node_too(autojump_clock: MockClock) -> None:
    """Creations, compactions and snapshots: what was to follow from the record does not."""
    async with world(1) as hosts:
        hosts.tolerant = True
        host = hosts[1]
        await host.put(b"k", b"v").wait()
        log, followed = host.replica().log, []
        compact = CompactLog(log.compact_index, log.term(log.compact_index))
        host.disk.fail("sync", StorageError("the disk is broken"), path_part="/wal/")
        host.driver.log_writer.append([LogUpdate(RANGE, compact=compact)], lambda: followed.append(RANGE))
        await hosts.until(lambda: not host.alive, "the end of the node")
        assert not followed
        assert "the disk is broken" in repr(host.error)


async def test_trap_10_a_single_replica_too_answers_only_what_is_on_disk(autojump_clock: MockClock) -> None:
    async with world(1) as hosts:
        host = hosts[1]
        host.workers.hold_log()
        answer = host.put(b"k", b"v")
        await trio.sleep(0.5)
        assert not answer.arrived
        assert host.value(b"k") is None
        host.workers.release()
        await answer.wait()
        await host.restart(power=True)
        await hosts.led()
        assert await host.read(b"k").wait() == b"v"


async def test_trap_10_data_and_applied_index_are_in_one_batch(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with world(1) as hosts:
        host = hosts[1]
        batches: list[Any] = []
        original = host.engine.write
        monkeypatch.setattr(host.engine, "write", lambda batch: (batches.append(batch), original(batch)))
        await host.put(b"k", b"v").wait()
        (batch,) = [each for each in batches if keys.user_key(b"k") in each.changes]
        assert keys.applied_key(RANGE) in batch.changes


async def test_trap_12_a_retry_is_answered_from_the_record_on_both_halves_of_a_split(autojump_clock: MockClock) -> None:
    async with world(3) as hosts:
        leader = hosts.leader()
        left = hosts.command(commands.Op.INCREMENT, commands.pack_increment(b"a", 1))
        right = hosts.command(commands.Op.INCREMENT, commands.pack_increment(b"z", 1))
        assert (await leader.send(left).wait(), await leader.send(right).wait()) == ([1], [1])
        await leader.split(b"m", 2).wait()
        await hosts.led(2)
        assert await hosts.leader(1).send(left, 1).wait() == [1]
        assert await hosts.leader(2).send(right, 2).wait() == [1]
        await hosts.agreed(2)
        assert leader.value(b"z", 2) == b"1"


async def test_trap_12_a_retry_is_answered_from_the_record_after_a_snapshot_and_a_restart(
    autojump_clock: MockClock,
) -> None:
    async with world(3) as hosts:
        leader = await led_by_another(hosts, 3)
        command = hosts.command(commands.Op.INCREMENT, commands.pack_increment(b"n", 1))
        hosts.isolate(3)
        hosts.heal()
        assert await leader.send(command).wait() == [1]
        late = await behind(hosts)
        hosts.heal()
        await hosts.agreed()
        await late.restart(power=True)
        await hosts.led()
        await trio.sleep(1)
        leader = hosts.leader()
        if leader is not late:
            await hand_over(hosts, leader, 3)
        await hosts.until(lambda: late.replica().raft.committed_in_term)
        assert await late.send(command).wait() == [1]
        assert late.value(b"n") == b"1"


async def leader_that_applies_nothing(hosts: Hosts) -> Host:
    """It has a lease, and commits on until its engine's ``stall`` is lifted."""
    leader = hosts.leader()
    await hosts.until(lambda: can_read(leader), "a lease")
    leader.engine.stall = True
    return leader


async def test_trap_21_a_leader_that_committed_a_split_and_has_not_applied_it_serves_nothing_of_it(
    autojump_clock: MockClock,
) -> None:
    """The right half may lead a life of its own on other nodes already."""
    async with world(3) as hosts:
        await hosts.write(b"z", b"old")
        leader = await leader_that_applies_nothing(hosts)
        split = leader.split(b"m", 2)
        await hosts.until(lambda: leader.replica().raft.committed > leader.machine().applied_index, "the commit")
        assert not can_read(leader)
        read = leader.read(b"z")
        await hosts.write(b"z", b"new", 2)
        assert not read.arrived
        leader.engine.stall = False
        await split.wait()
        with pytest.raises(EpochMismatch):
            await read.wait()


async def test_trap_22_a_leader_that_is_behind_its_followers_does_not_serve_what_they_no_longer_show(
    autojump_clock: MockClock,
) -> None:
    async with world(3) as hosts:
        await hosts.write(b"k", b"old")
        leader = await leader_that_applies_nothing(hosts)
        write = leader.put(b"k", b"new")
        follower = next(host for host in hosts.values() if host is not leader)
        await hosts.until(lambda: follower.value(b"k") == b"new", "the follower's apply")
        assert await follower.read(b"k").wait() == b"new"
        assert leader.value(b"k") == b"old"
        assert not can_read(leader)
        read = leader.read(b"k")
        await trio.sleep(0.2)
        assert not read.arrived
        assert not write.arrived
        leader.engine.stall = False
        assert await read.wait() == b"new"


async def test_trap_22_a_follower_serves_a_read_only_at_the_leaders_index(autojump_clock: MockClock) -> None:
    async with world(3) as hosts:
        leader = await led_by_another(hosts, 3)
        await hosts.write(b"k", b"old")
        await hosts.agreed()
        hosts.passes = lambda source, target, range_id, message: not (target == 3 and message.type is MessageType.APP)
        await leader.put(b"k", b"new").wait()
        read = hosts[3].read(b"k")
        await trio.sleep(0.3)
        assert not read.arrived
        hosts.passes = lambda source, target, range_id, message: True
        assert await read.wait() == b"new"


async def test_trap_25_a_condition_that_failed_fails_again_whatever_has_become_of_the_key(
    autojump_clock: MockClock,
) -> None:
    async with world(3) as hosts:
        leader = hosts.leader()
        await hosts.write(b"k", b"v")
        wrong = hosts.command(commands.Op.PUT, commands.pack_put(b"k", b"w", 0))
        (first,) = await leader.send(wrong).wait()
        delete = hosts.command(commands.Op.DELETE, commands.pack_delete(b"k"))
        assert await leader.send(delete).wait() == [True]
        assert await leader.send(wrong).wait() == [first]
        assert leader.value(b"k") is None


async def test_a_split_storm_reports_each_descriptor_and_leaves_every_node_consistent(
    autojump_clock: MockClock,
) -> None:
    async with world(3) as hosts:
        leader = hosts.leader()
        for number in range(5):
            leader = await hosts.led(RANGE)
            await leader.split(b"%c" % (ord("t") - number), 2 + number, first_replica=100 * (number + 1)).wait()
        for number in range(5):
            await hosts.led(2 + number)
            await hosts.agreed(2 + number)
        for host in hosts.values():
            held = sorted(host.machine(range_id).descriptor.span for range_id in host.catalog.replicas)
            assert (len(held), held[0].start, held[-1].end) == (6, b"", None)
            assert all(one.end == two.start for one, two in pairwise(held))
        assert len(hosts[1].descriptors) >= 10
        assert RangeId(6) in hosts[1].catalog.replicas
