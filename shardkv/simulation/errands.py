"""What clients do besides, in every corner of what they may ask: range deletes, large values, nonsense, hasty goodbyes.

Lives here: calls of which little is judged: they end in time, and with an answer or an error that the contract allows;
and where an errand is alone with its keys, that they are what it made them. Does not live here: calls whose answers are
remembered (``workload``). The rule: an errand touches keys of its own families only, so that nothing it does shows in a
history.
"""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from typing import Any, Final

import trio

from shardkv.errors import RequestError, ShardKVError
from shardkv.simulation import determinism
from shardkv.simulation.checkers.violation import Violation
from shardkv.simulation.cluster import Cluster
from shardkv.types import KEY_BYTES_MAX, VALUE_BYTES_MAX
from shardkv.wire.frames import FrameKind, encode_frame
from shardkv.wire.handshake import MAGIC, Hello, Role, encode_hello
from shardkv.wire.requests import Method
from shardkv_client import Client, Settings, connect
from shardkv_client.environment import Stream

SECONDS: Final = 2.5
"""For each call of an errand."""
MANY: Final = 40
"""Pairs at most that an errand puts at once."""
SPLIT_EVERY: Final = 8
"""Of so many numbers of pairs, one has its range split among them,"""
SPLITS_END_SECONDS: Final = 60.0
"""in the beginning of a run. Ranges are never merged, and each makes every later second dearer."""
STRANGER_BYTES: Final = 300
UNFINISHED: Final = encode_frame(FrameKind.REQUEST, bytes(5 * 1024 * 1024))[:1_000]
"""The begin of a frame of which a node lets only one arrive at a time."""
SMALL: Final = Settings(
    calls_in_flight_max=4,
    keys_per_get_max=3,
    commands_per_write_max=3,
    scan_page_entries_max=3,
    requests_per_frame_max=2,
    bytes_per_write_max=1_000,
)
"""Bounds that a busy program meets, for one that is not."""

Errand = Callable[[Cluster, Client, determinism.SeededRandom, bytes], Awaitable[object]]


async def run(cluster: Cluster, kv: Client, chance: determinism.SeededRandom, generation: int) -> None:
    """One errand, drawn. Raises what no caller should see."""
    prefix = b"%ce-%03d-" % (97 + chance.randrange(26), generation)
    errand = chance.choice(ERRANDS)
    try:
        await errand(cluster, kv, chance, prefix)
    except ShardKVError as error:
        if isinstance(error, RequestError) and errand in VALID:
            raise Violation("errand-answered", f"{errand.__name__}: {type(error).__name__}: {error}") from error


