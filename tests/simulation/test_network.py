"""The simulated network behaves as TCP does, and its faults show only what sockets would show."""

import pytest
import trio

from shardkv.environment import Listener, Stream
from shardkv.errors import ConfigError
from shardkv.simulation import Link, NodeNetwork, SimulatedNetwork, run_deterministically
from shardkv.simulation.network import WINDOW_BYTES
from tests.virtual_time import simulated

A, B = "a:1", "b:1"
FIXED = Link(delay_seconds_min=0.01, delay_seconds_max=0.01)


class World:
    """Two nodes, each with a listener that keeps the streams it is given."""

    def __init__(self, link: Link = FIXED) -> None:
        self.network = SimulatedNetwork(1, link=link)
        self.a = self.network.node("a")
        self.b = self.network.node("b")
        self.accepted: list[Stream] = []
        self.more = trio.Event()

    async def keep(self, stream: Stream) -> None:
        self.accepted.append(stream)
        self.more.set()
        await trio.sleep_forever()

    async def pair(self, nursery: trio.Nursery) -> tuple[Stream, Stream]:
        """One connection: the end at a, the end at b."""
        if B not in self.network._listeners:
            await nursery.start(self.b.listen, B, self.keep)
        self.more = trio.Event()
        stream = await self.a.dial(B)
        await self.more.wait()
        return stream, self.accepted[-1]


async def arrives(stream: Stream, seconds: float) -> bytes | None:
    """What arrives within ``seconds``, or None."""
    with trio.move_on_after(seconds):
        return await stream.receive(1 << 20)
    return None


@simulated
async def test_bytes_arrive_in_order_after_the_delay(nursery: trio.Nursery) -> None:
    one, two = await World().pair(nursery)
    start = trio.current_time()
    assert one.send_nowait(b"first ") == 6
    await one.send_all(b"second")
    assert await two.receive(3) == b"fir"
    assert trio.current_time() - start == pytest.approx(0.01)
    assert await two.receive(100) == b"st second"
    await two.send_all(b"back")
    assert await one.receive(100) == b"back"


@simulated
async def test_a_slow_link_takes_its_time(nursery: trio.Nursery) -> None:
    world = World()
    one, two = await world.pair(nursery)
    world.network.link("a", "b").bytes_per_second = 1000
    start = trio.current_time()
    await one.send_all(bytes(500))
    await one.send_all(bytes(500))
    received = 0
    while received < 1000:
        received += len(await two.receive(1000))
    assert trio.current_time() - start == pytest.approx(1.01)


@simulated
async def test_what_crept_along_a_link_does_so_no_longer_once_the_link_is_restored(nursery: trio.Nursery) -> None:
    """In its order. Else a cluster that is said to be healed would be deaf for as long as the slow link had taken."""
    world = World()
    one, two = await world.pair(nursery)
    link = world.network.link("a", "b")
    link.bytes_per_second = 10
    await one.send_all(b"first ")
    await one.send_all(bytes(500))
    world.network.restore_links()
    assert link.bytes_per_second is None
    await one.send_all(b"last")
    start = trio.current_time()
    received = b""
    while len(received) < 510:
        received += await two.receive(1000)
    assert received == b"first " + bytes(500) + b"last"
    assert trio.current_time() - start < 0.1


@simulated
async def test_a_reader_that_does_not_read_fills_the_window(nursery: trio.Nursery) -> None:
    one, two = await World().pair(nursery)
    assert one.send_nowait(bytes(WINDOW_BYTES + 5)) == WINDOW_BYTES
    assert one.send_nowait(b"x") == 0
    sent = trio.Event()

    async def send() -> None:
        await one.send_all(b"12345")
        sent.set()

    nursery.start_soon(send)
    await trio.sleep(1)
    assert not sent.is_set()
    assert len(await two.receive(5)) == 5
    await sent.wait()


@simulated
async def test_a_partition_holds_bytes_up_until_it_heals(nursery: trio.Nursery) -> None:
    world = World()
    one, two = await world.pair(nursery)
    await one.send_all(b"before")
    await trio.sleep(1)
    world.network.partition(["a"], ["b"])
    await one.send_all(b"during")
    await two.send_all(b"reply")
    assert await two.receive(100) == b"before"
    assert await arrives(two, 60) is None
    assert await arrives(one, 60) is None
    world.network.heal()
    assert await arrives(two, 1) == b"during"
    assert await arrives(one, 1) == b"reply"


@simulated
async def test_bytes_under_way_when_the_partition_begins_do_not_arrive(nursery: trio.Nursery) -> None:
    world = World()
    one, two = await world.pair(nursery)
    await one.send_all(b"late")
    world.network.block("a", "b")
    assert await arrives(two, 60) is None
    world.network.unblock("a", "b")
    assert await arrives(two, 1) == b"late"


