"""How much room a node's disk has left, and what the node takes on while there is little.

Pure: it is told how much is free and which calls failed, and answers. Does not live here: measuring (``maintenance``),
refusing (``server.requests``, the driver), trying again (the driver, ``snapshots``). The rule: client writes stop while
there still is room for what a full node must go on writing, which is Raft's own small records, the engine's flushes and
what frees space; reads never ask.

Four states. With one and a half times ``free_bytes_min`` free, or more, the node takes everything. Below, it is *short*
of room: it still does, and says so to the placement leader, which gives its leaderships to nodes with room, so that
while there are such nobody is refused anything; of ranges whose data it waits for it takes those and no more. Below
``free_bytes_min`` it is *low*: it refuses writes, but not deletes, since they are how a user makes room. Below half of
that, or once a call has failed for lack of room, it is *full*: it refuses deletes too, and takes no client data from
other nodes' leaders. It leaves a state only when there is a quarter more than the state's bound, and counts as roomy
only with three times ``free_bytes_min``, so that it does not flicker.
"""

from dataclasses import replace
from typing import Final

from shardkv.errors import OutOfSpace
from shardkv.raft.messages import EntryType, Message, MessageType
from shardkv.types import Fullness

SHORT_FRACTION: Final = 1.5
ROOMY_FRACTION: Final = 3.0
"""To leave that state: its leaderships come back then, and a flush or a compaction takes and gives some hundred MiB."""
FULL_FRACTION: Final = 0.5
LEAVE_FRACTION: Final = 1.25
_MIB: Final = 1024 * 1024


class Space:
    """Everything is called in the loop and returns at once.

    Invariants: ``full`` implies ``low``, which implies ``short``; with a failed call under way, it is full.
    """

    __slots__ = ("_failed", "_free_bytes", "_free_bytes_min", "_place", "full", "low", "short")

    def __init__(self, free_bytes_min: int = 0, place: str = "the data directory") -> None:
        self._free_bytes_min = free_bytes_min
        self._place = place
        self._free_bytes: int | None = None
        self._failed: dict[str, str] = {}
        """What was last tried in vain, by whom, and why it failed."""
        self.short = False
        """Others should lead, and replicas that wait for their data take no entries."""
        self.low = False
        """Refuse client writes that are not deletes."""
        self.full = False
        """Refuse every client write, and entries and snapshots of other nodes."""

    def measured(self, free_bytes: int) -> None:
        """So much is free on the disk now."""
        self._free_bytes = free_bytes
        self._judge()

    def failed(self, who: str, error: OutOfSpace) -> None:
        """A call failed for lack of room. It counts until ``who`` has succeeded."""
        self._failed[who] = str(error)
        self._judge()

    def succeeded(self, who: str) -> None:
        if self._failed.pop(who, None) is not None:
            self._judge()

    def _judge(self) -> None:
        self.full = bool(self._failed) or self._below(FULL_FRACTION * (LEAVE_FRACTION if self.full else 1))
        self.low = self.full or self._below(LEAVE_FRACTION if self.low else 1)
        self.short = self.low or self._below(ROOMY_FRACTION if self.short else SHORT_FRACTION)

    def _below(self, fraction: float) -> bool:
        return self._free_bytes is not None and self._free_bytes < self._free_bytes_min * fraction

    @property
    def free_bytes(self) -> int:
        """As it was measured last; 0 before that."""
        return self._free_bytes or 0

    @property
    def fullness(self) -> Fullness:
        if self.full:
            return Fullness.FULL
        if self.low:
            return Fullness.LOW
        return Fullness.SHORT if self.short else Fullness.ROOMY

    def refusal(self) -> OutOfSpace:
        """What a client is told whose write is refused."""
        assert self.low, "a refusal while there is room"
        if self._failed:
            why = f"its disk is full ({next(iter(self._failed.values()))})"
        else:
            free, needed = (self._free_bytes or 0) / _MIB, self._free_bytes_min * LEAVE_FRACTION / _MIB
            why = f"its disk has {free:.0f} MiB left at {self._place} and needs {needed:.0f} MiB"
        taken = "reads are served" if self.full else "reads and deletes are served"
        return OutOfSpace(
            f"this node takes no writes now, for {why}: free space or enlarge the disk; {taken} meanwhile, and writes "
            "are taken again by themselves once there is room"
        )

    def taken(self, message: Message) -> Message | None:
        """What a full node still takes of a message of another node's leader, or None: all but appends of client data.

        What a new leader needs to begin its term has no data, and is taken though data follow it in the same message;
        so are the data that stand before it there, which its predecessors left: one message a term, and without it the
        leader could serve no read. Membership changes are few and small.
        """
        if message.type is MessageType.APP:
            entries = message.entries
            begins = bool(entries) and entries[0].term < message.term == entries[-1].term
            for position, entry in enumerate(entries):
                if entry.data and entry.type is EntryType.NORMAL and not (begins and entry.term < message.term):
                    return replace(message, entries=entries[:position]) if position else None
        return message

    def check(self) -> None:
        assert self.low or not self.full, "full and not low"
        assert self.short or not self.low, "low and not short of room"
        assert self.full or not self._failed, f"{self._failed} failed, and the node counts as having room"
