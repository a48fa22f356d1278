"""When a node's process collects cyclic garbage."""

import gc
from typing import Any

import pytest
import structlog
import trio
import trio.testing

from shardkv.server import garbage
from shardkv.server.garbage import GarbagePolicy


class FakeClock:
    def __init__(self) -> None:
        self.now_ns = 0

    def monotonic_ns(self) -> int:
        return self.now_ns

    async def sleep(self, seconds: float) -> None:
        await trio.sleep_forever()


class FakeCollector:
    """Records what it is told. A full collection takes ``pause`` seconds."""

    def __init__(self, clock: FakeClock) -> None:
        self.clock = clock
        self.calls: list[Any] = []
        self.objects = 0
        self.pause = 0.0

    def collect(self, generation: int = 2, /) -> int:
        self.calls.append(generation)
        self.objects = 0
        self.clock.now_ns += round(self.pause * 1e9)
        return 7

    def get_count(self) -> tuple[int, int, int]:
        return self.objects, 0, 0

    def freeze(self) -> None:
        self.calls.append("freeze")

    def unfreeze(self) -> None:
        self.calls.append("unfreeze")

    def enable(self) -> None:
        self.calls.append("enable")

    def disable(self) -> None:
        self.calls.append("disable")


YOUNG, FULL = 1, 2


class World:
    def __init__(self) -> None:
        self.clock = FakeClock()
        self.collector = FakeCollector(self.clock)
        self.turns = 0
        structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(50))
        clock: Any = self.clock
        self.policy = GarbagePolicy(self.collector, clock, lambda: self.turns, structlog.get_logger())

    def seconds(self, count: int, *, turns: int, objects: int) -> list[Any]:
        """What is collected in ``count`` seconds, each with so many turns and new objects."""
        before = len(self.collector.calls)
        for _ in range(count):
            self.clock.now_ns += round(garbage.LOOK_SECONDS * 1e9)
            self.turns += turns
            self.collector.objects += objects
            self.policy.look()
            self.policy.check()
        return self.collector.calls[before:]


@pytest.fixture
def world() -> World:
    return World()


BUSY = garbage.IDLE_TURNS_MAX + 1


async def test_what_stands_at_the_start_is_frozen_and_the_automatic_policy_is_off_until_the_end(world: World) -> None:
    """DESIGN 4.2: gc.freeze() after start, automatic collection off."""
    async with trio.open_nursery() as nursery:
        await nursery.start(world.policy.run)
        assert world.collector.calls == [FULL, "freeze", "disable"]
        nursery.cancel_scope.cancel()
    assert world.collector.calls[3:] == ["enable", "unfreeze"]


def test_an_idle_node_collects_fully_once_there_is_something_to_look_at(world: World) -> None:
    """DESIGN 4.2: full collections when idle."""
    assert world.seconds(30, turns=20, objects=1) == []
    assert world.seconds(1, turns=20, objects=garbage.IDLE_OBJECTS_MIN) == [FULL]


def test_an_idle_node_does_not_collect_all_the_time(world: World) -> None:
    wait = round(garbage.IDLE_SECONDS_MIN)
    assert world.seconds(10 * wait, turns=0, objects=1_000) == [FULL] * 10


def test_full_collections_of_an_idle_node_cost_at_most_a_fiftieth_of_its_time(world: World) -> None:
    world.collector.pause = 0.5
    seconds = 200
    collected = world.seconds(seconds, turns=0, objects=1_000)
    assert 0 < collected.count(FULL) * world.collector.pause <= seconds / garbage.IDLE_PAUSES + world.collector.pause


def test_a_busy_node_is_left_alone_for_a_minute_and_then_collects_only_what_is_new(world: World) -> None:
    """A collection is forced at the latest every 60 s."""
    minute = round(garbage.FORCE_SECONDS)
    assert world.seconds(minute - 1, turns=BUSY, objects=100) == []
    assert world.seconds(1, turns=BUSY, objects=100) == [YOUNG]
    assert world.seconds(2 * minute, turns=BUSY, objects=100) == [YOUNG, YOUNG]


def test_a_busy_node_collects_sooner_when_much_has_come(world: World) -> None:
    assert world.seconds(3, turns=BUSY, objects=garbage.YOUNG_OBJECTS_MAX // 3 + 1) == [YOUNG]


def test_a_node_that_is_never_idle_collects_fully_now_and_then(world: World) -> None:
    collected = world.seconds(round(garbage.FULL_SECONDS_MAX), turns=BUSY, objects=100)
    assert collected.count(FULL) == 1
    assert collected[-1] == FULL


def test_pauses_are_measured(world: World) -> None:
    world.collector.pause = 0.25
    world.seconds(6, turns=0, objects=1_000)
    statistics = world.policy.statistics()
    assert (statistics.full, statistics.young, statistics.objects) == (1, 0, 7)
    assert statistics.pause_seconds_sum == statistics.pause_seconds_max == 0.25


async def test_the_interpreters_own_collector_still_counts_what_comes_while_it_is_off() -> None:
    """The policy relies on it, and on the module being a Collector."""
    policy = GarbagePolicy(gc, FakeClock(), lambda: 0, structlog.get_logger())  # type: ignore[arg-type]
    async with trio.open_nursery() as nursery:
        await nursery.start(policy.run)
        assert not gc.isenabled()
        kept = [[] for _ in range(garbage.IDLE_OBJECTS_MIN)]
        assert gc.get_count()[0] >= garbage.IDLE_OBJECTS_MIN
        assert gc.get_freeze_count() > 0
        del kept
        nursery.cancel_scope.cancel()
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0
