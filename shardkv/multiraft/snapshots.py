"""Snapshots: a range streamed to a replica that fell behind the log, and put in place there.

Lives here: both ends of the stream, its limits, and the order of steps of an install. Does not live here: connections
(a stream of messages is handed in), nor what a range consists of (``machine.snapshot``). A snapshot has a connection of
its own, so that it never stands before Raft's messages, and no group ever waits for one.

The messages, each the payload of one SNAPSHOT frame:

    ["begin", range_id, to, from, term, index, log_term, conf_state, descriptor]
    ["rows", [key, value, key, value, ...]]        in key order
    ["end", rows]                                  answered by
    ["done"] or ["refused", reason]

The receiver builds a file as the rows come, so its memory is bounded whatever the range's size. An ingested file is
durable at once while batches written before it are not (trap 19); hence the install first deletes the old data and
leaves a mark, flushes, and then ingests a file that holds the range's applied state and overwrites the mark. Only then
does the log begin anew. A crash before the ingest leaves the mark, by which the replica knows that it needs the
snapshot again.
"""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, suppress
from dataclasses import dataclass
from typing import Any, Final, Protocol

import trio

from shardkv import codec
from shardkv.environment import Disk, Environment
from shardkv.errors import Busy, Corruption, ProtocolError, ShardKVError, StorageError
from shardkv.machine import keys
from shardkv.machine.machine import INITIAL_INDEX, INITIAL_TERM, RangeMachine
from shardkv.machine.rows import InstallMark, unpack_applied, unpack_descriptor
from shardkv.machine.snapshot import begin_install, engine_spans, snapshot_rows
from shardkv.multiraft.catalog import Catalog
from shardkv.multiraft.driver import Driver
from shardkv.multiraft.replica import Replica
from shardkv.multiraft.turn import hard_state_of
from shardkv.raft.messages import ConfState, Message, MessageType, Snapshot, SnapshotMetadata
from shardkv.ranges.spans import SpanTaken
from shardkv.storage.engine import Engine, IngestBuilder, WriteBatch
from shardkv.storage.engine import Snapshot as EngineSnapshot
from shardkv.storage.wal import CompactLog, LogUpdate, ResetLog
from shardkv.types import PLACEMENT_RANGE, NodeId, RangeDescriptor, RangeId

CHUNK_BYTES: Final = 256 * 1024
"""Rows travel in chunks of about this size; one is in memory at each end."""
CHUNK_ROWS_MAX: Final = 2_000
SENDING_MAX: Final = 2
RECEIVING_MAX: Final = 2
"""Streams at once, each way: more would starve the groups that work (trap 16)."""
BYTES_PER_SECOND_MAX: Final = 64 * 1024 * 1024
SILENCE_SECONDS_MAX: Final = 10.0
"""A stream on which nothing moves for this long is given up."""


class SnapshotStream(Protocol):
    """A connection of the SNAPSHOT role, as messages."""

    async def send(self, message: list[Any]) -> None: ...

    async def receive(self) -> list[Any]:
        """The next message. Raises ProtocolError at the end of the stream."""
        ...


DialSnapshot = Callable[[NodeId], AbstractAsyncContextManager[SnapshotStream]]


@dataclass(slots=True)
class _Incoming:
    """A snapshot that has arrived whole and waits for its group to take it."""

    path: str
    descriptor: RangeDescriptor
    index: int
    term: int


