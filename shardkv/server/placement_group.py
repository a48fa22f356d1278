"""The placement group as this node reaches it: by its own replica, where it has one, or by a call to another node.

Lives here: whether this node leads the group and holds its state, and how a command gets there. Does not live here:
what a command does (``shardkv_placement``, pure), who proposes one (``reporting``, ``placement_leader``,
``placement_service``), nor how the group replicates it: it is a range like any other.
"""

from collections.abc import Awaitable, Callable, Iterable
from typing import Any, Final

from shardkv.environment import Clock
from shardkv.errors import Busy, RangeNotFound
from shardkv.machine import keys
from shardkv.multiraft.driver import Driver
from shardkv.multiraft.replica import Replica
from shardkv.server.reply import Reply
from shardkv.storage.engine import WriteBatch
from shardkv.types import PLACEMENT_RANGE
from shardkv.wire.requests import Method
from shardkv_placement import commands
from shardkv_placement.commands import Command
from shardkv_placement.state import PlacementState

OUTCOME_SECONDS: Final = 5.0
CALL_SECONDS: Final = 5.0

Call = Callable[..., Awaitable[Any]]
"""``call(method, *arguments, range_id=, node_id=, timeout=)``: ask another node, or this one, over the network."""


class PlacementExtension:
    """The placement group's state as the extension of range 0's machine."""

    def __init__(self) -> None:
        self._prefix = keys.extension_prefix(PLACEMENT_RANGE)
        self.state = PlacementState(self._prefix)

    def load(self, rows: Iterable[tuple[bytes, bytes]]) -> None:
        self.state.load(iter(rows))

    def apply(self, command: Any, timestamp: int, batch: WriteBatch) -> Any:
        return self.state.apply(command, timestamp, batch)


class PlacementGroup:
    """See the module. ``call`` reaches other nodes; it is set before anything is asked of them."""

    def __init__(self, driver: Driver, clock: Clock, extension: PlacementExtension) -> None:
        self._driver = driver
        self._clock = clock
        self.state = extension.state
        self.call: Call

    @property
    def replica(self) -> Replica | None:
        return self._driver.catalog.replicas.get(PLACEMENT_RANGE)

    @property
    def leads(self) -> bool:
        replica = self.replica
        return replica is not None and replica.leads and replica.raft.committed_in_term

    @property
    def knows(self) -> bool:
        """Whether this node holds the group's state, so that it can answer from it."""
        replica = self.replica
        return replica is not None and replica.machine is not None and self.state.bootstrapped

    @property
    def being_made(self) -> bool:
        """Whether this is the first node of a new cluster, and the group's state has not been begun yet."""
        replica = self.replica
        return replica is not None and replica.machine is not None and not self.state.bootstrapped

    def require_made(self) -> None:
        """Raise Busy while there is no cluster that could be described."""
        if self.being_made:
            raise Busy("the cluster is just being made; try again")

    async def propose(self, command: Command) -> Any:
        """Have a command applied by the group, wherever it is led. Raises any ShardKVError."""
        return await self.propose_encoded(commands.encode(command))

    async def propose_encoded(self, encoded: Any) -> Any:
        if self.leads:
            return await self.propose_here(encoded)
        return await self.call(Method.PLACEMENT, encoded, range_id=PLACEMENT_RANGE, timeout=CALL_SECONDS)

    async def propose_here(self, encoded: Any) -> Any:
        """The same, where only this node may have it applied. Raises NotLeader where it does not lead the group."""
        replica = self.require_leader()
        if encoded[0] != commands.Bootstrap.number:
            self.require_made()  # who wants to join need not give up for having come a moment early
        reply = Reply()
        self._driver.proposer.extension(replica, encoded, reply, 0)
        return await reply.wait(self._clock, OUTCOME_SECONDS)

    def require_leader(self) -> Replica:
        replica = self.replica
        if replica is None or replica.machine is None:
            raise RangeNotFound("this node holds no replica of the placement group")
        if not replica.leads:
            raise replica.not_leader()
        return replica
