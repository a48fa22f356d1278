"""How many connections a node takes, and from whom: its clients must not keep the other nodes out. And what stays of
those that are over."""

import gc
import struct
from dataclasses import replace
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from shardkv.config import LimitsConfig
from shardkv.errors import Busy
from shardkv.server.answer_budget import AnswerBudget
from shardkv.server.client_connection import ClientConnection
from shardkv.server.listener import CALLS_PER_NODE, Listener
from shardkv.server.peers import SnapshotDialler
from shardkv.simulation.environment import SimulatedEnvironment, simulated_environment
from shardkv.simulation.network import WINDOW_BYTES, NodeNetwork
from shardkv.simulation.node import SimulatedNode
from shardkv.transport.connection import Connection
from shardkv.transport.handshake import KnownBoots, greet
from shardkv.transport.pool import PeerPool
from shardkv.types import NodeId
from shardkv.wire.frames import FRAME_BYTES_MAX, FrameDecoder, FrameKind, encode_frame
from shardkv.wire.handshake import Hello, Role, encode_hello
from tests.server.world import world

CONNECTIONS_MAX = 12
IDLER = Hello(Role.CLIENT)


async def crowd(
    node: SimulatedNode,
    environment: SimulatedEnvironment,
    most: int = CONNECTIONS_MAX,
    hello: Hello = IDLER,
) -> tuple[list[Connection], str]:
    """Connect clients that ask for nothing until the node takes no more; why it takes no more."""
    taken: list[Connection] = []
    while len(taken) <= most:
        connection = Connection(await environment.network.dial(node.address), clock=environment.clock)
        try:
            await greet(connection, FrameDecoder(), hello, clock=environment.clock, known_boots=KnownBoots())
        except Busy as error:
            return taken, str(error)
        taken.append(connection)
    return taken, ""


async def test_clients_that_fill_a_node_do_not_keep_other_nodes_out(autojump_clock: MockClock) -> None:
    """One whose connections were lost, as at a restart, must get back in, or the range loses its quorum to idlers."""
    async with world(3, limits=LimitsConfig(connections_max=CONNECTIONS_MAX)) as cluster:
        crowded, away, _ = cluster.nodes.values()
        await away.kill()
        network = simulated_environment("idlers", seed=1, network=cluster.network)
        idlers, why = await crowd(crowded, network)
        assert idlers
        assert "already; try another" in why
        await away.start()
        with trio.move_on_after(10):
            while not away.inside.pool.connected(NodeId(1)):
                await cluster.sleep(0.1)
        assert away.inside.pool.connected(NodeId(1))
        assert crowded.inside.listener.statistics().clients == CONNECTIONS_MAX


async def test_clients_that_fill_every_node_do_not_keep_a_node_from_asking(autojump_clock: MockClock) -> None:
    """One that is restarted reports that it lives as a client of the others: idlers made it pass for dead, and its
    replicas would have been made anew elsewhere."""
    async with world(3, limits=LimitsConfig(connections_max=CONNECTIONS_MAX)) as cluster:
        *others, away = cluster.nodes.values()
        await away.kill()
        network = simulated_environment("idlers", seed=1, network=cluster.network)
        for node in others:
            idlers, why = await crowd(node, network)
            assert idlers
            assert f"has {CONNECTIONS_MAX} clients already" in why
        await away.start()
        await cluster.sleep(10)
        assert away.inside.placement.reporting.introduced(None), "the group has heard of it since its start"
        assert all(node.inside.listener.statistics().clients == CONNECTIONS_MAX for node in others)


async def test_a_node_has_few_places_for_its_own_calls(autojump_clock: MockClock) -> None:
    """Whoever claims to be one would else get in without end."""
    async with world(1, limits=LimitsConfig(connections_max=CONNECTIONS_MAX)) as cluster:
        (node,) = cluster.nodes.values()
        network = simulated_environment("claimant", seed=1, network=cluster.network)
        for claimed in (7, 8):
            claimants, why = await crowd(node, network, CALLS_PER_NODE, Hello(Role.CLIENT, node_id=NodeId(claimed)))
            assert len(claimants) == CALLS_PER_NODE
            assert f"node {claimed} has {CALLS_PER_NODE} connections for its calls here already" in why
        assert node.inside.listener.statistics().clients == 0
        claimants[0].close_now()
        await cluster.sleep(1)
        claimants, _ = await crowd(node, network, CALLS_PER_NODE, Hello(Role.CLIENT, node_id=NodeId(8)))
        assert len(claimants) == 1


@pytest.mark.parametrize(
    ("room", "nodes", "clients"),
    [(400, 2, 350), (400, 20, 280), (400, 99, 50), (400, 500, 50), (16, 2, 4), (4096, 2, 400)],
)
async def test_where_few_connections_fit_clients_leave_the_room_that_those_of_nodes_take(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch, room: int, nodes: int, clients: int
) -> None:
    """Idlers had used it up, and no other node got in again, nor could be dialled. Each takes three connections each
    way. Something is left for those that are new, and for clients."""
    monkeypatch.setattr(NodeNetwork, "connections_max", lambda self: room)
    async with world(3, limits=LimitsConfig(connections_max=400)) as cluster:
        crowded, *_ = cluster.nodes.values()
        assert crowded.inside.pool.peers == 2
        monkeypatch.setattr(PeerPool, "peers", nodes)
        network = simulated_environment("idlers", seed=1, network=cluster.network)
        idlers, why = await crowd(crowded, network, most=400)
        assert crowded.inside.listener.statistics().clients == clients
        assert len(idlers) <= clients
        assert f"has {clients} clients already; try another" in why


