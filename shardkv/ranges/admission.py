"""What a node does with a Raft message for one of its replicas, known or unknown.

Pure: ids in, a decision out. The rules (traps 2, 3; replica ids of a range only grow, and are never used twice):

* A replica that was removed stays removed: a message for an id at or below the tombstone is answered *gone*.
* A leader's message (append, heartbeat, snapshot) makes a replica, and so does a request for a vote, where no replica
  of the range is and the id lies above every tombstone. An answer never does.
* A replica that was made so, and has no state yet, is spoken to and may vote, but it neither campaigns (it has no idea
  of the members) nor owns a span (:mod:`spans`).
* Only a leader's message ends a replica that is here for one with a higher id: a vote is no proof of being a member.
* A leader's message for a higher id than the replica here says that the one here was removed without being told.

Nothing removes a replica in this version: whatever is neither delivered nor makes a replica is dropped.

Why a vote may make a replica. A voter need not know that it is one: a node that got the left half of a split by a
snapshot never applies the split, and hears of the right half only by a message. If the right half's leader dies before
its first, the request for a vote is that message, and with three voters nobody is elected without it. It is safe: the
making and every vote and append are synced before they are answered, and a removal leaves its tombstone, so where there
is neither replica nor tombstone nothing was ever promised or acknowledged under this id or a later one; the empty
log of the new replica is all that it could have. A split that comes later adopts its term and vote (traps 2, 20).
"""

from enum import Enum
from typing import Final

from shardkv.raft.messages import MessageType
from shardkv.types import ReplicaId

_FROM_LEADER: Final = frozenset({MessageType.APP, MessageType.HEARTBEAT, MessageType.SNAP})
_MAKES_REPLICA: Final = _FROM_LEADER | {MessageType.PRE_VOTE, MessageType.VOTE}


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
    if local is None:
        return Admission.CREATE if message_type in _MAKES_REPLICA else Admission.IGNORE
    return Admission.SUPERSEDE if message_type in _FROM_LEADER else Admission.IGNORE
