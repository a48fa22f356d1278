"""What comes off the network may be anything. Each bad thing is answered or its connection closed, and nobody else
notices: a client that writes throughout sees no error, no node ends, nothing is lost."""

import random
import struct
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager

import pytest
import trio

from shardkv import codec
from shardkv.errors import KeyTooLarge, MalformedRequest, RequestError, ShardKVError, UnknownMethod, ValueTooLarge
from shardkv.types import KEY_BYTES_MAX, VALUE_BYTES_MAX, NodeId
from shardkv.wire import commands, raft_codec
from shardkv.wire.commands import Op, pack_increment, pack_put, seal
from shardkv.wire.frames import COMPRESSED, FRAME_BYTES_MAX, FrameKind, compress_payload, encode_frame
from shardkv.wire.handshake import MAGIC, Hello, Role, encode_hello
from shardkv.wire.requests import Consistency, Method, encode_request, join
from shardkv_client import connect_blocking
from shardkv_client.client import Client
from tests.cluster.harness import LocalCluster, client, eventually, leader_of, resident_bytes, started_and_settled
from tests.cluster.raw import connect_raw

pytestmark = pytest.mark.cluster

OTHER_CLUSTER = b"another cluster!"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    with started_and_settled(tmp_path_factory.mktemp("bad-input")) as running:
        yield running


class Target:
    """The node that leads the first range, and that range."""

    def __init__(self, address: str, range_id: int, generation: int, cluster_id: bytes) -> None:
        self.address = address
        self.range_id = range_id
        self.generation = generation
        self.cluster_id = cluster_id


async def find_target(world: LocalCluster, kv: Client) -> Target:
    descriptor, _ = (await kv.ranges())[0]
    address = world.addresses[await leader_of(kv, b"")]
    status = await kv.status()
    return Target(address, descriptor.range_id, descriptor.epoch.span, bytes.fromhex(status["cluster_id"]))


@asynccontextmanager
async def check_undisturbed(world: LocalCluster) -> AsyncIterator[Target]:
    """The target of an attack. A client counts up meanwhile without an error; afterwards all is there."""
    async with client(world) as kv:
        target = await find_target(world, kv)
        pids = {name: process.pid for name, process in world.processes.items()}
        await kv.delete(b"undisturbed")
        stop = trio.Event()
        count = 0

        async def count_up() -> None:
            nonlocal count
            while not stop.is_set():
                count += 1
                assert await kv.increment(b"undisturbed") == count

        async with trio.open_nursery() as nursery:
            nursery.start_soon(count_up)
            yield target
            before = count

            async def counted_on() -> bool:
                return count > before + 1

            await eventually("the other client is served", counted_on)
            stop.set()
        entry = await kv.get(b"undisturbed")
        assert entry is not None
        assert entry.value == b"%d" % count
        assert world.running == world.names
        assert {name: process.pid for name, process in world.processes.items()} == pids


def put(key: bytes, value: bytes, sequence: int = 1) -> bytes:
    return seal(Op.PUT, pack_put(key, value), sequence, 0, 0)


def raw_command(*fields: object) -> bytes:
    return codec.dumps(list(fields))


@pytest.mark.parametrize(
    "command, said",
    [
        (put(b"", b"v"), "1 to 4096 bytes"),
        (put(bytes(KEY_BYTES_MAX + 1), b"v"), "1 to 4096 bytes"),
        (put(b"k", bytes(VALUE_BYTES_MAX + 1)), "at most 1048576 bytes"),
        (raw_command(0, 1, 0, 0, 0, "k", b"v", None), "key"),
        (raw_command(0, 1, 0, 0, 0, b"k", "v", None), "value"),
        (raw_command(0, 1, 0, 0, 0, b"k", b"v", -1), "if_version"),
        (raw_command(0, -1, 0, 0, 0, b"k", b"v", None), "unsigned"),
        (raw_command(0, 1, 0, 0, 0, b"k"), "fields"),
        (raw_command(99, 1, 0, 0, 0, b"k", b"v", None), "operation"),
        (raw_command(), "fields"),
        (codec.dumps(5), "array"),
        (codec.dumps(None), "array"),
        (seal(Op.INCREMENT, pack_increment(b"k", (1 << 63) - 1)[:-8] + b"\xff" * 8, 1, 0, 0), "64-bit"),
    ],
    ids=lambda value: value.replace(" ", "-") if isinstance(value, str) else "command",
)
async def test_a_write_past_the_clients_checks_is_refused_by_the_server(
    world: LocalCluster, command: bytes, said: str
) -> None:
    """DESIGN 2.3: limits are checked before anything is sent and again by the server; the connection goes on."""
    async with check_undisturbed(world) as target, connect_raw(target.address) as raw:
        await raw.greet()
        answer = await raw.write(target.range_id, target.generation, command)
        assert isinstance(answer.error, MalformedRequest)
        assert said in str(answer.error)
        await raw.check_served()


