"""Operators: what the cluster is doing to one range, as replicated data.

An operator is a sequence of steps with a reason. A step looks at the view to know whether it is finished or has
failed, and what to ask the range's leader for next; asking again does no harm. Operators are part of the placement
group's state, so they survive a change of its leader. Which operators to make is :mod:`.schedulers`'s matter; carrying
them on is :mod:`.controller`'s.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from shardkv.codec import malformed
from shardkv.types import Fullness, NodeId, RangeId, ReplicaId, ReplicaRole
from shardkv_placement import fields

if TYPE_CHECKING:
    from shardkv_placement.view import ClusterView, RangeView

CATCH_UP_LAG_MAX: Final = 256
"""A replica at most this many entries behind its leader counts as caught up: under load some are always in flight."""
CATCH_UP_SECONDS_MAX: Final = 600.0
"""For a new replica to follow closely, besides the time that the range's data takes to it."""
CATCH_UP_BYTES_PER_SECOND_MIN: Final = 128 * 1024
"""A new replica has the time that its data takes at this rate, over a slow link, although it acknowledges nothing:
until a snapshot is whole, it looks like one that nobody can reach."""
CHANGE_SECONDS_MAX: Final = 60.0
TRANSFER_SECONDS_MAX: Final = 10.0
STEPS_MAX: Final = 8
REASON_BYTES_MAX: Final = 2_000
UNALLOCATED: Final = ReplicaId(0)
"""Stands for a replica id until the placement group allocates one, in the command that adds the operator."""


class OperatorKind(Enum):
    GROW = "grow"
    """More voters, or others for those on decommissioned nodes."""
    SHED = "shed"
    """Replicas that nobody wants go."""
    BALANCE = "balance-leader"
    DRAIN = "drain-leader"
    TRANSFER = "transfer"
    """A person asked for another leader."""
    MOVE = "move"
    """A person asked for another place."""


LEADER_KINDS: Final = (OperatorKind.BALANCE, OperatorKind.DRAIN, OperatorKind.TRANSFER)
"""Operators that only move a leadership."""


class Place(NamedTuple):
    """A replica that is, or is to be, on a node."""

    node_id: NodeId
    replica_id: ReplicaId


class ChangeReplicas(NamedTuple):
    """Ask ``leader`` to change its range's members, if the membership generation is still ``membership``.

    ``changes`` are ``["add_learner" | "promote" | "remove", node id, replica id]``, carried out together.
    """

    range_id: RangeId
    leader: NodeId
    changes: list[list[Any]]
    membership: int


class Transfer(NamedTuple):
    """Ask ``leader`` to hand its range's leadership to the replica on ``target``."""

    range_id: RangeId
    leader: NodeId
    target: NodeId


Request = ChangeReplicas | Transfer


def caught_up(view: "RangeView", replica_id: ReplicaId) -> bool:
    """Whether the leader reports the replica as following closely."""
    progress = view.progress_of(replica_id)
    return progress is not None and progress.active and progress.lag <= CATCH_UP_LAG_MAX


def is_receiving(view: "RangeView", replica_id: ReplicaId) -> bool:
    """Whether the leader reports the replica as being sent the range's data."""
    progress = view.progress_of(replica_id)
    return progress is not None and progress.receiving


def _data_seconds_max(view: "RangeView") -> float:
    """How long the range's data may be on its way to a new replica."""
    return view.bytes / CATCH_UP_BYTES_PER_SECOND_MIN


def catch_up_seconds_max(view: "RangeView") -> float:
    """How long a new replica may take to follow closely."""
    return CATCH_UP_SECONDS_MAX + _data_seconds_max(view)