class Snapshots:
    """The node's snapshot service. :meth:`run` gives it a nursery."""

    def __init__(
        self, driver: Driver, environment: Environment, directory: str, dial: DialSnapshot, *, log: Any
    ) -> None:
        self._driver = driver
        self._catalog: Catalog = driver.catalog
        self._engine: Engine = driver.engine
        self._environment = environment
        self._directory = directory
        self._dial = dial
        self._log = log
        self._nursery: trio.Nursery
        self._sending: dict[tuple[RangeId, int], None] = {}
        self._receiving: dict[RangeId, None] = {}
        self._incoming: dict[RangeId, _Incoming] = {}
        """By range, until its install is over."""
        self._files = 0

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            task_status.started()
            await trio.Event().wait()

    # Sending

    def send(self, replica: Replica, message: Message) -> None:
        """Stream the range to the replica that a SNAP message names; its outcome is reported to the group."""
        key = (replica.range_id, message.to)
        if key in self._sending:
            return  # its outcome will be reported
        node_id = replica.node_of(message.to)
        if node_id is None or replica.machine is None or len(self._sending) >= SENDING_MAX:
            replica.raft.report_snapshot(message.to, False)
            self._driver.touch(replica)
            return
        self._sending[key] = None
        # The state as of now, which may be newer than the message says; never older.
        metadata = replica.machine.snapshot_metadata()
        begin = [
            "begin",
            replica.range_id,
            message.to,
            replica.replica_id,
            replica.raft.term,
            metadata.index,
            metadata.term,
            [list(part) if isinstance(part, tuple) else part for part in metadata.conf_state],
            replica.machine.descriptor.to_wire(),
        ]
        snapshot = self._engine.snapshot()
        self._nursery.start_soon(self._send, replica, message.to, node_id, begin, snapshot, replica.machine.descriptor)

    async def _send(
        self,
        replica: Replica,
        to: int,
        node_id: NodeId,
        begin: list[Any],
        snapshot: EngineSnapshot,
        descriptor: RangeDescriptor,
    ) -> None:
        sent = False
        try:
            async with self._dial(node_id) as stream:
                await self._say(stream, begin)
                rows = 0
                async for chunk in self._chunks(snapshot, descriptor):
                    rows += len(chunk) // 2
                    await self._say(stream, ["rows", chunk])
                await self._say(stream, ["end", rows])
                with self._environment.clock.deadline(SILENCE_SECONDS_MAX * 3):
                    answer = await stream.receive()
                    sent = answer == ["done"]
                    if not sent:
                        self._log.info("snapshot refused", range=begin[1], to=to, reason=str(answer)[:200])
        except (ShardKVError, OSError, trio.BrokenResourceError, trio.ClosedResourceError) as error:
            self._log.info("snapshot not sent", range=begin[1], to=to, reason=str(error))
        finally:
            snapshot.close()
            del self._sending[(replica.range_id, to)]
            if self._catalog.replicas.get(replica.range_id) is replica:
                replica.raft.report_snapshot(to, sent)
                self._driver.touch(replica)

    async def _say(self, stream: SnapshotStream, message: list[Any]) -> None:
        """Send a part. Raises ProtocolError when the receiver takes nothing for too long."""
        with self._environment.clock.deadline(SILENCE_SECONDS_MAX) as scope:
            await stream.send(message)
        if scope.cancelled_caught:
            raise ProtocolError("the receiver of a snapshot takes nothing any more")

    async def _chunks(self, snapshot: EngineSnapshot, descriptor: RangeDescriptor) -> AsyncIterator[list[bytes]]:
        """The range's rows in chunks, no faster than the rate allows."""
        clock = self._environment.clock
        started, sent = clock.monotonic_ns(), 0
        chunk: list[bytes] = []
        size = 0
        for key, value in snapshot_rows(snapshot, descriptor):
            chunk.append(key)
            chunk.append(value)
            size += len(key) + len(value)
            if size >= CHUNK_BYTES or len(chunk) >= 2 * CHUNK_ROWS_MAX:
                yield chunk
                sent += size
                due = started + sent * 1_000_000_000 // BYTES_PER_SECOND_MAX
                await clock.sleep(max(0.0, (due - clock.monotonic_ns()) / 1e9))
                chunk, size = [], 0
        if chunk:
            yield chunk

    # Receiving

    async def receive(self, stream: SnapshotStream, sender: NodeId) -> None:
        """Serve one incoming stream to its end. Raises ProtocolError for what is not a snapshot."""
        range_id, message, descriptor = _decode_begin(await self._hear(stream))
        try:
            replica = self._admit(range_id, message, descriptor, sender)
            if range_id != PLACEMENT_RANGE:
                self._catalog.spans.reserve(range_id, descriptor.span)
        except (ShardKVError, SpanTaken) as error:
            await stream.send(["refused", str(error)])
            return
        self._receiving[range_id] = None
        self._files += 1
        path = f"{self._directory}/incoming-{range_id}-{self._files}"
        taken = False
        try:
            builder = self._engine.builder(path)
            try:
                await self._fill(stream, builder, message, descriptor)
                await self._environment.workers.run(builder.finish)
                assert message.snapshot is not None, f"a snapshot of range {range_id} without one"
                index, term, _ = message.snapshot.metadata
                taken = self._take(replica, message, _Incoming(path, descriptor, index, term))
            finally:
                if not taken:
                    builder.abandon()
            await stream.send(["done"] if taken else ["refused", "the replica did not need it"])
        finally:
            del self._receiving[range_id]
            if not taken:
                self._catalog.spans.cancel(range_id)
                await self._environment.workers.run(_remove, self._environment.disk, path)

    def _admit(self, range_id: RangeId, message: Message, descriptor: RangeDescriptor, sender: NodeId) -> Replica:
        """The replica that shall have the snapshot. Raises why it cannot have it now; the sender tries again later."""
        if len(self._receiving) >= RECEIVING_MAX:
            raise Busy(f"{len(self._receiving)} snapshots are being received already")
        if range_id in self._receiving or range_id in self._incoming:
            raise Busy(f"a snapshot of range {range_id} is on its way already")
        if range_id != PLACEMENT_RANGE:
            overlapping = [other for other in self._catalog.spans.overlapping(descriptor.span) if other != range_id]
            if overlapping:
                # A split or merge that this node has not applied yet: its own log will bring it (trap 1).
                raise Busy(f"the span of range {range_id} is still held by range {overlapping[0]} here")
        replica = self._catalog.admit(range_id, message, sender)
        if replica is None:
            raise Busy(f"range {range_id} has no replica {message.to} here")
        return replica

    async def _hear(self, stream: SnapshotStream) -> list[Any]:
        """The next part. Raises ProtocolError when none comes."""
        part: list[Any] | None = None
        with self._environment.clock.deadline(SILENCE_SECONDS_MAX):
            part = await stream.receive()
        if part is None:
            raise ProtocolError("the sender of a snapshot fell silent")
        return part

    async def _fill(
        self, stream: SnapshotStream, builder: IngestBuilder, message: Message, descriptor: RangeDescriptor
    ) -> None:
        """Put the rows that come into the file. Raises ProtocolError unless they are that range's, in that state."""
        checker = _RowChecker(descriptor)
        rows = 0
        while True:
            part = await self._hear(stream)
            match part:
                case ["rows", [*chunk]] if len(chunk) % 2 == 0:
                    for position in range(0, len(chunk), 2):
                        key, value = chunk[position], chunk[position + 1]
                        checker.look_at(key, value)
                        builder.put(key, value)
                    rows += len(chunk) // 2
                case ["end", int(count)] if count == rows:
                    assert message.snapshot is not None, f"a snapshot of {descriptor} without one"
                    checker.require_state(message.snapshot.metadata)
                    return
                case _:
                    raise ProtocolError(f"not a part of a snapshot: {str(part)[:100]}")

    def _take(self, replica: Replica, message: Message, incoming: _Incoming) -> bool:
        """Offer the arrived snapshot to the group; whether the group wants it."""
        if self._catalog.replicas.get(replica.range_id) is not replica:
            return False
        if replica.needs_snapshot:
            if incoming.index < replica.log.compact_index:
                return False  # of a leader that has applied less than this replica once had
            self._incoming[replica.range_id] = incoming
            replica.installing = True
            self._nursery.start_soon(self._reinstall, replica)
            return True
        self._driver.step(replica, message)
        # Raft keeps the snapshot that it accepts; anything else, an equal one included, is not this one.
        if replica.raft.raft.log.snapshot is not message.snapshot:
            self._log.debug("snapshot not needed", range=replica.range_id, committed=replica.raft.committed)
            return False
        self._incoming[replica.range_id] = incoming
        return True

    # Installing

    def install(self, replica: Replica, message: Message) -> None:
        """The group has accepted a snapshot, and rests until it is in place."""
        assert replica.installing, f"range {replica.range_id} does not rest"
        self._nursery.start_soon(self._install, replica, message)

    async def _install(self, replica: Replica, message: Message) -> None:
        snapshot = message.snapshot
        assert snapshot is not None, f"range {replica.range_id} installs no snapshot"
        incoming = self._incoming[replica.range_id]
        await self._driver.settled(replica)
        await self._replace_data(replica, incoming)
        metadata = snapshot.metadata
        update = LogUpdate(
            replica.range_id,
            hard_state=hard_state_of(message),
            entries=message.entries,
            reset=ResetLog(metadata.index, metadata.term, metadata.conf_state),
        )
        self._driver.log_snapshot(replica, update, message)
        del self._incoming[replica.range_id]
        self._driver.hooks.descriptor(replica)

    async def _replace_data(self, replica: Replica, incoming: _Incoming) -> None:
        """The engine's part of an install; every step may be the last before a crash."""
        engine, workers = self._engine, self._environment.workers
        old = replica.machine.descriptor if replica.machine is not None else None
        replica.machine = None
        batch = WriteBatch()
        begin_install(batch, incoming.descriptor, incoming.index, incoming.term, old)
        engine.write(batch)
        await workers.run(engine.flush)
        await workers.run(engine.ingest, incoming.path)
        machine = RangeMachine.load(replica.range_id, engine, self._catalog.extension(replica.range_id))
        if machine is None or machine.applied_index != incoming.index:
            raise StorageError(f"a snapshot of range {replica.range_id} does not hold the state that it names")
        replica.machine = machine
        self._catalog.installed(replica)

    async def _reinstall(self, replica: Replica) -> None:
        """Install for a replica whose last install was interrupted: it has a log, but no data to apply it to."""
        incoming = self._incoming[replica.range_id]
        await self._driver.settled(replica)
        await self._replace_data(replica, incoming)
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
        del self._incoming[replica.range_id]
        self._driver.hooks.descriptor(replica)


