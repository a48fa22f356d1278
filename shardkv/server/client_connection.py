"""One client's connection: requests in, answers out, with a bound on everything in between.

Lives here: the reading loop and the gathering of answers into frames. Does not live here: what a request means. A
request costs no task: the reader hands it on, and the answer is put into this connection's buffer by whoever has it.

A client pays for itself. Above its bound of unanswered requests or unread answers its connection is not read, so that
it waits and nobody else does.
"""

from collections.abc import Callable
from typing import Any, Final

import trio

from shardkv import codec
from shardkv.environment import Clock
from shardkv.errors import ProtocolError, ShardKVError, to_wire
from shardkv.machine.clock import HybridClock
from shardkv.server.intake import SMALL_FRAME_BYTES, Intake
from shardkv.transport.connection import Connection
from shardkv.wire import requests
from shardkv.wire.frames import Frame, FrameDecoder, FrameKind, encode_frame
from shardkv.wire.handshake import encode_refused
from shardkv.wire.requests import Request

UNREAD_BYTES_MAX: Final = 256 * 1024
"""Answers that the client has not taken; above it no further request of the connection is looked at."""
READ_BYTES_MAX: Final = 64 * 1024
"""One read: what stays in memory of a client that is not served for the moment, since it leaves its answers unread."""
SLICE_NS: Final = 2_000_000
"""So long the requests of one read are handed on without a break; then everybody else has a turn."""
SLICE_MASK: Final = 3
"""The clock is looked at before every fourth request of a frame: often enough, at 20 ns a request."""
FRAME_BYTES: Final = 1024 * 1024
"""Answers are gathered into frames of about this size."""

_GOODBYE: Final = encode_frame(FrameKind.GOODBYE, b"")


