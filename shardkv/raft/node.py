"""The face of the core: messages, ticks and requests go in; what is to be written, sent and applied comes out.

The host takes a :class:`Ready` whenever ``has_ready()``, and does what it says. With asynchronous storage writes, the
default, work for the disk and for the state machine comes as ``STORAGE_APPEND`` and ``STORAGE_APPLY`` messages with
``responses``, which the host delivers when the work is done: to ``step`` where they are for this replica, else to the
peer that they name. Otherwise the host does everything in the Ready, in its order, and calls ``advance()``.

Nothing is decided here; see ``core``.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from shardkv.raft import core, election, freshness, lease, reconfiguration, replication, thrift
from shardkv.raft.errors import DropReason, ProposalDropped
from shardkv.raft.membership import check_configuration, encode_conf_change
from shardkv.raft.messages import (
    APPEND_THREAD,
    APPLY_THREAD,
    NONE,
    ConfChange,
    ConfState,
    Entry,
    EntryType,
    HardState,
    Message,
    MessageType,
    Snapshot,
)
from shardkv.raft.progress import NEVER, ProgressState
from shardkv.raft.proposals import append_and_send, conf_change_refusal, refuse_unless_open
from shardkv.raft.reads import ReadState
from shardkv.raft.settings import RaftSettings
from shardkv.raft.state import NOT_LEADING, Raft, Role, SoftState
from shardkv.raft.storage import RaftStorage

_LOCAL_THREADS = (APPEND_THREAD, APPLY_THREAD)
_LOCAL_ONLY = frozenset(
    {
        MessageType.HUP,
        MessageType.BEAT,
        MessageType.UNREACHABLE,
        MessageType.SNAP_STATUS,
        MessageType.CHECK_QUORUM,
        MessageType.STORAGE_APPEND,
        MessageType.STORAGE_APPEND_RESP,
        MessageType.STORAGE_APPLY,
        MessageType.STORAGE_APPLY_RESP,
    }
)
_RESPONSES = frozenset(
    {
        MessageType.APP_RESP,
        MessageType.VOTE_RESP,
        MessageType.HEARTBEAT_RESP,
        MessageType.UNREACHABLE,
        MessageType.READ_INDEX_RESP,
        MessageType.PRE_VOTE_RESP,
        MessageType.STORAGE_APPEND_RESP,
        MessageType.STORAGE_APPLY_RESP,
    }
)
_ANYONE, _THREADS, _MEMBERS = range(3)
_SENDERS = tuple(
    _THREADS if kind in _LOCAL_ONLY else _MEMBERS if kind in _RESPONSES else _ANYONE for kind in MessageType
)
"""For each message type who may send it to ``step``."""


class Ready(NamedTuple):
    """Work for the host. Nothing in it is changed after it was handed out.

    ``soft_state``, ``hard_state`` and ``snapshot`` are None when they have not changed. With asynchronous storage
    writes ``messages`` may leave at once, and the rest is repeated in the storage messages among them; without, they
    wait until hard state, entries and snapshot are on disk. ``must_sync`` is False when losing what is to be written
    would do no harm.
    """

    soft_state: SoftState | None
    hard_state: HardState | None
    read_states: Sequence[ReadState]
    entries: tuple[Entry, ...]
    snapshot: Snapshot | None
    committed_entries: tuple[Entry, ...]
    messages: list[Message]
    must_sync: bool


class PeerStatus(NamedTuple):
    """What a leader knows of one peer; see ``progress.Progress`` for the meaning of each field."""

    match: int
    next: int
    state: ProgressState
    paused: bool
    pending_snapshot: int
    recent_active: bool
    inflight_messages: int
    inflight_bytes: int
    inflight_full: bool
    is_learner: bool
    lease_stamp: int = NEVER


class RaftStatus(NamedTuple):
    """A frozen picture of one replica. ``progress`` is empty unless it leads."""

    replica_id: int
    role: Role
    leader: int
    hard_state: HardState
    applied: int
    first_index: int
    last_index: int
    transferee: int
    lease_until: int
    configuration: ConfState
    progress: dict[int, PeerStatus]


class RaftNode:
    """One replica of one group, for its host. ``now`` is always the host's monotonic clock in nanoseconds.

    It matters only for the lease and for refusing votes. It must be read after the bytes of a message came in: an
    older reading would end a promise too early.
    """

    __slots__ = ("_commit_rides", "_hard_state", "_on_advance", "_soft_state", "_synchronous", "raft")

    def __init__(self, settings: RaftSettings, storage: RaftStorage, *, applied: int = 0, now: int = 0) -> None:
        """Go on from what the storage holds; ``applied`` is how far the host's state machine has come.

        Raises ``Inconsistent`` when the storage contradicts itself or ``applied``.
        """
        self.raft = Raft(settings, storage, applied=applied, now=now)
        raft = self.raft
        self._soft_state = SoftState(raft.leader, raft.role)
        self._hard_state = HardState(raft.term, raft.vote, raft.log.committed)
        self._synchronous = not settings.async_storage_writes
        self._commit_rides = settings.commit_rides
        """Whether a commit index alone is not handed out now: no tick has found one since the last that was."""
        self._on_advance: list[Message] | None = None

    # What goes in.

    def accepts(self, message: Message) -> bool:
        """Whether ``step`` would look at the message: local ones come from local threads, answers from members."""
        allowed = _SENDERS[message.type]
        if allowed == _ANYONE or message.from_ in _LOCAL_THREADS:
            return True
        return allowed == _MEMBERS and message.from_ in self.raft.progress

    def step(self, message: Message, now: int = 0) -> None:
        """Take a message of a peer, or a response of a storage message.

        Raises ``ProposalDropped`` for a forwarded proposal only, and ``Inconsistent`` when the message contradicts
        this replica's log, which is then as it was.
        """
        raft = self.raft
        if now > raft.now:
            raft.now = now
        if _SENDERS[message.type] == _ANYONE or self.accepts(message):
            core.step(raft, message)

    def acknowledge(self, responses: Iterable[Message], now: int) -> list[Message]:
        """What a storage message asks is done: take its responses to this replica, return those to its peers."""
        raft = self.raft
        if now > raft.now:
            raft.now = now
        own = raft.id
        leaving: list[Message] = []
        for response in responses:
            if response.to == own:
                core.step(raft, response)
            else:
                leaving.append(response)
        return leaving

    def tick(self, now: int = 0) -> None:
        raft = self.raft
        if now > raft.now:
            raft.now = now
        if raft.log.committed != self._hard_state.commit:
            self._commit_rides = False
        core.tick(raft)

    def campaign(self, now: int = 0) -> None:
        """Begin an election, with a pre-vote if so set, or as soon as a promise that forbids it has run out."""
        self._advance_clock(now)
        core.step(self.raft, Message(MessageType.HUP, from_=self.raft.id))

    def propose(self, data: bytes) -> tuple[int, int]:
        """Append an entry; returns its (term, index). It is committed when an entry of that term and index is applied.

        Raises ``ProposalDropped`` when certainly nothing was appended. A follower that forwards returns index 0.
        """
        return self._propose(Entry(0, 0, EntryType.NORMAL, data))

    def propose_conf_change(self, change: ConfChange) -> tuple[int, int]:
        """Append a membership change, as ``propose``.

        Also dropped while an earlier change may still be under way, and until this term has committed an entry.
        """
        data = encode_conf_change(change)
        raft = self.raft
        if raft.role == Role.LEADER:
            refusal = conf_change_refusal(raft, data)
            if refusal is None and not raft.committed_in_term:
                # Because a change counts only once it is applied, the order in the log already sees to this; but a
                # leader that has committed nothing may not know what the group agreed on before it (trap 9).
                refusal = DropReason.TERM_NOT_COMMITTED
            if refusal is not None:
                raise ProposalDropped(refusal)
        return self._propose(Entry(0, 0, EntryType.CONF_CHANGE_V2, data))

    def _propose(self, entry: Entry) -> tuple[int, int]:
        raft = self.raft
        if raft.role != Role.LEADER:
            core.step(raft, Message(MessageType.PROP, from_=raft.id, entries=(entry,)))
            return raft.term, 0
        refuse_unless_open(raft)
        append_and_send(raft, (entry,))
        if entry.type != EntryType.NORMAL:
            raft.pending_conf_index = raft.log.last_index
        return raft.term, raft.log.last_index

    def apply_conf_change(self, change: ConfChange) -> ConfState:
        """The host is applying an entry with this change; returns the configuration to keep with its state.

        Raises ``InvalidConfChange`` when it does not apply, and then nothing has changed. A host may decide to apply
        no change for an entry; it then does not call this.
        """
        return reconfiguration.apply_conf_change(self.raft, change)

    def read_index(self, context: bytes) -> bool:
        """Ask for a read state with this context. False when no leader is known; the request may also get lost."""
        raft = self.raft
        if raft.leader == NONE:
            return False
        core.step(raft, Message(MessageType.READ_INDEX, from_=raft.id, context=context))
        return True

    def transfer_leader(self, replica_id: int) -> None:
        core.step(self.raft, Message(MessageType.TRANSFER_LEADER, from_=replica_id))

    def report_unreachable(self, replica_id: int) -> None:
        """A message to that peer was not sent, or its connection broke."""
        core.step(self.raft, Message(MessageType.UNREACHABLE, from_=replica_id))

    def report_snapshot(self, replica_id: int, ok: bool) -> None:
        """The snapshot of a ``SNAP`` message was sent, or was given up. To be called once for each."""
        core.step(self.raft, Message(MessageType.SNAP_STATUS, from_=replica_id, reject=not ok))

    def forget_leader(self) -> None:
        core.step(self.raft, Message(MessageType.FORGET_LEADER))

    def doubt(self, now: int) -> None:
        """The connection to the leader's node broke: campaign as soon as the promise to it has run out.

        Any message of the leader ends the doubt. The waiting is done by ``tick``.
        """
        self._advance_clock(now)
        election.doubt(self.raft)

    def hedge(self) -> None:
        """Entries of this leader take long to be committed: ask the followers that were to get them later, too."""
        replication.hedge(self.raft)

    def distrust(self, replica_id: int) -> None:
        """The connection to a follower broke: rely on others."""
        replication.distrust(self.raft, replica_id)

    def lease_valid(self, now: int) -> bool:
        """Whether a read that came in before ``now`` was read may be served here without asking anybody.

        That holds for what is committed; the host sees to it that it has applied all that. Always False without
        lease settings.
        """
        return lease.valid(self.raft, now)

    def age_ns(self, applied: int, now: int) -> int | None:
        """By how much a state that has applied so far lags at most behind what is committed at ``now``; None: unknown.

        Counted by whatever clock, for the drift bound is added. Always None without lease settings.
        """
        return freshness.age_ns(self.raft, applied, now)

    def _advance_clock(self, now: int) -> None:
        if now > self.raft.now:
            self.raft.now = now

    # What comes out.

    def has_ready(self) -> bool:
        raft = self.raft
        log, hard, soft = raft.log, self._hard_state, self._soft_state
        return bool(
            raft.messages
            or raft.messages_after_append
            or log.in_progress <= log.last_index
            or (log.committed != hard.commit and not self._commit_rides)
            or raft.term != hard.term
            or raft.vote != hard.vote
            or (log.applying < log.committed and log.has_next_committed(self._synchronous))
            or raft.read_states
            or raft.leader != soft.leader
            or raft.role != soft.role
            or (log.snapshot is not None and not log.snapshot_in_progress)
        )

    def ready(self) -> Ready:
        """Hand out the work there is. It counts as under way from now on."""
        raft = self.raft
        log = raft.log
        hard = self._hard_state
        assert not self._on_advance, "the Ready before was not advanced"

        soft_state = None
        if raft.leader != self._soft_state.leader or raft.role != self._soft_state.role:
            soft_state = self._soft_state = SoftState(raft.leader, raft.role)
        hard_state = None
        entries = log.next_unstable() if log.in_progress <= log.last_index else ()
        snapshot = log.next_snapshot() if log.snapshot is not None else None
        messages, raft.messages = raft.messages, []
        after_append, raft.messages_after_append = raft.messages_after_append, []
        changed = raft.term != hard.term or raft.vote != hard.vote
        must_sync = changed or bool(entries)
        if changed or (
            log.committed != hard.commit and (entries or after_append or snapshot is not None or not self._commit_rides)
        ):
            hard_state = self._hard_state = HardState(raft.term, raft.vote, log.committed)
            self._commit_rides = raft.settings.commit_rides
        committed: tuple[Entry, ...] = ()
        if log.applying < log.committed:
            committed = log.next_committed(self._synchronous)
        read_states: Sequence[ReadState] = ()
        if raft.read_states:
            read_states, raft.read_states = raft.read_states, []

        if self._synchronous:
            messages = self._hand_out_synchronously(messages, after_append, snapshot, committed)
        else:
            if entries or after_append or hard_state is not None or snapshot is not None:
                messages.append(self._storage_append(entries, hard_state, snapshot, after_append))
            if committed:
                messages.append(self._storage_apply(committed))
        if entries or snapshot is not None:
            log.accept_unstable()
        if committed:
            log.accept_applying(committed, self._synchronous)
        return Ready(soft_state, hard_state, read_states, entries, snapshot, committed, messages, must_sync)

    def _hand_out_synchronously(
        self,
        messages: list[Message],
        after_append: list[Message],
        snapshot: Snapshot | None,
        committed: tuple[Entry, ...],
    ) -> list[Message]:
        """What goes to others goes out with the rest, for all of it waits for the disk; our own waits for advance()."""
        own = self.raft.id
        on_advance = [message for message in after_append if message.to == own]
        acknowledgement = self._storage_append_response(snapshot)
        if acknowledgement is not None:
            on_advance.append(acknowledgement)
        if committed:
            on_advance.append(self._storage_apply_response(committed))
        self._on_advance = on_advance
        return messages + [message for message in after_append if message.to != own]

    def _storage_append(
        self,
        entries: tuple[Entry, ...],
        hard_state: HardState | None,
        snapshot: Snapshot | None,
        responses: list[Message],
    ) -> Message:
        acknowledgement = self._storage_append_response(snapshot)
        if acknowledgement is not None:
            # After the leader's own APP_RESP, which is cheaper to handle while the entries are still here.
            responses.append(acknowledgement)
        term, vote, commit = hard_state or HardState()
        return Message(
            MessageType.STORAGE_APPEND,
            APPEND_THREAD,
            self.raft.id,
            term,
            entries=entries,
            commit=commit,
            vote=vote,
            snapshot=snapshot,
            responses=tuple(responses),
        )

    def _storage_append_response(self, snapshot: Snapshot | None) -> Message | None:
        """What says that everything handed out so far is on disk.

        It names the end of the log and the term now, not the entries of this Ready alone: when a term changes, the
        acknowledgements of the old one are ignored, and the first one of the new term makes up for all of them. An
        acknowledgement counts only while its term lasts, for in another the entries may be overwritten by a write
        that is under way, and be the same again in the end (trap 10).
        """
        raft = self.raft
        log = raft.log
        unstable = log.last_index > log.stable
        if not unstable and snapshot is None:
            return None
        return Message(
            MessageType.STORAGE_APPEND_RESP,
            raft.id,
            APPEND_THREAD,
            raft.term,
            log.last_term if unstable else 0,
            log.last_index if unstable else 0,
            snapshot=snapshot,
        )

    def _storage_apply(self, committed: tuple[Entry, ...]) -> Message:
        return Message(
            MessageType.STORAGE_APPLY,
            APPLY_THREAD,
            self.raft.id,
            entries=committed,
            responses=(self._storage_apply_response(committed),),
        )

    def _storage_apply_response(self, committed: tuple[Entry, ...]) -> Message:
        return Message(MessageType.STORAGE_APPLY_RESP, self.raft.id, APPLY_THREAD, entries=committed)

    def advance(self) -> None:
        """Everything in the last Ready is done. Only without asynchronous storage writes."""
        assert self._synchronous, "advance() is not for asynchronous storage writes"
        messages, self._on_advance = self._on_advance, None
        for message in messages or ():
            if self.accepts(message):
                core.step(self.raft, message)

    # What there is to see.

    @property
    def replica_id(self) -> int:
        return self.raft.id

    @property
    def role(self) -> Role:
        return self.raft.role

    @property
    def leader(self) -> int:
        """The leader of this term as far as is known, or NONE."""
        return self.raft.leader

    @property
    def term(self) -> int:
        return self.raft.term

    @property
    def vote(self) -> int:
        return self.raft.vote

    @property
    def committed(self) -> int:
        return self.raft.log.committed

    @property
    def applied(self) -> int:
        return self.raft.log.applied

    @property
    def last_index(self) -> int:
        return self.raft.log.last_index

    @property
    def transferee(self) -> int:
        return self.raft.transferee

    @property
    def configuration(self) -> ConfState:
        return self.raft.configuration

    @property
    def committed_in_term(self) -> bool:
        """Whether this replica leads and has committed an entry of its term."""
        return self.raft.committed_in_term

    def status(self) -> RaftStatus:
        raft = self.raft
        progress = {}
        if raft.role == Role.LEADER:
            for id_, peer in raft.progress.items():
                progress[id_] = PeerStatus(
                    peer.match,
                    peer.next,
                    peer.state,
                    peer.paused,
                    peer.pending_snapshot,
                    peer.recent_active,
                    len(peer.inflights),
                    peer.inflights.bytes,
                    peer.inflights.full,
                    peer.is_learner,
                    peer.lease_stamp,
                )
        return RaftStatus(
            raft.id,
            raft.role,
            raft.leader,
            HardState(raft.term, raft.vote, raft.log.committed),
            raft.log.applied,
            raft.log.first_index,
            raft.log.last_index,
            raft.transferee,
            raft.lease_until,
            raft.configuration,
            progress,
        )

    def check(self) -> None:
        """Walk every invariant; an ``AssertionError`` names the first that does not hold."""
        raft = self.raft
        raft.log.check()
        check_configuration(raft.configuration, raft.progress)
        for peer in raft.progress.values():
            peer.check()
        if raft.reads is not None:
            raft.reads.check()
        thrift.check(raft)
        leads = raft.role == Role.LEADER
        assert leads == (raft.term_start != NOT_LEADING), f"{raft.role!r} with a term from {raft.term_start}"
        assert leads == (raft.leader == raft.id), f"{raft.role!r} follows {raft.leader}"
        assert leads or raft.transferee == NONE, f"{raft.role!r} hands over to {raft.transferee}"
        assert leads or not raft.preferred, f"{raft.role!r} prefers {raft.preferred}"
        assert leads or raft.reads is None, f"{raft.role!r} confirms reads"
        assert not raft.voting or raft.vote != NONE, f"a vote of term {raft.term} that nobody has"
        assert not raft.voting or raft.role in (Role.FOLLOWER, Role.CANDIDATE), f"{raft.role!r} waits for its vote"
        assert raft.role != Role.CANDIDATE or raft.vote == raft.id, f"a candidate voted for {raft.vote}"
        assert raft.term >= self._hard_state.term, f"term {raft.term} after {self._hard_state.term}"
        if leads:
            assert raft.log.term(raft.log.last_index) == raft.term, f"the log ends in term {raft.log.last_term}"
            own = raft.progress.get(raft.id)
            assert own is None or own.match <= raft.log.last_index, f"own match {own.match} past the end"