async def test_a_bad_command_in_a_batch_keeps_the_good_ones_from_being_applied(world: LocalCluster) -> None:
    """A request is taken or refused whole."""
    async with check_undisturbed(world) as target, connect_raw(target.address) as raw:
        await raw.greet()
        good, bad = put(b"batch/good", b"v", 100), put(b"", b"v", 101)
        answer = await raw.write(target.range_id, target.generation, good, bad)
        assert isinstance(answer.error, MalformedRequest)
    async with client(world) as kv:
        assert await kv.get(b"batch/good") is None


@pytest.mark.parametrize(
    "method, arguments",
    [
        (Method.WRITE, []),
        (Method.WRITE, [b"short", b""]),
        (Method.WRITE, [b"x" * 16, b""]),
        (Method.WRITE, [b"x" * 16, codec.dumps([])]),
        (Method.WRITE, [b"x" * 16, codec.dumps([[]] * 5000)]),
        (Method.GET, []),
        (Method.GET, [0, [b""]]),
        (Method.GET, [0, ["text"]]),
        (Method.GET, [0, [b"k"] * 10_001]),
        (Method.GET, [77, [b"k"]]),
        (Method.GET, [0, [bytes(KEY_BYTES_MAX + 1)]]),
        (Method.SCAN, []),
        (Method.SCAN, [0, b"b", b"a", 10, 10, False, False]),
        (Method.SCAN, [0, b"a", b"b", -1, 10, False, False]),
        (Method.SCAN, [0, b"a", b"b", 10, 10, 5, False]),
        (Method.ROUTES, []),
        (Method.ROUTES, [b"a", -5]),
        (Method.ROUTES, [b"a", 1 << 62]),
        (Method.SPLIT, [5]),
        (Method.SPLIT, [b""]),
        (Method.TRANSFER, ["a", "b"]),
        (Method.TRANSFER, [1, 99]),
        (Method.SNAPSHOT, [None]),
        (Method.CHANGE_REPLICAS, [1, [["add_learner", -1, -1]], 0]),
        (Method.CHANGE_REPLICAS, [1, "nonsense", 0]),
        (Method.JOIN, [1, 2, 3, 4]),
        (Method.JOIN, ["n99", "nowhere", b"t", [["a"]]]),
        (Method.PLACEMENT, [[99, b"?"]]),
        (Method.PLACEMENT, [None]),
        (Method.HEARTBEAT, [None]),
        (Method.HEARTBEAT, [[[], {}, b"", -1]]),
        (99, []),
        (-1, []),
        (1 << 63, []),
    ],
)
async def test_arguments_out_of_shape_are_answered_with_an_error(
    world: LocalCluster, method: int, arguments: list[object]
) -> None:
    """Each request is answered, by its number; the error is a request's, or a routing one of the wrong place."""
    async with check_undisturbed(world) as target, connect_raw(target.address) as raw:
        await raw.greet()
        answer = await raw.request(7, method, target.range_id, target.generation, 0, *arguments)
        assert answer.id == 7
        if method != Method.ROUTES or len(arguments) < 2:  # any limit there means at least one
            assert isinstance(answer.error, ShardKVError), answer.result


