"""The receiving end of snapshots: which are taken, what is kept of one whose stream broke, and when they are installed.

Lives here: admission, the files that rows are put into as they come, and what an install does to the group's log. Does
not live here: the check of every row (``snapshot_parts``), when a connection is broken (``snapshot_stream``), nor what
an install does to the engine (``snapshot_install``). The rules: what is on its way counts as an owner of its span (trap
1), and the log begins anew once the file has taken the place of the range's data, not before.
"""

from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import trio

from shardkv.config import SnapshotsConfig
from shardkv.environment import Disk, Environment
from shardkv.errors import Busy, OutOfSpace, ProtocolError, ShardKVError
from shardkv.multiraft.catalog import Catalog
from shardkv.multiraft.driver import Driver
from shardkv.multiraft.replica import Replica
from shardkv.multiraft.snapshot_install import Arrived, Installer
from shardkv.multiraft.snapshot_parts import Begin, Incoming, Pace, Rate, decode_begin, slow_rate
from shardkv.multiraft.snapshot_stream import RESUME_SECONDS_MAX, SnapshotStream, StreamBroken, hear, say
from shardkv.multiraft.turn import hard_state_of
from shardkv.raft.messages import Message
from shardkv.ranges.spans import SpanTaken
from shardkv.storage.engine import Engine
from shardkv.storage.wal import CompactLog, LogUpdate, ResetLog
from shardkv.types import PLACEMENT_RANGE, NodeId, RangeId


@dataclass(slots=True)
class _Receiving:
    """A snapshot that arrives, by one connection."""

    sender: NodeId
    rate: Rate
    chunks: int = 0
    whole: bool = False
    """What it still waits for is this node's own doing."""


