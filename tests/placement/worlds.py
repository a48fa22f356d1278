"""Worlds for tests of the placement driver: views in one line, and a cluster that does what it is told at once.

``a_view(nodes=3, ranges={1: "1* 2 3"})`` is a cluster of three nodes with range 1 led by node 1. A replica is a node
number with marks: ``*`` leads, ``+`` is a learner, ``?`` does not follow closely.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

from shardkv import codec
from shardkv.errors import ShardKVError
from shardkv.types import (
    EVERY_KEY,
    FIRST_RANGE,
    PLACEMENT_RANGE,
    Epoch,
    Fullness,
    KeyRange,
    Member,
    NodeId,
    RangeDescriptor,
    RangeId,
    ReplicaId,
    ReplicaRole,
    timestamp_at,
)
from shardkv_placement import commands, heartbeat
from shardkv_placement.controller import Controller, Propose
from shardkv_placement.heartbeat import Progress, RangeReport, Reporter
from shardkv_placement.operators import CATCH_UP_LAG_MAX, ChangeReplicas, FinishedOperator, Operator, Transfer
from shardkv_placement.settings import Settings
from shardkv_placement.state import PlacementState
from shardkv_placement.statistics import NodeState, RangeStatistics, Statistics
from shardkv_placement.view import ClusterView, NodeView, RangeView, ViewBuilder

WALL_MS = 1_700_000_000_000
FIRST_EPOCH = Epoch(1, 1)


def span_of(range_id: int, count: int) -> KeyRange:
    """The span of range 1 .. count when they share all keys."""
    start = b"" if range_id == 1 else b"%06d" % range_id
    return KeyRange(start, None if range_id == count else b"%06d" % (range_id + 1))


def a_range(range_id: int, text: str, span: KeyRange = EVERY_KEY, epoch: Epoch = FIRST_EPOCH) -> RangeView:
    """A range view from ``"1* 2 3"``; replica ids are range · 100 + node."""
    replicas, progress, leader = [], [], None
    for word in text.split():
        node_id = NodeId(int(word.rstrip("*+?")))
        replica_id = ReplicaId(range_id * 100 + node_id)
        replicas.append(Member(node_id, replica_id, ReplicaRole.LEARNER if "+" in word else ReplicaRole.VOTER))
        progress.append(Progress(replica_id, CATCH_UP_LAG_MAX + 1 if "?" in word else 0, True))
        leader = node_id if "*" in word else leader
    descriptor = RangeDescriptor(RangeId(range_id), span, epoch, tuple(replicas))
    if leader is None:
        return RangeView(descriptor)
    return RangeView(descriptor, RangeStatistics(leader, 5, 1_000, epoch.membership, epoch.span, tuple(progress)))


def a_view(
    nodes: int,
    ranges: Mapping[int, str],
    *,
    down: Collection[int] = (),
    suspect: Collection[int] = (),
    draining: Collection[int] = (),
    decommissioned: Collection[int] = (),
    complete: bool = True,
    running: Iterable[Operator] = (),
    finished: Iterable[FinishedOperator] = (),
    **settings: int | bool,
) -> ClusterView:
    """A view of nodes 1 .. ``nodes``, all live unless named otherwise."""
    views = {RangeId(key): a_range(key, text, span_of(max(1, key), len(ranges))) for key, text in ranges.items()}
    found: dict[NodeId, NodeView] = {}
    for node_id in map(NodeId, range(1, nodes + 1)):
        state = NodeState.LIVE
        for named, other in (
            (down, NodeState.DOWN),
            (suspect, NodeState.SUSPECT),
            (decommissioned, NodeState.DECOMMISSIONED),
        ):
            state = other if node_id in named else state
        found[node_id] = NodeView(
            node_id,
            f"n{node_id}",
            f"host{node_id}:7000",
            (),
            state,
            node_id in draining,
            sum(view.descriptor.replica_on(node_id) is not None for view in views.values()),
            sum(view.leader == node_id for view in views.values()),
        )
    return ClusterView(
        1_000.0,
        WALL_MS,
        b"c" * 16,
        complete,
        MappingProxyType(found),
        MappingProxyType(views),
        Settings.of(settings),
        MappingProxyType({operator.range_id: operator for operator in running}),
        MappingProxyType({(done.operator.range_id, done.operator.kind): done for done in finished}),
    )


def short(view: ClusterView, *ids: int) -> ClusterView:
    """The same view with the disks of these nodes nearly full."""
    return filled(view, dict.fromkeys(ids, Fullness.SHORT))


def filled(view: ClusterView, fullness: Mapping[int, Fullness]) -> ClusterView:
    """The same view with so full disks."""
    nodes = {key: replace(node, fullness=fullness.get(key, Fullness.ROOMY)) for key, node in view.nodes.items()}
    return replace(view, nodes=MappingProxyType(nodes))


class Rows:
    """A store of rows that also is the batch: what a machine's batch leads to."""

    def __init__(self) -> None:
        self.rows: dict[bytes, bytes] = {}

    def put(self, key: bytes, value: bytes) -> None:
        assert type(key) is bytes, key
        assert type(value) is bytes, value
        self.rows[key] = value

    def delete(self, key: bytes) -> None:
        self.rows.pop(key, None)


