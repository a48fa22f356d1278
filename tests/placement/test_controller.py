"""The controller on a cluster that does what it is told: everything comes about, whatever is lost (design 4.10)."""

import pytest

from shardkv.types import PLACEMENT_RANGE, NodeId, RangeId, ReplicaId
from shardkv_placement import commands
from shardkv_placement.controller import Controller, Propose
from shardkv_placement.heartbeat import Capacity
from shardkv_placement.operators import (
    UNALLOCATED,
    AddLearners,
    ChangeReplicas,
    Operator,
    OperatorKind,
    Outcome,
    Place,
    PromoteLearners,
    RemoveReplicas,
    Transfer,
    TransferLeader,
)
from shardkv_placement.view import NodeState
from tests.placement.worlds import FakeCluster, a_view, token


def grown(nodes: int = 3) -> FakeCluster:
    cluster = FakeCluster(nodes)
    settle(cluster)
    return cluster


def settle(cluster: FakeCluster) -> None:
    """Until all is quiet; learners receive their data in a few ticks."""
    for _ in range(6):
        cluster.tick(3)
        cluster.catch_up()
    cluster.settle()


def outcomes(cluster: FakeCluster) -> list[tuple[str, str]]:
    return [(done.operator.kind.value, done.outcome.value) for done in cluster.group.state.finished.values()]


def test_a_cluster_of_three_grows_its_ranges_and_placement_to_three_voters() -> None:
    """One joint change each; the fake checks every number of voters that ever was."""
    cluster = grown()
    assert cluster.voters(0) == cluster.voters(1) == {1, 2, 3}
    assert cluster.voter_counts == {1, 3}
    assert outcomes(cluster) == [("grow", "done"), ("grow", "done")]


def test_two_nodes_wait_for_a_third_and_five_grow_the_placement_group_only() -> None:
    cluster = grown(2)
    assert (cluster.voters(0), cluster.voters(1)) == ({1}, {1})
    for number in (3, 4, 5):
        cluster.add_node(number)
    settle(cluster)
    assert cluster.voters(0) == {1, 2, 3, 4, 5}
    assert len(cluster.voters(1)) == 3
    assert cluster.voter_counts <= {1, 3, 5}


def test_eight_ranges_spread_their_leaders_three_three_two() -> None:
    """Splits leave all leaders where the parent's was; few ticks later they are even, and then all is quiet."""
    cluster = grown()
    newest = 1
    for number in range(7):
        newest = cluster.split(newest, b"%d" % number)
    assert cluster.leaders() == {1: 8, 2: 0, 3: 0}
    assert cluster.settle() <= 12
    assert sorted(cluster.leaders().values()) == [2, 3, 3]
    assert len(outcomes(cluster)) == 2 + 5  # Five transfers are the fewest possible: nothing went back and forth.


def test_a_dead_nodes_leaders_are_spread_over_the_living_and_again_when_it_is_back() -> None:
    cluster = grown()
    newest = 1
    for number in range(5):
        newest = cluster.split(newest, b"%d" % number)
    cluster.settle()
    cluster.kill(1)
    cluster.settle()
    assert cluster.view().nodes[NodeId(1)].state is NodeState.DOWN
    assert cluster.leaders() == {2: 3, 3: 3}
    cluster.alive[NodeId(1)] = True
    cluster.settle()
    assert cluster.leaders() == {1: 2, 2: 2, 3: 2}


def test_a_draining_node_leads_nothing_until_it_drains_no_more() -> None:
    cluster = grown()
    newest = 1
    for number in range(5):
        newest = cluster.split(newest, b"%d" % number)
    cluster.settle()
    cluster.draining.add(NodeId(1))
    cluster.settle()
    assert cluster.leaders() == {1: 0, 2: 3, 3: 3}
    assert cluster.ranges[PLACEMENT_RANGE].leader != 1
    cluster.draining.clear()
    cluster.settle()
    assert cluster.leaders() == {1: 2, 2: 2, 3: 2}


def test_trap_24_a_lost_node_is_decommissioned_and_replaced_by_its_successor() -> None:
    """Trap 24, to its end: the node reborn gets a new id, and its replicas are made anew under new ids."""
    cluster = grown()
    old = {r.replica_id for each in cluster.ranges.values() for r in each.descriptor.replicas}
    cluster.kill(3)
    cluster.tick(20)
    cluster.group.apply(commands.DecommissionNode(NodeId(3)))
    reborn = NodeId(cluster.group.apply(commands.RegisterNode("n3", "host3:7000", token(33), ())))
    cluster.group.apply(commands.NodeStarted(reborn, 1, token(1), "host3:7000", ()))
    cluster._start(reborn)
    settle(cluster)
    assert reborn == 4
    assert cluster.voters(0) == cluster.voters(1) == {1, 2, 4}
    new = {r.replica_id for each in cluster.ranges.values() for r in each.descriptor.replicas if r.node_id == reborn}
    assert not new & old
    assert cluster.voter_counts == {1, 3}


