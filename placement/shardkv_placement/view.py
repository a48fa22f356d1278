"""The cluster as one immutable picture: what schedulers look at, and what status pages show.

A view is made of the replicated state and the leader's statistics at one moment; it never changes after, and nothing
in it refers back to either. :class:`ViewBuilder` reuses what has not changed since the last view, so that a quiet
cluster of many ranges costs nothing.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from shardkv.types import Fullness, NodeId, RangeDescriptor, RangeId, ReplicaId, ReplicaRole
from shardkv_placement.fields import Labels
from shardkv_placement.heartbeat import NO_CAPACITY, Capacity, Progress
from shardkv_placement.operators import FinishedOperator, Operator, OperatorKind
from shardkv_placement.settings import Settings
from shardkv_placement.state import PlacementState
from shardkv_placement.statistics import NodeState, RangeStatistics, Statistics

__all__ = ["ClusterView", "NodeState", "NodeView", "RangeView", "ViewBuilder"]


@dataclass(frozen=True, slots=True)
class NodeView:
    """A node. ``replicas`` and ``leaders`` count ranges, the placement group's included."""

    node_id: NodeId
    name: str
    address: str
    labels: Labels
    state: NodeState
    draining: bool
    replicas: int
    leaders: int
    boot: int = 0
    heard_at: float | None = None
    """When its last heartbeat came, in the seconds of ``ClusterView.now``."""
    capacity: Capacity = NO_CAPACITY
    slow_disk: bool = False
    """Its log's syncs stall: it gives its leaderships away itself, and is given none."""
    fullness: Fullness = Fullness.ROOMY
    """Its leaderships are given to nodes with more room, and it is given none of theirs."""

    @property
    def live(self) -> bool:
        return self.state is NodeState.LIVE

    @property
    def short_of_room(self) -> bool:
        return self.fullness is not Fullness.ROOMY

    @property
    def gone(self) -> bool:
        """Down or decommissioned: nothing is to be expected of it."""
        return self.state in (NodeState.DOWN, NodeState.DECOMMISSIONED)


@dataclass(frozen=True, slots=True)
class RangeView:
    """A range: its newest descriptor, and what its leader last said, if there is one that is known."""

    descriptor: RangeDescriptor
    statistics: RangeStatistics | None = None

    @property
    def range_id(self) -> RangeId:
        return self.descriptor.range_id

    @property
    def leader(self) -> NodeId | None:
        """The node that leads it as far as is known; it may have died since."""
        return None if self.statistics is None else self.statistics.leader

    @property
    def term(self) -> int:
        return 0 if self.statistics is None else self.statistics.term

    @property
    def bytes(self) -> int:
        return 0 if self.statistics is None else self.statistics.bytes

    def progress_of(self, replica_id: ReplicaId) -> Progress | None:
        """How far a replica is, by the leader's last report; None when the leader did not name it."""
        if self.statistics is not None:
            for progress in self.statistics.progress:
                if progress.replica_id == replica_id:
                    return progress
        return None

    def silent_since(self, replica_id: ReplicaId) -> float | None:
        """From when on the leader has called the replica inactive in every report, in the seconds of
        ``ClusterView.now``; None when it does not."""
        return None if self.statistics is None else self.statistics.silent_since.get(replica_id)

    def has_voter_on(self, node_id: NodeId) -> bool:
        replica = self.descriptor.replica_on(node_id)
        return replica is not None and replica.role is ReplicaRole.VOTER


