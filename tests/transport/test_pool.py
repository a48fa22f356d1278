"""Greetings and the peer pool, between simulated nodes in virtual time."""

from dataclasses import replace

import pytest
import trio

from shardkv.environment import Listener, Stream
from shardkv.errors import ProtocolError, ShardKVError, VersionUnsupported, WrongCluster
from shardkv.simulation import (
    Link,
    SimulatedEnvironment,
    SimulatedNetwork,
    simulated_environment,
)
from shardkv.transport import Connection, KnownBoots, NodeIdentity, PeerPool, PoolSettings, Purpose, accept, greet
from shardkv.transport.pool import PINGS_UNANSWERED_MAX
from shardkv.types import NodeId
from shardkv.wire.frames import Frame, FrameDecoder, FrameKind, encode_frame
from shardkv.wire.handshake import Hello, Role, Welcome, decode_refused, encode_hello, encode_refused, encode_welcome
from tests.virtual_time import simulated

CLUSTER, OTHER = b"c" * 16, b"o" * 16
ONE, TWO = NodeId(1), NodeId(2)
HELLO = Hello(Role.PEER, CLUSTER, ONE, TWO, 5)


class Node:
    """A node that greets whoever connects and keeps the frames that it gets."""

    def __init__(self, network: SimulatedNetwork, node_id: int, *, boot: int = 5, cluster: bytes = CLUSTER) -> None:
        self.environment: SimulatedEnvironment = simulated_environment(f"n{node_id}", seed=1, network=network)
        self.address = f"n{node_id}:7000"
        self.identity = NodeIdentity(cluster, NodeId(node_id), boot, self.address)
        self.boots = KnownBoots()
        self.frames: list[tuple[Role, Frame]] = []
        self.refusals: list[ShardKVError] = []
        self.connections: list[Connection] = []
        self.roles: dict[Connection, Role] = {}
        self.events: list[str] = []
        self.reading = True
        self.pool: PeerPool | None = None

    async def serve(self, stream: Stream) -> None:
        connection = Connection(stream, clock=self.environment.clock)
        decoder = FrameDecoder()
        try:
            hello, frames = await accept(
                connection,
                decoder,
                clock=self.environment.clock,
                identity=self.identity,
                known_boots=self.boots,
                timestamp=lambda: 77,
                inflight_max=9,
            )
        except ShardKVError as error:
            self.refusals.append(error)
            raise
        self.connections.append(connection)
        self.roles[connection] = hello.role
        async with trio.open_nursery() as nursery:
            nursery.start_soon(connection.run_writer)
            while True:
                self.frames += [(hello.role, frame) for frame in frames]
                if not self.reading:
                    await trio.sleep_forever()
                data = await connection.receive()
                if not data:
                    break
                frames = decoder.feed(data)
            connection.close_now("the other side has closed")

    async def start(self, nursery: trio.Nursery) -> Listener:
        return await nursery.start(self.environment.network.listen, self.address, self.serve)  # type: ignore[no-any-return]

    async def start_pool(
        self,
        nursery: trio.Nursery,
        *others: "Node",
        told: list[tuple[object, ...]] | None = None,
        **settings: object,
    ) -> PeerPool:
        """``told`` gets what it says of peers that cannot be reached, and are."""
        tell = [] if told is None else told
        self.pool = PeerPool(
            self.environment,
            self.identity,
            self.boots,
            settings=PoolSettings(**settings),  # type: ignore[arg-type]
            on_connected=lambda node_id: self.events.append(f"+{node_id}"),
            on_disconnected=lambda node_id: self.events.append(f"-{node_id}"),
            on_unreachable=lambda *outage: tell.append(outage),
            on_reachable=lambda *node: tell.append(node),
        )
        for other in others:
            self.pool.set_address(other.identity.node_id, other.address)
        await nursery.start(self.pool.run)
        return self.pool

    async def dial(self, other: "Node", hello: Hello) -> object:
        """Greet ``other`` as ``hello``; the welcome."""
        stream = await self.environment.network.dial(other.address)
        connection = Connection(stream, clock=self.environment.clock)
        welcome, _ = await greet(
            connection, FrameDecoder(), hello, clock=self.environment.clock, known_boots=self.boots
        )
        return welcome


