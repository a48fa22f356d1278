"""Taking connections: greet, then serve each by its role.

Lives here: what becomes of a connection from accept to close, and the bound on their number. Does not live here: what
requests and messages mean. Each connection has its own task; whatever goes wrong with it ends it alone.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import trio

from shardkv.environment import Environment, Stream
from shardkv.errors import Busy, ShardKVError
from shardkv.machine.clock import HybridClock
from shardkv.multiraft.driver import Driver
from shardkv.multiraft.snapshots import Snapshots
from shardkv.raft import Inconsistent
from shardkv.server.answer_budget import AnswerBudget
from shardkv.server.client_connection import ClientConnection
from shardkv.server.clock_health import ClockHealth
from shardkv.server.intake import Intake
from shardkv.server.peers import FrameStream, receive_messages
from shardkv.server.requests import Requests
from shardkv.transport.connection import Connection
from shardkv.transport.handshake import KnownBoots, NodeIdentity, accept
from shardkv.transport.pool import Purpose
from shardkv.types import NodeId, RangeId
from shardkv.wire.frames import FRAME_BYTES_MAX, Frame, FrameDecoder, FrameKind, encode_frame
from shardkv.wire.handshake import Hello, Role, encode_refused

PEER_FRAME_BYTES_MAX: Final = 64 * 1024 * 1024
"""A turn's messages for one peer; peers are trusted further than clients."""
OTHER_CONNECTIONS_MAX: Final = 4_096
"""Beside those of clients: three of each other node, of which a cluster may have a thousand, and those still greeting.
Only its greeting tells which a connection is, and clients, however many there are, must not keep other nodes out."""
CALLS_PER_NODE: Final = 16
"""Connections on which a node makes calls of its own, as clients do: one for as long as it runs, others while it looks
for somebody. Those of half a minute before may not be found to be over yet, where the network comes and goes."""
CONNECTIONS_PER_NODE: Final = 2 * (len(Purpose) + 1)
"""With each other node: those that it has dialled, and those that this node has, each with one for calls."""
CONNECTIONS_KEPT_SHARE: Final = 8
"""Where the system has room for few connections: this part of them, at least, is for nodes and whoever greets, and this
part for clients."""
ANSWER_BUFFER_BYTES_MAX: Final = 32 * 1024 * 1024
"""Answers to one client that are not sent yet. Its requests stop being looked at long before this."""

AGAIN_NS: Final = 60_000_000_000
"""Of each range whose logs contradict each other, and of nodes of other clusters, it is spoken this often."""


@dataclass(frozen=True, slots=True)
class ListenerStatistics:
    """A frozen picture of the open connections."""

    connections: int
    """All: clients, nodes, and those still greeting."""
    clients: int
    """Those that nodes make their own calls on are none."""


