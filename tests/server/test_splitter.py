"""When ranges are measured and split: by what was written, in slices, once, and by their leader only."""

import itertools
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from shardkv.errors import Busy, OutOfSpace
from shardkv.machine import envelope, keys
from shardkv.multiraft.space import Space
from shardkv.server.splitter import (
    BUSY_ENTRIES,
    IDLE_SECONDS,
    INTERVAL_SECONDS,
    RETRY_SECONDS,
    SLICE_KEYS,
    Splitter,
)
from shardkv.simulation.clock import SimulationClock
from shardkv.storage.engine import WriteBatch
from shardkv.storage.memory import MemoryEngine
from shardkv.types import (
    EVERY_KEY,
    PLACEMENT_RANGE,
    Epoch,
    KeyRange,
    Member,
    NodeId,
    RangeDescriptor,
    RangeId,
    ReplicaId,
)

SPLIT_BYTES = 20_000
VALUE = envelope.pack(1, bytes(100))


class CountingEngine:
    """Counts snapshots that are open, and how many rows a task reads from them at a stretch."""

    def __init__(self) -> None:
        self.memory = MemoryEngine()
        self.opened = self.open = 0
        self.rows_at_once = 0
        self.scans = 0
        self.on_scan: Callable[[], None] = lambda: None
        self._rows = 0

    def put(self, first: int, count: int) -> None:
        batch = WriteBatch()
        for number in range(first, first + count):
            batch.put(keys.user_key(b"k%06d" % number), VALUE)
        self.memory.write(batch)

    def snapshot(self) -> Any:
        self.opened += 1
        self.open += 1
        inner = self.memory.snapshot()

        def close() -> None:
            self.open -= 1
            inner.close()

        def scan(start: bytes, end: bytes) -> Iterator[tuple[bytes, bytes]]:
            self._rows = 0
            self.scans += 1
            self.on_scan()
            for row in inner.scan(start, end):
                self._rows += 1
                self.rows_at_once = max(self.rows_at_once, self._rows)
                yield row

        return SimpleNamespace(close=close, scan=scan)


class World:
    def __init__(self) -> None:
        self.engine = CountingEngine()
        self.replicas: dict[int, Any] = {}
        self.splits: list[tuple[int, bytes]] = []
        self.error: Exception | None = None
        log = SimpleNamespace(info=lambda *_, **__: None)
        self.applying: Iterator[int] = itertools.count(BUSY_ENTRIES, BUSY_ENTRIES)
        self.space = Space()
        driver: Any = SimpleNamespace(
            catalog=SimpleNamespace(replicas=self.replicas),
            engine=self.engine,
            space=self.space,
            statistics=lambda: SimpleNamespace(entries_applied=next(self.applying)),
        )
        self.splitter = Splitter(driver, SimulationClock(), self._split, lambda: SPLIT_BYTES, log)

    def add(self, range_id: int = 1, *, leads: bool = True, span: KeyRange = EVERY_KEY) -> Any:
        replicas = (Member(NodeId(1), ReplicaId(range_id)),)
        descriptor = RangeDescriptor(RangeId(range_id), span, Epoch(1, 1), replicas)
        machine = SimpleNamespace(bytes_written=0, descriptor=descriptor)
        self.replicas[range_id] = SimpleNamespace(range_id=range_id, leads=leads, machine=machine)
        return self.replicas[range_id]

    def write(self, replica: Any, first: int, count: int) -> None:
        self.engine.put(first, count)
        replica.machine.bytes_written += count * 120

    async def _split(self, range_id: RangeId, key: bytes) -> None:
        await trio.lowlevel.checkpoint()
        self.splits.append((range_id, key))
        if self.error is not None:
            raise self.error
        machine = self.replicas[range_id].machine
        descriptor = machine.descriptor
        machine.descriptor = descriptor.with_span(KeyRange(descriptor.span.start, key), Epoch(2, 2))
        self.add(range_id + 1, span=KeyRange(key, descriptor.span.end))


@asynccontextmanager
async def running() -> AsyncIterator[World]:
    world = World()
    async with trio.open_nursery() as nursery:
        await nursery.start(world.splitter.run)
        yield world
        nursery.cancel_scope.cancel()
    assert not world.engine.open, "a snapshot of the engine was left open"


async def rounds(count: int) -> None:
    await trio.sleep(count * INTERVAL_SECONDS + INTERVAL_SECONDS / 2)


async def test_while_little_is_applied_it_looks_less_often(autojump_clock: MockClock) -> None:
    """And a burst of writes is seen all the same, before the next of its usual looks would be much overdue."""
    async with running() as world:
        world.applying = itertools.count(BUSY_ENTRIES - 1, BUSY_ENTRIES - 1)
        replica = world.add()
        await trio.sleep(INTERVAL_SECONDS + IDLE_SECONDS / 2)
        scans = world.engine.scans
        world.write(replica, 0, 200)
        await trio.sleep(IDLE_SECONDS / 4)
        assert world.engine.scans == scans
        await trio.sleep(IDLE_SECONDS)
        assert len(world.splits) == 1