class ClientConnection:
    """A :class:`~shardkv.multiraft.replica.Requester`. ``dirty`` collects connections that have answers to flush."""

    __slots__ = (
        "_answers",
        "_answers_bytes",
        "_clock",
        "_connection",
        "_dirty",
        "_dispatch",
        "_ended",
        "_hybrid_clock",
        "_inflight",
        "_inflight_max",
        "_intake",
        "_on_unread",
        "_room",
        "_slice_end_ns",
    )

    def __init__(
        self,
        connection: Connection,
        hybrid_clock: HybridClock,
        dispatch: Callable[["ClientConnection", Request], None],
        dirty: dict["ClientConnection", None],
        inflight_max: int,
        intake: Intake,
        on_unread: Callable[["ClientConnection"], None],
        clock: Clock,
    ) -> None:
        self._connection = connection
        self._hybrid_clock = hybrid_clock
        self._dispatch = dispatch
        self._dirty = dirty
        self._inflight = 0
        self._inflight_max = inflight_max
        self._intake = intake
        self._on_unread = on_unread
        self._clock = clock
        self._slice_end_ns = 0
        self._ended = False
        """The client has closed its side."""
        self._room: trio.Event | None = None
        self._answers: list[bytes] = []
        self._answers_bytes = 0

    # The requester's side

    def answer(self, request_id: int, result: Any) -> None:
        self._put(codec.dumps([request_id, 0, self._hybrid_clock.last, result]))

    def refuse(self, request_id: int, error: ShardKVError) -> None:
        self._put(codec.dumps([request_id, error.code, self._hybrid_clock.last, to_wire(error)]))

    def _put(self, response: bytes) -> None:
        if not self._answers:
            self._dirty[self] = None
        self._answers.append(response)
        self._answers_bytes += len(response)
        self._inflight -= 1
        if self._answers_bytes > FRAME_BYTES:
            self._frame()

    def _frame(self) -> None:
        answers, self._answers, self._answers_bytes = self._answers, [], 0
        self._connection.write(encode_frame(FrameKind.RESPONSE, requests.join(answers)))

    def flush(self) -> None:
        """Send what has been answered. Called once a turn, and by the reader."""
        if self._answers:
            self._frame()
        self._connection.flush()
        if self._connection.buffered:
            self._on_unread(self)
        if self._room is not None and self._inflight <= self._inflight_max:
            self._room.set()

    @property
    def unread_bytes(self) -> int:
        """Answers that the client has not taken yet."""
        return self._connection.buffered

    @property
    def stalled_seconds(self) -> float:
        """How long it has taken nothing although something waits for it."""
        return self._connection.stalled_seconds()

    def give_up(self) -> None:
        """Close the connection of a client that does not read."""
        self._connection.close_now("the client does not read its answers")

    # The reader

    async def serve(self, decoder: FrameDecoder, frames: list[Frame]) -> None:
        """Read and hand on requests until the client leaves. Returns; errors of the client are answered to it.

        ``frames`` came right behind the greeting.
        """
        try:
            while await self._take(frames):
                # What has been served must not stay in memory while the next bytes are waited for.
                frames.clear()
                if self._answers:
                    self._dirty.pop(self, None)
                    self.flush()
                await self._receive(decoder, frames)
                if self._ended:
                    return
        except ShardKVError as error:
            self._connection.write(encode_refused(error))
            self._connection.flush()

    async def _take(self, frames: list[Frame]) -> bool:
        """Hand on what the frames hold; False after the client's goodbye."""
        clock = self._clock
        self._slice_end_ns = clock.monotonic_ns() + SLICE_NS
        for position, frame in enumerate(frames):
            if position & SLICE_MASK == SLICE_MASK and clock.monotonic_ns() >= self._slice_end_ns:
                await self._pause()
            if frame.kind is FrameKind.REQUEST:
                await self._requests(requests.decode_requests(frame.payload))
            elif frame.kind is FrameKind.PING:
                self._connection.write(encode_frame(FrameKind.PONG, frame.payload[:64]))
                # At once: it says that this node lives while the answers that are owed take their time.
                self._connection.flush()
            elif frame.kind is FrameKind.GOODBYE:
                return False
            else:
                raise ProtocolError(f"a client may not send {frame.kind.name} frames")
        return True

    async def _receive(self, decoder: FrameDecoder, frames: list[Frame]) -> None:
        """The next frames, in place of those that were served; none when a frame is still arriving, or at the end."""
        frame_bytes = decoder.unfinished_bytes
        if frame_bytes <= SMALL_FRAME_BYTES:
            await self._read(decoder, frames)
            return
        async with self._intake.turn(frame_bytes):
            while not frames and not self._ended:
                await self._read(decoder, frames)

    async def _read(self, decoder: FrameDecoder, frames: list[Frame]) -> None:
        data = await self._connection.receive(READ_BYTES_MAX)
        if data:
            frames += decoder.feed(data)
        else:
            self._ended = True

    async def _requests(self, batch: list[Request]) -> None:
        connection, clock = self._connection, self._clock
        for position, request in enumerate(batch):
            if position & SLICE_MASK == SLICE_MASK and clock.monotonic_ns() >= self._slice_end_ns:
                await self._pause()
            self._inflight += 1
            self._dispatch(self, request)
            if self._answers_bytes + connection.buffered > UNREAD_BYTES_MAX:
                self.flush()
                if connection.buffered > UNREAD_BYTES_MAX:
                    await connection.drain(UNREAD_BYTES_MAX)
        while self._inflight > self._inflight_max:
            self._room = trio.Event()
            await self._room.wait()
            self._room = None

    async def _pause(self) -> None:
        """Let every other task of the node run."""
        await trio.lowlevel.checkpoint()
        self._slice_end_ns = self._clock.monotonic_ns() + SLICE_NS

    def goodbye(self) -> None:
        """Tell the client to go elsewhere: this node is stopping."""
        self._connection.write(_GOODBYE)
        self.flush()

    def check(self) -> None:
        assert self._inflight >= 0, f"{self._inflight} requests are in flight"
        total = sum(map(len, self._answers))
        assert total == self._answers_bytes, f"{total} bytes of answers, counted {self._answers_bytes}"
