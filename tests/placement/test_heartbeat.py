"""What nodes report, and what a placement leader makes of it (design 4.10)."""

from typing import Any

import pytest

from shardkv import codec
from shardkv.errors import Busy, MalformedRequest, NotFound, WrongCluster
from shardkv.types import ADDRESS_BYTES_MAX, NAME_BYTES_MAX, NodeId, RangeId, ReplicaId
from shardkv.wire import requests
from shardkv.wire.frames import FRAME_BYTES_MAX
from shardkv.wire.requests import Method
from shardkv_placement import commands, heartbeat
from shardkv_placement.heartbeat import Capacity, Heartbeat, HeartbeatReply, NodeEntry, Progress, RangeReport, Reporter
from shardkv_placement.state import DECOMMISSIONED_MAX, NODES_MAX
from shardkv_placement.statistics import NodeState, Statistics
from tests.placement.worlds import Group, descriptor, token

NODE = NodeId(1)


def report(
    range_id: int, *, term: int = 1, leads: bool = True, size: int = 0, lag: int = 0, active: bool = True
) -> RangeReport:
    progress = (Progress(ReplicaId(1), lag, active),) if leads else ()
    return RangeReport(RangeId(range_id), 1, 1, leads, term, size, progress)


def named(sent: Heartbeat) -> list[int]:
    return sorted(each.range_id for each in sent.ranges)


class Line:
    """A reporter and the statistics that hear it, with a line between them that may fail."""

    def __init__(self) -> None:
        self.group = Group()
        self.group.apply(commands.NodeStarted(NODE, 1, token(1), "host1:7000", ()))
        self.statistics = Statistics(0.0)
        self.reporter = Reporter(NODE, 1, "host1:7000")

    def send(self, *, request_lost: bool = False, reply_lost: bool = False, at: float = 1.0) -> Heartbeat:
        sent = self.reporter.heartbeat()
        if not request_lost:
            reply = self.statistics.receive(self.group.state, sent, at)
            self.statistics.check()
            if not reply_lost:
                self.reporter.acknowledged(sent, reply)
        return sent


def test_the_first_heartbeat_names_everything_and_later_ones_what_has_changed() -> None:
    """10,000 idle ranges must not be repeated twice a second."""
    line = Line()
    line.reporter.report(report(1))
    line.reporter.report(report(2))
    first = line.send()
    assert (first.full, named(first)) == (True, [1, 2])
    assert not line.reporter.urgent
    line.reporter.report(report(1))
    line.reporter.report(report(2, term=2))
    second = line.send()
    assert (second.full, named(second)) == (False, [2])
    assert named(line.send()) == []


def test_a_little_more_data_or_lag_is_not_news() -> None:
    line = Line()
    line.reporter.report(report(1))
    line.send()
    line.reporter.report(report(1, size=1_000, lag=heartbeat.CATCH_UP_LAG_MAX))
    assert not line.reporter.urgent
    line.reporter.report(report(1, lag=heartbeat.CATCH_UP_LAG_MAX + 1))
    assert named(line.send()) == [1]
    line.reporter.report(report(1, size=heartbeat.BYTES_CHANGE_MIN))
    assert named(line.send()) == [1]


@pytest.mark.parametrize("lost", ["request", "reply"])
def test_what_a_lost_heartbeat_named_is_named_again(lost: str) -> None:
    line = Line()
    line.reporter.report(report(1))
    line.reporter.report(report(2))
    line.send()
    line.reporter.report(report(1, term=2))
    line.reporter.remove(RangeId(2))
    line.send(request_lost=lost == "request", reply_lost=lost == "reply")
    again = line.send()
    assert (again.full, named(again), again.removed) == (False, [1], (RangeId(2),))
    assert line.statistics.reported_in_full(NODE)
    assert set(line.statistics.ranges) == {1}
    assert line.send().removed == ()


