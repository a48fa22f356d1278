"""The sending end of snapshots: to whom a range is streamed and when, and how it goes on after a break.

Lives here: the places for streams, the pauses after those that were not taken, the log that a receiver will need next.
Does not live here: what the stream consists of (``snapshot_parts``), and when a connection is broken
(``snapshot_stream``). The rule: no group waits for a place (trap 16); where there is none, the group is told that its
snapshot failed, and asks again.
"""

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import trio

from shardkv.config import SnapshotsConfig
from shardkv.environment import Environment
from shardkv.errors import ProtocolError, StorageError
from shardkv.multiraft.catalog import Catalog
from shardkv.multiraft.driver import Driver
from shardkv.multiraft.replica import Replica
from shardkv.multiraft.snapshot_parts import ID_BYTES, WINDOW_CHUNKS, Outgoing, Pace, Rate, encode_begin, slow_rate
from shardkv.multiraft.snapshot_stream import (
    BREAKS,
    RESUME_SECONDS_MAX,
    SILENCE_SECONDS_MAX,
    SnapshotStream,
    StreamBroken,
    hear,
    say,
)
from shardkv.raft.messages import Message, SnapshotMetadata
from shardkv.storage.engine import Engine
from shardkv.storage.engine import Snapshot as EngineSnapshot
from shardkv.types import NodeId, RangeDescriptor, RangeId

FINISH_SECONDS_MAX: Final = 3 * SILENCE_SECONDS_MAX
"""The last answer may take longer: the file's last blocks are on their way to the disk."""
SENDING_SECONDS_MAX: Final = 4 * 3600.0
"""No engine snapshot is kept for longer than this: it keeps deleted data on the disk."""
RETRY_SECONDS_MIN: Final = 0.1
RETRY_SECONDS_MAX: Final = 2.0
"""After a break, and after each snapshot in a row that one replica did not take: the first pause, and the bound up to
which it doubles. Raft asks again with every heartbeat, and a receiver without room may refuse for days."""
CATCH_UP_SECONDS: Final = 60.0
"""For this long after its snapshot, the log keeps what a receiver needs next, however much that is (trap 11)."""

DialSnapshot = Callable[[NodeId], AbstractAsyncContextManager[SnapshotStream]]


class StreamsDiffer(ProtocolError):
    """The two ends do not agree on what was sent before the break."""


@dataclass(frozen=True, slots=True)
class _Sending:
    """A snapshot under way."""

    node_id: NodeId
    index: int
    outgoing: Outgoing
    rate: Rate


class _Failures(NamedTuple):
    """Of the snapshots of a range to one replica."""

    in_a_row: int = 0
    paused_until_ns: int = 0
    """None is sent before."""


_NO_FAILURES: Final = _Failures()


class Sender:
    """Streams ranges out, each in a task of :meth:`use`'s nursery.

    Invariant: no more than twice as many streams go out as there are places.
    """

    def __init__(
        self, driver: Driver, environment: Environment, dial: DialSnapshot, *, log: Any, config: SnapshotsConfig
    ) -> None:
        self._driver = driver
        self._catalog: Catalog = driver.catalog
        self._engine: Engine = driver.engine
        self._clock = environment.clock
        self._ids = environment.ids
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
        self.pace = Pace(environment.clock, config.snapshot_send_bytes_per_second)
        self.chunks_sent = self.resumed = 0

    def use(self, nursery: trio.Nursery) -> None:
        self._nursery = nursery

    @property
    def sending(self) -> int:
        return len(self._sending)

    def check(self) -> None:
        assert self.sending <= 2 * self._config.snapshots_sending_max, f"{self.sending} are being sent"

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
            or self._clock.monotonic_ns() < paused_until_ns
        ):
            replica.raft.report_snapshot(message.to, False)
            self._driver.touch(replica)
            return
        # The state as of now, which may be newer than the message says; never older.
        metadata, descriptor = replica.machine.snapshot_metadata(), replica.machine.descriptor
        snapshot = self._engine.snapshot()
        outgoing = Outgoing(snapshot, descriptor)
        self._sending[key] = _Sending(node_id, metadata.index, outgoing, Rate(self._clock.monotonic_ns()))
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
        now_ns, least = self._clock.monotonic_ns(), slow_rate(self.pace, places)
        slow = [each.rate.is_slow(each.outgoing.acknowledged_max, now_ns, least) for each in self._sending.values()]
        return left + sum(slow) > 0

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
        if held >= applied or until_ns < self._clock.monotonic_ns():
            del self._sent[key]
            return None
        return index

    def _keep_log(self, key: tuple[RangeId, int], index: int) -> None:
        now = self._clock.monotonic_ns()
        self._sent = {other: kept for other, kept in self._sent.items() if kept[1] >= now}
        self._sent[key] = (index, now + int(CATCH_UP_SECONDS * 1e9))

    def _pause(self, key: tuple[RangeId, int]) -> None:
        """A snapshot was not taken: send the replica no other for a while, which doubles each time."""
        now = self._clock.monotonic_ns()
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
        clock = self._clock
        id_ = self._ids.random_bytes(ID_BYTES)
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
                id_ = self._ids.random_bytes(ID_BYTES)
            except StorageError as error:
                # No break: the range cannot be read here, or not be kept there, and could not on another connection.
                self._log.error("snapshot not sent", range=replica.range_id, to=to, reason=str(error))
                return False
            except BREAKS as error:
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
        await say(self._clock, stream, begin)
        match await hear(self._clock, stream):
            case ["from", int(chunks), int(checksum)]:
                if not outgoing.resume(chunks, checksum):
                    raise StreamsDiffer(f"the receiver has {chunks} chunks that were never sent like that")
                self.resumed += chunks > 0
            case ["done"]:
                return True  # it arrived before, and only the news of it was lost
            case answer:
                if outgoing.begun:
                    # It knows the stream, or will be free again.
                    raise StreamBroken(f"not resumed: {str(answer)[:200]}")
                return self._refused(begin, answer)
        while (chunk := outgoing.next_chunk()) is not None:
            await say(self._clock, stream, ["rows", *chunk])
            self.chunks_sent += 1
            await self.pace.spend(len(chunk.rows))
            if not replica.leads:
                return self._refused(begin, "no longer the leader")
            if outgoing.unacknowledged >= WINDOW_CHUNKS:
                answer = await hear(self._clock, stream)
                if not _acknowledges(outgoing, answer):
                    return self._refused(begin, answer)
        if not replica.leads:
            return self._refused(begin, "no longer the leader")  # what follows names the term as one who leads it
        end = outgoing.end
        await say(self._clock, stream, ["end", end.chunks, end.rows, end.checksum, replica.raft.term])
        while _acknowledges(outgoing, answer := await hear(self._clock, stream, FINISH_SECONDS_MAX)):
            pass
        return answer == ["done"] or self._refused(begin, answer)

    def _refused(self, begin: list[Any], answer: object) -> bool:
        count = self._failures.get((begin[2], begin[3]), _NO_FAILURES).in_a_row + 1
        note = self._log.debug if count & (count - 1) else self._log.info  # the first, second, fourth, eighth and so on
        note("snapshot refused", range=begin[2], to=begin[3], in_a_row=count, reason=str(answer)[:200])
        return False


def _acknowledges(outgoing: Outgoing, answer: list[Any]) -> bool:
    match answer:
        case ["have", int(chunks)]:
            outgoing.acknowledge(chunks)
            return True
    return False
