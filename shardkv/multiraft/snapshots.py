"""Snapshots: a range streamed to a replica that fell behind the log, and put in place there.

Lives here: when snapshots are sent, taken and installed, their limits, and going on after a break. Does not live here:
what the stream consists of (``snapshot_parts``), connections (a stream of messages is handed in), nor what an install
does to the engine (``snapshot_install``). A snapshot has a connection of its own, so that it never stands before Raft's
messages, and no group ever waits for one (trap 16): where there is no room, the group is told that it failed, and asks
again.

When the connection breaks, the sender keeps its engine snapshot and the receiver its unfinished file, both for a
bounded time, and the sender goes on after the last chunk that has arrived. A restart of either end begins anew.

The receiver builds a file as the rows come, so its memory is bounded whatever the range's size. Once the file has taken
the place of the range's data (``snapshot_install``), the log begins anew, and not before.
"""

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, suppress
from dataclasses import dataclass, replace
from typing import Any, Final, NamedTuple, Protocol

import trio

from shardkv.config import SnapshotsConfig
from shardkv.environment import Disk, Environment
from shardkv.errors import Busy, OutOfSpace, ProtocolError, ShardKVError, StorageError
from shardkv.multiraft.catalog import Catalog
from shardkv.multiraft.driver import Driver
from shardkv.multiraft.replica import Replica
from shardkv.multiraft.snapshot_install import Arrived, Installer
from shardkv.multiraft.snapshot_parts import (
    CHUNK_BYTES,
    ID_BYTES,
    WINDOW_CHUNKS,
    Begin,
    Incoming,
    Outgoing,
    Pace,
    decode_begin,
    encode_begin,
)
from shardkv.multiraft.turn import hard_state_of
from shardkv.raft.messages import Message, SnapshotMetadata
from shardkv.ranges.spans import SpanTaken
from shardkv.storage.engine import Engine
from shardkv.storage.engine import Snapshot as EngineSnapshot
from shardkv.storage.wal import CompactLog, LogUpdate, ResetLog
from shardkv.types import PLACEMENT_RANGE, NodeId, RangeDescriptor, RangeId

SILENCE_SECONDS_MAX: Final = 10.0
"""A stream on which nothing moves for this long is given up."""
FINISH_SECONDS_MAX: Final = 3 * SILENCE_SECONDS_MAX
"""The last answer may take longer: the file's last blocks are on their way to the disk."""
RESUME_SECONDS_MAX: Final = 30.0
"""After a break: how long the sender keeps its engine snapshot without getting further, and the receiver its file."""
SENDING_SECONDS_MAX: Final = 4 * 3600.0
"""No engine snapshot is kept for longer than this: it keeps deleted data on the disk."""
RETRY_SECONDS_MIN: Final = 0.1
RETRY_SECONDS_MAX: Final = 2.0
"""After a break, and after each snapshot in a row that one replica did not take: the first pause, and the bound up to
which it doubles. Raft asks again with every heartbeat, and a receiver without room may refuse for days."""
SLOW_BYTES_PER_SECOND: Final = 128 * 1024
"""A stream that is slower takes no other's place: its receiver is behind a slow link, or a slow disk."""
RATE_SECONDS: Final = 10.0
"""Over which a stream's rate is measured."""
CATCH_UP_SECONDS: Final = 60.0
"""For this long after its snapshot, the log keeps what a receiver needs next, however much that is (trap 11)."""

DEFAULTS: Final = SnapshotsConfig()

_BREAKS: Final = (ShardKVError, OSError, trio.BrokenResourceError, trio.ClosedResourceError)


class SnapshotStream(Protocol):
    """A connection of the SNAPSHOT role, as messages."""

    async def send(self, message: list[Any]) -> None: ...

    async def receive(self) -> list[Any]:
        """The next message. Raises ProtocolError at the end of the stream."""
        ...


DialSnapshot = Callable[[NodeId], AbstractAsyncContextManager[SnapshotStream]]


