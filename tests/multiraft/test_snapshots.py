"""Snapshots between nodes: when they are taken, what is refused, and what a crash at each step leaves."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any
from zlib import crc32

import pytest
import trio
from trio.testing import MockClock

from shardkv import codec
from shardkv.config import SnapshotsConfig
from shardkv.errors import OutOfSpace, ProtocolError
from shardkv.machine import keys
from shardkv.machine.entries import encode_membership
from shardkv.machine.machine import INITIAL_INDEX, INITIAL_TERM, RangeMachine, conf_state_of
from shardkv.machine.rows import AppliedState, pack_applied, pack_conf_state, unpack_applied
from shardkv.machine.snapshot import installing, replace_rows, snapshot_rows
from shardkv.multiraft import maintenance, snapshot_install, snapshots
from shardkv.multiraft.replica import Replica
from shardkv.multiraft.snapshot_install import Arrived
from shardkv.raft import ProgressState, Role
from shardkv.raft.messages import NONE, ConfChange, ConfChangeSingle, ConfChangeType, Message, MessageType
from shardkv.storage.engine import WriteBatch
from shardkv.storage.memory import MemoryEngine
from shardkv.storage.wal import CompactLog, CreateGroup, LogUpdate
from shardkv.types import KeyRange, NodeId, RangeDescriptor, RangeId, ReplicaId
from tests.multiraft.test_catalog import led_by_another, split_on_two, with_log
from tests.multiraft.world import RANGE, Answer, Host, Hosts, descriptor_on, world


class Stream:
    """The sending end of a snapshot, spelled out; answers are collected."""

    def __init__(self, *parts: list[Any]) -> None:
        self.parts = list(parts)
        self.answers: list[list[Any]] = []
        """The outcome."""
        self.progress: list[list[Any]] = []
        """Where the receiver began, and what it acknowledged."""
        self.more = trio.Event()

    async def send(self, message: list[Any]) -> None:
        (self.progress if message[0] in ("from", "have") else self.answers).append(message)

    async def receive(self) -> list[Any]:
        await trio.sleep(0.001)
        if not self.parts:
            await self.more.wait()
            if not self.parts:
                raise ProtocolError("the other side went away")
        return self.parts.pop(0)


def spelled(host: Host, to: int, range_id: int = RANGE, **changes: Any) -> list[list[Any]]:
    """The messages of a snapshot of a host's range as it is now."""
    machine = host.machine(range_id)
    metadata = machine.snapshot_metadata()
    fields: dict[str, Any] = {
        "id": b"a stream of 16 B",
        "range": range_id,
        "to": to,
        "sender": host.replica(range_id).replica_id,
        "term": host.replica(range_id).raft.term,
        "index": metadata.index,
        "log_term": metadata.term,
        "conf_state": [list(part) if isinstance(part, tuple) else part for part in metadata.conf_state],
        "descriptor": machine.descriptor.to_wire(),
        "rows": [item for pair in snapshot_rows(host.engine, machine.descriptor) for item in pair],
        **changes,
    }
    rows = fields.pop("rows")
    return [["begin", *fields.values()], *carried(rows, fields["term"])]


