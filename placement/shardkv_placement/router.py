"""Routes: which ranges hold which keys, where their replicas are, and who leads them.

Descriptors come from the replicated state, so any node of the placement group can answer, whoever leads it; the
leaders are the placement leader's statistics, a hint that may be missing.
"""

from typing import Any, Final

from shardkv.types import NodeId, RangeDescriptor
from shardkv_placement.state import PlacementState
from shardkv_placement.statistics import Statistics, node_table

ROUTES_MAX: Final = 1_000
"""Routes in one answer; a caller who wants more asks again from the last one's end."""


def routes(
    state: PlacementState, statistics: Statistics | None, start: bytes, limit: int
) -> list[tuple[RangeDescriptor, NodeId | None]]:
    """Descriptors, each with its leader's node if that is known, in key order, from the one that holds ``start``."""
    reported = {} if statistics is None else statistics.ranges
    found = []
    for descriptor in state.descriptors_from(start, max(1, min(limit, ROUTES_MAX))):
        known = reported.get(descriptor.range_id)
        leader = known.leader if known is not None and descriptor.replica_on(known.leader) is not None else None
        found.append((descriptor, leader))
    return found


def nodes(state: PlacementState) -> list[list[Any]]:
    """``[[node id, name, address], ...]`` of the nodes in service."""
    return [[entry.node_id, entry.name, entry.address] for entry in node_table(state) if not entry.decommissioned]
