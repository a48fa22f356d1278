"""The leader's lease, which lets it read without asking anybody (DESIGN 4.5).

A heartbeat carries the leader's clock reading and a promise length. Whoever accepts it refuses pre-votes, votes and
its own elections for that long by its own clock, and echoes the stamp. What a quorum echoed is where the lease
starts; it ends a promise later, shortened by the drift bound. Stamps are taken before a heartbeat leaves and promises
begin after it came in, so a lease ends before the promises do that it rests on.

An election on the leader's own word (``TIMEOUT_NOW``) breaks promises, and may break them long after the transfer was
given up: once one is sent there is no lease in that term (trap 6). Reads then go by ReadIndex. Nothing here is in
etcd-io/raft; without ``LeaseSettings`` nothing here does anything.
"""

from typing import TYPE_CHECKING

from shardkv.raft import freshness
from shardkv.raft.messages import NONE, Message, MessageType
from shardkv.raft.progress import Progress
from shardkv.raft.quorum import EVERYTHING, majority_value

if TYPE_CHECKING:
    from shardkv.raft.state import Raft


def refuses(raft: "Raft") -> bool:
    """Whether votes and elections are promised away, or may have been before a restart."""
    return raft.now < raft.refuse_until


def accept_promise(raft: "Raft", heartbeat: Message) -> int:
    """Promise the sender of a heartbeat of this term what it asks for; how much that is. A promise is never shortened.

    Never more than this replica's own leases ask for: for so long, and no longer, it refuses votes after a restart. A
    leader whose settings differ, for they are being changed node by node, has no lease on less than it asked for.
    """
    promise, settings = heartbeat.lease_promise, raft.settings.lease
    if settings is not None and promise > settings.promise_ns:
        promise = settings.promise_ns
    until = raft.now + promise
    if until > raft.refuse_until:
        raft.refuse_until = until
    return promise


def renew(raft: "Raft", peer: Progress, answer: Message) -> None:
    """A peer has echoed a stamp of this term, and with it its promise."""
    settings = raft.settings.lease
    if settings is None or answer.lease_promise < settings.promise_ns:
        return
    # A stamp that this clock has not reached was never sent from here.
    if peer.lease_stamp < answer.lease_stamp <= raft.now:
        peer.lease_stamp = answer.lease_stamp
        recompute(raft)


def recompute(raft: "Raft") -> None:
    """Find the end of the lease anew: a stamp was echoed, or who counts has changed.

    The leader itself counts as echoing now, if it is a voter; learners never count.
    """
    settings = raft.settings.lease
    if settings is None:
        return
    progress, own = raft.progress, raft.id
    start = EVERYTHING
    for half in (raft.configuration.voters, raft.configuration.voters_outgoing):
        stamps = [EVERYTHING if id_ == own else progress[id_].lease_stamp for id_ in half]
        start = min(start, majority_value(stamps))
    raft.lease_until = start + settings.usable_ns


def stamp(raft: "Raft", heartbeat: Message) -> None:
    """Ask for a promise with a heartbeat, unless it could not be used."""
    settings = raft.settings.lease
    if settings is not None and not raft.lease_suspended:
        heartbeat.lease_stamp = raft.now
        heartbeat.lease_promise = settings.promise_ns


def valid(raft: "Raft", now: int) -> bool:
    """Whether no other leader can have committed anything before ``now``, which must be read after the request came.

    It says nothing of what this replica has applied.
    """
    return (
        now < raft.lease_until
        and raft.settings.lease is not None
        and not raft.lease_suspended
        and raft.transferee == NONE
        # A leader knows all that is committed only when it has committed something itself (thesis 6.4).
        and raft.committed_in_term
    )


def send_timeout_now(raft: "Raft", to: int) -> None:
    """Let a peer begin an election at once. That ends the lease for the rest of the term."""
    freshness.keep(raft)
    raft.lease_suspended = True
    raft.send(Message(MessageType.TIMEOUT_NOW, to))
