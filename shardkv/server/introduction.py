"""How the placement group comes to know of a node's start, and from when on the node may call itself ready.

Lives here: telling the group of the start, beginning the group's state on the first node of a new cluster, and waiting
until a new node is in what the cluster says of itself. Does not live here: joining, which comes before a node has an id
(``membership``), and the heartbeats that follow (``reporting``).
"""

from typing import Any, Final

from shardkv.config import NodeConfig
from shardkv.environment import Environment
from shardkv.errors import ShardKVError, WrongCluster
from shardkv.multiraft.catalog import Catalog
from shardkv.outage import UNANSWERED_SECONDS, Outage
from shardkv.server.placement_service import PlacementService
from shardkv.server.stop import Stop
from shardkv.transport.handshake import NodeIdentity
from shardkv.types import (
    EVERY_KEY,
    FIRST_RANGE,
    PLACEMENT_RANGE,
    Epoch,
    KeyRange,
    Member,
    NodeId,
    RangeDescriptor,
    ReplicaId,
)
from shardkv_placement.commands import Bootstrap, NodeStarted
from shardkv_placement.settings import Settings
from shardkv_placement.state import PlacementState

FIRST_NODE: Final = NodeId(1)
WAIT_SECONDS: Final = 30.0
"""A node that nobody has heard of by then calls itself ready all the same."""
RETRY_SECONDS: Final = 0.2
POLL_SECONDS: Final = 0.02


def first_ranges() -> tuple[RangeDescriptor, ...]:
    """What a new cluster consists of: the placement group and one range of every key, each on the first node."""
    return (
        RangeDescriptor(PLACEMENT_RANGE, KeyRange(b"", b""), Epoch(1, 1), (Member(FIRST_NODE, ReplicaId(1)),)),
        RangeDescriptor(FIRST_RANGE, EVERY_KEY, Epoch(1, 1), (Member(FIRST_NODE, ReplicaId(2)),)),
    )


class Introduction:
    """One start's. ``state`` is the placement group's, as far as this node holds it."""

    def __init__(
        self,
        environment: Environment,
        catalog: Catalog,
        placement: PlacementService,
        state: PlacementState,
        *,
        config: NodeConfig,
        identity: NodeIdentity,
        directory_token: bytes,
        new: bool,
        founding: bool,
        stop: Stop,
        log: Any,
    ) -> None:
        """
        Args:
            new: it was in this start that the directory became the node's, or nobody has heard of one yet.
            founding: this may be the first node of a cluster, after it died amid making that.
        """
        self._environment = environment
        self._catalog = catalog
        self._placement = placement
        self._state = state
        self._config = config
        self._identity = identity
        self._directory_token = directory_token
        self._new = new
        self._founding = founding
        self._stop = stop
        self._log = log

    async def register(self) -> None:
        """Tell the placement group of this start; on the first node of a new cluster, begin the group's state."""
        identity = self._identity
        outage = Outage(UNANSWERED_SECONDS)
        outage.begin(self._now())
        while True:
            try:
                while identity.node_id == FIRST_NODE and not self._state.bootstrapped:
                    if self._placement.group.leads:
                        await self._bootstrap()
                    await self._environment.clock.sleep(POLL_SECONDS)
                started = NodeStarted(
                    identity.node_id,
                    identity.boot,
                    start_token=identity.start_token,
                    address=identity.address,
                    labels=self._config.label,
                    earlier_tokens=identity.earlier_tokens,
                )
                await self._placement.group.propose(started)
                if outage.end():
                    self._log.info("the placement group has taken note of this node's start")
                return
            except WrongCluster as error:
                self._stop.for_good(error)
                return
            except ShardKVError as error:
                self._log.debug("not registered yet", reason=str(error))
                if outage.lasts(self._now()):
                    self._log.warning("the placement group has not taken note of this node's start", reason=str(error))
            await self._environment.clock.sleep(RETRY_SECONDS)

    def _now(self) -> float:
        return self._environment.clock.monotonic_ns() / 1e9

    async def _bootstrap(self) -> None:
        config, identity = self._config, self._identity
        defaults = Settings()
        wanted = (("split_bytes", config.ranges.split_bytes), ("replication_factor", config.ranges.replicas))
        await self._placement.group.propose(
            Bootstrap(
                identity.cluster_id,
                name=config.name,
                address=identity.address,
                directory_token=self._directory_token,
                labels=config.label,
                descriptors=first_ranges(),
                settings=tuple((name, value) for name, value in wanted if value != defaults.value(name)),
            )
        )

    async def wait(self) -> bool:
        """Wait until the node is ready; False if it is to stop first.

        A new node is ready when the placement group has heard of it, so it is in what the cluster says of itself;
        the first node of a new cluster when its range can be written, too, and is known to be led here.

        A node that comes back is ready as soon as it listens: there may be no placement group before others come back
        as well, and who starts a cluster again, one node after the other, waits for each.
        """
        if self._is_awaited():
            with self._environment.clock.deadline(WAIT_SECONDS):
                while self._is_awaited() and not self._introduced():
                    if self._stop.asked.is_set():
                        return False
                    await self._environment.clock.sleep(POLL_SECONDS)
        return True

    def _is_awaited(self) -> bool:
        """Whether its introduction is. As long as the group has no other voter it needs no other node to come back."""
        group = self._catalog.replicas.get(PLACEMENT_RANGE)
        return self._new or (self._founding and group is not None and group.raft.raft.is_singleton)

    def _introduced(self) -> bool:
        first = self._catalog.replicas.get(FIRST_RANGE)
        if not self._config.bootstrap or first is None:
            return self._placement.reporting.introduced(None)
        made = first.raft.committed_in_term and self._state.bootstrapped
        return made and self._placement.reporting.introduced(FIRST_RANGE if first.leads else None)