@pytest.mark.parametrize(
    "fields",
    [
        (1, Method.GET, -1, 0, 0, 0, [b"k"]),
        (1, Method.GET, 1 << 62, 0, 0, 0, [b"k"]),
        (1, Method.GET, 1, 1 << 62, 0, 0, [b"k"]),
        (1, Method.GET, 1, -1, 0, 0, [b"k"]),
        (1, Method.GET, 1, 0, (1 << 64) - 1, 0, [b"k"]),
        (1, Method.GET, 1, 0, -1, 0, [b"k"]),
    ],
)
async def test_trap_23_an_envelope_with_numbers_that_cannot_be_poisons_nothing(
    world: LocalCluster, fields: tuple[object, ...]
) -> None:
    """Trap 23: a timestamp beyond the offset bound is refused, never absorbed; the others are merely wrong."""
    async with check_undisturbed(world) as target, connect_raw(target.address) as raw:
        await raw.greet()
        answer = await raw.request(*fields)
        assert answer.id == 1
        answer = await raw.request(2, Method.NODES, 0, 0, 0)
        assert answer.error is None
        assert answer.timestamp < 1 << 62


def _frames() -> dict[str, bytes]:
    request = encode_frame(FrameKind.REQUEST, join([encode_request(1, Method.GET, 1, 1, 0, 0, [b"k"])]))
    flags, squeezed = compress_payload(bytes(4096) + random.Random(1).randbytes(64))
    assert flags == COMPRESSED
    huge = struct.pack(">I", FRAME_BYTES_MAX + 3) + request[4:]
    return {
        "an unknown kind": encode_frame(FrameKind.REQUEST, b"x").replace(b"\x04", b"\xee", 1),
        "a peer's kind": encode_frame(FrameKind.RAFT, raft_codec.join([])),
        "a server's kind": encode_frame(FrameKind.RESPONSE, b"\x80"),
        "a second greeting": encode_hello(Hello(Role.CLIENT)),
        "a length of zero": struct.pack(">I", 0) * 3,
        "a length over the bound": huge,
        "the largest length": b"\xff\xff\xff\xff\x04\x00",
        "no CBOR": encode_frame(FrameKind.REQUEST, b"\xff\xfe\xfd"),
        "CBOR that goes on": encode_frame(FrameKind.REQUEST, b"\x80\x80"),
        "a CBOR tag": encode_frame(FrameKind.REQUEST, b"\x81\xc1\x00"),
        "an array of 2^32": encode_frame(FrameKind.REQUEST, b"\x9a\xff\xff\xff\xff"),
        "bytes of 2^63": encode_frame(FrameKind.REQUEST, b"\x5b\x7f\xff\xff\xff\xff\xff\xff\xff"),
        "deep nesting": encode_frame(FrameKind.REQUEST, b"\x81" * 100_000 + b"\x80"),
        "no array": encode_frame(FrameKind.REQUEST, b"\x05"),
        "no request": encode_frame(FrameKind.REQUEST, b"\x81\x05"),
        "a short request": encode_frame(FrameKind.REQUEST, b"\x81\x81\x05"),
        "too many requests": encode_frame(FrameKind.REQUEST, join([request[6:][1:]] * 5_000)),
        "a zstd frame that is none": encode_frame(FrameKind.REQUEST, b"\x28\xb5\x2f\xfd rubbish", flags=COMPRESSED),
        "zeros squeezed": encode_frame(FrameKind.REQUEST, squeezed, flags=flags),
        "unknown flags": encode_frame(FrameKind.REQUEST, request[6:], flags=0xF0),
        "HTTP": b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    }


@pytest.mark.parametrize("what", list(_frames()))
async def test_a_client_that_sends_no_sound_frame_is_told_why_and_cut_off(world: LocalCluster, what: str) -> None:
    async with check_undisturbed(world) as target, connect_raw(target.address) as raw:
        await raw.greet()
        await raw.send(_frames()[what])
        refusal = await raw.refusal()
        assert "ProtocolError" in refusal or "MalformedRequest" in refusal, refusal


