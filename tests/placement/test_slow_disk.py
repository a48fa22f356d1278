"""A node whose disk is slow is given nothing that waits for a disk (DESIGN 4.11; trap 14)."""

from dataclasses import replace
from types import MappingProxyType

import pytest

from shardkv.errors import MalformedRequest
from shardkv.types import NodeId
from shardkv_placement import heartbeat
from shardkv_placement.heartbeat import Reporter
from shardkv_placement.leader_schedulers import balance_leaders, why_not
from shardkv_placement.replica_schedulers import place_replicas
from shardkv_placement.view import ClusterView
from tests.placement.worlds import a_view


def slow(view: ClusterView, *ids: int) -> ClusterView:
    nodes = {key: replace(node, slow_disk=key in ids) for key, node in view.nodes.items()}
    return replace(view, nodes=MappingProxyType(nodes))


def test_trap_14_no_leadership_is_moved_to_a_node_with_a_slow_disk() -> None:
    view = a_view(nodes=3, ranges={1: "1* 2 3", 2: "1* 2 3", 3: "1* 2 3", 4: "1* 2 3"})
    assert {operator.steps[0].target for operator in balance_leaders(view)} == {2, 3}  # type: ignore[union-attr]
    sick = slow(view, 3)
    assert {operator.steps[0].target for operator in balance_leaders(sick)} == {2}  # type: ignore[union-attr]
    assert "node 3: its disk is slow" in why_not(sick, next(iter(sick.ranges.values())))


def test_a_new_replica_is_not_put_on_a_slow_disk() -> None:
    view = a_view(nodes=3, ranges={1: "1*"})
    assert place_replicas(view)
    assert place_replicas(slow(view, 2, 3)) == ()


def test_a_heartbeat_says_that_the_disk_is_slow_and_says_nothing_of_one_that_is_well() -> None:
    """What a well node sends is what it sent before there was such a thing."""
    reporter = Reporter(NodeId(3), 1, "host:7000")
    well, sick = reporter.heartbeat(), reporter.heartbeat(slow_disk=True)
    assert len(heartbeat.encode(well)) == 12
    for beat in (well, sick):
        assert heartbeat.decode(heartbeat.encode(beat)) == beat
    for more in (["yes"], [True, True]):
        with pytest.raises(MalformedRequest):
            heartbeat.decode([*heartbeat.encode(well), *more])
