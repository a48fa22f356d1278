"""Operators that a person asks for: to move a leadership or a replica. Checked against the view, then carried out like
any other."""

from shardkv.errors import NotFound, RequestError
from shardkv.types import NodeId, RangeId, ReplicaRole
from shardkv_placement.operators import (
    UNALLOCATED,
    AddLearners,
    Operator,
    OperatorKind,
    Place,
    PromoteLearners,
    Step,
    TransferLeader,
)
from shardkv_placement.view import ClusterView, NodeView, RangeView


def transfer(view: ClusterView, range_id: RangeId, target: NodeId) -> Operator:
    """The operator that makes ``target`` lead the range. Raises NotFound or RequestError with the reason why not."""
    range_view = _range(view, range_id)
    _usable(view, target)
    if not range_view.has_voter_on(target):
        raise RequestError(f"node {target} holds no voter of range {range_id}")
    return Operator(OperatorKind.TRANSFER, range_id, (TransferLeader(target),), f"node {target} was asked for")


def move(view: ClusterView, range_id: RangeId, source: NodeId, target: NodeId) -> Operator:
    """The operator that moves the range's voter from one node to another, its leadership first if it leads.

    Raises NotFound or RequestError with the reason why not.
    """
    range_view = _range(view, range_id)
    _usable(view, target)
    leaving = range_view.descriptor.replica_on(source)
    if leaving is None:
        raise RequestError(f"node {source} holds no replica of range {range_id}")
    if range_view.descriptor.replica_on(target) is not None:
        raise RequestError(f"node {target} holds a replica of range {range_id} already")
    joining = Place(target, UNALLOCATED)
    steps: list[Step] = [AddLearners((joining,))]
    others = [
        replica.node_id
        for replica in range_view.descriptor.replicas
        if replica.role is ReplicaRole.VOTER and replica.node_id != source and _live(view, replica.node_id)
    ]
    if range_view.leader == source and others:
        steps.append(TransferLeader(min(others, key=lambda node_id: (view.nodes[node_id].leaders, node_id))))
    steps.append(PromoteLearners((joining,), (Place(source, leaving.replica_id),)))
    reason = f"a move from node {source} to node {target} was asked for"
    return Operator(OperatorKind.MOVE, range_id, tuple(steps), reason)


def _range(view: ClusterView, range_id: RangeId) -> RangeView:
    range_view = view.ranges.get(range_id)
    if range_view is None:
        raise NotFound(f"there is no range {range_id}")
    return range_view


def _live(view: ClusterView, node_id: NodeId) -> bool:
    node = view.nodes.get(node_id)
    return node is not None and node.live


def _usable(view: ClusterView, node_id: NodeId) -> NodeView:
    node = view.nodes.get(node_id)
    if node is None:
        raise NotFound(f"there is no node {node_id}")
    if not node.live:
        raise RequestError(f"node {node_id} is {node.state.value}")
    if node.draining:
        raise RequestError(f"node {node_id} is draining")
    return node
