"""Deliberate bugs in the Raft core: votes, commitment, the lease, confirmed reads."""

from collections.abc import Iterable
from functools import partial
from typing import Any

from shardkv.multiraft import catalog, turn
from shardkv.multiraft.catalog import Catalog
from shardkv.multiraft.driver import Driver
from shardkv.multiraft.replica import Replica
from shardkv.raft import core, election, lease, reads, replication
from shardkv.raft.log import RaftLog
from shardkv.raft.messages import NONE, HardState, Message, MessageType
from shardkv.raft.node import RaftNode, Ready
from shardkv.raft.quorum import majority_value
from shardkv.raft.settings import RaftSettings
from shardkv.raft.state import Raft, Role
from tests.simulation.bugs.table import Bug, Patches, patch


def handled(role: Role, kind: MessageType, handler: core.Handler) -> Any:
    """The core with another handler for one kind of message."""
    table = [list(row) for row in core._HANDLERS]
    table[role][kind] = handler
    return patch.object(core, "_HANDLERS", tuple(map(tuple, table)))


# What is on disk before what is said


def early(kinds: frozenset[MessageType], *, sync: bool) -> Patches:
    """Answers of these kinds leave before what they rest on is on disk; without ``sync`` that is not even begun."""
    original = RaftNode.ready

    def ready(node: RaftNode) -> Ready:
        found = original(node)
        for message in found.messages:
            if message.type is MessageType.STORAGE_APPEND:
                own = node.raft.id
                said = [each for each in message.responses if each.type in kinds and each.to != own]
                message.responses = tuple(each for each in message.responses if each not in said)
                found.messages.extend(said)
                if said and not sync and not found.entries and not message.responses and found.snapshot is None:
                    return found._replace(must_sync=False)
        return found

    return [patch.object(RaftNode, "ready", ready)]


def vote_without_sync() -> Patches:
    return early(frozenset({MessageType.VOTE_RESP}), sync=False)


def vote_before_sync() -> Patches:
    return early(frozenset({MessageType.VOTE_RESP}), sync=True)


def votes_asked_for_before_sync() -> Patches:
    return [patch.object(catalog, "RaftSettings", partial(RaftSettings, durable_candidacy=False))]


def append_before_sync() -> Patches:
    return early(frozenset({MessageType.APP_RESP}), sync=True)


def vote_not_logged() -> Patches:
    def hard_state_of(message: Message) -> HardState | None:
        found = HardState(message.term, NONE, message.commit)
        return None if found == HardState() else found

    return [patch.object(turn, "hard_state_of", hard_state_of)]


# Who may lead, and what is committed


def double_vote() -> Patches:
    def vote(raft: Raft, message: Message) -> None:
        raft.vote = raft.leader = NONE
        election.handle_vote_request(raft, message)

    return [handled(Role.FOLLOWER, MessageType.VOTE, vote)]


def vote_for_a_shorter_log() -> Patches:
    return [patch.object(RaftLog, "is_up_to_date", lambda log, index, term: True)]


def commit_by_one() -> Patches:
    return [patch.object(replication, "majority_value", max)]


def commit_an_old_term() -> Patches:
    def maybe_commit(raft: Raft) -> bool:
        index = majority_value([raft.progress[id_].match for id_ in raft.configuration.voters])
        if raft.configuration.voters_outgoing:
            index = min(index, majority_value([raft.progress[id_].match for id_ in raft.configuration.voters_outgoing]))
        if raft.log.committed < index <= raft.log.last_index:
            raft.log.commit_to(index)
            return True
        return False

    return [patch.object(replication, "maybe_commit", maybe_commit)]


def one_entry_at_a_time() -> Patches:
    settings = partial(RaftSettings, message_bytes_max=1, inflight_messages_max=1)
    return [patch.object(catalog, "RaftSettings", settings)]


