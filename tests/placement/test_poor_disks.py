"""A node whose disk is slow, or nearly full, is given nothing that waits for a disk (DESIGN 4.11; trap 14)."""

from dataclasses import replace
from types import MappingProxyType

import pytest

from shardkv.errors import MalformedRequest
from shardkv.types import Fullness, NodeId
from shardkv_placement import heartbeat
from shardkv_placement.heartbeat import Reporter
from shardkv_placement.leader_schedulers import balance_leaders, drain_leaders, why_not
from shardkv_placement.operators import Operator, TransferLeader
from shardkv_placement.replica_schedulers import place_replicas
from shardkv_placement.view import ClusterView
from tests.placement.worlds import a_view, filled, short

SHORT, LOW, FULL = Fullness.SHORT, Fullness.LOW, Fullness.FULL


def slow(view: ClusterView, *ids: int) -> ClusterView:
    nodes = {key: replace(node, slow_disk=key in ids) for key, node in view.nodes.items()}
    return replace(view, nodes=MappingProxyType(nodes))


def moves(operators: tuple[Operator, ...]) -> dict[int, int]:
    """Which node is to lead each range."""
    found = {}
    for operator in operators:
        (step,) = operator.steps
        assert isinstance(step, TransferLeader)
        found[operator.range_id] = step.target
    return found


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
    for fullness in Fullness:
        for beat in (reporter.heartbeat(fullness=fullness), reporter.heartbeat(slow_disk=True, fullness=fullness)):
            assert heartbeat.decode(heartbeat.encode(beat)) == beat
    for more in (["yes"], [True, "yes"], [True, True], [True, 4], [True, -1], [True, 1, 1]):
        with pytest.raises(MalformedRequest):
            heartbeat.decode([*heartbeat.encode(well), *more])


FOUR = {1: "1* 2 3", 2: "1* 2 3", 3: "1* 2 3", 4: "1 2* 3"}


def test_every_leadership_leaves_a_node_that_is_short_of_room_for_those_that_have_some() -> None:
    view = a_view(nodes=3, ranges=FOUR)
    assert moves(drain_leaders(view)) == {}
    assert sorted(moves(drain_leaders(short(view, 1))).items()) == [(1, 3), (2, 2), (3, 3)]
    assert "node 1 is short of room" in drain_leaders(short(view, 1))[0].reason
    assert moves(drain_leaders(short(view, 1, 3))) == {1: 2, 2: 2, 3: 2}


def test_leaderships_stay_where_no_node_has_more_room_and_are_evened_out_there() -> None:
    view = short(a_view(nodes=3, ranges=FOUR), 1, 2, 3)
    assert moves(drain_leaders(view)) == {}
    assert set(moves(balance_leaders(view)).values()) == {3}


def test_a_node_that_refuses_writes_leads_nothing_while_others_take_them_however_little_room_they_have() -> None:
    """Else all gathers on the node that was the last to have room, and stays there when that has none either."""
    view = filled(a_view(nodes=3, ranges=FOUR), {1: LOW, 2: SHORT, 3: SHORT})
    assert moves(drain_leaders(view)) == {1: 3, 2: 2, 3: 3}
    assert set(moves(balance_leaders(filled(view, {1: SHORT, 2: SHORT, 3: LOW}))).values()) <= {2}
    view = filled(view, {1: FULL, 2: LOW, 3: LOW})
    assert moves(drain_leaders(view)) == {}, "they would decline"
    assert moves(drain_leaders(filled(view, {1: LOW, 2: LOW, 3: FULL}))) == {}


def test_no_leadership_is_offered_again_and_again_to_a_node_that_declines_it() -> None:
    """Where all nodes refuse writes, each offer would come to nothing, and costs the range its lease for the term."""
    for fullness in (LOW, FULL):
        view = filled(a_view(nodes=3, ranges=FOUR), dict.fromkeys((1, 2, 3), fullness))
        assert moves(balance_leaders(view)) == {}
        assert "node 3: its disk is nearly full" in why_not(view, next(iter(view.ranges.values())))


def test_a_node_whose_transfers_are_all_under_way_holds_up_no_other_nodes() -> None:
    ranges = dict.fromkeys(range(1, 9), "1* 3 4") | dict.fromkeys(range(9, 17), "2* 5 6")
    view = short(a_view(nodes=6, ranges=ranges), 1, 2)
    most = view.settings.transfers_per_node_max
    assert most < 8
    assert sorted(moves(drain_leaders(view))) == [*range(1, 1 + most), *range(9, 9 + most)]


def test_no_leadership_is_given_to_a_node_that_is_short_of_room() -> None:
    view = short(a_view(nodes=3, ranges={1: "2* 1 3", 2: "2* 1 3", 3: "2* 1 3", 4: "2* 1 3"}), 1)
    assert set(moves(balance_leaders(view)).values()) == {3}
    assert "node 1: its disk is nearly full" in why_not(view, next(iter(view.ranges.values())))


def test_a_replica_is_put_where_there_is_room_and_nowhere_where_writes_are_refused() -> None:
    view = a_view(nodes=4, ranges={1: "1*"})
    assert place_replicas(filled(view, {2: LOW, 3: FULL})) == ()
    (operator,) = place_replicas(short(view, 2))
    assert [place.node_id for place in operator.steps[0].places()] == [3, 4]
    assert place_replicas(short(view, 2, 3, 4)), "where all disks are nearly full ranges still grow"


def test_a_node_that_stops_rather_leaves_a_range_to_one_without_room_than_to_nobody() -> None:
    view = a_view(nodes=3, ranges=FOUR, draining=[1])
    assert set(moves(drain_leaders(short(view, 2))).values()) == {3}
    assert set(moves(drain_leaders(short(view, 2, 3))).values()) == {2, 3}
