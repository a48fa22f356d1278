"""Entries that take long: how long a leader relies on the followers that it asked first."""

from typing import Any, cast

import pytest
import trio
from trio.testing import MockClock

from shardkv.multiraft.hedger import PATIENCE_NS_MIN, USUAL_TIMES, Hedger
from shardkv.raft import RaftNode
from shardkv.simulation import SimulationClock
from shardkv.types import NodeId, RangeId
from tests.multiraft.world import TICK_SECONDS, Host, Hosts, world

MS = 1_000_000


class Group:
    """A replica as the hedger sees it."""

    def __init__(self) -> None:
        self.range_id = RangeId(7)
        self.leads = True
        self.raft = self
        self.committed = 5
        self.last_index = 5
        self.hedged: list[int] = []
        self.sends = True

    def propose(self) -> None:
        self.last_index += 1

    def hedge(self) -> None:
        self.hedged.append(self.last_index)

    def has_ready(self) -> bool:
        return self.sends


class Watch:
    """A hedger over one group, and the groups that it has stepped."""

    def __init__(self, patience_seconds_max: float = 0.05) -> None:
        self.touched: list[Any] = []
        self.group = Group()
        self.hedger = Hedger(SimulationClock(), patience_seconds_max=patience_seconds_max, touch=self.touched.append)

    def propose(self) -> None:
        self.group.propose()
        self.hedger.proposed(cast("Any", self.group))

    @property
    def idle(self) -> bool:
        return not self.hedger._watched


def looked_at(watch: Watch) -> list[int]:
    watch.hedger._look()
    return watch.group.hedged


def test_an_entry_that_is_not_committed_at_the_next_look_is_hedged_once() -> None:
    watch = Watch()
    watch.propose()
    watch.propose()
    assert looked_at(watch) == [7]
    assert watch.touched == [watch.group]
    assert watch.idle, "the spares have all of it: there is nothing left to be asked for"
    assert looked_at(watch) == [7]
    watch.propose()
    assert looked_at(watch) == [7, 8]


def test_an_entry_has_the_whole_time_between_two_looks() -> None:
    watch = Watch()
    watch.propose()
    watch.group.committed = 6
    watch.propose()
    assert looked_at(watch) == [], "the second was proposed since the last look"
    assert not watch.idle
    assert looked_at(watch) == [7]


def test_nobody_looks_while_nothing_is_under_way() -> None:
    watch = Watch()
    watch.propose()
    watch.group.committed = 6
    assert looked_at(watch) == []
    assert watch.idle


def test_a_group_that_leads_no_more_is_forgotten() -> None:
    watch = Watch()
    watch.propose()
    watch.group.leads = False
    assert looked_at(watch) == []
    assert watch.idle


def test_a_group_that_has_nobody_left_to_ask_makes_no_turn() -> None:
    watch = Watch()
    watch.group.sends = False
    watch.propose()
    looked_at(watch)
    assert watch.touched == []


def test_patience_follows_what_entries_take_lately_within_bounds() -> None:
    hedger = Watch().hedger
    assert hedger._patience_ns == PATIENCE_NS_MIN
    for _ in range(100):
        hedger.committed(4 * MS)
    assert hedger._patience_ns == pytest.approx(USUAL_TIMES * 4 * MS, rel=0.01)
    for _ in range(100):
        hedger.committed(1_000 * MS)
    assert hedger._patience_ns == 50 * MS
    for _ in range(100):
        hedger.committed(MS // 10)
    assert hedger._patience_ns == PATIENCE_NS_MIN


def test_one_entry_that_took_very_long_does_not_exhaust_the_bounds() -> None:
    hedger = Watch().hedger
    for _ in range(100):
        hedger.committed(2 * MS)
    hedger.committed(10_000 * MS)
    assert hedger._patience_ns < 2 * USUAL_TIMES * 2 * MS
    before = hedger._patience_ns
    hedger.committed(-5 * MS)
    assert hedger._patience_ns == before, "nothing was answered"


async def test_a_look_comes_after_each_patience_and_only_while_something_is_under_way(
    autojump_clock: MockClock,
) -> None:
    watch = Watch()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch.hedger.run)
        await trio.sleep(10)
        started = trio.current_time()
        watch.propose()
        while not watch.group.hedged:  # noqa: ASYNC110
            await trio.sleep(0.000_1)
        assert trio.current_time() - started == pytest.approx(PATIENCE_NS_MIN / 1e9, abs=0.000_2)
        statistics = trio.lowlevel.current_statistics()
        assert watch.idle
        assert statistics.seconds_to_next_deadline == float("inf")
        nursery.cancel_scope.cancel()