def test_what_changes_while_a_heartbeat_is_under_way_is_named_by_the_next() -> None:
    """The reply answers what was sent, not what has happened since."""
    line = Line()
    for range_id in (1, 2):
        line.reporter.report(report(range_id))
    line.send()
    sent = line.reporter.heartbeat()
    line.reporter.report(report(1, term=2))
    line.reporter.remove(RangeId(2))
    line.reporter.acknowledged(sent, line.statistics.receive(line.group.state, sent, 1.0))
    assert line.reporter.urgent
    again = line.send()
    assert (named(again), again.removed) == ([1], (RangeId(2),))
    assert not line.reporter.urgent


def test_a_replica_that_comes_back_as_it_was_is_named_again() -> None:
    line = Line()
    line.reporter.report(report(1))
    line.send()
    line.reporter.remove(RangeId(1))
    assert line.reporter.urgent
    assert line.send().removed == (RangeId(1),)
    line.reporter.report(report(1))
    assert named(line.send()) == [1]
    assert set(line.statistics.ranges) == {1}


def test_a_replica_that_goes_before_its_news_were_told_is_named_as_gone_only() -> None:
    line = Line()
    line.reporter.report(report(1))
    line.send()
    line.reporter.report(report(1, term=2))
    line.reporter.remove(RangeId(1))
    sent = line.send()
    assert (named(sent), sent.removed) == ([], (RangeId(1),))


def test_what_was_reported_counts_once_it_was_acknowledged_and_until_it_changes() -> None:
    line = Line()
    line.reporter.report(report(1))
    line.reporter.report(report(2, leads=False))
    line.send(reply_lost=True)
    assert not line.reporter.heard
    assert not line.reporter.leads_by_report(RangeId(1))
    line.send()
    assert line.reporter.heard
    assert [line.reporter.leads_by_report(RangeId(each)) for each in (1, 2, 3)] == [True, False, False]
    line.reporter.report(report(1, term=2))
    assert not line.reporter.leads_by_report(RangeId(1))


def test_a_replica_is_silent_from_when_on_its_leader_says_so_without_a_break() -> None:
    line = Line()

    def silent_since(at: float, *, active: bool, term: int = 1, size: int = 0) -> float | None:
        line.reporter.report(report(1, active=active, term=term, size=size))
        line.send(at=at)
        return line.statistics.ranges[RangeId(1)].silent_since.get(ReplicaId(1))

    assert silent_since(1.0, active=True) is None
    assert silent_since(2.0, active=False) == 2.0
    assert silent_since(3.0, active=False, size=heartbeat.BYTES_CHANGE_MIN) == 2.0
    assert silent_since(4.0, active=True) is None
    assert silent_since(5.0, active=False) == 5.0
    assert silent_since(6.0, active=False, term=2) == 6.0, "another leader has heard nobody yet"


def test_what_another_leader_acknowledged_makes_this_one_ask_for_everything() -> None:
    """A deposed placement leader that does not know it yet takes heartbeats that its successor then never gets."""
    line = Line()
    line.reporter.report(report(1))
    line.send()
    deposed, line.statistics = line.statistics, Statistics(0.0)
    successor = line.statistics
    line.send()
    slow = line.reporter.heartbeat()
    reply = successor.receive(line.group.state, slow, 1.0)
    assert successor.reported_in_full(NODE)
    line.reporter.report(report(1, term=7))
    line.statistics = deposed
    line.send()
    line.reporter.acknowledged(slow, reply)
    line.statistics = successor
    assert not line.send().full
    assert not successor.reported_in_full(NODE)
    assert line.send().full
    assert successor.reported_in_full(NODE)
    assert successor.ranges[RangeId(1)].term == 7


def test_a_deposed_leader_takes_no_newer_table_of_nodes_away() -> None:
    line = Line()
    version = line.group.state.counters.nodes_version
    for known, told in ((version - 1, True), (version, False), (version + 1, False)):
        line.reporter.nodes_version = known
        reply = line.statistics.receive(line.group.state, line.reporter.heartbeat(), 1.0)
        assert (reply.nodes is not None) == told


