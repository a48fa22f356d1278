"""A snapshot's stream breaks: what each end keeps, for how long, and that the whole is compared before it counts."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import structlog
import trio
from structlog.testing import capture_logs
from trio.testing import MockClock

from shardkv.config import SnapshotsConfig
from shardkv.errors import Corruption, ProtocolError
from shardkv.machine.keys import user_key
from shardkv.multiraft import maintenance, snapshot_sender
from shardkv.multiraft.snapshot_parts import CHUNK_BYTES, WINDOW_CHUNKS, Outgoing, Pace, Rate
from shardkv.multiraft.snapshot_stream import RESUME_SECONDS_MAX, StreamBroken
from shardkv.storage.engine import WriteBatch
from shardkv.storage.memory import MemoryEngine
from shardkv.types import KeyRange, NodeId, RangeId
from tests.multiraft.scenes import Stream, behind, spelled
from tests.multiraft.world import RANGE, Host, Hosts, descriptor_on, world

VALUE_BYTES = CHUNK_BYTES // 2
CHUNKS = 12


class Cut:
    """What a leader dials its snapshots with: each connection ends after so many messages either way."""

    def __init__(self, host: Host, *after: int | None) -> None:
        self._dial = host.snapshots.sender._dial
        self._after = list(after)
        self.dialled = 0
        self.begins: list[list[Any]] = []
        self.answers: list[list[Any]] = []
        self.rows = 0
        self.last = 0
        """The highest number of a chunk that was sent."""
        host.snapshots.sender._dial = self.dial

    @asynccontextmanager
    async def dial(self, node_id: NodeId) -> AsyncIterator[Any]:
        self.dialled += 1
        left = self._after.pop(0) if self._after else None
        async with self._dial(node_id) as stream:
            yield _CutStream(self, stream, left)


class _CutStream:
    def __init__(self, cut: Cut, stream: Any, left: int | None) -> None:
        self._cut, self._stream, self._left = cut, stream, left

    def _count(self) -> None:
        if self._left is not None:
            self._left -= 1
            if self._left < 0:
                raise trio.BrokenResourceError("cut")

    async def send(self, message: list[Any]) -> None:
        self._count()
        if message[0] == "begin":
            self._cut.begins.append(message)
        if message[0] == "rows":
            self._cut.rows += 1
            self._cut.last = max(self._cut.last, message[1])
        await self._stream.send(message)

    async def receive(self) -> list[Any]:
        answer: list[Any] = await self._stream.receive()
        self._count()
        self._cut.answers.append(answer)
        return answer


async def far_behind(hosts: Hosts, *, chunks: int = CHUNKS) -> tuple[Host, Host]:
    """The leader of a range of so many chunks, and node 3, which lacks nearly all of it and is cut off."""
    late = await behind(hosts)
    for host in (hosts[1], hosts[2]):
        batch = WriteBatch()
        for number in range(2 * chunks):
            batch.put(user_key(b"row%04d" % number), bytes([number % 251]) * VALUE_BYTES)
        host.engine.write(batch)
        host.engine.flush()
    return hosts.leader(), late


def arrived(late: Host) -> Callable[[], bool]:
    return lambda: late.value(b"new4") == b"2" if late.replica().machine else False


def same_rows(one: Host, other: Host) -> bool:
    return one.rows().items() - other.rows().items() == set() and len(one.rows()) == len(other.rows())


@pytest.mark.parametrize("after", [*range(0, 34, 3), 27, 28, 29])
async def test_a_stream_that_breaks_anywhere_goes_on_with_the_first_chunk_that_is_missing(
    autojump_clock: MockClock, after: int
) -> None:
    """However far it came, every chunk arrives once, unless nothing at all or all of it had arrived."""
    async with world(3) as hosts:
        leader, late = await far_behind(hosts)
        cut = Cut(leader, after)
        hosts.heal()
        await hosts.until(arrived(late), "the snapshot", 60)
        await hosts.agreed()
        await hosts.until(lambda: not leader.snapshots.sender._sending, "the news of it", 5)
        assert late.snapshots.statistics().chunks_received == cut.last, "a chunk arrived twice"
        if after >= 3:
            assert len({begin[1] for begin in cut.begins}) == 1, "another stream was begun"
        assert not late.snapshots.receiver._waiting
        assert not leader.engine._snapshots, "the engine snapshot is still held"


async def test_a_stream_that_breaks_again_and_again_arrives_all_the_same(autojump_clock: MockClock) -> None:
    async with world(3) as hosts:
        leader, late = await far_behind(hosts)
        cut = Cut(leader, *[6] * 20)
        hosts.heal()
        await hosts.until(arrived(late), "the snapshot", 60)
        assert cut.dialled > 3
        assert len({begin[1] for begin in cut.begins}) == 1
        # What was sent and not received before a break is all that is sent again.
        assert cut.rows <= late.snapshots.statistics().chunks_received + cut.dialled * WINDOW_CHUNKS
        await hosts.agreed()


async def test_a_stream_that_falls_silent_goes_on_over_another_connection(autojump_clock: MockClock) -> None:
    """A partition ends no connection: both ends find out by themselves."""
    async with world(3) as hosts:
        leader, late = await far_behind(hosts)
        cut = Cut(leader)
        silent = trio.Event()
        original = _CutStream.send

        async def send(self: _CutStream, message: list[Any]) -> None:
            if cut.dialled == 1 and cut.rows == 5:
                silent.set()
                await trio.sleep_forever()
            await original(self, message)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(_CutStream, "send", send)
            hosts.heal()
            await silent.wait()
            await hosts.until(arrived(late), "the snapshot", 60)
        assert len({begin[1] for begin in cut.begins}) == 1
        assert leader.snapshots.statistics().resumed >= 1
        await hosts.agreed()


async def broken(hosts: Hosts) -> tuple[Host, Host, Stream]:
    """A stream to node 3 that broke after its first chunks."""
    leader, late = await far_behind(hosts)
    begin, *parts = spelled(leader, 3)
    del parts
    outgoing = Outgoing(leader.engine.snapshot(), leader.machine().descriptor)
    chunks = [["rows", *chunk] for chunk in (outgoing.next_chunk() for _ in range(3)) if chunk is not None]
    stream = Stream(begin, *chunks)
    stream.more.set()
    with pytest.raises(StreamBroken):
        await late.snapshots.receive(stream, leader.node_id)
    leader.engine._snapshots.clear()
    return leader, late, stream


async def test_an_unfinished_file_goes_after_a_while_and_holds_no_span(autojump_clock: MockClock) -> None:
    """The sender may be gone for good."""
    async with world(3) as hosts:
        _, late, _ = await broken(hosts)
        assert late.snapshots.statistics().waiting == 1
        assert late.catalog.spans._reserved.by_range == {}
        late.snapshots.check()
        with trio.CancelScope():
            await trio.sleep(RESUME_SECONDS_MAX - 1)
            assert late.snapshots.statistics().waiting == 1
            await trio.sleep(2)
        assert late.snapshots.statistics().waiting == 0


async def test_a_connection_that_breaks_at_once_costs_nothing_of_what_had_arrived(autojump_clock: MockClock) -> None:
    """The receiver may be the first to find out: when it says how much it has."""

    class Deaf(Stream):
        async def send(self, message: list[Any]) -> None:
            raise trio.BrokenResourceError("cut")

    async with world(3) as hosts:
        leader, late, _ = await broken(hosts)
        begin = spelled(leader, 3)[0]
        with pytest.raises(StreamBroken):
            await late.snapshots.receive(Deaf(begin), leader.node_id)
        assert late.snapshots.receiver._waiting[RANGE].chunks == 3
        stream = Stream(begin)
        stream.more.set()
        with pytest.raises(StreamBroken):
            await late.snapshots.receive(stream, leader.node_id)
        assert stream.progress[0][:2] == ["from", 3]


async def test_another_stream_of_the_range_takes_the_place_of_an_unfinished_one(autojump_clock: MockClock) -> None:
    """Its leader has changed, or has begun anew: rows of two states must not come together."""
    async with world(3) as hosts:
        leader, late, _ = await broken(hosts)
        first = late.snapshots.receiver._waiting[RANGE]
        await hosts[3].driver.all_logged(late.replica())
        stream = Stream(*spelled(leader, 3, id=b"another stream ."))
        await late.snapshots.receive(stream, leader.node_id)
        assert stream.progress[0] == ["from", 0, 0], "it went on with another stream's rows"
        assert stream.answers == [["done"]]
        assert not late.snapshots.receiver._waiting
        assert first.chunks == 3
        hosts.heal()
        await hosts.agreed()


async def test_the_same_id_with_another_state_is_another_stream(autojump_clock: MockClock) -> None:
    async with world(3) as hosts:
        leader, late, _ = await broken(hosts)
        begin, *_ = spelled(leader, 3)
        begin[6] += 1
        stream = Stream(begin)
        stream.more.set()
        with pytest.raises(StreamBroken):
            await late.snapshots.receive(stream, leader.node_id)
        assert stream.progress == [["from", 0, 0]]


async def test_no_more_unfinished_files_are_kept_than_may_be_received_at_once(autojump_clock: MockClock) -> None:
    async with world(3) as hosts:
        _, late, _ = await broken(hosts)
        first = late.snapshots.receiver._waiting[RANGE]
        for number in range(2):
            other = descriptor_on(3, range_id=70 + number, span=KeyRange(b"x%d" % number, b"x%d0" % number))
            path = f"/ingest/other-{number}"
            late.snapshots.receiver._keep(
                type(first)(b"i" * 16, other, first.metadata, path, late.engine.builder(path))
            )
            late.snapshots.check()
        assert list(late.snapshots.receiver._waiting) == [70, 71]


async def test_where_both_ends_differ_on_what_was_sent_the_stream_begins_anew(autojump_clock: MockClock) -> None:
    """The sender believes no count alone: the sum of everything before must be the same."""
    async with world(3) as hosts:
        leader, late = await far_behind(hosts)
        cut = Cut(leader, 16)
        original = late.snapshots.receiver._keep

        def spoil(incoming: Any) -> None:
            incoming.checksum ^= 1
            original(incoming)

        late.snapshots.receiver._keep = spoil  # type: ignore[method-assign]
        hosts.heal()
        await hosts.until(arrived(late), "the snapshot", 60)
        assert len({begin[1] for begin in cut.begins}) == 2
        assert ["from", 0, 0] in cut.answers[1:]
        await hosts.agreed()
        assert same_rows(leader, late)


async def test_a_file_that_differs_from_what_was_sent_is_never_offered_to_the_group(autojump_clock: MockClock) -> None:
    """The whole is compared at its end, as if there had been no break."""
    async with world(3) as hosts:
        leader, late, stream = await broken(hosts)
        incoming = late.snapshots.receiver._waiting[RANGE]
        outgoing = Outgoing(leader.engine.snapshot(), leader.machine().descriptor)
        rest = []
        while (chunk := outgoing.next_chunk()) is not None:
            rest.append(["rows", *chunk])
        leader.engine._snapshots.clear()
        end = outgoing.end
        for chunks, rows, checksum in (
            (end.chunks - 1, end.rows, end.checksum),
            (end.chunks, end.rows + 1, end.checksum),
            (end.chunks, end.rows, end.checksum ^ 1),
        ):
            begin = spelled(leader, 3)[0]
            again = Stream(begin, *rest[incoming.chunks :], ["end", chunks, rows, checksum, 9])
            with pytest.raises(ProtocolError):
                await late.snapshots.receive(again, leader.node_id)
            assert not late.snapshots.receiver._arrived
            assert late.value(b"old") == b"1"
            incoming.chunks = 0  # the next one begins anew
        del stream
        hosts.heal()
        await hosts.agreed()


async def test_a_sender_that_gets_no_further_lets_go_of_its_engine_snapshot(autojump_clock: MockClock) -> None:
    """It keeps deleted data on the disk; and the group must learn that its snapshot failed."""
    async with world(3) as hosts:
        leader, late = await far_behind(hosts)
        cut = Cut(leader, 16)
        hosts.heal()
        await hosts.until(lambda: cut.dialled == 1 and late.snapshots.receiver._waiting, "the break")
        hosts.isolate(3)
        hosts.opens = lambda source, target: False
        assert leader.engine._snapshots
        await trio.sleep(RESUME_SECONDS_MAX - 5)
        assert leader.engine._snapshots
        await trio.sleep(10)
        assert not leader.engine._snapshots
        assert not leader.snapshots.sender._sending
        assert not late.snapshots.receiver._waiting
        hosts.opens = lambda source, target: True
        hosts.heal()
        await hosts.agreed()


async def test_a_sender_that_cannot_read_its_range_says_so_and_lets_go_of_its_engine_snapshot(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is no break: on another connection it would fail at the same place, and nobody would hear of the damage."""

    class Damaged:
        def __init__(self, whole: Any) -> None:
            self.get, self.get_many, self.close = whole.get, whole.get_many, whole.close
            self._scan = whole.scan

        def scan(self, *span: Any, **how: Any) -> Any:
            for number, pair in enumerate(self._scan(*span, **how)):
                if number == 15:
                    raise Corruption("engine: scanning: Corruption: block checksum mismatch")
                yield pair

    async with world(3) as hosts:
        leader, late = await far_behind(hosts)
        snapshot = leader.engine.snapshot
        monkeypatch.setattr(leader.engine, "snapshot", lambda: Damaged(snapshot()))
        structlog.reset_defaults()
        with capture_logs() as lines:
            leader.snapshots.sender._log = structlog.get_logger()
            hosts.heal()
            await hosts.until(lambda: lines, "a snapshot that is not sent")
            await hosts.until(lambda: not leader.snapshots.statistics().sending, "its end", 1)
        said = [line for line in lines if line["log_level"] == "error"]
        assert said
        assert "checksum mismatch" in said[0]["reason"]
        monkeypatch.undo()
        await hosts.until(arrived(late), "the snapshot")


