"""Where replicas should be: ranges grow to their number of voters, and lose replicas that nobody wants.

Pure functions from a view. The voters of a range go from one odd number to another in one joint change, never through
two: with two, the loss of either node stops the range, which is worse than with one.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from shardkv.types import FIRST_RANGE, PLACEMENT_RANGE, Fullness, Member, NodeId, RangeId, ReplicaRole
from shardkv_placement.fields import REPLICAS_MAX
from shardkv_placement.operators import (
    UNALLOCATED,
    AddLearners,
    Operator,
    OperatorKind,
    Outcome,
    Place,
    PromoteLearners,
    RemoveReplicas,
    catch_up_seconds_max,
    caught_up,
    is_receiving,
    without_data,
)
from shardkv_placement.view import ClusterView, NodeState, RangeView

RETRY_SECONDS: Final = 30.0
"""After an operator on a range's replicas failed."""
OPERATORS_PER_ROUND_MAX: Final = 64
"""Operators that one scheduler makes from one view; the next view brings more."""
CAN_REMOVE: Final[bool] = False
"""Whether nodes can carry out the removal of a replica. They cannot yet, so nothing is begun that only could fail."""


def target_voters(view: ClusterView, range_id: RangeId) -> int:
    """How many voters a range should have now: what the settings ask, as far as live nodes go, and always odd."""
    settings = view.settings
    asked = settings.placement_replicas_max if range_id == PLACEMENT_RANGE else settings.replication_factor
    possible = max(1, min(asked, len(view.live_nodes)))
    return possible if possible % 2 else possible - 1


def place_replicas(view: ClusterView) -> tuple[Operator, ...]:
    """Grow the ranges that have too few voters, the placement group first, and shed what no range needs."""
    loads = _Loads.of(view)
    found: list[Operator] = []
    serving = {node.node_id for node in view.nodes.values() if node.state is not NodeState.DECOMMISSIONED}
    placement, others = target_voters(view, PLACEMENT_RANGE), target_voters(view, FIRST_RANGE)
    for range_id, range_view in view.ranges.items():
        target = placement if range_id == PLACEMENT_RANGE else others
        if _settled(range_view, target, serving, loads.receivers):
            continue
        planned = plan(view, range_view, target, loads)
        if isinstance(planned, Operator):
            loads.add(planned)
            found.append(planned)
            if len(found) >= OPERATORS_PER_ROUND_MAX:
                break
    return tuple(found)


def _settled(range_view: RangeView, target: int, serving: set[NodeId], receivers: set[NodeId]) -> bool:
    """Whether nothing is to be done, as for nearly all of many ranges, or no node is left to do it with, as while very
    many grow: the quick half of :func:`plan`."""
    replicas = range_view.descriptor.replicas
    voters = 0
    for node_id, _, role in replicas:
        if role is not ReplicaRole.VOTER:
            return False
        voters += node_id in serving
    if voters < target:
        free = len(receivers) - sum([replica.node_id in receivers for replica in replicas])
        return free <= voters % 2  # one more than an odd number is no gain
    return voters == len(replicas)


def lacking_voters(view: ClusterView) -> list[RangeView]:
    """The ranges that have fewer voters than they should now, whether or not anything can be done about it."""
    serving = {node.node_id for node in view.nodes.values() if node.state is not NodeState.DECOMMISSIONED}
    others = target_voters(view, FIRST_RANGE)
    placement = min(target_voters(view, PLACEMENT_RANGE), others)  # it has more where it can, and is as safe without
    lacking = []
    for range_id, range_view in view.ranges.items():
        voters = 0
        for node_id, _, role in range_view.descriptor.replicas:
            voters += role is ReplicaRole.VOTER and node_id in serving
        if voters < (placement if range_id == PLACEMENT_RANGE else others):
            lacking.append(range_view)
    return lacking


def why_not(view: ClusterView, range_view: RangeView) -> str:
    """What keeps a range's replicas where they are, or what would be done about them."""
    planned = plan(view, range_view, target_voters(view, range_view.range_id), _Loads.of(view))
    return planned.reason if isinstance(planned, Operator) else planned


