"""The state of one replica, and the moves between its roles.

What the fields mean and which moves exist lives here; which message causes what lives in the modules named after it
(``election``, ``replication``, ``reads``, ``lease``, ...), and ``core`` binds them by role and message type.
"""

from enum import IntEnum
from typing import Final, NamedTuple

from shardkv.raft import freshness, thrift
from shardkv.raft.errors import Inconsistent
from shardkv.raft.log import RaftLog
from shardkv.raft.membership import Changer, ProgressMap, normalized
from shardkv.raft.messages import NONE, ConfState, Entry, HardState, Message, MessageType
from shardkv.raft.reads import PendingReads, ReadState
from shardkv.raft.settings import RaftSettings
from shardkv.raft.storage import RaftStorage, payload_bytes


class Role(IntEnum):
    FOLLOWER = 0
    CANDIDATE = 1
    LEADER = 2
    PRE_CANDIDATE = 3


class SoftState(NamedTuple):
    """What is worth knowing but need not survive a restart."""

    leader: int
    role: Role


NOT_LEADING: Final = (1 << 64) - 1
"""``term_start`` of a replica that does not lead: no index reaches it."""
NOT_EAGER: Final = -1

_NO_TERM = frozenset({MessageType.PROP, MessageType.READ_INDEX})
_VOTING = frozenset({MessageType.VOTE, MessageType.VOTE_RESP, MessageType.PRE_VOTE, MessageType.PRE_VOTE_RESP})


