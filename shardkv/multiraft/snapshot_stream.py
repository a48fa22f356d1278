"""A snapshot's connection as both ends see it: messages, and when it counts as broken.

Lives here: what either end bears before it gives the connection up, and for how long a break may last. Does not live
here: what the messages say (``snapshot_parts``), and what each end does after a break (``snapshot_sender``,
``snapshot_receiver``).
"""

from typing import Any, Final, Protocol

import trio

from shardkv.environment import Clock
from shardkv.errors import ProtocolError, ShardKVError, StorageError

SILENCE_SECONDS_MAX: Final = 10.0
"""A stream on which nothing moves for this long is given up."""
RESUME_SECONDS_MAX: Final = 30.0
"""After a break: how long the sender keeps its engine snapshot without getting further, and the receiver its file."""

BREAKS: Final = (ShardKVError, OSError, trio.BrokenResourceError, trio.ClosedResourceError)
"""What a connection may fail with."""


class SnapshotStream(Protocol):
    """A connection of the SNAPSHOT role, as messages."""

    async def send(self, message: list[Any]) -> None: ...

    async def receive(self) -> list[Any]:
        """The next message. Raises ProtocolError at the end of the stream."""
        ...


class StreamBroken(ProtocolError):
    """The connection ended, or went silent, in the middle: the stream may be resumed on another."""


async def say(clock: Clock, stream: SnapshotStream, message: list[Any]) -> None:
    """Send a part. Raises StreamBroken when the connection is lost, or takes nothing for too long."""
    try:
        with clock.deadline(SILENCE_SECONDS_MAX) as scope:
            await stream.send(message)
    except BREAKS as error:
        raise StreamBroken(str(error)) from error
    if scope.cancelled_caught:
        raise StreamBroken("the receiver of a snapshot takes nothing any more")


async def hear(clock: Clock, stream: SnapshotStream, seconds: float | None = None) -> list[Any]:
    """The next part. Raises StreamBroken when none comes, StorageError when the other side's disk failed it."""
    part: list[Any] | None = None
    try:
        with clock.deadline(SILENCE_SECONDS_MAX if seconds is None else seconds):
            part = await stream.receive()
    except StorageError:
        raise  # the other side's: it is no better on another connection
    except BREAKS as error:
        raise StreamBroken(str(error)) from error
    if part is None:
        raise StreamBroken("the other side of a snapshot fell silent")
    return part
