"""The placement group's replicated state: nodes, ids, the range map, settings, operators.

Every node of the group applies the same commands to it, so everything here is deterministic: no clock but the applied
entry's timestamp, no chance, no iteration over sets. A command is checked whole before anything changes, so a refused
one leaves no trace. Whatever is to survive is a row (one CBOR value per object), written to the batch that also
carries the group's applied index; :meth:`PlacementState.load` makes the same state from the rows. Statistics are not
here: see :mod:`.statistics`.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import compress
from typing import Any, Final, Protocol

from shardkv import codec
from shardkv.errors import Conflict, Corruption, NotFound, RequestError, ShardKVError, WrongCluster
from shardkv.types import (
    PLACEMENT_RANGE,
    KeyRange,
    NodeId,
    RangeDescriptor,
    RangeId,
    ReplicaId,
    branches_off,
    timestamp_ms,
)
from shardkv_placement import commands
from shardkv_placement.operators import FinishedOperator, Operator
from shardkv_placement.range_map import RangeMap, Segment
from shardkv_placement.records import Counters, NodeRecord
from shardkv_placement.settings import Settings

NODES_MAX: Final = 1_000
"""Nodes in service."""
DECOMMISSIONED_MAX: Final = 1_000
"""Decommissioned nodes whose records stay, so that everybody hears of their end, and people see their names. Of the
others the id says it all: it was given out, and has no record."""
RUNNING_MAX: Final = 1_024
"""Running operators."""
FINISHED_MAX: Final = 256
"""Finished operators that are remembered, for people and for cooldowns."""
REPORTED_AHEAD_MAX: Final = 1 << 20
"""How far above the ids that were given out a reported one may be. It is not above them at all unless somebody is
mistaken; so every id that was given out can be reported, and no number of mistakes brings a counter near its end."""

_META, _NODE, _SETTING, _PLACEMENT, _SEGMENT, _RUNNING, _FINISHED = b"m", b"n", b"s", b"p", b"r", b"o", b"h"


class Batch(Protocol):
    """Where changed rows go; the machine writes it atomically with the applied index."""

    def put(self, key: bytes, value: bytes) -> None: ...

    def delete(self, key: bytes) -> None: ...


class PlacementState:
    """The state machine. Rows have keys under ``prefix``; whoever owns the store hands in both.

    The attributes are for reading. ``revision`` grows with every applied change; it is not replicated.
    """

    def __init__(self, prefix: bytes = b"") -> None:
        self._prefix = prefix
        self.revision = 0
        self._clear()
        self._handlers: dict[type, Callable[[Any, int, Batch], Any]] = {
            commands.Bootstrap: self._bootstrap,
            commands.RegisterNode: self._register_node,
            commands.NodeStarted: self._node_started,
            commands.DecommissionNode: self._decommission_node,
            commands.ReportRanges: self._report_ranges,
            commands.Allocate: self._allocate,
            commands.SetSetting: self._set_setting,
            commands.AddOperator: self._add_operator,
            commands.AdvanceOperator: self._advance_operator,
            commands.FinishOperator: self._finish_operator,
        }

    def _clear(self) -> None:
        self.counters = Counters()
        self.nodes: dict[NodeId, NodeRecord] = {}
        self.settings = Settings()
        self._chosen: dict[str, int | bool] = {}
        self.placement: RangeDescriptor | None = None
        """The placement group's own descriptor; it owns no keys and so has no place in the map."""
        self.ranges = RangeMap()
        self.operators: dict[RangeId, Operator] = {}
        """The running operator of each range that has one."""
        self._range_by_operator: dict[int, RangeId] = {}
        self.finished: dict[int, FinishedOperator] = {}
        """The last finished operators, oldest first, by a number that only grows."""

    # --- Reading --------------------------------------------------------------------------------------------------

    @property
    def bootstrapped(self) -> bool:
        return self.counters.cluster_id != b""

    def descriptor(self, range_id: RangeId) -> RangeDescriptor | None:
        """The newest descriptor of a range, the placement group's own included."""
        return self.placement if range_id == PLACEMENT_RANGE else self.ranges.descriptor(range_id)

    def descriptors_from(self, start: bytes, limit: int) -> list[RangeDescriptor]:
        """Up to ``limit`` descriptors in key order, from the one that covers ``start``, without overlap.

        One whose successors have not all been reported is cut to what is left of it (and keeps its old epoch): its
        replicas know the successors.
        """
        return [segment.shown for segment in self.ranges.segments_from(start, limit)]

    def node_named(self, name: str) -> NodeRecord | None:
        """The node that has the name now; decommissioned ones have lost theirs."""
        return next((node for node in self.nodes.values() if node.name == name and not node.decommissioned), None)

    def in_service(self, node_id: NodeId) -> NodeRecord:
        """The node with the id. Raises NotFound when there never was one, WrongCluster when it was decommissioned."""
        self._require_given_out(node_id)
        node = self.nodes.get(node_id)
        if node is None:
            raise WrongCluster(f"node {node_id} was decommissioned long ago")
        if node.decommissioned:
            raise WrongCluster(f"node {node_id} ({node.name!r}) was decommissioned")
        return node

    # --- Rows -----------------------------------------------------------------------------------------------------

    def load(self, rows: Iterator[tuple[bytes, bytes]]) -> None:
        """Become the state that ``rows`` hold: all rows under the prefix, whole keys, in any order.

        Raises:
            Corruption: a row is not what this version writes.
        """
        self._clear()
        self.revision += 1
        segments: list[Segment] = []
        start = len(self._prefix)
        for key, row in rows:
            assert key.startswith(self._prefix), (key, self._prefix)
            try:
                self._load_row(key[start : start + 1], key[start + 1 :], codec.loads(row), segments)
            except (ValueError, ShardKVError) as error:
                raise Corruption(f"a row of the placement group is damaged, {key!r:.100}: {error}") from error
        segments.sort(key=lambda segment: segment.span.start)
        self.ranges = RangeMap(segments)
        self.finished = dict(sorted(self.finished.items()))
        self.settings = Settings.of(self._chosen)

    def _load_row(self, kind: bytes, rest: bytes, value: Any, segments: list[Segment]) -> None:
        if kind == _META:
            self.counters = Counters.from_wire(value)
        elif kind == _NODE:
            node = NodeRecord.from_wire(value)
            self.nodes[node.node_id] = node
        elif kind == _SETTING:
            name = rest.decode()
            self.settings.value(name)
            self._chosen[name] = value
        elif kind == _PLACEMENT:
            self.placement = RangeDescriptor.from_wire(value)
        elif kind == _SEGMENT:
            end, descriptor = value
            segments.append(Segment(KeyRange(rest, end), RangeDescriptor.from_wire(descriptor)))
        elif kind == _RUNNING:
            operator = Operator.from_wire(value)
            self.operators[operator.range_id] = operator
            self._range_by_operator[operator.operator_id] = operator.range_id
        elif kind == _FINISHED:
            self.finished[int.from_bytes(rest, "big")] = FinishedOperator.from_wire(value)
        else:
            raise ValueError(f"unknown kind of row {kind!r}")

    def _key(self, kind: bytes, rest: bytes = b"") -> bytes:
        return self._prefix + kind + rest

    def _key_numbered(self, kind: bytes, number: int) -> bytes:
        return self._prefix + kind + number.to_bytes(8, "big")

    def _put_counters(self, batch: Batch, counters: Counters) -> None:
        if counters != self.counters:
            self.counters = counters
            batch.put(self._key(_META), codec.dumps(counters.to_wire()))

    def _put_node(self, batch: Batch, node: NodeRecord) -> None:
        self.nodes[node.node_id] = node
        batch.put(self._key_numbered(_NODE, node.node_id), codec.dumps(node.to_wire()))

    def _forget_node(self, batch: Batch, node_id: NodeId) -> None:
        del self.nodes[node_id]
        batch.delete(self._key_numbered(_NODE, node_id))

    def _put_operator(self, batch: Batch, operator: Operator) -> None:
        self.operators[operator.range_id] = operator
        self._range_by_operator[operator.operator_id] = operator.range_id
        batch.put(self._key_numbered(_RUNNING, operator.operator_id), codec.dumps(operator.to_wire()))

    # --- Applying -------------------------------------------------------------------------------------------------

    def apply(self, command: Any, timestamp: int, batch: Batch) -> Any:
        """Apply one decoded command of an entry with ``timestamp``; the outcome is a plain CBOR value.

        Raises:
            ShardKVError: the command is refused, for the same reason on every replica; nothing has changed.
        """
        decoded = commands.decode(command)
        if not self.bootstrapped and not isinstance(decoded, commands.Bootstrap):
            raise RequestError("the cluster is not bootstrapped")
        outcome = self._handlers[type(decoded)](decoded, timestamp_ms(timestamp), batch)
        self.revision += 1
        return outcome

    def _bootstrap(self, command: commands.Bootstrap, now_ms: int, batch: Batch) -> int:
        if self.bootstrapped:
            first = self.nodes.get(NodeId(1))
            token = None if first is None else first.directory_token
            if (command.cluster_id, command.directory_token) == (self.counters.cluster_id, token):
                return NodeId(1)
            raise WrongCluster(f"this cluster is {self.counters.cluster_id.hex()} and bootstrapped already")
        _check_spans(command.descriptors)
        _check_all_keys(command.descriptors)
        for name, value in command.settings:
            self.settings.with_value(name, value)
        counters = Counters(command.cluster_id, next_node=2, nodes_version=1)
        for descriptor in command.descriptors:
            problem = _impossible(counters, descriptor)
            if problem is not None:
                raise RequestError(problem)
        counters = _raised(counters, command.descriptors)
        self._put_counters(batch, counters)
        node = NodeRecord(NodeId(1), command.name, command.address, command.directory_token, command.labels)
        self._put_node(batch, node)
        for descriptor in command.descriptors:
            self._accept(descriptor, batch)
        for name, value in command.settings:
            self._choose(name, value, batch)
        return node.node_id

    def _register_node(self, command: commands.RegisterNode, now_ms: int, batch: Batch) -> int:
        for node in self.nodes.values():
            if node.directory_token == command.directory_token:
                return self._register_again(node, command)
        named = self.node_named(command.name)
        if named is not None:
            raise WrongCluster(
                f"the name {command.name!r} belongs to node {named.node_id} with another data directory: start that "
                "one, or choose another name; the name of a node that is lost is not given again"
            )
        if sum(not node.decommissioned for node in self.nodes.values()) >= NODES_MAX:
            raise RequestError(f"a cluster has at most {NODES_MAX} nodes")
        node_id = NodeId(self.counters.next_node)
        version = self.counters.nodes_version + 1
        self._put_counters(batch, replace(self.counters, next_node=node_id + 1, nodes_version=version))
        self._put_node(
            batch, NodeRecord(node_id, command.name, command.address, command.directory_token, command.labels)
        )
        return node_id

    def _register_again(self, node: NodeRecord, command: commands.RegisterNode) -> int:
        """A retry gets the id it got; its address and labels may change with its next start only."""
        if node.decommissioned:
            raise WrongCluster(f"node {node.node_id} was decommissioned; start {command.name!r} on an empty directory")
        if node.name != command.name:
            raise WrongCluster(f"this data directory belongs to node {node.node_id}, whose name is {node.name!r}")
        return node.node_id

    def _node_started(self, command: commands.NodeStarted, now_ms: int, batch: Batch) -> bool:
        node = self.in_service(command.node_id)
        tokens = (command.start_token, *command.earlier_tokens)
        other = branches_off(command.boot, tokens, node.boot, node.start_token)
        if command.boot < node.boot or other:
            raise WrongCluster(
                f"node {node.node_id} ({node.name!r}) has been started {node.boot} times, this directory says "
                f"{command.boot}{', and knows nothing of that start' if other else ''}: it is an old copy; put the "
                "newest one back, or start on an empty directory under another name",
                old_copy=True,
            )
        started = replace(
            node,
            boot=command.boot,
            start_token=command.start_token,
            address=command.address,
            labels=command.labels,
        )
        if started != node:
            self._put_counters(batch, replace(self.counters, nodes_version=self.counters.nodes_version + 1))
            self._put_node(batch, started)
        return True

    def _decommission_node(self, command: commands.DecommissionNode, now_ms: int, batch: Batch) -> bool:
        self._require_given_out(command.node_id)
        node = self.nodes.get(command.node_id)
        if node is not None and not node.decommissioned:
            self._put_counters(batch, replace(self.counters, nodes_version=self.counters.nodes_version + 1))
            before = [each.node_id for each in self.nodes.values() if each.decommissioned]
            if len(before) >= DECOMMISSIONED_MAX:
                self._forget_node(batch, min(before))
            self._put_node(batch, replace(node, decommissioned=True))
        return True

    def _report_ranges(self, command: commands.ReportRanges, now_ms: int, batch: Batch) -> list[bool]:
        _check_spans(command.descriptors)
        # One that cannot be is passed over: it must not keep out the others, nor be sent again for ever.
        counters = self.counters
        possible = [_impossible(counters, descriptor) is None for descriptor in command.descriptors]
        self._put_counters(batch, _raised(counters, list(compress(command.descriptors, possible))))
        return [
            may_be and self._accept(descriptor, batch)
            for may_be, descriptor in zip(possible, command.descriptors, strict=True)
        ]

    def _accept(self, descriptor: RangeDescriptor, batch: Batch) -> bool:
        if descriptor.range_id == PLACEMENT_RANGE:
            if self.placement is not None and not descriptor.newer_than(self.placement):
                return False
            self.placement = descriptor
            batch.put(self._key(_PLACEMENT), codec.dumps(descriptor.to_wire()))
            return True
        change = self.ranges.accept(descriptor)
        if change is None:
            return False
        for start in change.removed:
            batch.delete(self._key(_SEGMENT, start))
        for span, owner in change.written:
            batch.put(self._key(_SEGMENT, span.start), codec.dumps([span.end, owner.to_wire()]))
        return True

    def _allocate(self, command: commands.Allocate, now_ms: int, batch: Batch) -> list[int]:
        first_range, first_replica = self.counters.next_range, self.counters.next_replica
        counters = replace(
            self.counters,
            next_range=first_range + command.ranges,
            next_replica=first_replica + command.replicas,
        )
        self._put_counters(batch, counters)
        return [first_range, first_replica]

    def _set_setting(self, command: commands.SetSetting, now_ms: int, batch: Batch) -> int | bool:
        self._choose(command.name, command.value, batch)
        return command.value

    def _choose(self, name: str, value: int | bool, batch: Batch) -> None:
        self.settings = self.settings.with_value(name, value)
        self._chosen[name] = value
        batch.put(self._key(_SETTING, name.encode()), codec.dumps(value))

    def _add_operator(self, command: commands.AddOperator, now_ms: int, batch: Batch) -> int:
        asked = command.operator
        if self.descriptor(asked.range_id) is None:
            raise NotFound(f"there is no range {asked.range_id}")
        running = self.operators.get(asked.range_id)
        if running is not None:
            raise Conflict(
                f"range {asked.range_id} already has operator {running.operator_id} ({running.kind.value}: "
                f"{running.reason})"
            )
        if len(self.operators) >= RUNNING_MAX:
            raise Conflict(f"{RUNNING_MAX} operators are running; try again when some are finished")
        next_replica = self.counters.next_replica
        for place in (place for step in asked.steps for place in step.places()):
            if place.replica_id >= next_replica:
                raise RequestError(f"the replica id {place.replica_id} was never given out; leave it 0 to get one")

        def allocate() -> ReplicaId:
            nonlocal next_replica
            next_replica += 1
            return ReplicaId(next_replica - 1)

        operator_id = self.counters.next_operator
        operator = replace(
            asked.allocated(allocate), operator_id=operator_id, created_ms=now_ms, step=0, step_started_ms=now_ms
        )
        self._put_counters(batch, replace(self.counters, next_operator=operator_id + 1, next_replica=next_replica))
        self._put_operator(batch, operator)
        return operator_id

    def _advance_operator(self, command: commands.AdvanceOperator, now_ms: int, batch: Batch) -> int:
        range_id = self._range_by_operator.get(command.operator_id)
        if range_id is None:
            raise NotFound(f"no operator {command.operator_id} is running")
        operator = self.operators[range_id]
        if command.step >= len(operator.steps):
            raise RequestError(f"operator {operator.operator_id} has {len(operator.steps)} steps")
        if command.step > operator.step:
            operator = replace(operator, step=command.step, step_started_ms=now_ms)
            self._put_operator(batch, operator)
        return operator.step

    def _finish_operator(self, command: commands.FinishOperator, now_ms: int, batch: Batch) -> bool:
        range_id = self._range_by_operator.pop(command.operator_id, None)
        if range_id is None:
            return False
        operator = self.operators.pop(range_id)
        batch.delete(self._key_numbered(_RUNNING, command.operator_id))
        number = self.counters.next_finished
        self._put_counters(batch, replace(self.counters, next_finished=number + 1))
        finished = FinishedOperator(operator, command.outcome, command.message, now_ms)
        self.finished[number] = finished
        batch.put(self._key_numbered(_FINISHED, number), codec.dumps(finished.to_wire()))
        forgotten = self.finished.pop(number - FINISHED_MAX, None)
        if forgotten is not None:
            batch.delete(self._key_numbered(_FINISHED, number - FINISHED_MAX))
        return True

    def _require_given_out(self, node_id: NodeId) -> None:
        if node_id >= self.counters.next_node:
            raise NotFound(f"there is no node {node_id}")

    def check(self) -> None:
        """Every invariant of the state."""
        counters = self.counters
        self.ranges.check(tiled=len(self.ranges) > 0)
        assert all(0 < node_id < counters.next_node for node_id in self.nodes), (self.nodes.keys(), counters)
        names = [node.name for node in self.nodes.values() if not node.decommissioned]
        assert len(names) <= NODES_MAX, len(names)
        assert len(self.nodes) - len(names) <= DECOMMISSIONED_MAX, (len(self.nodes), len(names))
        assert len(set(names)) == len(names), names
        tokens = [node.directory_token for node in self.nodes.values()]
        assert len(set(tokens)) == len(tokens), self.nodes
        for descriptor in self.ranges.descriptors():
            assert descriptor.range_id < counters.next_range, (descriptor, counters)
            for replica in descriptor.replicas:
                assert replica.replica_id < counters.next_replica, (descriptor, counters)
        assert len(self.operators) <= RUNNING_MAX, len(self.operators)
        assert self._range_by_operator == {each.operator_id: key for key, each in self.operators.items()}, (
            self.operators
        )
        for range_id, operator in self.operators.items():
            assert operator.range_id == range_id, (range_id, operator)
            assert 0 < operator.operator_id < counters.next_operator, (operator, counters)
            for step in operator.steps:
                for place in step.places():
                    assert 0 < place.replica_id < counters.next_replica, (operator, counters)
        assert len(self.finished) <= FINISHED_MAX, len(self.finished)
        assert list(self.finished) == sorted(self.finished), list(self.finished)
        assert self.settings == Settings.of(self._chosen), (self.settings, self._chosen)