async def test_a_frame_that_begins_behind_the_greeting_has_the_bound_of_clients(autojump_clock: MockClock) -> None:
    """In one packet, when it is not known yet who speaks. Other nodes may send larger ones, but await the welcome."""
    async with world(1) as cluster:
        (node,) = cluster.nodes.values()
        environment = simulated_environment("stranger", seed=1, network=cluster.network)
        stream = await environment.network.dial(node.address)
        stream.send_nowait(encode_hello(Hello(Role.CLIENT)) + struct.pack(">IBB", FRAME_BYTES_MAX + 3, 4, 0))
        received = b""
        with trio.move_on_after(1.0):
            while data := await stream.receive(65536):
                received += data
        assert [frame.kind for frame in FrameDecoder().feed(received)] == [FrameKind.REFUSED]


GREETING = encode_hello(Hello(Role.CLIENT))
REQUEST = encode_frame(FrameKind.REQUEST, b"x" * 100_000)


@pytest.mark.parametrize("lost", [False, True], ids=["closed", "lost"])
@pytest.mark.parametrize(
    "said",
    [b"", GREETING[:9], b"GET / HTTP/1.0\r\n\r\n", GREETING, GREETING + REQUEST[:90_000]],
    ids=["nothing", "half a greeting", "no greeting", "a greeting", "a greeting and most of a frame"],
)
async def test_nothing_stays_of_a_connection_that_is_over(said: bytes, lost: bool, autojump_clock: MockClock) -> None:
    """No reference goes in a circle, so nobody has to look for garbage: clients that break off large frames, one after
    another, would fill the memory before anybody does."""
    async with world(1) as cluster:
        (node,) = cluster.nodes.values()
        environment = simulated_environment("stranger", seed=1, network=cluster.network)
        await cluster.sleep(5.0)
        gc.collect()
        gc.disable()
        try:
            before = _in_memory(), node.inside.listener.statistics()
            stream = await environment.network.dial(node.address)
            stream.send_nowait(said)
            await cluster.sleep(1.0)
            if lost:
                cluster.network.reset(stream)
            stream.close_now()
            await cluster.sleep(1.0)
            assert (_in_memory(), node.inside.listener.statistics()) == before
        finally:
            gc.enable()


async def test_nothing_stays_of_a_connection_that_was_over_before_it_was_served(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It left while the node found out whether it could be admitted, as one does that does not know the time yet."""
    async with world(1) as cluster:
        (node,) = cluster.nodes.values()
        environment = simulated_environment("stranger", seed=1, network=cluster.network)
        await cluster.sleep(5.0)
        admit = Listener._admit

        async def admit_late(self: Listener, hello: Hello) -> None:
            await cluster.sleep(1.0)
            await admit(self, hello)

        monkeypatch.setattr(Listener, "_admit", admit_late)
        gc.collect()
        gc.disable()
        try:
            before = _in_memory(), node.inside.listener.statistics()
            stream = await environment.network.dial(node.address)
            stream.send_nowait(GREETING + REQUEST[:90_000])
            stream.close_now()
            await cluster.sleep(2.0)
            assert (_in_memory(), node.inside.listener.statistics()) == before
        finally:
            gc.enable()


@pytest.mark.parametrize("error", [trio.BrokenResourceError("lost"), Busy("later"), OSError(28, "full")])
async def test_nothing_stays_of_a_snapshot_that_broke_off(error: Exception, autojump_clock: MockClock) -> None:
    """Neither the connection nor, in the frames that the error has passed, what was being sent."""
    async with world(1) as cluster:
        (node,) = cluster.nodes.values()
        environment = simulated_environment("stranger", seed=1, network=cluster.network)
        await cluster.sleep(5.0)
        mine = node.inside.listener._identity
        other = replace(mine, node_id=NodeId(7), start_token=b"t" * 16, earlier_tokens=(), address="stranger:1")
        dialler = SnapshotDialler(environment, other, KnownBoots(), lambda node_id: node.address)
        gc.collect()
        gc.disable()
        try:
            before = _in_memory()
            with pytest.raises(type(error)) as caught:
                async with dialler.dial(mine.node_id):
                    raise error
            assert caught.value is error
            error.__traceback__ = None
            del caught
            await cluster.sleep(1.0)
            assert _in_memory() == before
        finally:
            gc.enable()


@pytest.mark.parametrize("untaken", [0, 8 * WINDOW_BYTES])
async def test_an_answer_that_comes_due_while_its_connection_ends_takes_nobodys_room_for_good(
    untaken: int, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the end of a connection and its close the node may make a turn. What that left untaken stayed counted,
    and after a few such connections nobody was given a large answer any more."""
    forget = AnswerBudget.forget

    def forget_and_answer(self: AnswerBudget, holder: Any) -> None:
        forget(self, holder)
        holder.answer(1, bytes(4 * WINDOW_BYTES))
        listener.flush()
        assert self.untaken_bytes > WINDOW_BYTES

    async with world(1) as cluster:
        (node,) = cluster.nodes.values()
        environment = simulated_environment("stranger", seed=1, network=cluster.network)
        await cluster.sleep(5.0)
        listener = node.inside.listener
        before = listener.statistics()
        stream = await environment.network.dial(node.address)
        stream.send_nowait(GREETING)
        await cluster.sleep(1.0)
        *_, client = listener._clients
        client.answer(1, bytes(untaken))
        client.flush()
        monkeypatch.setattr(AnswerBudget, "forget", forget_and_answer)
        stream.send_nowait(encode_frame(FrameKind.GOODBYE, b""))
        await cluster.sleep(1.0)
        assert listener.statistics() == before
        assert listener._budget.untaken_bytes == 0
        listener._budget.check()


def _in_memory() -> int:
    """How many objects of connections there are; what has come of a frame that is not finished is in its decoder."""
    return sum(isinstance(each, FrameDecoder | Connection | ClientConnection) for each in gc.get_objects())