def without_data(cluster: "ClusterView", view: "RangeView", place: Place, seconds: float) -> str | None:
    """Why a learner that has been awaited for so long will hardly get the range's data, or None; others should not
    wait for it, nor their places."""
    if caught_up(view, place.replica_id):
        return None
    if cluster.nodes[place.node_id].fullness >= Fullness.LOW:
        return f"node {place.node_id} has no room for the range's data"
    since = view.silent_since(place.replica_id)
    silent_seconds = 0.0 if since is None else min(seconds, cluster.now - since)
    if silent_seconds > cluster.settings.node_down_ms / 1000 + _data_seconds_max(view):
        if is_receiving(view, place.replica_id):
            return f"node {place.node_id} still receives the range's data after {silent_seconds:.0f} s"
        return f"node {place.node_id} acknowledges nothing of the range after {silent_seconds:.0f} s"
    return None


def _unusable(view: "ClusterView", places: tuple[Place, ...]) -> str | None:
    for place in places:
        node = view.nodes.get(place.node_id)
        if node is None or node.gone:
            return f"node {place.node_id} is {'unknown' if node is None else node.state.value}"
    return None


def _change(view: "RangeView", changes: list[list[Any]]) -> ChangeReplicas | None:
    if view.leader is None or not changes:
        return None
    return ChangeReplicas(view.range_id, view.leader, changes, view.descriptor.epoch.membership)


@dataclass(frozen=True, slots=True)
class AddLearners:
    """Add replicas without a vote in one change, then wait until each follows closely."""

    learners: tuple[Place, ...]
    tag = "add_learners"

    def seconds_max(self, view: "RangeView") -> float:
        return catch_up_seconds_max(view)

    def finished(self, cluster: "ClusterView", view: "RangeView") -> bool:
        return all(
            view.descriptor.replica(place.replica_id) is not None and caught_up(view, place.replica_id)
            for place in self.learners
        )

    def failed(self, cluster: "ClusterView", view: "RangeView", seconds: float) -> str | None:
        for place in self.learners:
            other = view.descriptor.replica_on(place.node_id)
            if other is not None and other.replica_id != place.replica_id:
                return f"node {place.node_id} holds another replica, {other.replica_id}, of the range"
        hopeless = (without_data(cluster, view, place, seconds) for place in self.learners)
        return _unusable(cluster, self.learners) or next(filter(None, hopeless), None)

    def request(self, view: "RangeView") -> Request | None:
        missing = [place for place in self.learners if view.descriptor.replica(place.replica_id) is None]
        return _change(view, [["add_learner", place.node_id, place.replica_id] for place in missing])

    def places(self) -> tuple[Place, ...]:
        return self.learners

    def with_places(self, translate: Callable[[Place], Place]) -> "AddLearners":
        return AddLearners(tuple(map(translate, self.learners)))

    def to_wire(self) -> list[Any]:
        return [self.tag, [list(place) for place in self.learners]]


@dataclass(frozen=True, slots=True)
class PromoteLearners:
    """Give learners a vote and let other replicas go, in one joint change: no configuration in between ever rules."""

    learners: tuple[Place, ...]
    removed: tuple[Place, ...] = ()
    tag = "promote_learners"

    def seconds_max(self, view: "RangeView") -> float:
        return CHANGE_SECONDS_MAX

    def finished(self, cluster: "ClusterView", view: "RangeView") -> bool:
        for place in self.learners:
            replica = view.descriptor.replica(place.replica_id)
            if replica is None or replica.role is not ReplicaRole.VOTER:
                return False
        return all(view.descriptor.replica(place.replica_id) is None for place in self.removed)

    def failed(self, cluster: "ClusterView", view: "RangeView", seconds: float) -> str | None:
        for place in self.learners:
            if view.descriptor.replica(place.replica_id) is None:
                return f"replica {place.replica_id} on node {place.node_id} is no longer a member"
        return _unusable(cluster, self.learners)

    def request(self, view: "RangeView") -> Request | None:
        changes: list[list[Any]] = []
        for place in self.learners:
            replica = view.descriptor.replica(place.replica_id)
            if replica is not None and replica.role is ReplicaRole.LEARNER:
                changes.append(["promote", place.node_id, place.replica_id])
        for place in self.removed:
            if view.descriptor.replica(place.replica_id) is not None:
                changes.append(["remove", place.node_id, place.replica_id])
        return _change(view, changes)

    def places(self) -> tuple[Place, ...]:
        return self.learners + self.removed

    def with_places(self, translate: Callable[[Place], Place]) -> "PromoteLearners":
        return PromoteLearners(tuple(map(translate, self.learners)), tuple(map(translate, self.removed)))

    def to_wire(self) -> list[Any]:
        return [self.tag, [list(place) for place in self.learners], [list(place) for place in self.removed]]