def two_nodes(**second: object) -> tuple[Node, Node, SimulatedNetwork]:
    network = SimulatedNetwork(1, link=Link(0.001, 0.002))
    return Node(network, 1), Node(network, 2, **second), network  # type: ignore[arg-type]


async def connected_nodes(nursery: trio.Nursery) -> tuple[Node, Node, SimulatedNetwork, PeerPool]:
    """And the first one's pool, which holds the connections."""
    one, two, network = two_nodes()
    await two.start(nursery)
    pool = await one.start_pool(nursery, two)
    await trio.sleep(1)
    return one, two, network, pool


# Greetings


@simulated
async def test_peers_greet(nursery: trio.Nursery) -> None:
    one, two, _ = two_nodes()
    await two.start(nursery)
    welcome = await one.dial(two, HELLO)
    assert (welcome.cluster_id, welcome.node_id, welcome.boot) == (CLUSTER, TWO, 5)  # type: ignore[attr-defined]
    assert (welcome.timestamp, welcome.inflight_max) == (0, 9), "a node has a clock of its own"  # type: ignore[attr-defined]


@simulated
async def test_a_client_may_know_nothing_yet(nursery: trio.Nursery) -> None:
    one, two, _ = two_nodes()
    await two.start(nursery)
    for hello in (Hello(Role.CLIENT), Hello(Role.CLIENT, CLUSTER)):
        welcome = await one.dial(two, hello)
        assert (welcome.cluster_id, welcome.node_id) == (CLUSTER, TWO)  # type: ignore[attr-defined]
        assert welcome.timestamp == 77, "it needs the time, and a node's"  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("change", "kind", "reason"),
    [
        ({"cluster_id": OTHER}, WrongCluster, "belongs to cluster 6f6f"),
        ({"cluster_id": OTHER, "role": Role.CLIENT}, WrongCluster, "belongs to cluster 6f6f"),
        ({"destination_node_id": NodeId(3)}, WrongCluster, "this is node 2, not 3"),
        ({"node_id": TWO}, WrongCluster, "copied data directory"),
        ({"boot": 4}, WrongCluster, "old copy"),
        ({"protocol_version_min": 8, "protocol_version_max": 9}, VersionUnsupported, "upgrade"),
    ],
)
def test_a_greeting_that_is_not_for_us_is_refused_with_its_reason(
    change: dict[str, object], kind: type[ShardKVError], reason: str
) -> None:
    """Trap 24 among them: a lower boot counter is a restored disk. The reason reaches the other side."""

    @simulated
    async def run(nursery: trio.Nursery) -> None:
        one, two, _ = two_nodes()
        two.boots.observe(ONE, 5, b"")
        await two.start(nursery)
        with pytest.raises(kind, match=reason) as caught:
            await one.dial(two, replace(HELLO, **change))  # type: ignore[arg-type]
        assert type(caught.value) is kind
        assert [type(error) for error in two.refusals] == [kind]

    run()  # type: ignore[operator]


def test_trap_24_a_restored_disk_is_refused_by_whoever_dials_it_too() -> None:
    """A lower boot counter than was seen: the node has forgotten its votes."""

    @simulated
    async def run(nursery: trio.Nursery) -> None:
        one, two, _ = two_nodes()
        await two.start(nursery)
        one.boots.observe(TWO, 6, b"")
        with pytest.raises(WrongCluster, match="old copy"):
            await one.dial(two, HELLO)

    run()  # type: ignore[operator]


