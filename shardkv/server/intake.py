"""Who may send a large frame now: all clients together have a bound on frames that are still arriving.

A frame is in memory until its last byte is there, and a hundred clients may each be in the middle of one. Small frames
are read as they come; whoever has begun a large one is read on only within the bound, in the order of asking, for so
long only, and while others wait only as long as it goes on arriving, for otherwise those who never finish would keep
everybody else out.
"""

from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

import trio

from shardkv.environment import Clock
from shardkv.errors import ProtocolError

SMALL_FRAME_BYTES: Final = 64 * 1024
"""Frames up to this size need no turn."""
ARRIVING_BYTES_MAX: Final = 8 * 1024 * 1024
"""Large frames that are arriving at once, by their announced size. One alone may be larger."""
ARRIVAL_SECONDS_MAX: Final = 30.0
"""How long a large frame may take from its turn to its last byte."""
STANDSTILL_SECONDS: Final = 0.5
"""Clients doubt a node that is silent for three times as long, and they are while they wait for their turn."""
STANDSTILL_BYTES: Final = 16 * 1024
"""Of whom less arrives in that time while others wait, the connection is given up."""


class Intake:
    """A node's turns at sending large frames. Invariant: more than the bound is arriving only if it is one frame."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.arriving_bytes = 0
        self._waiting: deque[tuple[int, trio.Event]] = deque()

    @property
    def wanted(self) -> bool:
        """Whether anybody waits for a turn."""
        return bool(self._waiting)

    @asynccontextmanager
    async def turn(self, frame_bytes: int) -> AsyncIterator[None]:
        """Wait for a turn to receive a frame of this size. Raises ProtocolError when it then takes too long."""
        if self._waiting or not self._fits(frame_bytes):
            turn = trio.Event()
            self._waiting.append((frame_bytes, turn))
            try:
                await turn.wait()
            except trio.Cancelled:
                if turn.is_set():
                    self._leave(frame_bytes)
                else:
                    self._waiting.remove((frame_bytes, turn))
                    self._let_in()  # it may have stood before smaller ones
                raise
        else:
            self.arriving_bytes += frame_bytes
        try:
            with self._clock.deadline(ARRIVAL_SECONDS_MAX) as scope:
                yield
            if scope.cancelled_caught:
                raise ProtocolError(f"a frame of {frame_bytes} bytes took longer than {ARRIVAL_SECONDS_MAX:g} s")
        finally:
            self._leave(frame_bytes)

    def _fits(self, frame_bytes: int) -> bool:
        return not self.arriving_bytes or self.arriving_bytes + frame_bytes <= ARRIVING_BYTES_MAX

    def _leave(self, frame_bytes: int) -> None:
        self.arriving_bytes -= frame_bytes
        self._let_in()

    def _let_in(self) -> None:
        while self._waiting and self._fits(self._waiting[0][0]):
            size, turn = self._waiting.popleft()
            self.arriving_bytes += size
            turn.set()

    def check(self) -> None:
        assert self.arriving_bytes >= 0, f"{self.arriving_bytes} bytes are arriving"
        assert self.arriving_bytes or not self._waiting, f"{len(self._waiting)} frames wait for nothing"