def carried(rows: list[Any], term: int = 9, *, chunks: int = 1, count: int | None = None) -> list[list[Any]]:
    """Rows as the parts of a stream that follow its beginning; ``count`` is what the end says instead of the truth."""
    parts: list[list[Any]] = []
    checksum = 0
    size = -(-len(rows) // 2 // chunks) * 2
    for number, first in enumerate(range(0, len(rows), size or 1), 1):
        packed = codec.dumps(rows[first : first + size])
        checksum = crc32(packed, checksum)
        parts.append(["rows", number, packed, checksum])
    return [*parts, ["end", len(parts), len(rows) // 2 if count is None else count, checksum, term]]


def compact(host: Host, range_id: int = RANGE) -> None:
    """Let go of the whole log, so that whoever lacks something needs a snapshot."""
    log = host.replica(range_id).log
    index = min(host.machine(range_id).applied_index, log.hard_state.commit)
    if index > log.compact_index:
        host.driver.log_writer.append([LogUpdate(RangeId(range_id), compact=CompactLog(index, log.term(index)))])


async def behind(hosts: Hosts, *, writes: int = 5) -> Host:
    """Node 3, cut off while the others wrote and compacted; still cut off."""
    await hosts.write(b"old", b"1")
    await led_by_another(hosts, 3)
    hosts.isolate(3)
    for number in range(writes):
        await hosts.write(b"new%d" % number, b"2")
    await hosts.until(lambda: hosts[1].machine().applied_index == hosts[2].machine().applied_index)
    await trio.sleep(0.2)
    for node_id in (1, 2):
        compact(hosts[node_id])
    return hosts[3]


async def test_a_follower_that_fell_behind_the_log_gets_a_snapshot_and_goes_on(autojump_clock: MockClock) -> None:
    async with world(3) as hosts:
        late = await behind(hosts)
        hosts.heal()
        await hosts.agreed()
        assert late.value(b"new4") == b"2"
        assert late.wal.groups[RANGE].compact_index > 11
        assert late.driver.hybrid_clock.last >= late.machine().last_timestamp, "whoever reads there is told no less"
        await hosts.write(b"after", b"3")
        await hosts.agreed()


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
        await hosts.until(lambda: late.snapshots._receiving, "the snapshot")
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
        await hosts.until(lambda: late.snapshots._receiving, "the snapshot")
        await trio.sleep(2)
        late.driver.space.failed("somebody", OutOfSpace("nothing is left"))
        late.engine.stall = False
        await hosts.until(lambda: not late.snapshots._receiving, "a refusal")
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
        install = late.snapshots._install

        async def stalled(*arguments: Any) -> None:
            late.engine.stall = True
            await install(*arguments)

        monkeypatch.setattr(late.snapshots, "_install", stalled)
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


async def test_trap_01_a_follower_that_has_not_split_is_not_given_the_right_half(autojump_clock: MockClock) -> None:
    """It would write into a span that the unsplit range still owns; the log brings the split, then the data."""
    async with world(3) as hosts:
        late = await split_on_two(hosts)
        for node_id in (1, 2):
            compact(hosts[node_id], 2)
        hosts.passes = lambda source, target, range_id, message: 3 not in (source, target) or range_id == 2
        await trio.sleep(2)
        assert late.catalog.replicas.get(RangeId(2)) is None or late.replica(2).machine is None
        stream = Stream(*spelled(hosts.leader(2), 103, 2))
        await late.snapshots.receive(stream, NodeId(1))
        assert stream.answers[0][0] == "refused"
        assert "held by range 1" in stream.answers[0][1]
        assert late.value(b"z") == b"2", "the unsplit range lost a row"
        hosts.passes = lambda source, target, range_id, message: True
        await hosts.agreed(1)
        await hosts.agreed(2)
        assert late.value(b"z", 2) == b"2"


async def test_trap_01_of_two_overlapping_snapshots_on_their_way_one_is_refused(autojump_clock: MockClock) -> None:
    async with world(3) as hosts:
        late = await split_on_two(hosts)
        left, right = hosts.leader(1), hosts.leader(2)
        wide = descriptor_on(3)
        # The left half as it was before the split is on its way when the right half is offered.
        begin, *rest = spelled(left, 3, descriptor=wide.to_wire())
        slow = Stream(begin)
        async with trio.open_nursery() as nursery:

            async def receive() -> None:
                with pytest.raises(ProtocolError):
                    await late.snapshots.receive(slow, left.node_id)

            nursery.start_soon(receive)
            await trio.sleep(0.01)
            stream = Stream(*spelled(right, 103, 2))
            await late.snapshots.receive(stream, right.node_id)
            assert stream.answers[0][0] == "refused"
            slow.more.set()
        assert late.catalog.spans.overlapping(KeyRange(b"m", None)) == [1]
        del rest


async def test_trap_01_a_node_that_owns_nothing_is_not_sent_two_overlapping_snapshots(
    autojump_clock: MockClock,
) -> None:
    """Neither range has a span there yet: only what is on its way tells the second one to wait (tikv #6366)."""
    async with world(4, replicas=3) as hosts:
        leader, newcomer = hosts.leader(), hosts[4]
        wide = descriptor_on(4)
        right = descriptor_on(4, range_id=2, span=KeyRange(b"m", None), first_replica=100)

        def begin(descriptor: RangeDescriptor, first_replica: int) -> list[Any]:
            ids = [first_replica + node for node in range(1, 5)]
            return spelled(
                leader,
                ids[3],
                range=descriptor.range_id,
                sender=ids[leader.node_id - 1],
                conf_state=[ids, [], [], [], False],
                descriptor=descriptor.to_wire(),
            )[0]

        slow = Stream(begin(wide, 0))
        async with trio.open_nursery() as nursery:

            async def receive() -> None:
                with pytest.raises(ProtocolError):
                    await newcomer.snapshots.receive(slow, leader.node_id)

            nursery.start_soon(receive)
            await trio.sleep(0.01)
            assert slow.progress == [["from", 0, 0]]
            second = Stream(begin(right, 100))
            second.more.set()
            await newcomer.snapshots.receive(second, leader.node_id)
            assert second.answers[0][0] == "refused"
            assert "held by range 1" in second.answers[0][1]
            slow.more.set()
        assert newcomer.catalog.spans.overlapping(wide.span) == [], "a reservation stayed behind"


async def test_trap_01_a_split_applied_while_a_snapshot_of_the_unsplit_range_is_on_its_way(
    autojump_clock: MockClock,
) -> None:
    """The log was faster than the stream: the reservation of the stream must not stop the split, nor the stream win."""
    async with world(3) as hosts:
        late = await split_on_two(hosts)
        wide = descriptor_on(3)
        machine = late.machine()
        conf_state = [list(part) if isinstance(part, tuple) else part for part in machine.conf_state]
        # Of the state after one more entry, else the replica says at once that it has it.
        index, term = machine.applied_index + 1, machine.applied_term
        rows = dict(snapshot_rows(late.engine, machine.descriptor))
        key = keys.applied_key(RANGE)
        state = unpack_applied(rows[key])
        assert isinstance(state, AppliedState)
        rows[key] = pack_applied(index, term, state.last_timestamp, pack_conf_state(state.conf_state))
        whole = spelled(
            late,
            3,
            sender=1,
            term=9,
            index=index,
            log_term=term,
            conf_state=conf_state,
            descriptor=wide.to_wire(),
            rows=[item for pair in sorted(rows.items()) for item in pair],
        )
        stream = Stream(whole[0])
        async with trio.open_nursery() as nursery:
            nursery.start_soon(late.snapshots.receive, stream, NodeId(1))
            await trio.sleep(0.05)
            assert late.catalog.spans.overlapping(wide.span) == [1]
            hosts.passes = lambda source, target, range_id, message: True
            await hosts.until(lambda: RangeId(2) in late.catalog.replicas and late.replica(2).machine, "the split")
            stream.parts += whole[1:]
            stream.more.set()
        assert stream.progress, "it was not even begun"
        assert stream.answers == [["refused", "the replica did not need it"]]
        await hosts.agreed(1)
        await hosts.agreed(2)


async def test_no_second_snapshot_of_a_range_is_begun_before_the_first_is_in_place(autojump_clock: MockClock) -> None:
    async with world(3) as hosts:
        late = await behind(hosts)
        leader = hosts.leader()
        first = Stream(*spelled(leader, 3))
        await late.snapshots.receive(first, leader.node_id)
        assert first.answers == [["done"]]
        late.workers.hold_others()
        await hosts.until(lambda: late.replica().installing)
        await trio.sleep(0.05)
        second = Stream(*spelled(leader, 3))
        await late.snapshots.receive(second, leader.node_id)
        assert second.answers[0][0] == "refused"
        late.workers.release()
        hosts.heal()
        await hosts.agreed()


async def test_a_replica_that_asks_again_while_it_is_sent_a_snapshot_is_sent_no_other(
    autojump_clock: MockClock,
) -> None:
    """It asks at every tick until the first is in place."""
    async with world(3) as hosts:
        late = await behind(hosts)
        leader = hosts.leader()
        dialled: list[int] = []
        hosts.opens = lambda source, target: bool(dialled.append(target)) or True
        hosts.heal()
        replica = leader.replica()
        for _ in range(3):
            leader.driver.snapshot_needed(RANGE, replica.replica_id, 3, late.node_id)
        await hosts.agreed()
        assert late.value(b"new4") == b"2"
        assert dialled == [3]
        assert not leader.snapshots._sending


@pytest.mark.parametrize(("index", "taken"), [(19, False), (20, True), (40, True)])
async def test_trap_19_a_replica_that_has_lost_its_data_takes_no_state_below_what_it_once_had_applied(
    autojump_clock: MockClock, index: int, taken: bool
) -> None:
    """It has acknowledged entries up to there, and others count on them; its log cannot bring them any more."""
    async with world(1, started=False) as hosts:
        host = hosts[1]
        replica = with_log(host, commit=30)
        replica.machine = None
        replica.needs_snapshot = True
        host.catalog.log([LogUpdate(RANGE, compact=CompactLog(20, 6))])
        begun: list[object] = []
        nursery: Any = SimpleNamespace(start_soon=lambda *arguments: begun.append(arguments))
        host.snapshots.use(nursery)
        arrived = Arrived("/ingest/incoming", descriptor_on(1), index, 6)
        message = Message(MessageType.SNAP, 1, 2, 6)
        assert host.snapshots._take(replica, message, arrived) is taken
        assert (len(begun), replica.installing) == (taken, taken)


async def test_what_arrives_for_a_replica_that_was_replaced_meanwhile_is_not_taken(autojump_clock: MockClock) -> None:
    async with world(1, started=False) as hosts:
        host = hosts[1]
        replica = with_log(host, commit=30)
        replica.machine = None
        replica.needs_snapshot = True
        del host.catalog.replicas[RANGE]
        arrived = Arrived("/ingest/incoming", descriptor_on(1), 40, 6)
        assert not host.snapshots._take(replica, Message(MessageType.SNAP, 1, 2, 6), arrived)
        assert not host.snapshots._arrived


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

        monkeypatch.setattr(host.snapshots._installer, "replace_data", replace_data)
        host.snapshots._arrived[RANGE] = Arrived("/ingest/incoming", descriptor_on(1), 25, term)
        await host.snapshots._reinstall(replica)
        log = host.wal.groups[RANGE]
        assert (log.compact_index, log.compact_term, log.last_index()) == (25, term, kept)
        assert host.replica() is not replica


async def test_a_snapshot_that_the_group_does_not_want_is_refused_and_leaves_nothing(autojump_clock: MockClock) -> None:
    async with world(3) as hosts:
        late = await behind(hosts)
        leader = hosts.leader()
        parts = spelled(leader, 3)
        await trio.sleep(1)  # until it is bound by no promise any more
        late.driver.step(late.replica(), Message(MessageType.VOTE, 3, 2, 90, index=1 << 30, log_term=90))
        stream = Stream(*parts)
        await late.snapshots.receive(stream, leader.node_id)
        assert stream.answers == [["refused", "the replica did not need it"]]
        assert late.catalog.spans.overlapping(KeyRange(b"", None)) == [1]
        assert not late.catalog.spans._reserved.by_range
        assert not late.snapshots._arrived
        assert not late.engine._built, "the file of a refused snapshot is still there"


async def test_a_snapshot_that_has_arrived_before_is_not_streamed_again(autojump_clock: MockClock) -> None:
    """Its sender may not know, for the answer may be lost: a gibibyte would be sent for nothing."""
    async with world(3) as hosts:
        await hosts.write(b"k", b"v")
        await hosts.agreed()
        leader = await led_by_another(hosts, 3)
        stream = Stream(*spelled(leader, 3))
        await hosts[3].snapshots.receive(stream, leader.node_id)
        assert stream.answers == [["done"]]
        assert not stream.progress
        assert not hosts[3].catalog.spans._reserved.by_range
        await hosts.write(b"k", b"w")
        await hosts.agreed()


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


async def test_entries_held_back_by_a_stalled_engine_are_skipped_when_a_snapshot_overtook_them(
    autojump_clock: MockClock,
) -> None:
    async with world(3) as hosts:
        await hosts.write(b"k", b"v")
        leader = await led_by_another(hosts, 3)
        late = hosts[3]
        late.engine.stall = late.engine.full = True  # the install does not wait for that
        for number in range(3):
            await hosts.write(b"k%d" % number, b"v")
        await hosts.until(lambda: late.driver.applier.held, "entries held back")
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
    host.driver.propose_membership(host.replica(), change, answer, 0)
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
        await hosts.write(b"k", b"v")
        leader = await led_by_another(hosts, 3)
        late = hosts[3]
        late.engine.stall = late.engine.full = True  # the install does not wait for that
        for number in range(3):
            await hosts.write(b"k%d" % number, b"v")
        await hosts.until(lambda: late.driver.applier.held, "entries held back")
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


STEPS = ("after the mark", "after the flush", "after the ingest", "after the record", "after all")


@pytest.mark.parametrize("power", [False, True], ids=["kill", "power"])
@pytest.mark.parametrize("step", STEPS)
async def test_trap_19_a_crash_at_any_step_of_an_install(
    autojump_clock: MockClock, step: str, power: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The old state, the new one, or the mark: never a mixture, and in the end the cluster's state."""
    async with world(3) as hosts:
        late = await behind(hosts)
        reached = trio.Event()

        def stop_after(target: Any, name: str) -> None:
            original: Callable[..., Any] = getattr(target, name)

            def stopping(*args: Any) -> Any:
                if reached.is_set():
                    raise trio.ClosedResourceError("this node is dead")
                result = original(*args)
                reached.set()
                return result

            monkeypatch.setattr(target, name, stopping)

        match step:
            case "after the mark":
                stop_after(late.engine, "write")
            case "after the flush":
                stop_after(late.engine, "flush")
            case "after the ingest":
                stop_after(late.engine, "ingest")
            case "after the record":
                stop_after(late.driver, "log_snapshot")
            case _:
                late.replica()
        hosts.tolerant = True
        hosts.down = {pair for pair in hosts.down if 3 in pair}
        leader = hosts.leader()
        stream = Stream(*spelled(leader, 3))
        await late.snapshots.receive(stream, leader.node_id)
        if step == "after all":
            await hosts.until(lambda: late.replica().machine and not late.replica().installing)
        else:
            with trio.fail_after(5):
                await reached.wait()
        await late.crash(power=power)
        machine, mark = RangeMachine.load(RANGE, late.engine), installing(late.engine, RANGE)
        assert (machine is None) != (mark is None)
        await late.start()
        hosts.check()
        hosts.heal()
        await hosts.write(b"after", b"3")
        await hosts.agreed()
        assert late.value(b"new4") == b"2"
        assert not late.replica().needs_snapshot


@pytest.mark.parametrize("marked", [True, False], ids=["with-a-mark", "with-a-log-alone"])
async def test_trap_19_a_replica_whose_install_ended_half_way_serves_nothing_and_asks_again(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch, marked: bool
) -> None:
    """TRAPS 19: by the mark, which keeps its span, too; and should there be none, by a log without a state."""
    if not marked:

        def begun(batch: WriteBatch, descriptor: RangeDescriptor, index: int, term: int, *old: Any, **how: Any) -> None:
            replace_rows(batch, descriptor, *old, **how)

        monkeypatch.setattr(snapshot_install, "begin_install", begun)
    async with world(3) as hosts:
        late = await behind(hosts)
        hosts.tolerant = True
        leader = hosts.leader()
        await late.snapshots.receive(Stream(*spelled(leader, 3)), leader.node_id)
        late.workers.hold_others()
        await hosts.until(lambda: late.replica().machine is None)
        await trio.sleep(0.01)
        late.engine.flush()
        await late.restart(power=True)
        replica = late.replica()
        assert replica.needs_snapshot
        assert replica.machine is None
        assert (late.catalog.replica_for_key(b"new1") is replica) == marked, "its span must be nobody else's"
        roles = set()
        for _ in range(40):
            await trio.sleep(0.05)
            roles.add(replica.raft.role)
        assert roles == {Role.FOLLOWER}, "it campaigned with a log and no state (trap 2)"
        hosts.opens = lambda source, target: False
        hosts.heal()
        await trio.sleep(2)
        assert late.replica() is replica
        assert replica.raft.term == leader.replica().raft.term, "it campaigned"
        hosts.opens = lambda source, target: True
        await hosts.until(lambda: not late.replica().needs_snapshot, "the snapshot it asked for")
        await hosts.agreed()


async def test_trap_20_a_split_that_was_lost_and_will_not_be_replayed_leaves_a_group_that_asks_for_its_data(
    autojump_clock: MockClock,
) -> None:
    """TRAPS 1 and 20: the right half's log is on disk and its rows are not; the left half gets a snapshot from behind
    the split. What the leader sends fits the log, so nobody else would ever think of a snapshot."""
    async with world(3) as hosts:
        late = await split_on_two(hosts)
        leader = hosts.leader(2)
        members = leader.machine(2).descriptor
        created = CreateGroup(ReplicaId(103), INITIAL_INDEX, INITIAL_TERM, conf_state_of(members))
        late.catalog.log([LogUpdate(RangeId(2), create=created)])
        await trio.sleep(0.1)
        late.engine.flush()
        await late.restart(power=True)
        assert late.replica(2).machine is None
        for node_id in (1, 2):
            compact(hosts[node_id], 1)
        hosts.passes = lambda source, target, range_id, message: 3 not in (source, target) or range_id == 2
        await trio.sleep(1)
        assert late.replica(2).machine is None, "the left half still owns its span"
        assert late.replica(2).raft.leader, "nobody leads it"
        hosts.passes = lambda source, target, range_id, message: True
        await hosts.agreed(1)
        await hosts.agreed(2)
        assert late.value(b"z", 2) == b"2"
        assert not late.replica(2).needs_snapshot
        hosts.check()


async def test_trap_16_a_node_sends_and_receives_few_snapshots_at_once(autojump_clock: MockClock) -> None:
    async with world(3) as hosts:
        late = await behind(hosts)
        leader = hosts.leader()
        limits = SnapshotsConfig()
        late.snapshots._receiving.update({RangeId(70 + n): None for n in range(limits.snapshots_receiving_max)})
        stream = Stream(*spelled(leader, 3))
        await late.snapshots.receive(stream, leader.node_id)
        assert stream.answers[0][0] == "refused"
        late.snapshots._receiving.clear()
        under_way = snapshots._Sending(NodeId(70), 1)
        leader.snapshots._sending.update({(RangeId(70 + n), 1): under_way for n in range(limits.snapshots_sending_max)})
        hosts.heal()
        await trio.sleep(1)
        assert late.value(b"new4") is None
        leader.snapshots._sending.clear()
        await hosts.agreed()


@pytest.mark.parametrize(("places", "begun"), [(1, ["slow"]), (2, ["other", "slow"]), (3, ["other", "slow", "slow"])])
async def test_trap_16_the_last_place_for_a_stream_is_never_a_nodes_second(
    autojump_clock: MockClock, places: int, begun: list[str]
) -> None:
    """A slow receiver of two ranges held both places, and no other node was sent anything for as long."""
    async with world(3) as hosts:
        leader = hosts.leader()
        slow, other = (host.node_id for host in hosts.values() if host is not leader)
        await leader.split(b"t", 2).wait()
        await leader.split(b"m", 3, first_replica=200).wait()
        dialled: list[str] = []

        @asynccontextmanager
        async def dial(node_id: NodeId) -> AsyncIterator[Stream]:
            dialled.append("slow" if node_id == slow else "other")
            await trio.sleep_forever()
            yield Stream()

        leader.snapshots._dial = dial
        leader.snapshots._config = SnapshotsConfig(snapshots_sending_max=places)
        for range_id, node_id in ((1, slow), (2, slow), (3, slow), (3, other)):
            member = leader.machine(range_id).descriptor.replica_on(node_id)
            assert member is not None
            leader.snapshots.send(leader.replica(range_id), Message(MessageType.SNAP, to=member.replica_id))
        await trio.sleep(0.1)
        assert sorted(dialled) == begun
        leader.snapshots.check()


def _bad_snapshots(leader: Host) -> dict[str, list[list[Any]]]:
    begin, part, end = spelled(leader, 3)
    body = codec.loads(part[2])
    count = len(body) // 2
    machine = leader.machine()
    narrow = machine.descriptor.with_span(KeyRange(b"a", b"b"), machine.descriptor.epoch).to_wire()
    return {
        "not a begin": [["hello"]],
        "another range's descriptor": spelled(leader, 3, descriptor=descriptor_on(3, range_id=8).to_wire()),
        "an empty span": spelled(leader, 3, descriptor=descriptor_on(3, span=KeyRange(b"b", b"b")).to_wire()),
        "a configuration of strangers": spelled(leader, 3, conf_state=[[7, 8, 9], [], [], [], False]),
        "a configuration of strings": spelled(leader, 3, conf_state=[["1", "2", "3"], [], [], [], False]),
        "a voter that is a learner": spelled(leader, 3, conf_state=[[1, 2, 3], [3], [], [], False]),
        "no voters": spelled(leader, 3, conf_state=[[], [1, 2, 3], [], [], False]),
        "an index of nothing": spelled(leader, 3, index=0),
        "a term of nothing": spelled(leader, 3, log_term=INITIAL_TERM - 1),
        "another index than its rows": spelled(leader, 3, index=begin[6] + 1),
        "another span than its rows": spelled(leader, 3, descriptor=narrow),
        "another id than an id": spelled(leader, 3, id=b"short"),
        "rows out of order": [begin, *carried([*body[2:4], *body[0:2], *body[4:]])],
        "rows twice": [begin, *carried([*body[:2], *body])],
        "rows of numbers": [begin, *carried([1, 2])],
        "rows of another range": [begin, *carried([*body, b"\x02" + bytes(7) + b"\x09a", b"x"])],
        "rows of the node": [begin, *carried([b"\x01x", b"x", *body])],
        "rows missing": [begin, *carried(body, count=count + 1)],
        "a chunk missing": [begin, *carried(body, chunks=3)[1:]],
        "a chunk twice": [begin, part, part, end],
        "a chunk less than was sent": [begin, *carried(body, chunks=3)[:2], end],
        "a damaged chunk": [begin, [*part[:2], part[2][:-1] + b"!", part[3]], end],
        "another sum": [begin, part, [*end[:3], end[3] ^ 1, end[4]]],
        "no rows": [begin, ["end", 0, 0, 0, 9]],
        "an odd number": [begin, *carried(body[:1])],
        "rows that are none": [begin, ["rows", 1, b"\x01", crc32(b"\x01")], end],
        "rows that are nothing": [begin, ["rows", 1, b"", 0], end],
        "user rows only": [begin, *carried(body[-2:])],
        "silence": [begin],
    }


async def test_a_snapshot_that_is_none_ends_its_stream_and_changes_nothing(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever a peer sends is a protocol error: no assertion, no half-written range, no lost span."""
    monkeypatch.setattr(snapshots, "SILENCE_SECONDS_MAX", 0.5)
    async with world(3) as hosts:
        late = await behind(hosts, writes=2)
        leader = hosts.leader()
        rows = late.rows()
        for name, parts in _bad_snapshots(leader).items():
            with pytest.raises(ProtocolError):
                await late.snapshots.receive(Stream(*parts), leader.node_id)
            assert late.rows() == rows, name
            assert not late.snapshots._receiving, name
            assert late.catalog.spans.overlapping(KeyRange(b"", None)) == [1], name
        late.check()


async def test_a_damaged_chunk_is_found_when_it_comes_and_its_file_is_not_kept(autojump_clock: MockClock) -> None:
    """Else the stream would go on for nothing, or be resumed behind it."""
    async with world(3) as hosts:
        late = await behind(hosts)
        leader = hosts.leader()
        begin, part, _ = spelled(leader, 3)
        value = codec.loads(part[2])[-1]
        damaged = part[2].replace(value, bytes(len(value)))
        assert damaged != part[2]
        stream = Stream(begin, [*part[:2], damaged, part[3]])
        stream.more.set()
        with pytest.raises(ProtocolError, match="damaged"):
            await late.snapshots.receive(stream, leader.node_id)
        assert not late.snapshots._waiting


async def test_a_sender_whose_receiver_takes_nothing_gives_up(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stream that hangs would keep one of the few places for ever."""
    monkeypatch.setattr(snapshots, "SILENCE_SECONDS_MAX", 0.5)
    async with world(3) as hosts:
        late = await behind(hosts)
        leader = hosts.leader()

        class Stuck(Stream):
            async def send(self, message: list[Any]) -> None:
                await trio.sleep_forever()

        opened = closed = 0

        @asynccontextmanager
        async def dial(node_id: NodeId) -> AsyncIterator[Stuck]:
            nonlocal opened, closed
            opened += 1
            try:
                yield Stuck()
            finally:
                closed += 1

        original = leader.snapshots._dial
        leader.snapshots._dial = dial
        hosts.heal()
        await hosts.until(lambda: opened, "a stream")
        leader.snapshots._dial = original
        assert closed == 0
        await hosts.until(lambda: late.value(b"new4") == b"2", "another try", 60)
        assert closed == opened


async def test_who_leads_no_longer_does_not_end_a_snapshot(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The end names a term, and the receiver follows whoever sends it as that term's leader."""
    monkeypatch.setattr(snapshots, "WINDOW_CHUNKS", 1)
    async with world(3) as hosts:
        await behind(hosts)
        leader = hosts.leader()
        said: list[list[Any]] = []

        class Deposing(Stream):
            async def send(self, message: list[Any]) -> None:
                said.append(message)

            async def receive(self) -> list[Any]:
                if said[-1][0] == "begin":
                    return ["from", 0, 0]
                raft = leader.replica().raft.raft
                if leader.replica().leads:
                    raft.become_follower(raft.term + 1, NONE)
                return ["have", said[-1][1]]

        @asynccontextmanager
        async def dial(node_id: NodeId) -> AsyncIterator[Deposing]:
            yield Deposing()

        leader.snapshots._dial = dial
        hosts.heal()
        await hosts.until(lambda: said, "a stream")
        await hosts.until(lambda: not leader.snapshots._sending, "the end of the stream")
        assert not leader.replica().leads
        assert [message[0] for message in said] == ["begin", "rows"]


async def test_trap_11_the_log_keeps_what_the_receiver_of_a_snapshot_needs_next(autojump_clock: MockClock) -> None:
    """While it installs it answers nothing, so that it looks as if it were away."""
    async with world(3) as hosts:
        late = await behind(hosts)
        leader = hosts.leader()
        late.workers.hold_others()
        hosts.heal()
        await hosts.until(lambda: late.snapshots._receiving, "the stream")
        await trio.sleep(0.05)
        for number in range(maintenance.ENTRIES_KEPT + 50):
            leader.put(b"more%d" % (number % 7), b"3")
            await trio.sleep(0.003)
        peer = leader.replica().raft.status().progress[3]
        await leader.maintenance.flush_and_compact()
        needs = peer.pending_snapshot if peer.state is ProgressState.SNAPSHOT else peer.next - 1
        assert leader.wal.groups[RANGE].compact_index <= needs
        late.workers.release()
        await hosts.agreed()


async def test_trap_11_a_follower_one_entry_behind_a_new_leader_needs_no_snapshot(autojump_clock: MockClock) -> None:
    """As a follower, the new leader did not know what others lack, and cut its log by itself."""
    async with world(3) as hosts:
        await hosts.write(b"k", b"v")
        leader = await led_by_another(hosts, 3)
        other = next(host for host in hosts.values() if host.node_id not in (leader.node_id, 3))
        hosts.isolate(3)
        await hosts.write(b"k", b"w")
        index = leader.machine().applied_index
        await hosts.until(lambda: other.machine().applied_index == index and not other.driver.applier.held)
        await trio.sleep(0.2)
        await other.maintenance.flush_and_compact()
        leader.replica().raft.transfer_leader(other.replica().replica_id)
        leader.driver.touch(leader.replica())
        await hosts.until(lambda: other.replica().leads, "the transfer")
        hosts.heal()
        await hosts.agreed()
        assert hosts.leader().snapshots.statistics().chunks_sent == 0
        assert hosts[3].snapshots.statistics().chunks_received == 0


async def test_trap_11_a_follower_a_little_behind_needs_no_snapshot_and_one_far_behind_does_not_stop_compaction(
    autojump_clock: MockClock,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with world(3) as hosts:
        await led_by_another(hosts, 3)
        monkeypatch.setattr(maintenance, "ENTRIES_KEPT", 10)
        monkeypatch.setattr(maintenance, "LAG_ENTRIES_MAX", 60)
        leader = hosts.leader()
        hosts.isolate(3)

        async def write(count: int) -> None:
            for number in range(count):
                await hosts.write(b"k%d" % (number % 5), b"v")
            await trio.sleep(0.1)
            await leader.maintenance.flush_and_compact()

        held = hosts[3].replica().raft.last_index
        await write(40)
        assert leader.wal.groups[RANGE].compact_index <= held
        await write(60)
        assert leader.wal.groups[RANGE].compact_index > held
        applied = leader.machine().applied_index
        assert leader.wal.groups[RANGE].compact_index == applied - 10 - 60
        hosts.heal()
        await hosts.agreed()


async def test_trap_11_a_follower_that_lacks_large_values_does_not_stop_compaction_for_long(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is kept for it is bounded in bytes as well: a few entries may be as much as many."""
    monkeypatch.setattr(maintenance, "ENTRIES_KEPT", 2)
    monkeypatch.setattr(maintenance, "LAG_BYTES_MAX", 50_000)
    async with world(3) as hosts:
        leader = await led_by_another(hosts, 3)
        hosts.isolate(3)
        held = hosts[3].replica().raft.last_index

        async def write(count: int) -> None:
            for _ in range(count):
                await hosts.write(b"k", bytes(10_000))
            await trio.sleep(0.1)
            await leader.maintenance.flush_and_compact()

        await write(4)
        assert leader.wal.groups[RANGE].compact_index <= held
        await write(6)
        assert leader.wal.groups[RANGE].compact_index > held
        hosts.heal()
        await hosts.agreed()


async def test_trap_20_a_split_applied_behind_a_snapshot_does_not_revive_a_right_half_whose_log_begins_later(
    autojump_clock: MockClock,
) -> None:
    """A node's engine is gone, which the others make up for. The left half comes from a leader that has not applied the
    split yet, so the split is applied here once more; the right half's log has let go of what followed it."""
    async with world(3) as hosts:
        await hosts.write(b"a", b"1")
        await hosts.write(b"z", b"1")
        leader = await led_by_another(hosts, 3)
        for host in hosts.values():
            host.engine.flush()
        await leader.split(b"m", 2).wait()
        for number in range(5):
            await hosts.write(b"z", b"%d" % number, 2)
        await hosts.agreed(1)
        await hosts.agreed(2)
        late = hosts[3]
        late.engine.flush()
        compact(late, 2)
        await trio.sleep(0.1)
        for host in hosts.values():
            await host.crash(power=True)
        late.engine = MemoryEngine(crashable=True)
        for node_id in (1, 2):
            assert hosts[node_id].engine.get(keys.applied_key(2)) is None, "the split is flushed"
            hosts[node_id].engine.stall = True
            await hosts[node_id].start()
        await late.start()
        assert late.replica(1).needs_snapshot
        assert late.replica(2).needs_snapshot
        await hosts.until(lambda: late.replica(1).machine is not None, "the left half")
        for node_id in (1, 2):
            hosts[node_id].engine.stall = False
        await hosts.write(b"z", b"new", 2)
        await hosts.agreed(1)
        await hosts.agreed(2)
        assert late.value(b"z", 2) == b"new"
        assert late.value(b"a", 1) == b"1"


async def test_a_replica_that_waits_for_its_data_keeps_what_it_logs_meanwhile_on_disk_and_not_in_memory(
    autojump_clock: MockClock,
) -> None:
    """Its snapshot may be hours away: its node lacks room, or waits for those of a thousand other ranges."""
    async with world(3) as hosts:
        await hosts.write(b"k", b"v")
        await led_by_another(hosts, 3)
        late = hosts[3]
        await late.crash(power=True)
        late.engine = MemoryEngine(crashable=True)
        hosts.opens = lambda source, target: False
        await late.start()
        assert late.replica().needs_snapshot
        log = late.replica().raft.raft.log
        value = bytes(250_000)
        for _ in range(100):
            await hosts.write(b"k", value)
        await hosts.until(lambda: log.committed == hosts.leader().replica().raft.committed, "all that was written")
        kept = sum(len(entry.data) for entry in log.tail)
        assert kept <= 2 * log.applying_bytes_max, f"{kept} of {100 * len(value)} bytes are in memory"
        hosts.opens = lambda source, target: True
        await hosts.agreed()
