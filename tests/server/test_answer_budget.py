"""What all clients together leave untaken: a bound, an order of waiting, and who is dropped."""

from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager
from typing import Any

import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from shardkv.errors import Busy
from shardkv.machine.clock import HybridClock
from shardkv.server.answer_budget import (
    ANSWER_BYTES_MAX,
    DROP_BYTES_MIN,
    PROVEN_BYTES,
    RESERVE_BYTES,
    SHARE_BYTES,
    SMALL_ANSWER_BYTES,
    STALLED_SECONDS_MIN,
    UNREAD_BYTES_CROWDED,
    UNREAD_BYTES_MAX,
    WAIT_SECONDS_MAX,
    AnswerBudget,
)
from shardkv.server.client_connection import FRAME_BYTES, ClientConnection
from shardkv.server.intake import Intake
from shardkv.server.requests import GET_BYTES_MAX, NoRoom
from shardkv.simulation.network import WINDOW_BYTES, SimulatedNetwork
from shardkv.transport.connection import Connection
from shardkv.types import VALUE_BYTES_MAX
from shardkv.wire import requests
from shardkv.wire.frames import FrameDecoder, FrameKind, encode_frame
from shardkv.wire.requests import (
    GET_KEYS_MAX,
    SCAN_PAGE_BYTES_MAX,
    SCAN_PAGE_ENTRIES_MAX,
    Request,
    Response,
)

MIB = 1024 * 1024
CLIENTS = 30
ENVELOPE_BYTES_MAX = 32
"""What an answer is apart from its result: its request, its outcome, the time."""


class VirtualClock:
    def monotonic_ns(self) -> int:
        return int(trio.current_time() * 1e9)

    def wall_ms(self) -> int:
        return 1_700_000_000_000

    async def sleep(self, seconds: float) -> None:
        await trio.sleep(seconds)

    def deadline(self, seconds: float) -> AbstractContextManager[trio.CancelScope]:
        return trio.move_on_after(seconds)


class Holder:
    def __init__(self, budget: AnswerBudget, *, proven: bool = False, stalled_seconds: float = 0.0) -> None:
        self.budget = budget
        self.proven = proven
        self.stalled_seconds = stalled_seconds
        self.dropped = False

    def give_up(self) -> None:
        self.dropped = True
        self.budget.count(self, 0)


@contextmanager
def a_budget() -> Iterator[AnswerBudget]:
    budget = AnswerBudget(VirtualClock())
    yield budget
    budget.check()


async def test_what_is_taken_makes_room_for_those_who_wait_in_their_order(autojump_clock: MockClock) -> None:
    with a_budget() as budget:
        reader, order = Holder(budget), []
        budget.count(reader, ANSWER_BYTES_MAX)

        async def wait(name: str, size: int) -> None:
            holder = Holder(budget)
            assert await budget.wait(holder, size)
            order.append(name)
            budget.count(holder, size)

        async with trio.open_nursery() as nursery:
            for name, size in (("a", 3 * MIB), ("b", 3 * MIB), ("c", MIB)):
                nursery.start_soon(wait, name, size)
                await wait_all_tasks_blocked()
            assert not order
            budget.count(reader, ANSWER_BYTES_MAX - 2 * MIB)
            await wait_all_tasks_blocked()
            assert not order, "the third would fit, but nobody overtakes"
            assert not budget.fits(Holder(budget), MIB)
            budget.count(reader, ANSWER_BYTES_MAX - 3 * MIB)
            await wait_all_tasks_blocked()
            assert order == ["a"]
            budget.check()
            budget.count(reader, ANSWER_BYTES_MAX - 6 * MIB)
            await wait_all_tasks_blocked()
            assert order == ["a", "b"]
            budget.count(reader, 0)
        assert order == ["a", "b", "c"]
        assert budget.untaken_bytes == 7 * MIB


