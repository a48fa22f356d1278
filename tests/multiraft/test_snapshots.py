"""Snapshots between nodes: who is sent one and when, how many at once, and when a sender gives up."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from shardkv.config import SnapshotsConfig
from shardkv.machine.keys import applied_key, descriptor_key, user_key
from shardkv.machine.rows import pack_applied, pack_conf_state, pack_descriptor
from shardkv.multiraft import snapshot_receiver, snapshot_sender, snapshot_stream
from shardkv.multiraft.snapshot_parts import CHUNK_BYTES, RATE_SECONDS, Outgoing, Rate, encode_begin
from shardkv.raft.messages import NONE, ConfState, Message, MessageType, SnapshotMetadata
from shardkv.storage.engine import WriteBatch
from shardkv.types import KeyRange, NodeId, RangeId
from tests.multiraft.scenes import Stream, behind, carried, led_by_another, spelled
from tests.multiraft.world import RANGE, Hosts, descriptor_on, world


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
        assert late.snapshots.statistics().installing == 0, "it could never be sent another"


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
        leader.snapshots.sender._config = SnapshotsConfig(snapshots_sending_max=8)
        dialled: list[int] = []
        hosts.opens = lambda source, target: bool(dialled.append(target)) or True
        hosts.heal()
        replica = leader.replica()
        for _ in range(3):
            leader.driver.snapshot_needed(RANGE, replica.replica_id, 3, late.node_id)
        await hosts.agreed()
        assert late.value(b"new4") == b"2"
        assert dialled == [3]
        assert not leader.snapshots.sender._sending


async def test_whoever_asks_the_wrong_replica_for_its_data_is_sent_none(autojump_clock: MockClock) -> None:
    """The notice may be late: for a range, or a replica, that is not here any more. Nor does a follower send any."""
    async with world(3) as hosts:
        leader = await hosts.led()
        replica, asking = leader.replica(), hosts.follower()
        dialled: list[int] = []
        hosts.opens = lambda source, target: bool(dialled.append(target)) or True
        own, other = replica.replica_id, asking.replica().replica_id
        leader.driver.snapshot_needed(RangeId(70), own, other, asking.node_id)
        leader.driver.snapshot_needed(RANGE, own + 70, other, asking.node_id)
        leader.driver.snapshot_needed(RANGE, own, 70, asking.node_id)
        asking.driver.snapshot_needed(RANGE, other, own, leader.node_id)
        await trio.sleep(1)
        assert dialled == []
        assert replica.stateless is None
        leader.driver.snapshot_needed(RANGE, own, other, asking.node_id)
        await trio.sleep(1)
        assert dialled == [asking.node_id]


async def test_whoever_was_deposed_while_it_dialled_says_nothing_in_a_term_that_is_another_ones(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The receiver would follow it, and refuse the one who leads that term."""
    async with world(3) as hosts:
        await behind(hosts)
        leader = hosts.leader()
        replica, own = leader.replica(), leader.replica().replica_id
        dialled: list[int] = []
        begun: list[Any] = []

        def deposed(source: int, target: int) -> bool:
            dialled.append(target)
            replica.raft.step(Message(MessageType.HEARTBEAT, own, 3 - own, replica.raft.term + 1))
            return True

        monkeypatch.setattr(snapshot_sender, "encode_begin", lambda *said: begun.append(said))
        hosts.opens = deposed
        leader.snapshots.send(replica, Message(MessageType.SNAP, 3, own, replica.raft.term))
        await trio.sleep(0.2)
        assert (dialled, replica.leads, begun) == ([3], False, [])
        assert not leader.snapshots.sender._sending


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


