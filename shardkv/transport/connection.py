"""One stream with an out-buffer: writing costs an append, a flush one non-blocking send. Frames are not known here.

The rule: a slow reader pays for itself. What it does not take stays in a buffer with a bound; past the bound its data
is dropped or its connection closed, and nobody else waits and no memory grows.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import trio

from shardkv.environment import Clock, Stream

RECEIVE_BYTES_MAX: Final = 64 * 1024
"""One read. Large enough that a busy connection costs few system calls, small enough to be fair among connections; and
below what the allocator maps anew for each read, which costs ten times as much as the read (128 KiB with glibc)."""
SEND_PIECE_BYTES: Final = 256 * 1024
"""What is joined for one send: about what a socket's buffer takes at once."""
BUFFER_BYTES_MAX: Final = 64 * 1024 * 1024
"""The default bound of an out-buffer: a few of the largest frames."""


@dataclass(frozen=True, slots=True)
class ConnectionStatistics:
    """A snapshot of one connection."""

    remote: str
    bytes_sent: int
    """Handed to the system, not necessarily received."""
    bytes_buffered: int
    """Written and not yet handed to the system."""
    bytes_dropped: int
    """Not taken because the buffer was full."""
    writer_wakeups: int
    """How often a flush could not hand everything over and the writer task had to."""


