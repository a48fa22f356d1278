"""One client's connection by itself: what it may have in flight and unread, and that it never holds the loop."""

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager
from typing import Any

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from shardkv.errors import Busy, MalformedRequest, ProtocolError
from shardkv.machine.clock import HybridClock
from shardkv.server.answer_budget import UNREAD_BYTES_MAX, AnswerBudget
from shardkv.server.client_connection import READ_BYTES_MAX, SLICE_NS, ClientConnection
from shardkv.server.intake import Intake
from shardkv.simulation.network import WINDOW_BYTES, SimulatedNetwork
from shardkv.transport.connection import Connection
from shardkv.types import timestamp_at
from shardkv.wire import handshake, requests
from shardkv.wire.frames import Frame, FrameDecoder, FrameKind, encode_frame
from shardkv.wire.requests import REQUESTS_PER_FRAME_MAX, Request, Response

Dispatch = Callable[[ClientConnection, Request], None]


class HandClock:
    """Time that passes only when a test says so, but for deadlines, which are trio's."""

    def __init__(self) -> None:
        self.now_ns = 1_000_000_000

    def monotonic_ns(self) -> int:
        return self.now_ns

    def wall_ms(self) -> int:
        return 1_700_000_000_000

    async def sleep(self, seconds: float) -> None:
        await trio.sleep(seconds)

    def deadline(self, seconds: float) -> AbstractContextManager[trio.CancelScope]:
        return trio.move_on_after(seconds)


class Server:
    """A client connection with a dispatcher of the test's; ``stream`` is the client's side of it."""

    def __init__(self, dispatch: Dispatch, inflight_max: int) -> None:
        self.clock = HandClock()
        self.dispatched: list[Request] = []
        self.connection: Connection
        self.client: ClientConnection
        self.dirty: dict[ClientConnection, None] = {}
        self.budget = AnswerBudget(self.clock)
        self.ended = trio.Event()
        self._dispatch = dispatch
        self._inflight_max = inflight_max
        self.stream: Any = None
        self._decoder = FrameDecoder()

    async def serve(self, stream: Any) -> None:
        self.connection = Connection(stream, clock=self.clock)
        self.client = ClientConnection(
            self.connection,
            hybrid_clock=HybridClock(self.clock),
            dispatch=self.take,
            dirty=self.dirty,
            inflight_max=self._inflight_max,
            intake=Intake(self.clock),
            budget=self.budget,
            clock=self.clock,
        )
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.connection.run_writer)
            await self.client.serve(FrameDecoder(), [])
            self.client.check()
            self.ended.set()
            nursery.cancel_scope.cancel()

    def take(self, client: ClientConnection, request: Request) -> None:
        self.dispatched.append(request)
        self._dispatch(client, request)

    def turn(self) -> None:
        """What the node does once a turn."""
        dirty = list(self.dirty)
        self.dirty.clear()
        for client in dirty:
            client.flush()
        self.client.check()

    async def send(self, *ids: int) -> None:
        """One frame of requests."""
        await self.stream.send_all(request_frame(*ids))

    async def ended_or_served(self, count: int) -> None:
        """Read answers, as a client does, until so many requests were dispatched."""
        with trio.fail_after(60):
            while len(self.dispatched) < count:
                with trio.move_on_after(0.01):
                    await self.frames()

    async def frames(self) -> list[Frame]:
        """What has arrived at the client; none once the server has closed."""
        data = await self.stream.receive(1 << 20)
        return self._decoder.feed(data) if data else []

    async def answers(self, count: int) -> list[Response]:
        found: list[Response] = []
        while len(found) < count:
            for frame in await self.frames():
                assert frame.kind is FrameKind.RESPONSE
                found += requests.decode_responses(frame.payload)
        return found


def request_frame(*ids: int) -> bytes:
    return encode_frame(FrameKind.REQUEST, requests.join([requests.encode_request(each, 1, 1, 1, 0) for each in ids]))


def silent(client: ClientConnection, request: Request) -> None:
    """Answered later, by the test."""


def prompt(client: ClientConnection, request: Request) -> None:
    client.answer(request.id, True)


