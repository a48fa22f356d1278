"""The placement group's state machine: identity, ids, operators, and rows that hold it all (design 4.10)."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardkv.errors import (
    ConfigError,
    Conflict,
    Corruption,
    MalformedRequest,
    NotFound,
    RequestError,
    ShardKVError,
    WrongCluster,
)
from shardkv.types import EVERY_KEY, Epoch, Member, NodeId, RangeDescriptor, RangeId, ReplicaId
from shardkv_placement import commands, router, state
from shardkv_placement.fields import ID_MAX
from shardkv_placement.heartbeat import Reporter
from shardkv_placement.operators import (
    UNALLOCATED,
    AddLearners,
    Operator,
    OperatorKind,
    Outcome,
    Place,
    PromoteLearners,
    TransferLeader,
)
from shardkv_placement.state import FINISHED_MAX, REPORTED_AHEAD_MAX, RUNNING_MAX, PlacementState
from shardkv_placement.statistics import Statistics
from tests.placement.worlds import PREFIX, Group, Rows, contents, descriptor, first_descriptors, token

TRANSFER = Operator(OperatorKind.TRANSFER, RangeId(1), (TransferLeader(NodeId(1)),), "asked for")
JOINING = (Place(NodeId(2), UNALLOCATED), Place(NodeId(3), UNALLOCATED))
GROW = Operator(OperatorKind.GROW, RangeId(1), (AddLearners(JOINING), PromoteLearners(JOINING)), "too few voters")


def register(number: int, *, name: str | None = None) -> commands.RegisterNode:
    return commands.RegisterNode(name or f"n{number}", f"host{number}:7000", token(number), (("zone", "a"),))


def reported(range_id: int, replica_id: int) -> RangeDescriptor:
    """A range of every key, newer the higher its id, with one replica."""
    epoch = Epoch(1, max(2, range_id))
    return RangeDescriptor(RangeId(range_id), EVERY_KEY, epoch, (Member(NodeId(1), ReplicaId(replica_id)),))


# --- Identity ---------------------------------------------------------------------------------------------------------


def test_nothing_is_done_before_the_bootstrap() -> None:
    with pytest.raises(RequestError, match="not bootstrapped"):
        Group(bootstrapped=False).apply(register(2))


def test_a_repeated_bootstrap_changes_nothing_and_another_is_refused() -> None:
    """Bootstrap is resumable: the first node repeats it until it is answered."""
    group = Group()
    before = contents(group.state)
    again = commands.Bootstrap(b"c" * 16, "n1", "host1:7000", token(1), (), first_descriptors())
    assert group.apply(again) == 1
    assert contents(group.state) == before
    other = commands.Bootstrap(b"d" * 16, "n1", "host1:7000", token(1), (), first_descriptors())
    with pytest.raises(WrongCluster):
        group.apply(other)


def test_a_cluster_begins_with_the_settings_that_it_was_founded_with() -> None:
    """In one command: a first node that dies right after it does not come back to a cluster of the default ones."""
    settings = (("replication_factor", 5), ("split_bytes", 1 << 20))
    group = Group(bootstrapped=False)
    group.apply(commands.Bootstrap(b"c" * 16, "n1", "host1:7000", token(1), (), first_descriptors(), settings))
    assert (group.state.settings.replication_factor, group.state.settings.split_bytes) == (5, 1 << 20)
    assert group.reloaded().settings == group.state.settings


def test_a_cluster_is_not_founded_with_settings_that_do_not_fit() -> None:
    group = Group(bootstrapped=False)
    settings = (("split_bytes", 1 << 20), ("replication_factor", 4))
    with pytest.raises(ConfigError, match="odd"):
        group.apply(commands.Bootstrap(b"c" * 16, "n1", "host1:7000", token(1), (), first_descriptors(), settings))
    assert not group.state.bootstrapped
    assert not group.store.rows


@pytest.mark.parametrize(
    "ranges",
    [
        (),
        (descriptor(1, b"", b"m", (1, 1)),),
        (descriptor(1, b"", b"m", (1, 1)), descriptor(2, b"n", None, (1, 1))),
        (descriptor(1, b"", None, (1, 1)), descriptor(2, b"n", None, (1, 1))),
    ],
)
def test_a_cluster_must_begin_with_every_key_in_one_range(ranges: tuple[Any, ...]) -> None:
    with pytest.raises(RequestError):
        Group(bootstrapped=False).apply(commands.Bootstrap(b"c" * 16, "n1", "h:1", token(1), (), ranges))


def test_a_repeated_registration_gets_the_same_id() -> None:
    group = Group()
    assert group.apply(register(2)) == 2
    assert group.apply(register(3)) == 3
    assert group.apply(register(2)) == 2
    assert group.state.counters.next_node == 4


def test_trap_24_a_node_reborn_on_an_empty_disk_under_its_old_name_is_refused() -> None:
    """Trap 24: identity is the id allocated to a data directory, not a name."""
    group = Group()
    group.apply(register(2))
    with pytest.raises(WrongCluster, match="choose another name"):
        group.apply(register(99, name="n2"))
    group.apply(commands.DecommissionNode(NodeId(2)))
    assert group.apply(register(99, name="n2")) == 3  # A new id: the old one is never used again.
    with pytest.raises(WrongCluster, match="decommissioned"):
        group.apply(register(2))
    with pytest.raises(WrongCluster, match="decommissioned"):
        group.apply(commands.NodeStarted(NodeId(2), 5, token(5), "host2:7000", ()))


def test_trap_24_a_node_reborn_from_an_old_copy_of_its_disk_is_refused() -> None:
    """Trap 24: the copy's boot counter is lower; or equal, if it is started as often, but at another start."""
    group = Group()
    node_id = group.join(2)
    group.apply(commands.NodeStarted(node_id, 7, token(70), "host2:7000", ()))
    assert group.apply(commands.NodeStarted(node_id, 7, token(70), "host2:7000", ())) is True  # A retry.
    for boot, start in ((6, 70), (6, 60), (7, 71)):
        with pytest.raises(WrongCluster, match="old copy"):
            group.apply(commands.NodeStarted(node_id, boot, token(start), "host2:7000", ()))
    assert group.apply(commands.NodeStarted(node_id, 8, token(80), "other:7000", ())) is True
    assert group.state.nodes[node_id].address == "other:7000"


