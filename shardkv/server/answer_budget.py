"""What all clients of a node together may leave untaken of their answers, and who must wait when it is much.

Lives here: the count of bytes that no socket has taken yet, the queue of large answers that found no room, and the
choice of whom to drop. Does not live here: the answers themselves (``client_connection``).

The rule: an answer that is large is made only while there is room for it, so memory is bounded however many clients
ask and never read; a small one is always given, so nobody else is held up by those. Who stands still while others wait
for room loses its connection.
"""

from collections import deque
from typing import Final, Protocol

import trio

from shardkv.environment import Clock

ANSWER_BYTES_MAX: Final = 9 * 1024 * 1024
"""Answers that all clients together leave untaken; past it no large one is made. The largest of all,
a get's of 8 MiB of values, must fit, or it would wait for ever."""
RESERVE_BYTES: Final = 8 * 1024 * 1024
"""So much more for clients that are known to read, so that those who do not cannot keep them out."""
PROVEN_BYTES: Final = 8 * 1024 * 1024
"""Who has taken so much is known to read: the system keeps about 5 MiB for a connection that nobody reads."""
SMALL_ANSWER_BYTES: Final = 16 * 1024
"""Answers up to this size need no room."""
UNREAD_BYTES_MAX: Final = 256 * 1024
"""Answers that one client has not taken; above it no further request of its connection is looked at."""
UNREAD_BYTES_CROWDED: Final = 64 * 1024
"""The same while half of all the room is taken."""
SHARE_BYTES: Final = ANSWER_BYTES_MAX // 2
"""Of answers that come due all at once, since the reads waited for one confirmation, one client gets so much."""
BACKLOG_BYTES_MAX: Final = 8 * 1024 * 1024
"""Large frames whose requests wait until their client has taken answers; beyond it such requests are told Busy."""
DROP_BYTES_MIN: Final = 8 * 1024 * 1024
"""Above this, and while anybody waits for room, connections that stand still are closed."""
STALLED_SECONDS_MIN: Final = 0.5
"""Who has taken something more recently than this is reading, however large the answer."""
WAIT_SECONDS_MAX: Final = 1.0
"""So long a large answer waits for room; then its request is told Busy. Clients doubt a node that is silent longer."""
LOOK_SECONDS: Final = 0.05
"""How often somebody who waits for room looks for connections that stand still."""


class Holder(Protocol):
    """A client's connection, as far as its untaken answers go."""

    @property
    def stalled_seconds(self) -> float:
        """How long it has taken nothing although something waits for it."""
        ...

    @property
    def proven(self) -> bool:
        """Whether it has taken ``PROVEN_BYTES``."""
        ...

    def give_up(self) -> None:
        """Close the connection; it counts nothing from then on."""
        ...


class _Waiting:
    __slots__ = ("answer_bytes", "holder", "room")

    def __init__(self, holder: Holder, answer_bytes: int) -> None:
        self.holder = holder
        self.answer_bytes = answer_bytes
        self.room = trio.Event()