class Connection:
    """A stream with an out-buffer. Not safe for use from several threads; any task of the loop may write.

    Args:
        stream: owned from now on.
        clock: for :meth:`stalled_seconds` only.
        buffer_bytes_max: a write that would take ``buffered`` past this overflows.
        break_on_overflow: close the connection at an overflow (for answers, which must not be lost silently); otherwise
            the data that does not fit is dropped and counted (for Raft messages, which may be lost).

    :meth:`run_writer` must run for as long as the connection is used.
    """

    __slots__ = (
        "_break_on_overflow",
        "_clock",
        "_drained",
        "_dropped",
        "_out",
        "_progress_ns",
        "_sent",
        "_stream",
        "_wakeups",
        "_writer_busy",
        "_writer_wanted",
        "buffer_bytes_max",
        "buffered",
        "closed",
        "on_progress",
        "overflowing",
        "reason",
    )

    def __init__(
        self,
        stream: Stream,
        *,
        clock: Clock,
        buffer_bytes_max: int = BUFFER_BYTES_MAX,
        break_on_overflow: bool = True,
    ) -> None:
        self._stream = stream
        self._clock = clock
        self._break_on_overflow = break_on_overflow
        self._out: deque[bytes] = deque()
        """What is still to be sent, without the piece that the writer task holds."""
        self._writer_busy = False
        """The writer task owns the stream's sending side: a flush must leave it alone, or bytes change their order."""
        self._writer_wanted = trio.Event()
        self._drained: trio.Event | None = None
        self._progress_ns = 0
        self._sent = 0
        self._dropped = 0
        self._wakeups = 0
        self.buffer_bytes_max = buffer_bytes_max
        self.buffered = 0
        """Bytes written and not yet handed to the system, with the piece that the writer task holds."""
        self.overflowing = False
        """The buffer is full: the other side reads slower than we write. Cleared once it is half empty."""
        self.on_progress: Callable[[], None] | None = None
        """Called when ``buffered`` has shrunk but by a flush: the writer task has sent some, or it was closed. That is
        the last time, and whoever is called is no longer kept."""
        self.closed = False
        """Closed by us or found broken; nothing can be sent any more."""
        self.reason = ""
        """Why it is closed, for people."""

    @property
    def remote(self) -> str:
        return self._stream.remote

    @property
    def bytes_sent(self) -> int:
        """Handed to the system, not necessarily received."""
        return self._sent

    def check(self) -> None:
        """Walk every invariant."""
        waiting = sum(map(len, self._out))
        assert self.buffered >= waiting, f"{self.buffered} bytes are counted but {waiting} are waiting"
        assert self._writer_busy or self.buffered == waiting, f"{self.buffered} counted, {waiting} waiting, no writer"
        assert not self.closed or self.buffered == 0, f"a closed connection keeps {self.buffered} bytes"
        assert self._break_on_overflow or self.buffered <= self.buffer_bytes_max, f"{self.buffered} bytes buffered"

    def write(self, data: bytes) -> bool:
        """Append ``data`` to the buffer; the next :meth:`flush` sends it.

        Returns whether it was taken: not on a closed connection (whose reader learns of it) nor past the bound. Data
        that finds the buffer empty is always taken, so the bound never refuses a single large frame for good.
        """
        if self.closed:
            return False
        size = len(data)
        buffered = self.buffered
        if buffered + size > self.buffer_bytes_max and buffered:
            self._overflow(size)
            return False
        self.buffered = buffered + size
        self._out.append(data)
        return True

    def _overflow(self, size: int) -> None:
        self.overflowing = True
        self._dropped += size
        if self._break_on_overflow:
            self.close_now(f"{self.remote} does not read its answers: {self.buffered} bytes are waiting for it")

    def flush(self) -> None:
        """Hand what is buffered to the system without waiting; what it does not take now goes to the writer task."""
        out = self._out
        if not out or self._writer_busy:
            return
        if self.buffered > SEND_PIECE_BYTES:
            self._wake_writer()
            return
        data = out[0] if len(out) == 1 else b"".join(out)
        try:
            sent = self._stream.send_nowait(data)
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            self.close_now(str(error))
            return
        out.clear()
        self._sent += sent
        self.buffered -= sent
        if sent < len(data):
            out.append(data[sent:])
            self._wake_writer()
        elif self._drained is not None:
            self._progress()

    def _wake_writer(self) -> None:
        self._writer_busy = True
        self._wakeups += 1
        self._progress_ns = self._clock.monotonic_ns()
        self._writer_wanted.set()

    def _progress(self) -> None:
        """The buffer has shrunk: tell those who wait for it."""
        if self.overflowing and self.buffered * 2 <= self.buffer_bytes_max:
            self.overflowing = False
        if self._drained is not None:
            self._drained.set()
            self._drained = None

    async def run_writer(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Service: send what a flush could not. Returns once the connection is closed."""
        task_status.started()
        while not self.closed:
            await self._writer_wanted.wait()
            self._writer_wanted = trio.Event()
            while self._out:
                piece = self._next_piece()
                try:
                    await self._stream.send_all(piece)
                except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
                    self.close_now(str(error))
                    return
                self._count_sent(len(piece))
            self._writer_busy = False

    def _count_sent(self, size: int) -> None:
        """The writer has handed a piece over; if the connection was closed meanwhile, nothing is counted any more."""
        if not self.closed:
            self._sent += size
            self.buffered -= size
            self._progress_ns = self._clock.monotonic_ns()
            self._progress()
            if self.on_progress is not None:
                self.on_progress()

    def _next_piece(self) -> bytes:
        out = self._out
        first = out.popleft()
        if len(first) > 2 * SEND_PIECE_BYTES:
            # Cut, so that progress is seen and memory freed long before the other side has taken all of it.
            starts = range(0, len(first), SEND_PIECE_BYTES)
            out.extendleft([first[start : start + SEND_PIECE_BYTES] for start in reversed(starts)])
            return out.popleft()
        if not out or len(first) >= SEND_PIECE_BYTES:
            return first
        parts = [first]
        size = len(first)
        while out and size < SEND_PIECE_BYTES:
            parts.append(out.popleft())
            size += len(parts[-1])
        return b"".join(parts)

    async def drain(self, below: int) -> None:
        """Flush, and wait until fewer than ``below`` bytes are buffered. ``drain(1)`` waits for all of them.

        Raises:
            trio.ClosedResourceError: the connection is closed, or was while we waited.
        """
        assert below > 0, f"the buffer never has fewer than {below} bytes"
        self.flush()
        while self.buffered >= below and not self.closed:
            if self._drained is None:
                self._drained = trio.Event()
            await self._drained.wait()
        if self.closed:
            raise trio.ClosedResourceError(self.reason)

    async def receive(self, count_max: int = RECEIVE_BYTES_MAX) -> bytes:
        """The next bytes, at most ``count_max``, or ``b""`` once the other side has closed.

        Raises:
            trio.BrokenResourceError: the connection is lost.
            trio.ClosedResourceError: it was closed by us.
        """
        try:
            data = await self._stream.receive(count_max)
        except trio.BrokenResourceError as error:
            self.close_now(str(error))
            raise
        return data

    def stalled_seconds(self) -> float:
        """How long the other side has taken nothing although data is waiting for it; 0 when none is."""
        if not self._writer_busy or self.closed:
            return 0.0
        return (self._clock.monotonic_ns() - self._progress_ns) / 1e9

    def close_now(self, reason: str = "closed by this node") -> None:
        """Close without waiting; what is buffered is lost, and the tasks inside get trio.ClosedResourceError."""
        if self.closed:
            return
        self.closed = True
        self.reason = reason
        self._out.clear()
        self.buffered = 0
        self._stream.close_now()
        self._writer_wanted.set()
        if self._drained is not None:
            self._drained.set()
        on_progress, self.on_progress = self.on_progress, None
        if on_progress is not None:
            on_progress()

    async def aclose(self, reason: str = "closed by this node") -> None:
        """Flush what the system takes at once, then close in order, so that the last frames arrive if they can."""
        self.flush()
        if not self.closed:
            await self._stream.aclose()
        self.close_now(reason)

    def statistics(self) -> ConnectionStatistics:
        return ConnectionStatistics(
            remote=self.remote,
            bytes_sent=self._sent,
            bytes_buffered=self.buffered,
            bytes_dropped=self._dropped,
            writer_wakeups=self._wakeups,
        )
