"""Wall clocks that are wrong: which time a node goes by, and what becomes of its ranges (DESIGN 4.4; trap 23)."""

from dataclasses import dataclass
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from shardkv.errors import ProtocolError
from shardkv.machine.clock import HybridClock
from shardkv.server.clock_health import ASK_SECONDS, COMPARE_SECONDS, FRESH_SECONDS, ClockHealth
from shardkv.simulation.clock import SimulationClock
from shardkv.types import NodeId, timestamp_at, timestamp_ms
from shardkv.wire.clock_reading import decode_answer, encode_answer, encode_question
from shardkv.wire.requests import Method
from tests.server.world import world

HOUR_MS = 3_600_000
BOUND_MS = 500


class Log:
    def __init__(self) -> None:
        self.said: list[str] = []

    def warning(self, text: str, **values: Any) -> None:
        self.said.append(text.partition(":")[0])

    info = warning


@dataclass
class Hands:
    wall: int = 1_000_000_000
    running: int = 5_000

    def wall_ms(self) -> int:
        return self.wall

    def monotonic_ns(self) -> int:
        return self.running * 1_000_000

    def go_on(self, seconds: float) -> None:
        self.wall += int(seconds * 1000)
        self.running += int(seconds * 1000)


class World:
    """One node's judgement, and others that answer what the test says."""

    def __init__(self) -> None:
        hands: Any = Hands()
        self.hands = hands
        self.log = Log()
        self.clock = HybridClock(hands, BOUND_MS)
        self.health = ClockHealth(hands, self.clock, BOUND_MS, lambda node_id, question: None, self.log)

    def answer(self, node_id: int, ms: int, *, travelled_seconds: float = 0.0, guessed: bool = False) -> None:
        question = encode_question(self.hands.monotonic_ns())
        self.hands.go_on(travelled_seconds)
        self.health.answered(NodeId(node_id), encode_answer(question, ms, guessed=guessed))

    def ask(self, other: "World", *, there_ms: int, back_ms: int) -> None:
        """Ask another node, on a way that is slower in one direction."""
        question = encode_question(self.hands.monotonic_ns())
        for node in (self, other):
            node.hands.go_on(there_ms / 1000)
        answer = other.health.answer(question)
        for node in (self, other):
            node.hands.go_on(back_ms / 1000)
        self.health.answered(NodeId(2), answer)

    def off_ms(self) -> int:
        """How far the node's time is ahead of the wall clock after a judgement."""
        self.health.judge()
        self.health.check()
        return self.clock.ms() - self.hands.wall


# The judgement.


@pytest.mark.parametrize("step_ms", [-BOUND_MS, -1, 1, BOUND_MS])
def test_a_wall_clock_that_is_corrected_a_little_is_followed(step_ms: int) -> None:
    alone = World()
    alone.hands.wall += step_ms
    assert alone.off_ms() == 0
    assert not alone.log.said


@pytest.mark.parametrize("jump_ms", [-HOUR_MS, -BOUND_MS - 1, BOUND_MS + 1, HOUR_MS])
def test_trap_23_a_jump_of_the_wall_clock_is_not_followed_until_others_say_the_same(jump_ms: int) -> None:
    """TRAPS 23. A machine that was paused is told the date anew: then all the others have it, too."""
    one = World()
    one.hands.wall += jump_ms
    assert one.off_ms() == -jump_ms
    assert one.off_ms() == -jump_ms
    assert one.log.said == ["the wall clock is off and is not followed"], "said once"
    for node_id in (2, 3):
        one.answer(node_id, one.hands.wall)
    assert one.off_ms() == 0
    assert one.log.said[1:] == ["the wall clock is followed again"]


def test_a_node_that_starts_with_a_wrong_clock_takes_the_time_of_the_others() -> None:
    one = World()
    right = one.hands.wall - HOUR_MS
    one.answer(2, right + 10)
    one.answer(3, right)
    one.health.judge()
    assert one.clock.ms() in (right, right + 10)
    assert one.log.said == ["the wall clock is off and is not followed"]