class AnswerBudget:
    """One per node. Invariant: beyond small answers, no more than the two bounds together is untaken or promised."""

    def __init__(
        self, clock: Clock, *, answer_bytes_max: int = ANSWER_BYTES_MAX, reserve_bytes: int = RESERVE_BYTES
    ) -> None:
        self._clock = clock
        self._answer_bytes_max = answer_bytes_max
        self._reserve_bytes = reserve_bytes
        self._untaken: dict[Holder, int] = {}
        """Only those that have left something."""
        self._promised_bytes = 0
        """Room for those whose wait has just ended."""
        self._waiting: deque[_Waiting] = deque()
        self._looked_ns = 0
        self.untaken_bytes = 0
        self.releases = 0
        """How often room was made."""
        self.backlog_bytes = 0
        """Large frames in memory whose requests wait until their client takes answers."""
        self.unread_bytes_max = UNREAD_BYTES_MAX
        """What one client may leave untaken before its requests are no more looked at."""
        self.share_bytes = SHARE_BYTES
        """What one client may be given at once of answers that came due together."""

    @property
    def full(self) -> bool:
        return self.untaken_bytes + self._promised_bytes >= self._answer_bytes_max

    def count(self, holder: Holder, untaken_bytes: int) -> None:
        """A client's answers that no socket has taken are so many bytes now."""
        before = self._untaken.pop(holder, 0)
        if untaken_bytes:
            self._untaken[holder] = untaken_bytes
        self.untaken_bytes += untaken_bytes - before
        if self.untaken_bytes * 2 >= self._answer_bytes_max:
            self.unread_bytes_max = self.share_bytes = UNREAD_BYTES_CROWDED
        else:
            self.unread_bytes_max, self.share_bytes = UNREAD_BYTES_MAX, SHARE_BYTES
        if untaken_bytes < before:
            self.releases += 1
            self._grant()
        elif self.untaken_bytes > DROP_BYTES_MIN:
            self._drop_stalled()

    def forget(self, holder: Holder) -> None:
        """The connection is over."""
        self.count(holder, 0)

    def fits(self, holder: Holder, answer_bytes: int) -> bool:
        """Whether there is room for a large answer now. Nobody overtakes who waits, but by being known to read."""
        if holder.proven:
            return self._room(self._answer_bytes_max + self._reserve_bytes, answer_bytes)
        return not self._waiting and self._room(self._answer_bytes_max, answer_bytes)

    def _room(self, bytes_max: int, answer_bytes: int) -> bool:
        return self.untaken_bytes + self._promised_bytes + answer_bytes <= bytes_max

    async def wait(self, holder: Holder, answer_bytes: int) -> bool:
        """Wait for room; whether there is. The caller makes its answer before it awaits anything else."""
        waiting = _Waiting(holder, answer_bytes)
        self._waiting.append(waiting)
        try:
            with self._clock.deadline(WAIT_SECONDS_MAX):
                while not waiting.room.is_set():
                    self._drop_stalled()
                    self._grant()
                    with self._clock.deadline(LOOK_SECONDS):
                        await waiting.room.wait()
        finally:
            if waiting.room.is_set():
                self._promised_bytes -= answer_bytes
            else:
                self._waiting.remove(waiting)
                self._grant()  # those behind it may fit
        return waiting.room.is_set()

    def _grant(self) -> None:
        """Let those have room who waited longest, as far as it goes; clients that are known to read have their own."""
        strangers = True
        for waiting in list(self._waiting):
            bytes_max = self._answer_bytes_max
            if waiting.holder.proven:
                bytes_max += self._reserve_bytes
            elif not strangers:
                continue
            if self._room(bytes_max, waiting.answer_bytes):
                self._waiting.remove(waiting)
                self._promised_bytes += waiting.answer_bytes
                waiting.room.set()
            elif not waiting.holder.proven:
                strangers = False

    def _drop_stalled(self) -> None:
        """Close connections that stand still, the longest first, until what is left is little or room for all."""
        now_ns = self._clock.monotonic_ns()
        if now_ns - self._looked_ns < LOOK_SECONDS * 0.5e9:
            return
        self._looked_ns = now_ns
        stalled = {holder: holder.stalled_seconds for holder in self._untaken}
        wanted = sum([waiting.answer_bytes for waiting in self._waiting])
        for holder in sorted(stalled, key=lambda each: -stalled[each]):
            if stalled[holder] < STALLED_SECONDS_MIN:
                return
            if self.untaken_bytes <= DROP_BYTES_MIN and self._room(self._answer_bytes_max, wanted):
                return
            holder.give_up()

    def check(self) -> None:
        """Walk every invariant."""
        total = sum(self._untaken.values())
        assert total == self.untaken_bytes, f"{total} bytes are untaken, counted {self.untaken_bytes}"
        assert self._promised_bytes >= 0, f"{self._promised_bytes} bytes are promised"
        assert self.backlog_bytes >= 0, f"a backlog of {self.backlog_bytes} bytes"
        assert not any(waiting.room.is_set() for waiting in self._waiting), "somebody waits although there is room"