@pytest.mark.parametrize("lose", [2, 3, 5])
def test_lost_actions_are_made_up_for(lose: int) -> None:
    """Level-triggered: every second, third or fifth action never arrives."""
    cluster = FakeCluster(3)
    cluster.lose = lose
    settle(cluster)
    newest = 1
    for number in range(7):
        newest = cluster.split(newest, b"%d" % number)
    settle(cluster)
    assert cluster.voters(1) == {1, 2, 3}
    assert sorted(cluster.leaders().values()) == [2, 3, 3]
    assert cluster.voter_counts == {1, 3}


def test_trap_15_running_operators_survive_a_change_of_the_placement_leader() -> None:
    """Trap 15: the successor has the operators, carries them on, and starts nothing before it has heard everyone."""
    cluster = FakeCluster(3)
    cluster.tick(2)
    running = dict(cluster.group.state.operators)
    assert {each.kind for each in running.values()} == {OperatorKind.GROW}
    for _ in range(20):
        cluster.elect_placement_leader()
        cluster.tick(3)
        cluster.catch_up()
    cluster.settle()
    assert cluster.voters(0) == cluster.voters(1) == {1, 2, 3}
    finished = {done.operator.operator_id: done.outcome for done in cluster.group.state.finished.values()}
    assert finished == {each.operator_id: Outcome.DONE for each in running.values()}


def test_trap_15_a_fresh_placement_leader_waits_for_every_living_node() -> None:
    """Trap 15: with one of three nodes heard, range 1 looks as if it were led by nobody, or moved by nobody."""
    cluster = FakeCluster(3)
    cluster.now += 1
    for number in (1, 2):
        cluster.beat(number)
        assert not cluster.view().complete
        assert cluster.controller.tick(cluster.view()) == []
    cluster.beat(3)
    assert cluster.view().complete
    assert len(cluster.controller.tick(cluster.view())) == 2


def test_a_view_never_changes_after_it_was_made() -> None:
    cluster = grown()
    view = cluster.view()
    before = (dict(view.nodes), dict(view.ranges), dict(view.operators), dict(view.finished), view.settings)
    newest = 1
    for number in range(7):
        newest = cluster.split(newest, b"%d" % number)
    cluster.group.apply(commands.SetSetting("replication_factor", 1))
    cluster.kill(2)
    cluster.tick(20)
    assert (dict(view.nodes), dict(view.ranges), dict(view.operators), dict(view.finished), view.settings) == before
    with pytest.raises(TypeError):
        view.ranges[RangeId(1)] = view.ranges[RangeId(0)]  # type: ignore[index]
    with pytest.raises(AttributeError):
        view.now = 0.0  # type: ignore[misc]


def test_a_quiet_cluster_costs_no_new_view_of_its_ranges_and_no_scheduling() -> None:
    """10,000 idle ranges must stay within the idle budget (design 5)."""
    cluster = grown()
    first = cluster.view()
    cluster.tick()
    assert cluster.view().ranges is first.ranges
    newest = cluster.split(1, b"m")
    assert cluster.view().ranges is not first.ranges
    assert cluster.view().ranges[PLACEMENT_RANGE] is first.ranges[PLACEMENT_RANGE]
    assert newest in cluster.view().ranges


def test_a_disk_whose_free_space_changes_costs_no_new_view_of_the_ranges_and_no_scheduling() -> None:
    """Whatever else is written to the nodes' disks changes it between any two heartbeats: the nodes' own logs do."""
    cluster = grown()
    before = cluster.view()
    received = cluster.reporters[NodeId(2)].heartbeat(capacity=Capacity(disk_free_bytes=4096))
    cluster.statistics.receive(cluster.group.state, received, cluster.now)
    assert cluster.view().nodes[NodeId(2)].capacity.disk_free_bytes == 4096
    assert cluster.view().ranges is before.ranges


# --- Single decisions -------------------------------------------------------------------------------------------------

NEW = (Place(NodeId(2), UNALLOCATED), Place(NodeId(3), UNALLOCATED))
ADDED = tuple(place._replace(replica_id=100 + place.node_id) for place in NEW)  # type: ignore[arg-type]
WALL_MS = a_view(nodes=1, ranges={}).wall_ms


def running(*steps: object, step: int = 0, seconds_ago: float = 0) -> Operator:
    started = WALL_MS - int(seconds_ago * 1000)
    return Operator(OperatorKind.GROW, RangeId(1), steps, "because", 7, started, step, started)  # type: ignore[arg-type]


GROWING = running(AddLearners(ADDED), PromoteLearners(ADDED))  # type: ignore[arg-type]


def decide(replicas: str, operator: Operator, **world: object) -> list[object]:
    view = a_view(nodes=3, ranges={1: replicas}, running=[operator], **world)  # type: ignore[arg-type]
    return [action.command if isinstance(action, Propose) else action for action in Controller().tick(view)]


