"""Who should lead: nodes that drain or run out of room lose their leaderships, the others lead equally many ranges.

Pure functions from a view. A leadership moves only when that brings two nodes closer together (a difference of two
or more), only to a voter that follows closely, and not again within a cooldown, so nothing is moved back and forth.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from shardkv.types import PLACEMENT_RANGE, Fullness, NodeId, RangeId, ReplicaRole
from shardkv_placement.operators import (
    LEADER_KINDS,
    Operator,
    OperatorKind,
    Outcome,
    TransferLeader,
    caught_up,
)
from shardkv_placement.view import ClusterView, NodeView, RangeView

DIFFERENCE_MIN: Final = 2
"""Leaders that one node must have more than another. With one, moving would only swap the two."""
RETRY_SECONDS: Final = 10.0
"""After a transfer of the range failed."""
OPERATORS_PER_ROUND_MAX: Final = 256

_ByTarget = dict[NodeId, Iterator[RangeView]]
"""The ranges that a node might take over, by that node."""


def drain_leaders(view: ClusterView) -> tuple[Operator, ...]:
    """Take every leadership, the placement group's too, from nodes that are about to stop, or to refuse writes."""
    if not any((node.draining or node.short_of_room) and node.live for node in view.nodes.values()):
        return ()
    leads = Leads.of(view)
    found: list[Operator] = []
    for range_view in view.ranges.values():
        source = None if range_view.leader is None else view.nodes.get(range_view.leader)
        if source is None or not source.live or not (source.draining or source.short_of_room):
            continue
        if len(found) >= OPERATORS_PER_ROUND_MAX:
            break
        if not leads.room(source.node_id):
            continue
        target = _drain_target(view, range_view, leads)
        if target is not None:
            reason = f"node {source.node_id} is {'draining' if source.draining else 'short of room'}"
            leads.move(source.node_id, target)
            found.append(Operator(OperatorKind.DRAIN, range_view.range_id, (TransferLeader(target),), reason))
    return tuple(found)


def balance_leaders(view: ClusterView) -> tuple[Operator, ...]:
    """Even out how many ranges each live node leads; the placement group does not count."""
    if not view.settings.leader_balance:
        return ()
    leads = Leads.of(view)
    nodes = [node.node_id for node in view.live_nodes if not node.draining]
    movable: dict[NodeId, _ByTarget] = {}
    found: dict[RangeId, Operator] = {}
    while len(found) < OPERATORS_PER_ROUND_MAX:
        nodes = [node_id for node_id in nodes if leads.room(node_id)]
        operator = _next_move(view, leads, nodes, movable, found)
        if operator is None:
            break
        found[operator.range_id] = operator
    return tuple(found.values())


def why_not(view: ClusterView, range_view: RangeView) -> str:
    """What keeps a range's leadership where it is: one clause for each node that could have it."""
    obstacle = _range_obstacle(view, range_view)
    if obstacle is not None:
        return obstacle
    if range_view.range_id == PLACEMENT_RANGE:
        return "the placement group's leadership is moved by draining only"
    assert range_view.leader is not None
    source = range_view.leader
    leads = Leads.of(view)
    clauses = []
    for node in view.nodes.values():
        if node.node_id == source:
            continue
        fullness_max = view.nodes[source].fullness
        obstacle = _target_obstacle(range_view, node, fullness_max) or _cooldown(view, range_view)
        mine, theirs = leads.counts.get(source, 0), leads.counts.get(node.node_id, 0)
        if obstacle is None and mine - theirs < DIFFERENCE_MIN:
            obstacle = f"it leads {theirs} ranges and node {source} leads {mine}: too even to move"
        if obstacle is None and not (leads.room(source) and leads.room(node.node_id)):
            obstacle = f"{leads.in_flight_max} transfers are under way"
        clauses.append(f"node {node.node_id}: {obstacle or 'other ranges go first'}")
    return "; ".join(clauses) or "there is no other node"


@dataclass(slots=True)
class Leads:
    """How many ranges each node leads once every running transfer has been done, and what is in flight."""

    counts: dict[NodeId, int]
    in_flight: dict[NodeId, int]
    in_flight_max: int
    led: dict[NodeId, list[RangeView]]
    """The ranges that each node leads now, by id."""

    @classmethod
    def of(cls, view: ClusterView) -> "Leads":
        leads = cls(dict.fromkeys(view.nodes, 0), {}, view.settings.transfers_per_node_max, {})
        counts, led = leads.counts, leads.led
        for range_id, range_view in view.ranges.items():
            if range_view.statistics is not None and range_id != PLACEMENT_RANGE:
                leader = range_view.statistics.leader
                if leader not in led:
                    led[leader] = []
                led[leader].append(range_view)
        for leader, ranges in led.items():
            counts[leader] = len(ranges)
        for operator in view.operators.values():
            step = operator.current
            running = view.ranges.get(operator.range_id)
            if isinstance(step, TransferLeader) and running is not None and running.leader is not None:
                counted = operator.range_id != PLACEMENT_RANGE and running.leader != step.target
                leads._fly(running.leader, step.target, 1 if counted else 0)
        return leads

    def room(self, node_id: NodeId) -> bool:
        return self.in_flight.get(node_id, 0) < self.in_flight_max

    def move(self, source: NodeId, target: NodeId) -> None:
        self._fly(source, target, 1)

    def _fly(self, source: NodeId, target: NodeId, leaders: int) -> None:
        self.counts[source] = self.counts.get(source, 0) - leaders
        self.counts[target] = self.counts.get(target, 0) + leaders
        for node_id in (source, target):
            self.in_flight[node_id] = self.in_flight.get(node_id, 0) + 1


