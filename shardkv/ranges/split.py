"""Planning a split, and what a node makes of its right half.

Pure. The dividing itself is replicated and lives in :mod:`shardkv.machine.split`; here are the leader's check before it
proposes, which is the same check that applying makes (trap 4), and each node's decision on the right half's replica.
"""

from collections.abc import Mapping
from enum import Enum

from shardkv.errors import InvalidRange, KeyTooLarge
from shardkv.machine.split import SplitCommand, problem
from shardkv.types import KEY_BYTES_MAX, NodeId, RangeDescriptor, RangeId, ReplicaId


def plan_split(
    descriptor: RangeDescriptor,
    split_key: bytes,
    right_range_id: RangeId,
    right_replicas: Mapping[NodeId, ReplicaId],
    *,
    joint: bool = False,
) -> SplitCommand:
    """The command that splits ``descriptor`` at ``split_key``, for its leader to propose.

    ``right_replicas`` gives each node of the range an id for its replica of the right half, freshly allocated.

    Raises:
        InvalidRange: the key does not lie strictly inside, or nodes and ids do not match.
        KeyTooLarge: the key is longer than a key may be.
        Unavailable: the range is changing its replicas (``joint``).
    """
    if len(split_key) > KEY_BYTES_MAX:
        raise KeyTooLarge(f"a split key may have {KEY_BYTES_MAX} bytes, this one has {len(split_key)}")
    missing = [replica.node_id for replica in descriptor.replicas if replica.node_id not in right_replicas]
    if missing:
        raise InvalidRange(f"a split of range {descriptor.range_id} has no replica ids for nodes {missing}")
    command = SplitCommand(
        descriptor.epoch,
        split_key,
        right_range_id,
        tuple((replica.node_id, right_replicas[replica.node_id]) for replica in descriptor.replicas),
    )
    error = problem(descriptor, command, joint=joint)
    if error is not None:
        raise error
    return command


class RightHalf(Enum):
    """What becomes of the right half of an applied split on this node."""

    CREATE = "create"
    """No replica of it is here: make one, its creation a log record before the batch."""
    ADOPT = "adopt"
    """A message was faster and made the replica: give it the state; term, vote and log stay as they are (trap 20)."""
    KEEP = "keep"
    """It is here already, with state: this is a replay. Write nothing of it, delete nothing."""
    DROP = "drop"
    """It was here and was removed, or a newer one has taken its place: its data go, nothing is overwritten."""


def adopt(
    right: ReplicaId, *, local: ReplicaId | None, initialised: bool = False, tombstone: ReplicaId | None = None
) -> RightHalf:
    """Decide about replica ``right`` of a split's right half.

    ``local`` is the id of that range's replica here (None: none) and ``initialised`` whether it has state;
    ``tombstone`` the highest id of a removed one. Ids grow, and the split allots the first, so ``local`` is no lower.
    """
    assert local is None or local >= right, f"replica {local} is older than the split that first made {right}"
    if tombstone is not None and right <= tombstone:
        return RightHalf.DROP
    if local is None:
        return RightHalf.CREATE
    if local != right:
        return RightHalf.DROP
    return RightHalf.KEEP if initialised else RightHalf.ADOPT