def test_trap_24_a_copy_that_was_started_more_often_than_the_node_itself_is_refused() -> None:
    """It does not know the start that the group knows; what came of that does, as far back as it tells."""
    group = Group()
    node_id = group.join(2)
    group.apply(commands.NodeStarted(node_id, 7, token(70), "host2:7000", ()))

    def started(boot: int, *starts: int) -> commands.NodeStarted:
        newest, *earlier = map(token, starts)
        return commands.NodeStarted(node_id, boot, newest, "host2:7000", (), tuple(earlier))

    for command in (started(8, 81, 71), started(9, 91, 81, 71, 60)):
        with pytest.raises(WrongCluster, match="knows nothing of that start"):
            group.apply(command)
    assert group.apply(started(9, 90, 80, 70, 60)) is True
    assert group.apply(started(12, 120, 110)) is True, "too far back to tell"


def test_a_data_directory_keeps_the_name_it_was_registered_with() -> None:
    group = Group()
    group.apply(register(2))
    with pytest.raises(WrongCluster, match="whose name is 'n2'"):
        group.apply(register(2, name="n5"))


def test_every_change_of_the_node_table_gets_a_new_version_and_a_repetition_none() -> None:
    """Nodes compare versions to know whether their table is the newest."""
    group = Group()
    for version, command in enumerate(
        (
            register(2),
            commands.NodeStarted(NodeId(2), 1, token(1), "a:1", ()),
            commands.DecommissionNode(NodeId(2)),
        ),
        start=2,
    ):
        group.apply(command)
        assert group.state.counters.nodes_version == version, command
        group.apply(command)
        assert group.state.counters.nodes_version == version, command