@dataclass(frozen=True, slots=True)
class ClusterView:
    """Everything that a decision may rest on."""

    now: float
    """Monotonic seconds."""
    wall_ms: int
    """Milliseconds since 1970, which replicated times are compared with."""
    cluster_id: bytes
    complete: bool
    """Whether the statistics are; nothing may be scheduled from a view that is not."""
    nodes: Mapping[NodeId, NodeView]
    """By id, ascending; decommissioned ones too."""
    ranges: Mapping[RangeId, RangeView]
    """By id, ascending, the placement group's own included."""
    settings: Settings
    operators: Mapping[RangeId, Operator]
    """The running operator of each range that has one."""
    finished: Mapping[tuple[RangeId, OperatorKind], FinishedOperator]
    """The last operator of a kind that ended on a range, as far back as the history goes."""

    @property
    def live_nodes(self) -> list[NodeView]:
        return [node for node in self.nodes.values() if node.live]

    def seconds_since(self, replicated_ms: int) -> float:
        """How long ago something happened that the placement group recorded; never negative."""
        return max(0, self.wall_ms - replicated_ms) / 1000


_EMPTY: Final[Mapping[RangeId, RangeView]] = MappingProxyType({})


class ViewBuilder:
    """Makes views of one state and one leader's statistics. The last view's parts are reused where nothing changed."""

    def __init__(self, state: PlacementState, statistics: Statistics) -> None:
        self._state = state
        self._statistics = statistics
        self._revisions = (-1, -1)
        self._ranges = _EMPTY
        self._replicas: dict[NodeId, int] = {}
        self._leaders: dict[NodeId, int] = {}
        self._operators: Mapping[RangeId, Operator] = MappingProxyType({})
        self._finished: Mapping[tuple[RangeId, OperatorKind], FinishedOperator] = MappingProxyType({})

    def build(self, now: float, wall_ms: int) -> ClusterView:
        """The view at ``now`` (monotonic seconds) and ``wall_ms`` (milliseconds since 1970)."""
        state, statistics = self._state, self._statistics
        if self._revisions != (state.revision, statistics.revision):
            self._refresh()
            self._revisions = (state.revision, statistics.revision)
        nodes = {
            record.node_id: NodeView(
                node_id=record.node_id,
                name=record.name,
                address=record.address,
                labels=record.labels,
                state=statistics.node_state(record, state.settings, now),
                draining=statistics.draining(record.node_id),
                replicas=self._replicas.get(record.node_id, 0),
                leaders=self._leaders.get(record.node_id, 0),
                boot=record.boot,
                heard_at=statistics.heard_at(record.node_id),
                capacity=statistics.capacity(record.node_id),
                slow_disk=statistics.slow_disk(record.node_id),
                fullness=statistics.fullness(record.node_id),
            )
            for record in sorted(state.nodes.values(), key=lambda each: each.node_id)
        }
        return ClusterView(
            now=now,
            wall_ms=wall_ms,
            cluster_id=state.counters.cluster_id,
            complete=statistics.complete(state, now),
            nodes=MappingProxyType(nodes),
            ranges=self._ranges,
            settings=state.settings,
            operators=self._operators,
            finished=self._finished,
        )

    def _refresh(self) -> None:
        state, reported, before = self._state, self._statistics.ranges, self._ranges
        descriptors = list(state.ranges.descriptors())
        if state.placement is not None:
            descriptors.append(state.placement)
        descriptors.sort(key=lambda descriptor: descriptor.range_id)
        ranges: dict[RangeId, RangeView] = {}
        replicas: dict[NodeId, int] = {}
        leaders: dict[NodeId, int] = {}
        for descriptor in descriptors:
            range_id = descriptor.range_id
            statistics = reported.get(range_id)
            view = before.get(range_id)
            if view is None or view.descriptor is not descriptor or view.statistics is not statistics:
                view = RangeView(descriptor, statistics)
            ranges[range_id] = view
            for replica in descriptor.replicas:
                replicas[replica.node_id] = replicas.get(replica.node_id, 0) + 1
            if statistics is not None:
                leaders[statistics.leader] = leaders.get(statistics.leader, 0) + 1
        self._ranges, self._replicas, self._leaders = MappingProxyType(ranges), replicas, leaders
        self._operators = MappingProxyType(dict(state.operators))
        self._finished = MappingProxyType(
            {(done.operator.range_id, done.operator.kind): done for done in state.finished.values()}
        )
