"""A hundred clients that ask and never read, and what that does to a node's memory and to everybody else."""

from collections.abc import Callable
from dataclasses import dataclass, field

import trio

from shardkv.wire import commands
from shardkv.wire.commands import Op, pack_put, seal
from shardkv.wire.frames import FrameKind, encode_frame
from shardkv.wire.handshake import Hello, Role, encode_hello
from shardkv.wire.requests import SCAN_PAGE_BYTES_MAX, SCAN_PAGE_ENTRIES_MAX, Consistency, Method, encode_request, join
from shardkv_client.client import Client
from tests.cluster.harness import LocalCluster, client, eventually, leader_of, resident_bytes

MIB = 1024 * 1024
CLIENTS = 100
KEYS = 16
GET_MANY_KEYS = 12
SAMPLE_SECONDS = 0.05
STUCK_SECONDS = 3.0
"""A client whose bytes nobody has taken for this long has been stopped by the node's back-pressure."""
POKE_SECONDS = 0.1
GROWTH_MAX = 64 * MIB


@dataclass(slots=True)
class Flood:
    """What came of it. Bytes."""

    sent: int = 0
    """Of writes; and of answers that were asked for, which nobody reads."""
    stuck: int = 0
    """Clients that were not read any more before they had sent everything."""
    dropped: int = 0
    """Connections that the node closed, since too many answers were left untaken."""
    before: dict[str, int] = field(default_factory=dict)
    peak: dict[str, int] = field(default_factory=dict)
    after: dict[str, int] = field(default_factory=dict)
    others_served: int = 0
    """Calls of a well-behaved client that were answered meanwhile, and afterwards."""
    served_in_flood: int = 0
    """Of these, those that were answered while the flood went on."""
    slowest_other_seconds: float = 0.0
    large_served: int = 0
    """Large reads of another well-behaved client that were answered while the flood went on."""
    slowest_large_seconds: float = 0.0

    @property
    def growth(self) -> int:
        """Of the node that grew most."""
        return max(self.peak[name] - self.before[name] for name in self.peak)

    async def others_are_served(self) -> bool:
        return self.others_served > 0 and self.large_served > 0

    def describe(self) -> str:
        grown = {name: f"{(self.peak[name] - size) / MIB:.0f}" for name, size in self.before.items()}
        base = {name: f"{size / MIB:.0f}" for name, size in self.before.items()}
        return (
            f"asked {self.sent / MIB:.0f} MiB, {self.stuck} clients stuck, {self.dropped} dropped, "
            f"resident before {base} MiB, growth {grown} MiB; {self.served_in_flood} calls of others served meanwhile, "
            f"the slowest in {self.slowest_other_seconds:.2f} s, and {self.large_served} large reads, "
            f"the slowest in {self.slowest_large_seconds:.2f} s"
        )


@dataclass(frozen=True, slots=True)
class Target:
    """Where the flood goes: the first range's leader, or a follower of it for follower reads."""

    host: str
    port: int
    range_id: int
    generation: int
    value_bytes: int

    def request(self, count: int, method: Method, *arguments: object) -> bytes:
        encoded = encode_request(count, method, self.range_id, self.generation, 0, *arguments)
        return encode_frame(FrameKind.REQUEST, join([encoded]))


Ask = Callable[[Target, int, int], tuple[bytes, int]]
"""Of a client's number and a request's: the frame, and how many bytes it costs the node or would bring back."""


