"""A disk that is put back has forgotten votes, and writes that it had acknowledged (trap 24; docs/admin.md).

In each case two of three nodes have acknowledged a write that the third missed. One of the two comes back on a copy
from before that write: with the third it would be a majority that knows nothing of it. Nodes that have seen the newer
start refuse the copy before it can vote, though its count of starts may be the same by now, and though they themselves
have been restarted since.
"""

from dataclasses import replace

import pytest
import trio
from trio.testing import MockClock

from shardkv.environment import Stream
from shardkv.errors import Unavailable
from shardkv.simulation.environment import simulated_environment
from shardkv.transport.connection import Connection
from shardkv.transport.handshake import KnownBoots, accept, greet
from shardkv.types import NodeId
from shardkv.wire.frames import FrameDecoder, FrameKind, encode_frame
from shardkv.wire.handshake import Hello, Role, Welcome
from shardkv_client import Client
from tests.server.world import PORT, Cluster, SimulatedNode, world

OLD, NEW = b"old", b"acknowledged"


async def copied_before(cluster: Cluster, node: SimulatedNode, starts: int) -> tuple[object, object]:
    """A copy of the node's disk, which it has then been started on as often as said."""
    await node.kill()
    copy = node.environment.disk.copy(), node.copied_engine()
    for number in range(starts):
        if number:
            await node.kill()
        await node.start()
        await trio.sleep(3)
    return copy


async def both_die_and_one_is_put_back(cluster: Cluster, copy: tuple[object, object]) -> None:
    """Those that acknowledged the write; n3's disk is the copy then."""
    cluster.tolerant = True
    await cluster.nodes["n2"].kill()
    await cluster.nodes["n3"].kill()
    cluster.nodes["n3"].restore(*copy)


async def put_back_after_a_write_that_n1_missed(
    cluster: Cluster, kv: Client, starts: int
) -> tuple[SimulatedNode, SimulatedNode]:
    """n2, which acknowledged it, and n3, whose disk is a copy from before; n1 has seen n3's newer starts."""
    await kv.put(b"k", OLD)
    n2, n3 = cluster.nodes["n2"], cluster.nodes["n3"]
    copy = await copied_before(cluster, n3, starts)
    cluster.partition(["n1"], ["n2", "n3"])
    await trio.sleep(3)
    await kv.put(b"k", NEW)
    await both_die_and_one_is_put_back(cluster, copy)
    cluster.heal()
    return n2, n3


async def reads_nothing_old(cluster: Cluster) -> None:
    """Of a majority that consists of the copy and of who missed the write, clients hear nothing."""
    async with cluster.client("n1", "n3") as kv:
        for _ in range(8):
            try:
                entry = await kv.get(b"k", timeout=0.5)
            except Unavailable:
                continue
            assert entry is not None
            assert entry.value == NEW


async def holds_what_was_acknowledged(cluster: Cluster) -> None:
    async with cluster.client("n1", "n2") as kv:
        entry = await kv.get(b"k")
        assert entry is not None
        assert entry.value == NEW


@pytest.mark.parametrize("starts", [1, 3])
async def test_trap_24_an_old_copy_is_refused_by_who_has_seen_the_newer_start(
    autojump_clock: MockClock, starts: int
) -> None:
    """With one start in between, the copy's own start makes its count the same."""
    async with world(3) as cluster, cluster.client("n2", "n3") as kv:
        await cluster.formed(kv)
        n2, n3 = await put_back_after_a_write_that_n1_missed(cluster, kv, starts)
        n3.start_soon()
        await reads_nothing_old(cluster)
        n2.start_soon()
        await holds_what_was_acknowledged(cluster)


@pytest.mark.parametrize("starts", [1, 3])
@pytest.mark.parametrize("everybody", [False, True])
async def test_trap_24_an_old_copy_is_refused_by_who_has_been_restarted_since_it_saw_the_newer_start(
    autojump_clock: MockClock, starts: int, everybody: bool
) -> None:
    async with world(3) as cluster, cluster.client("n2", "n3") as kv:
        await cluster.formed(kv)
        await kv.put(b"k", OLD)
        n1, n2, n3 = (cluster.nodes[name] for name in ("n1", "n2", "n3"))
        copy = await copied_before(cluster, n3, starts)
        await n1.kill()
        await kv.put(b"k", NEW)
        await both_die_and_one_is_put_back(cluster, copy)
        n1.start_soon()
        n3.start_soon()
        if everybody:
            n2.start_soon()
        await reads_nothing_old(cluster)
        if not everybody:
            n2.start_soon()
        await holds_what_was_acknowledged(cluster)