def test_a_late_heartbeat_does_not_undo_a_newer_one() -> None:
    line = Line()
    line.reporter.report(report(1))
    line.send()
    line.reporter.report(report(1, term=2))
    late = line.reporter.heartbeat()
    line.reporter.report(report(1, term=3))
    line.send()
    line.statistics.receive(line.group.state, late, 2.0)
    assert line.statistics.ranges[RangeId(1)].term == 3


def test_of_two_who_claim_to_lead_the_one_with_the_higher_term_does() -> None:
    line = Line()
    line.group.join(2)
    other = Reporter(NodeId(2), 1, "host2:7000")
    for mine, theirs, leader in ((4, 5, 2), (7, 5, 1), (7, 8, 2)):
        line.reporter.report(report(1, term=mine))
        other.report(report(1, term=theirs))
        line.statistics.receive(line.group.state, other.heartbeat(), 1.0)
        line.send()
        assert line.statistics.ranges[RangeId(1)].leader == leader
    other.report(report(1, term=9, leads=False))
    line.statistics.receive(line.group.state, other.heartbeat(), 1.0)
    assert line.statistics.ranges[RangeId(1)].leader == 1


def test_a_leader_whose_descriptor_is_newer_than_the_map_is_asked_to_report_it() -> None:
    """The report of a split that was lost is made up for by any later heartbeat of the leader that names the range."""
    line = Line()
    line.reporter.report(RangeReport(RangeId(1), 2, 2, True, 1, 0))
    reply = line.statistics.receive(line.group.state, line.reporter.heartbeat(), 1.0)
    assert reply.descriptors_wanted == (1,)
    line.group.apply(commands.ReportRanges((descriptor(1, b"", None, (2, 2)),)))
    assert line.statistics.receive(line.group.state, line.reporter.heartbeat(), 1.0).descriptors_wanted == ()


def test_more_descriptors_than_one_reply_asks_for_are_asked_for_next() -> None:
    """A leader tells of a range once: what was left out would be asked for only after its next change."""
    line = Line()
    count = 2 * heartbeat.DESCRIPTORS_WANTED_MAX + 7
    for range_id in range(10, 10 + count):
        line.reporter.report(report(range_id))
    wanted: set[int] = set()
    for _ in range(3):
        sent = line.reporter.heartbeat()
        reply = line.statistics.receive(line.group.state, sent, 1.0)
        assert len(reply.descriptors_wanted) <= heartbeat.DESCRIPTORS_WANTED_MAX
        line.reporter.acknowledged(sent, reply)
        wanted.update(reply.descriptors_wanted)
        for number in reply.descriptors_wanted:
            line.group.apply(
                commands.ReportRanges((descriptor(number, b"%06d" % number, b"%06d" % (number + 1), (2, 2)),))
            )
    assert len(wanted) == count
    assert not line.reporter.urgent


def test_the_node_table_goes_only_to_those_who_have_an_old_one() -> None:
    line = Line()
    reply = line.statistics.receive(line.group.state, line.reporter.heartbeat(), 1.0)
    assert reply.nodes is not None
    assert [entry.name for entry in reply.nodes] == ["n1"]
    line.reporter.nodes_version = reply.nodes_version
    assert line.statistics.receive(line.group.state, line.reporter.heartbeat(), 1.0).nodes is None
    line.group.join(2)
    reply = line.statistics.receive(line.group.state, line.reporter.heartbeat(), 1.0)
    assert reply.nodes is not None
    assert [(entry.node_id, entry.boot) for entry in reply.nodes] == [(1, 1), (2, 1)]
    assert reply.settings["split_bytes"] == line.group.state.settings.split_bytes


