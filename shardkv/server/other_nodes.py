"""What a node learns of the other nodes, and what it makes of that: whom to connect to, and whether to go on itself.

News of them comes from the placement group's state and its node table, the greetings of those that dial this node, and
whoever answers at the addresses of --join. Does not live here: who is known when a start begins, by the answer to a
join or the file of an earlier start (``membership``), whose word on an address wins (``address_book``), which start of
a node is its newest and the connections themselves (``transport``). The rule: a node that another one proves to be an
old copy, or to be a cluster in another's place, stops.
"""

from collections.abc import Callable, Iterable
from typing import Any, Final

import trio

from shardkv.config import NodeConfig
from shardkv.environment import Environment
from shardkv.errors import ShardKVError, WrongCluster
from shardkv.multiraft.catalog import Catalog
from shardkv.server.clock_health import ClockHealth
from shardkv.server.known_nodes import KnownNodesFile
from shardkv.server.peers import who_is_at
from shardkv.server.reporting import Reporting
from shardkv.server.stop import Stop
from shardkv.transport.handshake import KnownBoots, NodeIdentity
from shardkv.transport.pool import PeerPool
from shardkv.types import PLACEMENT_RANGE, NodeId
from shardkv.wire.handshake import Hello, Welcome
from shardkv_placement.heartbeat import HeartbeatReply
from shardkv_placement.records import NodeRecord

YOUNG_SECONDS: Final = 600.0
"""A cluster that was made so lately gives way to one that has its only node's address."""
LOOK_AGAIN_SECONDS: Final = 1.0
"""Between two looks at the addresses of --join where nobody has answered yet."""