async def _many(cluster: Cluster, kv: Client, chance: determinism.SeededRandom, prefix: bytes) -> None:
    """Pairs that come one by one, under a prefix of this errand alone; all are there, and after a range delete none,
    though a split comes between them now and then."""
    prefix = b"%cm-%015d-" % (prefix[0], cluster.now * 1e9)
    keys = [prefix + b"%02d" % number for number in range(MANY)]
    written: dict[bytes, bytes] = {}

    async def pairs() -> AsyncIterator[tuple[bytes, bytes]]:
        for number in range(chance.randint(1, MANY)):
            await determinism.sleep(0)
            value = bytes(chance.randrange(200))
            written[keys[number]] = value
            yield keys[number], value

    await kv.put_many(pairs(), timeout=SECONDS, progress=lambda count: None)
    found = await kv.get_many(keys * 2, timeout=SECONDS)
    if {key: entry.value for key, entry in found.items()} != written:
        raise Violation("errand-answered", f"put_many wrote {[*written]}, and get_many finds {[*found]}")
    if len(written) % SPLIT_EVERY == 0 and cluster.now < SPLITS_END_SECONDS:
        middle = keys[len(written) // 2]
        with suppress(ShardKVError):
            await kv.call(Method.SPLIT, middle, key=middle, timeout=SECONDS / 2)
    await kv.delete_range(prefix=prefix, timeout=SECONDS)
    found = await kv.get_many(keys, timeout=SECONDS)
    if found:
        raise Violation("errand-answered", f"{[*found]} are there after a range delete")


async def _large(cluster: Cluster, kv: Client, chance: determinism.SeededRandom, prefix: bytes) -> None:
    """A large value under a key of this errand alone: it is what was put, every byte of it."""
    key = b"%cv-%015d" % (prefix[0], cluster.now * 1e9)
    letter, size = chance.choice([b"l", b"m", b"n"]), chance.choice([20_000, 300_000, VALUE_BYTES_MAX])
    value = b"".join(b"%07d" % number + letter * 1_000 for number in range(size // 1_000))[:size]
    version = await kv.put(key, value, timeout=SECONDS)
    entry = await kv.get(key, timeout=SECONDS)
    if entry is None or (entry.value, entry.version) != (value, version):
        found = "absent" if entry is None else f"{len(entry.value)} bytes at {entry.version}"
        raise Violation("errand-answered", f"{key!r} was put with {size} bytes at {version}, and is {found}")
    await kv.delete(key, timeout=SECONDS)


async def _scans(cluster: Cluster, kv: Client, chance: determinism.SeededRandom, prefix: bytes) -> None:
    """Every shape of a scan; some are not read to their end."""
    reverse = chance.random() < 0.5
    consistency = chance.choice(["linearizable", "follower", "stale"])
    keys: list[bytes] = []
    async with kv.scan(
        chance.choice([b"", b"c"]),
        chance.choice([None, b"t"]),
        limit=chance.choice([None, 5]),
        reverse=reverse,
        keys_only=chance.random() < 0.5,
        consistency=consistency,
        timeout=SECONDS / 3,
    ) as entries:
        with determinism.deadline_after(SECONDS):
            async for entry in entries:
                keys.append(entry.key)
                if chance.random() < 0.02:
                    break
    if keys != sorted(set(keys), reverse=reverse):
        raise Violation("scan-order", f"a scan in {'reverse' if reverse else 'order'} gave {keys}")


async def _near(cluster: Cluster, kv: Client, chance: determinism.SeededRandom, prefix: bytes) -> None:
    consistency = chance.choice(["stale", "follower"])
    await kv.get(prefix + b"00", consistency=consistency, timeout=SECONDS)
    await kv.get_many([prefix + b"%02d" % each for each in range(30)], consistency=consistency, timeout=SECONDS)


async def _hasty(cluster: Cluster, kv: Client, chance: determinism.SeededRandom, prefix: bytes) -> None:
    """Calls that nobody waits for to the end."""
    calls: list[Callable[[], Awaitable[object]]] = [
        lambda: kv.put(prefix + b"hasty", b"v", timeout=SECONDS),
        lambda: kv.get(prefix + b"hasty", timeout=SECONDS),
        lambda: kv.put_many({prefix + b"h%d" % each: b"v" for each in range(20)}, timeout=SECONDS),
        lambda: kv.get_many([prefix + b"h%d" % each for each in range(20)], timeout=SECONDS),
        lambda: kv.delete_range(prefix=prefix, timeout=SECONDS),
        lambda: kv.status(timeout=SECONDS),
    ]
    with determinism.deadline_after(chance.choice([0.0, 0.0005, 0.002, 0.01])):
        await chance.choice(calls)()


async def _nonsense(cluster: Cluster, kv: Client, chance: determinism.SeededRandom, prefix: bytes) -> None:
    """What the contract forbids; each must be refused before anything is done."""
    anything: Any = kv
    wrong: list[Callable[[], Any]] = [
        lambda: anything.put("text", b"v"),
        lambda: anything.put(prefix, "text"),
        lambda: kv.put(b"", b"v"),
        lambda: kv.put(b"k" * (KEY_BYTES_MAX + 1), b"v"),
        lambda: kv.put(prefix, bytes(VALUE_BYTES_MAX + 1)),
        lambda: kv.put(prefix, b"v", if_version=-1),
        lambda: kv.increment(prefix, 1 << 63),
        lambda: kv.get(prefix, consistency="guessed"),
        lambda: kv.get(prefix, timeout=-1),
        lambda: anything.get_many(prefix),
        lambda: anything.put_many([(prefix, 1)]),
        lambda: kv.delete_range(b"b", b"a"),
        lambda: kv.call(Method.STATUS, key=prefix, range_id=1),
        lambda: kv.call(99),
        lambda: kv.call(Method.RANGES, range_id=1 << 40),
        lambda: kv.call(Method.NODE_STATUS, node_id=77, timeout=0.5),
        lambda: _walked(anything.scan(b"", limit=-1)),
        lambda: _walked(anything.scan(prefix="text")),
    ]
    try:
        await chance.choice(wrong)()
    except (TypeError, ValueError, ShardKVError):
        return


async def _walked(entries: Any) -> None:
    async for _ in entries:
        pass


async def _malformed(cluster: Cluster, kv: Client, chance: determinism.SeededRandom, prefix: bytes) -> None:
    """Requests that no client of ours makes, through one that lets them pass."""
    requests: list[tuple[int, tuple[object, ...]]] = [
        (Method.GET, ()),
        (Method.GET, (0, [b""])),
        (Method.GET, (9, [prefix])),
        (Method.SCAN, (0,)),
        (Method.SCAN, (0, b"b", b"a", 1, 1, False, False)),
        (Method.WRITE, (b"short", b"")),
        (Method.WRITE, (bytes(16), b"\x80")),
        (Method.WRITE, (bytes(16), b"\x81\x80")),
        (Method.SPLIT, (1,)),
        (Method.SPLIT, (b"",)),
        (Method.TRANSFER, (b"x",)),
        (Method.TRANSFER, (1, 99)),
        (Method.SNAPSHOT, (b"x",)),
        (Method.CHANGE_REPLICAS, (1,)),
        (Method.CHANGE_REPLICAS, (1, [["promote", 1, 99]], 1)),
        (Method.CHANGE_REPLICAS, (1, [["add_learner", 1, 1]], 3)),
        (Method.ROUTES, (7,)),
        (Method.JOIN, ()),
        (Method.HEARTBEAT, (1,)),
        (Method.PLACEMENT, (b"",)),
    ]
    method, arguments = chance.choice(requests)
    await kv.call(method, *arguments, key=prefix, timeout=SECONDS / 2)


async def _operators(cluster: Cluster, kv: Client, chance: determinism.SeededRandom, prefix: bytes) -> None:
    """What people look at, and what they ask for."""
    await kv.status(timeout=SECONDS)
    for node in await kv.nodes(timeout=SECONDS):
        await kv.call(Method.NODE_STATUS, node_id=node.id, timeout=SECONDS / 5)
    ranges = await kv.ranges(timeout=SECONDS)
    descriptor, _ = chance.choice(ranges)
    await kv.call(Method.SNAPSHOT, descriptor.range_id, range_id=descriptor.range_id, timeout=SECONDS)
    await kv.call(Method.RANGES, timeout=SECONDS)


async def _visitor(cluster: Cluster, kv: Client, chance: determinism.SeededRandom, prefix: bytes) -> None:
    """A program that opens a client of its own, asks for more than it may at once, and leaves without waiting."""
    environment = cluster.client_environment()
    async with connect(cluster.addresses, environment=environment, settings=SMALL) as visitor:
        async with trio.open_nursery() as nursery:
            for number in range(12):
                nursery.start_soon(_quietly, visitor.put(prefix + b"v%02d" % number, bytes(200), timeout=SECONDS))
                nursery.start_soon(_quietly, visitor.get(prefix + b"v%02d" % number, timeout=SECONDS))
            if chance.random() < 0.5:
                await determinism.sleep(chance.uniform(0, 0.02))
                await visitor.aclose()
        await _quietly(visitor.put_many({prefix + b"w%02d" % each: bytes(300) for each in range(12)}, timeout=SECONDS))
        await _quietly(visitor.get_many([prefix + b"w%02d" % each for each in range(12)], timeout=SECONDS))
        await _quietly(_walked(visitor.scan(prefix=prefix, timeout=SECONDS)))
        await _quietly(visitor.delete_range(prefix=prefix, timeout=SECONDS))


async def _quietly(call: Awaitable[object]) -> None:
    with determinism.deadline_after(SECONDS):
        try:
            await call
        except ShardKVError:
            pass


async def _text(cluster: Cluster, kv: Client, chance: determinism.SeededRandom, prefix: bytes) -> None:
    """A number that is none."""
    await kv.put(prefix + b"text", chance.choice([b"text", b"9" * 19, b"-5"]), timeout=SECONDS)
    await _quietly(kv.increment(prefix + b"text", 1 << 62, timeout=SECONDS))
    await kv.delete(prefix + b"text", timeout=SECONDS)


async def _stranger(cluster: Cluster, kv: Client, chance: determinism.SeededRandom, prefix: bytes) -> None:
    """Somebody who does not speak the protocol, or not to the end."""

    async def say(stream: Stream) -> None:
        kind = chance.choice(list(FrameKind))
        noise = chance.randbytes(chance.randrange(STRANGER_BYTES))
        said = [noise, encode_frame(kind, noise), MAGIC + noise, (1 << 30).to_bytes(4, "big") + noise]
        await stream.send_all(chance.choice(said))
        if chance.random() < 0.5:
            await stream.receive(1_000)

    await _call_on(cluster, chance.choice([node.address for node in cluster.nodes.values()]), say)


async def _unfinished(cluster: Cluster, kv: Client, chance: determinism.SeededRandom, prefix: bytes) -> None:
    """Clients that have begun to send much and never end, while another has much to send, too."""
    address = chance.choice([node.address for node in cluster.nodes.values()])

    async def begin(stream: Stream) -> None:
        await stream.send_all(encode_hello(Hello(Role.CLIENT)) + UNFINISHED)
        await determinism.sleep(chance.uniform(0, SECONDS / 2))

    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(_call_on, cluster, address, begin)
        await _quietly(_large(cluster, kv, chance, prefix))


async def _call_on(cluster: Cluster, address: str, say: Callable[[Stream], Awaitable[None]]) -> None:
    """Dial a node, say something to it, and leave, whatever it makes of that."""
    with determinism.deadline_after(SECONDS):
        try:
            stream = await cluster.client_environment().dial(address)
        except (OSError, ShardKVError):
            return
        try:
            await say(stream)
        except (OSError, trio.BrokenResourceError, trio.ClosedResourceError):
            pass
        await stream.aclose()


ERRANDS: Final[tuple[Errand, ...]] = (
    *(_many, _large, _scans, _near, _hasty, _nonsense, _malformed, _operators, _visitor, _text, _stranger, _unfinished),
)
VALID: Final = frozenset({_many, _scans, _near, _hasty})
"""Errands that ask for nothing that could be refused as wrong."""