def test_each_state_of_a_growing_range_leads_to_the_next() -> None:
    """Whatever was done before, by whom, is seen in the range itself."""
    assert decide("1*", GROWING) == [
        ChangeReplicas(RangeId(1), NodeId(1), [["add_learner", 2, 102], ["add_learner", 3, 103]], 1)
    ]
    assert decide("1* 2+?", GROWING) == [ChangeReplicas(RangeId(1), NodeId(1), [["add_learner", 3, 103]], 1)]
    assert decide("1* 2+? 3+", GROWING) == []
    assert decide("1* 2+ 3+", GROWING) == [commands.AdvanceOperator(7, 1)]
    assert decide("1* 2 3", GROWING) == [commands.FinishOperator(7, Outcome.DONE)]
    promoting = running(*GROWING.steps, step=1)
    assert decide("1* 2+ 3+", promoting) == [
        ChangeReplicas(RangeId(1), NodeId(1), [["promote", 2, 102], ["promote", 3, 103]], 1)
    ]
    assert decide("1 2+ 3+", promoting) == []  # Nobody to ask.
    shedding = running(RemoveReplicas((Place(NodeId(3), 103),)))  # type: ignore[arg-type]
    assert decide("1* 2 3", shedding) == [ChangeReplicas(RangeId(1), NodeId(1), [["remove", 3, 103]], 1)]
    assert decide("1* 2", shedding) == [commands.FinishOperator(7, Outcome.DONE)]


def test_a_transfer_is_asked_of_whoever_leads() -> None:
    transfer = running(TransferLeader(NodeId(3)))
    assert decide("1* 2 3", transfer) == [Transfer(RangeId(1), NodeId(1), NodeId(3))]
    assert decide("1 2* 3", transfer) == [Transfer(RangeId(1), NodeId(2), NodeId(3))]
    assert decide("1 2 3*", transfer) == [commands.FinishOperator(7, Outcome.DONE)]


@pytest.mark.parametrize(
    ("replicas", "operator", "world", "why"),
    [
        ("1* 2+? 3+?", running(*GROWING.steps, seconds_ago=601), {}, "add_learners took more than 600 s"),
        ("1* 2+? 3+?", GROWING, {"down": [3]}, "node 3 is down"),
        ("1* 2+? 3+?", GROWING, {"decommissioned": [2]}, "node 2 is decommissioned"),
        ("1* 2+", running(*GROWING.steps, step=1), {}, "replica 103 on node 3 is no longer a member"),
        ("1* 2 3+", running(TransferLeader(NodeId(3))), {}, "node 3 holds no voter of the range"),
        ("1* 2 3", running(TransferLeader(NodeId(3)), seconds_ago=11), {}, "transfer_leader took more than 10 s"),
    ],
)
def test_an_operator_that_cannot_end_well_is_ended(
    replicas: str, operator: Operator, world: dict[str, object], why: str
) -> None:
    assert decide(replicas, operator, **world) == [commands.FinishOperator(7, Outcome.FAILED, why)]


def test_trap_15_no_operator_is_failed_by_a_half_filled_view() -> None:
    """A fresh leader does not know yet who is alive; it goes on asking and judges later."""
    assert decide("1* 2 3", running(TransferLeader(NodeId(3)), seconds_ago=11), complete=False) == [
        Transfer(RangeId(1), NodeId(1), NodeId(3))
    ]


def test_an_operator_whose_request_is_refused_as_wrong_is_ended_unless_it_would_ask_for_something_else() -> None:
    controller = Controller()
    shedding = running(RemoveReplicas((Place(NodeId(3), ReplicaId(103)),)))
    (request,) = controller.tick(a_view(nodes=3, ranges={1: "1* 2 3"}, running=[shedding]))
    assert isinstance(request, ChangeReplicas)
    controller.refused(request, "no")
    assert controller.tick(a_view(nodes=3, ranges={1: "1 2* 3"}, running=[shedding])) == [request._replace(leader=2)]
    controller.refused(request, "no")
    assert controller.tick(a_view(nodes=3, ranges={1: "1* 2 3"}, running=[shedding])) == [
        Propose(commands.FinishOperator(7, Outcome.FAILED, "no"))
    ]


def test_an_operator_whose_range_is_gone_is_ended() -> None:
    view = a_view(nodes=3, ranges={}, running=[GROWING])
    (action,) = Controller().tick(view)
    assert action == Propose(commands.FinishOperator(7, Outcome.FAILED, "no such range"))


def test_requests_and_proposals_are_repeated_but_not_at_every_tick() -> None:
    cluster = grown()
    cluster.split(1, b"m")
    cluster.lose = 1  # Everything is lost.
    asked = []
    for _ in range(40):
        cluster.now += 0.1
        cluster._heartbeats()
        asked += cluster.controller.tick(cluster.view())
    assert 2 <= len(asked) <= 3
    assert len(set(map(repr, asked))) == 1
