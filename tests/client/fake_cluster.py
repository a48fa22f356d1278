"""A cluster to test clients against: ranges, leaders and the dedupe table of DESIGN §4.6, and no Raft, disk or clock.

Everything is applied the moment a leader's node is asked. ``FakeNode.serve`` maps a request frame's payload to response
payloads; how bytes come and go is up to the tests, in virtual time or over loopback.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from sortedcontainers import SortedDict

from shardkv import errors
from shardkv.types import (
    KEY_BYTES_MAX,
    SESSION_AGE_MS_MAX,
    VALUE_BYTES_MAX,
    Epoch,
    KeyRange,
    Member,
    NodeId,
    RangeDescriptor,
    RangeId,
    ReplicaId,
    timestamp_at,
    timestamp_ms,
)
from shardkv.wire import commands, requests
from shardkv.wire.commands import Op
from shardkv.wire.requests import Consistency, Method, Request

BASE_MS = 1_700_000_000_000


@dataclass
class FakeRange:
    descriptor: RangeDescriptor
    leader: int | None
    records: dict[tuple[bytes, int], tuple[int, Any]] = field(default_factory=dict)
    acknowledged: dict[bytes, int] = field(default_factory=dict)

    @property
    def id(self) -> int:
        return self.descriptor.range_id


class FakeCluster:
    """Nodes 1 to ``nodes``, at ``n1:1`` and so on unless addresses are set; one range with replicas on all of them."""

    def __init__(self, nodes: int = 3) -> None:
        self.cluster_id = b"c" * 16
        self.data: SortedDict[bytes, tuple[bytes, int]] = SortedDict()
        self.now_ms = 0.0
        self._stamp = 0
        self.told: dict[int, str] = {}
        """Addresses that the nodes tell of themselves, where they are not those that lead to them."""
        self.nodes = {node_id: FakeNode(self, node_id, f"n{node_id}:1") for node_id in range(1, nodes + 1)}
        self.ranges: dict[int, FakeRange] = {}
        self._next_range = 1
        self.applied: list[tuple[bytes, int, int]] = []
        """Every command that was executed: session, sequence, op."""
        self.seen: dict[tuple[bytes, int], bytes] = {}
        """The bytes of every command received; the same (session, sequence) must always come with the same."""
        self.windows: list[tuple[int, int]] = []
        """(sequence, acknowledged_below) of every command received."""
        self.issued: list[tuple[int, int]] = []
        """(sequence, issued_at_ms) of every command received."""
        self.add_range(b"", None)

    # --- the world changes ----------------------------------------------------------------------------------------

    def add_range(self, start: bytes, end: bytes | None, *, leader: int | None = 1, generation: int = 1) -> FakeRange:
        range_id = self._next_range
        self._next_range += 1
        replicas = tuple(Member(NodeId(node), ReplicaId(range_id * 100 + node)) for node in self.nodes)
        descriptor = RangeDescriptor(RangeId(range_id), KeyRange(start, end), Epoch(1, generation), replicas)
        self.ranges[range_id] = FakeRange(descriptor, leader)
        return self.ranges[range_id]

    def range_of(self, key: bytes) -> FakeRange:
        return next(each for each in self.ranges.values() if each.descriptor.span.contains(key))

    def split(self, key: bytes, *, leader: int | None = None) -> FakeRange:
        """Split at ``key``; the right half is led by ``leader``, or by whoever led the whole."""
        parent = self.range_of(key)
        old = parent.descriptor
        epoch = Epoch(old.epoch.membership, old.epoch.span + 1)
        parent.descriptor = old.with_span(KeyRange(old.span.start, key), epoch)
        child = self.add_range(key, old.span.end, leader=leader or parent.leader)
        child.descriptor = replace(child.descriptor, epoch=epoch)
        child.records = dict(parent.records)
        child.acknowledged = dict(parent.acknowledged)
        return child

    def merge(self, key: bytes) -> None:
        """Unite the range of ``key`` with its right neighbour."""
        left = self.range_of(key)
        assert left.descriptor.span.end is not None
        right = self.range_of(left.descriptor.span.end)
        generation = max(left.descriptor.epoch.span, right.descriptor.epoch.span) + 1
        span = KeyRange(left.descriptor.span.start, right.descriptor.span.end)
        left.descriptor = left.descriptor.with_span(span, Epoch(left.descriptor.epoch.membership, generation))
        left.records |= right.records
        for session, below in right.acknowledged.items():
            left.acknowledged[session] = max(below, left.acknowledged.get(session, 0))
        del self.ranges[right.id]

    def move(self, key: bytes, nodes: list[int], leader: int) -> None:
        """Put the range's replicas onto other nodes."""
        target = self.range_of(key)
        old = target.descriptor
        replicas = tuple(Member(NodeId(node), ReplicaId(9_000 + node)) for node in nodes)
        epoch = Epoch(old.epoch.membership + 1, old.epoch.span)
        target.descriptor = replace(old, replicas=replicas, epoch=epoch)
        target.leader = leader

    def stamp(self) -> int:
        """A new version, larger than all before."""
        self._stamp = max(self._stamp + 1, timestamp_at(BASE_MS + int(self.now_ms)))
        return self._stamp

    @property
    def clock(self) -> int:
        return max(self._stamp, timestamp_at(BASE_MS + int(self.now_ms)))

    # --- applying -------------------------------------------------------------------------------------------------

    def apply(self, target: FakeRange, session: bytes, generation: int, command: list[Any], raw: bytes) -> Any:
        op, sequence, issued_at, below = command[:4]
        known = self.seen.setdefault((session, sequence), raw)
        assert known == raw, f"sequence {sequence} came with other bytes"
        self.windows.append((sequence, below))
        self.issued.append((sequence, issued_at))
        assert below <= sequence <= below + 1_024
        replicated_ms = timestamp_ms(self.clock)
        if issued_at < replicated_ms - SESSION_AGE_MS_MAX or issued_at > replicated_ms + 500:
            return errors.to_wire(errors.TooOld("the command is too old"))
        if sequence < target.acknowledged.get(session, 0):
            return errors.to_wire(errors.SequenceReused("the sequence is settled"))
        target.acknowledged[session] = max(below, target.acknowledged.get(session, 0))
        record = target.records.get((session, sequence))
        if record is not None:
            digest, outcome = record
            if digest != command[4]:
                return errors.to_wire(errors.SequenceReused("other content"))
            return outcome
        span = target.descriptor.span
        inside = span.contains(command[5])
        if op == Op.DELETE_RANGE and span.end is not None:
            inside = inside and command[6] is not None and command[6] <= span.end
        if not inside or generation != target.descriptor.epoch.span:
            return errors.to_wire(self.epoch_mismatch())
        outcome = self._execute(command)
        self.applied.append((session, sequence, op))
        target.records[session, sequence] = (command[4], outcome)
        return outcome

    def epoch_mismatch(self) -> errors.EpochMismatch:
        return errors.EpochMismatch(current=tuple(each.descriptor for each in self.ranges.values() if each.id))

    def _execute(self, command: list[Any]) -> Any:
        op, key = command[0], command[5]
        current = self.data.get(key)
        if op == Op.DELETE_RANGE:
            for found in list(self.data.irange(key, command[6], inclusive=(True, False))):
                del self.data[found]
            return True
        condition = command[7] if op == Op.PUT else command[6] if op == Op.DELETE else None
        if condition is not None and condition != (current[1] if current else 0):
            return errors.to_wire(errors.VersionMismatch(current=current[1] if current else 0))
        if op == Op.PUT:
            version = self.stamp()
            self.data[key] = (command[6], version)
            return version
        if op == Op.DELETE:
            self.data.pop(key, None)
            return current is not None
        try:
            number = int(current[0]) if current else 0
        except ValueError:
            return errors.to_wire(errors.NotAnInteger("the key holds no number"))
        self.data[key] = (str(number + command[6]).encode(), self.stamp())
        return number + command[6]


