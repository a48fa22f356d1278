"""A node's outgoing connections to its peers: two to each, dialled in the background and kept up.

They carry messages one way. Answers come back over the peer's own outgoing connections, but for that to a PING, of
which it is to be known how long it was on its way. The rule: sending never waits and never fails. What cannot go now is
dropped and counted, for Raft sends again what matters.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

import trio

from shardkv.environment import Environment, Stream
from shardkv.errors import ProtocolError, ShardKVError, WrongCluster
from shardkv.outage import Outage
from shardkv.transport.connection import BUFFER_BYTES_MAX, Connection
from shardkv.transport.handshake import GREETING_SECONDS_MAX, KnownBoots, NodeIdentity, greet
from shardkv.types import NodeId
from shardkv.wire.frames import Frame, FrameDecoder, FrameKind, encode_frame
from shardkv.wire.handshake import GREETING_BYTES_MAX, Role, decode_refused

UNREACHABLE_SECONDS: Final = 2.0
"""After which a peer that cannot be reached is told of; one that is only started anew may be back by then."""
PINGS_UNANSWERED_MAX: Final = 5
"""PINGs in a row, after which a peer that has answered nothing is given up. Counted, not timed: a node that was stopped
itself finds the answers when it goes on."""
_GOODBYE = encode_frame(FrameKind.GOODBYE)
_PONG = encode_frame(FrameKind.PONG)


class Purpose(IntEnum):
    """Heartbeats and votes have a connection of their own, so that they never stand behind bulk."""

    BULK = 0
    URGENT = 1


_ROLES = {Purpose.BULK: Role.PEER, Purpose.URGENT: Role.PEER_URGENT}


@dataclass(frozen=True, slots=True)
class PoolSettings:
    buffer_bytes_max: int = BUFFER_BYTES_MAX
    """For each connection; what does not fit is dropped."""
    dial_seconds_max: float = 2.0
    greeting_seconds_max: float = GREETING_SECONDS_MAX
    backoff_seconds_min: float = 0.05
    backoff_seconds_max: float = 1.0
    """Between attempts, jittered by half; a restarted peer is dialled again at once when it dials us."""
    stalled_seconds_max: float = 10.0
    """A full connection on which nothing has moved for so long is given up."""


@dataclass(frozen=True, slots=True)
class PeerStatistics:
    """A snapshot of one outgoing connection."""

    node_id: NodeId
    purpose: Purpose
    address: str
    connected: bool
    connects: int
    """How often it has been established."""
    failures: int
    """Attempts that failed since it was last established."""
    frames_dropped: int
    """Frames that found it down or full."""
    bytes_buffered: int
    problem: str
    """Why the last attempt or connection ended; empty while all is well."""


class _Link:
    """One connection to one peer, or the attempts to get it."""

    __slots__ = (
        "connection",
        "connects",
        "dirty",
        "dropped",
        "failures",
        "pings",
        "problem",
        "purpose",
        "retry",
        "scope",
        "silent_since",
    )

    def __init__(self, purpose: Purpose) -> None:
        self.purpose = purpose
        self.connection: Connection | None = None
        """None while it is down."""
        self.dirty = False
        """Has frames that the next flush must send."""
        self.retry = trio.Event()
        self.scope = trio.CancelScope()
        self.connects = 0
        self.failures = 0
        self.dropped = 0
        self.pings = 0
        """Sent since anything was heard."""
        self.silent_since = 0.0
        """When the first of them was."""
        self.problem = ""


class _Peer:
    __slots__ = ("address", "connected", "links", "node_id", "outage")

    def __init__(self, node_id: NodeId, address: str) -> None:
        self.node_id = node_id
        self.address = address
        self.links = tuple(_Link(purpose) for purpose in Purpose)
        self.connected = False
        """All links are up, and ``on_connected`` has been told."""
        self.outage = Outage(UNREACHABLE_SECONDS)
        """Of the urgent link, without which there are no elections."""


class PeerPool:
    """Keeps this node connected to its peers.

    Args:
        identity: fixed for the life of the pool.
        known_boots: shared with the listener.
        on_connected: called with a node id once both of its connections are up.
        on_disconnected: called as soon as the first of them is lost. A process that died closes its connections, so
            this is doubt, at once, without waiting for an election timeout.
        on_pong: called with a node id and the payload of its answer to a PING that was sent to it. It may raise
            ProtocolError, which ends the connection.
        on_stranger: called with a node id, its address and a reason when somebody else is there: a node of another
            cluster, or another one of this.
        on_unreachable: called with a node id, its address and the last reason, once attempts to reach it have failed
            for :data:`UNREACHABLE_SECONDS`, or it has answered no :meth:`ping`; not again before ``on_reachable``.
        on_reachable: called with the node id once it is reached again after that.
        on_old_copy: called with the error when a peer has seen a newer start of this node than this one.

    No callback may block, or raise anything else. :meth:`run` is the service; addresses may be set before it starts.
    """

    def __init__(
        self,
        environment: Environment,
        identity: NodeIdentity,
        known_boots: KnownBoots,
        *,
        settings: PoolSettings | None = None,
        on_connected: Callable[[NodeId], None] = lambda node_id: None,
        on_disconnected: Callable[[NodeId], None] = lambda node_id: None,
        on_pong: Callable[[NodeId, bytes], None] = lambda node_id, payload: None,
        on_stranger: Callable[[NodeId, str, str], None] = lambda node_id, address, reason: None,
        on_unreachable: Callable[[NodeId, str, str], None] = lambda node_id, address, reason: None,
        on_reachable: Callable[[NodeId], None] = lambda node_id: None,
        on_old_copy: Callable[[WrongCluster], None] = lambda error: None,
    ) -> None:
        self._environment = environment
        self._identity = identity
        self._known_boots = known_boots
        self._settings = settings or PoolSettings()
        self._on_connected = on_connected
        self._on_disconnected = on_disconnected
        self._on_pong = on_pong
        self._on_stranger = on_stranger
        self._on_unreachable = on_unreachable
        self._on_reachable = on_reachable
        self._on_old_copy = on_old_copy
        self._peers: dict[NodeId, _Peer] = {}
        self._dirty: list[_Link] = []
        self._nursery: trio.Nursery | None = None

    def set_address(self, node_id: NodeId, address: str) -> None:
        """Connect to ``node_id`` at ``address`` from now on; another address drops the present connections."""
        assert node_id != self._identity.node_id, f"node {node_id} does not dial itself"
        peer = self._peers.get(node_id)
        if peer is None:
            peer = self._peers[node_id] = _Peer(node_id, address)
            if self._nursery is not None:
                self._start(self._nursery, peer)
        elif peer.address != address:
            peer.address = address
            for link in peer.links:
                if link.connection is not None:
                    link.connection.close_now(f"node {node_id} has moved to {address}")
                link.retry.set()

    def forget(self, node_id: NodeId) -> None:
        """End the connections to a node that has left the cluster."""
        peer = self._peers.pop(node_id, None)
        if peer is not None:
            for link in peer.links:
                link.scope.cancel()

    def retry_now(self, node_id: NodeId) -> None:
        """The peer is known to be alive (it has just dialled us): do not wait for the backoff."""
        peer = self._peers.get(node_id)
        if peer is not None:
            for link in peer.links:
                link.retry.set()

    @property
    def peers(self) -> int:
        """How many nodes it dials."""
        return len(self._peers)

    def connected(self, node_id: NodeId) -> bool:
        peer = self._peers.get(node_id)
        return peer is not None and peer.connected

    def send(self, node_id: NodeId, purpose: Purpose, frame: bytes) -> bool:
        """Buffer one encoded frame for the next :meth:`flush`; whether it was taken and not dropped."""
        peer = self._peers.get(node_id)
        if peer is None:
            return False
        link = peer.links[purpose]
        connection = link.connection
        if connection is None or not connection.write(frame):
            link.dropped += 1
            if connection is not None and connection.stalled_seconds() > self._settings.stalled_seconds_max:
                connection.close_now(f"node {node_id} has taken nothing for {connection.stalled_seconds():.0f} s")
            return False
        if not link.dirty:
            link.dirty = True
            self._dirty.append(link)
        return True

    def ping(self, node_id: NodeId, payload: bytes) -> None:
        """Send a PING, if the peer is connected. To be called about once a second.

        A process that hangs keeps its connections, and its system takes what is sent to it. So one that answers nothing
        loses its urgent connection, and is doubted and told of like one whose connections broke.
        """
        peer = self._peers.get(node_id)
        if peer is None or not peer.connected:
            return
        link = peer.links[Purpose.URGENT]
        assert link.connection is not None, f"node {node_id} counts as connected"
        now = self._now()
        if link.pings >= PINGS_UNANSWERED_MAX:
            reason = f"node {node_id} answers nothing, though connections stand: it hangs, or nothing gets through"
            link.connection.close_now(reason)
            peer.outage.begin(link.silent_since)
            if peer.outage.lasts(now):
                self._on_unreachable(node_id, peer.address, reason)
            return
        if not link.pings:
            link.silent_since = now
        link.pings += 1
        self.send(node_id, Purpose.URGENT, encode_frame(FrameKind.PING, payload))
        self.flush()

    def flush(self) -> None:
        """Send what has been buffered: once a turn."""
        if self._dirty:
            for link in self._dirty:
                link.dirty = False
                if link.connection is not None:
                    link.connection.flush()
            self._dirty.clear()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Service: dial, keep up, redial, until cancelled; then say goodbye."""
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                for peer in self._peers.values():
                    self._start(nursery, peer)
                task_status.started()
                await trio.Event().wait()
        finally:
            self._nursery = None

    def _start(self, nursery: trio.Nursery, peer: _Peer) -> None:
        for link in peer.links:
            nursery.start_soon(self._keep, peer, link)

    async def _keep(self, peer: _Peer, link: _Link) -> None:
        """One link's task: connect, read until it is lost, wait, again."""
        with link.scope:
            while True:
                link.retry = trio.Event()
                if link.purpose is Purpose.URGENT:
                    peer.outage.begin(self._now())
                try:
                    await self._connect_once(peer, link)
                except (OSError, trio.BrokenResourceError, trio.ClosedResourceError, ShardKVError) as error:
                    problem = str(error) or type(error).__name__
                    if isinstance(error, WrongCluster) and error.old_copy:
                        self._on_old_copy(error)
                    elif isinstance(error, WrongCluster) and link.purpose is Purpose.URGENT and problem != link.problem:
                        self._on_stranger(peer.node_id, peer.address, problem)
                    elif link.purpose is Purpose.URGENT and peer.outage.lasts(self._now()):
                        self._on_unreachable(peer.node_id, peer.address, problem)
                    link.problem = problem
                link.failures += 1
                with self._environment.clock.deadline(self._backoff(link.failures)):
                    await link.retry.wait()

    def _now(self) -> float:
        return self._environment.clock.monotonic_ns() / 1e9

    def _backoff(self, failures: int) -> float:
        settings = self._settings
        doubled = settings.backoff_seconds_min * 2.0 ** min(failures - 1, 16)
        return min(settings.backoff_seconds_max, doubled) * (0.5 + self._environment.random.random())

    async def _connect_once(self, peer: _Peer, link: _Link) -> None:
        """Connect and use the connection until it is lost. Leaves by an exception that says why."""
        clock = self._environment.clock
        connection = Connection(
            await self._dial(peer.address),
            clock=clock,
            buffer_bytes_max=self._settings.buffer_bytes_max,
            break_on_overflow=False,
        )
        try:
            decoder = FrameDecoder(GREETING_BYTES_MAX)
            hello = self._identity.hello(_ROLES[link.purpose], peer.node_id)
            _, frames = await greet(
                connection,
                decoder,
                hello,
                clock=clock,
                known_boots=self._known_boots,
                seconds_max=self._settings.greeting_seconds_max,
            )
            async with trio.open_nursery() as nursery:
                nursery.start_soon(connection.run_writer)
                self._established(peer, link, connection)
                try:
                    await self._read(peer, link, connection, decoder, frames)
                except (trio.BrokenResourceError, trio.ClosedResourceError, ProtocolError) as error:
                    link.problem = connection.reason or str(error)
                nursery.cancel_scope.cancel()
        finally:
            self._lost(peer, link, connection)

    async def _read(
        self, peer: _Peer, link: _Link, connection: Connection, decoder: FrameDecoder, frames: list[Frame]
    ) -> None:
        """Wait for the end of the connection. Little but its end is said on this side of it."""
        while True:
            for frame in frames:
                if frame.kind is FrameKind.GOODBYE:
                    raise trio.BrokenResourceError(f"{connection.remote} is stopping")
                if frame.kind is FrameKind.REFUSED:
                    reason = decode_refused(frame.payload).error
                    raise trio.BrokenResourceError(f"{connection.remote} refused to go on: {reason}")
                if frame.kind is FrameKind.PONG:
                    self._on_pong(peer.node_id, frame.payload)
                elif frame.kind is FrameKind.PING:
                    connection.write(_PONG)
                    connection.flush()
                else:
                    raise ProtocolError(f"{connection.remote} sent {frame.kind.name} on a connection that is one-way")
            data = await connection.receive()
            if not data:
                raise trio.BrokenResourceError(f"{connection.remote} closed the connection")
            link.pings = 0
            frames = decoder.feed(data)

    async def _dial(self, address: str) -> Stream:
        with self._environment.clock.deadline(self._settings.dial_seconds_max):
            return await self._environment.network.dial(address)
        raise TimeoutError(f"no answer from {address} within {self._settings.dial_seconds_max:g} s")

    def _established(self, peer: _Peer, link: _Link, connection: Connection) -> None:
        link.connection = connection
        link.connects += 1
        link.failures = 0
        link.pings = 0
        link.problem = ""
        if link.purpose is Purpose.URGENT and peer.outage.end():
            self._on_reachable(peer.node_id)
        if not peer.connected and all(other.connection is not None for other in peer.links):
            peer.connected = True
            self._on_connected(peer.node_id)

    def _lost(self, peer: _Peer, link: _Link, connection: Connection) -> None:
        """The connection is over, for whatever reason; says goodbye if it still can."""
        link.connection = None
        connection.write(_GOODBYE)
        connection.flush()
        connection.close_now(link.problem or "closed by this node")
        if peer.connected:
            peer.connected = False
            self._on_disconnected(peer.node_id)

    def statistics(self) -> list[PeerStatistics]:
        return [
            PeerStatistics(
                node_id=peer.node_id,
                purpose=link.purpose,
                address=peer.address,
                connected=link.connection is not None,
                connects=link.connects,
                failures=link.failures,
                frames_dropped=link.dropped,
                bytes_buffered=link.connection.buffered if link.connection is not None else 0,
                problem=link.problem,
            )
            for peer in self._peers.values()
            for link in peer.links
        ]

    def check(self) -> None:
        """Walk every invariant."""
        for peer in self._peers.values():
            up = all(link.connection is not None for link in peer.links)
            assert not peer.connected or up, f"node {peer.node_id} counts as connected but a connection is down"
            for link in peer.links:
                assert not link.dirty or link in self._dirty, (
                    f"{link.purpose.name} to {peer.node_id} waits for no flush"
                )
                if link.connection is not None:
                    link.connection.check()
