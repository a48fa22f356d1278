"""What goes wrong inside the Raft core. None of these reaches a user; the host maps them once, at the edge."""

from enum import Enum


class RaftError(Exception):
    """The root of the core's own exceptions."""


class Compacted(RaftError):
    """The entry was asked for by index, and the log no longer holds it; a snapshot does."""


class Unavailable(RaftError):
    """The entry was asked for by index, and the log does not hold it yet."""


class SnapshotTemporarilyUnavailable(RaftError):
    """The storage needs time to make a snapshot; the core asks again later."""


class SnapshotOutOfDate(RaftError):
    """A snapshot older than the one that the storage has."""


class Inconsistent(RaftError):
    """What a peer or the storage says cannot be true of this log: it was lost, truncated or mixed up.

    A message that raised this is to be dropped: the log is as it was before it.
    """


class InvalidConfChange(RaftError):
    """A membership change that does not apply to the configuration it met."""


class DropReason(Enum):
    """Why a proposal was not taken. In every case certainly nothing was appended."""

    NO_LEADER = "no leader is known"
    NOT_LEADER = "this replica does not lead and does not forward"
    NOT_A_MEMBER = "this leader was removed from the group"
    TRANSFERRING = "leadership is being handed over"
    UNCOMMITTED_LIMIT = "too many bytes wait to be committed"
    CHANGE_PENDING = "an earlier membership change may not be applied yet"
    TERM_NOT_COMMITTED = "no entry of this leader's term is committed yet"
    JOINT = "the joint configuration must be left first"
    NOT_JOINT = "there is no joint configuration to leave"


class ProposalDropped(RaftError):
    """The proposal was refused; ``reason`` says why."""

    def __init__(self, reason: DropReason) -> None:
        super().__init__(reason.value)
        self.reason = reason
