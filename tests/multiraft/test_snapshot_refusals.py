"""What is refused: a snapshot of a span that another range holds, one that is not wanted, and one that is none."""

from types import SimpleNamespace
from typing import Any
from zlib import crc32

import pytest
import trio
from trio.testing import MockClock

from shardkv import codec
from shardkv.errors import ProtocolError
from shardkv.machine import keys
from shardkv.machine.machine import INITIAL_TERM
from shardkv.machine.rows import AppliedState, InstallMark, pack_applied, pack_conf_state, pack_mark, unpack_applied
from shardkv.machine.snapshot import snapshot_rows
from shardkv.multiraft import snapshot_stream
from shardkv.multiraft.snapshot_install import Arrived
from shardkv.raft.messages import Message, MessageType
from shardkv.storage.wal import CompactLog, LogUpdate
from shardkv.types import KeyRange, NodeId, RangeDescriptor, RangeId
from tests.multiraft.scenes import Stream, behind, carried, compact, spelled, split_on_two, with_log
from tests.multiraft.world import RANGE, Host, descriptor_on, world


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
        assert host.snapshots.receiver._take(replica, message, arrived) is taken
        assert (len(begun), replica.installing) == (taken, taken)


async def test_what_arrives_for_a_replica_that_was_replaced_meanwhile_is_not_taken(autojump_clock: MockClock) -> None:
    async with world(1, started=False) as hosts:
        host = hosts[1]
        replica = with_log(host, commit=30)
        replica.machine = None
        replica.needs_snapshot = True
        del host.catalog.replicas[RANGE]
        arrived = Arrived("/ingest/incoming", descriptor_on(1), 40, 6)
        assert not host.snapshots.receiver._take(replica, Message(MessageType.SNAP, 1, 2, 6), arrived)
        assert not host.snapshots.receiver._arrived


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
        assert not late.snapshots.receiver._arrived
        assert not late.engine._built, "the file of a refused snapshot is still there"


@pytest.mark.parametrize("outcome", ["done", "there already", "refused", "not needed"])
async def test_a_connection_that_is_lost_before_the_outcome_is_told_is_a_stream_that_broke(
    autojump_clock: MockClock, outcome: str
) -> None:
    """Whatever was decided stands, and of what was not taken nothing is kept."""

    class Lost(Stream):
        async def send(self, message: list[Any]) -> None:
            await super().send(message)
            if self.answers:
                raise trio.BrokenResourceError("the connection is lost")

    async with world(3) as hosts:
        late = await behind(hosts)
        leader = hosts.leader()
        stream = Lost(*spelled(leader, 3))
        if outcome == "there already":
            stream = Lost(*spelled(late, 3, sender=leader.replica().replica_id))
        elif outcome == "refused":
            late.snapshots.receiver._arrived[RANGE] = Arrived("", leader.machine().descriptor, 0, 0)
        elif outcome == "not needed":
            await trio.sleep(1)  # until it is bound by no promise any more
            late.driver.step(late.replica(), Message(MessageType.VOTE, 3, 2, 90, index=1 << 30, log_term=90))
        with pytest.raises(snapshot_stream.StreamBroken):
            await late.snapshots.receive(stream, leader.node_id)
        assert not late.snapshots.receiver._receiving
        assert not late.snapshots.receiver._waiting
        if outcome == "done":
            await hosts.until(lambda: not late.snapshots.receiver.installing, "the install")
            assert late.value(b"new4") == b"2"
        late.snapshots.receiver._arrived.clear()


def _bad_snapshots(leader: Host) -> dict[str, list[list[Any]]]:
    begin, part, end = spelled(leader, 3)
    body = codec.loads(part[2])
    count = len(body) // 2
    machine = leader.machine()
    narrow = machine.descriptor.with_span(KeyRange(b"a", b"b"), machine.descriptor.epoch).to_wire()
    epoch = machine.descriptor.epoch
    newer = machine.descriptor.with_span(machine.descriptor.span, epoch._replace(span=epoch.span + 1)).to_wire()
    mark = pack_mark(InstallMark(machine.descriptor, begin[6], begin[7]))
    marked = [mark if key == keys.applied_key(RANGE) else value for key, value in zip([b"", *body], body)]
    user = next(at for at in range(0, len(body), 2) if body[at] >= keys.SYSTEM_END)
    among = [*body[:user], keys.applied_key(RangeId(2)), b"x", *body[user:]]
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
        "another epoch than its rows": spelled(leader, 3, descriptor=newer),
        "the mark of an install": [begin, *carried(marked)],
        "another id than an id": spelled(leader, 3, id=b"short"),
        "rows out of order": [begin, *carried([*body[2:4], *body[0:2], *body[4:]])],
        "rows twice": [begin, *carried([*body[:2], *body])],
        "rows of numbers": [begin, *carried([1, 2])],
        "rows of another range": [begin, *carried([*body, b"\x02" + bytes(7) + b"\x09a", b"x"])],
        "a row of another range in the middle": [begin, *carried(among)],
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
    monkeypatch.setattr(snapshot_stream, "SILENCE_SECONDS_MAX", 0.5)
    async with world(3) as hosts:
        late = await behind(hosts, writes=2)
        leader = hosts.leader()
        rows = late.rows()
        for name, parts in _bad_snapshots(leader).items():
            with pytest.raises(ProtocolError):
                await late.snapshots.receive(Stream(*parts), leader.node_id)
            assert late.rows() == rows, name
            assert not late.snapshots.receiver._receiving, name
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
        assert not late.snapshots.receiver._waiting
