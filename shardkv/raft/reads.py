"""ReadIndex: linearizable reads without a log entry (thesis 6.4).

A read is confirmed by a heartbeat that a quorum answered after the read came in. Reads are numbered in order of
arrival and a heartbeat carries the number of the newest, so that one round confirms all that came before it.

A new leader confirms none before it has committed an entry of its own term (trap 8); until then they wait here.
"""

from typing import TYPE_CHECKING, NamedTuple

from shardkv.raft.messages import NONE, Message, MessageType
from shardkv.raft.quorum import joint_committed_index

if TYPE_CHECKING:
    from shardkv.raft.state import Raft

_NUMBER_BYTES = 8


class ReadState(NamedTuple):
    """A confirmed read: it may be served from a state that has applied ``index``."""

    index: int  # type: ignore[assignment]  # the domain name wins over tuple.index
    context: bytes


class PendingReads:
    """The reads that a leader has not confirmed yet. Made when first needed."""

    __slots__ = ("acknowledged", "confirmed", "postponed", "unconfirmed")

    def __init__(self) -> None:
        self.postponed: list[Message] = []
        """Reads that came before this term's first commit."""
        self.unconfirmed: list[tuple[Message, int]] = []
        """Reads, each with the commit index at which it came in."""
        self.confirmed = 0
        """How many reads were confirmed before the first of ``unconfirmed``."""
        self.acknowledged: dict[int, int] = {}
        """For each peer the number of the newest read that a heartbeat answer of it has confirmed."""

    def __len__(self) -> int:
        return len(self.postponed) + len(self.unconfirmed)

    @property
    def newest(self) -> int:
        """The number of the newest read."""
        return self.confirmed + len(self.unconfirmed)

    def check(self) -> None:
        assert all(number <= self.newest for number in self.acknowledged.values()), (
            f"{self.acknowledged} beyond {self.newest}"
        )


def heartbeat_context(raft: "Raft") -> bytes:
    """What a heartbeat carries to confirm every read that is pending now."""
    reads = raft.reads
    if reads is None or not reads.unconfirmed:
        return b""
    return reads.newest.to_bytes(_NUMBER_BYTES, "little")


def acknowledge(raft: "Raft", sender: int, context: bytes) -> None:
    """A peer has answered the heartbeat that carried ``context``."""
    reads = raft.reads
    if reads is None or len(context) != _NUMBER_BYTES:
        return
    number = min(int.from_bytes(context, "little"), reads.newest)
    if number > reads.acknowledged.get(sender, 0):
        reads.acknowledged[sender] = number
    _confirm(raft, reads)


def _confirm(raft: "Raft", reads: PendingReads) -> None:
    configuration = raft.configuration
    confirmed = joint_committed_index(configuration.voters, configuration.voters_outgoing, reads.acknowledged)
    count = confirmed - reads.confirmed
    if count <= 0:
        return
    ready = reads.unconfirmed[:count]
    del reads.unconfirmed[:count]
    reads.confirmed += len(ready)
    for request, index in ready:
        answer(raft, request, index)


def add(raft: "Raft", request: Message) -> None:
    """Number a read; the next heartbeats confirm it. The leader's own confirmation counts at once, if it is a voter."""
    reads = _pending(raft)
    reads.unconfirmed.append((request, raft.log.committed))
    reads.acknowledged[raft.id] = reads.newest


def postpone(raft: "Raft", request: Message) -> None:
    _pending(raft).postponed.append(request)


def take_postponed(raft: "Raft") -> list[Message]:
    """The reads that waited for this term's first commit."""
    reads = raft.reads
    if reads is None or not reads.postponed:
        return []
    postponed, reads.postponed = reads.postponed, []
    return postponed


def has_room(raft: "Raft") -> bool:
    return raft.reads is None or len(raft.reads) < raft.settings.reads_pending_max


def _pending(raft: "Raft") -> PendingReads:
    if raft.reads is None:
        raft.reads = PendingReads()
    return raft.reads


def answer(raft: "Raft", request: Message, index: int) -> None:
    """Give a confirmed read to this replica's host, or send it back to the follower it came from."""
    if request.from_ in (NONE, raft.id):
        raft.read_states.append(ReadState(index, request.context))
    else:
        raft.send(Message(MessageType.READ_INDEX_RESP, request.from_, index=index, context=request.context))
