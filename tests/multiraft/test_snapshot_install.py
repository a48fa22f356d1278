"""An install while everything else goes on: a stalled engine, a full disk, reads, messages, and entries that were held
back before it.
"""

from typing import Any

import pytest
import trio
from trio.testing import MockClock

from shardkv.errors import OutOfSpace
from shardkv.machine import keys
from shardkv.machine.entries import encode_membership
from shardkv.machine.machine import RangeMachine
from shardkv.multiraft.replica import Replica
from shardkv.multiraft.snapshot_install import Arrived
from shardkv.raft.messages import ConfChange, ConfChangeSingle, ConfChangeType, Message, MessageType
from shardkv.storage.engine import WriteBatch
from shardkv.types import KeyRange, NodeId
from tests.multiraft.scenes import Stream, behind, led_by_another, spelled, split_on_two, with_log
from tests.multiraft.world import RANGE, Answer, Host, Hosts, descriptor_on, world


async def test_an_install_writes_nothing_while_the_engine_is_stalled(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """RocksDB would hold up the loop in that write, and every other range of the node with it (DESIGN 4.2)."""
    async with world(3) as hosts:
        late = await behind(hosts)
        write = late.engine.write

        def checked(batch: WriteBatch) -> None:
            assert not late.engine.stall, "written to while it was stalled"
            write(batch)

        monkeypatch.setattr(late.engine, "write", checked)
        late.engine.stall = True
        hosts.heal()
        await hosts.until(lambda: late.snapshots.receiver._receiving, "the snapshot")
        await trio.sleep(2)
        assert not late.replica().installing, "the group rests only when it can be quick"
        leader = hosts.leader()
        hosts.isolate(leader.node_id)
        (other,) = (host for host in hosts.values() if host not in (leader, late))
        await hosts.until(lambda: other.replica().leads, "a leader by its vote", seconds=5)
        hosts.heal()
        late.engine.stall = False
        await hosts.agreed()
        assert late.value(b"new4") == b"2"


async def test_a_disk_that_fills_up_while_an_install_waits_for_the_engine_gets_none(autojump_clock: MockClock) -> None:
    """Half way into it the group would rest, and its range have no data, for as long as the disk is full."""
    async with world(3) as hosts:
        late = await behind(hosts)
        late.engine.stall = True
        hosts.heal()
        await hosts.until(lambda: late.snapshots.receiver._receiving, "the snapshot")
        await trio.sleep(2)
        late.driver.space.failed("somebody", OutOfSpace("nothing is left"))
        late.engine.stall = False
        await hosts.until(lambda: not late.snapshots.receiver._receiving, "a refusal")
        await trio.sleep(1)
        assert late.value(b"new4") is None, "nothing is installed"
        assert not late.replica().installing
        late.driver.space.succeeded("somebody")
        await hosts.agreed()
        assert late.value(b"new4") == b"2"


async def test_an_engine_that_stalls_once_an_install_has_begun_holds_up_that_alone(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with world(3) as hosts:
        late = await behind(hosts)
        install = late.snapshots.receiver._install

        async def stalled(*arguments: Any) -> None:
            late.engine.stall = True
            await install(*arguments)

        monkeypatch.setattr(late.snapshots.receiver, "_install", stalled)
        hosts.heal()
        await hosts.until(lambda: late.replica().installing, "the snapshot")
        await trio.sleep(2)
        assert late.replica().installing
        late.engine.stall = False
        await hosts.agreed()
        assert late.value(b"new4") == b"2"


async def test_a_read_that_waits_for_what_a_snapshot_brings_is_served_when_it_is_in_place(
    autojump_clock: MockClock,
) -> None:
    """On an idle range nothing is applied after it, and nothing else would ever serve the read."""
    async with world(3) as hosts:
        late = await behind(hosts)
        hosts.opens = lambda source, target: False
        hosts.heal()
        await hosts.until(lambda: late.replica().raft.leader, "a leader that is known")
        read = late.read(b"new4")
        await hosts.until(lambda: late.replica().confirmed, "a confirmed read")
        hosts.opens = lambda source, target: True
        await hosts.until(lambda: late.replica().log.compact_index > 11 and not late.replica().installing)
        assert read.arrived, "nothing is left to be applied"
        assert await read.wait() == b"2"


async def test_what_a_leader_says_during_an_install_is_not_piled_up(autojump_clock: MockClock) -> None:
    """Nothing leaves a group that rests, and on a full disk it may rest for days."""
    async with world(3) as hosts:
        late = await behind(hosts)
        install = late.snapshots.install

        def held(replica: Replica, message: Message) -> None:
            late.workers.hold_others()
            install(replica, message)

        late.snapshots.install = held  # type: ignore[method-assign]
        hosts.heal()
        await hosts.until(lambda: late.replica().installing, "an install that goes on")
        await trio.sleep(60)
        raft = late.replica().raft.raft
        assert len(raft.messages) + len(raft.messages_after_append) < 5
        late.workers.release()
        await hosts.agreed()


@pytest.mark.parametrize(("term", "kept"), [(6, 30), (8, 25)])
async def test_a_reinstalled_replica_keeps_the_log_behind_its_state_only_if_that_is_of_one_history(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch, term: int, kept: int
) -> None:
    async with world(1, started=False) as hosts:
        host = hosts[1]
        replica = with_log(host, commit=15)
        replica.machine = None

        async def replace_data(replica: Replica, arrived: Arrived) -> None:
            replica.machine = RangeMachine.create(arrived.descriptor, applied_index=arrived.index, applied_term=term)

        monkeypatch.setattr(host.snapshots.receiver._installer, "replace_data", replace_data)
        host.snapshots.receiver._arrived[RANGE] = Arrived("/ingest/incoming", descriptor_on(1), 25, term)
        await host.snapshots.receiver._reinstall(replica)
        log = host.wal.groups[RANGE]
        assert (log.compact_index, log.compact_term, log.last_index()) == (25, term, kept)
        assert host.replica() is not replica


async def test_messages_that_arrive_during_an_install_neither_hurt_nor_get_lost(autojump_clock: MockClock) -> None:
    async with world(3) as hosts:
        late = await behind(hosts)
        leader = hosts.leader()
        await late.snapshots.receive(Stream(*spelled(leader, 3)), leader.node_id)
        late.workers.hold_others()
        await hosts.until(lambda: late.replica().machine is None, "the install")
        hosts.heal()
        await hosts.write(b"during", b"3")
        late.driver.step(late.replica(), Message(MessageType.VOTE, 3, 2, 90, index=1 << 30, log_term=90))
        await trio.sleep(0.3)
        assert late.replica().machine is None
        late.workers.release()
        await hosts.write(b"after", b"4")
        await hosts.agreed()
        assert (late.value(b"during"), late.value(b"after")) == (b"3", b"4")


async def overtake_node_3(hosts: Hosts, leader: Host) -> None:
    """Cut it off, write on, and send it a snapshot of what it has not heard of."""
    hosts.isolate(3)
    for number in range(3):
        await hosts.write(b"m%d" % number, b"v")
    stream = Stream(*spelled(leader, 3))
    await hosts[3].snapshots.receive(stream, leader.node_id)
    assert stream.answers == [["done"]]


async def test_trap_10_a_snapshot_is_acknowledged_when_its_place_in_the_log_is_on_disk(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With it goes the term in which it is acknowledged."""
    async with world(3) as hosts:
        late = await behind(hosts)
        index = hosts[1].machine().applied_index
        answers: list[Message] = []

        def passes(source: int, target: int, range_id: int, message: Message) -> bool:
            if (source, message.type, message.reject) == (3, MessageType.APP_RESP, False) and message.index >= index:
                answers.append(message)
            return True

        installed = late.catalog.installed

        def then_slow(replica: Replica) -> None:
            installed(replica)
            late.workers.hold_log()

        monkeypatch.setattr(late.catalog, "installed", then_slow)
        hosts.passes = passes
        hosts.heal()
        await hosts.until(lambda: not late.workers.log_open.is_set(), "the snapshot in the engine")
        await trio.sleep(1)
        assert not answers
        late.workers.release()
        await hosts.until(lambda: answers, "the acknowledgement")


async def test_an_install_waits_for_what_its_group_wanted_logged_before(autojump_clock: MockClock) -> None:
    """Entries below a snapshot that are logged after it would not fit the log any more."""
    async with world(3) as hosts:
        await hosts.write(b"k", b"v")
        leader = await led_by_another(hosts, 3)
        late = hosts[3]
        late.workers.hold_log()
        for number in range(3):
            await hosts.write(b"k%d" % number, b"v")
        await hosts.until(lambda: late.driver.log_writer.appends, "appends behind a slow sync")
        await overtake_node_3(hosts, leader)
        await trio.sleep(0.5)
        assert late.replica().installing
        late.workers.release()
        hosts.heal()
        await hosts.agreed()


async def holding_back(hosts: Hosts) -> tuple[Host, Host]:
    """The leader, and node 3, whose engine is stalled and holds back entries; an install would not wait for it."""
    await hosts.write(b"k", b"v")
    leader = await led_by_another(hosts, 3)
    late = hosts[3]
    late.engine.stall = late.engine.full = True
    for number in range(3):
        await hosts.write(b"k%d" % number, b"v")
    await hosts.until(lambda: late.driver.applier.held, "entries held back")
    return leader, late


async def test_entries_held_back_by_a_stalled_engine_are_skipped_when_a_snapshot_overtook_them(
    autojump_clock: MockClock,
) -> None:
    async with world(3) as hosts:
        leader, late = await holding_back(hosts)
        await overtake_node_3(hosts, leader)
        index = leader.machine().applied_index
        await hosts.until(lambda: late.replica().machine and late.machine().applied_index == index, "the install")
        assert late.driver.applier.held
        late.engine.stall = late.engine.full = False
        await hosts.until(lambda: not late.driver.applier.held)
        assert late.replica().raft.raft.log.applying_bytes == 0
        hosts.heal()
        await hosts.agreed()


async def change_members(host: Host, kind: ConfChangeType, replica_id: int, node_id: int | None = None) -> None:
    added = [] if node_id is None else [(node_id, replica_id)]
    change = ConfChange((ConfChangeSingle(kind, replica_id),), context=encode_membership(added))
    answer = Answer()
    host.driver.proposer.membership(host.replica(), change, answer, 0)
    await answer.wait()


async def test_a_membership_change_held_back_until_a_snapshot_came_does_not_change_what_the_snapshot_says(
    autojump_clock: MockClock,
) -> None:
    """The replica would count other voters than everybody else, until its next start."""
    async with world(3) as hosts:
        await hosts.write(b"k", b"v")
        leader = await led_by_another(hosts, 3)
        late = hosts[3]
        late.engine.stall = late.engine.full = True  # the install does not wait for that
        await change_members(leader, ConfChangeType.ADD_LEARNER_NODE, 14, NodeId(4))
        await hosts.write(b"k", b"w")
        await hosts.until(lambda: late.driver.applier.held, "a change held back")
        hosts.isolate(3)
        await change_members(leader, ConfChangeType.REMOVE_NODE, 14)
        stream = Stream(*spelled(leader, 3))
        assert not leader.replica().raft.configuration.learners
        await late.snapshots.receive(stream, leader.node_id)
        assert stream.answers == [["done"]]
        assert late.driver.applier.held
        late.engine.stall = late.engine.full = False  # before the install has begun
        index = leader.machine().applied_index
        await hosts.until(lambda: late.replica().machine and late.machine().applied_index == index, "the install")
        assert late.replica().raft.configuration == leader.replica().raft.configuration
        hosts.heal()
        await hosts.agreed()
        assert late.replica().raft.configuration == leader.replica().raft.configuration


async def test_entries_dropped_during_an_install_do_not_count_as_under_way_for_good(autojump_clock: MockClock) -> None:
    async with world(3) as hosts:
        leader, late = await holding_back(hosts)
        hosts.isolate(3)
        await hosts.write(b"m", b"v")
        stream = Stream(*spelled(leader, 3))
        await late.snapshots.receive(stream, leader.node_id)
        late.workers.hold_others()
        await hosts.until(lambda: late.replica().machine is None, "the install")
        late.engine.stall = late.engine.full = False
        await hosts.until(lambda: not late.driver.applier.held)
        late.workers.release()
        await hosts.until(lambda: late.replica().machine and not late.replica().installing, "the install's end")
        assert late.replica().raft.raft.log.applying_bytes == 0


async def test_a_range_that_has_shrunk_leaves_no_rows_where_it_was_before(autojump_clock: MockClock) -> None:
    """They are the other half's now, whose replica here may come with a snapshot, or never."""
    async with world(3) as hosts:
        late = await split_on_two(hosts)
        assert late.value(b"z") == b"2"
        leader = hosts.leader()
        stream = Stream(*spelled(leader, 3))
        await late.snapshots.receive(stream, leader.node_id)
        assert stream.answers == [["done"]]
        await hosts.until(lambda: late.catalog.replica_for_key(b"z") is None, "the install")
        assert late.machine().descriptor.span.end == b"m"
        assert late.value(b"a") == b"1"
        assert not list(late.engine.scan(*keys.user_span(KeyRange(b"m", None))))
