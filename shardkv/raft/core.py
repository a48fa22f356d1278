"""What each message causes: the table by role and message type, and the rules about terms that come before it.

Everything that changes a replica goes through :func:`step`, :func:`tick` or :func:`reconfiguration.apply_conf_change`.
"""

from collections.abc import Callable
from typing import Final

from shardkv.raft import election, proposals, reconfiguration, replication
from shardkv.raft.messages import NONE, Message, MessageType
from shardkv.raft.state import Raft, Role
from shardkv.raft.storage import ENTRY_OVERHEAD_BYTES, payload_bytes

Handler = Callable[[Raft, Message], None]

TERM_JUMP_MAX: Final = 1 << 32
"""How far a later term may lie ahead: more than a century of elections, ten a second each second."""

_M = MessageType
_FROM_LEADER = (_M.APP, _M.HEARTBEAT, _M.SNAP)


def step(raft: Raft, message: Message) -> None:
    """Take one message. Raises ``ProposalDropped`` for proposals only."""
    term = message.term
    # No term: a local message, or a request that any leader may answer.
    if term and term != raft.term:
        if term < raft.term:
            _earlier_term(raft, message)
            return
        if not _later_term(raft, message):
            return
    handler = _HANDLERS[raft.role][message.type]
    if handler is not None:
        handler(raft, message)


def _later_term(raft: Raft, message: Message) -> bool:
    """A message of a term that begins for this replica with it. False when it is to be ignored."""
    kind = message.type
    if message.term - raft.term > TERM_JUMP_MAX:
        return False  # no election got there, and whoever followed could soon campaign in no term that there is
    if kind in (_M.VOTE, _M.PRE_VOTE) and election.ignores_request(raft, message):
        return False
    # Asking about a term, and being granted that, does not begin it (thesis 9.6).
    if kind == _M.PRE_VOTE or (kind == _M.PRE_VOTE_RESP and not message.reject):
        return True
    raft.become_follower(message.term, message.from_ if kind in _FROM_LEADER else NONE)
    return True


def _earlier_term(raft: Raft, message: Message) -> None:
    kind = message.type
    if kind in (_M.HEARTBEAT, _M.APP):
        # Of a leader that was deposed, or this replica went ahead of a leader that the others follow. As votes may be
        # ignored then, the leader has to hear of the later term, else this replica could never join again.
        if raft.settings.check_quorum or raft.settings.pre_vote:
            raft.send(Message(_M.APP_RESP, message.from_))
    elif kind == _M.PRE_VOTE:
        # Without an answer two replicas, one with the longer log and one with the later term, would wait for ever.
        raft.send(Message(_M.PRE_VOTE_RESP, message.from_, term=raft.term, reject=True))
    elif kind == _M.STORAGE_APPEND_RESP and message.snapshot is not None:
        # The entries of an earlier term may have been overwritten while they were written, so their being on disk now
        # proves nothing (trap 10); a snapshot holds what is committed, whatever the term.
        reconfiguration.applied_snapshot(raft, message.snapshot)


def tick(raft: Raft) -> None:
    """One tick of the host's clock has passed."""
    if raft.role == Role.LEADER:
        election.tick_leader(raft)
    else:
        election.tick_election(raft)


def _storage_append_response(raft: Raft, message: Message) -> None:
    if message.index:
        raft.log.stable_to(message.index, message.log_term)
    if message.snapshot is not None:
        reconfiguration.applied_snapshot(raft, message.snapshot)


def _storage_apply_response(raft: Raft, message: Message) -> None:
    entries = message.entries
    if entries:
        size = payload_bytes(entries)
        reconfiguration.applied_to(raft, entries[-1].index, size + ENTRY_OVERHEAD_BYTES * len(entries))
        raft.applied_bytes(size)


_EVERY_ROLE: Final[dict[MessageType, Handler]] = {
    _M.HUP: election.hup,
    _M.VOTE: election.handle_vote_request,
    _M.PRE_VOTE: election.handle_vote_request,
    _M.STORAGE_APPEND_RESP: _storage_append_response,
    _M.STORAGE_APPLY_RESP: _storage_apply_response,
}
_FOLLOWER: Final[dict[MessageType, Handler]] = {
    _M.PROP: proposals.follower_propose,
    _M.APP: replication.follower_append,
    _M.HEARTBEAT: replication.follower_heartbeat,
    _M.SNAP: reconfiguration.follower_snapshot,
    _M.TRANSFER_LEADER: election.follower_transfer,
    _M.TIMEOUT_NOW: election.follower_timeout_now,
    _M.FORGET_LEADER: election.follower_forget_leader,
    _M.READ_INDEX: election.follower_read_index,
    _M.VOTE_RESP: election.follower_vote_response,
    _M.READ_INDEX_RESP: replication.follower_read_index_response,
}
_CANDIDATE: Final[dict[MessageType, Handler]] = {
    _M.PROP: proposals.candidate_propose,
    _M.APP: replication.candidate_append,
    _M.HEARTBEAT: replication.candidate_heartbeat,
    _M.SNAP: reconfiguration.candidate_snapshot,
    _M.VOTE_RESP: election.candidate_vote_response,
    _M.PRE_VOTE_RESP: election.candidate_vote_response,
}
_LEADER: Final[dict[MessageType, Handler]] = {
    _M.BEAT: replication.leader_beat,
    _M.CHECK_QUORUM: election.leader_check_quorum,
    _M.PROP: proposals.leader_propose,
    _M.READ_INDEX: replication.leader_read_index,
    _M.APP_RESP: replication.leader_append_response,
    _M.HEARTBEAT_RESP: replication.leader_heartbeat_response,
    _M.SNAP_STATUS: replication.leader_snapshot_status,
    _M.UNREACHABLE: replication.leader_unreachable,
    _M.TRANSFER_LEADER: election.leader_transfer,
}


def _row(handlers: dict[MessageType, Handler]) -> tuple[Handler | None, ...]:
    return tuple((_EVERY_ROLE | handlers).get(kind) for kind in MessageType)


_HANDLERS: Final = tuple(_row({Role.FOLLOWER: _FOLLOWER, Role.LEADER: _LEADER}.get(role, _CANDIDATE)) for role in Role)
"""By role, then by message type; None where a role has no use for a message."""