@dataclass(frozen=True, slots=True)
class RemoveReplicas:
    """Let replicas go in one change."""

    removed: tuple[Place, ...]
    tag = "remove_replicas"

    def seconds_max(self, view: "RangeView") -> float:
        return CHANGE_SECONDS_MAX

    def finished(self, cluster: "ClusterView", view: "RangeView") -> bool:
        return all(view.descriptor.replica(place.replica_id) is None for place in self.removed)

    def failed(self, cluster: "ClusterView", view: "RangeView", seconds: float) -> str | None:
        return None

    def request(self, view: "RangeView") -> Request | None:
        left = [place for place in self.removed if view.descriptor.replica(place.replica_id) is not None]
        return _change(view, [["remove", place.node_id, place.replica_id] for place in left])

    def places(self) -> tuple[Place, ...]:
        return self.removed

    def with_places(self, translate: Callable[[Place], Place]) -> "RemoveReplicas":
        return RemoveReplicas(tuple(map(translate, self.removed)))

    def to_wire(self) -> list[Any]:
        return [self.tag, [list(place) for place in self.removed]]


@dataclass(frozen=True, slots=True)
class TransferLeader:
    """Make the voter on a node the leader."""

    target: NodeId
    tag = "transfer_leader"

    def seconds_max(self, view: "RangeView") -> float:
        return TRANSFER_SECONDS_MAX

    def finished(self, cluster: "ClusterView", view: "RangeView") -> bool:
        return view.leader == self.target

    def failed(self, cluster: "ClusterView", view: "RangeView", seconds: float) -> str | None:
        replica = view.descriptor.replica_on(self.target)
        if replica is None or replica.role is not ReplicaRole.VOTER:
            return f"node {self.target} holds no voter of the range"
        node = cluster.nodes.get(self.target)
        if node is not None and not node.gone and (node.draining or not node.live):
            return f"node {self.target} is {'draining' if node.draining else node.state.value}"
        return _unusable(cluster, (Place(self.target, replica.replica_id),))

    def request(self, view: "RangeView") -> Request | None:
        if view.leader is None or view.leader == self.target:
            return None
        return Transfer(view.range_id, view.leader, self.target)

    def places(self) -> tuple[Place, ...]:
        return ()

    def with_places(self, translate: Callable[[Place], Place]) -> "TransferLeader":
        return self

    def to_wire(self) -> list[Any]:
        return [self.tag, self.target]


Step = AddLearners | PromoteLearners | RemoveReplicas | TransferLeader


def _places(value: Any) -> tuple[Place, ...]:
    found = []
    for pair in fields.array(value, "places", fields.REPLICAS_MAX):
        if type(pair) is not list or len(pair) != 2:
            raise malformed(f"a place must be [node id, replica id], not {pair!r:.100}")
        node_id = fields.integer(pair[0], "a node id", 1)
        found.append(Place(NodeId(node_id), ReplicaId(fields.integer(pair[1], "a replica id"))))
    if len({place.node_id for place in found}) != len(found):
        raise malformed("places must be on distinct nodes")
    return tuple(found)


def step_from_wire(value: Any) -> Step:
    """The inverse of ``to_wire`` of any step. Raises MalformedRequest."""
    match value:
        case [AddLearners.tag, learners]:
            return AddLearners(_places(learners))
        case [PromoteLearners.tag, learners, removed]:
            return PromoteLearners(_places(learners), _places(removed))
        case [RemoveReplicas.tag, removed]:
            return RemoveReplicas(_places(removed))
        case [TransferLeader.tag, target]:
            return TransferLeader(NodeId(fields.integer(target, "a node id", 1)))
    raise malformed(f"not a step of an operator: {value!r:.200}")