def test_a_cluster_may_have_any_number_of_nodes_over_its_life(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has so many in service, and knows what it must of the others by their ids: there were 1,000 for ever."""
    monkeypatch.setattr(state, "NODES_MAX", 3)
    monkeypatch.setattr(state, "DECOMMISSIONED_MAX", 2)
    group = Group()
    for number in range(2, 20):
        assert group.join(number) == number, "an id is never used twice"
        group.apply(commands.DecommissionNode(NodeId(number)))
        group.state.check()
        assert contents(group.reloaded()) == contents(group.state)
    assert list(group.state.nodes) == [1, 18, 19]
    assert [group.join(number) for number in (20, 21)] == [20, 21]
    with pytest.raises(RequestError, match="at most 3 nodes"):
        group.join(22)


def test_a_node_that_was_decommissioned_long_ago_is_no_member(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trap 24: its record is forgotten, but not that its id was given out. An id that was not may be one some day."""
    monkeypatch.setattr(state, "DECOMMISSIONED_MAX", 1)
    group = Group()
    heard = Statistics(0.0)
    for number in (2, 3, 4):
        group.join(number)
    for number in (3, 1, 4):
        group.apply(commands.DecommissionNode(NodeId(number)))
        assert group.state.nodes[NodeId(number)].decommissioned, "everybody hears of its end"
    assert group.state.nodes.keys() == {2, 4}
    version = group.state.counters.nodes_version
    for number in (1, 3, 4):
        with pytest.raises(WrongCluster, match="decommissioned"):
            group.apply(commands.NodeStarted(NodeId(number), 7, token(7), "host:7000", ()))
        with pytest.raises(WrongCluster, match="decommissioned"):
            heard.receive(group.state, Reporter(NodeId(number), 7, "host:7000").heartbeat(), 1.0)
        assert group.apply(commands.DecommissionNode(NodeId(number))) is True
    assert group.state.counters.nodes_version == version
    for command in (
        commands.NodeStarted(NodeId(5), 1, token(1), "host:7000", ()),
        commands.DecommissionNode(NodeId(5)),
    ):
        with pytest.raises(NotFound):
            group.apply(command)
    with pytest.raises(WrongCluster, match="bootstrapped already"):
        group.apply(commands.Bootstrap(b"c" * 16, "n1", "host1:7000", token(1), (), first_descriptors()))


# --- Ids --------------------------------------------------------------------------------------------------------------


def test_trap_03_allocated_ids_are_never_given_out_again() -> None:
    """Trap 3: never reuse replica ids. Those that an operator gets count as well, and so do reported ones."""
    group = Group()
    first_range, first_replica = group.apply(commands.Allocate(2, 3))
    assert group.apply(commands.Allocate(1, 1)) == [first_range + 2, first_replica + 3]
    group.apply(commands.AddOperator(GROW))
    assert group.apply(commands.Allocate(0, 1)) == [first_range + 3, first_replica + 6]
    group.apply(commands.ReportRanges((descriptor(70, b"x", b"y", (9, 9), 50),)))
    assert group.apply(commands.Allocate(1, 1)) == [71, 70 * 100 + 51]
    assert group.reloaded().counters == group.state.counters


@pytest.mark.parametrize(("range_id", "replica_id"), [(1, ID_MAX), (ID_MAX, 5), (1, 1 << 40), (1 << 40, 5)])
def test_a_report_of_an_id_that_nobody_can_have_been_given_is_passed_over(range_id: int, replica_id: int) -> None:
    """One with the highest id there is left a state that could not be loaded again, once ids were allocated above. What
    is reported with it counts."""
    group = Group()
    before = contents(group.state)
    assert group.apply(commands.ReportRanges((reported(range_id, replica_id),))) == [False]
    assert contents(group.state) == contents(group.reloaded()) == before
    true = descriptor(7, b"x", b"y", (9, 9), 5)
    assert group.apply(commands.ReportRanges((reported(range_id, replica_id), true))) == [False, True]
    assert group.state.descriptor(RangeId(7)) == true
    *others, whole = first_descriptors()
    replicas = (whole.replicas[0]._replace(replica_id=ReplicaId(replica_id)),)
    ranges = (*others, replace(whole, range_id=RangeId(range_id), replicas=replicas))
    with pytest.raises(RequestError, match="there can be no"):
        Group(bootstrapped=False).apply(commands.Bootstrap(b"c" * 16, "n1", "h:1", token(1), (), ranges))


def test_every_id_that_is_given_out_can_be_reported_whatever_was_reported_before() -> None:
    group = Group()
    for _ in range(3):
        next_range, next_replica = group.state.counters.next_range, group.state.counters.next_replica
        highest = reported(next_range + REPORTED_AHEAD_MAX - 1, next_replica + REPORTED_AHEAD_MAX - 1)
        group.apply(commands.ReportRanges((highest,)))
        group.apply(commands.ReportRanges((reported(*group.apply(commands.Allocate(1, 1))),)))
    running = group.apply(commands.AddOperator(replace(GROW, range_id=RangeId(group.state.counters.next_range - 1))))
    group.state.check()
    assert contents(group.reloaded()) == contents(group.state)
    assert group.apply(commands.FinishOperator(running, Outcome.DONE)) is True


def test_adding_an_operator_allocates_one_id_for_each_new_replica() -> None:
    """The steps of one operator mean the same replica when they name the same node."""
    group = Group()
    operator_id = group.apply(commands.AddOperator(GROW))
    running = group.state.operators[RangeId(1)]
    assert running.operator_id == operator_id
    added, promoted = running.steps
    assert isinstance(added, AddLearners)
    assert isinstance(promoted, PromoteLearners)
    assert added.learners == promoted.learners == (Place(NodeId(2), ReplicaId(3)), Place(NodeId(3), ReplicaId(4)))


def test_trap_03_an_operator_names_no_replica_id_that_was_never_given_out() -> None:
    """Trap 3: it would be given out to another replica later. One that is known, a learner say, may be named."""
    group = Group()
    for replica_id in (group.state.counters.next_replica, group.state.counters.next_replica + 3, ID_MAX):
        made_up = Place(NodeId(2), ReplicaId(replica_id))
        for step in (AddLearners((made_up,)), PromoteLearners((made_up,)), PromoteLearners((), (made_up,))):
            with pytest.raises(RequestError, match=f"{replica_id} was never given out"):
                group.apply(commands.AddOperator(replace(GROW, steps=(AddLearners(JOINING), step))))
    known = Place(NodeId(2), ReplicaId(group.state.counters.next_replica - 1))
    group.apply(commands.AddOperator(replace(GROW, steps=(AddLearners((known,)),))))
    assert group.state.operators[RangeId(1)].steps == (AddLearners((known,)),)


# --- Ranges -----------------------------------------------------------------------------------------------------------


def test_a_split_that_is_reported_tiles_and_routes() -> None:
    group = Group()
    left, right = descriptor(1, b"", b"m", (2, 2)), descriptor(2, b"m", None, (2, 2))
    assert group.apply(commands.ReportRanges((left, right))) == [True, True]
    assert group.apply(commands.ReportRanges((left, right))) == [False, False]
    assert group.state.descriptors_from(b"z", 9) == [right]
    assert router.routes(group.state, None, b"", 1) == [(left, None)]
    assert group.state.descriptor(RangeId(2)) == right


def test_the_placement_groups_own_descriptor_has_no_place_among_the_keys() -> None:
    group = Group()
    grown = descriptor(0, b"", b"", (2, 1), 1, 2, 3)
    assert group.apply(commands.ReportRanges((grown, first_descriptors()[0]))) == [True, False]
    assert group.state.descriptor(RangeId(0)) == grown
    assert [each.range_id for each in group.state.descriptors_from(b"", 9)] == [1]


def test_an_empty_span_is_refused() -> None:
    with pytest.raises(RequestError, match="empty"):
        Group().apply(commands.ReportRanges((descriptor(2, b"m", b"m", (2, 2)),)))


# --- Settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("replication_factor", 4),
        ("replication_factor", 99),
        ("replication_factor", True),
        ("scheduling", 1),
        ("split_bytes", 1),
        ("node_suspect_ms", 60_000),
        ("no_such_setting", 1),
    ],
)
def test_a_setting_out_of_bounds_is_refused_and_nothing_changes(name: str, value: int) -> None:
    group = Group()
    with pytest.raises(ConfigError):
        group.apply(commands.SetSetting(name, value))
    assert contents(group.reloaded()) == contents(Group().state)