def _put(target: Target, number: int, count: int) -> tuple[bytes, int]:
    body = pack_put(_key(count), number.to_bytes(2, "big") * (target.value_bytes // 2))
    session = b"flood" + number.to_bytes(11, "big")
    data = target.request(count, Method.WRITE, session, commands.join([seal(Op.PUT, body, count, 0, count)]))
    return data, len(data)


def _get(target: Target, number: int, count: int) -> tuple[bytes, int]:
    return target.request(count, Method.GET, Consistency.LINEARIZABLE, [_key(count)]), target.value_bytes


def _follower_get(target: Target, number: int, count: int) -> tuple[bytes, int]:
    return target.request(count, Method.GET, Consistency.FOLLOWER, [_key(count)]), target.value_bytes


def _get_many(target: Target, number: int, count: int) -> tuple[bytes, int]:
    keys = [_key(count + each) for each in range(GET_MANY_KEYS)]
    data = target.request(count, Method.GET, Consistency.LINEARIZABLE, keys)
    return data, GET_MANY_KEYS * target.value_bytes


def _scan(target: Target, number: int, count: int) -> tuple[bytes, int]:
    limits = (SCAN_PAGE_ENTRIES_MAX, SCAN_PAGE_BYTES_MAX)
    data = target.request(count, Method.SCAN, Consistency.LINEARIZABLE, b"flood/", b"flood0", *limits, False, False)
    return data, min(KEYS * target.value_bytes, SCAN_PAGE_BYTES_MAX)


def _mix(target: Target, number: int, count: int) -> tuple[bytes, int]:
    return (_put, _get, _scan, _put, _get_many)[(number + count) % 5](target, number, count)


@dataclass(frozen=True, slots=True)
class Kind:
    """What a flood consists of."""

    ask: Ask
    value_bytes: int
    read_bytes_per_second: int = 0
    """What each client takes of its answers after all."""


FLOODS = {
    "puts of 64 KiB": Kind(_put, 64 * 1024),
    "puts of 1 MiB": Kind(_put, MIB),
    "gets of 64 KiB": Kind(_get, 64 * 1024),
    "gets of 1 MiB": Kind(_get, MIB),
    "gets of 1 MiB from a follower": Kind(_follower_get, MIB),
    "scans, values of 64 KiB": Kind(_scan, 64 * 1024),
    "scans, values of 1 MiB": Kind(_scan, MIB),
    "get_many, values of 64 KiB": Kind(_get_many, 64 * 1024),
    "get_many, values of 600 KiB": Kind(_get_many, 600 * 1024),
    "a mix, values of 256 KiB": Kind(_mix, 256 * 1024),
    "a mix, values of 1 MiB": Kind(_mix, MIB),
    "a mix, values of 256 KiB, one byte a second is read": Kind(_mix, 256 * 1024, read_bytes_per_second=1),
    "gets of 1 MiB, one byte a second is read": Kind(_get, MIB, read_bytes_per_second=1),
}


def _key(count: int) -> bytes:
    return b"flood/%02d" % (count % KEYS)


async def flood(
    world: LocalCluster, total_bytes: int, kind: Kind, *, hold_seconds: float = 1.0, seconds: float = 0.0
) -> Flood:
    """Send or ask for ``total_bytes`` in all on 100 connections that never read, to the first range's leader.

    Args:
        hold_seconds: so long a client that has asked for everything keeps its connection, without reading.
        seconds: so long a client whose connection the node closed comes back with the same requests.
    """
    found = Flood()
    async with client(world) as kv, client(world) as reader:
        for number in range(KEYS):
            await kv.put(_key(number), bytes(kind.value_bytes))
        await kv.put(b"other/large", bytes(256 * 1024))
        descriptor, _ = (await kv.ranges())[0]
        leader = await leader_of(kv, _key(0))
        name = next(each for each in world.addresses if (each != leader) == (kind.ask is _follower_get))
        host, _, port = world.addresses[name].rpartition(":")
        target = Target(host, int(port), descriptor.range_id, descriptor.epoch.span, kind.value_bytes)
        found.before = _resident(world)
        found.peak = dict(found.before)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_sample, world, found)
            nursery.start_soon(_be_served, kv, found)
            nursery.start_soon(_read_large, reader, found)
            until = trio.current_time() + seconds
            async with trio.open_nursery() as senders:
                for number in range(CLIENTS):
                    senders.start_soon(
                        _attack, found, target, kind, number, total_bytes // CLIENTS, hold_seconds, until
                    )
            served = found.served_in_flood = found.others_served
            large = found.large_served

            async def still_served() -> bool:
                return found.others_served > served + 5

            await eventually("others are served after the flood", still_served)
            found.large_served = large
            found.after = _resident(world)
            nursery.cancel_scope.cancel()
    return found


async def _attack(
    found: Flood, target: Target, kind: Kind, number: int, share_bytes: int, hold_seconds: float, until: float
) -> None:
    while True:
        dropped = found.dropped
        async with await trio.open_tcp_stream(target.host, target.port) as stream, trio.open_nursery() as nursery:
            if kind.read_bytes_per_second:
                nursery.start_soon(_sip, stream, kind.read_bytes_per_second)
            await _send(found, stream, target, kind.ask, number, share_bytes, hold_seconds)
            await eventually("others are served during the flood", found.others_are_served)
            nursery.cancel_scope.cancel()
        if found.dropped == dropped or trio.current_time() >= until:
            return


async def _send(
    found: Flood,
    stream: trio.SocketStream,
    target: Target,
    ask: Ask,
    number: int,
    share_bytes: int,
    hold_seconds: float,
) -> None:
    """Send a client's requests, as far as the node takes them; then keep the connection for a while."""
    data = encode_hello(Hello(Role.CLIENT))
    cost = count = 0
    left = share_bytes
    try:
        while True:
            with trio.move_on_after(STUCK_SECONDS) as scope:
                await stream.send_all(data)
            if scope.cancelled_caught:
                found.stuck += 1
                return
            found.sent += cost
            left -= cost
            if left <= 0:
                break
            count += 1
            data, cost = ask(target, number, count)
        poke = encode_frame(FrameKind.PING, b"")
        for _ in range(int(hold_seconds / POKE_SECONDS)):
            await trio.sleep(POKE_SECONDS)
            with trio.move_on_after(POKE_SECONDS):
                await stream.send_all(poke)
    except trio.BrokenResourceError:
        found.dropped += 1


async def _sip(stream: trio.SocketStream, bytes_per_second: int) -> None:
    try:
        for _ in range(600):
            await stream.receive_some(bytes_per_second)
            await trio.sleep(1)
    except trio.BrokenResourceError:
        pass


def _resident(world: LocalCluster) -> dict[str, int]:
    return {name: resident_bytes(process.pid) for name, process in world.processes.items() if process.running}


async def _sample(world: LocalCluster, found: Flood) -> None:
    while True:
        for name, size in _resident(world).items():
            found.peak[name] = max(found.peak[name], size)
        await trio.sleep(SAMPLE_SECONDS)


async def _be_served(kv: Client, found: Flood) -> None:
    while True:
        started = trio.current_time()
        await kv.increment(b"other")
        await kv.get(b"other")
        found.others_served += 2
        found.slowest_other_seconds = max(found.slowest_other_seconds, (trio.current_time() - started) / 2)


async def _read_large(kv: Client, found: Flood) -> None:
    while True:
        started = trio.current_time()
        await kv.get(b"other/large")
        found.large_served += 1
        found.slowest_large_seconds = max(found.slowest_large_seconds, trio.current_time() - started)
        await trio.sleep(0.02)