async def test_trap_16_a_node_sends_and_receives_few_snapshots_at_once(autojump_clock: MockClock) -> None:
    async with world(3) as hosts:
        late = await behind(hosts)
        leader = hosts.leader()
        limits = SnapshotsConfig()
        arriving = snapshot_receiver._Receiving(NodeId(70), Rate(late.clock.monotonic_ns()))
        late.snapshots.receiver._receiving.update(
            {RangeId(70 + n): arriving for n in range(limits.snapshots_receiving_max)}
        )
        stream = Stream(*spelled(leader, 3))
        await late.snapshots.receive(stream, leader.node_id)
        assert stream.answers[0][0] == "refused"
        late.snapshots.receiver._receiving.clear()
        outgoing = Outgoing(leader.engine, leader.machine(1).descriptor)
        under_way = snapshot_sender._Sending(NodeId(70), 1, outgoing, Rate(leader.clock.monotonic_ns()))
        leader.snapshots.sender._sending.update(
            {(RangeId(70 + n), 1): under_way for n in range(limits.snapshots_sending_max)}
        )
        hosts.heal()
        await trio.sleep(1)
        assert late.value(b"new4") is None
        leader.snapshots.sender._sending.clear()
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

        leader.snapshots.sender._dial = dial
        leader.snapshots.sender._config = SnapshotsConfig(snapshots_sending_max=places)
        for range_id, node_id in ((1, slow), (2, slow), (3, slow), (3, other)):
            member = leader.machine(range_id).descriptor.replica_on(node_id)
            assert member is not None
            leader.snapshots.send(leader.replica(range_id), Message(MessageType.SNAP, to=member.replica_id))
        await trio.sleep(0.1)
        assert sorted(dialled) == begun
        leader.snapshots.check()


@pytest.mark.parametrize(
    ("seconds", "places", "begun"), [(5.0, 2, [2, 4]), (5.0, 1, [1, 2]), (5.0, 3, [3, 5]), (0.5, 2, [2, 2])]
)
async def test_trap_16_streams_that_are_slow_hold_no_place_against_further_nodes(
    autojump_clock: MockClock, seconds: float, places: int, begun: list[int]
) -> None:
    """Two slow receivers held both places, and a third node was sent nothing for as long. They keep what they have."""
    async with world(6) as hosts:
        leader = hosts.leader()
        batch = WriteBatch()
        for number in range(80):
            batch.put(user_key(b"row%04d" % number), bytes(CHUNK_BYTES))
        leader.engine.write(batch)
        dialled: list[NodeId] = []

        class Trickle(Stream):
            """A receiver that takes a chunk each ``seconds``."""

            async def receive(self) -> list[Any]:
                self.chunks = getattr(self, "chunks", -1) + 1
                if not self.chunks:
                    return ["from", 0, 0]
                await trio.sleep(seconds)
                return ["have", self.chunks]

        @asynccontextmanager
        async def dial(node_id: NodeId) -> AsyncIterator[Stream]:
            dialled.append(node_id)
            yield Trickle()

        leader.snapshots.sender._dial = dial
        leader.snapshots.sender._config = SnapshotsConfig(snapshots_sending_max=places)

        async def ask() -> int:
            """Every follower asks; to how many streams were begun."""
            for host in hosts.values():
                member = leader.machine().descriptor.replica_on(host.node_id)
                assert member is not None
                if host is not leader:
                    leader.snapshots.send(leader.replica(), Message(MessageType.SNAP, to=member.replica_id))
            await trio.sleep(0.1)
            leader.snapshots.check()
            return len(dialled)

        assert await ask() == begun[0]
        await trio.sleep(RATE_SECONDS - 1)
        assert await ask() == begun[0], "there is no telling yet"
        await trio.sleep(1)
        assert await ask() == begun[1]
        await trio.sleep(RATE_SECONDS)
        assert await ask() == begun[1], "as many again, and no more"
        assert len(set(dialled)) == len(dialled), "and none was broken off"