async def test_a_node_that_is_short_of_room_splits_nothing_until_it_has_some(autojump_clock: MockClock) -> None:
    """Full followers would not take it; it would be measured and proposed again every few seconds."""
    async with running() as world:
        world.space.failed("log", OutOfSpace("no room"))
        world.write(world.add(), 0, 1000)
        await rounds(20)
        assert not world.engine.opened
        world.space.succeeded("log")
        await rounds(3)
        assert world.splits


async def test_a_range_that_has_grown_too_large_is_split_in_its_middle(autojump_clock: MockClock) -> None:
    async with running() as world:
        world.write(world.add(), 0, 200)
        await rounds(2)
        ((range_id, key),) = world.splits
        assert range_id == 1
        assert b"k000080" < key < b"k000120"
        assert world.splitter.bytes_of(world.replicas[1]) < SPLIT_BYTES
        await rounds(5)
        assert len(world.splits) == 1, "both halves are small enough"


async def test_halves_that_are_still_too_large_are_split_again(autojump_clock: MockClock) -> None:
    async with running() as world:
        world.write(world.add(), 0, 600)
        await rounds(10)
        assert len(world.splits) >= 3
        assert all(world.splitter.bytes_of(each) <= SPLIT_BYTES for each in world.replicas.values())


async def test_a_range_is_measured_again_only_when_its_writes_could_have_taken_it_over(
    autojump_clock: MockClock,
) -> None:
    async with running() as world:
        replica = world.add()
        world.write(replica, 0, 20)
        await rounds(10)
        assert world.engine.opened == 1
        world.write(replica, 20, 20)
        await rounds(10)
        assert world.engine.opened == 1
        world.write(replica, 0, 160)  # the same keys over and over: it has not grown
        await rounds(10)
        assert world.engine.opened == 2
        assert not world.splits


@pytest.mark.parametrize("which", ["follower", "placement", "uninitialised"])
async def test_only_the_leader_of_a_range_of_keys_measures_it(autojump_clock: MockClock, which: str) -> None:
    async with running() as world:
        replica = world.add(PLACEMENT_RANGE if which == "placement" else 1, leads=which != "follower")
        world.write(replica, 0, 400)
        if which == "uninitialised":
            replica.machine = None
        await rounds(5)
        assert not world.engine.opened
        assert not world.splits


async def test_a_split_that_did_not_come_about_is_tried_again_later(autojump_clock: MockClock) -> None:
    async with running() as world:
        world.error = Busy("a membership change is under way")
        world.write(world.add(), 0, 200)
        await rounds(2)
        assert len(world.splits) == 1
        await trio.sleep(RETRY_SECONDS * 0.8)
        assert len(world.splits) == 1
        world.error = None
        await trio.sleep(RETRY_SECONDS)
        assert len(world.splits) == 2
        assert 2 in world.replicas


async def test_a_measurement_reads_few_keys_at_a_time(autojump_clock: MockClock) -> None:
    """A slice is about a millisecond of the loop's time."""
    async with running() as world:
        world.write(world.add(), 0, 5 * SLICE_KEYS)
        await rounds(3)
        assert world.splits
        assert world.engine.rows_at_once <= SLICE_KEYS


async def test_a_range_that_changed_while_it_was_measured_is_not_split_by_that(autojump_clock: MockClock) -> None:
    async with running() as world:
        replica = world.add()
        world.write(replica, 0, 5 * SLICE_KEYS)

        def change() -> None:
            if world.engine.scans == 3:
                replica.machine.descriptor = replace(replica.machine.descriptor, epoch=Epoch(1, 2))

        world.engine.on_scan = change
        await rounds(1)
        assert world.engine.scans >= 5
        assert not world.splits


async def test_what_is_known_of_a_range_goes_with_it(autojump_clock: MockClock) -> None:
    """Ids are never reused: without this a node that ranges come to and leave would remember each for ever."""
    async with running() as world:
        world.error = Busy("no")
        for range_id in range(1, 50):
            world.add(range_id, span=KeyRange(b"z", None))
        world.write(world.add(60), 0, 200)
        await rounds(3)
        assert set(world.splitter.sizes) == set(world.replicas)
        world.replicas.clear()
        await rounds(2)
        assert not world.splitter.sizes
        assert not world.splitter._retry_at_ns


async def test_a_range_of_one_large_key_is_measured_again_only_once_it_was_written(autojump_clock: MockClock) -> None:
    async with running() as world:
        batch = WriteBatch()
        batch.put(keys.user_key(b"k"), envelope.pack(1, bytes(2 * SPLIT_BYTES)))
        world.engine.memory.write(batch)
        replica = world.add()
        await trio.sleep(100 * IDLE_SECONDS)
        assert world.engine.scans == 1
        world.write(replica, 0, 10)
        await trio.sleep(10 * IDLE_SECONDS)
        assert len(world.splits) == 1