PREFIX = b"\x00placement/"


def descriptor(range_id: int, start: bytes, end: bytes | None, epoch: tuple[int, int], *nodes: int) -> RangeDescriptor:
    """A descriptor whose replicas, on nodes (node 1 if none is named), have the ids range · 100 + node."""
    replicas = tuple(Member(NodeId(node), ReplicaId(range_id * 100 + node)) for node in nodes or (1,))
    return RangeDescriptor(RangeId(range_id), KeyRange(start, end), Epoch(*epoch), replicas)


def first_descriptors() -> tuple[RangeDescriptor, ...]:
    """What a new cluster starts with, on node 1."""
    return (
        RangeDescriptor(PLACEMENT_RANGE, KeyRange(b"", b""), Epoch(1, 1), (Member(NodeId(1), ReplicaId(1)),)),
        RangeDescriptor(FIRST_RANGE, EVERY_KEY, Epoch(1, 1), (Member(NodeId(1), ReplicaId(2)),)),
    )


class Group:
    """A placement group of one: its state, its rows, and a clock for its entries."""

    def __init__(self, *, bootstrapped: bool = True) -> None:
        self.store = Rows()
        self.state = PlacementState(PREFIX)
        self.wall_ms = WALL_MS
        if bootstrapped:
            self.apply(commands.Bootstrap(b"c" * 16, "n1", "host1:7000", token(1), (), first_descriptors()))

    def apply(self, command: commands.Command | list[Any]) -> Any:
        """Apply a command as the log carries it; its outcome, or its error raised."""
        value = command if isinstance(command, list) else commands.encode(command)
        outcome = self.state.apply(codec.loads(codec.dumps(value)), timestamp_at(self.wall_ms), self.store)
        codec.loads(codec.dumps(outcome))
        return outcome

    def reloaded(self) -> PlacementState:
        state = PlacementState(PREFIX)
        state.load(iter(sorted(self.store.rows.items(), reverse=True)))
        return state

    def join(self, number: int) -> NodeId:
        """Register node ``number`` and record its first start."""
        node_id = NodeId(self.apply(commands.RegisterNode(f"n{number}", f"host{number}:7000", token(number), ())))
        self.apply(commands.NodeStarted(node_id, 1, token(1), f"host{number}:7000", ()))
        return node_id


def token(number: int) -> bytes:
    return number.to_bytes(16, "big")


def contents(state: PlacementState) -> dict[str, Any]:
    """Everything a state holds, for comparing two."""
    return {
        "counters": state.counters,
        "nodes": state.nodes,
        "settings": state.settings,
        "placement": state.placement,
        "segments": list(state.ranges.segments),
        "newest": {each.range_id: each for each in state.ranges.descriptors()},
        "operators": state.operators,
        "finished": list(state.finished.items()),
    }


