"""What happens to a proposal: it becomes an entry of the leader's log, is passed on to the leader, or is dropped.

A dropped proposal was certainly not appended; ``ProposalDropped`` says why. A membership change that may not be
proposed now becomes an empty entry when it comes as a message, as in etcd; the host's own face refuses it instead.
"""

from shardkv.raft import replication
from shardkv.raft.errors import DropReason, ProposalDropped
from shardkv.raft.membership import decode_conf_change, is_joint, leaves_joint
from shardkv.raft.messages import NONE, Entry, EntryType, Message
from shardkv.raft.state import Raft

_VOID = Entry(0, 0)


def leader_propose(raft: Raft, message: Message) -> None:
    entries = message.entries
    assert entries, "a proposal without entries"
    refuse_unless_open(raft)
    pending = raft.pending_conf_index
    if any(entry.type != EntryType.NORMAL for entry in entries):
        entries = tuple(_admit(raft, entry, position) for position, entry in enumerate(entries))
    try:
        append_and_send(raft, entries)
    except ProposalDropped:
        raft.pending_conf_index = pending  # there is no change under way after all
        raise


def refuse_unless_open(raft: Raft) -> None:
    """Raises ``ProposalDropped`` when this leader takes no proposals at all."""
    if raft.id not in raft.progress:
        raise ProposalDropped(DropReason.NOT_A_MEMBER)
    if raft.transferee != NONE:
        raise ProposalDropped(DropReason.TRANSFERRING)


def append_and_send(raft: Raft, entries: tuple[Entry, ...]) -> None:
    if not raft.append(entries):
        raise ProposalDropped(DropReason.UNCOMMITTED_LIMIT)
    replication.broadcast_entries(raft, entries)


def conf_change_refusal(raft: Raft, data: bytes) -> DropReason | None:
    """Why a membership change may not be proposed now, or None if it may (trap 9)."""
    if raft.settings.disable_conf_change_validation:
        return None
    if raft.pending_conf_index > raft.log.applied:
        return DropReason.CHANGE_PENDING
    joint, wants_to_leave = is_joint(raft.configuration), leaves_joint(decode_conf_change(data))
    if joint and not wants_to_leave:
        return DropReason.JOINT
    if wants_to_leave and not joint:
        return DropReason.NOT_JOINT
    return None


def _admit(raft: Raft, entry: Entry, position: int) -> Entry:
    if entry.type == EntryType.NORMAL:
        return entry
    if conf_change_refusal(raft, entry.data) is not None:
        return _VOID
    raft.pending_conf_index = raft.log.last_index + position + 1
    return entry


def follower_propose(raft: Raft, message: Message) -> None:
    if raft.leader == NONE:
        raise ProposalDropped(DropReason.NO_LEADER)
    if raft.settings.disable_proposal_forwarding:
        raise ProposalDropped(DropReason.NOT_LEADER)
    forward(raft, message)


def candidate_propose(raft: Raft, message: Message) -> None:
    raise ProposalDropped(DropReason.NO_LEADER)


def forward(raft: Raft, message: Message) -> None:
    """Pass a local request on to the leader, in a message of its own."""
    raft.send(Message(message.type, raft.leader, message.from_, entries=message.entries, context=message.context))