def _remove(disk: Disk, path: str) -> None:
    with suppress(FileNotFoundError):
        disk.unlink(path)


class _RowChecker:
    """Looks at the rows of a snapshot as they come: they go into the engine unseen, and it holds other ranges too."""

    __slots__ = ("_descriptor", "_last", "_spans", "_state", "_stated")

    def __init__(self, descriptor: RangeDescriptor) -> None:
        self._descriptor = descriptor
        self._spans = engine_spans(descriptor)
        self._last = b""
        self._state: bytes | None = None
        self._stated: bytes | None = None

    def look_at(self, key: object, value: object) -> None:
        """Raises ProtocolError for what is no row of this range, or comes out of order."""
        if type(key) is not bytes or type(value) is not bytes or key <= self._last:
            raise ProtocolError(f"the rows of a snapshot of range {self._descriptor.range_id} are out of order")
        self._last = key
        start, end = self._spans[0]
        if not start <= key < end:
            if len(self._spans) == 1:
                raise ProtocolError(f"a snapshot of range {self._descriptor.range_id} has a row of somebody else's")
            # The rows of the next span; they are in key order, and so are the spans.
            del self._spans[0]
            self._last = b""
            self.look_at(key, value)
        elif key == keys.applied_key(self._descriptor.range_id):
            self._state = value
        elif key == keys.descriptor_key(self._descriptor.range_id):
            self._stated = value

    def require_state(self, metadata: SnapshotMetadata) -> None:
        """Raises ProtocolError unless the rows hold the state that the snapshot was announced as."""
        try:
            state = unpack_applied(self._state or b"")
            descriptor = unpack_descriptor(self._stated or b"")
        except Corruption as error:
            raise ProtocolError(f"a snapshot of range {self._descriptor.range_id} has no state: {error}") from error
        if isinstance(state, InstallMark) or descriptor != self._descriptor:
            raise ProtocolError(f"a snapshot of range {self._descriptor.range_id} holds another state than announced")
        if (state.index, state.term, state.conf_state) != tuple(metadata):
            raise ProtocolError(f"a snapshot of range {self._descriptor.range_id} holds another index than announced")