def test_of_two_times_that_are_given_out_the_earlier_one_catches_up() -> None:
    """The other cannot be taken back: a node that was paused would make every command of its peer's clients too old."""
    ahead, behind = World(), World()
    ahead.answer(2, ahead.hands.wall - HOUR_MS)
    assert ahead.off_ms() == 0
    behind.answer(2, behind.hands.wall + HOUR_MS)
    assert behind.off_ms() == HOUR_MS


def test_of_two_guesses_the_later_one_is_doubted() -> None:
    for others_ms, taken_ms in ((-HOUR_MS, -HOUR_MS), (HOUR_MS, 0)):
        one = World()
        one.health.begin([NodeId(2)])
        one.answer(2, one.hands.wall + others_ms, guessed=True)
        assert one.off_ms() == taken_ms


def test_nodes_that_start_with_wrong_clocks_move_none_whose_time_was_confirmed() -> None:
    """However many they are: two of three are restarted on machines with a wrong date."""
    for wrong_ms in (-HOUR_MS, HOUR_MS):
        one = World()
        one.answer(2, one.hands.wall + wrong_ms, guessed=True)
        one.answer(3, one.hands.wall + 2 * wrong_ms, guessed=True)
        assert one.off_ms() == 0
        starting = World()
        starting.health.begin([NodeId(2), NodeId(3)])
        right = starting.hands.wall - wrong_ms
        starting.answer(3, starting.hands.wall + wrong_ms, guessed=True)
        starting.answer(2, right)
        starting.health.judge()
        assert starting.clock.ms() == right


@pytest.mark.parametrize(("there_ms", "back_ms"), [(0, 200), (200, 0)])
def test_nodes_whose_wall_clocks_are_not_followed_run_neither_slow_nor_fast(there_ms: int, back_ms: int) -> None:
    """A way that is slower in one direction makes the other's time look earlier or later than it is, each time."""
    one, two = World(), World()
    for node in (one, two):
        node.hands.wall -= HOUR_MS
    before = one.clock.ms() - one.hands.running
    for _ in range(60):
        one.ask(two, there_ms=there_ms, back_ms=back_ms)
        two.ask(one, there_ms=there_ms, back_ms=back_ms)
        one.health.judge()
        two.health.judge()
    for node in (one, two):
        assert abs(node.clock.ms() - node.hands.running - before) <= BOUND_MS


def test_a_wall_clock_at_the_bound_is_not_followed_and_left_by_turns() -> None:
    """Each time the node's time would step, and a line be logged."""
    one = World()
    for step in range(20):
        for node_id in (2, 3):
            one.answer(node_id, one.hands.wall - BOUND_MS + step % 2 * 2 - 1)
        one.health.judge()
    assert one.log.said == ["the wall clock is off and is not followed"]
    for node_id in (2, 3):
        one.answer(node_id, one.hands.wall)
    assert one.off_ms() == 0


@pytest.mark.parametrize("ms", [-1, -(1 << 63), 1 << 46, (1 << 63) - 1])
def test_a_time_that_no_stamp_can_hold_is_not_followed(ms: int) -> None:
    one = World()
    one.health.begin([NodeId(2)])
    one.answer(2, ms)
    assert one.clock.held


def test_stamps_are_held_back_no_longer_once_others_confirm_them_although_the_wall_clock_is_late() -> None:
    """What ranges here have applied agrees with them: there is nothing to wait for."""
    one = World()
    now_ms = one.hands.wall
    one.clock.absorb(timestamp_at(now_ms))
    one.clock.hold()
    one.hands.wall -= 3_600_000
    for node_id in (2, 3):
        one.answer(node_id, now_ms + 100)
    one.health.judge()
    assert not one.clock.held
    assert abs(one.clock.ms() - now_ms) <= 100


def test_one_clock_of_three_that_is_wrong_moves_nobody() -> None:
    for wrong_ms in (-HOUR_MS, HOUR_MS):
        one = World()
        one.answer(2, one.hands.wall)
        one.answer(3, one.hands.wall + wrong_ms)
        assert one.off_ms() == 0
        assert not one.log.said


