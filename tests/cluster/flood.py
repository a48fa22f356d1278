"""A hundred clients that send and never read, and what that does to a node's memory and to everybody else."""

from dataclasses import dataclass, field

import trio

from shardkv.wire import commands
from shardkv.wire.commands import Op, pack_put, seal
from shardkv.wire.frames import FrameKind, encode_frame
from shardkv.wire.handshake import Hello, Role, encode_hello
from shardkv.wire.requests import Method, encode_request, join
from shardkv_client.client import Client
from tests.cluster.harness import LocalCluster, client, eventually, leader_of, resident_bytes

MIB = 1024 * 1024
CLIENTS = 100
KEYS = 8
SAMPLE_SECONDS = 0.1
STUCK_SECONDS = 3.0
"""A client whose bytes nobody has taken for this long has been stopped by the node's back-pressure."""


@dataclass(slots=True)
class Flood:
    """What came of it. Bytes."""

    sent: int = 0
    stuck: int = 0
    """Clients that were not read any more before they had sent everything."""
    dropped: int = 0
    """Clients whose connection the node closed, since too many answers were left untaken."""
    before: dict[str, int] = field(default_factory=dict)
    peak: dict[str, int] = field(default_factory=dict)
    after: dict[str, int] = field(default_factory=dict)
    others_served: int = 0
    """Calls of a well-behaved client that were answered meanwhile, and afterwards."""
    served_in_flood: int = 0
    """Of these, those that were answered while the flood went on."""
    slowest_other_seconds: float = 0.0

    @property
    def growth(self) -> int:
        """Of the node that grew most."""
        return max(self.peak[name] - self.before[name] for name in self.peak)

    def describe(self) -> str:
        grown = {name: f"{(self.peak[name] - size) / MIB:.0f}" for name, size in self.before.items()}
        base = {name: f"{size / MIB:.0f}" for name, size in self.before.items()}
        return (
            f"sent {self.sent / MIB:.0f} MiB, {self.stuck} clients stuck, {self.dropped} dropped, "
            f"resident before {base} MiB, growth {grown} MiB; {self.served_in_flood} calls of others served meanwhile, "
            f"the slowest in {self.slowest_other_seconds:.2f} s"
        )


async def flood(world: LocalCluster, total_bytes: int, *, value_bytes: int, get_every: int = 0) -> Flood:
    """Send ``total_bytes`` of puts in all from 100 connections that never read, to the first range's leader.

    Every ``get_every``-th request is a get of one large value instead (0: none).
    """
    found = Flood()
    async with client(world) as kv:
        await kv.put(b"flood/0", bytes(value_bytes))
        descriptor, _ = (await kv.ranges())[0]
        leader = await leader_of(kv, b"flood/0")
        host, _, port = world.addresses[leader].rpartition(":")
        found.before = _resident(world)
        found.peak = dict(found.before)

        async def send(number: int) -> None:
            async with await trio.open_tcp_stream(host, int(port)) as stream:
                left = total_bytes // CLIENTS
                data = encode_hello(Hello(Role.CLIENT))
                count = 0
                while left > 0 or data:
                    try:
                        with trio.move_on_after(STUCK_SECONDS) as scope:
                            await stream.send_all(data)
                    except trio.BrokenResourceError:
                        found.dropped += 1
                        break
                    if scope.cancelled_caught:
                        found.stuck += 1
                        break
                    if left <= 0:
                        break
                    found.sent += len(data)
                    left -= len(data)
                    count += 1
                    key = b"flood/%d" % (count % KEYS)
                    if get_every and count % get_every == 0:
                        fields = (Method.GET, descriptor.range_id, descriptor.epoch.span, 0, 0, [b"flood/0"])
                        data = encode_frame(FrameKind.REQUEST, join([encode_request(count, *fields)]))
                        left -= value_bytes  # what it asks for counts as much as what it sends
                        continue
                    body = pack_put(key, number.to_bytes(2, "big") * (value_bytes // 2))
                    session = b"flood" + number.to_bytes(11, "big")
                    written = commands.join([seal(Op.PUT, body, count, 0, count)])
                    data = encode_frame(
                        FrameKind.REQUEST,
                        join(
                            [
                                encode_request(
                                    count, Method.WRITE, descriptor.range_id, descriptor.epoch.span, 0, session, written
                                )
                            ]
                        ),
                    )

        async with trio.open_nursery() as nursery:
            nursery.start_soon(_sample, world, found)
            nursery.start_soon(_be_served, kv, found)
            async with trio.open_nursery() as senders:
                for number in range(CLIENTS):
                    senders.start_soon(send, number)
            served = found.served_in_flood = found.others_served

            async def still_served() -> bool:
                return found.others_served > served + 5

            await eventually("others are served after the flood", still_served)
            found.after = _resident(world)
            nursery.cancel_scope.cancel()
    return found


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
        await kv.increment(b"other", timeout=60)
        await kv.get(b"other", timeout=60)
        found.others_served += 2
        found.slowest_other_seconds = max(found.slowest_other_seconds, (trio.current_time() - started) / 2)