def test_trap_24_of_two_starts_of_the_same_count_only_the_one_that_was_seen_is_let_in() -> None:
    """What was learned from others, or from before this node's own restart, never replaces what is newer. Where the
    copy was seen first, the table, which has agreed on one of the two, is right."""
    boots = KnownBoots()
    boots.observe(ONE, 3, b"a" * 16)
    boots.observe(ONE, 3, b"")
    with pytest.raises(WrongCluster, match="knows nothing of"):
        boots.observe(ONE, 3, b"b" * 16)
    boots.observe(ONE, 3, b"a" * 16)
    boots.learn(ONE, 2, b"c" * 16)
    boots.learn(ONE, 3, b"")
    boots.observe(ONE, 3, b"a" * 16)
    boots.learn(ONE, 3, b"b" * 16)
    with pytest.raises(WrongCluster, match="knows nothing of"):
        boots.observe(ONE, 3, b"a" * 16)
    boots.observe(ONE, 3, b"b" * 16)
    boots.learn(ONE, 4, b"d" * 16)
    with pytest.raises(WrongCluster, match="seen with 4"):
        boots.observe(ONE, 3, b"a" * 16)
    with pytest.raises(WrongCluster, match="knows nothing of"):
        boots.observe(ONE, 4, b"a" * 16)
    boots.observe(ONE, 5, b"e" * 16)


def test_trap_24_a_start_that_does_not_come_from_the_one_that_was_seen_is_refused_however_often_it_counted() -> None:
    """The group has agreed on the one that was seen; else it may be the copy that was."""
    a, b, c, d, e, x = (letter.encode() * 16 for letter in "abcdex")
    boots = KnownBoots()
    boots.observe(ONE, 3, a)
    boots.observe(ONE, 5, c, (b, x))
    boots = KnownBoots()
    boots.observe(ONE, 3, a)
    boots.agree(ONE, 3, a)
    with pytest.raises(WrongCluster, match="knows nothing of"):
        boots.observe(ONE, 5, c, (b, x))
    boots.observe(ONE, 5, e, (d, a))
    assert boots.is_newest(ONE, 5, e)
    boots.agree(ONE, 3, a)
    assert boots.is_newest(ONE, 5, e), "the table is behind"
    boots.observe(ONE, 9, x, (c, b))


def test_trap_24_a_table_that_is_behind_does_not_let_in_a_copy_that_a_newer_one_has_ruled_out() -> None:
    t5, t6, t7, c6, c7, c8 = (text.encode() * 8 for text in ("t5", "t6", "t7", "c6", "c7", "c8"))
    boots = KnownBoots()
    boots.observe(ONE, 7, t7, (t6, t5))
    boots.agree(ONE, 7, t7)
    boots.agree(ONE, 5, t5)
    with pytest.raises(WrongCluster, match="knows nothing of"):
        boots.observe(ONE, 8, c8, (c7, c6, t5))


def test_trap_24_a_copy_that_was_heard_first_gives_way_to_the_start_that_the_group_has_agreed_on() -> None:
    """However far it has counted; and whoever has its connection hears no more from it."""
    t7, t8, c8, c9 = (b"t7" * 8, b"t8" * 8, b"c8" * 8, b"c9" * 8)
    boots = KnownBoots()
    boots.observe(ONE, 7, t7)
    boots.observe(ONE, 9, c9, (c8, t7))
    boots.agree(ONE, 8, t8)
    with pytest.raises(WrongCluster, match="knows nothing of"):
        boots.require_newest(ONE, 9, c9, (c8, t7))
    boots.observe(ONE, 8, t8, (t7,))
    boots.observe(ONE, 9, b"t9" * 8, (t8, t7))


@pytest.mark.parametrize(
    ("welcome", "kind", "reason"),
    [
        (Welcome(1, OTHER, TWO, 5, 0, 1), WrongCluster, "belongs to cluster 6f6f"),
        (Welcome(1, CLUSTER, NodeId(3), 5, 0, 1), WrongCluster, "is node 3, not 2"),
        (Welcome(2, CLUSTER, TWO, 5, 0, 1), VersionUnsupported, "was not offered"),
    ],
)
def test_another_node_at_the_address_is_noticed_by_the_dialler(
    welcome: Welcome, kind: type[ShardKVError], reason: str
) -> None:
    """Should the listener not check, the dialler does."""

    @simulated
    async def run(nursery: trio.Nursery) -> None:
        one, two, _ = two_nodes()

        async def welcome_anybody(stream: Stream) -> None:
            await stream.receive(1000)
            await stream.send_all(encode_welcome(welcome))
            await trio.sleep_forever()

        await nursery.start(two.environment.network.listen, two.address, welcome_anybody)
        with pytest.raises(kind, match=reason):
            await one.dial(two, HELLO)

    run()  # type: ignore[operator]


