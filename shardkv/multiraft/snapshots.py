"""Snapshots: a range streamed to a replica that fell behind the log, and put in place there.

Lives here: both ends together, as the rest of the node knows them. Does not live here: when a snapshot is sent
(``snapshot_sender``), when one is taken and installed (``snapshot_receiver``), and connections (a stream of messages is
handed in). A snapshot has a connection of its own, so that it never stands before Raft's messages, and no group ever
waits for one (trap 16): where there is no room, the group is told that it failed, and asks again.

When the connection breaks, the sender keeps its engine snapshot and the receiver its unfinished file, both for a
bounded time, and the sender goes on after the last chunk that has arrived. A restart of either end begins anew.

The receiver builds a file as the rows come, so its memory is bounded whatever the range's size.
"""

from dataclasses import dataclass
from typing import Any, Final

import trio

from shardkv.config import SnapshotsConfig
from shardkv.environment import Environment
from shardkv.multiraft.driver import Driver
from shardkv.multiraft.replica import Replica
from shardkv.multiraft.snapshot_receiver import Receiver
from shardkv.multiraft.snapshot_sender import DialSnapshot, Sender
from shardkv.multiraft.snapshot_stream import SnapshotStream
from shardkv.raft.messages import Message
from shardkv.types import NodeId, RangeId

DEFAULTS: Final = SnapshotsConfig()


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


class Snapshots:
    """The node's snapshot service. :meth:`use` gives it a nursery."""

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
        self.sender = Sender(driver, environment, dial, log=log, config=config)
        self.receiver = Receiver(driver, environment, directory, log=log, config=config)

    def use(self, nursery: trio.Nursery) -> None:
        """Where its tasks run: a nursery that stays open for as long as any connection is served."""
        self.sender.use(nursery)
        self.receiver.use(nursery)

    def statistics(self) -> SnapshotStatistics:
        sender, receiver = self.sender, self.receiver
        return SnapshotStatistics(
            sending=sender.sending,
            receiving=receiver.receiving,
            waiting=receiver.waiting,
            installing=receiver.installing,
            chunks_sent=sender.chunks_sent,
            chunks_received=receiver.chunks_received,
            resumed=sender.resumed,
        )

    def check(self) -> None:
        self.sender.check()
        self.receiver.check()

    # What the driver asks for

    def send(self, replica: Replica, message: Message) -> None:
        """Stream the range to the replica that a SNAP message names; its outcome is reported to the group."""
        self.sender.send(replica, message)

    def install(self, replica: Replica, message: Message) -> None:
        """The group has accepted a snapshot, and rests until it is in place."""
        self.receiver.install(replica, message)

    def receives(self, range_id: RangeId, replica_id: int) -> bool:
        """Whether a replica is being sent a snapshot, and some of it has arrived there."""
        return self.sender.receives(range_id, replica_id)

    def log_needed(self, range_id: RangeId, replica_id: int, held: int, applied: int) -> int | None:
        """After which index a replica that is being sent a snapshot, or was a moment ago, will need the log."""
        return self.sender.log_needed(range_id, replica_id, held, applied)

    # What connections bring

    async def receive(self, stream: SnapshotStream, sender: NodeId) -> None:
        """Serve one incoming stream to its end. Raises ProtocolError for what is not a snapshot, and StreamBroken."""
        await self.receiver.receive(stream, sender)