async def test_a_sender_that_no_longer_leads_stops(autojump_clock: MockClock) -> None:
    """The new leader sends its own; two streams for one replica would be one too many."""
    async with world(3) as hosts:
        leader, late = await far_behind(hosts, chunks=40)
        leader.snapshots.sender.pace = Pace(leader.clock, 1024 * 1024)
        hosts.heal()
        await hosts.until(lambda: late.snapshots.receiver._receiving, "the stream")
        other = next(host for host in hosts.values() if host not in (leader, late))
        leader.replica().raft.transfer_leader(other.replica().replica_id)
        leader.driver.touch(leader.replica())
        await hosts.until(lambda: other.replica().leads, "another leader")
        await hosts.until(lambda: not leader.snapshots.sender._sending, "the end of the old stream", 1)
        assert not arrived(late)(), "the old stream has come to its end"
        await hosts.until(arrived(late), "the snapshot", 60)
        assert leader.snapshots.statistics().chunks_sent < other.snapshots.statistics().chunks_sent
        await hosts.agreed()


@pytest.mark.parametrize("end", ["sender", "receiver"])
async def test_each_end_keeps_all_its_streams_under_its_rate(autojump_clock: MockClock, end: str) -> None:
    async with world(3) as hosts:
        leader, late = await far_behind(hosts, chunks=24)
        host = leader if end == "sender" else late
        pace = Pace(host.clock, 1024 * 1024)
        if end == "sender":
            leader.snapshots.sender.pace = pace
        else:
            late.snapshots.receiver.pace = pace
        hosts.heal()
        await hosts.until(lambda: late.snapshots.receiver._receiving, "the stream")
        began = trio.current_time()
        await hosts.until(lambda: not leader.snapshots.sender._sending, "its end", 60)
        seconds = trio.current_time() - began
        assert 2.5 < seconds < 4, seconds
        await hosts.agreed()