async def test_room_that_was_given_but_not_used_yet_is_given_to_nobody_else(autojump_clock: MockClock) -> None:
    with a_budget() as budget:
        reader = Holder(budget)
        budget.count(reader, ANSWER_BYTES_MAX)
        granted: list[bool] = []

        async def wait() -> None:
            granted.append(await budget.wait(Holder(budget), 4 * MIB))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait)
            await wait_all_tasks_blocked()
            budget.count(reader, ANSWER_BYTES_MAX - 4 * MIB)
            assert budget.full
            assert not budget.fits(Holder(budget), MIB)
        assert granted == [True]
        assert budget.fits(Holder(budget), 4 * MIB)


async def test_who_waits_for_room_too_long_is_told_so_and_those_behind_it_may_fit(autojump_clock: MockClock) -> None:
    with a_budget() as budget:
        budget.count(Holder(budget), ANSWER_BYTES_MAX - MIB)
        found: dict[str, bool] = {}

        async def wait(name: str, size: int) -> None:
            found[name] = await budget.wait(Holder(budget), size)

        started = trio.current_time()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait, "large", 4 * MIB)
            await trio.sleep(0.5)
            nursery.start_soon(wait, "behind", MIB)
        assert found == {"large": False, "behind": True}
        assert trio.current_time() - started <= WAIT_SECONDS_MAX + 0.1


async def test_a_cancelled_wait_leaves_nothing_behind(autojump_clock: MockClock) -> None:
    with a_budget() as budget:
        reader = Holder(budget)
        budget.count(reader, ANSWER_BYTES_MAX)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(budget.wait, Holder(budget), MIB)
            await wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(budget.wait, Holder(budget), MIB)
            await wait_all_tasks_blocked()
            budget.count(reader, 0)
            nursery.cancel_scope.cancel()
        assert budget.fits(Holder(budget), ANSWER_BYTES_MAX)


async def test_a_client_known_to_read_has_room_that_others_have_not(autojump_clock: MockClock) -> None:
    with a_budget() as budget:
        budget.count(Holder(budget), ANSWER_BYTES_MAX)
        reader = Holder(budget, proven=True)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(budget.wait, Holder(budget), MIB)
            await wait_all_tasks_blocked()
            assert budget.fits(reader, RESERVE_BYTES)
            assert not budget.fits(reader, RESERVE_BYTES + 1)
            assert await budget.wait(reader, RESERVE_BYTES), "past those who wait without being known"
            nursery.cancel_scope.cancel()