class Raft:
    """One replica of one group. Single-threaded; it does no I/O and reads no clock."""

    __slots__ = (
        "configuration",
        "doubted",
        "eager_ticks",
        "election_elapsed",
        "fruitless_campaigns",
        "heartbeat_elapsed",
        "id",
        "leader",
        "lease_suspended",
        "lease_until",
        "log",
        "made_at",
        "messages",
        "messages_after_append",
        "now",
        "pending_conf_index",
        "preferred",
        "progress",
        "proof",
        "proof_pending",
        "race",
        "races_lost",
        "randomized_election_timeout",
        "read_states",
        "reads",
        "refuse_until",
        "role",
        "settings",
        "stamp_offset",
        "term",
        "term_start",
        "transferee",
        "uncommitted_bytes",
        "vote",
        "votes",
        "voting",
    )

    def __init__(self, settings: RaftSettings, storage: RaftStorage, *, applied: int = 0, now: int = 0) -> None:
        self.settings = settings
        self.id = settings.replica_id
        self.log = RaftLog(storage, settings.committed_bytes_per_ready_max)
        hard_state, conf_state = storage.initial_state()
        self.term = 0
        self.vote = NONE
        self.leader = NONE
        self.role = Role.FOLLOWER
        self.made_at = now
        self.now = now
        """The latest clock reading handed in; it never moves back."""

        self.messages: list[Message] = []
        """May leave at once."""
        self.messages_after_append: list[Message] = []
        """May leave, or be stepped here, when everything that is unstable now is on disk."""
        self.read_states: list[ReadState] = []
        self.reads: PendingReads | None = None

        self.election_elapsed = 0
        """Ticks since the leader was heard of, or on a leader since the last check of the quorum."""
        self.heartbeat_elapsed = 0
        self.randomized_election_timeout = settings.election_ticks
        self.votes: dict[int, bool] = {}
        self.voting = False
        """Whether a vote is on its way to the disk; always False without ``patient_elections``."""
        self.fruitless_campaigns = 0
        """Elections that this replica has stood for since it last knew a leader."""
        self.transferee = NONE
        """Who is to lead next, while a transfer is under way (thesis 3.10)."""
        self.pending_conf_index = 0
        """No membership change is proposed until everything up to here is applied."""
        self.uncommitted_bytes = 0
        """An estimate of the payload that waits to be applied; never too high. Kept by leaders only."""
        self.term_start = NOT_LEADING
        """On a leader the index of the first entry of its term. Everything from it on has that term."""

        self.preferred: list[int] = []
        """On a leader the other voters, those first that it relies on; empty when nobody is spared (see ``thrift``)."""
        self.race = 0
        """The entry that shows who of them is quick, once it is committed."""
        self.races_lost = 0

        self.refuse_until = now + settings.vote_refusal_ns if settings.vote_refusal_ns else 0
        """Until the clock reads this, no vote is given and no election begun (see ``lease``)."""
        self.lease_until = 0
        self.lease_suspended = False
        """Whether a TimeoutNow was sent in this term: whoever got it need not respect the promises made to us."""
        self.stamp_offset = settings.randrange(freshness.OFFSETS) if settings.lease is not None else 0
        """What this replica's readings of its clock are sent with, and no other replica's nor any other start's."""
        self.proof: freshness.Proof | None = None
        """The best proof of how fresh this replica is whose index is applied (see ``freshness``)."""
        self.proof_pending: freshness.Proof | None = None
        """A later one, whose index may still have to be applied."""
        self.doubted = False
        """Whether the leader may be gone: its connection broke, and it was not heard of since."""
        self.eager_ticks = NOT_EAGER
        """When an election is wanted but promised away: how many ticks after the promise it begins."""

        changer = Changer(last_index=self.log.last_index, inflight_limits=self.inflight_limits)
        changer.restore(conf_state)
        self.configuration: ConfState = changer.configuration
        self.progress: ProgressMap = changer.progress
        assert self.configuration == normalized(conf_state), f"{conf_state} became {self.configuration}"

        self._load(hard_state)
        if applied:
            self.log.applied_to(applied, 0)
        self.become_follower(self.term, NONE)

    def _load(self, hard_state: HardState) -> None:
        if hard_state == HardState():
            return
        if not self.log.committed <= hard_state.commit <= self.log.last_index:
            raise Inconsistent(
                f"commit {hard_state.commit} of a log from {self.log.committed} to {self.log.last_index}"
            )
        self.log.committed = hard_state.commit
        self.term = hard_state.term
        self.vote = hard_state.vote

    @property
    def inflight_limits(self) -> tuple[int, int]:
        return self.settings.inflight_messages_max, self.settings.inflight_bytes_max

    @property
    def promotable(self) -> bool:
        """Whether this replica could lead: a voter, as far as it knows, whose log is not being replaced."""
        own = self.progress.get(self.id)
        return own is not None and not own.is_learner and self.log.snapshot is None

    @property
    def is_singleton(self) -> bool:
        return len(self.configuration.voters) == 1 and not self.configuration.voters_outgoing

    @property
    def committed_in_term(self) -> bool:
        """Whether this leader has committed an entry of its own term. False on any other role."""
        return self.log.committed >= self.term_start

    def send(self, message: Message) -> None:
        """Queue a message, with sender and term filled in.

        What rests on a term, a vote or an entry waits until that is on disk; see ``_waits_for_disk``.
        """
        if message.from_ == NONE:
            message.from_ = self.id
        kind = message.type
        if kind in _VOTING:
            assert message.term, f"{kind!r} without a term"
        else:
            assert not message.term, f"{kind!r} with the term {message.term} set"
            # These two are a local request that may be passed on to the leader of whatever term.
            if kind not in _NO_TERM:
                message.term = self.term
        if self._waits_for_disk(kind):
            self.messages_after_append.append(message)
        else:
            assert message.to != self.id, f"{kind!r} to itself"
            self.messages.append(message)

    def _waits_for_disk(self, kind: MessageType) -> bool:
        """Whether messages of this kind are held back until everything that is unstable now is on disk.

        Answers about votes and appends are (paper 5, figure 2; thesis 3.8). Rejections are too: they are rare, and
        nobody has proved that they need not. With ``patient_elections`` answers about pre-votes are not: they promise
        nothing. Requests for votes are with ``durable_candidacy``.
        """
        if kind is MessageType.VOTE:
            return self.settings.durable_candidacy
        if kind is MessageType.PRE_VOTE_RESP:
            return not self.settings.patient_elections
        return kind is MessageType.APP_RESP or kind is MessageType.VOTE_RESP

    def append(self, entries: tuple[Entry, ...]) -> bool:
        """Give the entries their places at the end of this leader's log. False if too much is uncommitted already."""
        size = payload_bytes(entries)
        # An empty payload is never refused: a new leader's first entry, and leaving a joint configuration, must go in.
        uncommitted = self.uncommitted_bytes
        if uncommitted and size and uncommitted + size > self.settings.uncommitted_bytes_max:
            return False
        self.uncommitted_bytes = uncommitted + size
        log, term = self.log, self.term
        index = log.last_index + 1
        if len(entries) == 1:
            entry = entries[0]
            log.append((Entry(term, index, entry.type, entry.data),))
        else:
            log.append(tuple([Entry(term, index + at, entry.type, entry.data) for at, entry in enumerate(entries)]))
        # The leader acknowledges its own append as a follower would: when it is on disk (thesis 10.2.1).
        self.messages_after_append.append(Message(MessageType.APP_RESP, self.id, self.id, term, index=log.last_index))
        return True

    def applied_bytes(self, size: int) -> None:
        """That much payload no longer waits to be applied."""
        left = self.uncommitted_bytes - size
        self.uncommitted_bytes = left if left > 0 else 0

    # Moves between the roles (paper figure 4).

    def _reset(self, term: int) -> None:
        if self.lease_until:
            freshness.keep(self)
        if self.term != term:
            self.term = term
            self.vote = NONE
        self.leader = NONE
        self.election_elapsed = 0
        self.heartbeat_elapsed = 0
        ticks = self.settings.election_ticks
        self.randomized_election_timeout = ticks + self.settings.randrange(ticks)
        self.transferee = NONE
        self.votes.clear()
        self.voting = False
        next_index = self.log.last_index + 1
        for id_, peer in self.progress.items():
            peer.restart(next_index, self.log.last_index if id_ == self.id else 0)
        self.pending_conf_index = 0
        self.uncommitted_bytes = 0
        self.term_start = NOT_LEADING
        self.reads = None  # a read that was not confirmed in this term never will be (trap 8)
        self.lease_until = 0
        self.lease_suspended = False
        self.doubted = False
        self.eager_ticks = NOT_EAGER
        self.preferred = []
        self.race = thrift.NO_RACE

    def become_follower(self, term: int, leader: int) -> None:
        self._reset(term)
        self.leader = leader
        if leader != NONE:
            self.fruitless_campaigns = 0
        self.role = Role.FOLLOWER

    def become_candidate(self) -> None:
        assert self.role != Role.LEADER, "a leader cannot become a candidate"
        self._reset(self.term + 1)
        self.vote = self.id
        self.role = Role.CANDIDATE

    def become_pre_candidate(self) -> None:
        """Ask whether an election could be won, with nothing changed but the role (thesis 9.6)."""
        assert self.role != Role.LEADER, "a leader cannot become a pre-candidate"
        self.votes.clear()
        self.leader = NONE
        self.role = Role.PRE_CANDIDATE

    def become_leader(self) -> None:
        assert self.role != Role.FOLLOWER, "a follower cannot become leader without an election"
        self._reset(self.term)
        self.leader = self.id
        self.role = Role.LEADER
        thrift.arrange(self)
        own = self.progress[self.id]
        self.fruitless_campaigns = 0
        own.become_replicate()
        own.recent_active = True
        # A membership change may stand in the part that is not applied yet. Looking for it would be slow, so none is
        # proposed until everything that is there now is applied.
        self.pending_conf_index = self.log.last_index
        self.term_start = self.log.last_index + 1
        accepted = self.append((Entry(0, 0),))
        assert accepted, "the first entry of a term was refused"