# With real groups


async def answered_within(hosts: Hosts, seconds: float) -> bool:
    answer = hosts.leader().put(b"k", b"w")
    with trio.move_on_after(seconds):
        await answer.wait()
        return True
    return False


async def test_a_follower_that_falls_silent_holds_a_write_up_for_a_moment_only(autojump_clock: MockClock) -> None:
    async with world(3) as hosts:
        await hosts.write(b"k", b"v")
        silent = hosts.relied_on()
        hosts.isolate(silent.node_id)
        assert await answered_within(hosts, 2 * TICK_SECONDS)


async def test_a_slow_follower_loses_its_place_also_where_little_is_written(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not slow enough for a hedge, and entries never collect between two heartbeats."""
    async with world(3) as hosts:
        await hosts.write(b"k", b"v")
        leader, slow, post = hosts.leader(), hosts.relied_on(), hosts.post

        def late(source: Host, target: NodeId, item: bytes) -> None:
            hosts.nursery.start_soon(later, source, target, item)

        async def later(source: Host, target: NodeId, item: bytes) -> None:
            if target == leader.node_id:
                await trio.sleep(0.03 if source is slow else 0.01)
            post(source, target, item)

        monkeypatch.setattr(RaftNode, "hedge", lambda self: None)
        monkeypatch.setattr(hosts, "post", late)
        for _ in range(60):
            await hosts.write(b"k", b"v")
            await trio.sleep(0.011)
        assert hosts.relied_on() is not slow


async def test_a_write_that_is_committed_in_time_is_not_hedged(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    hedged: list[RaftNode] = []
    monkeypatch.setattr(RaftNode, "hedge", hedged.append)
    async with world(3) as hosts:
        await hosts.write(b"k", b"v")
        assert hosts.leader().driver.hedger._watched, "it is looked at"
        await trio.sleep(2 * TICK_SECONDS)
        assert not hosts.leader().driver.hedger._watched
        assert not hedged


async def test_a_lost_connection_is_not_waited_for(autojump_clock: MockClock) -> None:
    async with world(3) as hosts:
        await hosts.write(b"k", b"v")
        leader, lost = hosts.leader(), hosts.relied_on()
        hosts.isolate(lost.node_id)
        leader.put(b"k", b"w")
        leader.driver._turn()
        assert leader.replica().raft.committed < leader.replica().raft.last_index
        leader.driver.doubt_node(lost.node_id)
        assert hosts.relied_on() is not lost
        assert leader.replica().raft.has_ready(), "what waits for the lost one alone goes to the other at once"
        assert leader.driver._ready, "there is a turn for it"


async def test_a_lost_connection_makes_no_turn_for_groups_with_nothing_under_way(autojump_clock: MockClock) -> None:
    async with world(3) as hosts:
        await hosts.write(b"k", b"v")
        await hosts.agreed()
        leader = hosts.leader()
        leader.driver.doubt_node(hosts.relied_on().node_id)
        assert not leader.driver._ready


async def test_what_is_proposed_alone_is_watched_too(autojump_clock: MockClock) -> None:
    async with world(3) as hosts:
        await hosts.agreed()
        leader = hosts.leader()
        await trio.sleep(1)
        assert not leader.driver.hedger._watched
        leader.split(b"m", 2)
        assert leader.driver.hedger._watched


async def test_patience_is_learned_from_what_is_answered(autojump_clock: MockClock) -> None:
    async with world(3) as hosts:
        hedger = hosts.leader().driver.hedger
        assert hedger._usual_ns == 0
        await hosts.write(b"k", b"v")
        assert 0 < hedger._usual_ns < 10 * MS


async def test_what_is_proposed_alone_takes_no_longer_than_it_took(autojump_clock: MockClock) -> None:
    """Not since the last write was proposed, which may be long ago."""
    async with world(3) as hosts:
        await hosts.write(b"k", b"v")
        leader = hosts.leader()
        for right in range(5):
            await trio.sleep(1)
            first = 100 * (right + 1)
            await leader.split(b"%d" % (9 - right), 2 + right, first_replica=first).wait()
        assert leader.driver.hedger._patience_ns == PATIENCE_NS_MIN