@pytest.mark.parametrize(("name", "value"), [("heartbeat_ms", 3_000), ("node_suspect_ms", 1_000)])
def test_nodes_report_more_often_than_a_silent_one_becomes_suspect(name: str, value: int) -> None:
    """Else each was suspect between any two of its reports, and got nothing new."""
    group = Group()
    with pytest.raises(ConfigError, match=r"heartbeat_ms \(.*00\) must be below node_suspect_ms"):
        group.apply(commands.SetSetting(name, value))
    group.apply(commands.SetSetting("heartbeat_ms", 2_999))
    group.apply(commands.SetSetting("heartbeat_ms", 999))
    group.apply(commands.SetSetting("node_suspect_ms", 1_000))
    assert group.reloaded().settings.node_suspect_ms == 1_000


def test_a_setting_is_kept() -> None:
    group = Group()
    group.apply(commands.SetSetting("replication_factor", 5))
    group.apply(commands.SetSetting("scheduling", False))
    settings = group.reloaded().settings
    assert (settings.replication_factor, settings.scheduling) == (5, False)


# --- Operators --------------------------------------------------------------------------------------------------------


def test_a_range_has_one_operator_at_a_time() -> None:
    group = Group()
    group.apply(commands.AddOperator(TRANSFER))
    with pytest.raises(Conflict, match="already has operator 1"):
        group.apply(commands.AddOperator(GROW))
    with pytest.raises(NotFound):
        group.apply(commands.AddOperator(Operator(OperatorKind.TRANSFER, RangeId(9), TRANSFER.steps, "?")))