def acknowledged_as_it_is_now() -> Patches:
    """When a write is done, what is acknowledged is the log as it is by then, whoever has changed it since."""
    original, earlier_term = Driver._deliver, core._earlier_term

    def deliver(driver: Driver, replica: Replica, responses: Iterable[Message], *rest: Any) -> None:
        raft = replica.raft.raft
        for response in responses:
            if response.type is MessageType.APP_RESP and not response.reject and raft.leader not in (NONE, raft.id):
                response.term, response.to, response.index = raft.term, raft.leader, raft.log.last_index
        original(driver, replica, responses, *rest)

    def any_term(raft: Raft, message: Message) -> None:
        handler = core._HANDLERS[raft.role][message.type]
        if message.type is MessageType.STORAGE_APPEND_RESP and handler is not None:
            handler(raft, message)
        else:
            earlier_term(raft, message)

    return [patch.object(Driver, "_deliver", deliver), patch.object(core, "_earlier_term", any_term)]


def append_anywhere() -> Patches:
    return [patch.object(RaftLog, "matches", lambda log, index, term: index <= log.last_index)]


def commit_what_is_not_there() -> Patches:
    def broadcast_heartbeat(raft: Raft) -> None:
        context = reads.heartbeat_context(raft)
        for id_ in raft.progress:
            if id_ != raft.id:
                commit = raft.log.committed
                heartbeat = Message(MessageType.HEARTBEAT, id_, raft.id, raft.term, commit=commit, context=context)
                lease.stamp(raft, heartbeat)
                raft.messages.append(heartbeat)

    return [patch.object(replication, "broadcast_heartbeat", broadcast_heartbeat)]


# Reads


def lease_without_end() -> Patches:
    def valid(raft: Raft, now: int) -> bool:
        return (
            raft.lease_until > 0
            and not raft.lease_suspended
            and raft.transferee == NONE
            and raft.committed_in_term
        )  # fmt: skip

    return [patch.object(lease, "valid", valid)]


def lease_by_an_old_look() -> Patches:
    original = lease.valid

    def valid(raft: Raft, now: int) -> bool:
        return original(raft, raft.now)

    return [patch.object(lease, "valid", valid)]


def lease_through_a_transfer() -> Patches:
    def send_timeout_now(raft: Raft, to: int) -> None:
        raft.send(Message(MessageType.TIMEOUT_NOW, to))

    def valid(raft: Raft, now: int) -> bool:
        return now < raft.lease_until and raft.committed_in_term

    return [patch.object(lease, "send_timeout_now", send_timeout_now), patch.object(lease, "valid", valid)]


def no_refusal_after_a_restart() -> Patches:
    original = Catalog._raft_node

    def raft_node(self: Catalog, *arguments: Any, **how: Any) -> RaftNode:
        self._refuse_until_ns = 0
        return original(self, *arguments, **how)

    return [patch.object(Catalog, "_raft_node", raft_node)]


def promises_are_not_kept() -> Patches:
    return [patch.object(lease, "refuses", lambda raft: False)]


def read_index_of_an_old_term() -> Patches:
    def read_index(raft: Raft, message: Message) -> None:
        replication._confirm_read(raft, message)

    return [handled(Role.LEADER, MessageType.READ_INDEX, read_index)]


def read_index_unconfirmed() -> Patches:
    def read_index(raft: Raft, message: Message) -> None:
        if raft.committed_in_term:
            reads.answer(raft, message, raft.log.committed)
        else:
            reads.postpone(raft, message)

    return [handled(Role.LEADER, MessageType.READ_INDEX, read_index)]


def read_before_apply() -> Patches:
    original = Replica.serve_confirmed

    def serve_confirmed(replica: Replica) -> None:
        if replica.confirmed:
            replica.confirmed = [(0, batch, asked_ns) for _, batch, asked_ns in replica.confirmed]
        original(replica)

    return [patch.object(Replica, "serve_confirmed", serve_confirmed)]


_CRASHES = ("turncoat", "slow-disk")
_SPLIT_BRAINS = ("depose",)