async def test_trap_24_a_copy_that_was_let_in_first_is_heard_no_more_once_the_newer_start_is_known(
    autojump_clock: MockClock,
) -> None:
    """Its connection would stand until it breaks, and with it its votes."""
    async with world(3) as cluster:
        listening, _, twin = cluster.nodes.values()
        await twin.kill()
        environment = simulated_environment("twins", seed=1, network=cluster.network)

        async def greeted(hello: Hello) -> tuple[Connection, Welcome]:
            connection = Connection(await environment.network.dial(listening.address), clock=environment.clock)
            told, _ = await greet(connection, FrameDecoder(), hello, clock=environment.clock, known_boots=KnownBoots())
            return connection, told

        async def answered(connection: Connection) -> list[FrameKind]:
            connection.write(encode_frame(FrameKind.PING, bytes(8)))
            connection.flush()
            return [frame.kind for frame in FrameDecoder().feed(await connection.receive())]

        _, ours = await greeted(Hello(Role.CLIENT))
        hello = Hello(Role.PEER, ours.cluster_id, NodeId(3), NodeId(1), boot=7, start_token=bytes(16))
        old, _ = await greeted(hello)
        assert await answered(old) == [FrameKind.PONG]
        new, _ = await greeted(replace(hello, boot=8))
        assert await answered(old) == [FrameKind.REFUSED]
        assert await answered(new) == [FrameKind.PONG]


@pytest.mark.parametrize("apart", [2, 4])
async def test_trap_24_an_old_copy_is_refused_though_it_was_started_more_often_than_the_original(
    autojump_clock: MockClock, apart: int
) -> None:
    """Cut off, on another machine say, nobody told it so, and its count is the higher one."""
    async with world(3) as cluster, cluster.client("n2", "n3") as kv:
        await cluster.formed(kv)
        await kv.put(b"k", OLD)
        n2, n3 = cluster.nodes["n2"], cluster.nodes["n3"]
        copy = await copied_before(cluster, n3, starts=1)
        cluster.partition(["n1"], ["n2", "n3"])
        await trio.sleep(3)
        await kv.put(b"k", NEW)
        await both_die_and_one_is_put_back(cluster, copy)
        cluster.partition(["n3"], ["n1", "n2"])
        for _ in range(apart):
            await n3.start()
            await trio.sleep(1)
            await n3.kill()
        assert n3.environment.disk.exists("/n3/identity")
        cluster.heal()
        n3.start_soon()
        await reads_nothing_old(cluster)
        n2.start_soon()
        await holds_what_was_acknowledged(cluster)


@pytest.mark.parametrize(("starts", "seconds"), [(1, 5.0), (3, 5.0), (1, 1.5)])
async def test_trap_24_an_old_copy_stays_refused_however_often_it_is_started_and_for_however_short(
    autojump_clock: MockClock, starts: int, seconds: float
) -> None:
    """Each start raises its count, and nobody but the one who refuses it is there: it must not pass for the newest in
    the end, because its operator, or a supervisor, starts it once more."""
    async with world(3) as cluster, cluster.client("n2", "n3") as kv:
        await cluster.formed(kv)
        n2, n3 = await put_back_after_a_write_that_n1_missed(cluster, kv, starts)
        for _ in range(starts + 1):
            n3.start_soon()
            await trio.sleep(seconds)
            if n3.alive:
                await n3.kill()
        n3.start_soon()
        await reads_nothing_old(cluster)
        n2.start_soon()
        await holds_what_was_acknowledged(cluster)