def test_advancing_and_finishing_twice_is_advancing_and_finishing_once() -> None:
    """The controller repeats what it is not sure of."""
    group = Group()
    operator_id = group.apply(commands.AddOperator(GROW))
    group.wall_ms += 5_000
    assert group.apply(commands.AdvanceOperator(operator_id, 1)) == 1
    group.wall_ms += 5_000
    assert group.apply(commands.AdvanceOperator(operator_id, 1)) == 1
    assert group.apply(commands.AdvanceOperator(operator_id, 0)) == 1
    running = group.state.operators[RangeId(1)]
    assert running.step_started_ms == running.created_ms + 5_000
    assert group.apply(commands.FinishOperator(operator_id, Outcome.DONE)) is True
    assert group.apply(commands.FinishOperator(operator_id, Outcome.FAILED, "late")) is False
    assert [done.outcome for done in group.state.finished.values()] == [Outcome.DONE]
    with pytest.raises(NotFound):
        group.apply(commands.AdvanceOperator(operator_id, 1))


def test_the_history_of_operators_is_bounded() -> None:
    group = Group()
    for _ in range(FINISHED_MAX + 3):
        group.apply(commands.FinishOperator(group.apply(commands.AddOperator(TRANSFER)), Outcome.DONE))
    assert len(group.state.finished) == FINISHED_MAX
    assert sum(key.startswith(PREFIX + b"h") for key in group.store.rows) == FINISHED_MAX
    assert contents(group.reloaded()) == contents(group.state)


def test_running_operators_are_bounded() -> None:
    group = Group()
    ranges = [descriptor(1, b"", b"%06d" % 1, (2, 2))]
    count = RUNNING_MAX + 1
    ranges += [
        descriptor(1 + i, b"%06d" % i, b"%06d" % (i + 1) if i < count else None, (2, 2)) for i in range(1, count + 1)
    ]
    group.apply(commands.ReportRanges(tuple(ranges)))
    for i in range(RUNNING_MAX):
        group.apply(commands.AddOperator(Operator(OperatorKind.TRANSFER, RangeId(1 + i), TRANSFER.steps, "?")))
    with pytest.raises(Conflict, match="operators are running"):
        group.apply(commands.AddOperator(Operator(OperatorKind.TRANSFER, RangeId(count), TRANSFER.steps, "?")))


# --- Rows and commands ------------------------------------------------------------------------------------------------


