"""What the leader knows of each follower's log, and how fast it may send to it.

A follower is probed until its log is known to match, then replicated to optimistically, or it is waiting for a
snapshot. Only bookkeeping lives here: what to send is decided in ``replication``.

Invariant: 0 <= match < next, and a peer that waits for a snapshot is sent nothing.
"""

from enum import IntEnum
from typing import Final

NEVER: Final = -(1 << 62)
"""A lease stamp older than every clock reading."""


class ProgressState(IntEnum):
    PROBE = 0
    """The follower's last entry is not known: one append per heartbeat interval finds it out."""
    REPLICATE = 1
    """The logs match: appends are pipelined without waiting for answers."""
    SNAPSHOT = 2
    """The follower needs entries that the log no longer holds: nothing is sent until the snapshot has arrived."""


_PROBE = ProgressState.PROBE
_REPLICATE = ProgressState.REPLICATE
_SNAPSHOT = ProgressState.SNAPSHOT


class Inflights:
    """The appends that are on their way to one follower, by the index of their last entry.

    Bounded in messages and in bytes; the message that crosses the byte bound is still let through.
    """

    __slots__ = ("bytes", "bytes_max", "messages_max", "window")

    def __init__(self, messages_max: int, bytes_max: int) -> None:
        self.messages_max = messages_max
        self.bytes_max = bytes_max
        self.bytes = 0
        self.window: list[tuple[int, int]] = []

    def __len__(self) -> int:
        return len(self.window)

    @property
    def full(self) -> bool:
        return len(self.window) >= self.messages_max or self.bytes >= self.bytes_max

    def add(self, index: int, size: int) -> None:
        assert not self.full, f"{len(self.window)} messages of {self.bytes} bytes are already in flight"
        self.window.append((index, size))
        self.bytes += size

    def free_to(self, index: int) -> None:
        """Forget the appends up to and with ``index``: they were answered."""
        window = self.window
        if not window or window[0][0] > index:
            return
        if window[-1][0] <= index:
            self.reset()
            return
        freed = 0
        for last, size in window:
            if last > index:
                break
            self.bytes -= size
            freed += 1
        del window[:freed]

    def reset(self) -> None:
        self.window.clear()
        self.bytes = 0

    def check(self) -> None:
        assert len(self.window) <= self.messages_max, f"{len(self.window)} of {self.messages_max} messages"
        assert self.bytes == sum(size for _, size in self.window), f"{self.bytes} bytes against {self.window}"
        indexes = [index for index, _ in self.window]
        assert indexes == sorted(indexes), f"out of order: {indexes}"