async def test_trap_24_the_start_that_the_group_has_agreed_on_is_not_given_up_because_one_node_heard_a_copy_first(
    autojump_clock: MockClock,
) -> None:
    """The copy's count is the same. Whoever is condemned for the third's word holds what was acknowledged, and no start
    would use its directory any more."""
    async with world(3) as cluster, cluster.client("n2", "n3") as kv:
        await cluster.formed(kv)
        cluster.tolerant = True
        n1, n3 = cluster.nodes["n1"], cluster.nodes["n3"]
        mine = n3.inside.listener._identity
        await n3.kill()
        cluster.partition(["n1"], ["n2", "n3"])
        await n3.start()
        await trio.sleep(3)
        environment = simulated_environment("twins", seed=1, network=cluster.network)
        connection = Connection(await environment.network.dial(n1.address), clock=environment.clock)
        copy = Hello(Role.PEER, mine.cluster_id, NodeId(3), NodeId(1), boot=mine.boot + 1, start_token=bytes(16))
        await greet(connection, FrameDecoder(), copy, clock=environment.clock, known_boots=KnownBoots())
        cluster.heal()
        await trio.sleep(10)
        assert n3.alive, n3.error
        assert n3.inside.pool.connected(NodeId(1))


async def test_trap_24_an_old_copy_that_is_refused_gives_nobody_a_majority_meanwhile(autojump_clock: MockClock) -> None:
    """Until its start is agreed on or it ends: one node has seen the newer start, the other of the copy's majority has
    not, and waits for nothing but the copy's vote."""
    async with world(3) as cluster, cluster.client("n1", "n3") as kv:
        await cluster.formed(kv)
        await kv.put(b"k", OLD)
        n1, n2, n3 = (cluster.nodes[name] for name in ("n1", "n2", "n3"))
        await n2.kill()
        copy = await copied_before(cluster, n3, 1)
        await kv.put(b"k", NEW)
        cluster.tolerant = True
        await n1.kill()
        await n3.kill()
        n3.restore(*copy)
        cluster.partition(["n1"], ["n2"])
        for node in (n1, n2, n3):
            node.start_soon()
        async with cluster.client("n2", "n3") as other:
            for _ in range(16):
                try:
                    entry = await other.get(b"k", timeout=0.5)
                except Unavailable:
                    continue
                assert entry is not None
                assert entry.value == NEW
        cluster.heal()
        await holds_what_was_acknowledged(cluster)


async def test_trap_24_an_old_copy_that_is_told_to_join_itself_does_not_take_its_own_word(
    autojump_clock: MockClock,
) -> None:
    """All nodes may be given one list for --join, in which this one is written otherwise than it advertises itself."""
    async with world(3) as cluster, cluster.client("n2", "n3") as kv:
        await cluster.formed(kv)
        n1, n3 = cluster.nodes["n1"], cluster.nodes["n3"]
        copy = await copied_before(cluster, n3, 1)
        await both_die_and_one_is_put_back(cluster, copy)
        await n1.kill()
        n3.config = replace(n3.config, advertise=f"other:{PORT}", join=(n3.config.listen,))
        n3.start_soon()
        await trio.sleep(5)
        assert n3.alive
        await n1.start()
        await trio.sleep(5)
        assert not n3.alive


async def heard(node: SimulatedNode, copy: Hello) -> None:
    """A node is greeted by a copy, which is ended for good soon after."""
    environment = simulated_environment("twins", seed=1, network=node.cluster.network)
    connection = Connection(await environment.network.dial(node.address), clock=environment.clock)
    await greet(connection, FrameDecoder(), copy, clock=environment.clock, known_boots=KnownBoots())
    await trio.sleep(2)
    await connection.aclose()


@pytest.mark.parametrize("apart", [1, 2])
async def test_trap_24_who_was_refused_for_a_copy_that_was_heard_first_comes_back_once_that_has_ended(
    autojump_clock: MockClock, apart: int
) -> None:
    """docs/admin.md: of what nobody has agreed on, a node believes what it hears first. It says what to do then."""
    async with world(3) as cluster, cluster.client("n1", "n3") as kv:
        await cluster.formed(kv)
        await kv.put(b"k", b"v")
        cluster.tolerant = True
        n1, n2, n3 = (cluster.nodes[name] for name in ("n1", "n2", "n3"))
        mine = n3.inside.listener._identity
        await n2.kill()  # without n3 nobody agrees on anything then
        await n3.kill()
        await heard(
            n1, Hello(Role.PEER, mine.cluster_id, NodeId(3), NodeId(1), mine.boot + apart, start_token=b"c" * 16)
        )
        for _ in range(apart):
            n3.start_soon()
            await trio.sleep(5)
            assert not n3.alive
            n3.environment.disk.unlink("/n3/refused")
        n3.start_soon()
        await trio.sleep(5)
        assert n3.alive


