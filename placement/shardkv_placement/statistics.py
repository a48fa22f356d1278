"""What the placement leader has heard since it became the leader. In memory only; a new leader starts empty.

Because it starts empty, it says so: :meth:`Statistics.complete` holds only once every node that may be alive has sent
a full report. Until then nothing may be scheduled from it (a range without a known leader looks lost, a node without
reports looks idle).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from types import MappingProxyType
from typing import NamedTuple

from shardkv.errors import Busy, WrongCluster
from shardkv.types import Fullness, NodeId, RangeId, ReplicaId
from shardkv_placement.heartbeat import (
    DESCRIPTORS_WANTED_MAX,
    NO_CAPACITY,
    Capacity,
    Heartbeat,
    HeartbeatReply,
    NodeEntry,
    Progress,
    RangeReport,
)
from shardkv_placement.records import NodeRecord
from shardkv_placement.settings import Settings
from shardkv_placement.state import PlacementState


class NodeState(Enum):
    """How alive a node is, by the age of its last heartbeat."""

    LIVE = "live"
    SUSPECT = "suspect"
    """Silent for a while, or not heard by this placement leader yet: it gets nothing new."""
    DOWN = "down"
    DECOMMISSIONED = "decommissioned"


class RangeStatistics(NamedTuple):
    """What the range's leader, the one with the highest term that claims it, last said."""

    leader: NodeId
    term: int
    bytes: int
    membership: int
    span: int
    progress: tuple[Progress, ...]
    silent_since: Mapping[ReplicaId, float] = MappingProxyType({})
    """Of each replica that is not active: from when on this leader, in this term, has called it so without a break. In
    the seconds of the view that it is part of."""


@dataclass(slots=True)
class _Heard:
    """One node's reports since this leader began."""

    boot: int
    sequence: int = 0
    at: float = 0.0
    full: bool = False
    draining: bool = False
    slow_disk: bool = False
    fullness: Fullness = Fullness.ROOMY
    capacity: Capacity = NO_CAPACITY
    ranges: dict[RangeId, RangeReport] = field(default_factory=dict)


