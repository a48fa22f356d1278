"""The client takes time, chance and connections from whoever hands them in (DESIGN §3)."""

import socket
from typing import Any

import anyio
import pytest
import trio
import trio.testing

from shardkv import errors
from shardkv.types import NodeId
from shardkv.wire import requests
from shardkv.wire.frames import FrameDecoder, FrameKind, encode_frame
from shardkv.wire.handshake import Welcome, encode_welcome
from shardkv_client import RealEnvironment, Settings, connect, environment
from tests.client.fake_cluster import FakeCluster, FakeNode


class MemoryStream:
    """A stream to a fake node without a socket. It takes a few bytes at a time, so that writers have work."""

    def __init__(self, node: FakeNode) -> None:
        self._node = node
        self._decoder = FrameDecoder()
        self._send, self._receive = trio.open_memory_channel[bytes](1_000)
        self.closed = False

    def send_nowait(self, data: bytes | bytearray | memoryview) -> int:
        self._take(bytes(data[:7]))
        return min(7, len(data))

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await trio.lowlevel.checkpoint()
        self._take(bytes(data))

    def _take(self, data: bytes) -> None:
        if self.closed:
            raise trio.ClosedResourceError
        self._node.cluster.now_ms = trio.current_time() * 1_000
        for kind, payload in self._decoder.feed(data):
            if kind is FrameKind.HELLO:
                clock = self._node.cluster.clock
                answer = encode_welcome(Welcome(1, self._node.cluster.cluster_id, NodeId(self._node.id), 1, clock, 100))
            elif kind is FrameKind.PING:
                answer = encode_frame(FrameKind.PONG, payload)
            else:
                answer = encode_frame(FrameKind.RESPONSE, requests.join(self._node.serve(payload)))
            self._send.send_nowait(answer)

    async def receive(self, count_max: int) -> bytes:
        return await self._receive.receive()

    async def aclose(self) -> None:
        self.closed = True
        self._receive.close()
        await trio.lowlevel.checkpoint()


class VirtualEnvironment:
    def __init__(self, cluster: FakeCluster) -> None:
        self.cluster = cluster
        self.streams: list[MemoryStream] = []
        self.reachable = True

    def monotonic(self) -> float:
        return trio.current_time()

    async def sleep(self, seconds: float) -> None:
        await trio.sleep(seconds)

    def random(self) -> float:
        return 0.5

    def random_bytes(self, count: int) -> bytes:
        return b"r" * count

    async def dial(self, address: str) -> Any:
        if not self.reachable:
            raise ConnectionRefusedError(address)
        node = next(node for node in self.cluster.nodes.values() if node.address == address)
        self.streams.append(MemoryStream(node))
        return self.streams[-1]


async def test_the_client_runs_in_virtual_time_over_streams_that_are_handed_in(autojump_clock):
    environment = VirtualEnvironment(FakeCluster(nodes=2))
    async with connect("n1:1", environment=environment) as kv:
        await kv.put(b"k", b"v")
        environment.cluster.range_of(b"k").leader = 2
        assert await kv.put_many({b"%04d" % i: b"v" for i in range(1_000)}) == 1_000
        assert environment.cluster.seen.keys() >= {(b"r" * 16, 1)}
        assert len([entry async for entry in kv.scan()]) == 1_001
    assert all(stream.closed for stream in environment.streams)


async def test_deadlines_follow_the_clock_that_is_handed_in(autojump_clock):
    environment = VirtualEnvironment(FakeCluster(nodes=1))
    environment.reachable = False
    async with connect("n1:1", environment=environment) as kv:
        started = trio.current_time()
        with pytest.raises(errors.Unavailable, match="ConnectionRefusedError"):
            await kv.put(b"k", b"v", timeout=600.0)
        assert trio.current_time() - started == pytest.approx(600.0)
        started = trio.current_time()
        with pytest.raises(errors.Unavailable):
            await kv.get(b"k")
        assert trio.current_time() - started == pytest.approx(10.0), "the default"


async def test_an_exception_of_a_stream_is_a_broken_connection_whatever_its_class(autojump_clock, caplog):
    """A connection's task lets nothing out; what is not a network error is logged, for it is a bug."""
    environment = VirtualEnvironment(FakeCluster(nodes=1))
    async with connect("n1:1", environment=environment) as kv:
        await kv.put(b"k", b"v")
        stream = environment.streams[0]

        def explode(data: bytes) -> int:
            raise ValueError("no stream raises this")

        stream.send_nowait = explode
        await kv.put(b"k", b"w")
    assert "no stream raises this" in caplog.text
    assert len(environment.streams) == 2


