"""The placement group's commands, as typed values and as the CBOR lists that its log carries.

    BOOTSTRAP         [1, cluster_id, name, address, token, labels, [descriptor, ...], [[name, value], ...]] -> node id
    REGISTER_NODE     [2, name, address, token, labels]                                  -> node id
    NODE_STARTED      [3, node_id, boot, start_token, address, labels, earlier_tokens]   -> True
    DECOMMISSION_NODE [4, node_id]                                                       -> True
    REPORT_RANGES     [5, [descriptor, ...]]                                             -> [accepted, ...]
    ALLOCATE          [6, ranges, replicas]                                  -> [first range id, first replica id]
    SET_SETTING       [7, name, value]                                                   -> value
    ADD_OPERATOR      [8, operator]                                                      -> operator id
    ADVANCE_OPERATOR  [9, operator_id, step]                                             -> step in force
    FINISH_OPERATOR   [10, operator_id, outcome, message]                    -> whether it was still running

``->`` is the outcome that the proposer gets. What a command does is :mod:`.state`'s; here is only its shape. Numbers
are never reused for another command.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Final

from shardkv.address import parse_address
from shardkv.codec import malformed
from shardkv.errors import ConfigError, MalformedRequest
from shardkv.types import CLUSTER_ID_BYTES, LINEAGE_MAX, TOKEN_BYTES, NodeId, RangeDescriptor
from shardkv_placement import fields
from shardkv_placement.fields import Labels
from shardkv_placement.operators import Operator, Outcome, outcome_from_wire

REPORTS_MAX: Final = 4_096
"""Descriptors in one report; a node with more sends several."""
ALLOCATED_MAX: Final = 10_000
"""Ids of each kind given out by one command."""
MESSAGE_BYTES_MAX: Final = 500
SETTINGS_MAX: Final = 100


@dataclass(frozen=True, slots=True)
class Bootstrap:
    """The first command of a cluster. The same one again, a retry, changes nothing."""

    cluster_id: bytes
    name: str
    address: str
    directory_token: bytes
    labels: Labels
    descriptors: tuple[RangeDescriptor, ...]
    """The ranges that the first node made with its one WAL record: the placement group's, and those of all keys."""
    settings: tuple[tuple[str, int | bool], ...] = ()
    """What the cluster begins with where that is not the default: here, so that no crash can come between."""
    number: ClassVar = 1

    def to_wire(self) -> list[Any]:
        described = [descriptor.to_wire() for descriptor in self.descriptors]
        labels = fields.labels_to_wire(self.labels)
        chosen = [[name, value] for name, value in self.settings]
        return [self.number, self.cluster_id, self.name, self.address, self.directory_token, labels, described, chosen]


@dataclass(frozen=True, slots=True)
class RegisterNode:
    """Allocate an id to a node. ``directory_token`` is random, made with its data directory: the node's identity."""

    name: str
    address: str
    directory_token: bytes
    labels: Labels
    number: ClassVar = 2

    def to_wire(self) -> list[Any]:
        return [self.number, self.name, self.address, self.directory_token, fields.labels_to_wire(self.labels)]


@dataclass(frozen=True, slots=True)
class NodeStarted:
    """A node's process has started. ``boot`` grows with every start; ``start_token`` is random, made at this start.

    A lower ``boot``, or one that did not come from the start that is known, is on an old copy of the disk and is
    refused.
    """

    node_id: NodeId
    boot: int
    start_token: bytes
    address: str
    labels: Labels
    earlier_tokens: tuple[bytes, ...] = ()
    """Of the starts right before it, newest first."""
    number: ClassVar = 3

    def to_wire(self) -> list[Any]:
        labels = fields.labels_to_wire(self.labels)
        earlier = list(self.earlier_tokens)
        return [self.number, self.node_id, self.boot, self.start_token, self.address, labels, earlier]


@dataclass(frozen=True, slots=True)
class DecommissionNode:
    """A node will not come back: its id ends, its name is free, its replicas are replaced."""

    node_id: NodeId
    number: ClassVar = 4

    def to_wire(self) -> list[Any]:
        return [self.number, self.node_id]


@dataclass(frozen=True, slots=True)
class ReportRanges:
    """Descriptors as their ranges applied them, in any order; old ones do no harm. A split reports both halves."""

    descriptors: tuple[RangeDescriptor, ...]
    number: ClassVar = 5

    def to_wire(self) -> list[Any]:
        return [self.number, [descriptor.to_wire() for descriptor in self.descriptors]]


@dataclass(frozen=True, slots=True)
class Allocate:
    """Give out consecutive ids. Those that are lost on the way are never given out again, and never missed."""

    ranges: int
    replicas: int
    number: ClassVar = 6

    def to_wire(self) -> list[Any]:
        return [self.number, self.ranges, self.replicas]


