"""A wayward carrier between two nodes: it repeats Raft frames, and lets one overtake the next.

On TCP nothing is repeated or reordered, but what Raft is promised is less than what TCP gives: a connection is cut and
dialled anew while its bytes are still on their way, and two connections of the same nodes overtake each other. This
does the same to whole frames of one stream, far more often. The rule: only Raft frames are touched, and only after the
stream's handshake; every other byte passes as it came.
"""

from collections.abc import Callable
from typing import Final

from shardkv.simulation import determinism
from shardkv.wire.frames import HEAD_BYTES, FrameKind

CARRIED_BYTES_MAX: Final = 64 * 1024
"""A larger frame passes as it comes: kept until it is whole, it could fill the stream's window and wait for ever."""
HELD_SECONDS_MAX: Final = 0.3
"""A frame that is held back for the next to overtake it goes on its way after this at the latest."""


class WaywardCarrier:
    """One direction of one stream. ``put`` carries bytes on; ``chance`` and the two probabilities decide.

    Invariant: every byte that came in is put once, in order but for the frames that were held or repeated.
    """

    __slots__ = ("_buffer", "_chance", "_held", "_passing", "_put", "duplicate", "reorder")

    def __init__(
        self, put: Callable[[bytes], None], chance: determinism.SeededRandom, duplicate: float, reorder: float
    ) -> None:
        self._put = put
        self._chance = chance
        self._buffer = bytearray()
        self._held: bytes | None = None
        self._passing = 0
        """Bytes still to come of a frame that is too large to be kept."""
        self.duplicate: float = duplicate
        self.reorder: float = reorder

    def carry(self, data: bytes) -> None:
        """Carry what the sender has sent; frames that are not whole wait for their end."""
        buffer = self._buffer
        buffer += data
        start = 0
        while True:
            if self._passing:
                end = min(start + self._passing, len(buffer))
                if end == start:
                    break
                self._put(bytes(buffer[start:end]))
                self._passing -= end - start
                start = end
                continue
            if len(buffer) - start < HEAD_BYTES:
                break
            size = 4 + int.from_bytes(buffer[start : start + 4], "big")
            if size > CARRIED_BYTES_MAX:
                self._release()
                self._passing = size
                continue
            end = start + size
            if end > len(buffer):
                break
            self._frame(bytes(buffer[start:end]))
            start = end
        del buffer[:start]

    def rest(self) -> None:
        """From now on carry everything as it comes."""
        self.duplicate = self.reorder = 0.0
        self._release()

    def flush(self) -> None:
        """Carry everything on that is kept here: the stream ends."""
        self._release()
        if self._buffer:
            self._put(bytes(self._buffer))
            self._buffer.clear()

    def _frame(self, frame: bytes) -> None:
        if frame[4] != FrameKind.RAFT:
            self._release()
            self._put(frame)
            return
        if self._held is None and self._chance.random() < self.reorder:
            self._held = frame
            determinism.call_at(determinism.now() + HELD_SECONDS_MAX, lambda: self._release(frame))
            return
        self._put(frame)
        if self._chance.random() < self.duplicate:
            self._put(frame)
        self._release()

    def _release(self, frame: bytes | None = None) -> None:
        """Let the held frame go; given one, only if it is still that."""
        held = self._held
        if held is not None and (frame is None or frame is held):
            self._held = None
            self._put(held)