def test_an_answer_counts_by_half_its_way_and_not_at_all_when_it_was_long_under_way() -> None:
    one = World()
    one.hands.wall += HOUR_MS
    one.answer(2, one.clock.ms() + 2_000, travelled_seconds=0.4)
    one.answer(3, one.clock.ms() + 2_000, travelled_seconds=0.4)
    one.health.judge()
    # Each was 2 s ahead of when it was asked, of which the answer was under way for 0.4 s.
    assert one.clock.ms() == 1_000_000_000 + 800 + 1_800
    late = World()
    late.answer(2, late.hands.wall + HOUR_MS, travelled_seconds=0.6)
    assert late.off_ms() == 0


def test_an_old_answer_is_forgotten() -> None:
    one = World()
    one.answer(2, one.hands.wall)
    one.answer(3, one.hands.wall)
    assert one.health.statistics().peers == 2
    one.hands.go_on(FRESH_SECONDS)
    assert one.off_ms() == 0
    assert one.health.statistics().peers == 2
    one.hands.go_on(0.001)
    assert one.off_ms() == 0
    assert one.health.statistics().peers == 0


@pytest.mark.parametrize("payload", [b"", b"1234567", b"123456789", bytes(16), bytes(18)])
def test_what_is_no_question_and_no_answer_about_the_time_is_refused(payload: bytes) -> None:
    with pytest.raises(ProtocolError):
        encode_answer(payload, 1)
    with pytest.raises(ProtocolError):
        decode_answer(payload)


# Nodes.


@pytest.mark.parametrize("jump_ms", [-HOUR_MS, HOUR_MS])
async def test_trap_23_a_leaders_clock_that_jumps_for_a_moment_leaves_its_ranges_writable(
    autojump_clock: MockClock, jump_ms: int
) -> None:
    """TRAPS 23: one write stamped an hour ahead, and every write of the next hour would be too old."""
    async with world(3) as cluster, cluster.client() as kv:
        await cluster.formed(kv)
        leader = await cluster.leader_of(kv, b"k")
        leader.environment.clock.wall_offset_ms += jump_ms
        first = await kv.put(b"k", b"1")
        await trio.sleep(3 * ASK_SECONDS)
        second = await kv.put(b"k", b"2")
        leader.environment.clock.wall_offset_ms -= jump_ms
        await leader.kill()
        third = await kv.put(b"k", b"3")
        assert first < second < third
        assert timestamp_ms(third) - timestamp_ms(first) < 60_000
        async with cluster.client() as other:
            assert await other.increment(b"n") == 1


async def test_trap_23_a_node_that_starts_an_hour_ahead_carries_nobody_with_it(autojump_clock: MockClock) -> None:
    """Neither the clients that it tells the time, nor the ranges that it comes to lead."""
    async with world(3) as cluster, cluster.client() as kv:
        await cluster.formed(kv)
        node = await cluster.leader_of(kv, b"k")
        before = await kv.put(b"k", b"1")
        await node.kill()
        node.environment.clock.wall_offset_ms += HOUR_MS
        await node.start()
        async with cluster.client(node.name) as other:
            await other.put(b"k", b"2")
            for to in cluster.nodes.values():
                await cluster.ask(other, Method.TRANSFER, 1, to.inside.catalog.node_id, range_id=1)
                after = await other.put(b"k", b"3")
                assert timestamp_ms(after) - timestamp_ms(before) < 60_000


@pytest.mark.parametrize("nodes", [2, 3])
async def test_a_machine_that_was_paused_finds_the_time_again(autojump_clock: MockClock, nodes: int) -> None:
    """Its clocks stood still, its peers' did not; nor are those set back, by whose time commands are issued."""
    async with world(3) as cluster, cluster.client() as kv:
        await cluster.formed(kv)
        leader = await cluster.leader_of(kv, b"k")
        paused, third = [node for node in cluster.nodes.values() if node is not leader]
        if nodes == 2:
            await third.kill()
        await trio.sleep(120)
        await kv.get(b"k")
        assert paused.inside.hybrid_clock.follow(paused.inside.hybrid_clock.ms() - 60_000)
        await trio.sleep(30)
        assert abs(paused.inside.hybrid_clock.ms() - leader.inside.hybrid_clock.ms()) < BOUND_MS
        await kv.put(b"k", b"1")