async def test_two_streams_share_the_rate(autojump_clock: MockClock) -> None:
    clock = (hosts := None) or None
    del clock, hosts
    async with world(1) as only:
        pace = Pace(only[1].clock, 1000)
        began = trio.current_time()
        async with trio.open_nursery() as nursery:
            for _ in range(2):
                for _ in range(5):
                    nursery.start_soon(pace.spend, 200)
        assert 1.9 < trio.current_time() - began < 2.1


async def test_trap_16_a_slow_stream_holds_up_no_group(autojump_clock: MockClock) -> None:
    """Writes of the very range that is being sent are acknowledged as fast as ever; and there is no further stream."""
    async with world(3) as hosts:
        leader, late = await far_behind(hosts, chunks=40)
        leader.snapshots.sender.pace = Pace(leader.clock, 1024 * 1024)
        cut = Cut(leader)
        hosts.heal()
        await hosts.until(lambda: late.snapshots.receiver._receiving, "the stream")
        for number in range(100):
            began = trio.current_time()
            await hosts.leader().put(b"during%d" % number, b"3").wait()
            assert trio.current_time() - began < 0.05
        assert leader.snapshots.sender._sending, "the stream was over before it could hold up anything"
        assert cut.dialled == 1
        await hosts.until(arrived(late), "the snapshot", 60)
        await hosts.agreed()