class FakeNode:
    """One node. ``faults`` maps requests to errors: the first that returns one answers with it."""

    def __init__(self, cluster: FakeCluster, node_id: int, address: str) -> None:
        self.cluster = cluster
        self.id = node_id
        self.address = address
        self.faults: list[Callable[[Request], errors.ShardKVError | None]] = []
        self.requests: list[Request] = []
        self.timestamps: list[int] = []
        self.age_us = 1_500
        """What it says of its own age where it does not lead."""

    def serve(self, payload: bytes) -> list[bytes]:
        """The encoded responses to a request frame, in order."""
        return [self.answer(request) for request in requests.decode_requests(payload)]

    def answer(self, request: Request) -> bytes:
        self.requests.append(request)
        self.timestamps.append(request.timestamp)
        cluster = self.cluster
        try:
            for fault in self.faults:
                problem = fault(request)
                if problem is not None:
                    raise problem
            result = self._handle(request)
        except errors.ShardKVError as error:
            return requests.encode_error(request.id, cluster.clock, error)
        return requests.encode_response(request.id, cluster.clock, result)

    def _handle(self, request: Request) -> Any:
        cluster = self.cluster
        match request.method, request.arguments:
            case Method.NODES, []:
                return [
                    [node.id, f"node{node.id}", cluster.told.get(node.id, node.address)]
                    for node in cluster.nodes.values()
                ]
            case Method.ROUTES, [None, int()]:
                return [[cluster.ranges[0].descriptor.to_wire(), cluster.ranges[0].leader]]
            case Method.ROUTES, [bytes() as start, int(limit)]:
                found = sorted(
                    (each for each in cluster.ranges.values() if each.id), key=lambda each: each.descriptor.span.start
                )
                rest = [each for each in found if each.descriptor.span.end is None or each.descriptor.span.end > start]
                return [[each.descriptor.to_wire(), each.leader] for each in rest[:limit]]
            case Method.WRITE, [bytes() as session, bytes() as data]:
                target = self._range(request, Method.WRITE)
                outcomes = []
                for command in commands.decode(data):
                    problem = commands.validate(command, KEY_BYTES_MAX, VALUE_BYTES_MAX)
                    assert problem is None, problem
                    raw = bytes(_pack(command))
                    outcomes.append(cluster.apply(target, session, request.span_generation, command, raw))
                return outcomes
            case Method.GET, [Consistency.STALE as consistency, keys, bound]:
                plain = request._replace(arguments=[consistency, keys])
                return [self._age_us(request, bound), self._handle(plain)]
            case Method.SCAN, [Consistency.STALE, *_, bound] if len(request.arguments) == 8:
                plain = request._replace(arguments=request.arguments[:-1])
                return [self._age_us(request, bound), self._handle(plain)]
            case Method.GET, [int(consistency), list() as keys]:
                target = self._range(request, Method.GET, leader=consistency == 0)
                self._check_epoch(request, target, all(target.descriptor.span.contains(key) for key in keys))
                return [None if key not in cluster.data else list(cluster.data[key]) for key in keys]
            case Method.SCAN, [consistency, start, end, limit, bytes_max, reverse, keys_only]:
                target = self._range(request, Method.SCAN, leader=consistency == 0)
                self._check_epoch(request, target, True)
                return self._scan(target, start, end, limit, bytes_max, reverse, keys_only)
            case ((Method.STATUS | Method.NODE_STATUS), arguments):
                return {"node": self.id, "arguments": arguments}
            case ((Method.SPLIT | Method.PLACEMENT), arguments):
                self._range(request, Method.SPLIT)
                return {"node": self.id, "range": request.range_id, "arguments": arguments}
        raise errors.UnknownMethod(f"method {request.method} is unknown")

    def _age_us(self, request: Request, bound: int | None) -> int:
        target = self.cluster.ranges.get(request.range_id)
        leader = target.leader if target is not None else None
        age_us = 0 if leader == self.id else self.age_us
        if bound is not None and age_us > bound:
            raise errors.NotLeader(hint=leader)
        return age_us

    def _range(self, request: Request, method: Method, *, leader: bool = True) -> FakeRange:
        target = self.cluster.ranges.get(request.range_id)
        if target is None or target.descriptor.replica_on(NodeId(self.id)) is None:
            if target is None and method is not Method.SPLIT:
                raise self.cluster.epoch_mismatch()
            raise errors.RangeNotFound(f"no replica of range {request.range_id} here")
        if leader and target.leader != self.id:
            raise errors.NotLeader(hint=target.leader)
        return target

    def _check_epoch(self, request: Request, target: FakeRange, inside: bool) -> None:
        if request.span_generation != target.descriptor.epoch.span or not inside:
            raise self.cluster.epoch_mismatch()

    def _scan(
        self,
        target: FakeRange,
        start: bytes,
        end: bytes | None,
        limit: int,
        bytes_max: int,
        reverse: bool,
        keys_only: bool,
    ) -> list[Any]:
        span = target.descriptor.span
        start = max(start, span.start)
        if span.end is not None and (end is None or span.end < end):
            end = span.end
        flat: list[Any] = []
        size = 0
        for key in self.cluster.data.irange(start, end, inclusive=(True, False), reverse=reverse):
            if len(flat) >= 3 * limit or size >= bytes_max:
                return [flat, True]
            value, version = self.cluster.data[key]
            flat += [key, None if keys_only else value, version]
            size += len(key) + len(value)
        return [flat, False]


def _pack(command: list[Any]) -> bytes:
    from shardkv import codec

    return codec.dumps(command)