@simulated
async def test_a_listener_that_goes_away_in_the_greeting_is_a_broken_connection(nursery: trio.Nursery) -> None:
    one, two, _ = two_nodes()

    async def leave(stream: Stream) -> None:
        await stream.receive(1000)

    await nursery.start(two.environment.network.listen, two.address, leave)
    with pytest.raises(trio.BrokenResourceError, match="before the greeting was over"):
        await one.dial(two, HELLO)


@simulated
async def test_a_stranger_is_told_and_closed(nursery: trio.Nursery) -> None:
    one, two, _ = two_nodes()
    await two.start(nursery)
    stream = await one.environment.network.dial(two.address)
    await stream.send_all(b"GET / HTTP/1.1\r\n\r\n")
    [frame] = FrameDecoder().feed(await stream.receive(1000))
    error = decode_refused(frame.payload).error
    assert isinstance(error, ProtocolError)
    assert "not a shardkv connection" in str(error)
    assert await stream.receive(1000) == b""


@simulated
async def test_another_first_frame_is_refused(nursery: trio.Nursery) -> None:
    one, two, _ = two_nodes()
    await two.start(nursery)
    stream = await one.environment.network.dial(two.address)
    await stream.send_all(encode_frame(FrameKind.REQUEST, b"x"))
    [frame] = FrameDecoder().feed(await stream.receive(1000))
    assert "must be HELLO, not REQUEST" in str(decode_refused(frame.payload).error)


@simulated
async def test_a_silent_stranger_does_not_hold_its_connection(nursery: trio.Nursery) -> None:
    one, two, _ = two_nodes()
    await two.start(nursery)
    stream = await one.environment.network.dial(two.address)
    start = trio.current_time()
    while await stream.receive(1000):
        pass
    assert trio.current_time() - start == pytest.approx(5, abs=0.1)
    assert "within 5 s" in str(two.refusals[0])


@simulated
async def test_frames_right_behind_the_greeting_are_kept(nursery: trio.Nursery) -> None:
    """A client need not wait for the welcome before its first request."""
    one, two, _ = two_nodes()
    await two.start(nursery)
    stream = await one.environment.network.dial(two.address)
    await stream.send_all(encode_hello(Hello(Role.CLIENT)) + encode_frame(FrameKind.REQUEST, b"early"))
    await trio.sleep(1)
    assert two.frames == [(Role.CLIENT, (FrameKind.REQUEST, b"early"))]


# The pool


@simulated
async def test_frames_go_to_the_peer_by_purpose(nursery: trio.Nursery) -> None:
    one, two, _ = two_nodes()
    await two.start(nursery)
    pool = await one.start_pool(nursery, two)
    assert not pool.send(TWO, Purpose.BULK, b"too early")
    await trio.sleep(1)
    assert one.events == ["+2"]
    assert pool.connected(TWO)
    assert pool.send(TWO, Purpose.BULK, encode_frame(FrameKind.RAFT, b"bulk"))
    assert pool.send(TWO, Purpose.URGENT, encode_frame(FrameKind.RAFT, b"urgent"))
    assert not pool.send(NodeId(9), Purpose.BULK, b"nobody")
    pool.check()
    assert two.frames == []
    pool.flush()
    await trio.sleep(1)
    assert sorted(two.frames) == [
        (Role.PEER, (FrameKind.RAFT, b"bulk")),
        (Role.PEER_URGENT, (FrameKind.RAFT, b"urgent")),
    ]
    assert [(s.purpose, s.connected, s.frames_dropped) for s in pool.statistics()] == [
        (Purpose.BULK, True, 1),
        (Purpose.URGENT, True, 0),
    ]


@simulated
async def test_a_dead_peer_is_doubted_at_once_and_found_again(nursery: trio.Nursery) -> None:
    """Its connections close: no election timeout has to pass (DESIGN 4.11)."""
    one, two, network = two_nodes()
    async with trio.open_nursery() as process:
        await two.start(process)
        pool = await one.start_pool(nursery, two)
        await trio.sleep(1)
        network.kill(two.environment.network)
        await trio.sleep(0.01)
        assert one.events == ["+2", "-2"]
        process.cancel_scope.cancel()
    await trio.sleep(30)
    assert all(s.problem and s.failures > 10 for s in pool.statistics())
    again = Node(network, 2, boot=6)
    await again.start(nursery)
    await trio.sleep(1.6)
    assert one.events == ["+2", "-2", "+2"]
    pool.check()