@dataclass(frozen=True, slots=True)
class SetSetting:
    name: str
    value: int | bool
    number: ClassVar = 7

    def to_wire(self) -> list[Any]:
        return [self.number, self.name, self.value]


@dataclass(frozen=True, slots=True)
class AddOperator:
    """Start an operator. Refused while the range has another."""

    operator: Operator
    number: ClassVar = 8

    def to_wire(self) -> list[Any]:
        return [self.number, self.operator.to_wire()]


@dataclass(frozen=True, slots=True)
class AdvanceOperator:
    """Go on to ``step``; an operator already there or beyond stays where it is."""

    operator_id: int
    step: int
    number: ClassVar = 9

    def to_wire(self) -> list[Any]:
        return [self.number, self.operator_id, self.step]


@dataclass(frozen=True, slots=True)
class FinishOperator:
    operator_id: int
    outcome: Outcome
    message: str = ""
    number: ClassVar = 10

    def to_wire(self) -> list[Any]:
        return [self.number, self.operator_id, self.outcome.value, self.message]


Command = (
    Bootstrap
    | RegisterNode
    | NodeStarted
    | DecommissionNode
    | ReportRanges
    | Allocate
    | SetSetting
    | AddOperator
    | AdvanceOperator
    | FinishOperator
)


def encode(command: Command) -> list[Any]:
    """The command as a plain CBOR list."""
    return command.to_wire()


def decode(value: Any) -> Command:
    """The command in a decoded CBOR value, every field checked. Raises MalformedRequest."""
    match value:
        case [Bootstrap.number, cluster_id, name, address, token, labels, descriptors, settings]:
            return Bootstrap(
                fields.blob(cluster_id, "a cluster id", CLUSTER_ID_BYTES),
                fields.name(name),
                fields.address(address),
                _token(token),
                fields.labels(labels),
                _descriptors(descriptors),
                tuple(_setting(each) for each in fields.array(settings, "settings", SETTINGS_MAX)),
            )
        case [RegisterNode.number, name, address, token, labels]:
            return RegisterNode(fields.name(name), fields.address(address), _token(token), fields.labels(labels))
        case [NodeStarted.number, node_id, boot, token, address, labels, *later] if len(later) <= 1:
            return NodeStarted(
                _node_id(node_id),
                fields.integer(boot, "a boot counter", 1),
                _token(token),
                fields.address(address),
                fields.labels(labels),
                # A log may have commands from before there were any.
                tuple(map(_token, fields.array(later[0] if later else [], "earlier tokens", LINEAGE_MAX - 1))),
            )
        case [DecommissionNode.number, node_id]:
            return DecommissionNode(_node_id(node_id))
        case [ReportRanges.number, descriptors]:
            return ReportRanges(_descriptors(descriptors))
        case [Allocate.number, ranges, replicas]:
            return Allocate(
                fields.integer(ranges, "a count of range ids", 0, ALLOCATED_MAX),
                fields.integer(replicas, "a count of replica ids", 0, ALLOCATED_MAX),
            )
        case [SetSetting.number, name, setting]:
            return SetSetting(*_setting([name, setting]))
        case [AddOperator.number, operator]:
            return AddOperator(Operator.from_wire(operator))
        case [AdvanceOperator.number, operator_id, step]:
            return AdvanceOperator(_operator_id(operator_id), fields.integer(step, "a step"))
        case [FinishOperator.number, operator_id, outcome, message]:
            text = fields.text(message, "a message", MESSAGE_BYTES_MAX, empty=True)
            return FinishOperator(_operator_id(operator_id), outcome_from_wire(outcome), text)
    raise malformed(f"not a placement command: {value!r:.200}")


def validate(value: Any) -> str | None:
    """What is wrong with a command from outside, or None: what :func:`decode` would raise, as text, and whatever else
    should not come into the state."""
    try:
        command = decode(value)
        if isinstance(command, RegisterNode | NodeStarted):
            parse_address(command.address)  # everybody dials it
    except (MalformedRequest, ConfigError) as error:
        return str(error)
    return None


def _token(value: Any) -> bytes:
    return fields.blob(value, "a token", TOKEN_BYTES)


def _node_id(value: Any) -> NodeId:
    return NodeId(fields.integer(value, "a node id", 1))


def _setting(value: Any) -> tuple[str, int | bool]:
    match value:
        case [str(name), int(setting)]:
            return name, setting
    raise malformed(f"not a setting and its value: {value!r:.200}")


def _operator_id(value: Any) -> int:
    return fields.integer(value, "an operator id", 1)


def _descriptors(value: Any) -> tuple[RangeDescriptor, ...]:
    return tuple(fields.descriptor(each) for each in fields.array(value, "descriptors", REPORTS_MAX))
