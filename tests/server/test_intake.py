"""Turns at sending large frames: a bound over all clients, in order, and not for ever."""

from contextlib import AbstractContextManager
from typing import Any

import pytest
import trio
import trio.testing

from shardkv.errors import ProtocolError
from shardkv.server.intake import ARRIVING_BYTES_MAX, SMALL_FRAME_BYTES, Intake
from shardkv.wire.frames import FrameKind, encode_frame
from shardkv.wire.handshake import Hello, Role, encode_hello
from tests.server.world import world

HALF = ARRIVING_BYTES_MAX // 2


class MockedClock:
    def deadline(self, seconds: float) -> AbstractContextManager[trio.CancelScope]:
        return trio.move_on_after(seconds)


def intake() -> Intake:
    clock: Any = MockedClock()
    return Intake(clock)


async def test_large_frames_wait_for_their_turn_in_the_order_of_asking(autojump_clock: trio.testing.MockClock) -> None:
    """Two halves fit; the third waits, and the small one behind it does not overtake it."""
    turns, order = intake(), []

    async def receive(name: str, size: int, done: trio.Event) -> None:
        async with turns.turn(size):
            order.append(name)
            turns.check()
            await done.wait()

    first, rest = trio.Event(), trio.Event()
    async with trio.open_nursery() as nursery:
        for name, size, done in (("a", HALF, first), ("b", HALF, rest), ("c", HALF, rest), ("d", 1, rest)):
            nursery.start_soon(receive, name, size, done)
            await trio.testing.wait_all_tasks_blocked()
        assert order == ["a", "b"]
        first.set()
        await trio.testing.wait_all_tasks_blocked()
        assert order == ["a", "b", "c"]
        rest.set()
    assert order == ["a", "b", "c", "d"]
    assert turns.arriving_bytes == 0


async def test_who_waits_behind_one_that_gives_up_is_let_in_at_once(autojump_clock: trio.testing.MockClock) -> None:
    turns, order = intake(), []

    async def receive(name: str, size: int, scope: trio.CancelScope) -> None:
        with scope:
            async with turns.turn(size):
                order.append(name)
                await trio.sleep_forever()

    async with trio.open_nursery() as nursery:
        scopes = [trio.CancelScope() for _ in range(3)]
        for name, size, scope in zip("abc", (HALF, ARRIVING_BYTES_MAX, 1), scopes, strict=True):
            nursery.start_soon(receive, name, size, scope)
            await trio.testing.wait_all_tasks_blocked()
        assert order == ["a"], "a small one does not overtake a large one for ever"
        scopes[1].cancel()
        await trio.testing.wait_all_tasks_blocked()
        assert order == ["a", "c"]
        nursery.cancel_scope.cancel()
    turns.check()


async def test_a_frame_larger_than_the_bound_comes_through_alone() -> None:
    turns = intake()
    async with turns.turn(3 * ARRIVING_BYTES_MAX):
        assert turns.arriving_bytes == 3 * ARRIVING_BYTES_MAX
    assert turns.arriving_bytes == 0


async def test_a_frame_that_does_not_arrive_loses_its_turn(autojump_clock: trio.testing.MockClock) -> None:
    """Otherwise those who never finish would keep everybody else out."""
    turns = intake()
    with pytest.raises(ProtocolError, match="longer than"):
        async with turns.turn(HALF):
            await trio.sleep_forever()
    assert turns.arriving_bytes == 0


async def test_who_goes_away_while_waiting_leaves_no_trace(autojump_clock: trio.testing.MockClock) -> None:
    turns = intake()
    async with turns.turn(ARRIVING_BYTES_MAX):
        with trio.move_on_after(1):
            async with turns.turn(HALF):
                raise AssertionError("it had no turn")
        turns.check()
    assert turns.arriving_bytes == 0
    async with turns.turn(HALF):
        pass


async def test_a_turn_that_comes_in_the_moment_in_which_who_waited_goes_away_is_given_back() -> None:
    """Else its room would be lost for good, and in the end nobody could send a large frame."""
    turns, scope = intake(), trio.CancelScope()

    async def go_away() -> None:
        with scope:
            async with turns.turn(HALF):
                raise AssertionError("it was cancelled before")

    async with trio.open_nursery() as nursery:
        async with turns.turn(ARRIVING_BYTES_MAX):
            nursery.start_soon(go_away)
            await trio.testing.wait_all_tasks_blocked()
            scope.cancel()
        assert turns.arriving_bytes == HALF, "the turn was given"
        await trio.testing.wait_all_tasks_blocked()
    assert turns.arriving_bytes == 0


@pytest.mark.parametrize("trickles", [False, True])
async def test_clients_that_are_cut_off_amid_a_large_frame_hold_up_nobody_else(
    autojump_clock: trio.testing.MockClock, trickles: bool
) -> None:
    """docs/admin.md, of clients that are slow or dead. Four of the library's largest frames take all turns; others give
    a silent node up after 1.5 s."""
    frame = encode_frame(FrameKind.REQUEST, bytes(ARRIVING_BYTES_MAX // 4))
    async with world(1) as cluster, cluster.client() as kv, trio.open_nursery() as nursery:
        await kv.put(b"k", b"v")
        node = cluster.nodes["n1"]

        async def cut_off(number: int) -> None:
            stream = await cluster.network.node(f"dead{number}").dial(node.address)
            await stream.send_all(encode_hello(Hello(Role.CLIENT)) + frame[: 2 * SMALL_FRAME_BYTES])
            try:
                while trickles:
                    await trio.sleep(0.1)
                    await stream.send_all(b"x")
            except trio.BrokenResourceError:
                return

        for number in range(4):
            nursery.start_soon(cut_off, number)
        await trio.sleep(1)
        started = trio.current_time()
        await kv.put(b"k", bytes(2 * SMALL_FRAME_BYTES))
        assert trio.current_time() - started < 3
        nursery.cancel_scope.cancel()