@simulated
async def test_a_peer_that_cannot_be_reached_is_told_of_once_and_when_it_is_back(nursery: trio.Nursery) -> None:
    """Every dial error was dropped: the loss of a node left no trace."""
    one, two, network = two_nodes()
    told: list[tuple[object, ...]] = []
    async with trio.open_nursery() as process:
        await two.start(process)
        await one.start_pool(nursery, two, told=told)
        await trio.sleep(1)
        network.kill(two.environment.network)
        await trio.sleep(1.5)
        assert told == []
        await trio.sleep(3)
        ((node_id, address, reason),) = told
        assert (node_id, address) == (TWO, two.address)
        assert "nobody listens" in str(reason)
        process.cancel_scope.cancel()
    await trio.sleep(300)
    assert len(told) == 1
    await Node(network, 2, boot=6).start(nursery)
    await trio.sleep(2)
    assert told[1:] == [(TWO,)]


@simulated
async def test_a_peer_that_answers_no_pings_is_doubted_and_told_of_once_and_when_it_is_back(
    nursery: trio.Nursery,
) -> None:
    """A process that is stopped keeps its connections; as by a break of them, others are to campaign."""
    one, two, _ = two_nodes()
    told: list[tuple[object, ...]] = []
    await two.start(nursery)
    pool = await one.start_pool(nursery, two, told=told)
    await trio.sleep(1)

    async def ping(count: int) -> None:
        for _ in range(count):
            pool.ping(TWO, b"")
            await trio.sleep(1)

    await ping(PINGS_UNANSWERED_MAX)
    urgent = next(connection for connection in two.connections if two.roles[connection] is Role.PEER_URGENT)
    urgent.write(encode_frame(FrameKind.PONG))
    urgent.flush()
    await trio.sleep(1)
    await ping(1)
    await trio.sleep(1000)  # as when this node itself was stopped
    await ping(PINGS_UNANSWERED_MAX - 1)
    assert (one.events, told) == (["+2"], [])
    pool.ping(TWO, b"")
    await trio.sleep(0.01)
    assert one.events == ["+2", "-2"]
    ((node_id, address, reason),) = told
    assert (node_id, address) == (TWO, two.address)
    assert "answers nothing" in str(reason)
    await trio.sleep(2)
    assert (one.events, told[1:]) == (["+2", "-2", "+2"], [(TWO,)]), "it is connected to again"
    await ping(PINGS_UNANSWERED_MAX)
    assert one.events == ["+2", "-2", "+2"], "and has as long again"
    pool.check()


@simulated
async def test_attempts_back_off_to_a_bound_with_jitter(nursery: trio.Nursery) -> None:
    one, two, network = two_nodes()
    dials: list[float] = []
    real = network.connect

    async def connect(*arguments: object) -> object:
        dials.append(trio.current_time())
        return await real(*arguments)  # type: ignore[arg-type]

    network.connect = connect  # type: ignore[method-assign, assignment]
    pool = await one.start_pool(nursery, two)
    await trio.sleep(60)
    per_link = len(dials) / 2
    assert 50 <= per_link <= 90, "about one a second"
    count = len(dials)
    await trio.sleep(0.0001)
    pool.retry_now(TWO)
    await trio.sleep(0.0001)
    assert len(dials) == count + 2, "a peer that is known to be alive is dialled at once"


@simulated
async def test_a_peer_that_is_someone_else_is_not_sent_to(nursery: trio.Nursery) -> None:
    one, two, _ = two_nodes(cluster=OTHER)
    await two.start(nursery)
    pool = await one.start_pool(nursery, two)
    await trio.sleep(5)
    assert one.events == []
    assert not pool.send(TWO, Purpose.BULK, b"x")
    assert "belongs to cluster" in pool.statistics()[0].problem


