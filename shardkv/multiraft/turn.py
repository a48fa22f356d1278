"""The turn, as a pure function: what all groups with work want done, gathered into one value.

Lives here: the sorting of every group's ready work into what may be sent now, what is to be logged first, what is to
be applied. Does not live here: doing any of it, which is the driver's. The rule: a message that follows from an
unsynced term, vote or entry comes back only as one of the ``responses`` of a log append; whatever stands in
``messages`` may leave at once.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

from shardkv.multiraft.replica import Replica
from shardkv.raft.messages import HardState, Message, MessageType
from shardkv.storage.wal import LogUpdate


@dataclass(slots=True)
class Turn:
    """Everything that one turn has to do, in the order in which the driver does it."""

    appends: list[tuple[Replica, Message]] = field(default_factory=list)
    """Log appends; their responses are delivered after the one sync that covers them all."""
    must_sync: bool = False
    """Whether anything waits for ``appends``. When not, all that they say is that more is committed, which a crash may
    forget: they ride with the next record that somebody waits for."""
    messages: list[tuple[Replica, Message]] = field(default_factory=list)
    """For other replicas; may leave now."""
    snapshots: list[tuple[Replica, Message]] = field(default_factory=list)
    """Snapshots to stream to followers."""
    installs: list[tuple[Replica, Message]] = field(default_factory=list)
    """Appends that carry a snapshot: the engine comes first, then the log. Their group rests until both are done."""
    applies: list[tuple[Replica, Message]] = field(default_factory=list)
    """Committed entries for the state machines."""
    confirmed: list[Replica] = field(default_factory=list)
    """Replicas with newly confirmed reads. Their index may be applied already: then nothing else will serve them."""
    changed: list[Replica] = field(default_factory=list)
    """Replicas whose role or leader changed."""


def gather(replicas: Iterable[Replica]) -> Turn:
    """The work of every group that has some. A group hands out all that it has at once."""
    turn = Turn()
    for replica in replicas:
        if not replica.installing and replica.raft.has_ready():
            _gather(replica, turn)
    return turn


def _gather(replica: Replica, turn: Turn) -> None:
    ready = replica.raft.ready()
    if ready.soft_state is not None:
        turn.changed.append(replica)
    if ready.read_states:
        for read_state in ready.read_states:
            replica.confirm_reads(read_state.context, read_state.index)
        turn.confirmed.append(replica)
    for message in ready.messages:
        kind = message.type
        if kind is MessageType.STORAGE_APPEND:
            if message.snapshot is not None and not message.snapshot.empty:
                turn.installs.append((replica, message))
                replica.installing = True
            else:
                turn.appends.append((replica, message))
                if ready.must_sync or message.responses:
                    turn.must_sync = True
        elif kind is MessageType.STORAGE_APPLY:
            turn.applies.append((replica, message))
        elif kind is MessageType.SNAP:
            turn.snapshots.append((replica, message))
        else:
            turn.messages.append((replica, message))


def hard_state_of(message: Message) -> HardState | None:
    """The hard state that a log append carries, or None if it does not change."""
    if message.term or message.vote or message.commit:
        return HardState(message.term, message.vote, message.commit)
    return None


def log_update(replica: Replica, message: Message) -> LogUpdate:
    return LogUpdate(replica.range_id, hard_state=hard_state_of(message), entries=message.entries)