async def test_garbage_after_a_greeting_and_instead_of_one_is_cut_off(world: LocalCluster) -> None:
    """Random bytes from a seed; most look like a frame that is far too long."""
    chance = random.Random(4)
    async with check_undisturbed(world) as target:
        for number in range(40):
            async with connect_raw(target.address) as raw:
                if number % 2:
                    await raw.greet()
                try:
                    await raw.send(chance.randbytes(chance.randrange(1, 5000)))
                    await raw.stream.send_eof()
                except trio.BrokenResourceError:
                    continue
                await raw.closed()


async def test_damaged_requests_get_an_answer_or_an_end_and_never_take_a_node_down(world: LocalCluster) -> None:
    """Sound requests with a few bytes changed, by a seed: the decoder's every corner, off the real network."""
    chance = random.Random(7)
    async with check_undisturbed(world) as target:
        sound = [
            encode_request(1, Method.GET, target.range_id, target.generation, 0, 0, [b"k", b"l"]),
            encode_request(2, Method.SCAN, target.range_id, target.generation, 0, 0, b"zz", None, 5, 99, False, True),
            encode_request(3, Method.ROUTES, 0, 0, 0, b"", 5),
            encode_request(4, Method.HEARTBEAT, 0, 0, 0, [1, 1, "a", [], [], []]),
            encode_request(5, Method.PLACEMENT, 0, 0, 0, [1, b"x" * 16, 5]),
            encode_request(
                6, Method.WRITE, target.range_id, target.generation, 0, b"d" * 16, commands.join([put(b"zzz", b"v")])
            ),
        ]
        for _ in range(300):
            async with connect_raw(target.address) as raw:
                await raw.greet()
                damaged = bytearray(join([chance.choice(sound)]))
                for _ in range(chance.randrange(1, 4)):
                    damaged[chance.randrange(1, len(damaged))] = chance.randrange(256)
                await raw.send(encode_frame(FrameKind.REQUEST, bytes(damaged)))
                await raw.stream.send_eof()
                await raw.closed()


@pytest.mark.parametrize("length", [0, 1, 5, 6, -1])
async def test_a_frame_that_never_ends_costs_its_own_connection_alone(world: LocalCluster, length: int) -> None:
    """A truncated frame and silence; then the client goes away."""
    frame = encode_frame(FrameKind.REQUEST, join([encode_request(1, Method.GET, 1, 1, 0, 0, [b"k"])]))
    async with check_undisturbed(world) as target, connect_raw(target.address) as raw:
        await raw.greet()
        await raw.send(frame[:length])
        await raw.stream.send_eof()
        assert await raw.closed() is None


@pytest.mark.parametrize(
    "hello, said",
    [
        (Hello(Role.CLIENT, protocol_version_min=99, protocol_version_max=99), "upgrade"),
        (Hello(Role.CLIENT, cluster_id=OTHER_CLUSTER), "WrongCluster"),
        (Hello(Role.PEER, OTHER_CLUSTER, NodeId(2), NodeId(1), 1), "WrongCluster"),
        (Hello(Role.SNAPSHOT, OTHER_CLUSTER, NodeId(2), NodeId(1), 1), "WrongCluster"),
    ],
)
async def test_a_stranger_is_told_why_it_is_refused(world: LocalCluster, hello: Hello, said: str) -> None:
    """DESIGN 4.3: every connection names its cluster; a version that nobody speaks says which to upgrade."""
    async with check_undisturbed(world) as target, connect_raw(target.address) as raw:
        await raw.send(encode_hello(hello))
        assert said in await raw.refusal()


async def test_a_peer_for_another_node_or_with_a_lower_boot_is_refused(world: LocalCluster) -> None:
    """Trap 24: every connection names source, destination and boot counter."""
    async with check_undisturbed(world) as target:
        for hello in (
            Hello(Role.PEER, target.cluster_id, NodeId(2), NodeId(77), 1),
            Hello(Role.PEER, target.cluster_id, NodeId(77), NodeId(77), 1),
        ):
            async with connect_raw(target.address) as raw:
                await raw.send(encode_hello(hello))
                assert "WrongCluster" in await raw.refusal()