@simulated
async def test_a_peer_that_does_not_read_costs_bounded_memory_and_is_given_up(nursery: trio.Nursery) -> None:
    one, two, _ = two_nodes()
    two.reading = False
    await two.start(nursery)
    pool = await one.start_pool(nursery, two, buffer_bytes_max=1_000_000, stalled_seconds_max=3)
    await trio.sleep(1)
    frame = encode_frame(FrameKind.RAFT, bytes(100_000))
    taken = 0
    for _ in range(50):
        taken += pool.send(TWO, Purpose.BULK, frame)
        pool.flush()
        await trio.sleep(0.01)
    assert taken < 15
    assert pool.statistics()[0].bytes_buffered <= 1_000_000
    assert pool.send(TWO, Purpose.URGENT, encode_frame(FrameKind.RAFT, b"still goes"))
    await trio.sleep(4)
    assert not pool.send(TWO, Purpose.BULK, frame)
    await trio.sleep(0.001)
    assert one.events == ["+2", "-2"]
    assert "has taken nothing" in pool.statistics()[0].problem


@simulated
async def test_a_new_address_is_used_at_once(nursery: trio.Nursery) -> None:
    _, two, network, pool = await connected_nodes(nursery)
    moved = Node(network, 2, boot=6)
    moved.address = "elsewhere:1"
    await moved.start(nursery)
    pool.set_address(TWO, moved.address)
    await trio.sleep(0.2)
    pool.send(TWO, Purpose.BULK, encode_frame(FrameKind.RAFT, b"there"))
    pool.flush()
    await trio.sleep(0.1)
    assert [frame.payload for _, frame in moved.frames] == [b"there"]
    assert b"there" not in [frame.payload for _, frame in two.frames]


@simulated
async def test_a_forgotten_peer_is_left_alone(nursery: trio.Nursery) -> None:
    _, two, _, pool = await connected_nodes(nursery)
    pool.forget(TWO)
    await trio.sleep(1)
    assert all(connection.closed for connection in two.connections)
    assert not pool.send(TWO, Purpose.BULK, b"x")
    assert pool.statistics() == []
    assert {frame.kind for _, frame in two.frames} == {FrameKind.GOODBYE}


@simulated
async def test_a_peer_that_talks_back_on_a_one_way_connection_is_cut(nursery: trio.Nursery) -> None:
    one, two, _, pool = await connected_nodes(nursery)
    two.connections[0].write(encode_frame(FrameKind.PING))
    two.connections[0].flush()
    await trio.sleep(0.1)
    assert one.events == ["+2"]
    assert FrameKind.PONG in [frame.kind for _, frame in two.frames]
    two.connections[0].write(encode_frame(FrameKind.RAFT, b"?"))
    two.connections[0].flush()
    await trio.sleep(0.01)
    assert one.events == ["+2", "-2"]
    assert any("one-way" in s.problem for s in pool.statistics())


@simulated
async def test_why_a_peer_will_not_go_on_is_kept(nursery: trio.Nursery) -> None:
    one, two, _, pool = await connected_nodes(nursery)
    two.connections[0].write(encode_refused(ProtocolError("a node may not say that")))
    two.connections[0].flush()
    await trio.sleep(0.01)
    assert one.events == ["+2", "-2"]
    assert any("refused to go on: a node may not say that" in each.problem for each in pool.statistics())


@simulated
async def test_goodbye_is_the_end_of_a_connection(nursery: trio.Nursery) -> None:
    one, two, _, pool = await connected_nodes(nursery)
    for connection in two.connections:
        connection.write(encode_frame(FrameKind.GOODBYE))
        connection.flush()
    await trio.sleep(0.01)
    assert one.events == ["+2", "-2"]
    assert any("is stopping" in s.problem for s in pool.statistics())


@simulated
async def test_a_pool_survives_a_partition(nursery: trio.Nursery) -> None:
    one, two, network, pool = await connected_nodes(nursery)
    network.partition(["n1"], ["n2"])
    pool.send(TWO, Purpose.BULK, encode_frame(FrameKind.RAFT, b"held up"))
    pool.flush()
    await trio.sleep(60)
    assert two.frames == []
    network.heal()
    await trio.sleep(1)
    assert [frame.payload for _, frame in two.frames] == [b"held up"]
    assert one.events == ["+2"]