@asynccontextmanager
async def serving(dispatch: Dispatch, inflight_max: int = 10) -> AsyncIterator[Server]:
    network = SimulatedNetwork(1)
    server = Server(dispatch, inflight_max)
    async with trio.open_nursery() as nursery:

        async def handler(stream: Any) -> None:
            await server.serve(stream)

        await nursery.start(network.node("server").listen, "server:1", handler)
        server.stream = await network.node("client").dial("server:1")
        await trio.sleep(0.01)
        yield server
        nursery.cancel_scope.cancel()


async def test_every_answer_carries_the_highest_stamp_that_the_node_knows(autojump_clock: MockClock) -> None:
    """DESIGN 4.4: whoever has it hands it on, so that versions respect causality across ranges."""
    seen = timestamp_at(1_700_000_000_000) + 7

    def in_turn(client: ClientConnection, request: Request) -> None:
        client._hybrid_clock.absorb(seen)
        if request.id == 1:
            client.answer(1, True)
        elif request.id == 2:
            client.refuse(2, Busy("full"))
        else:
            client.offer(3, [])

    async with serving(in_turn) as server:
        await server.send(1, 2, 3)
        await trio.sleep(0.1)
        server.turn()
        for answer in await server.answers(3):
            assert answer.timestamp >= seen


async def test_above_its_requests_in_flight_a_connection_is_not_read(autojump_clock: MockClock) -> None:
    """DESIGN 4.2: a connection above its in-flight bound is not read. A frame that was begun is taken to its end."""
    async with serving(silent, inflight_max=10) as server:
        for start in (0, 6, 12, 18):
            await server.send(*range(start, start + 6))
            await trio.sleep(0.1)
        assert len(server.dispatched) == 12
        server.client.answer(0, True)
        server.turn()
        await trio.sleep(0.1)
        assert len(server.dispatched) == 12, "eleven are in flight"
        server.client.refuse(1, Busy("full"))
        server.turn()
        await trio.sleep(0.1)
        assert len(server.dispatched) == 18
        assert [each.id for each in await server.answers(2)] == [0, 1]


async def test_frames_that_arrived_in_one_read_wait_for_room_too(autojump_clock: MockClock) -> None:
    async with serving(silent, inflight_max=10) as server:
        await server.stream.send_all(b"".join(request_frame(*range(start, start + 11)) for start in range(0, 110, 11)))
        await trio.sleep(0.1)
        assert len(server.dispatched) == 11


async def test_a_client_that_does_not_read_its_answers_is_not_served(autojump_clock: MockClock) -> None:
    """What waits for one client stays within its bound and one answer, besides what the network holds."""
    size = 20_000

    def large(client: ClientConnection, request: Request) -> None:
        client.answer(request.id, bytes(size))

    async with serving(large, inflight_max=1_000) as server:
        await server.send(*range(500))
        await trio.sleep(1)
        held = len(server.dispatched) * size
        assert held <= UNREAD_BYTES_MAX + WINDOW_BYTES + 2 * size
        assert server.connection.buffered <= UNREAD_BYTES_MAX + 2 * size
        assert server.budget.untaken_bytes == server.connection.buffered, "the node knows what is left untaken"
        assert len(await server.answers(500)) == 500
        assert len(server.dispatched) == 500
        assert server.connection.buffered == server.budget.untaken_bytes == 0


async def test_4096_requests_in_one_frame_do_not_hold_the_loop(autojump_clock: MockClock) -> None:
    """DESIGN 4.2: named bounds per connection, then a checkpoint."""

    def slow(client: ClientConnection, request: Request) -> None:
        server.clock.now_ns += 100_000
        client.answer(request.id, True)

    async with serving(slow, inflight_max=REQUESTS_PER_FRAME_MAX) as server:
        with steps(server) as found:
            await server.send(*range(REQUESTS_PER_FRAME_MAX))
            await server.ended_or_served(REQUESTS_PER_FRAME_MAX)
        assert found.longest_ns <= SLICE_NS + 500_000
        assert len(server.dispatched) == REQUESTS_PER_FRAME_MAX