def test_a_range_that_takes_over_its_neighbours_spans_leaves_no_rows_of_theirs() -> None:
    """Else they would be in the map again once it is loaded."""
    group = Group()
    keys = (b"", b"f", b"m", b"s", None)
    parts = [descriptor(1 + each, keys[each], keys[each + 1], (2, 2)) for each in range(4)]
    group.apply(commands.ReportRanges(tuple(parts)))
    assert len(group.state.ranges.segments) == 4
    for newer, count in ((descriptor(2, b"f", b"s", (3, 3)), 3), (descriptor(1, b"", None, (4, 4)), 1)):
        group.apply(commands.ReportRanges((newer,)))
        assert contents(group.reloaded()) == contents(group.state)
        assert len(group.reloaded().ranges.segments) == count


@pytest.mark.parametrize(
    "replicas",
    [
        (Member(NodeId(1), ReplicaId(5)), Member(NodeId(2), ReplicaId(5))),
        (Member(NodeId(1), ReplicaId(5)), Member(NodeId(1), ReplicaId(6))),
        (Member(NodeId(0), ReplicaId(5)),),
        (Member(NodeId(1), ReplicaId(0)),),
        (Member(NodeId(ID_MAX + 1), ReplicaId(5)),),
        (),
    ],
    ids=["a replica twice", "a node twice", "no node", "no replica", "beyond all ids", "none"],
)
def test_a_descriptor_that_no_range_can_have_is_refused(replicas: tuple[Member, ...]) -> None:
    group = Group()
    before = contents(group.state)
    with pytest.raises(MalformedRequest):
        group.apply(commands.ReportRanges((RangeDescriptor(RangeId(1), EVERY_KEY, Epoch(2, 2), replicas),)))
    assert contents(group.state) == contents(group.reloaded()) == before


def test_a_damaged_row_is_corruption() -> None:
    for key, row in ((b"m", b"\x80"), (b"n" + bytes(8), b"\xff"), (b"?", b"\x80"), (b"r", b"\x82\xf6\x80")):
        with pytest.raises(Corruption):
            PlacementState(PREFIX).load(iter([(PREFIX + key, row)]))


@pytest.mark.parametrize(
    "value",
    [
        None,
        [],
        [99],
        [4],
        [4, 0],
        [4, True],
        [2, "", "h:1", token(2), []],
        [2, "n" * 65, "h:1", token(2), []],
        [2, "n2", "h:1", b"short", []],
        [2, "n2", "h:1", token(2), [["zone"]]],
        [5, [[1, b"", None, 1, 1, []]]],
        [5, [[1, b"", None, 1, 1, [[1, 1, 0], [1, 2, 0]]]]],
        [5, [[1, b"", None, 1 << 63, 1, [[1, 1, 0]]]]],
        [6, -1, 0],
        [6, 10_001, 0],
        [8, [0, "grow", 1, [], "why", 0, 0, 0]],
        [8, [0, "no kind", 1, [["transfer_leader", 1]], "why", 0, 0, 0]],
        [8, [0, "grow", 1, [["transfer_leader", 1]], "why", 0, 1, 0]],
        [8, [0, "grow", 1, [["add_learners", [[2, 0], [2, 0]]]], "why", 0, 0, 0]],
        [10, 1, "no outcome", ""],
    ],
)
def test_a_command_of_another_shape_is_refused_and_nothing_changes(value: Any) -> None:
    group = Group()
    before = dict(group.store.rows)
    with pytest.raises(MalformedRequest):
        group.apply([value] if value is None else value)
    assert commands.validate(value) is not None
    assert group.store.rows == before