def test_trap_24_a_heartbeat_of_a_start_that_is_not_on_record_makes_nobody_an_old_copy() -> None:
    """A node that is called one never starts again, so that must not rest on what a single message said."""
    line = Line()
    line.reporter.report(report(1))
    line.send()
    with pytest.raises(Busy, match="start 9"):
        line.statistics.receive(line.group.state, Reporter(NODE, 9, "host1:7000").heartbeat(), 1.0)
    line.reporter.report(report(2))
    line.send()
    assert set(line.statistics.ranges) == {1, 2}


def test_trap_24_heartbeats_of_an_old_copy_and_of_a_decommissioned_node_are_refused() -> None:
    """Trap 24: whoever was replaced must not be listened to."""
    line = Line()
    line.group.apply(commands.NodeStarted(NODE, 3, token(3), "host1:7000", ()))
    with pytest.raises(WrongCluster, match="started 3 times"):
        line.send()
    with pytest.raises(NotFound):
        line.statistics.receive(line.group.state, Reporter(NodeId(9), 1, "h:1").heartbeat(), 1.0)
    line.group.apply(commands.DecommissionNode(NODE))
    with pytest.raises(WrongCluster, match="decommissioned"):
        line.send()


def test_a_restarted_node_is_not_known_in_full_until_it_says_everything_again() -> None:
    """What its earlier process said is forgotten with it."""
    line = Line()
    line.reporter.report(report(1))
    line.send()
    line.group.apply(commands.NodeStarted(NODE, 2, token(2), "host1:7000", ()))
    line.reporter = Reporter(NODE, 2, "host1:7000")
    line.reporter.report(report(5))
    sent = line.send()
    assert sent.full
    assert set(line.statistics.ranges) == {5}
    line.statistics.check()


def test_a_full_report_removes_what_it_does_not_name() -> None:
    line = Line()
    line.reporter.report(report(1))
    line.reporter.report(report(2))
    line.send()
    line.reporter.want_full()
    line.reporter.remove(RangeId(1))
    line.send()
    assert set(line.statistics.ranges) == {2}


def test_asking_for_a_full_report_while_one_is_under_way_sends_another() -> None:
    line = Line()
    under_way = line.reporter.heartbeat()
    line.reporter.want_full()
    reply = line.statistics.receive(line.group.state, under_way, 1.0)
    line.reporter.acknowledged(under_way, reply)
    assert line.send().full
    assert not line.send().full


def test_a_silent_node_becomes_suspect_and_then_down() -> None:
    """By the settings, from its last heartbeat; one never heard counts from when this leader began, and as suspect."""
    line = Line()
    line.group.join(2)
    state, settings = line.group.state, line.group.state.settings
    suspect, down = settings.node_suspect_ms / 1000, settings.node_down_ms / 1000

    def states(now: float) -> list[NodeState]:
        return [line.statistics.node_state(node, settings, now) for node in state.nodes.values()]

    line.send()
    assert states(1.0) == [NodeState.LIVE, NodeState.SUSPECT]
    assert states(1.0 + suspect) == [NodeState.SUSPECT, NodeState.SUSPECT]
    assert states(down) == [NodeState.SUSPECT, NodeState.DOWN]
    assert states(1.0 + down) == [NodeState.DOWN, NodeState.DOWN]


def test_trap_15_statistics_are_complete_only_when_all_who_may_be_alive_have_said_everything() -> None:
    """Trap 15: a fresh leader's view is half-filled. A node that stays silent long enough no longer holds it up."""
    line = Line()
    line.group.join(2)
    state = line.group.state
    assert not line.statistics.complete(state, 0.0)
    line.send()
    assert not line.statistics.complete(state, 1.0)
    down = state.settings.node_down_ms / 1000
    line.send()
    assert line.statistics.complete(state, down)
    other = Reporter(NodeId(2), 1, "host2:7000")
    line.statistics.receive(state, other.heartbeat(), down)
    assert line.statistics.complete(state, down)
    assert not Statistics(0.0).complete(Group(bootstrapped=False).state, 0.0)