class StreamBroken(ProtocolError):
    """The connection ended, or went silent, in the middle: the stream may be resumed on another."""


class StreamsDiffer(ProtocolError):
    """The two ends do not agree on what was sent before the break."""


@dataclass(frozen=True, slots=True)
class SnapshotStatistics:
    """What the service has done since it started, and what it does now."""

    sending: int
    receiving: int
    """Streams now open."""
    waiting: int
    """Unfinished files that wait for their stream to go on."""
    installing: int
    chunks_sent: int
    chunks_received: int
    resumed: int
    """Streams that this node has sent on after a break, not counting those that began anew."""


class _Sending:
    """A snapshot under way."""

    __slots__ = ("_measured", "index", "node_id", "outgoing", "slow")

    def __init__(self, node_id: NodeId, index: int, outgoing: Outgoing, now_ns: int) -> None:
        self.node_id = node_id
        self.index = index
        self.outgoing = outgoing
        self.slow = False
        """Whether it was when its rate was last measured."""
        self._measured = (now_ns, 0)
        """When that was, and how many chunks had arrived."""

    def measure(self, now_ns: int, bytes_per_second_min: int) -> None:
        measured_ns, chunks = self._measured
        seconds = (now_ns - measured_ns) / 1e9
        if seconds >= RATE_SECONDS:
            arrived = self.outgoing.acknowledged_max
            self.slow = (arrived - chunks) * CHUNK_BYTES < bytes_per_second_min * seconds
            self._measured = (now_ns, arrived)


class _Failures(NamedTuple):
    """Of the snapshots of a range to one replica."""

    in_a_row: int = 0
    paused_until_ns: int = 0
    """None is sent before."""


_NO_FAILURES: Final = _Failures()