async def test_those_who_stand_still_longest_are_dropped_until_what_is_left_is_little(
    autojump_clock: MockClock,
) -> None:
    with a_budget() as budget:
        await trio.sleep(1)
        holders = [Holder(budget, stalled_seconds=seconds) for seconds in (0.7, 0.9, 0.1, 0.8)]
        for holder in holders:
            budget.count(holder, DROP_BYTES_MIN // 3)
        assert [holder.dropped for holder in holders] == [False, True, False, False]
        assert budget.untaken_bytes <= DROP_BYTES_MIN


async def test_while_somebody_waits_for_room_who_stands_still_is_dropped(autojump_clock: MockClock) -> None:
    """The bound on what is left untaken is not reached, but the answer that waits does not fit."""
    with a_budget() as budget:
        await trio.sleep(1)
        still, slow = Holder(budget, stalled_seconds=0.2), Holder(budget)
        budget.count(still, DROP_BYTES_MIN // 2)
        budget.count(slow, DROP_BYTES_MIN // 2)
        assert not budget.fits(Holder(budget), 5 * MIB)

        async def stand() -> None:
            await trio.sleep(0.4)
            assert not still.dropped
            still.stalled_seconds = STALLED_SECONDS_MIN

        async with trio.open_nursery() as nursery:
            nursery.start_soon(stand)
            assert await budget.wait(Holder(budget), 5 * MIB)
        assert still.dropped
        assert not slow.dropped


def test_the_largest_answer_of_all_fits() -> None:
    """Otherwise its request would be told Busy for ever."""
    assert GET_BYTES_MAX + GET_KEYS_MAX * 32 <= ANSWER_BYTES_MAX
    assert SCAN_PAGE_BYTES_MAX + VALUE_BYTES_MAX + SCAN_PAGE_ENTRIES_MAX * 32 <= ANSWER_BYTES_MAX


async def test_when_half_the_room_is_taken_each_client_may_leave_less(autojump_clock: MockClock) -> None:
    with a_budget() as budget:
        holder = Holder(budget)
        assert budget.unread_bytes_max == UNREAD_BYTES_MAX
        budget.count(holder, ANSWER_BYTES_MAX // 2)
        assert budget.unread_bytes_max == budget.share_bytes == UNREAD_BYTES_CROWDED
        budget.forget(holder)
        assert budget.unread_bytes_max == UNREAD_BYTES_MAX
        assert budget.share_bytes > UNREAD_BYTES_MAX


# Many connections together


class Node:
    """As much of a node as its clients' connections need. What a request asks for is its first argument, in bytes."""

    def __init__(self) -> None:
        self.clock = VirtualClock()
        self.budget = AnswerBudget(self.clock)
        self.intake = Intake(self.clock)
        self.dirty: dict[ClientConnection, None] = {}
        self.connections: list[Connection] = []
        self.clients: list[ClientConnection] = []
        self.confirming: list[tuple[ClientConnection, Request]] = []
        self.done = 0
        """Reads that were carried out."""
        self.held_bytes_max = 0

    async def serve(self, stream: Any) -> None:
        connection = Connection(stream, clock=self.clock)
        client = ClientConnection(
            connection,
            hybrid_clock=HybridClock(self.clock),
            dispatch=self.dispatch,
            dirty=self.dirty,
            inflight_max=4096,
            intake=self.intake,
            budget=self.budget,
            clock=self.clock,
        )
        self.connections.append(connection)
        self.clients.append(client)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(connection.run_writer)
                await client.serve(FrameDecoder(), [])
                nursery.cancel_scope.cancel()
        except* (trio.BrokenResourceError, trio.ClosedResourceError):
            pass
        finally:
            connection.close_now()
            self.budget.forget(client)

    def dispatch(self, client: ClientConnection, request: Request) -> None:
        answer_bytes, waits, *_ = request.arguments
        if waits:
            self.confirming.append((client, request))
            return
        self.done += 1
        lacking = client.offer(request.id, bytes(answer_bytes))
        if lacking:
            raise NoRoom(lacking)
        self.look()

    def confirm(self) -> None:
        """Every read that waited for a confirmation comes due in one turn."""
        due, self.confirming = self.confirming, []
        for client, request in due:
            if client.crowded:
                client.later.refuse(request.id, Busy("crowded"))
                continue
            self.done += 1
            client.later.answer(request.id, bytes(request.arguments[0]))
            self.look()
        self.turn()

    def turn(self) -> None:
        dirty = list(self.dirty)
        self.dirty.clear()
        for client in dirty:
            client.flush()
        self.look()

    def look(self) -> None:
        held = sum(connection.buffered for connection in self.connections)
        held += sum(client._answers_bytes for client in self.clients)
        self.held_bytes_max = max(self.held_bytes_max, held)
        self.budget.check()
        for client in self.clients:
            client.check()

    async def turns(self) -> None:
        while True:
            await trio.sleep(0.001)
            self.turn()


class Peer:
    def __init__(self, stream: Any) -> None:
        self.stream = stream
        self._decoder = FrameDecoder()

    async def ask(self, count: int, answer_bytes: int, *, waits: bool = False) -> None:
        parts = [requests.encode_request(each, 1, 1, 1, 0, answer_bytes, waits) for each in range(count)]
        await self.stream.send_all(encode_frame(FrameKind.REQUEST, requests.join(parts)))

    async def answers(self, count: int) -> list[Response]:
        found: list[Response] = []
        while len(found) < count:
            data = await self.stream.receive(1 << 20)
            assert data, f"closed after {len(found)} answers"
            for frame in self._decoder.feed(data):
                found += requests.decode_responses(frame.payload)
        return found


@asynccontextmanager
async def node() -> AsyncIterator[tuple[Node, list[Peer]]]:
    network, served = SimulatedNetwork(1), Node()
    with trio.fail_after(60):  # of virtual time
        async with trio.open_nursery() as nursery:

            async def handler(stream: Any) -> None:
                await served.serve(stream)

            await nursery.start(network.node("server").listen, "server:1", handler)
            nursery.start_soon(served.turns)
            peers = [Peer(await network.node("client").dial("server:1")) for _ in range(CLIENTS)]
            await trio.sleep(0.01)
            yield served, peers
            nursery.cancel_scope.cancel()


BOUND = ANSWER_BYTES_MAX + CLIENTS * (UNREAD_BYTES_CROWDED + FRAME_BYTES + SMALL_ANSWER_BYTES)


async def test_large_answers_that_nobody_reads_stay_within_one_bound_for_all(autojump_clock: MockClock) -> None:
    """A hundred clients that ask for large values and never read must not fill the memory."""
    async with node() as (served, peers):
        async with trio.open_nursery() as nursery:
            for peer in peers:
                nursery.start_soon(peer.ask, 10, MIB)
        await trio.sleep(0.4)
        assert served.held_bytes_max <= BOUND
        assert served.budget.untaken_bytes > ANSWER_BYTES_MAX - 2 * MIB, "as much as is allowed is made"


async def test_reads_that_come_due_together_stay_within_the_bound_too(autojump_clock: MockClock) -> None:
    """Those that waited for one confirmation are served in one turn: 300 MiB, if nobody looked."""
    async with node() as (served, peers):
        for peer in peers:
            await peer.ask(160, 64 * 1024, waits=True)
        await trio.sleep(0.1)
        assert len(served.confirming) == 160 * CLIENTS
        served.confirm()
        assert served.held_bytes_max <= BOUND
        assert served.done <= ANSWER_BYTES_MAX // (64 * 1024) + CLIENTS, "the others are refused without being done"


async def test_reads_that_come_due_without_room_are_done_once_and_not_160_times(autojump_clock: MockClock) -> None:
    """Each that is done for nothing would hold up the turn."""
    async with node() as (served, peers):
        for peer in peers[:20]:
            await peer.ask(10, MIB)
        for peer in peers[20:]:
            await peer.ask(160, 200_000, waits=True)
        await trio.sleep(0.1)
        assert not served.budget.fits(served.clients[0], 200_000)
        done = served.done
        served.confirm()
        assert served.done - done <= CLIENTS - 20
        assert served.held_bytes_max <= BOUND


async def test_one_client_gets_no_more_than_its_share_of_small_answers_at_once(autojump_clock: MockClock) -> None:
    async with node() as (served, peers):
        await peers[0].ask(4_000, SMALL_ANSWER_BYTES // 2, waits=True)
        await trio.sleep(0.1)
        served.confirm()
        envelopes = ENVELOPE_BYTES_MAX * SHARE_BYTES // (SMALL_ANSWER_BYTES // 2)
        assert served.held_bytes_max <= SHARE_BYTES + FRAME_BYTES + SMALL_ANSWER_BYTES + envelopes
        answers = await peers[0].answers(4_000)
        assert sum(each.error is None for each in answers) >= SHARE_BYTES // SMALL_ANSWER_BYTES


async def test_a_client_that_reads_gets_its_large_answers_while_others_leave_theirs(autojump_clock: MockClock) -> None:
    """A slow or dead client never holds up others: a new one waits a moment, one that is known to read does not."""
    async with node() as (served, peers):
        reader = peers.pop()
        for _ in range(PROVEN_BYTES // MIB + 1):
            await reader.ask(1, MIB)
            assert (await reader.answers(1))[0].error is None
        for peer in peers:
            await peer.ask(10, MIB)
        await trio.sleep(0.1)
        assert not served.budget.fits(served.clients[0], MIB)
        started = trio.current_time()
        for _ in range(5):
            await reader.ask(1, MIB)
            assert len((await reader.answers(1))[0].result) == MIB
        assert trio.current_time() - started < 0.1


async def test_small_answers_are_given_however_full_it_is(autojump_clock: MockClock) -> None:
    async with node() as (served, peers):
        other = peers.pop()
        for peer in peers:
            await peer.ask(10, MIB)
        await trio.sleep(0.1)
        assert not served.budget.fits(served.clients[-1], MIB)
        started = trio.current_time()
        await other.ask(100, 100)
        assert all(each.error is None for each in await other.answers(100))
        assert trio.current_time() - started < 0.01


async def test_every_request_of_a_client_that_reads_late_is_answered_once(autojump_clock: MockClock) -> None:
    """Nothing is lost: what found no room is done again or told Busy, and the order of answers is free."""
    async with node() as (served, peers):
        for peer in peers:
            await peer.ask(20, MIB)
        found: list[list[Response]] = []

        async def read(peer: Peer) -> None:
            found.append(await peer.answers(20))

        async with trio.open_nursery() as nursery:
            for peer in peers:
                nursery.start_soon(read, peer)
        for answers in found:
            assert sorted(each.id for each in answers) == list(range(20))
            assert all(isinstance(each.error, Busy) or len(each.result) == MIB for each in answers)
        assert served.held_bytes_max <= BOUND + RESERVE_BYTES
        assert served.budget.untaken_bytes == 0
        # One that counted for ever would in the end keep its connection from being read.
        assert [client._inflight for client in served.clients] == [0] * CLIENTS


async def test_who_stands_still_is_dropped_for_a_large_answer_that_waits(autojump_clock: MockClock) -> None:
    async with node() as (served, peers):
        late = peers.pop()
        for peer in peers:
            await peer.ask(1, MIB)
        await trio.sleep(STALLED_SECONDS_MIN + 0.1)
        await late.ask(1, MIB)
        started = trio.current_time()
        assert (await late.answers(1))[0].error is None
        assert trio.current_time() - started < WAIT_SECONDS_MAX
        assert any(connection.closed for connection in served.connections)


async def test_large_frames_do_not_wait_in_memory_behind_answers_that_nobody_takes(autojump_clock: MockClock) -> None:
    """Each frame was within its bound when it arrived; together they would fill the memory."""
    async with node() as (served, peers):
        frame = requests.join(
            [requests.encode_request(each, 1, 1, 1, 0, 64 * 1024, False) for each in range(8)]
            + [requests.encode_request(8, 1, 1, 1, 0, 8, False, bytes(6 * MIB))]
        )

        async def send(peer: Peer) -> None:
            await peer.stream.send_all(encode_frame(FrameKind.REQUEST, frame))

        async with trio.open_nursery() as nursery:
            for peer in peers[:6]:
                nursery.start_soon(send, peer)
            await trio.sleep(0.3)
            assert 0 < served.budget.backlog_bytes <= 8 * MIB
            answers = [await peer.answers(9) for peer in peers[:6]]
        refused = sum(isinstance(each.error, Busy) for found in answers for each in found)
        assert refused
        assert served.budget.backlog_bytes == 0


async def test_pings_that_are_answered_but_not_read_are_looked_at_no_more(autojump_clock: MockClock) -> None:
    async with node() as (served, peers):
        ping = encode_frame(FrameKind.PING, bytes(64))
        with trio.move_on_after(5):
            for _ in range(100):
                await peers[0].stream.send_all(ping * 1000)
        assert served.held_bytes_max <= UNREAD_BYTES_MAX + WINDOW_BYTES