async def test_clocks_that_are_corrected_all_at_once_are_followed_when_all_nodes_start_together(
    autojump_clock: MockClock,
) -> None:
    """As docs/admin.md says: until then nothing is wrong but what versions look like as dates."""
    async with world(3) as cluster, cluster.client() as kv:
        await cluster.formed(kv)
        before = await kv.put(b"k", b"1")
        for node in cluster.nodes.values():
            node.environment.clock.wall_offset_ms += HOUR_MS
        await trio.sleep(3 * ASK_SECONDS)
        for node in cluster.nodes.values():
            await node.shut_down()
            await node.start()
        after = await kv.put(b"k", b"2")
        assert timestamp_ms(after) - timestamp_ms(before) < 60_000
        for node in cluster.nodes.values():
            await node.shut_down()
        for node in cluster.nodes.values():
            await node.start()
        async with cluster.client() as other:
            followed = await other.put(b"k", b"3")
            assert HOUR_MS <= timestamp_ms(followed) - timestamp_ms(before) < HOUR_MS + 60_000
        assert await kv.put(b"k", b"4") > followed


async def test_a_node_whose_peers_leave_the_cluster_before_they_answer_goes_by_its_wall_clock(
    autojump_clock: MockClock,
) -> None:
    hands = SimulationClock()
    clock = HybridClock(hands, BOUND_MS)
    health = ClockHealth(hands, clock, BOUND_MS, lambda node_id, question: None, Log())
    peers = [NodeId(2)]
    async with trio.open_nursery() as nursery:
        await nursery.start(health.run, lambda: list(peers))
        await trio.sleep(3 * ASK_SECONDS)
        assert clock.held
        peers.clear()
        await trio.sleep(3 * ASK_SECONDS)
        assert not clock.held
        assert clock.ms() == hands.wall_ms()
        nursery.cancel_scope.cancel()


async def test_a_node_alone_whose_clock_was_ahead_takes_writes_after_it_was_corrected(
    autojump_clock: MockClock,
) -> None:
    """A machine that starts with local time for the date: the first data are hours ahead, until it is corrected."""
    async with world(1) as cluster, cluster.client() as kv:
        node = cluster.nodes["n1"]
        await node.shut_down()
        node.environment.clock.wall_offset_ms += HOUR_MS
        await node.start()
        first = await kv.put(b"k", b"1")
        node.environment.clock.wall_offset_ms -= HOUR_MS
        await trio.sleep(3 * ASK_SECONDS)
        second = await kv.put(b"k", b"2")
        await node.shut_down()
        await node.start()
        async with cluster.client() as other:
            third = await other.put(b"k", b"3")
        assert first < second < third


async def test_trap_23_a_node_that_starts_alone_an_hour_ahead_tells_its_clients_no_time_of_its_own(
    autojump_clock: MockClock,
) -> None:
    """TRAPS 23. Clients are told something within a second, for a node alone can say how the cluster is; but not a
    time that every other node would refuse for an hour, nor one that is too old once there are others again."""
    async with world(3) as cluster, cluster.client() as kv:
        await cluster.formed(kv)
        before = await kv.put(b"k", b"1")
        for node in cluster.nodes.values():
            await node.shut_down()
        await trio.sleep(600)
        alone = cluster.nodes["n1"]
        alone.environment.clock.wall_offset_ms += HOUR_MS
        await alone.start()
        assert not alone.inside.clock_health._settled.is_set()
        with trio.fail_after(2 * COMPARE_SECONDS):
            await alone.inside.clock_health.settled()
        async with cluster.client() as other:
            await other.nodes()
            assert timestamp_ms(alone.inside.hybrid_clock.last) - timestamp_ms(before) < 60_000
            for name in ("n2", "n3"):
                await cluster.nodes[name].start()
            after = await other.put(b"k", b"2")
            assert 600_000 <= timestamp_ms(after) - timestamp_ms(before) < 660_000
