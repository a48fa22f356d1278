"""Dividing a descriptor in two, as every replica does it when it applies a split.

Pure: descriptors in, descriptors out. Whether and where to split is decided elsewhere (:mod:`size`,
:mod:`shardkv.ranges`); moving sessions and writing rows is :mod:`machine`'s. The rule (trap 4): a split was planned
against one epoch and divides that epoch only, however the range has come to look the same again since.
"""

from dataclasses import dataclass, replace

from shardkv.errors import EpochMismatch, InvalidRange, ShardKVError, Unavailable
from shardkv.types import Epoch, KeyRange, Member, NodeId, RangeDescriptor, RangeId, ReplicaId


@dataclass(frozen=True, slots=True)
class SplitCommand:
    """What a split entry says."""

    epoch: Epoch
    """Of the range as the split was planned."""
    split_key: bytes
    """The right half's first key."""
    right_range_id: RangeId
    right_replicas: tuple[tuple[NodeId, ReplicaId], ...]
    """For each node that holds a replica of the range, the new id of its replica of the right half."""


def problem(descriptor: RangeDescriptor, command: SplitCommand, *, joint: bool) -> ShardKVError | None:
    """Why ``command`` must not divide ``descriptor``, or None. The same answer on every replica.

    ``joint``: the range is between two replica sets, so that it is open which of them the halves should have.
    """
    if command.epoch != descriptor.epoch:
        return EpochMismatch(
            f"range {descriptor.range_id} is at epoch {tuple(descriptor.epoch)}, "
            f"the split was planned at {tuple(command.epoch)}",
            current=(descriptor,),
        )
    if joint:
        return Unavailable(f"range {descriptor.range_id} is changing its replicas; split it when that is done")
    if command.split_key <= descriptor.span.start or not descriptor.span.contains(command.split_key):
        return InvalidRange(
            f"a split key must lie inside the range, above its start: {command.split_key!r} is not in "
            f"{descriptor.span.start!r} to {descriptor.span.end!r}"
        )
    nodes = sorted(replica.node_id for replica in descriptor.replicas)
    if sorted(node_id for node_id, _ in command.right_replicas) != nodes:
        return InvalidRange(
            f"a split of range {descriptor.range_id} must name one new replica for each node of {nodes}"
        )
    ids = {replica_id for _, replica_id in command.right_replicas}
    if len(ids) != len(nodes) or any(replica.replica_id in ids for replica in descriptor.replicas):
        return InvalidRange("a split must give its new replicas ids of their own")
    if command.right_range_id == descriptor.range_id:
        return InvalidRange("a split must give its right half an id of its own")
    return None


def raised(*epochs: Epoch) -> Epoch:
    """The epoch after a change that involves ranges at ``epochs``: in both generations above all of them."""
    return Epoch(
        max(epoch.membership for epoch in epochs) + 1,
        max(epoch.span for epoch in epochs) + 1,
    )


def divide(descriptor: RangeDescriptor, command: SplitCommand) -> tuple[RangeDescriptor, RangeDescriptor]:
    """The halves: the left keeps id and replicas, the right has new ones on the same nodes in the same roles."""
    epoch = raised(descriptor.epoch)
    ids = dict(command.right_replicas)
    left = descriptor.with_span(KeyRange(descriptor.span.start, command.split_key), epoch)
    right = replace(
        descriptor,
        range_id=command.right_range_id,
        span=KeyRange(command.split_key, descriptor.span.end),
        epoch=epoch,
        replicas=tuple(Member(replica.node_id, ids[replica.node_id], replica.role) for replica in descriptor.replicas),
    )
    return left, right
