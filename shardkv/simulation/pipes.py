"""One direction of a simulated connection: when each piece that is sent arrives, and what a partition holds up.

Lives here: the link's delay, speed and losses, the order of what is under way, and the acknowledgements that make room
for more. Does not live here: who is connected to whom, and which links are cut (``network``). The rule: pieces arrive
in the order in which they were sent, or not at all.
"""

from collections import deque
from dataclasses import dataclass
from typing import Final

import trio

from shardkv.simulation import determinism, scheduler
from shardkv.simulation.frames import WaywardCarrier

RETRANSMIT_SECONDS: Final = 0.2
"""After this a lost packet is sent again, and after twice as long each further time (Linux's shortest)."""
RETRANSMIT_SECONDS_MAX: Final = 1.6


@dataclass(slots=True)
class Link:
    """How bytes travel from one node to another; each direction has its own. May be changed at any time."""

    delay_seconds_min: float = 0.0002
    delay_seconds_max: float = 0.0005
    bytes_per_second: float | None = None
    """None is as fast as you like."""
    reset_probability: float = 0.0
    """Of each send: that it resets the connection instead."""
    loss_probability: float = 0.0
    """Of each packet: that it must be sent again. What comes behind it on the same connection waits for it."""
    duplicate_probability: float = 0.0
    """Of each Raft frame of a connection made from now on: that it comes twice; see ``frames``."""
    reorder_probability: float = 0.0
    """Of each Raft frame of a connection made from now on: that the next one overtakes it."""
    blocked: bool = False
    """Nothing arrives; set by :meth:`SimulatedNetwork.block`, not by hand."""
    cut_after_bytes: int | None = None
    """Bytes that still pass before the connection that carries the last of them is reset."""


END: Final = b""
"""In a pipe: the end of the stream."""


class Reset:
    """In a pipe: the connection is gone."""

    def __len__(self) -> int:
        return 0


RESET: Final = Reset()


class Signal:
    """Wakes every task that waits for one thing; they look again for themselves."""

    __slots__ = ("_waiting",)

    def __init__(self) -> None:
        self._waiting: list[trio.lowlevel.Task] = []

    def notify(self) -> None:
        if self._waiting:
            waiting, self._waiting = self._waiting, []
            for task in waiting:
                trio.lowlevel.reschedule(task)

    async def wait(self) -> None:
        """Until the next :meth:`notify`."""
        task = trio.lowlevel.current_task()
        self._waiting.append(task)

        def abort(_: object) -> trio.lowlevel.Abort:
            self._waiting.remove(task)
            return trio.lowlevel.Abort.SUCCEEDED

        await scheduler.park(abort)