NODES = st.integers(1, 5).map(NodeId)
SPANS = st.tuples(st.sampled_from([b"", b"c", b"f"]), st.sampled_from([b"h", b"m", None]))
DESCRIPTORS = st.builds(
    lambda range_id, span, membership, generation, nodes: descriptor(
        range_id, span[0] if range_id else b"", span[1] if range_id else b"", (membership, generation), *nodes
    ),
    st.integers(0, 4),
    SPANS,
    st.integers(1, 5),
    st.integers(1, 5),
    st.lists(st.integers(1, 5), min_size=1, max_size=3, unique=True),
)
PLACE = st.builds(Place, NODES, st.sampled_from([UNALLOCATED, ReplicaId(1), ReplicaId(900)]))
PLACES = st.lists(PLACE, min_size=1, max_size=3, unique_by=lambda place: place.node_id).map(tuple)
STEPS = st.one_of(st.builds(AddLearners, PLACES), st.builds(PromoteLearners, PLACES), st.builds(TransferLeader, NODES))
OPERATORS = st.builds(
    Operator,
    st.sampled_from(OperatorKind),
    st.integers(0, 4).map(RangeId),
    st.lists(STEPS, min_size=1, max_size=3).map(tuple),
    st.just("because"),
)
COMMANDS = st.one_of(
    st.builds(lambda n, name: register(n, name=f"n{name}"), st.integers(2, 6), st.integers(2, 4)),
    st.builds(
        lambda n, boot, start: commands.NodeStarted(n, boot, token(start), f"host{start}:7000", ()),
        NODES,
        st.integers(1, 3),
        st.integers(1, 2),
    ),
    st.builds(commands.DecommissionNode, NODES),
    st.builds(commands.ReportRanges, st.lists(DESCRIPTORS, max_size=4).map(tuple)),
    st.builds(commands.Allocate, st.integers(0, 3), st.integers(0, 3)),
    st.builds(commands.SetSetting, st.sampled_from(["replication_factor", "split_bytes"]), st.integers(1, 9_000)),
    st.builds(commands.AddOperator, OPERATORS),
    st.builds(commands.AdvanceOperator, st.integers(1, 4), st.integers(0, 3)),
    st.builds(commands.FinishOperator, st.integers(1, 4), st.sampled_from(Outcome), st.just("m")),
)


@settings(deadline=None)
@given(history=st.lists(COMMANDS, max_size=25), reload_at=st.integers(0, 25))
def test_replicas_that_apply_the_same_commands_are_equal_and_so_is_one_made_from_rows(
    history: list[commands.Command], reload_at: int
) -> None:
    """Two replicas apply everything, one of them restarts from its rows midway: outcomes, rows and states agree."""
    one, two = Group(), Group()
    given_out: set[tuple[str, int]] = set()
    for position, command in enumerate(history):
        if position == reload_at:
            two.state = two.reloaded()
        assert commands.decode(commands.encode(command)) == command
        before, rows = contents(one.state)["counters"], dict(one.store.rows)
        outcomes = []
        for group in (one, two):
            try:
                outcomes.append(group.apply(command))
            except ShardKVError as error:
                outcomes.append((type(error), str(error)))
            group.state.check()
        assert outcomes[0] == outcomes[1]
        if isinstance(outcomes[0], tuple):
            assert one.store.rows == rows, "a refused command left a trace"
        elif isinstance(command, commands.Allocate):
            new = {("range", outcomes[0][0] + i) for i in range(command.ranges)}
            new |= {("replica", outcomes[0][1] + i) for i in range(command.replicas)}
            assert not new & given_out
            given_out |= new
        for name in ("next_node", "next_range", "next_replica", "next_operator"):
            assert getattr(one.state.counters, name) >= getattr(before, name), name
    assert one.store.rows == two.store.rows
    assert contents(one.state) == contents(two.state) == contents(one.reloaded()) == contents(two.reloaded())


def test_loading_forgets_what_was_there_before() -> None:
    """A snapshot replaces the state of a replica that is running."""
    old, new = Group(), Group()
    old.apply(register(2))
    old.apply(commands.AddOperator(GROW))
    old.state.load(iter(new.store.rows.items()))
    old.state.check()
    assert contents(old.state) == contents(new.state)


def test_rows_stay_under_the_prefix() -> None:
    group = Group()
    assert all(key.startswith(PREFIX) for key in group.store.rows)
    assert isinstance(group.store, Rows)


@pytest.mark.parametrize("address", ["", "nope", "host:", "host:70000", "a b:1", "[::1:7", "http://h:1"])
def test_an_address_that_nobody_could_dial_does_not_come_into_the_node_table(address: str) -> None:
    for command in (
        commands.RegisterNode("n2", address, token(2), ()),
        commands.NodeStarted(NodeId(1), 2, token(3), address, ()),
    ):
        problem = commands.validate(commands.encode(command))
        assert problem is not None, address
        good = replace(command, address="host:7000")
        assert commands.validate(commands.encode(good)) is None