@dataclass(frozen=True, slots=True)
class Operator:
    """One range's running operator. ``step`` is the position of the step being carried out.

    ``operator_id`` is 0 and the times are 0 until the placement group adds it; times are milliseconds of replicated
    time.
    """

    kind: OperatorKind
    range_id: RangeId
    steps: tuple[Step, ...]
    reason: str
    operator_id: int = 0
    created_ms: int = 0
    step: int = 0
    step_started_ms: int = 0

    @property
    def current(self) -> Step:
        return self.steps[self.step]

    def progress(self, cluster: "ClusterView", view: "RangeView") -> int:
        """The first step, from the current one on, that is not finished; ``len(steps)`` when all are."""
        for position in range(self.step, len(self.steps)):
            if not self.steps[position].finished(cluster, view):
                return position
        return len(self.steps)

    def failure(self, cluster: "ClusterView", view: "RangeView") -> str | None:
        """Why the current step cannot be finished any more, or None."""
        seconds, seconds_max = (cluster.wall_ms - self.step_started_ms) / 1000, self.current.seconds_max(view)
        if seconds > seconds_max:
            return f"{self.current.tag} took more than {seconds_max:.0f} s"
        return self.current.failed(cluster, view, seconds)

    def allocated(self, allocate: Callable[[], ReplicaId]) -> "Operator":
        """This operator with an id for each replica that has none; the same node gets the same id in every step."""
        ids: dict[NodeId, ReplicaId] = {}

        def translate(place: Place) -> Place:
            if place.replica_id != UNALLOCATED:
                return place
            if place.node_id not in ids:
                ids[place.node_id] = allocate()
            return Place(place.node_id, ids[place.node_id])

        return replace(self, steps=tuple(step.with_places(translate) for step in self.steps))

    def to_wire(self) -> list[Any]:
        return [
            self.operator_id,
            self.kind.value,
            self.range_id,
            [step.to_wire() for step in self.steps],
            self.reason,
            self.created_ms,
            self.step,
            self.step_started_ms,
        ]

    @classmethod
    def from_wire(cls, value: Any) -> "Operator":
        """The inverse of :meth:`to_wire`. Raises MalformedRequest."""
        match value:
            case [operator_id, str(kind), range_id, [*steps], reason, created_ms, step, step_started_ms]:
                if not 1 <= len(steps) <= STEPS_MAX:
                    raise malformed(f"an operator must have 1 to {STEPS_MAX} steps, not {len(steps)}")
                try:
                    known = OperatorKind(kind)
                except ValueError as error:
                    raise malformed(f"no kind of operator: {kind!r:.80}") from error
                return cls(
                    known,
                    RangeId(fields.integer(range_id, "a range id")),
                    tuple(step_from_wire(each) for each in steps),
                    fields.text(reason, "a reason", REASON_BYTES_MAX),
                    fields.integer(operator_id, "an operator id"),
                    fields.integer(created_ms, "a time"),
                    fields.integer(step, "a step", 0, len(steps) - 1),
                    fields.integer(step_started_ms, "a time"),
                )
        raise malformed(f"not an operator: {value!r:.200}")


class Outcome(Enum):
    DONE = "done"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class FinishedOperator:
    """An operator that has ended, and how."""

    operator: Operator
    outcome: Outcome
    message: str
    finished_ms: int

    def to_wire(self) -> list[Any]:
        return [self.operator.to_wire(), self.outcome.value, self.message, self.finished_ms]

    @classmethod
    def from_wire(cls, value: Any) -> "FinishedOperator":
        match value:
            case [operator, str(outcome), str(message), int(finished_ms)]:
                return cls(Operator.from_wire(operator), outcome_from_wire(outcome), message, finished_ms)
        raise malformed(f"not a finished operator: {value!r:.200}")


def outcome_from_wire(value: Any) -> Outcome:
    try:
        return Outcome(value)
    except ValueError as error:
        raise malformed(f"no outcome of an operator: {value!r:.80}") from error
