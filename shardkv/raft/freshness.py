"""How old a replica's state is at most, for reads that need not be the newest (DESIGN 2.3, 4.5).

A replica is *fresh as of* a moment of its own clock if it has applied everything that anybody had committed by then.
Having heard from a leader says nothing of that: the replica's log may lag, and the leader may be one no more.

The proof is a round trip. An answer to a heartbeat carries the follower's own clock reading; later heartbeats carry
back the newest reading that came in, and with it the leader's commit index, but only under a valid lease. So, with R
the moment of the reading and N the leader's clock reading under which the heartbeat was made:

1. N was read after the follower's answer had come in, so R lies before N.
2. The lease was valid at N, so nobody else had committed anything by then (``lease``, and the term has a commit).
3. The commit index that the heartbeat carries is the leader's at N or later: it covers all that was committed by R.
4. What is committed stays so. Whoever has applied that index is fresh as of R, whatever becomes of leader and term.

All delays lie between R and now, so they make the age larger and never wrong; a deposed leader has no lease and proves
nothing. R is a reading of the same clock that the age is measured with: only its rate matters, and the age is stretched
by the drift bound, for whoever is told it has another clock. A reading that this replica has not made since it was
made is none of its own, and is ignored: it travels with an offset drawn at the start, for the clock of a machine that
was started anew may show once more what it showed before.

Nothing here is in etcd-io/raft; without ``LeaseSettings`` nothing here does anything.
"""

from math import ceil
from typing import TYPE_CHECKING, Final, NamedTuple

from shardkv.raft.messages import Message
from shardkv.raft.progress import Progress

if TYPE_CHECKING:
    from shardkv.raft.state import Raft

OFFSETS: Final = 1 << 62
"""How many there are. With a clock's nanoseconds on top, a reading still fits into 64 bits."""


class Proof(NamedTuple):
    """Whoever has applied ``index`` has all that was committed at the moment ``at`` of this replica's clock."""

    index: int  # type: ignore[assignment]  # the domain name wins over tuple.index
    at: int


def prove(raft: "Raft", peer: Progress, heartbeat: Message) -> None:
    """Tell a follower what was committed when its newest answer came in. To be called only under a valid lease."""
    if peer.follower_stamp:
        heartbeat.index = raft.log.committed
        heartbeat.follower_stamp = peer.follower_stamp


def learn(raft: "Raft", heartbeat: Message) -> None:
    """A heartbeat has come that carries a reading of this replica's clock.

    A proof waits until its index is applied, and is not given up for a newer one meanwhile: whoever always lags a
    little would never get to the end of one.
    """
    at = heartbeat.follower_stamp - raft.stamp_offset
    if not raft.made_at <= at <= raft.now:
        return
    pending = raft.proof_pending
    if pending is not None:
        if pending.index > raft.log.applied:
            return
        known = raft.proof
        if known is None or known.at < pending.at:
            raft.proof = pending
    raft.proof_pending = Proof(heartbeat.index, at)


def keep(raft: "Raft") -> None:
    """This leader is about to lead no longer, or no longer alone: what it knew of itself is worth keeping.

    While its lease lasted nobody else committed anything, and it knows what it has committed itself. No ``TIMEOUT_NOW``
    has left in this term, so what the lease rests on held up to now, or as long as the lease lasted.
    """
    if raft.settings.lease is None or raft.lease_suspended or not raft.committed_in_term:
        return
    at = min(raft.now, raft.lease_until)
    if at >= raft.made_at and (raft.proof is None or raft.proof.at < at):
        raft.proof = Proof(raft.log.committed, at)


def age_ns(raft: "Raft", applied: int, now: int) -> int | None:
    """By how much, at most, a state with ``applied`` lags behind what was committed at ``now``; None: by anything.

    In nanoseconds of whatever clock: the bound on how far two may drift apart is added.
    """
    settings = raft.settings.lease
    if settings is None:
        return None
    fresh_at = None
    for proof in (raft.proof, raft.proof_pending):
        if proof is not None and proof.index <= applied and (fresh_at is None or proof.at > fresh_at):
            fresh_at = proof.at
    return None if fresh_at is None else ceil(max(0, now - fresh_at) / (1 - settings.drift))