class Statistics:
    """Made anew whenever this node becomes the placement leader; ``now`` is monotonic time in seconds."""

    def __init__(self, now: float) -> None:
        self.started_at = now
        self.revision = 0
        """Grows when anything that is said of ranges changes. What is said of a node is looked at for every view: its
        free space changes with each heartbeat, and to look at very many ranges again for that would be dear."""
        self._heard: dict[NodeId, _Heard] = {}
        self._claims: dict[RangeId, dict[NodeId, RangeReport]] = {}
        """The reports of those that say they lead the range."""
        self._ranges: dict[RangeId, RangeStatistics] = {}

    @property
    def ranges(self) -> Mapping[RangeId, RangeStatistics]:
        """Of the ranges that have a known leader. A live read-only view."""
        return MappingProxyType(self._ranges)

    def receive(self, state: PlacementState, heartbeat: Heartbeat, now: float) -> HeartbeatReply:
        """Take in a heartbeat.

        Raises:
            NotFound: no such node.
            Busy: the node's start is not on record yet.
            WrongCluster: the node was decommissioned, or this is an old copy of its disk; it must stop.
        """
        record = state.in_service(heartbeat.node_id)
        heard = self._heard.get(record.node_id)
        # Only by what the group has agreed on: a node that is told so never starts again.
        if heartbeat.boot < record.boot:
            raise WrongCluster(
                f"node {record.node_id} ({record.name!r}) has been started {record.boot} times, this heartbeat comes "
                f"from start {heartbeat.boot}: it runs on an old copy of its data; put the newest one back, or start "
                "on an empty directory under another name",
                old_copy=True,
            )
        if heartbeat.boot > record.boot:
            raise Busy(f"start {heartbeat.boot} of node {record.node_id} ({record.name!r}) is not on record yet")
        if heard is None or heartbeat.boot > heard.boot:
            self._forget(record.node_id, now)
            heard = self._heard[record.node_id] = _Heard(heartbeat.boot)
            self.revision += 1
        if heartbeat.sequence > heard.sequence:
            self._take(record.node_id, heard, heartbeat, now)
        return self._reply(state, heartbeat, heard)

    def _take(self, node_id: NodeId, heard: _Heard, heartbeat: Heartbeat, now: float) -> None:
        if heartbeat.full:
            named = {report.range_id for report in heartbeat.ranges}
            for range_id in [range_id for range_id in heard.ranges if range_id not in named]:
                self._remove(node_id, heard, range_id, now)
            heard.full = True
            self.revision += 1
        elif heartbeat.since > heard.sequence:
            heard.full = False  # Another leader acknowledged what this one never got.
            self.revision += 1
        for report in heartbeat.ranges:
            if heard.ranges.get(report.range_id) != report:
                heard.ranges[report.range_id] = report
                self._claim(node_id, report, now)
        for range_id in heartbeat.removed:
            self._remove(node_id, heard, range_id, now)
        heard.sequence = heartbeat.sequence
        heard.at = now
        heard.draining = heartbeat.draining
        heard.slow_disk = heartbeat.slow_disk
        heard.fullness = heartbeat.fullness
        heard.capacity = heartbeat.capacity

    def _claim(self, node_id: NodeId, report: RangeReport, now: float) -> None:
        self.revision += 1
        claims = self._claims.setdefault(report.range_id, {})
        if report.is_leader:
            claims[node_id] = report
        else:
            claims.pop(node_id, None)
        self._elect(report.range_id, claims, now)

    def _remove(self, node_id: NodeId, heard: _Heard, range_id: RangeId, now: float) -> None:
        if heard.ranges.pop(range_id, None) is None:
            return
        self.revision += 1
        claims = self._claims.get(range_id)
        if claims is not None and claims.pop(node_id, None) is not None:
            self._elect(range_id, claims, now)

    def _elect(self, range_id: RangeId, claims: dict[NodeId, RangeReport], now: float) -> None:
        if not claims:
            self._claims.pop(range_id, None)
            self._ranges.pop(range_id, None)
            return
        leader, report = max(claims.items(), key=lambda claim: (claim[1].term, claim[0]))
        before = self._ranges.get(range_id)
        # One that has just got the lead has heard nobody yet.
        known = before.silent_since if before is not None and before[:2] == (leader, report.term) else {}
        self._ranges[range_id] = RangeStatistics(
            leader,
            report.term,
            report.bytes,
            report.membership,
            report.span,
            report.progress,
            {each.replica_id: known.get(each.replica_id, now) for each in report.progress if not each.active},
        )

    def _forget(self, node_id: NodeId, now: float) -> None:
        heard = self._heard.pop(node_id, None)
        if heard is not None:
            for range_id in list(heard.ranges):
                self._remove(node_id, heard, range_id, now)

    def _reply(self, state: PlacementState, heartbeat: Heartbeat, heard: _Heard) -> HeartbeatReply:
        newer = [each.range_id for each in heartbeat.ranges if each.is_leader and _newer_than_map(state, each)]
        wanted = newer[:DESCRIPTORS_WANTED_MAX]
        full_wanted = not heard.full or len(newer) > len(wanted)  # the rest must be named again to be asked for
        version = state.counters.nodes_version
        # A leader that is deposed and does not know it yet has an older table: it would take newer nodes away again.
        nodes = None if heartbeat.nodes_version >= version else node_table(state)
        return HeartbeatReply(full_wanted, version, nodes, state.settings.for_nodes(), tuple(wanted))

    # --- Judging --------------------------------------------------------------------------------------------------

    def node_state(self, record: NodeRecord, settings: Settings, now: float) -> NodeState:
        """A node that this leader has not heard counts as suspect, not as down, for as long as it may be alive."""
        if record.decommissioned:
            return NodeState.DECOMMISSIONED
        heard = self._heard.get(record.node_id)
        silent_ms = (now - (self.started_at if heard is None else heard.at)) * 1000
        if silent_ms >= settings.node_down_ms:
            return NodeState.DOWN
        if heard is None or silent_ms >= settings.node_suspect_ms:
            return NodeState.SUSPECT
        return NodeState.LIVE

    def reported_in_full(self, node_id: NodeId) -> bool:
        heard = self._heard.get(node_id)
        return heard is not None and heard.full

    def complete(self, state: PlacementState, now: float) -> bool:
        """Whether every node that may be alive has sent a full report since this leader began, and none is lost."""
        for record in state.nodes.values():
            alive = self.node_state(record, state.settings, now) in (NodeState.LIVE, NodeState.SUSPECT)
            if alive and not self.reported_in_full(record.node_id):
                return False
        return bool(state.nodes)

    def draining(self, node_id: NodeId) -> bool:
        heard = self._heard.get(node_id)
        return heard is not None and heard.draining

    def slow_disk(self, node_id: NodeId) -> bool:
        heard = self._heard.get(node_id)
        return heard is not None and heard.slow_disk

    def fullness(self, node_id: NodeId) -> Fullness:
        heard = self._heard.get(node_id)
        return Fullness.ROOMY if heard is None else heard.fullness

    def capacity(self, node_id: NodeId) -> Capacity:
        heard = self._heard.get(node_id)
        return NO_CAPACITY if heard is None else heard.capacity

    def heard_at(self, node_id: NodeId) -> float | None:
        """When the node's last heartbeat came, in the caller's monotonic seconds."""
        heard = self._heard.get(node_id)
        return None if heard is None else heard.at

    def check(self) -> None:
        """Every invariant: claims are exactly the leaders' reports, and the ranges are their best."""
        claims: dict[RangeId, dict[NodeId, RangeReport]] = {}
        for node_id, heard in self._heard.items():
            for range_id, report in heard.ranges.items():
                assert report.range_id == range_id, (range_id, report)
                if report.is_leader:
                    claims.setdefault(range_id, {})[node_id] = report
        assert claims == self._claims, (claims, self._claims)
        assert self._ranges.keys() == claims.keys(), (self._ranges.keys(), claims.keys())
        for range_id, statistics in self._ranges.items():
            assert statistics.term == max(report.term for report in claims[range_id].values()), (range_id, claims)
            inactive = {each.replica_id for each in statistics.progress if not each.active}
            assert statistics.silent_since.keys() == inactive, (range_id, statistics)


def node_table(state: PlacementState) -> tuple[NodeEntry, ...]:
    """All nodes as every node needs to know them."""
    return tuple(
        NodeEntry(node.node_id, node.name, node.address, node.boot, node.decommissioned, node.start_token)
        for node in state.nodes.values()
    )


def _newer_than_map(state: PlacementState, report: RangeReport) -> bool:
    known = state.descriptor(report.range_id)
    if known is None:
        return True
    return (report.span, report.membership) > (known.epoch.span, known.epoch.membership)