@dataclass
class FakeRange:
    """A range as it really is."""

    descriptor: RangeDescriptor
    leader: NodeId | None
    term: int = 1
    behind: set[ReplicaId] = field(default_factory=set)
    """Replicas that do not follow closely; a new learner is one for a tick."""


class FakeCluster:
    """Nodes, ranges, and a placement leader, in ticks of a second. Requests are carried out at once, or lost.

    Everything between the parts is encoded and decoded as on the wire.
    """

    def __init__(self, nodes: int = 1) -> None:
        self.group = Group()
        self.now = 100.0
        self.ranges = {each.range_id: FakeRange(each, NodeId(1)) for each in first_descriptors()}
        self.reporters: dict[NodeId, Reporter] = {}
        self.alive: dict[NodeId, bool] = {}
        self.draining: set[NodeId] = set()
        self.lose = 0
        """Every how manieth action is lost; 0 for none."""
        self.actions: list[Any] = []
        self.voter_counts: set[int] = set()
        """Every number of voters that any range ever had."""
        self.group.apply(commands.NodeStarted(NodeId(1), 1, token(1), "host1:7000", ()))
        self._start(NodeId(1))
        for number in range(2, nodes + 1):
            self.add_node(number)
        self.elect_placement_leader()

    def _start(self, node_id: NodeId) -> None:
        self.reporters[node_id] = Reporter(node_id, 1, f"host{node_id}:7000")
        self.alive[node_id] = True

    def add_node(self, number: int) -> NodeId:
        node_id = self.group.join(number)
        self._start(node_id)
        return node_id

    def elect_placement_leader(self) -> None:
        """Another node leads the placement group: the state is there (from its rows), all else begins anew."""
        self.group.state = self.group.reloaded()
        self.statistics = Statistics(self.now)
        self.controller = Controller()
        self.views = ViewBuilder(self.group.state, self.statistics)

    def kill(self, number: int) -> None:
        """The node dies; each range it led elects its lowest living voter."""
        node_id = NodeId(number)
        self.alive[node_id] = False
        for each in self.ranges.values():
            if each.leader == node_id:
                self._lead(each, next((r.node_id for r in each.descriptor.replicas if self.alive[r.node_id]), None))

    def split(self, range_id: int, key: bytes) -> RangeId:
        """Split a range at ``key`` and report both halves; the child is led by the same node."""
        parent = self.ranges[RangeId(range_id)]
        old = parent.descriptor
        count = len(old.replicas)
        first_range, first_replica = self.group.apply(commands.Allocate(1, count))
        generation = max(old.epoch) + 1
        epoch = Epoch(generation, generation)
        left = old.with_span(KeyRange(old.span.start, key), epoch)
        replicas = tuple(
            replica._replace(replica_id=ReplicaId(first_replica + position))
            for position, replica in enumerate(old.replicas)
        )
        right = RangeDescriptor(RangeId(first_range), KeyRange(key, old.span.end), epoch, replicas)
        parent.descriptor = left
        self.ranges[right.range_id] = FakeRange(right, parent.leader)
        self.group.apply(commands.ReportRanges((left, right)))
        return right.range_id

    def view(self) -> ClusterView:
        return self.views.build(self.now, self.group.wall_ms)

    def tick(self, count: int = 1) -> None:
        for _ in range(count):
            self.now += 1.0
            self.group.wall_ms += 1_000
            self._heartbeats()
            for action in self.controller.tick(self.view()):
                self.actions.append(action)
                if self.lose == 0 or len(self.actions) % self.lose:
                    self._perform(action)
            for each in self.ranges.values():
                voters = [r for r in each.descriptor.replicas if r.role is ReplicaRole.VOTER]
                self.voter_counts.add(len(voters))
            self.group.state.check()
            self.statistics.check()

    def settle(self, ticks_max: int = 100) -> int:
        """Tick until nothing runs and nothing is started for a while; how many ticks until then."""
        quiet = 0
        for ticks in range(ticks_max):
            before = len(self.actions)
            self.tick()
            idle = len(self.actions) == before and not self.group.state.operators and self.view().complete
            quiet = quiet + 1 if idle else 0
            if quiet > 15:
                return ticks - quiet
        raise AssertionError(f"never settled: {self.group.state.operators}, last {self.actions[-5:]}")

    def leaders(self) -> dict[int, int]:
        """How many ranges of user keys each living node leads."""
        counts = {int(node_id): 0 for node_id, alive in self.alive.items() if alive}
        for range_id, each in self.ranges.items():
            if range_id != PLACEMENT_RANGE and each.leader is not None:
                counts[each.leader] += 1
        return counts

    def voters(self, range_id: int) -> set[int]:
        replicas = self.ranges[RangeId(range_id)].descriptor.replicas
        return {int(replica.node_id) for replica in replicas if replica.role is ReplicaRole.VOTER}

    def beat(self, number: int) -> None:
        """One node's heartbeat arrives and is answered."""
        node_id = NodeId(number)
        reporter = self.reporters[node_id]
        for each in self.ranges.values():
            if each.descriptor.replica_on(node_id) is None:
                reporter.remove(each.descriptor.range_id)
            else:
                reporter.report(self._report(each, node_id))
        sent = reporter.heartbeat(draining=node_id in self.draining)
        received = heartbeat.decode(codec.loads(codec.dumps(heartbeat.encode(sent))))
        assert received == sent
        reply = self.statistics.receive(self.group.state, received, self.now)
        answered = heartbeat.decode_reply(codec.loads(codec.dumps(heartbeat.encode_reply(reply))))
        assert answered == reply
        reporter.acknowledged(sent, answered)
        for range_id in answered.descriptors_wanted:
            self.group.apply(commands.ReportRanges((self.ranges[range_id].descriptor,)))

    def _heartbeats(self) -> None:
        for node_id, alive in self.alive.items():
            if alive:
                self.beat(node_id)

    def _report(self, each: FakeRange, node_id: NodeId) -> RangeReport:
        epoch, leads = each.descriptor.epoch, each.leader == node_id
        progress = tuple(
            Progress(r.replica_id, 10_000 if r.replica_id in each.behind else 0, self.alive[r.node_id])
            for r in each.descriptor.replicas
        )
        range_id = each.descriptor.range_id
        return RangeReport(range_id, epoch.membership, epoch.span, leads, each.term, 1_000, progress if leads else ())

    def _perform(self, action: Any) -> None:
        match action:
            case Propose(command):
                try:
                    self.group.apply(command)
                except ShardKVError:
                    pass  # The next view shows why.
            case ChangeReplicas(range_id, leader, changes, membership):
                each = self.ranges[range_id]
                if each.leader == leader and each.descriptor.epoch.membership == membership:
                    self._change(each, changes)
            case Transfer(range_id, leader, target):
                each = self.ranges[range_id]
                replica = each.descriptor.replica_on(target)
                if each.leader == leader and self.alive[target] and replica is not None:
                    assert replica.role is ReplicaRole.VOTER, action
                    self._lead(each, target)

    def _lead(self, each: FakeRange, node_id: NodeId | None) -> None:
        each.leader, each.term = node_id, each.term + 1

    def _change(self, each: FakeRange, changes: list[list[Any]]) -> None:
        replicas = {replica.replica_id: replica for replica in each.descriptor.replicas}
        each.behind.clear()
        for verb, node_id, replica_id in changes:
            if verb == "add_learner":
                replicas[replica_id] = Member(node_id, replica_id, ReplicaRole.LEARNER)
                each.behind.add(replica_id)
            elif verb == "promote":
                replicas[replica_id] = replicas[replica_id]._replace(role=ReplicaRole.VOTER)
            else:
                del replicas[replica_id]
        epoch = each.descriptor.epoch._replace(membership=each.descriptor.epoch.membership + 1)
        each.descriptor = replace(each.descriptor, replicas=tuple(replicas.values()), epoch=epoch)

    def catch_up(self) -> None:
        """Every learner has received its data."""
        for each in self.ranges.values():
            each.behind.clear()