@dataclass(slots=True)
class _Loads:
    """What nodes hold and receive once everything that runs has been done."""

    replicas: dict[NodeId, int]
    receiving: dict[NodeId, int]
    receiving_max: int
    receivers: set[NodeId]
    """The nodes that may be given another replica now."""

    @classmethod
    def of(cls, view: ClusterView) -> "_Loads":
        replicas = {node.node_id: node.replicas for node in view.nodes.values()}
        receivers = {
            node.node_id
            for node in view.live_nodes
            if not node.draining and not node.slow_disk and node.fullness < Fullness.LOW
        }
        loads = cls(replicas, {}, view.settings.learners_per_node_max, receivers)
        for operator in view.operators.values():
            step = operator.current
            if isinstance(step, AddLearners):
                range_view = view.ranges.get(operator.range_id)
                for place in step.learners:
                    if range_view is not None and caught_up(range_view, place.replica_id):
                        continue  # it only waits for the others
                    there = range_view is not None and range_view.descriptor.replica_on(place.node_id) is not None
                    loads._receive(place.node_id, 0 if there else 1)
        return loads

    def add(self, operator: Operator) -> None:
        step = operator.current
        if isinstance(step, AddLearners):
            for place in step.learners:
                self._receive(place.node_id, 1)

    def _receive(self, node_id: NodeId, replicas: int) -> None:
        self.replicas[node_id] = self.replicas.get(node_id, 0) + replicas
        self.receiving[node_id] = self.receiving.get(node_id, 0) + 1
        if self.receiving[node_id] >= self.receiving_max:
            self.receivers.discard(node_id)


@dataclass(slots=True)
class _Members:
    """A range's replicas by what is to become of them."""

    kept: list[Member]
    """Voters. One on a node that is down stays one: the node may come back."""
    lost: list[Member]
    """Voters on decommissioned nodes, which never come back."""
    learners: list[Member]
    """To be promoted, if voters are missing."""
    useless: list[Member]
    """Learners on nodes that are gone."""

    @classmethod
    def of(cls, view: ClusterView, range_view: RangeView) -> "_Members":
        members = cls([], [], [], [])
        for replica in range_view.descriptor.replicas:
            node = view.nodes.get(replica.node_id)
            if replica.role is ReplicaRole.VOTER:
                lost = node is None or node.state is NodeState.DECOMMISSIONED
                (members.lost if lost else members.kept).append(replica)
            else:
                (members.useless if node is None or node.gone else members.learners).append(replica)
        return members


def plan(view: ClusterView, range_view: RangeView, target: int, loads: _Loads) -> Operator | str:
    """The operator that the range's replicas need to be ``target`` voters, or why they stay as they are."""
    obstacle = _obstacle(view, range_view)
    if obstacle is not None:
        return obstacle
    members = _Members.of(view, range_view)
    if len(members.kept) >= target:
        return _shed(range_view, members, target)
    return _grow(view, range_view, members, target, loads)


def _obstacle(view: ClusterView, range_view: RangeView) -> str | None:
    range_id = range_view.range_id
    if range_id in view.operators:
        running = view.operators[range_id]
        return f"operator {running.operator_id} is running: {running.reason}{_receiving(range_view)}"
    leader = None if range_view.leader is None else view.nodes.get(range_view.leader)
    if leader is None or not leader.live:
        return "no live leader of it is known"
    assert range_view.statistics is not None
    if range_view.statistics.membership != range_view.descriptor.epoch.membership:
        return "its leader's newest descriptor has not been reported yet"
    for kind in (OperatorKind.GROW, OperatorKind.SHED):
        last = view.finished.get((range_id, kind))
        if last is not None and last.outcome is Outcome.FAILED and view.seconds_since(last.finished_ms) < RETRY_SECONDS:
            return f"operator {last.operator.operator_id} failed a moment ago: {last.message}"
    return None


def _receiving(range_view: RangeView) -> str:
    """Which nodes are being sent the range's data, for they look like some that nobody can reach until they have it."""
    receiving = [member for member in range_view.descriptor.replicas if is_receiving(range_view, member.replica_id)]
    if not receiving:
        return ""
    return f"; {_nodes(_places(receiving))} {'receives' if len(receiving) == 1 else 'receive'} the range's data"


