"""One client's connection: requests in, answers out, with a bound on everything in between.

Lives here: the reading loop and the gathering of answers into frames. Does not live here: what a request means. A
request costs no task: the reader hands it on, and the answer is put into this connection's buffer by whoever has it.

A client pays for itself. Above its bound of unanswered requests or unread answers its connection is not read, so that
it waits and nobody else does; what all of them leave unread together is bounded by ``answer_budget``.
"""

from collections.abc import Callable
from typing import Any, Final

import trio

from shardkv import codec
from shardkv.environment import Clock
from shardkv.errors import Busy, ProtocolError, ShardKVError
from shardkv.machine.clock import HybridClock
from shardkv.server.answer_budget import BACKLOG_BYTES_MAX, PROVEN_BYTES, SMALL_ANSWER_BYTES, AnswerBudget
from shardkv.server.intake import SMALL_FRAME_BYTES, STANDSTILL_BYTES, STANDSTILL_SECONDS, Intake
from shardkv.server.requests import NoRoom
from shardkv.transport.connection import Connection
from shardkv.wire import requests
from shardkv.wire.frames import Frame, FrameDecoder, FrameKind, encode_frame
from shardkv.wire.handshake import encode_refused
from shardkv.wire.requests import Request

READ_BYTES_MAX: Final = 64 * 1024
"""One read: what stays in memory of a client that is not served for the moment, since it leaves its answers unread."""
SLICE_NS: Final = 2_000_000
"""So long the requests of one read are handed on without a break; then everybody else has a turn."""
SLICE_MASK: Final = 3
"""The clock is looked at before every fourth request of a frame: often enough, at 20 ns a request."""
FRAME_BYTES: Final = 64 * 1024
"""Answers are gathered into frames of about this size; what is gathered is not counted among what all leave unread."""

_GOODBYE: Final = encode_frame(FrameKind.GOODBYE, b"")
_SERVED: Final = Frame(FrameKind.PONG, b"")


class _Later:
    """The requester of reads that are answered some time after they were handed on: for want of room, with Busy."""

    __slots__ = ("_client",)

    def __init__(self, client: "ClientConnection") -> None:
        self._client = client

    def answer(self, request_id: int, result: Any) -> None:
        if self._client.offer(request_id, result):
            self._client.refuse(request_id, _no_room())

    def refuse(self, request_id: int, error: ShardKVError) -> None:
        self._client.refuse(request_id, error)


def _no_room() -> Busy:
    return Busy("clients of this node leave too many answers unread: there is no room for this one now")