def _decode_begin(begin: list[Any]) -> tuple[RangeId, Message, RangeDescriptor]:
    match begin:
        case [
            "begin",
            int(range_id),
            int(to),
            int(from_),
            int(term),
            int(index),
            int(log_term),
            [[*voters], [*learners], [*outgoing], [*learners_next], bool(auto_leave)],
            fields,
        ]:
            conf_state = ConfState(tuple(voters), tuple(learners), tuple(outgoing), tuple(learners_next), auto_leave)
            try:
                descriptor = RangeDescriptor.from_wire(fields)
            except ValueError as error:
                raise codec.malformed(str(error)) from error
            members = {replica.replica_id for replica in descriptor.replicas}
            ids = (*voters, *learners, *outgoing, *learners_next)
            if (
                descriptor.range_id == range_id
                and descriptor.span.empty == (range_id == PLACEMENT_RANGE)
                and voters
                and all(type(each) is int for each in ids)
                and set(ids) == members
                and not {*learners, *learners_next} & set(voters)
                and not set(learners) & set(outgoing)
                and set(learners_next) <= set(outgoing)
                and to in members
                and INITIAL_TERM <= log_term <= term < 1 << 63
                and INITIAL_INDEX <= index < 1 << 63
            ):
                snapshot = Snapshot(SnapshotMetadata(index, log_term, conf_state))
                return RangeId(range_id), Message(MessageType.SNAP, to, from_, term, snapshot=snapshot), descriptor
    raise ProtocolError(f"not the beginning of a snapshot: {str(begin)[:100]}")


SnapshotHandler = Callable[[SnapshotStream, NodeId], Awaitable[None]]