@simulated
async def test_a_one_way_partition_lets_the_other_way_through_until_the_window_is_full(nursery: trio.Nursery) -> None:
    """Acknowledgements travel the blocked way, so a sender stalls in the end."""
    world = World()
    one, two = await world.pair(nursery)
    world.network.block("b", "a")
    await one.send_all(b"there")
    assert await arrives(two, 1) == b"there"
    await two.send_all(b"not back")
    assert await arrives(one, 60) is None
    assert one.send_nowait(bytes(WINDOW_BYTES)) == WINDOW_BYTES - 5
    assert len(await two.receive(WINDOW_BYTES)) == WINDOW_BYTES - 5
    assert one.send_nowait(b"x") == 0
    world.network.heal()
    assert one.send_nowait(b"x") == 1
    assert await arrives(one, 1) == b"not back"


@simulated
async def test_the_end_of_a_stream_comes_after_its_bytes(nursery: trio.Nursery) -> None:
    one, two = await World().pair(nursery)
    await one.send_all(b"last words")
    one.close_now()
    assert await two.receive(100) == b"last words"
    assert await two.receive(100) == b""
    assert await two.receive(100) == b""
    with pytest.raises(trio.BrokenResourceError):
        two.send_nowait(b"x")
    with pytest.raises(trio.ClosedResourceError):
        one.send_nowait(b"x")
    with pytest.raises(trio.ClosedResourceError):
        await one.receive(1)


@simulated
async def test_a_close_is_not_seen_through_a_partition(nursery: trio.Nursery) -> None:
    """A node learns of a fault only what its sockets show."""
    world = World()
    one, two = await world.pair(nursery)
    world.network.partition(["a"], ["b"])
    one.close_now()
    assert await arrives(two, 60) is None
    assert two.send_nowait(b"into the void") == 13
    world.network.heal()
    assert await arrives(two, 1) == b""


@simulated
async def test_closing_wakes_our_own_reader(nursery: trio.Nursery) -> None:
    one, _ = await World().pair(nursery)

    async def read() -> None:
        with pytest.raises(trio.ClosedResourceError):
            await one.receive(1)

    async with trio.open_nursery() as inner:
        inner.start_soon(read)
        await trio.sleep(1)
        one.close_now()


@simulated
async def test_a_waiting_sender_learns_that_the_other_side_is_gone(nursery: trio.Nursery) -> None:
    one, two = await World().pair(nursery)

    async def send() -> None:
        with pytest.raises(trio.BrokenResourceError):
            await one.send_all(bytes(2 * WINDOW_BYTES))

    async with trio.open_nursery() as inner:
        inner.start_soon(send)
        await trio.sleep(1)
        two.close_now()


@simulated
async def test_a_dropped_connection_is_reset_on_both_sides(nursery: trio.Nursery) -> None:
    world = World()
    one, two = await world.pair(nursery)
    other, _ = await world.pair(nursery)
    assert world.network.drop("a", "b") == 2
    for stream in (one, two, other):
        with pytest.raises(trio.BrokenResourceError):
            await stream.receive(1)
        with pytest.raises(trio.BrokenResourceError):
            stream.send_nowait(b"x")


@simulated
async def test_a_connection_is_cut_after_exactly_so_many_bytes(nursery: trio.Nursery) -> None:
    """What a proxy that dies in the middle of a message leaves."""
    world = World()
    one, two = await world.pair(nursery)
    world.network.cut_after("a", "b", 7)
    await one.send_all(b"01234")
    await one.send_all(b"56789")
    received = b""
    with pytest.raises(trio.BrokenResourceError):
        while True:
            received += await two.receive(100)
    assert received == b"0123456"
    with pytest.raises(trio.BrokenResourceError):
        await one.receive(1)
    again, end = await world.pair(nursery)
    await again.send_all(b"whole again")
    assert await end.receive(100) == b"whole again"


@simulated
async def test_sends_may_reset_by_chance(nursery: trio.Nursery) -> None:
    world = World()
    one, two = await world.pair(nursery)
    world.network.link("a", "b").reset_probability = 1.0
    await one.send_all(b"never arrives")
    with pytest.raises(trio.BrokenResourceError):
        await two.receive(1)


@simulated
async def test_dialling_a_free_port_is_refused_and_a_partition_times_out(nursery: trio.Nursery) -> None:
    world = World()
    with pytest.raises(ConnectionRefusedError):
        await world.a.dial(B)
    await world.pair(nursery)
    world.network.block("b", "a")
    with pytest.raises(TimeoutError):
        await world.a.dial(B)

    async def heal() -> None:
        await trio.sleep(3)
        world.network.heal()

    world.network.block("a", "b")
    nursery.start_soon(heal)
    start = trio.current_time()
    await world.a.dial(B)
    assert 3 <= trio.current_time() - start < 4


