"""What a Raft group is told once, when it is made. Nothing here changes afterwards and nothing here decides anything.

Every bound of the core has its name here. The settings of etcd-io/raft keep their meaning; what is added to them
(``lease``, ``vote_refusal_ns``, ``reluctant``, ``patient_elections``, ``probe_heartbeats_max``, ``commit_broadcast``,
``spare_entries_max``) is off or neutral unless asked for, so that the published transcripts replay; they switch off
``durable_candidacy`` alone.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Final

from shardkv.raft.messages import APPLY_THREAD, NONE

UNBOUNDED: Final = (1 << 63) - 1
"""For the byte bounds: no limit. Tests and transcripts use it; nodes set real bounds."""


def never() -> bool:
    return False


class ReadOnly(Enum):
    """How a ReadIndex request is confirmed. The lease of :class:`LeaseSettings` is a third way, beside both."""

    SAFE = "safe"
    """By a round of heartbeats to a quorum (thesis 6.4)."""
    LEASE_BASED = "lease-based"
    """By counting ticks under check-quorum, as etcd does. Unsafe when clocks stall: for transcripts only."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaseSettings:
    """The leader's lease: a promise with a length in time. Followers know by it, too, how old their state is at most.

    ``promise_ns`` is how long a replica that accepted a heartbeat refuses to help another leader. ``drift`` bounds how
    much faster one clock may run than another, as a fraction: the lease is shorter than the promise by that much.
    """

    promise_ns: int
    drift: float = 0.01

    def __post_init__(self) -> None:
        if self.promise_ns <= 0:
            raise ValueError(f"the promise must have a length, not {self.promise_ns} ns")
        if not 0 <= self.drift < 1:
            raise ValueError(f"the drift bound is a fraction below one, not {self.drift}")

    @property
    def usable_ns(self) -> int:
        """How long after a heartbeat was sent the lease that rests on it lasts, by the leader's clock."""
        return int(self.promise_ns * (1 - self.drift))


@dataclass(frozen=True, slots=True, kw_only=True)
class RaftSettings:
    """The parameters of one replica of one group. Raises ``ValueError`` for what contradicts itself."""

    replica_id: int
    randrange: Callable[[int], int]
    """``randrange(n)`` draws from 0 to n - 1; it spreads the election timeouts."""
    reluctant: Callable[[], bool] = never
    """Whether this replica should leave leading to others for now, because its host is in no state for it (trap 14). It
    then takes no transfer and waits longer before it campaigns. Nobody's safety rests on the answer."""

    patient_elections: bool = False
    """Whether an election may take as long as the disks take for a vote. A pre-vote, which promises nothing, then waits
    for no disk; while a replica's vote is on its way to the disk, and for as long again, it begins no election; and a
    candidate waits longer each time for the others'."""

    election_ticks: int = 10
    """A follower that hears nothing campaigns after this many ticks, or up to twice as many."""
    heartbeat_ticks: int = 1
    pre_vote: bool = True
    check_quorum: bool = True
    async_storage_writes: bool = True
    """Whether ``ready()`` hands out storage messages with responses, instead of waiting for ``advance()``."""
    durable_candidacy: bool = True
    """Whether votes are asked for only when the candidate's own term, vote and log are on disk.

    Off for transcripts, and for hosts that sync a changed term before they send anything. Any other host's replica
    could be elected by the votes of others alone, crash, forget that term, and be given the same votes for it again.
    """

    message_bytes_max: int = 1024 * 1024
    """Entries in one append. At least one entry is always sent."""
    inflight_messages_max: int = 256
    inflight_bytes_max: int = 16 * 1024 * 1024
    """Appends on their way to one follower. The last one may go over the bytes."""
    uncommitted_bytes_max: int = 64 * 1024 * 1024
    """Payload in the leader's log that is not yet applied; past it proposals are dropped."""
    committed_bytes_per_ready_max: int = 4 * 1024 * 1024
    """Entries handed out to be applied and not yet applied."""
    reads_pending_max: int = 4096
    """ReadIndex requests that wait for their confirmation; past it they are dropped."""

    read_only: ReadOnly = ReadOnly.SAFE
    disable_proposal_forwarding: bool = False
    """A replica that does not lead then passes on no proposals, and of requests to read only its own."""
    disable_conf_change_validation: bool = False
    """Only for a host that itself makes sure that one change is applied before the next is proposed."""
    step_down_on_removal: bool = False

    lease: LeaseSettings | None = None
    vote_refusal_ns: int = 0
    """For this long after it was made a replica neither votes nor campaigns: it may have forgotten a promise."""
    probe_heartbeats_max: int = 1
    """How many heartbeats a follower must answer, at most, before it is sent again what it has not answered."""
    commit_broadcast: bool = True
    """Whether each advance of the commit index is told to the followers at once, in an append of its own if need be.

    Without it they learn of it with the next append or heartbeat, which halves the messages of a busy group.
    """

    commit_rides: bool = False
    """Whether a commit index that has grown is handed out with the next entries, term, vote or answer that waits for
    the disk, or once a tick has passed, instead of alone. A crash may forget it: nobody's safety rests on it."""

    spare_entries_max: int = 1
    """How many entries collect for a follower whose acknowledgement is not needed (see ``thrift``); 1: none waits."""

    def __post_init__(self) -> None:
        if self.replica_id == NONE or self.replica_id >= APPLY_THREAD:
            raise ValueError(f"{self.replica_id} is no replica id")
        if self.heartbeat_ticks <= 0:
            raise ValueError(f"heartbeat_ticks must be positive, not {self.heartbeat_ticks}")
        if self.election_ticks <= self.heartbeat_ticks:
            raise ValueError(f"election_ticks {self.election_ticks} must exceed heartbeat_ticks {self.heartbeat_ticks}")
        if self.inflight_messages_max <= 0:
            raise ValueError(f"inflight_messages_max must be positive, not {self.inflight_messages_max}")
        if self.inflight_bytes_max < self.message_bytes_max:
            raise ValueError(
                f"inflight_bytes_max {self.inflight_bytes_max} is below {self.message_bytes_max} a message"
            )
        if self.committed_bytes_per_ready_max <= 0:
            raise ValueError("committed_bytes_per_ready_max must be positive")
        if self.read_only is ReadOnly.LEASE_BASED and not self.check_quorum:
            raise ValueError("lease-based reads need check_quorum")
        if self.spare_entries_max <= 0:
            raise ValueError(f"spare_entries_max must be positive, not {self.spare_entries_max}")
        if self.vote_refusal_ns < 0:
            raise ValueError(f"vote_refusal_ns must not be negative, not {self.vote_refusal_ns}")