class OtherNodes:
    """This node's view of the others. ``reporting`` is set before any of them is heard.

    Args:
        founded_ns: when this start made the cluster, if it did.
        doubt: called with a node id when a connection to it is lost.
    """

    def __init__(
        self,
        config: NodeConfig,
        environment: Environment,
        identity: NodeIdentity,
        *,
        known_nodes: KnownNodesFile,
        clock_health: ClockHealth,
        founded_ns: int | None,
        doubt: Callable[[NodeId], None],
        stop: Stop,
        log: Any,
    ) -> None:
        self._config = config
        self._environment = environment
        self._identity = identity
        self.known_nodes = known_nodes
        self.address_book = known_nodes.address_book
        self._clock_health = clock_health
        self._founded_ns = founded_ns
        self._stop = stop
        self._log = log
        self.reporting: Reporting
        self._told_of_address = False
        self.known_boots = KnownBoots()
        self._learn_boots()
        self.pool = PeerPool(
            environment,
            identity,
            self.known_boots,
            on_connected=self._on_connected,
            on_disconnected=doubt,
            on_stranger=self._on_stranger,
            on_unreachable=self._on_unreachable,
            on_reachable=self._on_reachable,
            on_old_copy=self._on_old_copy,
            on_pong=clock_health.answered,
        )

    # Who there is

    def any_known(self) -> bool:
        """Whether there is an address of another node to turn to."""
        return bool(self._config.join) or bool(self.ids())

    def ids(self) -> list[NodeId]:
        return [node_id for node_id, _ in self.address_book if node_id != self._identity.node_id]

    def seeds(self) -> list[str]:
        """Where the cluster may be asked: at this node itself first."""
        known = (known.address for _, known in self.address_book)
        return [self._identity.address, *known, *self._config.join]

    def connect(self) -> None:
        """To everybody, where the address book says."""
        for node_id, known in self.address_book:
            if node_id != self._identity.node_id:
                self.pool.set_address(node_id, known.address)

    def warn_if_lost(self, catalog: Catalog) -> None:
        """Other nodes may dial this one, but its answers have nowhere to go: nobody but a person can help.

        Who has a replica of the placement group has the node table in it.
        """
        placement = catalog.replicas.get(PLACEMENT_RANGE)
        if self.any_known() or (placement is not None and placement.machine is not None):
            return
        self._log.warning(
            "no address of another node is known, so this node cannot take part in the cluster: start it once with "
            "--join HOST:PORT of another node",
            missing=self.known_nodes.path,
        )

    # News of them

    def recovered(self, records: Iterable[NodeRecord]) -> None:
        """This node's own replica of the placement group says so."""
        for record in records:
            if not record.decommissioned:
                self.address_book.recovered(record)
        self._learn_boots()

    def _learn_boots(self) -> None:
        """An old copy of another node's disk is known by what is on record of that node, though this one has been
        restarted since it saw the newer one."""
        for node_id, known in self.address_book:
            self.known_boots.learn(node_id, known.boot, known.start_token, known.earlier_tokens)
            if known.agreed[0]:
                self.known_boots.agree(node_id, *known.agreed)

    def on_table(self, reply: HeartbeatReply) -> None:
        """The node table, if it has changed: connect to who is new or has moved."""
        if reply.nodes is None:
            return
        for entry in reply.nodes:
            if entry.decommissioned:
                self.pool.forget(entry.node_id)
        for entry in reply.nodes:
            self.known_boots.agree(entry.node_id, entry.boot, entry.start_token)
        self.address_book.table(reply.nodes, self.known_boots.is_newest)
        self._addresses_changed()

    def on_peer(self, hello: Hello) -> None:
        """A peer has dialled this node, so dialling it back will work, and it says where."""
        assert hello.node_id is not None, "a peer's greeting names its node"
        if hello.address is not None and self.address_book.greeted(
            hello.node_id, hello.address, hello.boot, hello.start_token, hello.earlier_tokens
        ):
            self._addresses_changed()
        self.pool.retry_now(hello.node_id)

    async def look_where_told(self) -> None:
        """Service: learn who is at the addresses of --join, until somebody has answered at each or the placement group
        has answered this node.

        Nodes that have all moved know each other's old addresses only, and without a majority no table says otherwise.
        """
        left = [address for address in self._config.join if address != self._identity.address]
        while left:
            await self._environment.clock.sleep(LOOK_AGAIN_SECONDS)
            if self.reporting.introduced(None):
                return  # the table does say where the others are
            for address in list(left):
                try:
                    found = await who_is_at(self._environment, self._identity, address)
                except (OSError, trio.BrokenResourceError, trio.ClosedResourceError, ShardKVError) as error:
                    self._log.debug("nobody of the cluster there yet", address=address, reason=str(error))
                    continue
                left.remove(address)
                self._found(found, address)

    def _found(self, found: Welcome, address: str) -> None:
        """Somebody of the cluster has answered at an address of --join."""
        if found.node_id == self._identity.node_id:
            return  # itself, under another name; which of its starts is the newest, the table alone says
        known = dict(self.address_book)
        if found.node_id is None or found.node_id not in known or found.boot <= known[found.node_id].boot:
            return  # it has told, or will tell, where it advertises itself, which may be written otherwise
        try:
            self.known_boots.require_newest(found.node_id, found.boot, found.start_token, found.earlier_tokens)
        except WrongCluster as error:
            self._log.error("a node runs there on an old copy", address=address, reason=str(error))
            return
        if self.address_book.greeted(found.node_id, address, found.boot, found.start_token, found.earlier_tokens):
            self._addresses_changed()

    def _addresses_changed(self) -> None:
        self.connect()
        self.known_nodes.changed()

    # Connections to them

    def _on_connected(self, node_id: NodeId) -> None:
        self._clock_health.ask(node_id)
        address = self._identity.address
        if self.address_book.address_of(node_id) == address and not self._told_of_address:
            self._told_of_address = True
            self._log.error(
                "this node's address is that of another node, which answers there, so nobody can reach this one: "
                "correct --advertise",
                peer=node_id,
                address=address,
            )

    def _on_stranger(self, node_id: NodeId, address: str, reason: str) -> None:
        self._log.error("somebody else is at a node's address", peer=node_id, address=address, reason=reason)

    def _on_unreachable(self, node_id: NodeId, address: str, reason: str) -> None:
        if not self._stop.asked.is_set():
            self._log.warning("cannot reach a node", peer=node_id, address=address, reason=reason)

    def _on_reachable(self, node_id: NodeId) -> None:
        self._log.info("a node can be reached again", peer=node_id)

    # What they say of this node

    def _on_old_copy(self, error: WrongCluster) -> None:
        """A node that has seen a newer start of this one refuses it. The placement group, which else says so, may not
        be there, and every start of this copy counts: in the end it would pass for the newest.

        But where the group has agreed that this very start is the newest, the other has heard a copy first, and will
        learn so.
        """
        mine = self._identity
        agreed = self.address_book.start_of(mine.node_id) == (mine.boot, mine.start_token)
        if not agreed:
            self._stop.for_good(error)

    def on_foreign(self, hello: Hello) -> None:
        """A node of another cluster has dialled this one.

        If this one has just made a cluster of its own in place of a node whose data are gone, clients come to the one
        cluster or the other, and each acknowledges their writes.
        """
        mine = self._identity
        now_ns = self._environment.clock.monotonic_ns()
        young = self._founded_ns is not None and now_ns - self._founded_ns < YOUNG_SECONDS * 1e9
        if not young or hello.destination_node_id != mine.node_id or self.any_known():
            return
        assert hello.cluster_id is not None, "of another cluster without naming it"
        self._stop.for_good(
            WrongCluster(
                f"nodes of cluster {hello.cluster_id.hex()} take this address for that of their node {mine.node_id}, "
                "and this node has just made a cluster of its own: if it was theirs, its data directory is gone or not "
                "mounted, so put it back and start without --bootstrap; a new cluster needs another address",
                old_copy=True,
            )
        )