class Listener:
    """Serves every connection of a node.

    Args:
        identity: who this node is.
        known_boots: shared with the pool of outgoing connections.
        on_peer: called with each greeting of another node that is taken.
        on_foreign: called with each greeting of a node of another cluster.
        peers: how many other nodes there are.
        connections_max: of clients; see :data:`OTHER_CONNECTIONS_MAX` for the rest.
        inflight_max: unanswered requests of one client, above which its connection is not read.
    """

    def __init__(
        self,
        environment: Environment,
        driver: Driver,
        *,
        identity: NodeIdentity,
        known_boots: KnownBoots,
        hybrid_clock: HybridClock,
        clock_health: ClockHealth,
        requests: Requests,
        snapshots: Snapshots,
        on_peer: Callable[[Hello], None],
        on_foreign: Callable[[Hello], None],
        log: Any,
        peers: Callable[[], int],
        connections_max: int,
        inflight_max: int,
    ) -> None:
        self._environment = environment
        self._identity = identity
        self._known_boots = known_boots
        self._hybrid_clock = hybrid_clock
        self._clock_health = clock_health
        self._requests = requests
        self._driver = driver
        self._snapshots = snapshots
        self._on_peer = on_peer
        self._on_foreign = on_foreign
        self._foreign_again_ns = 0
        self._log = log
        self._peers = peers
        self._connections_max = connections_max
        self._inflight_max = inflight_max
        self._intake = Intake(environment.clock)
        self._budget = AnswerBudget(environment.clock)
        self._clients: dict[ClientConnection, None] = {}
        self._calling: Counter[NodeId] = Counter()
        """How many of them each node has for its own calls; the rest are clients'."""
        self._count = 0
        self.dirty: dict[ClientConnection, None] = {}
        """Clients with answers to flush."""
        self.draining = False
        self.contradictions: dict[RangeId, int] = {}
        """When to speak again of a range whose messages contradict its log. Empty as long as no disk loses anything."""

    def flush(self) -> None:
        """Send every client what was answered meanwhile: before the engine is written, and at a turn's end."""
        if self.dirty:
            dirty = list(self.dirty)
            self.dirty.clear()
            for client in dirty:
                client.flush()

    async def handle(self, stream: Stream) -> None:
        """One connection, from its first byte to its last."""
        self._count += 1
        connection = Connection(stream, clock=self._environment.clock, buffer_bytes_max=ANSWER_BUFFER_BYTES_MAX)
        try:
            if self._count > self._connections_max + OTHER_CONNECTIONS_MAX or self.draining:
                reason = "is stopping" if self.draining else f"has {self._count - 1} connections already"
                connection.write(encode_refused(Busy(f"this node {reason}; try another")))
                await connection.aclose()
                return
            async with trio.open_nursery() as nursery:
                nursery.start_soon(connection.run_writer)
                # An error that leaves a nursery ends up in a circle of references, and what its frames hold with it: of
                # each client that breaks off up to a large frame would stay until somebody looks for garbage.
                try:
                    await self._greet_and_serve(connection)
                except (ShardKVError, trio.BrokenResourceError, trio.ClosedResourceError, OSError) as error:
                    self._log.debug("connection ended", remote=stream.remote, reason=str(error))
                nursery.cancel_scope.cancel()
        finally:
            self._count -= 1
            connection.flush()
            connection.close_now()

    async def _greet_and_serve(self, connection: Connection) -> None:
        decoder = FrameDecoder(FRAME_BYTES_MAX)
        hello, frames = await accept(
            connection,
            decoder,
            clock=self._environment.clock,
            identity=self._identity,
            known_boots=self._known_boots,
            timestamp=self._hybrid_clock.now,
            inflight_max=self._inflight_max,
            admit=self._admit,
            foreign=self._foreign,
        )
        if hello.role is Role.CLIENT:
            await self._serve_client(connection, decoder, frames, hello.node_id)
            return
        decoder.frame_bytes_max = PEER_FRAME_BYTES_MAX
        assert hello.node_id is not None, "a peer's greeting names its node"
        try:
            if hello.role is Role.SNAPSHOT:
                await self._snapshots.receive(
                    FrameStream(connection, decoder, frames, self._environment.workers), hello.node_id
                )
            else:
                self._on_peer(hello)
                await self._serve_peer(connection, decoder, frames, hello)
        except ShardKVError as error:
            self._log.warning("peer refused", node=hello.node_id, remote=connection.remote, reason=str(error))
            connection.write(encode_refused(error))
            connection.flush()

    async def _admit(self, hello: Hello) -> None:
        """Raises Busy when there are clients enough. A client is told the time, so this node must know it.

        What a node asks for itself takes no places of clients: idlers could fill them, and it would pass for dead.
        """
        if hello.role is not Role.CLIENT:
            return
        await self._clock_health.settled()
        if hello.node_id is not None:
            if self._calling[hello.node_id] >= CALLS_PER_NODE:
                raise Busy(f"node {hello.node_id} has {CALLS_PER_NODE} connections for its calls here already")
        elif self._client_count >= (clients_max := self._clients_max()):
            raise Busy(f"this node has {clients_max} clients already; try another")

    @property
    def _client_count(self) -> int:
        return len(self._clients) - self._calling.total()

    def _clients_max(self) -> int:
        """Where the system has room for few connections, clients leave what those with other nodes take."""
        room = self._environment.network.connections_max()
        share = room // CONNECTIONS_KEPT_SHARE
        kept = min(max(CONNECTIONS_PER_NODE * self._peers(), share), room - share)
        return min(self._connections_max, room - kept)

    async def _serve_client(
        self, connection: Connection, decoder: FrameDecoder, frames: list[Frame], caller: NodeId | None
    ) -> None:
        client = ClientConnection(
            connection,
            hybrid_clock=self._hybrid_clock,
            dispatch=self._requests.dispatch,
            dirty=self.dirty,
            inflight_max=self._inflight_max,
            intake=self._intake,
            budget=self._budget,
            clock=self._environment.clock,
        )
        self._clients[client] = None
        if caller is not None:
            self._calling[caller] += 1
        try:
            await client.serve(decoder, frames)
        finally:
            del self._clients[client]
            if caller is not None:
                self._calling[caller] -= 1
                self._calling = +self._calling
            self.dirty.pop(client, None)
            self._budget.forget(client)

    async def _serve_peer(
        self, connection: Connection, decoder: FrameDecoder, frames: list[Frame], hello: Hello
    ) -> None:
        node_id, start = hello.node_id, (hello.boot, hello.start_token, hello.earlier_tokens)
        assert node_id is not None, "a peer's greeting names its node"
        contradicted = partial(self._contradicted, node_id)
        require_newest = self._known_boots.require_newest
        while True:
            # Of two copies of a disk the one that was let in first may turn out to be the old one.
            require_newest(node_id, *start)
            for frame in frames:
                if frame.kind is FrameKind.PING:
                    connection.write(encode_frame(FrameKind.PONG, self._clock_health.answer(frame.payload)))
                    connection.flush()
                else:
                    receive_messages(self._driver, node_id, frame, contradicted)
            self._driver.settle()
            data = await connection.receive()
            if not data:
                return
            frames = decoder.feed(data)

    def _foreign(self, hello: Hello) -> None:
        """Say, now and then, that a node of another cluster has this node's address."""
        now = self._environment.clock.monotonic_ns()
        if now >= self._foreign_again_ns:
            self._foreign_again_ns = now + AGAIN_NS
            self._log.error(
                "a node of another cluster takes this address for one of its cluster's: clients may come to either; "
                "check the addresses, and whether this node runs on the right data directory",
                cluster=(hello.cluster_id or b"").hex(),
                node=hello.node_id,
                takes_this_for=hello.destination_node_id,
                address=hello.address,
            )
        self._on_foreign(hello)

    def _contradicted(self, node_id: NodeId, range_id: RangeId, error: Inconsistent) -> None:
        """Say, now and then, that a peer's message cannot be true by the log here."""
        now = self._environment.clock.monotonic_ns()
        if now >= self.contradictions.get(range_id, now):
            self.contradictions[range_id] = now + AGAIN_NS
            self._log.error(
                "a replica's log and its leader's contradict each other: one of them has lost what it had on disk. Its "
                "messages are dropped; check the disks of both nodes",
                range=range_id,
                peer=node_id,
                reason=str(error),
            )

    def statistics(self) -> ListenerStatistics:
        return ListenerStatistics(self._count, self._client_count)

    def goodbye(self) -> None:
        """Send every client elsewhere, and take no more."""
        self.draining = True
        for client in list(self._clients):
            client.goodbye()
