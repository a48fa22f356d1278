"""What a node does with a Raft message for one of its replicas, known or unknown.

Pure: ids in, a decision out. The rules (traps 2, 3; replica ids of a range only grow, and are never used twice):

* A replica that was removed stays removed: a message for an id at or below the tombstone is answered *gone*.
* Only a message from a leader (append, heartbeat, snapshot) makes a replica: a vote is no proof of being a member.
* A replica that was made so, and has no state yet, is spoken to and may vote, but it neither campaigns (it has no idea
  of the members) nor owns a span (:mod:`spans`).
* A leader's message for a higher id than the replica here says that the one here was removed without being told.
"""

from enum import Enum
from typing import Final

from shardkv.raft.messages import MessageType
from shardkv.types import ReplicaId

_FROM_LEADER: Final = frozenset({MessageType.APP, MessageType.HEARTBEAT, MessageType.SNAP})


class Admission(Enum):
    DELIVER = "deliver"
    """Step it into the replica here."""
    CREATE = "create"
    """Make a replica with the id, without state, its creation a synced log record; then deliver."""
    SUPERSEDE = "supersede"
    """The replica here was removed: end it (tombstone first), then make one with the new id and deliver."""
    IGNORE = "ignore"
    """Drop it; the sender will try again if it matters."""
    GONE = "gone"
    """Tell the sender that the replica it means was removed, and drop it."""


def admit_message(
    message_type: MessageType,
    *,
    to: ReplicaId,
    local: ReplicaId | None,
    tombstone: ReplicaId | None,
    initialised: bool = True,
) -> Admission:
    """Decide about a message for replica ``to`` of a range.

    ``local`` is the id of the replica of that range here, None if there is none; ``initialised`` says whether it has
    state. ``tombstone`` is the highest id of a removed replica of that range here, None if there never was one.
    """
    assert local is None or tombstone is None or local > tombstone, f"replica {local} lives below tombstone {tombstone}"
    if tombstone is not None and to <= tombstone:
        return Admission.GONE
    if local == to:
        if message_type is MessageType.TIMEOUT_NOW and not initialised:
            return Admission.IGNORE
        return Admission.DELIVER
    if local is not None and to < local:
        return Admission.GONE
    if message_type not in _FROM_LEADER:
        return Admission.IGNORE
    return Admission.CREATE if local is None else Admission.SUPERSEDE


def may_campaign(*, initialised: bool, installing: bool = False) -> bool:
    """Whether a replica may ask for votes: it must have state, whole (trap 2)."""
    return initialised and not installing