def _check_spans(descriptors: tuple[RangeDescriptor, ...]) -> None:
    for descriptor in descriptors:
        if descriptor.span.empty and descriptor.range_id != PLACEMENT_RANGE:
            raise RequestError(f"range {descriptor.range_id} has an empty span")


def _check_all_keys(descriptors: tuple[RangeDescriptor, ...]) -> None:
    """A cluster begins with ranges that hold every key once; reports keep it so."""
    end: bytes | None = b""
    spans = [descriptor.span for descriptor in descriptors if descriptor.range_id != PLACEMENT_RANGE]
    for span in sorted(spans, key=lambda each: each.start):
        if span.start != end:
            raise RequestError(f"the first ranges leave a gap or overlap at {span.start!r:.100}")
        end = span.end
    if end is not None:
        raise RequestError("the first ranges leave the last keys without one")


def _impossible(counters: Counters, descriptor: RangeDescriptor) -> str | None:
    """Which id of a descriptor nobody can have been given."""
    ids = [("replica", replica.replica_id, counters.next_replica) for replica in descriptor.replicas]
    for what, reported, following in (("range", descriptor.range_id, counters.next_range), *ids):
        if reported - following >= REPORTED_AHEAD_MAX:
            return f"there can be no {what} {reported}: the ids given out end at {following - 1}"
    return None


def _raised(counters: Counters, descriptors: Sequence[RangeDescriptor]) -> Counters:
    """Counters above every id that is in use: an id seen anywhere is never given out."""
    next_range, next_replica = counters.next_range, counters.next_replica
    for descriptor in descriptors:
        next_range = max(next_range, descriptor.range_id + 1)
        for replica in descriptor.replicas:
            next_replica = max(next_replica, replica.replica_id + 1)
    if (next_range, next_replica) == (counters.next_range, counters.next_replica):
        return counters
    return replace(counters, next_range=next_range, next_replica=next_replica)