async def test_an_address_of_another_cluster_is_in_the_programs_log(autojump_clock, caplog):
    environment, other = VirtualEnvironment(FakeCluster(nodes=1)), FakeCluster(nodes=2)
    other.cluster_id = b"o" * 16
    dial = environment.dial

    async def dial_either(address: str) -> Any:
        if address == "n1:1":
            return await dial(address)
        await trio.sleep(0.01)
        return MemoryStream(other.nodes[2])

    environment.dial = dial_either
    async with connect("n1:1,n2:2", environment=environment) as kv:
        await kv.put(b"k", b"v")
        await trio.sleep(1)
    warned = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(warned) == 1
    assert all(part in warned[0] for part in ("n2:2", (b"o" * 16).hex(), (b"c" * 16).hex()))


async def test_a_text_that_is_no_address_is_an_address_where_nobody_answers(autojump_clock, caplog):
    """An older cluster may hold one. It is no bug of the client's."""
    environment = VirtualEnvironment(FakeCluster(nodes=1))

    async def dial(address: str) -> Any:
        raise errors.ConfigError(f"{address!r} has no port")

    environment.dial = dial
    async with connect("n1:1", environment=environment) as kv:
        with pytest.raises(errors.Unavailable, match="has no port"):
            await kv.put(b"k", b"v", timeout=1)
    assert "bug" not in caplog.text


async def test_a_text_that_no_host_can_be_called_is_an_address_where_nobody_answers():
    """A node may say so of itself; that is no bug of the client's, to be logged as one."""
    with pytest.raises(OSError, match="is no name of a host"):
        await RealEnvironment().dial("\u2603.example:7001")


@pytest.mark.parametrize("silent", [0, 1, 2])
async def test_an_address_that_does_not_answer_leaves_time_for_the_next(monkeypatch, autojump_clock, silent):
    """A name with an IPv6 address that is dropped on the way and an IPv4 address that works."""
    targets = [("address", 7001 + number) for number in range(3)]
    ours, theirs = socket.socketpair()

    async def getaddrinfo(host: str, port: int, **_: object) -> list[tuple[Any, ...]]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 0, "", target) for target in targets]

    async def connect_to(sock: socket.socket, target: tuple[str, int]) -> socket.socket:
        sock.close()
        if targets.index(target) < silent:
            await trio.sleep_forever()
        return ours

    monkeypatch.setattr(anyio, "getaddrinfo", getaddrinfo)
    monkeypatch.setattr(environment, "_connect", connect_to)
    with trio.fail_after(Settings().dial_seconds), theirs:
        stream = await RealEnvironment().dial("name:7001")
        assert stream.send_nowait(b"hello") == 5
        assert theirs.recv(5) == b"hello"
        await stream.aclose()


@pytest.mark.parametrize("seconds_each", [0.001, 0.02, 0.1])
async def test_put_many_waits_for_an_input_that_takes_its_time(autojump_clock, seconds_each):
    """A plain iterable may read files, say, and the loop stands still meanwhile: its pairs are not at fault for that.
    From 13 ms for each on, the first ones were given up before they were sent."""

    def pairs():
        for number in range(1_500):
            autojump_clock.jump(seconds_each)
            yield b"%04d" % number, b"v"

    environment = VirtualEnvironment(FakeCluster(nodes=1))
    async with connect("n1:1", environment=environment) as kv:
        assert await kv.put_many(pairs()) == 1_500
    assert len(environment.cluster.data) == 1_500


@pytest.mark.parametrize(("pause_at", "pause", "timeout"), [(300, 11.0, 10.0), (1_499, 11.0, 10.0), (300, 1.2, 1.0)])
async def test_put_many_waits_for_an_input_that_pauses_once(autojump_clock, pause_at, pause, timeout):
    """What was quick to read is out by then, and nobody can answer it while the loop stands still."""

    def pairs():
        for number in range(1_500):
            if number == pause_at:
                autojump_clock.jump(pause)
            yield b"%04d" % number, b"v"

    environment = VirtualEnvironment(FakeCluster(nodes=1))
    async with connect("n1:1", environment=environment) as kv:
        assert await kv.put_many(pairs(), timeout=timeout) == 1_500


async def test_put_many_whose_input_pauses_and_fails_still_waits_for_what_is_out(autojump_clock):
    """Only what was never sent is not known to be written."""

    def pairs():
        for number in range(256):
            yield b"%04d" % number, b"v"
        autojump_clock.jump(11.0)
        raise OSError("the file is gone")

    environment = VirtualEnvironment(FakeCluster(nodes=1))
    async with connect("n1:1", environment=environment) as kv:
        with pytest.raises(errors.BatchError) as caught:
            await kv.put_many(pairs(), timeout=10.0)
    assert caught.value.consumed == 256
    assert not caught.value.failed