async def test_a_greeting_that_is_none_is_refused(world: LocalCluster) -> None:
    async with check_undisturbed(world) as target:
        for payload in (b"", MAGIC, MAGIC + b"\x80", MAGIC + b"\xff", b"POST / HTTP/1.1", bytes(100_000)):
            async with connect_raw(target.address) as raw:
                await raw.send(encode_frame(FrameKind.HELLO, payload))
                assert "ProtocolError" in await raw.refusal()


async def test_bad_messages_of_a_peer_are_refused_and_change_nothing(world: LocalCluster) -> None:
    """A peer is trusted further than a client, but what it sends is decoded with the same care."""
    chance = random.Random(9)
    async with check_undisturbed(world) as target:
        destination = NodeId(world.names.index(next(n for n, a in world.addresses.items() if a == target.address)) + 1)
        for number in range(20):
            async with connect_raw(target.address) as raw:
                # A source that does not exist: a real one's messages would be a real one's.
                await raw.greet(Hello(Role.PEER, target.cluster_id, NodeId(90), destination, 1))
                payload = b"\xff\x00" if number == 0 else chance.randbytes(chance.randrange(1, 200))
                await raw.send(encode_frame(FrameKind.RAFT, payload))
                await raw.stream.send_eof()
                await raw.closed()


async def test_reads_whose_answer_would_be_enormous_are_answered_in_pieces(world: LocalCluster) -> None:
    """40 values of 1 MiB fit in no frame: the client asks for fewer at once."""
    async with check_undisturbed(world), client(world) as kv:
        big = {b"big/%02d" % number: bytes([number]) * VALUE_BYTES_MAX for number in range(40)}
        await kv.put_many(big)
        entries = await kv.get_many(list(big) * 2)
        assert {key: entry.value for key, entry in entries.items()} == big
        assert [entry.key async for entry in kv.scan(prefix=b"big/")] == list(big)
        await kv.delete_range(prefix=b"big/")


async def test_one_key_asked_for_ten_thousand_times_in_one_request_fills_no_memory(world: LocalCluster) -> None:
    """10,000 times 1 MiB is what a hostile get may name in 30 KB."""
    async with check_undisturbed(world) as target, client(world) as kv, connect_raw(target.address) as raw:
        await kv.put(b"big", bytes(VALUE_BYTES_MAX))
        await raw.greet()
        pid = next(world.processes[name].pid for name, address in world.addresses.items() if address == target.address)
        before = resident_bytes(pid)
        asked = (target.range_id, target.generation, 0, Consistency.FOLLOWER, [b"big"] * 10_000)

        async def refused() -> bool:
            """Without a leader it would be, too."""
            return isinstance((await raw.request(1, Method.GET, *asked)).error, ValueTooLarge)

        await eventually("it is too large", refused)
        assert resident_bytes(pid) - before < 64 * 1024 * 1024


async def test_connections_that_say_nothing_are_given_up(world: LocalCluster) -> None:
    """A hundred that never greet hold nobody up, and after some seconds each is told so and cut off."""
    async with check_undisturbed(world) as target, AsyncExitStack() as opened:
        silent = [await opened.enter_async_context(connect_raw(target.address)) for _ in range(100)]
        async with connect_raw(target.address) as raw:
            await raw.greet()
            await raw.check_served()
        for each in silent:
            assert "did not finish its greeting" in await each.refusal()


def test_the_clients_own_checks_come_before_anything_is_sent(world: LocalCluster) -> None:
    """DESIGN 2.3: keys and values are bytes, anything else is TypeError; limits are checked first."""
    with connect_blocking("127.0.0.1:1") as kv:
        with pytest.raises(TypeError):
            kv.put("text", b"v")  # type: ignore[arg-type]
        with pytest.raises(KeyTooLarge):
            kv.put(bytes(KEY_BYTES_MAX + 1), b"v")
        with pytest.raises(RequestError):
            kv.put(b"", b"v")
        with pytest.raises(RequestError):
            kv.put(b"k", bytes(VALUE_BYTES_MAX + 1))


def test_an_unknown_method_says_that_the_node_may_be_older(world: LocalCluster) -> None:
    with connect_blocking(world.connect) as kv, pytest.raises(UnknownMethod, match="older"):
        kv.call(98, timeout=10)