async def test_trap_24_what_the_group_had_agreed_on_is_known_after_a_restart_though_a_newer_start_was_heard_since(
    autojump_clock: MockClock,
) -> None:
    """The copy names the start that n1 heard last as little as the one that was agreed on, but counts further."""
    async with world(3) as cluster, cluster.client("n2", "n3") as kv:
        await cluster.formed(kv)
        await kv.put(b"k", OLD)
        n1, n2, n3 = (cluster.nodes[name] for name in ("n1", "n2", "n3"))
        copy = await copied_before(cluster, n3, starts=1)
        await n3.kill()
        n3.start_soon()
        with trio.fail_after(20):
            while dict(n1.inside.placement._address_book)[NodeId(3)].boot < 3:  # noqa: ASYNC110
                await trio.sleep(0.0005)
        cluster.partition(["n1"], ["n2", "n3"])
        await trio.sleep(5)
        await kv.put(b"k", NEW)
        await n1.kill()
        await both_die_and_one_is_put_back(cluster, copy)
        for _ in range(2):
            await n3.start()
            await trio.sleep(1)
            await n3.kill()
        cluster.heal()
        n1.start_soon()
        await trio.sleep(1)
        n3.start_soon()
        await reads_nothing_old(cluster)
        n2.start_soon()
        await holds_what_was_acknowledged(cluster)


async def n1_is_started_and_n3_is_let_in(cluster: Cluster) -> None:
    """However often n3 is started since."""
    n1, n3 = cluster.nodes["n1"], cluster.nodes["n3"]
    cluster.heal()
    await n1.start()
    for _ in range(2):
        await trio.sleep(30)
        await n3.kill()
        await n3.start()
        await trio.sleep(10)
        assert n3.alive
        assert n3.inside.pool.connected(NodeId(1))


async def test_trap_24_a_copy_that_was_heard_is_held_against_nobody_after_a_restart_of_who_heard_it(
    autojump_clock: MockClock,
) -> None:
    async with world(3) as cluster, cluster.client("n2", "n3") as kv:
        await cluster.formed(kv)
        n1, n3 = cluster.nodes["n1"], cluster.nodes["n3"]
        mine = n3.inside.listener._identity
        await n3.kill()
        cluster.partition(["n1"], ["n2", "n3"])
        await n3.start()
        await trio.sleep(3)
        earlier = (b"d" * 16, mine.start_token, *mine.earlier_tokens)
        await heard(
            n1, Hello(Role.PEER, mine.cluster_id, NodeId(3), NodeId(1), mine.boot + 2, n3.address, b"c" * 16, earlier)
        )
        await n1.kill()
        await n1_is_started_and_n3_is_let_in(cluster)


async def test_trap_24_a_copy_that_was_met_by_join_is_held_against_nobody_after_a_restart_of_who_met_it(
    autojump_clock: MockClock,
) -> None:
    """What it said of its earlier starts is noted, too, so that what the group agreed on tells it apart."""
    async with world(3) as cluster, cluster.client("n2", "n3") as kv:
        await cluster.formed(kv)
        n1, n3 = cluster.nodes["n1"], cluster.nodes["n3"]
        mine = n3.inside.listener._identity
        await n1.kill()
        await n3.kill()
        await n3.start()
        await trio.sleep(3)
        earlier = (b"d" * 16, mine.start_token, *mine.earlier_tokens)
        copy = replace(mine, boot=mine.boot + 2, start_token=b"c" * 16, earlier_tokens=earlier)
        twins = simulated_environment("twins", seed=1, network=cluster.network)

        async def greeted(stream: Stream) -> None:
            connection = Connection(stream, clock=twins.clock)
            await accept(
                connection,
                FrameDecoder(),
                clock=twins.clock,
                identity=copy,
                known_boots=KnownBoots(),
                timestamp=lambda: 0,
                inflight_max=1,
            )
            await connection.aclose()

        cluster.partition(["n1", "twins"], ["n2", "n3"])
        async with trio.open_nursery() as nursery:
            await nursery.start(twins.network.listen, f"twins:{PORT}", greeted)
            before = n1.config
            n1.config = replace(before, bootstrap=False, join=(f"twins:{PORT}",))
            n1.start_soon()
            await trio.sleep(5)
            assert dict(n1.inside.placement._address_book)[NodeId(3)].boot == copy.boot
            nursery.cancel_scope.cancel()
        await n1.kill()
        n1.config = before
        await n1_is_started_and_n3_is_let_in(cluster)