class Receiver:
    """Takes snapshots in, and puts them in place in tasks of :meth:`use`'s nursery.

    Invariants: no more than twice as many streams come in as there are places; a range is in ``_receiving`` and in
    ``_arrived`` only until its sender is told, and never in ``_waiting`` with either; ``_waiting`` holds no more than
    there are places; a range in ``_waiting`` reserves no span.
    """

    def __init__(
        self, driver: Driver, environment: Environment, directory: str, *, log: Any, config: SnapshotsConfig
    ) -> None:
        self._driver = driver
        self._catalog: Catalog = driver.catalog
        self._engine: Engine = driver.engine
        self._environment = environment
        self._clock = environment.clock
        self._installer = Installer(driver, environment, log)
        self._directory = directory
        self._log = log
        self._config = config
        self._nursery: trio.Nursery
        self._receiving: dict[RangeId, _Receiving] = {}
        self._waiting: dict[RangeId, Incoming] = {}
        """Snapshots whose stream broke, oldest first."""
        self._arrived: dict[RangeId, Arrived] = {}
        """By range, until its install is over."""
        self._files = 0
        self.pace = Pace(environment.clock, config.snapshot_receive_bytes_per_second)
        self.chunks_received = 0

    def use(self, nursery: trio.Nursery) -> None:
        self._nursery = nursery

    @property
    def receiving(self) -> int:
        return len(self._receiving)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def installing(self) -> int:
        return len(self._arrived)

    @property
    def _places_taken(self) -> int:
        return len(self._receiving.keys() | self._arrived.keys())

    def check(self) -> None:
        places = self._config.snapshots_receiving_max
        assert self._places_taken <= 2 * places, f"{self._places_taken} are being received"
        assert self.waiting <= places, f"{self.waiting} wait"
        for range_id in self._waiting:
            assert range_id not in self._receiving, f"range {range_id} waits and is received"
            assert range_id not in self._arrived, f"range {range_id} waits and is installed"

    async def receive(self, stream: SnapshotStream, sender: NodeId) -> None:
        """Serve one incoming stream to its end. Raises ProtocolError for what is not a snapshot, and StreamBroken."""
        begin = decode_begin(await hear(self._clock, stream))
        range_id = begin.range_id
        try:
            replica = self._admit(begin, sender)
            if range_id != PLACEMENT_RANGE:
                self._catalog.spans.reserve(range_id, begin.descriptor.span)
        except (ShardKVError, SpanTaken) as error:
            self._answer_leader(begin, sender)
            await say(self._clock, stream, ["refused", str(error)])
            return
        if replica.machine is not None and replica.machine.applied_index >= begin.metadata.index:
            # Nothing would come of it. Most likely the news was lost that this very snapshot had arrived.
            self._catalog.spans.cancel(range_id)
            await say(self._clock, stream, ["done"])
            return
        receiving = self._receiving[range_id] = _Receiving(sender, Rate(self._clock.monotonic_ns()))
        incoming: Incoming | None = None
        taken = False
        try:
            incoming = await self._unfinished(begin)
            if incoming is None:
                incoming = self._new_file(begin)
            await say(self._clock, stream, ["from", incoming.chunks, incoming.checksum])
            term = await self._fill(stream, incoming, receiving)
            receiving.whole = True
            await self._environment.workers.run(incoming.builder.finish)
            # Once it is offered the group rests, and neither votes nor hears its leader until all is in the engine.
            await self._installer.until_writable()
            message = replace(begin.message, term=max(term, begin.message.term))
            index, log_term, _ = begin.metadata
            taken = self._take(replica, message, Arrived(incoming.path, begin.descriptor, index, log_term))
            await say(self._clock, stream, ["done"] if taken else ["refused", "the replica did not need it"])
        except OutOfSpace as error:
            await say(self._clock, stream, ["refused", str(error)])
        except StreamBroken:
            if incoming is not None and incoming.chunks and not receiving.whole:
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
        if not self._has_place_from(sender):
            raise Busy(f"{self._places_taken} snapshots are being received already")
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

    def _has_place_from(self, sender: NodeId) -> bool:
        """Whether a stream from the node may begin. Slow ones together hold no place against further nodes, up to as
        many streams again."""
        places = self._config.snapshots_receiving_max
        left = places - self._places_taken
        if left > 0:
            return True
        if left <= -places or any(receiving.sender == sender for receiving in self._receiving.values()):
            return False
        now_ns, least = self._clock.monotonic_ns(), slow_rate(self.pace, places)
        streams = [receiving for receiving in self._receiving.values() if not receiving.whole]
        return left + sum([each.rate.is_slow(each.chunks, now_ns, least) for each in streams]) > 0

    def _answer_leader(self, begin: Begin, sender: NodeId) -> None:
        """What is not taken may not be needed: a split brought the state, and the sender's log goes on from there."""
        replica = self._catalog.replicas.get(begin.range_id)
        if replica is None or replica.machine is None or replica.installing:
            return
        message = begin.message
        if replica.replica_id == message.to and replica.node_of(message.from_) == sender:
            replica.answer_leader(message.from_, message.term, self._clock.monotonic_ns())
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
        await self._clock.sleep(RESUME_SECONDS_MAX)
        # Resumed and broken again, it has a later task of its own.
        if self._waiting.get(incoming.range_id) is incoming and incoming.chunks == chunks:
            del self._waiting[incoming.range_id]
            await self._discard(incoming)

    async def _discard(self, incoming: Incoming) -> None:
        incoming.builder.abandon()
        await self._environment.workers.run(_remove, self._environment.disk, list(incoming.builder.paths))

    async def _fill(self, stream: SnapshotStream, incoming: Incoming, receiving: _Receiving) -> int:
        """Put the rows that come into the file, to the end; the sender's term then.

        Raises ProtocolError unless they are that range's, in that state, StreamBroken when they end before, and
        OutOfSpace, too when they would take what room is left for Raft's own records.
        """
        while True:
            if self._driver.space.full:
                raise self._driver.space.refusal()
            match await hear(self._clock, stream):
                case ["rows", int(number), bytes(rows), int(checksum)]:
                    incoming.absorb(number, rows, checksum)
                    self.chunks_received += 1
                    receiving.chunks += 1
                    await self.pace.spend(len(rows))
                    await say(self._clock, stream, ["have", number])
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


def _remove(disk: Disk, paths: list[str]) -> None:
    for path in paths:
        # Some file systems need room to remove a file, too; a start removes what is left.
        with suppress(FileNotFoundError, OutOfSpace):
            disk.unlink(path)