@pytest.mark.parametrize(("bytes_per_second", "begins"), [(32 << 20, True), (1 << 20, False)])
async def test_trap_16_streams_that_have_their_share_of_a_low_rate_are_not_slow(
    autojump_clock: MockClock, bytes_per_second: int, begins: bool
) -> None:
    """Further ones would only take from them."""
    async with world(3) as hosts:
        leader = hosts.leader()
        places = SnapshotsConfig().snapshots_sending_max * 2
        leader.snapshots.sender._config = SnapshotsConfig(snapshots_sending_max=places)
        leader.snapshots.sender.pace.bytes_per_second = bytes_per_second
        for number in range(places):
            outgoing = Outgoing(leader.engine, leader.machine().descriptor)
            rate = Rate(leader.clock.monotonic_ns())
            under_way = snapshot_sender._Sending(NodeId(70 + number), 1, outgoing, rate)
            leader.snapshots.sender._sending[RangeId(70), number] = under_way
            outgoing.acknowledged_max = 6
        await trio.sleep(RATE_SECONDS)
        assert leader.snapshots.sender._has_place_for(NodeId(2)) is begins
        leader.snapshots.sender._sending.clear()


class Incoming:
    """Snapshots, each of a range of its own, that several nodes send to one that holds nothing."""

    def __init__(self, hosts: Hosts, nursery: trio.Nursery, *, seconds: float) -> None:
        self.leader, self.newcomer = hosts.leader(), hosts[6]
        self._nursery = nursery
        self._seconds = seconds
        """From one chunk to the next."""
        self._ranges = 9

    async def offer(self, sender: int, *, whole: bool = False) -> bool:
        """Whether a further stream of this node is taken. It goes on without end, or is sent at once."""
        self._ranges += 1
        number, first = self._ranges, 100 * self._ranges
        span = KeyRange(bytes([number]), bytes([number + 1]))
        descriptor = descriptor_on(6, range_id=number, span=span, first_replica=first)
        metadata = SnapshotMetadata(12, 6, ConfState(tuple(range(first + 1, first + 7))))
        begin = encode_begin(bytes(16), first + 6, first + sender, 6, metadata, descriptor)
        state = pack_applied(*metadata[:2], 0, pack_conf_state(metadata.conf_state))
        rows = [(applied_key(number), state), (descriptor_key(number), pack_descriptor(descriptor))]
        rows += [(user_key(bytes([number, row])), b"") for row in range(0 if whole else 100)]
        parts = carried([item for row in sorted(rows) for item in row], chunks=len(rows))
        stream = Trickle(0 if whole else self._seconds, begin, *parts)
        self._nursery.start_soon(self.newcomer.snapshots.receive, stream, NodeId(sender))
        await trio.sleep(0.1)
        self.newcomer.snapshots.check()
        return stream.progress[:1] == [["from", 0, 0]]


class Trickle(Stream):
    """A sender of a chunk each ``seconds``."""

    def __init__(self, seconds: float, *parts: list[Any]) -> None:
        super().__init__(*parts)
        self._seconds = seconds

    async def receive(self) -> list[Any]:
        if self.parts[0][0] == "rows":
            await trio.sleep(self._seconds)
        return await super().receive()


@pytest.mark.parametrize(
    ("seconds", "places", "mib_per_second", "taken"),
    [(5.0, 2, 32, 4), (5.0, 1, 32, 2), (5.0, 3, 32, 5), (0.5, 2, 32, 2), (1.6, 4, 32, 5), (1.6, 4, 1, 4)],
)
async def test_trap_16_streams_that_arrive_slowly_hold_no_place_against_further_nodes(
    autojump_clock: MockClock, seconds: float, places: int, mib_per_second: int, taken: int
) -> None:
    """Two slow senders held both places, and the ranges of all others waited for as long. They keep what they have.
    None is slow that has its share of a low rate."""
    async with world(6, replicas=5) as hosts, trio.open_nursery() as nursery:
        incoming = Incoming(hosts, nursery, seconds=seconds)
        incoming.newcomer.snapshots.receiver._config = SnapshotsConfig(snapshots_receiving_max=places)
        incoming.newcomer.snapshots.receiver.pace.bytes_per_second = mib_per_second << 20
        taking = [sender for sender in range(1, 6) if await incoming.offer(sender)]
        assert taking == [*range(1, places + 1)]
        await trio.sleep(RATE_SECONDS - 1)
        others = [sender for sender in range(1, 6) if sender not in taking]
        assert not any([await incoming.offer(sender) for sender in others]), "there is no telling yet"
        await trio.sleep(1)
        assert not any([await incoming.offer(sender) for sender in taking]), "the same link would carry both"
        taking += [sender for sender in others if await incoming.offer(sender)]
        assert taking == [*range(1, taken + 1)]
        await trio.sleep(RATE_SECONDS)
        assert not any([await incoming.offer(sender) for sender in range(taken + 1, 6)]), "as many again, and no more"
        assert incoming.newcomer.snapshots.statistics().receiving == taken, "and none was broken off"
        nursery.cancel_scope.cancel()


