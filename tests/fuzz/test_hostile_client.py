"""Clients that send anything at all to nodes in virtual time: each ends alone, and the nodes go on serving."""

import random
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from shardkv.errors import ProtocolError
from shardkv.types import SESSION_BYTES
from shardkv.wire import commands, requests
from shardkv.wire.frames import COMPRESSED, FrameDecoder, FrameKind, encode_frame
from shardkv.wire.handshake import GREETING_BYTES_MAX, Hello, Role, decode_refused, encode_hello
from shardkv.wire.requests import Method
from tests.fuzz import samples
from tests.fuzz.mutation import mutated
from tests.server.world import Cluster, SimulatedNode, world

CONNECTIONS = 120
SECONDS_MAX = 40.0
"""In virtual time: past every limit on a greeting or a frame that does not end."""


class Lines:
    """The log of a listener: what it says of connections that end."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, str, dict[str, Any]]] = []

    def debug(self, event: str, **fields: Any) -> None:
        self.lines.append(("debug", event, fields))

    def info(self, event: str, **fields: Any) -> None:
        self.lines.append(("info", event, fields))

    def warning(self, event: str, **fields: Any) -> None:
        self.lines.append(("warning", event, fields))

    def error(self, event: str, **fields: Any) -> None:
        self.lines.append(("error", event, fields))

    exception = error


def _requests(range_id: int) -> tuple[bytes, ...]:
    """Sound requests for a range that is there, as a start for damage that gets further than the first look."""
    head = (range_id, 1, 0)
    write = commands.join([commands.seal(0, commands.pack_put(b"x/1", b"v"), 1, 1_700_000_000_000, 0)])
    items = (
        requests.encode_request(1, Method.GET, *head, 0, [b"x/1", b"x/2"]),
        requests.encode_request(2, Method.SCAN, *head, 0, b"x", b"y", 10, 1000, False, False),
        requests.encode_request(3, Method.WRITE, *head, bytes(SESSION_BYTES), write),
        requests.encode_request(4, Method.STATUS, 0, 0, 0),
        requests.encode_request(5, Method.ROUTES, 0, 0, 0, b"x", 4),
        requests.encode_request(6, Method.NODES, 0, 0, 0),
        requests.encode_request(
            7, Method.HEARTBEAT, 0, 0, 0, [1, 2, 3, 4, 3, "h:1", True, False, 9, [], [], [0, 0, 0]]
        ),
        requests.encode_request(8, Method.JOIN, 0, 0, 0, "n9", "h", b"short", []),
    )
    return (*(encode_frame(FrameKind.REQUEST, requests.join([each])) for each in items), *samples.FRAMES)


async def _attack(cluster: Cluster, number: int, seed: int, outcomes: list[str]) -> None:
    """One connection: greeted or not, then damage in pieces, then it hangs about or leaves."""
    chance = random.Random(f"hostile {seed} {number}")
    node = chance.choice(list(cluster.nodes.values()))
    stream = await cluster.network.node(f"hostile{number}").dial(node.address)
    greeted = chance.random() < 0.7
    corpus = _requests(chance.choice((1, 1, 1, 7)))
    data = encode_hello(Hello(Role.CLIENT)) if greeted else b""
    data += b"".join(mutated(chance, chance.choice(corpus), corpus) for _ in range(chance.randint(1, 6)))
    with trio.move_on_after(SECONDS_MAX * 2) as scope:
        try:
            position = 0
            while position < len(data):
                end = position + chance.choice((1, 7, 100, len(data)))
                await stream.send_all(data[position:end])
                position = end
                if chance.random() < 0.1:
                    await trio.sleep(chance.random())
            if chance.random() < 0.3:
                await stream.aclose()
                outcomes.append("left")
                return
            outcomes.append(await _read_to_the_end(stream))
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            outcomes.append("reset")
        finally:
            stream.close_now()
    if scope.cancelled_caught:
        outcomes.append("stayed")


async def _read_to_the_end(stream: Any) -> str:
    """What a node says at last; a connection that only sent sound requests stays open."""
    decoder, last = FrameDecoder(), "closed"
    with trio.move_on_after(SECONDS_MAX) as scope:
        while data := await stream.receive(1 << 16):
            for frame in decoder.feed(data):
                last = frame.kind.name
                if frame.kind is FrameKind.REFUSED:
                    assert str(decode_refused(frame.payload).error)
                elif frame.kind is FrameKind.RESPONSE:
                    requests.decode_responses(frame.payload)
    return "open" if scope.cancelled_caught else last


async def _work(cluster: Cluster, stop: trio.Event) -> int:
    """A client like any other, throughout: every one of its calls succeeds."""
    count = 0
    async with cluster.client() as kv:
        while not stop.is_set():
            count += 1
            assert await kv.increment(b"steady", timeout=5) == count
            await trio.sleep(0.05)
    return count


def _connections(node: SimulatedNode) -> int:
    return int(node.inside.listener.statistics().connections)


async def test_hostile_clients_end_alone_and_nodes_go_on_serving(autojump_clock: MockClock) -> None:
    """Issue: any garbage after or instead of a greeting ends that connection alone, with a clean line in the log."""
    async with world(3) as cluster:
        lines = Lines()
        for node in cluster.nodes.values():
            node.inside.listener._log = lines
        await trio.sleep(1)
        before = {name: _connections(node) for name, node in cluster.nodes.items()}
        outcomes: list[str] = []
        stop = trio.Event()
        counts: list[int] = []

        async def work() -> None:
            counts.append(await _work(cluster, stop))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(work)
            async with trio.open_nursery() as attackers:
                for number in range(CONNECTIONS):
                    attackers.start_soon(_attack, cluster, number, 1, outcomes)
                    await trio.sleep(0.02)
            stop.set()
        await trio.sleep(1)
        assert len(outcomes) == CONNECTIONS
        assert outcomes.count("REFUSED") > CONNECTIONS // 10, "the damage was looked at"
        assert counts[0] > 50
        for name, node in cluster.nodes.items():
            assert node.alive
            assert node.error is None
            node.check()
            assert _connections(node) <= before[name] + 1, "a connection was left behind"
        ended = [fields for level, event, fields in lines.lines if event == "connection ended"]
        assert all(fields["reason"] for fields in ended)
        assert len(ended) >= outcomes.count("REFUSED") // 2
        assert not [line for line in lines.lines if line[0] in ("error", "warning")]


@pytest.mark.parametrize("flags", [0, COMPRESSED])
async def test_a_stranger_gets_no_more_memory_than_a_greeting_needs(autojump_clock: MockClock, flags: int) -> None:
    """GREETING_BYTES_MAX: until the greeting is over nothing larger is collected, whatever peers may send after it."""
    async with world(1) as cluster:
        node = cluster.nodes["n1"]
        stream = await cluster.network.node("stranger").dial(node.address)
        await stream.send_all((8 * GREETING_BYTES_MAX).to_bytes(4) + bytes((FrameKind.HELLO, flags)) + bytes(1000))
        with trio.fail_after(1):
            data = await stream.receive(1 << 16)
        (frame,) = FrameDecoder().feed(data)
        assert isinstance(decode_refused(frame.payload).error, ProtocolError)


async def test_frames_right_behind_a_greeting_may_be_large(autojump_clock: MockClock) -> None:
    async with world(1) as cluster:
        node = cluster.nodes["n1"]
        stream = await cluster.network.node("eager").dial(node.address)
        value = requests.encode_request(1, Method.GET, 1, 1, 0, 0, [b"k"], bytes(3 * GREETING_BYTES_MAX))
        data = encode_hello(Hello(Role.CLIENT)) + encode_frame(FrameKind.REQUEST, requests.join([value]))
        decoder = FrameDecoder()
        kinds: list[FrameKind] = []
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stream.send_all, data)
            with trio.fail_after(5):
                while len(kinds) < 2:
                    kinds += [frame.kind for frame in decoder.feed(await stream.receive(1 << 16))]
        assert kinds == [FrameKind.WELCOME, FrameKind.RESPONSE]