async def test_trap_16_a_group_that_finds_no_place_is_told_at_once_and_asks_again(autojump_clock: MockClock) -> None:
    async with world(3) as hosts:
        leader, late = await far_behind(hosts)
        outgoing = Outgoing(leader.engine, leader.machine().descriptor)
        one = snapshot_sender._Sending(NodeId(70), 1, outgoing, Rate(leader.clock.monotonic_ns()))
        full = {(RangeId(70 + n), 1): one for n in range(SnapshotsConfig().snapshots_sending_max)}
        leader.snapshots.sender._sending.update(full)
        cut = Cut(leader)
        hosts.heal()
        for number in range(20):
            began = trio.current_time()
            await leader.put(b"full%d" % number, b"3").wait()
            assert trio.current_time() - began < 0.05
            await trio.sleep(0.05)
        assert cut.dialled == 0
        leader.snapshots.sender._sending.clear()
        await hosts.until(arrived(late), "the snapshot", 5)
        await hosts.agreed()


async def test_trap_16_what_is_installed_counts_as_received(autojump_clock: MockClock) -> None:
    """An install costs a flush and compactions: no more of them at once than streams."""
    async with world(3) as hosts:
        leader, late = await far_behind(hosts)
        count = SnapshotsConfig().snapshots_receiving_max
        late.snapshots.receiver._arrived.update({RangeId(70 + n): None for n in range(count)})  # type: ignore[misc]
        stream = Stream(*spelled(leader, 3))
        await late.snapshots.receive(stream, leader.node_id)
        assert stream.answers[0][0] == "refused"
        late.snapshots.receiver._arrived.clear()
        hosts.heal()
        await hosts.agreed()


