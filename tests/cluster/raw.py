"""A connection to a node below the client: bytes and frames as the test wants them, right or wrong."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import trio

from shardkv.wire import commands
from shardkv.wire.frames import Frame, FrameDecoder, FrameKind, encode_frame
from shardkv.wire.handshake import Hello, Role, Welcome, decode_refused, decode_welcome, encode_hello
from shardkv.wire.requests import Method, Response, decode_responses, encode_request, join
from tests.cluster.harness import SECONDS_MAX

SESSION = b"raw connections!"
CLIENT = Hello(Role.CLIENT)


class Raw:
    def __init__(self, stream: trio.SocketStream) -> None:
        self.stream = stream
        self._decoder = FrameDecoder()
        self._frames: list[Frame] = []

    async def send(self, data: bytes) -> None:
        await self.stream.send_all(data)

    async def frame(self) -> Frame | None:
        """The next frame; None when the node has closed the connection."""
        with trio.fail_after(SECONDS_MAX):
            while not self._frames:
                try:
                    data = await self.stream.receive_some(65536)
                except trio.BrokenResourceError:
                    return None
                if not data:
                    return None
                self._frames = self._decoder.feed(data)
        return self._frames.pop(0)

    async def closed(self) -> Frame | None:
        """Wait until the node has closed the connection; its last frame."""
        last = None
        while frame := await self.frame():
            last = frame
        return last

    async def refusal(self) -> str:
        """What the node says before it closes the connection."""
        last = await self.closed()
        assert last is not None, "the node closed the connection without a word"
        assert last.kind is FrameKind.REFUSED, last
        error = decode_refused(last.payload).error
        return f"{type(error).__name__}: {error}"

    async def greet(self, hello: Hello = CLIENT) -> Welcome:
        await self.send(encode_hello(hello))
        frame = await self.frame()
        assert frame is not None, "no answer to the greeting"
        assert frame.kind is FrameKind.WELCOME, frame
        return decode_welcome(frame.payload)

    async def request(self, *fields: Any) -> Response:
        """Send one request, whatever its fields, and take the next answer."""
        await self.send(encode_frame(FrameKind.REQUEST, join([encode_request(*fields)])))
        frame = await self.frame()
        assert frame is not None, "closed instead of an answer"
        assert frame.kind is FrameKind.RESPONSE, frame
        return decode_responses(frame.payload)[0]

    async def check_served(self) -> None:
        """The connection goes on, whoever leads by now: any node answers this."""
        answer = await self.request(2, Method.NODES, 0, 0, 0)
        assert (answer.id, answer.error) == (2, None)

    async def write(self, range_id: int, generation: int, *sealed: bytes, request_id: int = 1) -> Response:
        return await self.request(
            request_id, Method.WRITE, range_id, generation, 0, SESSION, commands.join(list(sealed))
        )


@asynccontextmanager
async def connect_raw(address: str) -> AsyncIterator[Raw]:
    host, _, port = address.rpartition(":")
    async with await trio.open_tcp_stream(host, int(port)) as stream:
        yield Raw(stream)