class Pipe:
    """One direction of a stream: what has been sent and not yet read, each piece with the moment when it arrives."""

    __slots__ = (
        "back",
        "blocked_since",
        "carrier",
        "closed",
        "credit_held",
        "free_at",
        "link",
        "link_back",
        "pieces",
        "readable",
        "source",
        "target",
        "under_way",
        "window",
    )

    def __init__(self, source: str, target: str, link: Link, link_back: Link) -> None:
        self.source: str = source
        self.target: str = target
        self.link: Link = link
        self.link_back: Link = link_back
        self.pieces: deque[tuple[float, bytes | Reset]] = deque()
        self.free_at: float = 0.0
        """When the link has carried everything that was sent so far; arrivals never overtake one another."""
        self.under_way: int = 0
        """Bytes sent whose acknowledgement has not come back."""
        self.credit_held: int = 0
        """Bytes read whose acknowledgement the way back does not let through."""
        self.blocked_since: float | None = None
        self.closed: bool = False
        """The sender has closed it: nothing more is sent."""
        self.carrier: WaywardCarrier | None = None
        self.readable: Signal = Signal()
        """Something arrived, or never will: its reader waits for it."""
        self.window: Signal = Signal()
        """There is room again, or nobody there: its sender waits for it."""
        self.back: Pipe | None = None
        """The stream's other direction."""

    def put(self, data: bytes | Reset, random: determinism.SeededRandom) -> None:
        now = determinism.now()
        link = self.link
        delay = link.delay_seconds_min
        if link.delay_seconds_max > delay:
            delay += random.random() * (link.delay_seconds_max - delay)
        if link.loss_probability:
            again = RETRANSMIT_SECONDS
            while again <= RETRANSMIT_SECONDS_MAX and random.random() < link.loss_probability:
                delay += again
                again *= 2
        transfer = len(data) / link.bytes_per_second if link.bytes_per_second else 0.0
        self.free_at = max(self.free_at, now + delay) + transfer
        self.pieces.append((self.free_at, data))
        self.under_way += len(data)
        determinism.call_at(self.free_at, self.arrive)

    def arrive(self) -> None:
        """Wake whom it concerns that something may have arrived."""
        self.readable.notify()
        if self.closed and self.back is not None:
            self.back.window.notify()

    def end(self, with_: bytes | Reset, random: determinism.SeededRandom) -> None:
        """The last piece, if there is none yet."""
        if not self.closed:
            self.closed = True
            if self.carrier is not None and with_ == END:
                self.carrier.flush()
            self.put(with_, random)

    def arrived(self) -> bool:
        """Whether the first piece is there to be read."""
        return bool(self.pieces) and self._is_there(self.pieces[0][0])

    def end_arrived(self) -> bool:
        """Whether the reader's system knows that the other side is gone, though its program may have more to read."""
        return self.closed and self._is_there(self.pieces[-1][0])

    def _is_there(self, moment: float) -> bool:
        return moment <= determinism.now() and (self.blocked_since is None or moment <= self.blocked_since)

    def take(self, count_max: int) -> bytes | Reset:
        """Read what has arrived, at most ``count_max`` bytes; a piece at a time, as a socket returns what it has."""
        moment, data = self.pieces.popleft()
        if isinstance(data, Reset) or data == END:
            self.pieces.appendleft((moment, data))  # It stays true.
            return data
        parts = [data]
        size = len(data)
        while size < count_max and self.arrived() and isinstance(following := self.pieces[0][1], bytes) and following:
            self.pieces.popleft()
            parts.append(following)
            size += len(following)
        whole = b"".join(parts)
        if size > count_max:
            self.pieces.appendleft((moment, whole[count_max:]))
            whole = whole[:count_max]
        if self.link_back.blocked:
            self.credit_held += len(whole)
        else:
            self.under_way -= len(whole)
            self.window.notify()
        return whole

    def block(self) -> None:
        if self.blocked_since is None:
            self.blocked_since = determinism.now()

    def unblock(self) -> None:
        """The lost packets are sent again: what had not arrived arrives now, after a fresh delay, in order."""
        if self.blocked_since is not None:
            since, self.blocked_since = self.blocked_since, None
            again = determinism.now() + self.link.delay_seconds_max
            self.pieces = deque(
                (moment if moment <= since else max(moment, again), data) for moment, data in self.pieces
            )
            self.free_at = max(self.free_at, again)
            for moment in dict.fromkeys(moment for moment, _ in self.pieces):
                determinism.call_at(moment, self.arrive)

    def abandon(self) -> None:
        """The sender's machine is dead: of what had not arrived when the way was blocked nothing is sent again."""
        since = self.blocked_since
        if since is not None:
            # That it was closed is kept: its peers find that out all the same, once the machine is back.
            kept = [(moment, data) for moment, data in self.pieces if moment <= since or not len(data)]
            self.under_way -= sum(len(data) for _, data in self.pieces) - sum(len(data) for _, data in kept)
            self.pieces = deque(kept)

    def hurry(self) -> None:
        """The link is what it was: what crept along it, or waited to be sent again, is there after a fresh delay."""
        soon = determinism.now() + self.link.delay_seconds_max
        if self.free_at > soon:
            self.free_at = soon
            self.pieces = deque((min(moment, soon), data) for moment, data in self.pieces)
            determinism.call_at(soon, self.arrive)

    def release_credit(self) -> None:
        if self.credit_held:
            self.under_way -= self.credit_held
            self.credit_held = 0
            self.window.notify()
