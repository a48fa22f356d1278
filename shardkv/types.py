"""The nouns that every layer shares: ids, key ranges, epochs, replicas, descriptors and timestamps.

Pure values: nothing here does I/O, knows a wire format or changes after it is made.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Final, NamedTuple, NewType

NodeId = NewType("NodeId", int)
"""Allocated by the placement group, never reused."""
RangeId = NewType("RangeId", int)
ReplicaId = NewType("ReplicaId", int)
"""Unique within the cluster and never reused; it is also the replica's identity in its Raft group."""

PLACEMENT_RANGE: Final = RangeId(0)
"""The placement driver's own Raft group. It owns no user keys."""
FIRST_RANGE: Final = RangeId(1)
"""The range that a new cluster starts with; it spans every key."""

CLUSTER_ID_BYTES: Final = 16
TOKEN_BYTES: Final = 16
"""Of the random tokens that tell one data directory, or one start of a node, from another."""
LINEAGE_MAX: Final = 16
"""The tokens of so many starts, the last ones, a node's directory keeps, and its greetings tell."""

# The placement group refuses the start of a node that has more of these, so a configuration is held to them.
NAME_BYTES_MAX: Final = 64
"""Of a node's name, and of a label's key, and of its value."""
ADDRESS_BYTES_MAX: Final = 256
LABELS_MAX: Final = 32

KEY_BYTES_MAX: Final = 4 * 1024
VALUE_BYTES_MAX: Final = 1024 * 1024

SESSION_BYTES: Final = 16
SESSION_WINDOW_MAX: Final = 1_024
"""A command's sequence may be at most this far above the session's lowest unsettled sequence."""
SESSION_AGE_MS_MAX: Final = 60_000
"""A command issued longer ago than this, by replicated time, is refused as too old."""


def branches_off(boot: int, tokens: Sequence[bytes], known_boot: int, known_token: bytes) -> bool:
    """Whether a node's start is neither an earlier one that is known nor any that came after that: then one of the two
    was on a copy of the node's data directory.

    ``tokens`` are those of start ``boot`` and of the starts right before it, newest first; one that is empty is not
    known. False, too, where they do not reach back so far.
    """
    back = boot - known_boot
    if not 0 <= back < len(tokens):
        return False
    token = tokens[back]
    return bool(token) and bool(known_token) and token != known_token


class KeyRange(NamedTuple):
    """The keys from ``start`` (included) to ``end`` (excluded); ``end`` None has no upper bound."""

    start: bytes
    end: bytes | None

    def contains(self, key: bytes) -> bool:
        return key >= self.start and (self.end is None or key < self.end)

    def covers(self, other: "KeyRange") -> bool:
        """Whether every key of ``other`` lies in this range."""
        if other.start < self.start:
            return False
        return self.end is None or (other.end is not None and other.end <= self.end)

    def overlaps(self, other: "KeyRange") -> bool:
        return (self.end is None or other.start < self.end) and (other.end is None or self.start < other.end)

    @property
    def empty(self) -> bool:
        return self.end is not None and self.end <= self.start


EVERY_KEY: Final = KeyRange(b"", None)


class Epoch(NamedTuple):
    """Two generations that only grow: of the replica set, and of the key span."""

    membership: int
    span: int


class Fullness(IntEnum):
    """How little room a node's disk has left, and so what the node takes on. See ``multiraft.space``."""

    ROOMY = 0
    SHORT = 1
    """It takes everything, but others should lead."""
    LOW = 2
    """It refuses client writes that are not deletes."""
    FULL = 3
    """It refuses every client write, and data of other nodes' leaders."""


class ReplicaRole(IntEnum):
    VOTER = 0
    LEARNER = 1


_ROLES: Final = tuple(ReplicaRole)
"""By their numbers: calling the enumeration looks it up the slow way."""


class Member(NamedTuple):
    """A replica as its range's descriptor names it: the node that holds it, and its id. What runs there is
    :class:`shardkv.multiraft.replica.Replica`."""

    node_id: NodeId
    replica_id: ReplicaId
    role: ReplicaRole = ReplicaRole.VOTER


@dataclass(frozen=True, slots=True)
class RangeDescriptor:
    """What a range is: its span, its replicas and the epoch at which both hold.

    Of two descriptors that overlap, the one with the larger span generation is the newer.
    """

    range_id: RangeId
    span: KeyRange
    epoch: Epoch
    replicas: tuple[Member, ...]

    def replica_on(self, node_id: NodeId) -> Member | None:
        return next((replica for replica in self.replicas if replica.node_id == node_id), None)

    def replica(self, replica_id: ReplicaId) -> Member | None:
        for replica in self.replicas:  # asked for every message, and a generator costs three times as much
            if replica.replica_id == replica_id:
                return replica
        return None

    def with_span(self, span: KeyRange, epoch: Epoch) -> "RangeDescriptor":
        return replace(self, span=span, epoch=epoch)

    def newer_than(self, other: "RangeDescriptor") -> bool:
        """Whether this supersedes ``other``, a descriptor of the same range or of an overlapping one."""
        mine, theirs = self.epoch, other.epoch
        if self.range_id == other.range_id:
            return (mine.span, mine.membership) > (theirs.span, theirs.membership)
        return mine.span > theirs.span

    def to_wire(self) -> list[object]:
        return [
            self.range_id,
            self.span.start,
            self.span.end,
            self.epoch.membership,
            self.epoch.span,
            [[replica.node_id, replica.replica_id, int(replica.role)] for replica in self.replicas],
        ]

    @classmethod
    def from_wire(cls, fields: object) -> "RangeDescriptor":
        """The inverse of :meth:`to_wire`. Raises ``ValueError`` for anything of another shape."""
        match fields:
            case [
                int(range_id),
                bytes(start),
                bytes() | None as end,
                int(membership),
                int(span),
                [*replicas],
            ]:
                return cls(
                    RangeId(range_id),
                    KeyRange(start, end),
                    Epoch(membership, span),
                    tuple(_member_from_wire(replica) for replica in replicas),
                )
        raise ValueError(f"not a range descriptor: {fields!r:.200}")


def _member_from_wire(fields: object) -> Member:
    # A client that looks for leaders parses these by the thousand, and a pattern costs three times as much.
    if type(fields) is list and len(fields) == 3:
        node_id, replica_id, role = fields
        if type(node_id) is int and type(replica_id) is int and type(role) is int and 0 <= role < len(_ROLES):
            return Member(NodeId(node_id), ReplicaId(replica_id), _ROLES[role])
    raise ValueError(f"not a replica: {fields!r:.200}")


# A timestamp (and so a key's version) is a hybrid logical clock reading in one int:
# 46 bits of milliseconds since 1970 above an 18-bit counter. It fits a signed 64-bit field.

TIMESTAMP_COUNTER_BITS: Final = 18
TIMESTAMP_MAX: Final = (1 << 64) - 1


def timestamp_at(milliseconds: int, counter: int = 0) -> int:
    return (milliseconds << TIMESTAMP_COUNTER_BITS) | counter


def timestamp_ms(timestamp: int) -> int:
    return timestamp >> TIMESTAMP_COUNTER_BITS


class Entry(NamedTuple):
    """A key as a read found it. ``version`` grows with every write of the key, across deletes too."""

    key: bytes
    value: bytes
    version: int