@simulated
async def test_addresses_are_given_out_and_refused(nursery: trio.Nursery) -> None:
    world = World()
    listener: Listener = await nursery.start(world.a.listen, "a:0", world.keep)
    assert not listener.address.endswith(":0")
    with pytest.raises(ConfigError, match="in use"):
        await world.a.listen(listener.address, world.keep)


@simulated
async def test_a_killed_node_is_missed_at_once_and_sends_nothing_more(nursery: trio.Nursery) -> None:
    """Its system closes its sockets (DESIGN 4.11)."""
    world = World()
    one, two = await world.pair(nursery)
    await two.send_all(b"before")
    world.network.kill(world.b)
    assert two.send_nowait(b"after") == 5
    two.close_now()
    assert await one.receive(100) == b"before"
    assert await one.receive(100) == b""
    assert await arrives(two, 60) is None
    with pytest.raises(ConnectionRefusedError):
        await world.a.dial(B)
    with trio.move_on_after(60) as scope:
        await world.b.dial(A)
    assert scope.cancelled_caught


@simulated
async def test_what_a_fenced_node_sends_goes_nowhere(nursery: trio.Nursery) -> None:
    """Between the fence and its cancellation a crashed node may still run, but must not be heard (DESIGN 3)."""
    world = World()
    one, two = await world.pair(nursery)
    world.b.fence()
    assert two.send_nowait(b"goodbye") == 7
    await two.send_all(b"goodbye")
    two.close_now()
    assert await arrives(one, 60) is None


@simulated
async def test_a_machine_without_power_is_silent_until_it_is_back(nursery: trio.Nursery) -> None:
    world = World()
    one, _ = await world.pair(nursery)
    world.network.power_off(world.b)
    assert one.send_nowait(b"hello?") == 6
    assert await arrives(one, 60) is None
    with pytest.raises(TimeoutError):
        await world.a.dial(B)
    world.b = world.network.node("b")
    with pytest.raises(trio.BrokenResourceError):
        await one.receive(1)
    await nursery.start(world.b.listen, B, world.keep)
    await world.a.dial(B)


def test_the_same_seed_gives_the_same_trace() -> None:
    """Every parameter of a run comes from its seed; a failed run repeats by it."""

    def trace(seed: int) -> list[tuple[float, str, bytes]]:
        events: list[tuple[float, str, bytes]] = []

        async def talk(node: NodeNetwork, peers: list[str]) -> None:
            for number in range(5):
                for peer in peers:
                    stream = await node.dial(peer)
                    await stream.send_all(b"%s %d" % (node.name.encode(), number))
                    events.append((trio.current_time(), node.name, await stream.receive(100)))
                    stream.close_now()

        async def main() -> None:
            network = SimulatedNetwork(seed)
            nodes = [network.node(name) for name in "abc"]

            async def echo(stream: Stream) -> None:
                while data := await stream.receive(100):
                    await stream.send_all(data)

            async with trio.open_nursery() as nursery:
                for node in nodes:
                    await nursery.start(node.listen, f"{node.name}:1", echo)
                async with trio.open_nursery() as talkers:
                    for node in nodes:
                        talkers.start_soon(talk, node, ["a:1", "b:1", "c:1"])
                nursery.cancel_scope.cancel()

        run_deterministically(main, seed=seed)
        return events

    assert trace(1) == trace(1)
    assert trace(1) != trace(2)
    assert len(trace(3)) == 45


async def after_a_partition(nursery: trio.Nursery, *, dies: bool) -> list[bytes | None]:
    """What arrives of what was sent before a partition and in it, where the sender's machine dies in it, or lives."""
    world = World()
    one, two = await world.pair(nursery)
    one.send_nowait(b"before")
    await trio.sleep(0.1)
    world.network.block("a", "b")
    one.send_nowait(b"after")
    await trio.sleep(0.1)
    if dies:
        world.network.power_off(world.a)
    world.network.unblock("a", "b")
    return [await arrives(two, 1), await arrives(two, 1)]


@simulated
async def test_what_a_partition_held_up_arrives_when_it_is_over(nursery: trio.Nursery) -> None:
    assert await after_a_partition(nursery, dies=False) == [b"before", b"after"]


@simulated
async def test_a_dead_machine_does_not_send_again_what_a_partition_held_up(nursery: trio.Nursery) -> None:
    assert await after_a_partition(nursery, dies=True) == [b"before", None]
