"""Between this node's groups and other nodes: frames out through the pool, messages in to their groups, snapshots.

Lives here: the adapters between the driver's wishes and the transport. Does not live here: connections themselves
(``transport``), what messages mean (``raft``).
"""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, Final

import trio

from shardkv import codec
from shardkv.environment import Environment, Stream, Workers
from shardkv.errors import ProtocolError
from shardkv.multiraft.driver import Driver
from shardkv.raft import Inconsistent
from shardkv.raft.messages import MessageType
from shardkv.transport.connection import Connection
from shardkv.transport.groups import main_error
from shardkv.transport.handshake import KnownBoots, NodeIdentity, greet
from shardkv.transport.pool import PeerPool, Purpose
from shardkv.types import NodeId, RangeId
from shardkv.wire import raft_codec
from shardkv.wire.frames import (
    COMPRESS_IN_THREAD_BYTES,
    Frame,
    FrameDecoder,
    FrameKind,
    compress_payload,
    encode_frame,
)
from shardkv.wire.handshake import GREETING_BYTES_MAX, Hello, Role, Welcome, decode_refused
from shardkv.wire.raft_codec import ReplicaNotice

DIAL_SECONDS_MAX: Final = 2.0
"""The system would try for minutes, and as many snapshots as may be sent at once would hold up all others."""
SNAPSHOT_FRAME_BYTES_MAX: Final = 16 * 1024 * 1024
_NOT_PASSED_ON: Final = frozenset({MessageType.PROP, MessageType.TRANSFER_LEADER})
"""Asked of a range's leader by requests, where they are checked; no node passes them on to another's group. That a node
declines a leadership it was offered is another matter."""
SNAPSHOT_BUFFER_BYTES: Final = 1024 * 1024
"""A sender of a snapshot waits while more than this is on its way."""


class PoolPeers:
    """The driver's :class:`~shardkv.multiraft.outgoing.Peers`, by a pool of connections."""

    def __init__(self, pool: PeerPool) -> None:
        self._pool = pool

    def send(self, node_id: NodeId, frame: bytes, *, urgent: bool) -> None:
        self._pool.send(node_id, Purpose.URGENT if urgent else Purpose.BULK, frame)

    def flush(self) -> None:
        self._pool.flush()


def receive_messages(
    driver: Driver, sender: NodeId, frame: Frame, contradicted: Callable[[RangeId, Inconsistent], None]
) -> None:
    """Hand the Raft messages of a peer's frame to their groups; the caller settles them, with those of further frames.

    Raises ProtocolError or MalformedRequest.

    ``contradicted`` is told of each that cannot be true by the log here. It is dropped, and other ranges go on.
    """
    if frame.kind is FrameKind.GOODBYE:
        return
    if frame.kind is not FrameKind.RAFT:
        raise ProtocolError(f"a peer may not send {frame.kind.name} frames here")
    catalog = driver.catalog
    for range_id, message, notice in raft_codec.decode(frame.payload):
        if notice is not None:
            if notice is ReplicaNotice.NEED_SNAPSHOT:
                driver.snapshot_needed(range_id, message.to, message.from_, sender)
            continue
        kind = message.type
        declines = kind is MessageType.TRANSFER_LEADER and message.reject
        if (not message.term and kind is not MessageType.READ_INDEX) or (kind in _NOT_PASSED_ON and not declines):
            raise ProtocolError(f"range {range_id}: a node may not send {kind.name} in term {message.term}")
        replica = catalog.admit(range_id, message, sender)
        if replica is None:
            continue
        try:
            driver.step(replica, message)
        except Inconsistent as error:
            contradicted(range_id, error)


class FrameStream:
    """A connection of the SNAPSHOT role as a stream of messages. See ``multiraft.snapshot_stream``."""

    def __init__(self, connection: Connection, decoder: FrameDecoder, frames: list[Frame], workers: Workers) -> None:
        self._connection = connection
        self._decoder = decoder
        self._frames = frames
        self._workers = workers

    async def send(self, message: list[Any]) -> None:
        payload = codec.dumps(message)
        flags = 0
        if len(payload) > COMPRESS_IN_THREAD_BYTES:
            flags, payload = await self._workers.run(compress_payload, payload)
        self._connection.write(encode_frame(FrameKind.SNAPSHOT, payload, flags=flags))
        await self._connection.drain(SNAPSHOT_BUFFER_BYTES)

    async def receive(self) -> list[Any]:
        while not self._frames:
            data = await self._connection.receive()
            if not data:
                raise ProtocolError("the other side of a snapshot went away")
            self._frames = self._decoder.feed(data)
        frame, self._frames = self._frames[0], self._frames[1:]
        if frame.kind is FrameKind.REFUSED:
            raise decode_refused(frame.payload).error
        if frame.kind is not FrameKind.SNAPSHOT:
            raise ProtocolError(f"{frame.kind.name} in the middle of a snapshot")
        message = codec.loads(frame.payload)
        if not isinstance(message, list):
            raise ProtocolError("a part of a snapshot must be an array")
        return message


async def _connect(environment: Environment, address: str) -> Connection:
    """Raises OSError."""
    stream: Stream | None = None
    with environment.clock.deadline(DIAL_SECONDS_MAX):
        stream = await environment.network.dial(address)
    if stream is None:
        raise TimeoutError(f"no answer from {address} within {DIAL_SECONDS_MAX:g} s")
    return Connection(stream, clock=environment.clock)


async def who_is_at(environment: Environment, identity: NodeIdentity, address: str) -> Welcome:
    """Greet whoever listens at an address, of whom nothing is known, for this node's own calls.

    Raises OSError, trio.BrokenResourceError or ShardKVError.
    """
    connection = await _connect(environment, address)
    try:
        hello = Hello(Role.CLIENT, cluster_id=identity.cluster_id, node_id=identity.node_id)
        decoder = FrameDecoder(GREETING_BYTES_MAX)
        welcome, _ = await greet(connection, decoder, hello, clock=environment.clock, known_boots=KnownBoots())
        return welcome
    finally:
        connection.close_now()


class SnapshotDialler:
    """Opens a connection of the SNAPSHOT role to a node."""

    def __init__(
        self,
        environment: Environment,
        identity: NodeIdentity,
        known_boots: KnownBoots,
        address_of: Callable[[NodeId], str | None],
    ) -> None:
        self._environment = environment
        self._identity = identity
        self._known_boots = known_boots
        self._address_of = address_of

    @asynccontextmanager
    async def dial(self, node_id: NodeId) -> AsyncIterator[FrameStream]:
        address = self._address_of(node_id)
        if address is None:
            raise OSError(f"the address of node {node_id} is not known")
        environment = self._environment
        connection = await _connect(environment, address)
        failure: list[Exception] = []
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(connection.run_writer)
                decoder = FrameDecoder(SNAPSHOT_FRAME_BYTES_MAX)
                hello = self._identity.hello(Role.SNAPSHOT, node_id)
                try:
                    _, frames = await greet(
                        connection, decoder, hello, clock=environment.clock, known_boots=self._known_boots
                    )
                    yield FrameStream(connection, decoder, frames, environment.workers)
                except Exception as error:  # noqa: BLE001  # raised below: one that leaves a nursery goes in a circle
                    failure.append(error)
                nursery.cancel_scope.cancel()
            if failure:
                raise failure.pop()
        except BaseExceptionGroup as group:
            raise main_error(group) from group
        finally:
            connection.close_now()
