"""Two of the rows that the placement group keeps, as values: a node, and the cluster's identity with its counters.

Lives here: their fields and their wire form. Does not live here: what changes them (:mod:`.state`), nor the rows of
other modules' values, which know their own.
"""

from dataclasses import dataclass
from typing import Any, Final

from shardkv.types import NodeId
from shardkv_placement import fields
from shardkv_placement.fields import Labels

FORMAT: Final = 1
_COUNTER_MAX: Final = (1 << 63) - 1


@dataclass(frozen=True, slots=True)
class NodeRecord:
    """A node as the group knows it for good."""

    node_id: NodeId
    name: str
    address: str
    directory_token: bytes
    """Random, made with the node's data directory: who it is, whatever its name."""
    labels: Labels
    boot: int = 0
    """The highest boot counter seen; 0 until its first start was recorded."""
    start_token: bytes = b""
    decommissioned: bool = False

    def to_wire(self) -> list[Any]:
        return [
            self.node_id,
            self.name,
            self.address,
            self.directory_token,
            fields.labels_to_wire(self.labels),
            self.boot,
            self.start_token,
            self.decommissioned,
        ]

    @classmethod
    def from_wire(cls, value: Any) -> "NodeRecord":
        match value:
            case [int(node_id), str(name), str(address), bytes(token), labels, int(boot), bytes(start), bool(gone)]:
                return cls(NodeId(node_id), name, address, token, fields.labels(labels), boot, start, gone)
        raise ValueError(f"not a node: {value!r:.200}")


@dataclass(frozen=True, slots=True)
class Counters:
    """The cluster's identity and the next id of each kind. Only ever grows."""

    cluster_id: bytes = b""
    next_node: int = 1
    next_range: int = 1
    next_replica: int = 1
    next_operator: int = 1
    next_finished: int = 0
    nodes_version: int = 0
    """Grows with every change of the node table, so that nodes can tell whether theirs is the newest."""

    def to_wire(self) -> list[Any]:
        return [
            FORMAT,
            self.cluster_id,
            self.next_node,
            self.next_range,
            self.next_replica,
            self.next_operator,
            self.next_finished,
            self.nodes_version,
        ]

    @classmethod
    def from_wire(cls, value: Any) -> "Counters":
        match value:
            case [int(form), bytes(cluster_id), *numbers] if form == FORMAT and len(numbers) == 6:
                return cls(cluster_id, *(fields.integer(number, "a counter", 0, _COUNTER_MAX) for number in numbers))
        raise ValueError(f"not the placement group's counters of format {FORMAT}: {value!r:.200}")