class Snapshots:
    """The node's snapshot service. :meth:`use` gives it a nursery.

    Invariants: no more than twice as many streams go out as there are places; a range is in at most one of
    ``_receiving`` and ``_arrived``, and never in ``_waiting`` with either; ``_waiting`` holds no more than may be
    received at once; a range in ``_waiting`` reserves no span.
    """

    def __init__(
        self,
        driver: Driver,
        environment: Environment,
        directory: str,
        dial: DialSnapshot,
        *,
        log: Any,
        config: SnapshotsConfig = DEFAULTS,
    ) -> None:
        self._driver = driver
        self._catalog: Catalog = driver.catalog
        self._engine: Engine = driver.engine
        self._environment = environment
        self._installer = Installer(driver, environment, log)
        self._directory = directory
        self._dial = dial
        self._log = log
        self._config = config
        self._nursery: trio.Nursery
        self._sending: dict[tuple[RangeId, int], _Sending] = {}
        """By range and receiving replica."""
        self._sent: dict[tuple[RangeId, int], tuple[int, int]] = {}
        """The index of the last snapshot that arrived, and until when the log after it is kept."""
        self._failures: dict[tuple[RangeId, int], _Failures] = {}
        """By range and receiving replica, since the last that arrived."""
        self._receiving: dict[RangeId, None] = {}
        self._waiting: dict[RangeId, Incoming] = {}
        """Snapshots whose stream broke, oldest first."""
        self._arrived: dict[RangeId, Arrived] = {}
        """By range, until its install is over."""
        self._files = 0
        self.send_pace = Pace(environment.clock, config.snapshot_send_bytes_per_second)
        self.receive_pace = Pace(environment.clock, config.snapshot_receive_bytes_per_second)
        self._chunks_sent = self._chunks_received = self._resumed = 0

    def use(self, nursery: trio.Nursery) -> None:
        """Where its tasks run: a nursery that stays open for as long as any connection is served."""
        self._nursery = nursery

    def statistics(self) -> SnapshotStatistics:
        return SnapshotStatistics(
            sending=len(self._sending),
            receiving=len(self._receiving),
            waiting=len(self._waiting),
            installing=len(self._arrived),
            chunks_sent=self._chunks_sent,
            chunks_received=self._chunks_received,
            resumed=self._resumed,
        )

    def check(self) -> None:
        config = self._config
        assert len(self._sending) <= 2 * config.snapshots_sending_max, f"{len(self._sending)} are being sent"
        assert len(self._waiting) <= config.snapshots_receiving_max, f"{len(self._waiting)} wait"
        for range_id in self._waiting:
            assert range_id not in self._receiving, f"range {range_id} waits and is received"
            assert range_id not in self._arrived, f"range {range_id} waits and is installed"

    # Sending

    def send(self, replica: Replica, message: Message) -> None:
        """Stream the range to the replica that a SNAP message names; its outcome is reported to the group."""
        key = (replica.range_id, message.to)
        if key in self._sending:
            return  # its outcome will be reported
        node_id = replica.node_of(message.to)
        paused_until_ns = self._failures.get(key, _NO_FAILURES).paused_until_ns
        if (
            node_id is None
            or replica.machine is None
            or not self._has_place_for(node_id)
            or self._environment.clock.monotonic_ns() < paused_until_ns
        ):
            replica.raft.report_snapshot(message.to, False)
            self._driver.touch(replica)
            return
        # The state as of now, which may be newer than the message says; never older.
        metadata, descriptor = replica.machine.snapshot_metadata(), replica.machine.descriptor
        snapshot = self._engine.snapshot()
        outgoing = Outgoing(snapshot, descriptor)
        self._sending[key] = _Sending(node_id, metadata.index, outgoing, self._environment.clock.monotonic_ns())
        self._nursery.start_soon(self._send, replica, message.to, node_id, snapshot, outgoing, metadata, descriptor)

    def _has_place_for(self, node_id: NodeId) -> bool:
        """Whether a stream to the node may begin. The last place is for a node that has none, so that a slow one never
        holds them all; and slow ones together hold none against further nodes, up to as many streams again."""
        places = self._config.snapshots_sending_max
        left = places - len(self._sending)
        if left > 1:
            return True
        if left <= -places or any(sending.node_id == node_id for sending in self._sending.values()):
            return False
        now_ns = self._environment.clock.monotonic_ns()
        for sending in self._sending.values():
            # Where the bound on the rate is low and the places are many, none is slow that has its share.
            sending.measure(now_ns, min(SLOW_BYTES_PER_SECOND, self.send_pace.bytes_per_second // (4 * places)))
        return left + sum([sending.slow for sending in self._sending.values()]) > 0

    def receives(self, range_id: RangeId, replica_id: int) -> bool:
        """Whether a replica is being sent a snapshot, and some of it has arrived there."""
        sending = self._sending.get((range_id, replica_id))
        return sending is not None and sending.outgoing.acknowledged_max > 0

    def log_needed(self, range_id: RangeId, replica_id: int, held: int, applied: int) -> int | None:
        """After which index a replica that is being sent a snapshot, or was a moment ago, will need the log.

        Once it has held what the leader had applied, it is a follower like any other.
        """
        key = (range_id, replica_id)
        if key in self._sending:
            return self._sending[key].index
        if key not in self._sent:
            return None
        index, until_ns = self._sent[key]
        if held >= applied or until_ns < self._environment.clock.monotonic_ns():
            del self._sent[key]
            return None
        return index

    def _keep_log(self, key: tuple[RangeId, int], index: int) -> None:
        now = self._environment.clock.monotonic_ns()
        self._sent = {other: kept for other, kept in self._sent.items() if kept[1] >= now}
        self._sent[key] = (index, now + int(CATCH_UP_SECONDS * 1e9))

    def _pause(self, key: tuple[RangeId, int]) -> None:
        """A snapshot was not taken: send the replica no other for a while, which doubles each time."""
        now = self._environment.clock.monotonic_ns()
        forgotten = now - int(CATCH_UP_SECONDS * 1e9)
        self._failures = {
            other: failures for other, failures in self._failures.items() if failures.paused_until_ns >= forgotten
        }
        count = self._failures.get(key, _NO_FAILURES).in_a_row
        seconds = min(RETRY_SECONDS_MIN * 2 ** min(count, 10), RETRY_SECONDS_MAX)
        self._failures[key] = _Failures(count + 1, now + int(seconds * 1e9))

    async def _send(
        self,
        replica: Replica,
        to: int,
        node_id: NodeId,
        snapshot: EngineSnapshot,
        outgoing: Outgoing,
        metadata: SnapshotMetadata,
        descriptor: RangeDescriptor,
    ) -> None:
        sent = False
        try:
            sent = await self._send_until_whole(replica, to, node_id, outgoing, metadata, descriptor)
        finally:
            snapshot.close()
            key = (replica.range_id, to)
            del self._sending[key]
            if sent:
                self._failures.pop(key, None)
                self._keep_log(key, metadata.index)
            else:
                self._pause(key)
            if self._catalog.replicas.get(replica.range_id) is replica:
                replica.raft.report_snapshot(to, sent)
                self._driver.touch(replica)

    async def _send_until_whole(
        self,
        replica: Replica,
        to: int,
        node_id: NodeId,
        outgoing: Outgoing,
        metadata: SnapshotMetadata,
        descriptor: RangeDescriptor,
    ) -> bool:
        """Whether the receiver has it. After a break the stream goes on, as long as it gets further."""
        clock = self._environment.clock
        id_ = self._environment.ids.random_bytes(ID_BYTES)
        begun = progressed = clock.monotonic_ns()
        acknowledged = 0
        pause = RETRY_SECONDS_MIN
        while True:
            try:
                async with self._dial(node_id) as stream:
                    if not replica.leads:
                        return False  # the receiver believes that it is spoken to by the leader of the term
                    begin = encode_begin(id_, to, replica.replica_id, replica.raft.term, metadata, descriptor)
                    return await self._stream(stream, begin, replica, outgoing)
            except StreamsDiffer as error:
                # What the receiver has under this id is not what was sent: another id makes it begin anew.
                self._log.warning("snapshot begun anew", range=replica.range_id, to=to, reason=str(error))
                id_ = self._environment.ids.random_bytes(ID_BYTES)
            except StorageError as error:
                # No break: the range cannot be read here, or not be kept there, and could not on another connection.
                self._log.error("snapshot not sent", range=replica.range_id, to=to, reason=str(error))
                return False
            except _BREAKS as error:
                self._log.info("snapshot not sent", range=replica.range_id, to=to, reason=str(error))
            now = clock.monotonic_ns()
            if outgoing.acknowledged_max > acknowledged:
                acknowledged, progressed, pause = outgoing.acknowledged_max, now, RETRY_SECONDS_MIN
            if (
                not outgoing.begun  # nothing is lost: Raft tries again, with the state as of then
                or not replica.leads
                or now - progressed > RESUME_SECONDS_MAX * 1e9
                or now - begun > SENDING_SECONDS_MAX * 1e9
            ):
                return False
            await clock.sleep(pause)
            pause = min(2 * pause, RETRY_SECONDS_MAX)

    async def _stream(self, stream: SnapshotStream, begin: list[Any], replica: Replica, outgoing: Outgoing) -> bool:
        """One connection's part of it: whether the receiver took the whole. Raises when the connection breaks."""
        await self._say(stream, begin)
        match await self._hear(stream):
            case ["from", int(chunks), int(checksum)]:
                if not outgoing.resume(chunks, checksum):
                    raise StreamsDiffer(f"the receiver has {chunks} chunks that were never sent like that")
                self._resumed += chunks > 0
            case ["done"]:
                return True  # it arrived before, and only the news of it was lost
            case answer:
                if outgoing.begun:
                    # It knows the stream, or will be free again.
                    raise StreamBroken(f"not resumed: {str(answer)[:200]}")
                return self._refused(begin, answer)
        while (chunk := outgoing.next_chunk()) is not None:
            await self._say(stream, ["rows", *chunk])
            self._chunks_sent += 1
            await self.send_pace.spend(len(chunk.rows))
            if not replica.leads:
                return self._refused(begin, "no longer the leader")
            if outgoing.unacknowledged >= WINDOW_CHUNKS:
                answer = await self._hear(stream)
                if not _acknowledges(outgoing, answer):
                    return self._refused(begin, answer)
        if not replica.leads:
            return self._refused(begin, "no longer the leader")  # what follows names the term as one who leads it
        end = outgoing.end
        await self._say(stream, ["end", end.chunks, end.rows, end.checksum, replica.raft.term])
        while _acknowledges(outgoing, answer := await self._hear(stream, FINISH_SECONDS_MAX)):
            pass
        return answer == ["done"] or self._refused(begin, answer)

    def _refused(self, begin: list[Any], answer: object) -> bool:
        count = self._failures.get((begin[2], begin[3]), _NO_FAILURES).in_a_row + 1
        say = self._log.debug if count & (count - 1) else self._log.info  # the first, second, fourth, eighth and so on
        say("snapshot refused", range=begin[2], to=begin[3], in_a_row=count, reason=str(answer)[:200])
        return False

    async def _say(self, stream: SnapshotStream, message: list[Any]) -> None:
        """Send a part. Raises StreamBroken when the connection is lost, or takes nothing for too long."""
        try:
            with self._environment.clock.deadline(SILENCE_SECONDS_MAX) as scope:
                await stream.send(message)
        except _BREAKS as error:
            raise StreamBroken(str(error)) from error
        if scope.cancelled_caught:
            raise StreamBroken("the receiver of a snapshot takes nothing any more")

    async def _hear(self, stream: SnapshotStream, seconds: float | None = None) -> list[Any]:
        """The next part. Raises StreamBroken when none comes, StorageError when the other side's disk failed it."""
        part: list[Any] | None = None
        try:
            with self._environment.clock.deadline(SILENCE_SECONDS_MAX if seconds is None else seconds):
                part = await stream.receive()
        except StorageError:
            raise  # the other side's: it is no better on another connection
        except _BREAKS as error:
            raise StreamBroken(str(error)) from error
        if part is None:
            raise StreamBroken("the other side of a snapshot fell silent")
        return part

    # Receiving

    async def receive(self, stream: SnapshotStream, sender: NodeId) -> None:
        """Serve one incoming stream to its end. Raises ProtocolError for what is not a snapshot, and StreamBroken."""
        begin = decode_begin(await self._hear(stream))
        range_id = begin.range_id
        try:
            replica = self._admit(begin, sender)
            if range_id != PLACEMENT_RANGE:
                self._catalog.spans.reserve(range_id, begin.descriptor.span)
        except (ShardKVError, SpanTaken) as error:
            self._answer_leader(begin, sender)
            await stream.send(["refused", str(error)])
            return
        if replica.machine is not None and replica.machine.applied_index >= begin.metadata.index:
            # Nothing would come of it. Most likely the news was lost that this very snapshot had arrived.
            self._catalog.spans.cancel(range_id)
            await stream.send(["done"])
            return
        self._receiving[range_id] = None
        incoming: Incoming | None = None
        taken = False
        try:
            incoming = await self._unfinished(begin)
            if incoming is None:
                incoming = self._new_file(begin)
            await self._say(stream, ["from", incoming.chunks, incoming.checksum])
            term = await self._fill(stream, incoming)
            await self._environment.workers.run(incoming.builder.finish)
            # Once it is offered the group rests, and neither votes nor hears its leader until all is in the engine.
            await self._installer.until_writable()
            message = replace(begin.message, term=max(term, begin.message.term))
            index, log_term, _ = begin.metadata
            taken = self._take(replica, message, Arrived(incoming.path, begin.descriptor, index, log_term))
            await stream.send(["done"] if taken else ["refused", "the replica did not need it"])
        except OutOfSpace as error:
            await self._say(stream, ["refused", str(error)])
        except StreamBroken:
            if incoming is not None and incoming.chunks and not taken:
                self._keep(incoming)
            raise
        finally:
            del self._receiving[range_id]
            if not taken:
                self._catalog.spans.cancel(range_id)
                if incoming is not None and self._waiting.get(range_id) is not incoming:
                    await self._discard(incoming)

    def _admit(self, begin: Begin, sender: NodeId) -> Replica:
        """The replica that shall have the snapshot. Raises why it cannot have it now; the sender tries again later."""
        range_id, descriptor = begin.range_id, begin.descriptor
        if self._driver.space.low:
            raise self._driver.space.refusal()
        if len(self._receiving) + len(self._arrived) >= self._config.snapshots_receiving_max:
            raise Busy(f"{len(self._receiving) + len(self._arrived)} snapshots are being received already")
        if range_id in self._receiving or range_id in self._arrived:
            raise Busy(f"a snapshot of range {range_id} is on its way already")
        if range_id != PLACEMENT_RANGE:
            overlapping = [other for other in self._catalog.spans.overlapping(descriptor.span) if other != range_id]
            if overlapping:
                # A split or merge that this node has not applied yet: its own log will bring it (trap 1).
                raise Busy(f"the span of range {range_id} is still held by range {overlapping[0]} here")
        replica = self._catalog.admit(range_id, begin.message, sender)
        if replica is None:
            raise Busy(f"range {range_id} has no replica {begin.message.to} here")
        return replica

    def _answer_leader(self, begin: Begin, sender: NodeId) -> None:
        """What is not taken may not be needed: a split brought the state, and the sender's log goes on from there."""
        replica = self._catalog.replicas.get(begin.range_id)
        if replica is None or replica.machine is None or replica.installing:
            return
        message = begin.message
        if replica.replica_id == message.to and replica.node_of(message.from_) == sender:
            replica.answer_leader(message.from_, message.term, self._environment.clock.monotonic_ns())
            self._driver.touch(replica)

    def _new_file(self, begin: Begin) -> Incoming:
        self._files += 1
        path = f"{self._directory}/incoming-{begin.range_id}-{self._files}"
        return Incoming(begin.id, begin.descriptor, begin.metadata, path, self._engine.builder(path))

    async def _unfinished(self, begin: Begin) -> Incoming | None:
        """The file of this very stream from before a break, if it is still here. That of another one goes."""
        incoming = self._waiting.pop(begin.range_id, None)
        if incoming is None or incoming.is_resumed_by(begin.id, begin.descriptor, begin.metadata):
            return incoming
        await self._discard(incoming)
        return None

    def _keep(self, incoming: Incoming) -> None:
        """The stream broke: keep what has arrived, for a while and while nobody else wants the place."""
        self._waiting[incoming.range_id] = incoming
        self._nursery.start_soon(self._expire, incoming)
        while len(self._waiting) > self._config.snapshots_receiving_max:
            oldest = self._waiting.pop(next(iter(self._waiting)))
            self._nursery.start_soon(self._discard, oldest)

    async def _expire(self, incoming: Incoming) -> None:
        chunks = incoming.chunks
        await self._environment.clock.sleep(RESUME_SECONDS_MAX)
        # Resumed and broken again, it has a later task of its own.
        if self._waiting.get(incoming.range_id) is incoming and incoming.chunks == chunks:
            del self._waiting[incoming.range_id]
            await self._discard(incoming)

    async def _discard(self, incoming: Incoming) -> None:
        incoming.builder.abandon()
        await self._environment.workers.run(_remove, self._environment.disk, list(incoming.builder.paths))

    async def _fill(self, stream: SnapshotStream, incoming: Incoming) -> int:
        """Put the rows that come into the file, to the end; the sender's term then.

        Raises ProtocolError unless they are that range's, in that state, StreamBroken when they end before, and
        OutOfSpace, too when they would take what room is left for Raft's own records.
        """
        while True:
            if self._driver.space.full:
                raise self._driver.space.refusal()
            match await self._hear(stream):
                case ["rows", int(number), bytes(rows), int(checksum)]:
                    incoming.absorb(number, rows, checksum)
                    self._chunks_received += 1
                    await self.receive_pace.spend(len(rows))
                    await self._say(stream, ["have", number])
                case ["end", int(chunks), int(rows), int(checksum), int(term)]:
                    incoming.require_whole(chunks, rows, checksum)
                    return term
                case part:
                    raise ProtocolError(f"not a part of a snapshot: {str(part)[:100]}")

    def _take(self, replica: Replica, message: Message, arrived: Arrived) -> bool:
        """Offer the arrived snapshot to the group; whether the group wants it."""
        if self._catalog.replicas.get(replica.range_id) is not replica:
            return False
        if replica.needs_snapshot:
            if arrived.index < replica.log.compact_index:
                return False  # of a leader that has applied less than this replica once had
            self._arrived[replica.range_id] = arrived
            replica.installing = True
            self._nursery.start_soon(self._reinstall, replica)
            return True
        self._driver.step(replica, message)
        # Raft keeps the snapshot that it accepts; anything else, an equal one included, is not this one.
        if replica.raft.raft.log.snapshot is not message.snapshot:
            self._log.debug("snapshot not needed", range=replica.range_id, committed=replica.raft.committed)
            return False
        self._arrived[replica.range_id] = arrived
        return True

    # Installing

    def install(self, replica: Replica, message: Message) -> None:
        """The group has accepted a snapshot, and rests until it is in place."""
        assert replica.installing, f"range {replica.range_id} does not rest"
        self._nursery.start_soon(self._install, replica, message)

    async def _install(self, replica: Replica, message: Message) -> None:
        snapshot = message.snapshot
        assert snapshot is not None, f"range {replica.range_id} installs no snapshot"
        arrived = self._arrived[replica.range_id]
        await self._driver.all_logged(replica)
        await self._installer.replace_data(replica, arrived)
        metadata = snapshot.metadata
        update = LogUpdate(
            replica.range_id,
            hard_state=hard_state_of(message),
            entries=message.entries,
            reset=ResetLog(metadata.index, metadata.term, metadata.conf_state),
        )
        self._driver.log_snapshot(replica, update, message)
        del self._arrived[replica.range_id]
        self._driver.hooks.descriptor(replica)

    async def _reinstall(self, replica: Replica) -> None:
        """Install for a replica whose last install was interrupted: it has a log, but no data to apply it to."""
        arrived = self._arrived[replica.range_id]
        await self._driver.all_logged(replica)
        await self._installer.replace_data(replica, arrived)
        assert replica.machine is not None, f"range {replica.range_id} has no machine after its install"
        metadata = replica.machine.snapshot_metadata()
        log = replica.log
        held = log.last_index() >= metadata.index >= log.compact_index and log.term(metadata.index) == metadata.term
        update = LogUpdate(replica.range_id)
        if held:
            update.compact = CompactLog(metadata.index, metadata.term)
        else:
            update.reset = ResetLog(metadata.index, metadata.term, metadata.conf_state)
        self._catalog.reincarnate(replica, update)
        del self._arrived[replica.range_id]
        self._driver.hooks.descriptor(replica)


def _acknowledges(outgoing: Outgoing, answer: list[Any]) -> bool:
    match answer:
        case ["have", int(chunks)]:
            outgoing.acknowledge(chunks)
            return True
    return False


def _remove(disk: Disk, paths: list[str]) -> None:
    for path in paths:
        # Some file systems need room to remove a file, too; a start removes what is left.
        with suppress(FileNotFoundError, OutOfSpace):
            disk.unlink(path)