async def test_trap_11_a_range_that_grows_while_it_is_sent_needs_no_second_snapshot(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More is written during the stream and the install than the log keeps for one that merely lags."""
    monkeypatch.setattr(maintenance, "ENTRIES_KEPT", 10)
    monkeypatch.setattr(maintenance, "LAG_ENTRIES_MAX", 20)
    async with world(3) as hosts:
        leader, late = await far_behind(hosts, chunks=40)
        leader.snapshots.sender.pace = Pace(leader.clock, 1024 * 1024)
        cut = Cut(leader)
        gate = trio.Event()
        install = late.snapshots.receiver._install

        async def slow_install(*args: Any) -> None:
            await gate.wait()
            await install(*args)

        monkeypatch.setattr(late.snapshots.receiver, "_install", slow_install)
        hosts.heal()
        await hosts.until(lambda: late.snapshots.receiver._receiving, "the stream")
        for number in range(100):
            await leader.put(b"during%d" % (number % 9), b"3").wait()
            if number % 10 == 0:
                await leader.maintenance.flush_and_compact()
        assert leader.snapshots.sender._sending
        await hosts.until(lambda: not leader.snapshots.sender._sending, "the end of the stream", 60)
        for number in range(100):
            await leader.put(b"after%d" % (number % 9), b"3").wait()
            if number % 10 == 0:
                await leader.maintenance.flush_and_compact()
        assert late.replica().installing
        gate.set()
        await hosts.agreed()
        assert cut.dialled == 1
        await leader.put(b"last", b"3").wait()
        await hosts.agreed()
        await leader.maintenance.flush_and_compact()
        assert leader.machine().applied_index - leader.wal.groups[RANGE].compact_index <= 11


@pytest.mark.parametrize("bound", ["time", "segments"])
async def test_trap_11_the_log_is_kept_for_a_receiver_only_within_bounds(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch, bound: str
) -> None:
    """It may have died with its snapshot in hand."""
    monkeypatch.setattr(maintenance, "ENTRIES_KEPT", 10)
    monkeypatch.setattr(maintenance, "LAG_ENTRIES_MAX", 20)
    async with world(3) as hosts:
        leader, late = await far_behind(hosts)
        hosts.heal()
        late.workers.hold_others()
        await hosts.until(lambda: late.snapshots.receiver._receiving, "the stream")
        leader.snapshots.sender._keep_log((RANGE, 3), leader.machine().applied_index)
        hosts.isolate(3)
        hosts.opens = lambda source, target: False
        await hosts.until(lambda: not leader.snapshots.sender._sending, "the end of the stream", 120)
        leader.snapshots.sender._keep_log((RANGE, 3), held := leader.machine().applied_index)
        for number in range(100):
            await leader.put(b"after%d" % (number % 9), b"3").wait()
        await leader.maintenance.flush_and_compact()
        assert leader.wal.groups[RANGE].compact_index <= held
        if bound == "time":
            await trio.sleep(snapshot_sender.CATCH_UP_SECONDS + 1)
        else:
            monkeypatch.setattr(maintenance, "KEEPING_SEGMENTS_MAX", 0)
        await leader.maintenance.flush_and_compact()
        assert leader.wal.groups[RANGE].compact_index > held
        late.workers.release()


async def test_a_receiver_that_has_caught_up_is_a_follower_like_any_other(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever dies soon after its snapshot does not keep the log for longer than anybody else that dies."""
    monkeypatch.setattr(maintenance, "ENTRIES_KEPT", 10)
    monkeypatch.setattr(maintenance, "LAG_ENTRIES_MAX", 20)
    async with world(3) as hosts:
        leader, _ = await far_behind(hosts)
        hosts.heal()
        await hosts.agreed()
        await leader.put(b"last", b"3").wait()
        await hosts.agreed()
        await leader.maintenance.flush_and_compact()
        hosts.isolate(3)
        hosts.opens = lambda source, target: False
        held = leader.machine().applied_index
        for number in range(100):
            await leader.put(b"after%d" % (number % 9), b"3").wait()
        await leader.maintenance.flush_and_compact()
        assert leader.wal.groups[RANGE].compact_index > held


def test_an_outgoing_snapshot_keeps_a_bounded_number_of_places_to_go_on_from() -> None:
    """And of each only its last key: nothing grows with the range."""
    engine = MemoryEngine()
    batch = WriteBatch()
    for number in range(400):
        batch.put(user_key(b"%04d" % number), bytes(CHUNK_BYTES // 4))
    engine.write(batch)
    outgoing = Outgoing(engine.snapshot(), descriptor_on(3))
    chunks: list[Any] = []
    while (chunk := outgoing.next_chunk()) is not None:
        chunks.append(chunk)
        if outgoing.unacknowledged >= WINDOW_CHUNKS:
            outgoing.acknowledge(chunk.number - WINDOW_CHUNKS + 1)
        outgoing.check()
    assert len(chunks) == 100
    assert not outgoing.resume(50, chunks[49].checksum), "it is long gone"
    assert not outgoing.resume(99, chunks[98].checksum ^ 1)
    assert outgoing.resume(98, chunks[97].checksum)
    assert [outgoing.next_chunk(), outgoing.next_chunk(), outgoing.next_chunk()] == [*chunks[98:], None]
    assert outgoing.resume(0, 0)
    assert outgoing.next_chunk() == chunks[0]
    for wrong in (0, 2):
        with pytest.raises(ProtocolError):
            outgoing.acknowledge(wrong)