async def test_one_request_that_takes_long_is_followed_by_everybody_else(autojump_clock: MockClock) -> None:
    def slow(client: ClientConnection, request: Request) -> None:
        server.clock.now_ns += 3_000_000
        client.answer(request.id, True)

    async with serving(slow, inflight_max=100) as server:
        with steps(server) as found:
            await server.send(*range(100))
            await server.ended_or_served(100)
        assert found.longest_ns <= 4 * 3_000_000


async def test_a_read_full_of_pings_does_not_hold_the_loop(autojump_clock: MockClock) -> None:
    async with serving(prompt) as server:
        write = server.connection.write

        def slow(data: bytes) -> bool:
            server.clock.now_ns += 10_000
            return write(data)

        frame = encode_frame(FrameKind.PING, b"")
        count = READ_BYTES_MAX // len(frame) // 4
        server.client._connection = _Slow(server.connection, slow)  # type: ignore[assignment]
        with steps(server) as found:
            await server.stream.send_all(frame * count + request_frame(1))
            await server.ended_or_served(1)
        assert found.longest_ns <= SLICE_NS + 100_000


class _Slow:
    def __init__(self, connection: Connection, write: Callable[[bytes], bool]) -> None:
        self._connection = connection
        self.write = write

    def __getattr__(self, name: str) -> Any:
        return getattr(self._connection, name)


class _Steps(trio.abc.Instrument):
    """How long one task ran at a stretch, by the clock that dispatching moves."""

    def __init__(self, clock: HandClock) -> None:
        self.longest_ns = 0
        self._clock = clock
        self._begin_ns = clock.now_ns

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        self._begin_ns = self._clock.now_ns

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        self.longest_ns = max(self.longest_ns, self._clock.now_ns - self._begin_ns)


@contextmanager
def steps(server: Server) -> Iterator[_Steps]:
    instrument = _Steps(server.clock)
    trio.lowlevel.add_instrument(instrument)
    try:
        yield instrument
    finally:
        trio.lowlevel.remove_instrument(instrument)


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (encode_frame(FrameKind.REQUEST, b"\xff"), MalformedRequest),
        (encode_frame(FrameKind.REQUEST, requests.join([b"\x00"])), MalformedRequest),
        (encode_frame(FrameKind.RAFT, b""), ProtocolError),
        (encode_frame(FrameKind.RESPONSE, b"\x80"), ProtocolError),
        (b"\xff" * 100, ProtocolError),
        (b"GET / HTTP/1.1\r\n\r\n", ProtocolError),
    ],
)
async def test_what_is_no_request_is_refused_and_ends_the_connection(
    autojump_clock: MockClock, data: bytes, kind: type[Exception]
) -> None:
    async with serving(prompt) as server:
        await server.stream.send_all(request_frame(1) + data)
        frames = await server.frames()
        while frames[-1].kind is not FrameKind.REFUSED:
            frames += await server.frames()
        assert type(handshake.decode_refused(frames[-1].payload).error) is kind
        with trio.fail_after(1):
            await server.ended.wait()


async def test_too_many_requests_in_one_frame_are_refused(autojump_clock: MockClock) -> None:
    async with serving(prompt) as server:
        await server.send(*range(REQUESTS_PER_FRAME_MAX + 1))
        (frame,) = await server.frames()
        assert isinstance(handshake.decode_refused(frame.payload).error, MalformedRequest)
        assert not server.dispatched


async def test_answers_of_one_read_travel_together_in_the_order_given(autojump_clock: MockClock) -> None:
    async with serving(prompt) as server:
        await server.stream.send_all(request_frame(3, 1) + request_frame(2))
        (frame,) = await server.frames()
        assert [each.id for each in requests.decode_responses(frame.payload)] == [3, 1, 2]


@pytest.mark.parametrize("goodbye", [True, False])
async def test_a_goodbye_and_the_end_of_the_stream_end_the_connection(autojump_clock: MockClock, goodbye: bool) -> None:
    async with serving(prompt) as server:
        assert not server.ended.is_set()
        if goodbye:
            await server.stream.send_all(encode_frame(FrameKind.GOODBYE, b""))
        else:
            await server.stream.aclose()
        await trio.sleep(1)
        assert server.ended.is_set()
        await wait_all_tasks_blocked()
