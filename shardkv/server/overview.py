"""The cluster as one page: what STATUS and RANGES answer, made of the placement leader's view.

Lives here: the shape of the two answers, plain CBOR values. Does not live here: who answers, and what is asked of
another node (``placement_service``). The rule: fields are added, never changed, for tools read them.
"""

from collections.abc import Iterable
from typing import Any, Final

import shardkv
from shardkv.types import NodeId, RangeDescriptor, ReplicaRole
from shardkv_placement.schedulers import why_unsettled
from shardkv_placement.view import ClusterView, NodeState, NodeView, RangeView

PAGE_BYTES_MAX: Final = 1024 * 1024
"""Ranges in one answer: some eight thousand. Far below what clients together may leave untaken of their answers."""
ROW_BYTES: Final = 128
"""About what a range takes beside its keys."""


def status(view: ClusterView, placement_leader: NodeId | None) -> dict[str, Any]:
    """The answer to STATUS."""
    unsettled = why_unsettled(view)
    return {
        "cluster_id": view.cluster_id.hex(),
        "version": shardkv.__version__,
        "nodes": sum(node.state is not NodeState.DECOMMISSIONED for node in view.nodes.values()),
        "live": len(view.live_nodes),
        "ranges": len(view.ranges) - 1,
        "placement_leader": placement_leader,
        "settled": unsettled is None,
        "unsettled": unsettled,
        "operators": [
            {"id": each.operator_id, "kind": each.kind.value, "range": range_id, "reason": each.reason}
            for range_id, each in view.operators.items()
        ],
        "node_table": [
            {
                "name": node.name,
                "id": node.node_id,
                "address": node.address,
                "state": _state_of(node),
                "replicas": node.replicas,
                "leaders": node.leaders,
            }
            for node in view.nodes.values()
        ],
    }


def ranges(items: Iterable[RangeView]) -> list[dict[str, Any]]:
    """All of them. ``learners`` names those of ``replicas`` that are."""
    return [_row(item) for item in items]


def ranges_page(items: Iterable[RangeView]) -> list[Any]:
    """The answer to RANGES: as many of them as a page holds, and whether more follow."""
    rows: list[dict[str, Any]] = []
    size = 0
    for item in items:
        size += ROW_BYTES + len(item.descriptor.span.start) + len(item.descriptor.span.end or b"")
        if rows and size > PAGE_BYTES_MAX:
            return [rows, True]
        rows.append(_row(item))
    return [rows, False]


def _row(item: RangeView) -> dict[str, Any]:
    return {
        "id": item.range_id,
        "start": item.descriptor.span.start,
        "end": item.descriptor.span.end,
        "leader": item.leader,
        "replicas": [replica.node_id for replica in item.descriptor.replicas],
        "learners": _learners(item.descriptor),
        "epoch": list(item.descriptor.epoch),
        "bytes": item.bytes,
    }


def _learners(descriptor: RangeDescriptor) -> list[int]:
    """The nodes whose replicas have no vote."""
    return [replica.node_id for replica in descriptor.replicas if replica.role is ReplicaRole.LEARNER]


def _state_of(node: NodeView) -> str:
    """In one word or two, what is most important to know of a node."""
    if node.draining:
        return "draining"
    if node.live and (node.slow_disk or node.short_of_room):
        return "slow disk" if node.slow_disk else "nearly full"
    return node.state.value