def _next_move(
    view: ClusterView,
    leads: Leads,
    nodes: list[NodeId],
    movable: dict[NodeId, _ByTarget],
    found: Mapping[RangeId, Operator],
) -> Operator | None:
    """The best single transfer: from the node that leads most to the one that leads fewest, as far as voters allow.

    ``movable`` is what is left to be looked at, of each node that was a source already; nothing is looked at twice.
    """
    counts = leads.counts
    ascending = sorted(nodes, key=lambda node_id: (counts[node_id], node_id))
    for source in sorted(nodes, key=lambda node_id: (-counts[node_id], node_id)):
        if source not in movable:
            movable[source] = _movable(view, leads, source)
        by_target = movable[source]
        if not by_target:
            continue
        for target in ascending:
            if counts[source] - counts[target] < DIFFERENCE_MIN:
                break
            for range_view in by_target.get(target, ()):
                if range_view.range_id in found:
                    continue
                reason = (
                    f"node {source} leads {counts[source]} ranges and node {target} leads {counts[target]}, "
                    f"transfers under way included"
                )
                leads.move(source, target)
                return Operator(OperatorKind.BALANCE, range_view.range_id, (TransferLeader(target),), reason)
            by_target.pop(target, None)
    return None


def _movable(view: ClusterView, leads: Leads, source: NodeId) -> _ByTarget:
    """The ranges that ``source`` leads and another node may lead instead, each once, by that node."""
    held: dict[NodeId, list[RangeView]] = {}
    for range_view in leads.led.get(source, ()):
        for node_id, _, role in range_view.descriptor.replicas:
            if role is ReplicaRole.VOTER and node_id != source:
                held.setdefault(node_id, []).append(range_view)
    return {target: _ready(view, source, target, ranges) for target, ranges in held.items()}


def _ready(view: ClusterView, source: NodeId, target: NodeId, ranges: list[RangeView]) -> Iterator[RangeView]:
    """Those of ``ranges`` whose leadership may go from ``source`` to ``target`` now."""
    node, fullness_max = view.nodes[target], view.nodes[source].fullness
    for range_view in ranges:
        if (
            _target_obstacle(range_view, node, fullness_max) is None
            and _range_obstacle(view, range_view) is None
            and _cooldown(view, range_view) is None
        ):
            yield range_view


def _drain_target(view: ClusterView, range_view: RangeView, leads: Leads) -> NodeId | None:
    """Who is to lead instead: of a node that is short of room only one with more, so that nothing comes back. One that
    refuses writes declines a leadership."""
    if _range_obstacle(view, range_view) is not None:
        return None
    assert range_view.leader is not None, "drained without a leader"
    source = view.nodes[range_view.leader]
    fullness_max = Fullness.SHORT if source.draining else min(source.fullness - 1, Fullness.SHORT)
    holders = [view.nodes[each.node_id] for each in range_view.descriptor.replicas if each.node_id in view.nodes]
    targets = [
        (node.fullness, leads.counts[node.node_id], node.node_id)
        for node in holders
        if node is not source and _target_obstacle(range_view, node, fullness_max) is None and leads.room(node.node_id)
    ]
    return min(targets)[2] if targets else None


def _range_obstacle(view: ClusterView, range_view: RangeView) -> str | None:
    range_id = range_view.range_id
    running = view.operators.get(range_id)
    if running is not None:
        return f"operator {running.operator_id} is running: {running.reason}"
    leader = None if range_view.leader is None else view.nodes.get(range_view.leader)
    if leader is None or not leader.live:
        return "no live leader of it is known"
    for kind in LEADER_KINDS:
        last = view.finished.get((range_id, kind))
        if last is not None and last.outcome is Outcome.FAILED and view.seconds_since(last.finished_ms) < RETRY_SECONDS:
            return f"a transfer failed a moment ago: {last.message}"
    return None


def _target_obstacle(range_view: RangeView, node: NodeView, fullness_max: int) -> str | None:
    """Why a node cannot become the range's leader."""
    if not node.live:
        return f"it is {node.state.value}"
    if node.draining:
        return "it is draining"
    if node.slow_disk:
        return "its disk is slow"
    if node.fullness > min(fullness_max, Fullness.SHORT):
        return "its disk is nearly full"  # below SHORT a node refuses writes, and declines a leadership
    if not range_view.has_voter_on(node.node_id):
        return "it holds no voter of the range"
    replica = range_view.descriptor.replica_on(node.node_id)
    assert replica is not None
    if not caught_up(range_view, replica.replica_id):
        return f"its replica {replica.replica_id} does not follow closely"
    return None


def _cooldown(view: ClusterView, range_view: RangeView) -> str | None:
    seconds = view.settings.transfer_cooldown_ms / 1000
    for kind in LEADER_KINDS:
        last = view.finished.get((range_view.range_id, kind))
        if last is not None and view.seconds_since(last.finished_ms) < seconds:
            return f"its leadership moved less than {seconds:g} s ago"
    return None