FIELDS: list[Any] = heartbeat.encode(
    Heartbeat(NODE, 1, 2, 1, "h:1", True, False, 3, (report(1),), (RangeId(4),), Capacity(9, 8, 7))
)


def test_heartbeats_and_replies_are_what_they_were_after_the_wire() -> None:
    assert heartbeat.encode(heartbeat.decode(FIELDS)) == FIELDS
    reply = HeartbeatReply(True, 3, None, {"split_bytes": 5}, (RangeId(1),))
    assert heartbeat.decode_reply(heartbeat.encode_reply(reply)) == reply


def test_the_longest_node_table_there_is_comes_through() -> None:
    entries = tuple(
        NodeEntry(NodeId(number), "n" * NAME_BYTES_MAX, "a" * ADDRESS_BYTES_MAX, 1, number > NODES_MAX, token(number))
        for number in range(1, NODES_MAX + DECOMMISSIONED_MAX + 1)
    )
    encoded = codec.dumps(heartbeat.encode_reply(HeartbeatReply(True, 3, entries, {})))
    assert heartbeat.decode_reply(codec.loads(encoded)).nodes == entries
    assert len(encoded) < FRAME_BYTES_MAX // 16


def test_a_node_that_leads_very_many_ranges_can_say_so_in_one_request() -> None:
    """All of them at once, as when every other node was restarted: a request has a bound on its items."""
    progress = tuple(Progress(ReplicaId(number), 0, True) for number in range(100_000, 100_005))
    ranges = tuple(RangeReport(RangeId(number), 9, 9, True, 5, 1 << 26, progress) for number in range(20_000))
    sent = Heartbeat(NODE, 1, 2, 1, "h:1", True, False, 3, ranges)
    (request,) = requests.decode_requests(
        requests.join([requests.encode_request(1, Method.HEARTBEAT, 0, 0, 0, heartbeat.encode(sent))])
    )
    assert heartbeat.decode(request.arguments[0]) == sent


def test_which_replicas_are_being_sent_the_data_is_news_and_said_where_it_is_so() -> None:
    """What knows nothing of it reads reports without it as before."""
    one, two, three = (Progress(ReplicaId(number), 0, number < 3) for number in (1, 2, 3))
    waiting = RangeReport(RangeId(1), 9, 9, True, 5, 1 << 26, (one, two, three))
    receiving = waiting._replace(progress=(one, two, three._replace(receiving=True)))
    line = Line()
    line.reporter.report(waiting)
    sent = line.send()
    assert heartbeat.decode(heartbeat.encode(sent)) == sent
    assert [len(each) for each in heartbeat.encode(sent)[9][0][6]] == [3, 3, 3]
    line.reporter.report(receiving)
    sent = line.send()
    assert sent.ranges == (receiving,)
    assert heartbeat.decode(heartbeat.encode(sent)) == sent
    line.reporter.report(waiting)
    assert line.send().ranges == (waiting,), "it is over"


def test_reports_in_bytes_have_a_bound_on_their_items() -> None:
    items = heartbeat.REPORT_ITEMS_MAX + 1
    for reports in (codec.array_head(items) + bytes(items), b"\xff", b""):
        with pytest.raises(MalformedRequest):
            heartbeat.decode([*FIELDS[:9], reports, *FIELDS[10:]])


@pytest.mark.parametrize("position", range(len(FIELDS)))
def test_a_heartbeat_with_a_wrong_field_is_refused(position: int) -> None:
    """Each field in turn is replaced by something that no field may be."""
    with pytest.raises(MalformedRequest):
        heartbeat.decode([*FIELDS[:position], -1.5, *FIELDS[position + 1 :]])
    with pytest.raises(MalformedRequest):
        heartbeat.decode(FIELDS[:position])