class Progress:
    """One peer, as the leader sees it. On other roles it stands for the membership only."""

    __slots__ = (
        "flow_paused",
        "follower_stamp",
        "heartbeats_waited",
        "held_bytes",
        "inflights",
        "is_learner",
        "lease_stamp",
        "match",
        "next",
        "pending_snapshot",
        "probes_unanswered",
        "recent_active",
        "sent_commit",
        "spare",
        "state",
    )

    def __init__(self, next_index: int, inflights: Inflights, *, is_learner: bool, recent_active: bool) -> None:
        self.match = 0
        """The follower's log is known to match up to here."""
        self.next = next_index
        """The next entry to send; those between ``match`` and it are in flight."""
        self.sent_commit = 0
        """The highest commit index on its way to the follower."""
        self.state = _PROBE
        self.pending_snapshot = 0
        self.recent_active = recent_active
        """Whether it was heard of since the last check of the quorum."""
        self.flow_paused = False
        """Whether appends wait for the next heartbeat answer: a probe is out, or the window is full."""
        self.probes_unanswered = 0
        """Appends with entries that were sent as probes since it last answered one."""
        self.heartbeats_waited = 0
        """Heartbeats that it has answered since the last of them."""
        self.inflights = inflights
        self.is_learner = is_learner
        self.lease_stamp = NEVER
        """The newest of this leader's heartbeat stamps that it has echoed (see ``lease``)."""
        self.follower_stamp = 0
        """What its own clock showed when it made the last of its heartbeat answers that came in (see ``freshness``)."""
        self.spare = False
        """Whether others made a quorum without it when an entry was last proposed (see ``thrift``)."""
        self.held_bytes = 0
        """Payload that waits until there is more for it. Only a spare's."""

    def copy(self) -> "Progress":
        """A copy that shares the window of in-flight messages."""
        other = Progress(self.next, self.inflights, is_learner=self.is_learner, recent_active=self.recent_active)
        other.match = self.match
        other.sent_commit = self.sent_commit
        other.state = self.state
        other.pending_snapshot = self.pending_snapshot
        other.flow_paused = self.flow_paused
        other.probes_unanswered = self.probes_unanswered
        other.heartbeats_waited = self.heartbeats_waited
        other.lease_stamp = self.lease_stamp
        other.follower_stamp = self.follower_stamp
        other.spare = self.spare
        other.held_bytes = self.held_bytes
        return other

    def restart(self, next_index: int, match: int) -> None:
        """Forget everything but the membership: a new term begins."""
        self._enter(_PROBE)
        self.relied_on()
        self.match = match
        self.next = next_index
        self.sent_commit = 0
        self.recent_active = False
        self.probes_unanswered = self.heartbeats_waited = 0
        self.lease_stamp = NEVER
        self.follower_stamp = 0

    def _enter(self, state: ProgressState) -> None:
        self.flow_paused = False
        self.pending_snapshot = 0
        self.state = state
        self.inflights.reset()

    def become_probe(self) -> None:
        # After a snapshot that arrived there is nothing to be found below it.
        base = max(self.match, self.pending_snapshot) if self.state == _SNAPSHOT else self.match
        self._enter(_PROBE)
        self.next = base + 1
        self.sent_commit = min(self.sent_commit, base)

    def become_replicate(self) -> None:
        self._enter(_REPLICATE)
        self.next = self.match + 1

    def become_snapshot(self, index: int) -> None:
        self._enter(_SNAPSHOT)
        self.pending_snapshot = index
        self.next = index + 1
        self.sent_commit = index

    def relied_on(self) -> None:
        """It is sent everything at once from now on."""
        self.spare = False
        self.held_bytes = 0

    @property
    def paused(self) -> bool:
        return self.flow_paused or self.state == _SNAPSHOT

    def sent_entries(self, count: int, size: int) -> None:
        """An append with ``count`` entries of ``size`` payload bytes in all has left."""
        self.held_bytes = 0
        if self.state == _REPLICATE:
            inflights = self.inflights
            if count:
                self.next += count
                inflights.add(self.next - 1, size)
            # With a full window this message counts as a probe: only a heartbeat answer lets the next one go.
            self.flow_paused = inflights.full
        else:
            assert self.state == _PROBE, f"an append was sent in {self.state!r}"
            if count:
                self.flow_paused = True
                self.probes_unanswered += 1
                self.heartbeats_waited = 0

    def heartbeat_answered(self, heartbeats_max: int) -> None:
        """It answers: what it lacks was lost, or held back, and may be sent again.

        One that answers heartbeats and no appends has no room for them, or a slow disk, or reads slowly: it is sent
        them less often each time, up to once in ``heartbeats_max`` heartbeats.
        """
        self.heartbeats_waited += 1
        if self.heartbeats_waited >= min(1 << max(self.probes_unanswered - 1, 0), heartbeats_max):
            self.flow_paused = False

    def can_bump_commit(self, index: int) -> bool:
        """Whether telling the follower of this commit index now would move it, as far as is known."""
        return index > self.sent_commit and self.sent_commit < self.next - 1

    def maybe_update(self, index: int) -> bool:
        """The follower has acknowledged ``index``; False when that is no news."""
        if index <= self.match:
            return False
        self.match = index
        if index >= self.next:
            self.next = index + 1
        self.flow_paused = False
        return True

    def maybe_decrease_to(self, rejected: int, hint: int) -> bool:
        """The follower has rejected the append after ``rejected``; False when that calls for no other append now.

        That is so when the answer is stale, and when the append began at ``match``: there is nothing further down to
        try, and the same again would be rejected again. Only the next heartbeat's answer lets it go once more.
        """
        if self.state == _REPLICATE:
            if rejected <= self.match:
                return False
            self.next = self.match + 1
        else:
            # A probing leader sends one append at a time, so an answer to any other is an old one.
            if self.next - 1 != rejected:
                return False
            if rejected == self.match:
                return False
            self.next = max(min(rejected, hint + 1), self.match + 1)
            self.flow_paused = False
        self.sent_commit = min(self.sent_commit, self.next - 1)
        return True

    def check(self) -> None:
        assert 0 <= self.match < self.next, f"match {self.match}, next {self.next}"
        assert (self.state == _SNAPSHOT) == (self.pending_snapshot > 0), f"{self.state!r} {self.pending_snapshot}"
        assert self.state == _REPLICATE or not len(self.inflights), f"{len(self.inflights)} in flight in {self.state!r}"
        self.inflights.check()