async def test_trap_16_what_has_arrived_and_waits_for_the_disk_is_not_slow(autojump_clock: MockClock) -> None:
    """A further one would only make it wait for longer."""
    async with world(6, replicas=5) as hosts, trio.open_nursery() as nursery:
        incoming = Incoming(hosts, nursery, seconds=5)
        incoming.newcomer.workers.hold_others()
        assert await incoming.offer(1, whole=True)
        assert await incoming.offer(2, whole=True)
        await trio.sleep(RATE_SECONDS)
        assert not await incoming.offer(3)
        assert incoming.newcomer.snapshots.statistics().receiving == 2
        nursery.cancel_scope.cancel()


async def test_a_snapshot_that_is_put_in_place_before_its_sender_knows_takes_one_place(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted twice, with slow ones beside it there would be more than may ever be, and a further one is refused."""
    async with world(6, replicas=5) as hosts, trio.open_nursery() as nursery:
        incoming = Incoming(hosts, nursery, seconds=5)
        receiver = incoming.newcomer.snapshots.receiver
        receiver._config = SnapshotsConfig(snapshots_receiving_max=1)
        assert await incoming.offer(1)
        await trio.sleep(RATE_SECONDS)

        async def unfinished(*_: Any) -> None:
            await trio.sleep_forever()

        async def unheard(stream: Trickle, message: list[Any]) -> None:
            if message == ["done"]:
                await trio.sleep_forever()
            await Stream.send(stream, message)

        monkeypatch.setattr(receiver._installer, "replace_data", unfinished)
        monkeypatch.setattr(Trickle, "send", unheard)
        incoming.newcomer.workers.hold_log()
        assert await incoming.offer(2, whole=True)
        assert (receiver.receiving, receiver.installing) == (2, 1)
        receiver._config = SnapshotsConfig(snapshots_receiving_max=2)
        assert await incoming.offer(3), "one of the two is slow"
        nursery.cancel_scope.cancel()


async def test_a_sender_whose_receiver_takes_nothing_gives_up(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stream that hangs would keep one of the few places for ever."""
    monkeypatch.setattr(snapshot_stream, "SILENCE_SECONDS_MAX", 0.5)
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

        original = leader.snapshots.sender._dial
        leader.snapshots.sender._dial = dial
        hosts.heal()
        await hosts.until(lambda: opened, "a stream")
        leader.snapshots.sender._dial = original
        assert closed == 0
        await hosts.until(lambda: late.value(b"new4") == b"2", "another try", 60)
        assert closed == opened


async def test_who_leads_no_longer_does_not_end_a_snapshot(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The end names a term, and the receiver follows whoever sends it as that term's leader."""
    monkeypatch.setattr(snapshot_sender, "WINDOW_CHUNKS", 1)
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

        leader.snapshots.sender._dial = dial
        hosts.heal()
        await hosts.until(lambda: said, "a stream")
        await hosts.until(lambda: not leader.snapshots.sender._sending, "the end of the stream")
        assert not leader.replica().leads
        assert [message[0] for message in said] == ["begin", "rows"]