def _shed(range_view: RangeView, members: _Members, target: int) -> Operator | str:
    superfluous = members.learners + members.useless
    if len(members.kept) != 2:
        superfluous = members.lost + superfluous
    if not superfluous:
        return f"it has {len(members.kept)} voters and needs {target}"
    reason = f"it has its {target} voters without {_replicas(superfluous)}"
    if not CAN_REMOVE:
        return f"{reason}; to remove replicas is not possible yet"
    return Operator(OperatorKind.SHED, range_view.range_id, (RemoveReplicas(_places(superfluous)),), reason)


def _grow(view: ClusterView, range_view: RangeView, members: _Members, target: int, loads: _Loads) -> Operator | str:
    missing = target - len(members.kept)
    adopted = _places(_adoptable(view, range_view, members.learners)[:missing])
    fresh = _least_loaded(view, range_view, missing - len(adopted), loads)
    promoted = adopted + fresh
    if (len(members.kept) + len(promoted)) % 2 == 0:
        promoted = promoted[:-1]
    if not promoted:
        waiting = ", not all of its learners follow" if len(members.learners) > len(adopted) else ""
        return (
            f"it has {len(members.kept)} of {target} voters, but not enough other live nodes take a replica now"
            f"{waiting}, and an even number of voters is no gain"
        )
    # Learners that nobody needs are shed later: they have no vote, and their removal must not hold up the others'.
    # Those that are there already are waited for, too: a split or an operator that failed leaves learners without data,
    # and a range whose majority has none takes no write until it has.
    steps = (AddLearners(promoted), PromoteLearners(promoted, _places(members.lost)))
    reason = f"it has {len(members.kept)} of {target} voters; {_nodes(promoted)} join" + (
        f", {_replicas(members.lost)} go" if members.lost else ""
    )
    return Operator(OperatorKind.GROW, range_view.range_id, steps, reason)


def _adoptable(view: ClusterView, range_view: RangeView, learners: list[Member]) -> list[Member]:
    """Those that follow already come first; one that cannot get the range's data for lack of room is none.

    Once a growth has failed, those that have had the time for their data and do not follow are none: it may have failed
    because of them, and would again, for ever. They are sent the data all the same, and count as soon as they have it.
    The others still are being sent it: to send it to further nodes instead would only take longer, and leave learners.
    """
    follow = [learner for learner in learners if caught_up(range_view, learner.replica_id)]
    rest = [learner for learner in learners if not caught_up(range_view, learner.replica_id)]
    last = view.finished.get((range_view.range_id, OperatorKind.GROW))
    awaited_seconds = 0.0
    if last is not None and last.outcome is Outcome.FAILED:
        awaited_seconds = view.seconds_since(last.operator.created_ms)
        if awaited_seconds > catch_up_seconds_max(range_view):
            return follow
    return follow + [each for each in rest if without_data(view, range_view, _place(each), awaited_seconds) is None]


def _least_loaded(view: ClusterView, range_view: RangeView, count: int, loads: _Loads) -> tuple[Place, ...]:
    """Up to ``count`` receivers without a replica of the range: those with room first, then with few replicas."""
    count = min(count, REPLICAS_MAX - len(range_view.descriptor.replicas))
    candidates = [
        (view.nodes[node_id].fullness, loads.replicas[node_id], node_id)
        for node_id in loads.receivers
        if range_view.descriptor.replica_on(node_id) is None
    ]
    return tuple(Place(node_id, UNALLOCATED) for _, _, node_id in sorted(candidates)[:count])


def _place(replica: Member) -> Place:
    return Place(replica.node_id, replica.replica_id)


def _places(replicas: Iterable[Member]) -> tuple[Place, ...]:
    return tuple(map(_place, replicas))


def _nodes(places: Iterable[Place]) -> str:
    names = [str(place.node_id) for place in places]
    return f"nodes {' and '.join(names)}" if len(names) > 1 else f"node {names[0]}"


def _replicas(replicas: Iterable[Member]) -> str:
    return " and ".join(f"replica {replica.replica_id} on node {replica.node_id}" for replica in replicas)