class ClientConnection:
    """A :class:`~shardkv.multiraft.replica.Requester`.

    Args:
        dispatch: what becomes of a request; it may raise NoRoom, and nothing else.
        dirty: collects the connections that have answers to flush.
        inflight_max: unanswered requests, above which the connection is not read.
        intake: whose turn it is to send a large frame, over all connections.
        budget: what all connections together may leave untaken.
    """

    __slots__ = (
        "_answers",
        "_answers_bytes",
        "_budget",
        "_clock",
        "_connection",
        "_counted",
        "_dirty",
        "_dispatch",
        "_ended",
        "_granted_bytes",
        "_hybrid_clock",
        "_inflight",
        "_inflight_max",
        "_intake",
        "_refused_at",
        "_room",
        "_slice_end_ns",
    )

    def __init__(
        self,
        connection: Connection,
        *,
        hybrid_clock: HybridClock,
        dispatch: Callable[["ClientConnection", Request], None],
        dirty: dict["ClientConnection", None],
        inflight_max: int,
        intake: Intake,
        budget: AnswerBudget,
        clock: Clock,
    ) -> None:
        self._connection = connection
        self._hybrid_clock = hybrid_clock
        self._dispatch = dispatch
        self._dirty = dirty
        self._inflight = 0
        self._inflight_max = inflight_max
        self._intake = intake
        self._budget = budget
        self._counted = 0
        """What the budget knows of."""
        self._granted_bytes = 0
        """An answer of up to this size has waited for its room."""
        self._refused_at = -1
        """When an answer last found no room, by the budget's count of releases."""
        if not connection.closed:  # else it would keep this, and has nothing to tell any more
            connection.on_progress = self._count
        self._clock = clock
        self._slice_end_ns = 0
        self._ended = False
        """The client has closed its side."""
        self._room: trio.Event | None = None
        self._answers: list[bytes] = []
        self._answers_bytes = 0

    # The requester's side

    @property
    def later(self) -> _Later:
        """For reads whose answers come later. Not kept: the two would keep each other once all is over."""
        return _Later(self)

    def answer(self, request_id: int, result: Any) -> None:
        self._put(requests.encode_response(request_id, self._hybrid_clock.last, result))

    def refuse(self, request_id: int, error: ShardKVError) -> None:
        self._put(requests.encode_error(request_id, self._hybrid_clock.last, error))

    def offer(self, request_id: int, result: Any) -> int:
        """Answer a read that can be done again; 0, or if there is no room for the answer, its size in bytes."""
        response = requests.encode_response(request_id, self._hybrid_clock.last, result)
        size = len(response)
        if size > SMALL_ANSWER_BYTES:
            if size > self._granted_bytes and not self._budget.fits(self, size):
                self._refused_at = self._budget.releases
                return size
            self._granted_bytes = 0
        self._put(response)
        return 0

    @property
    def crowded(self) -> bool:
        """Whether a read that comes due now should be told Busy without being done."""
        budget = self._budget
        return (
            self._answers_bytes + self._connection.buffered > budget.share_bytes or self._refused_at == budget.releases
        )

    def fits(self, answer_bytes: int) -> bool:
        """Whether there is room for an answer of this size."""
        return answer_bytes <= SMALL_ANSWER_BYTES or self._budget.fits(self, answer_bytes)

    def _put(self, response: bytes) -> None:
        if not self._answers:
            self._dirty[self] = None
        self._answers.append(response)
        self._answers_bytes += len(response)
        self._inflight -= 1
        if self._answers_bytes > FRAME_BYTES:
            self._frame()
            self._count()

    def _frame(self) -> None:
        answers, self._answers, self._answers_bytes = self._answers, [], 0
        self._connection.write(encode_frame(FrameKind.RESPONSE, codec.array_head(len(answers)), *answers))

    def flush(self) -> None:
        """Send what has been answered. Called in turns, and by the reader."""
        connection = self._connection
        if self._answers:
            self._frame()
        connection.flush()
        if connection.buffered or self._counted:
            self._count()
        if self._room is not None and self._inflight <= self._inflight_max:
            self._room.set()

    def _count(self) -> None:
        """What the client has not taken has changed."""
        untaken_bytes = self._connection.buffered
        if untaken_bytes != self._counted:
            self._counted = untaken_bytes
            self._budget.count(self, untaken_bytes)

    @property
    def stalled_seconds(self) -> float:
        """How long it has taken nothing although something waits for it."""
        return self._connection.stalled_seconds()

    @property
    def proven(self) -> bool:
        """Whether the client is known to read its answers."""
        return self._connection.bytes_sent >= PROVEN_BYTES

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
                if self in self._dirty:
                    del self._dirty[self]
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
                # The answers' stamps tell the client the time, by which it stamps its commands: reads tell it, too.
                self._hybrid_clock.now()
                frame_bytes = len(frame.payload)
                batch = requests.decode_requests(frame.payload)
                if frame_bytes > SMALL_FRAME_BYTES:
                    frames[position] = frame = _SERVED  # not in memory twice while its requests wait
                await self._requests(batch, frame_bytes)
            elif frame.kind is FrameKind.PING:
                self._connection.write(encode_frame(FrameKind.PONG, frame.payload[:64]))
                # At once: it says that this node lives while the answers that are owed take their time.
                self._connection.flush()
                if self._connection.buffered:
                    await self._taken()
            elif frame.kind is FrameKind.GOODBYE:
                return False
            else:
                raise ProtocolError(f"a client may not send {frame.kind.name} frames")
        return True

    async def _taken(self) -> None:
        """Wait until the client has taken enough to be looked at further."""
        self._count()
        if self._connection.buffered > self._budget.unread_bytes_max:
            await self._connection.drain(self._budget.unread_bytes_max)

    async def _receive(self, decoder: FrameDecoder, frames: list[Frame]) -> None:
        """The next frames, in place of those that were served; none when a frame is still arriving, or at the end."""
        frame_bytes = decoder.unfinished_bytes
        if frame_bytes <= SMALL_FRAME_BYTES:
            await self._read(decoder, frames)
            return
        async with self._intake.turn(frame_bytes):
            while not frames and not self._ended:
                arrived = decoder.buffered
                with self._clock.deadline(STANDSTILL_SECONDS) as waiting:
                    while not frames and not self._ended:
                        await self._read(decoder, frames)
                stands_still = waiting.cancelled_caught and decoder.buffered < arrived + STANDSTILL_BYTES
                if stands_still and self._intake.wanted:
                    raise ProtocolError(f"a frame of {frame_bytes} bytes stands still while others wait for their turn")

    async def _read(self, decoder: FrameDecoder, frames: list[Frame]) -> None:
        data = await self._connection.receive(READ_BYTES_MAX)
        if data:
            frames += decoder.feed(data)
        else:
            self._ended = True

    async def _requests(self, batch: list[Request], frame_bytes: int) -> None:
        """Hand on the requests of one frame, as fast as the client takes its answers."""
        position = 0
        while position < len(batch):
            position, answer_bytes = self._hand_on(batch, position)
            if answer_bytes or self._connection.buffered > self._budget.unread_bytes_max:
                position = await self._held_up(batch, position, frame_bytes, answer_bytes)
            elif position < len(batch):
                await self._pause()
        batch.clear()
        while self._inflight > self._inflight_max:
            self._room = trio.Event()
            await self._room.wait()
            self._room = None

    def _hand_on(self, batch: list[Request], start: int) -> tuple[int, int]:
        """Hand on requests until something must be waited for.

        Returns:
            The position of the next request, and if its answer found no room, the answer's size.
        """
        connection, clock, dispatch, budget = self._connection, self._clock, self._dispatch, self._budget
        for position in range(start, len(batch)):
            if position & SLICE_MASK == SLICE_MASK and clock.monotonic_ns() >= self._slice_end_ns:
                return position, 0
            self._inflight += 1
            try:
                dispatch(self, batch[position])
            except NoRoom as no_room:
                self._inflight -= 1
                return position, no_room.answer_bytes
            if self._answers_bytes + connection.buffered > budget.unread_bytes_max:
                self.flush()
                if connection.buffered > budget.unread_bytes_max:
                    return position + 1, 0
        return len(batch), 0

    async def _held_up(self, batch: list[Request], position: int, frame_bytes: int, answer_bytes: int) -> int:
        """Wait for room for an answer of this size, or if it is 0 until the client has taken answers; where to go on.

        A large frame stays in memory meanwhile, within the bound for all of them; else its requests are refused.
        """
        self.flush()
        budget = self._budget
        backlog_bytes = frame_bytes if frame_bytes > SMALL_FRAME_BYTES and position < len(batch) else 0
        if backlog_bytes and budget.backlog_bytes + backlog_bytes > BACKLOG_BYTES_MAX:
            for request in batch[position:]:
                self._refuse_for_room(request)
            batch.clear()
            await self._connection.drain(budget.unread_bytes_max)
            return 0
        budget.backlog_bytes += backlog_bytes
        try:
            if not answer_bytes:
                await self._connection.drain(budget.unread_bytes_max)
            elif await budget.wait(self, answer_bytes):
                self._granted_bytes = answer_bytes
            else:
                self._refuse_for_room(batch[position])
                position += 1
        finally:
            budget.backlog_bytes -= backlog_bytes
        self._slice_end_ns = self._clock.monotonic_ns() + SLICE_NS
        return position

    def _refuse_for_room(self, request: Request) -> None:
        self._inflight += 1
        self.refuse(request.id, _no_room())

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