BUGS = (
    Bug("vote-not-synced", "a vote is on disk before it is told (trap 10)", vote_without_sync, _CRASHES, 1),
    Bug(
        "vote-before-sync",
        "hard state before the message (trap 10)",
        vote_before_sync,
        ("turncoat",),
        1,
        minutes=0.4,
        rate=10,
    ),
    Bug(
        "votes-asked-for-before-sync",
        "a candidate's own vote is on disk before it asks for others' (trap 10)",
        votes_asked_for_before_sync,
        ("amnesia",),
        1,
    ),
    Bug("vote-not-logged", "term and vote survive a restart (Raft, figure 2)", vote_not_logged, _CRASHES, 1),
    Bug(
        "acknowledged-before-fsync",
        "an append is on disk before it is acknowledged (trap 10)",
        append_before_sync,
        ("stall", "blackout", "sudden"),
        7,
    ),
    Bug("two-votes-in-a-term", "one vote a term (Raft, 5.2)", double_vote, ("relay", "slow"), 16),
    Bug("vote-for-a-shorter-log", "election restriction (Raft, 5.4.1)", vote_for_a_shorter_log, ("depose", "kill"), 1),
    Bug("commit-without-quorum", "a majority commits (Raft, 5.3)", commit_by_one, ("depose", "kill"), 1),
    Bug(
        "commit-of-an-old-term",
        "only entries of the own term are committed by counting (Raft, 5.4.2)",
        commit_an_old_term,
        ("relay",),
        9,
        minutes=0.4,
        rate=60,
        tuning=one_entry_at_a_time,
    ),
    Bug(
        "aba-acknowledgement",
        "an acknowledgement says what was written when it was made, in its term only (trap 10)",
        acknowledged_as_it_is_now,
        ("slow-disk",),
        1,
        rate=100,
    ),
    Bug("append-without-a-match", "log matching (Raft, 5.3)", append_anywhere, ("depose", "loss", "reorder"), 1),
    Bug("commit-beyond-the-match", "a heartbeat commits what is there", commit_what_is_not_there, ("kill",), 1),
    Bug(
        "lease-past-its-end",
        "no read under a lease that has ended (trap 7)",
        lease_without_end,
        _SPLIT_BRAINS,
        1,
        workload="registers",
        rate=100,
    ),
    Bug(
        "lease-by-an-old-look",
        "the clock is read after the request came, also by a process that slept meanwhile (trap 7)",
        lease_by_an_old_look,
        ("sleeper",),
        6,
        workload="registers",
        rate=100,
    ),
    Bug(
        "lease-through-a-transfer",
        "no lease once a TimeoutNow was sent (trap 6)",
        lease_through_a_transfer,
        ("handover",),
        1,
        workload="registers",
        rate=100,
    ),
    Bug(
        "restart-without-refusal",
        "no votes for the length of a promise after a start (trap 7)",
        no_refusal_after_a_restart,
        ("usurp",),
        4,
        workload="registers",
        rate=100,
    ),
    Bug(
        "promise-not-kept",
        "whoever promised a leader its lease elects nobody else (DESIGN 4.5)",
        promises_are_not_kept,
        ("usurp",),
        4,
        workload="registers",
        rate=100,
    ),
    Bug(
        "read-index-of-an-old-term",
        "a new leader confirms no read before an entry of its term is committed (trap 8)",
        read_index_of_an_old_term,
        ("depose", "slow", "transfer", "heal"),
        9,
        workload="registers",
        rate=100,
    ),
    Bug(
        "read-index-unconfirmed",
        "a quorum confirms that the leader still leads (thesis, 6.4)",
        read_index_unconfirmed,
        _SPLIT_BRAINS,
        1,
        workload="registers",
        rate=100,
    ),
    Bug(
        "read-before-apply",
        "a read waits until its index is applied (trap 22)",
        read_before_apply,
        ("slow", "stall"),
        1,
        workload="registers",
        rate=100,
    ),
)
