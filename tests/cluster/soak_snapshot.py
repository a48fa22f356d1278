"""A large range moves under load: ``python -m tests.cluster.soak snapshot [--gib 1]``.

Three node processes hold one range of that size. A follower is killed, more is written than the log keeps for it, and
it is started again: its leader sends it the whole range while clients put and get. Reported: how long, how fast, what
sender and receiver held in memory at most, and the clients' latencies before, during and after.
"""

import argparse
import os
import random
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import trio

from shardkv.errors import ShardKVError
from shardkv.wire.requests import Method
from shardkv_client.client import Client
from tests.cluster.harness import (
    LocalCluster,
    client,
    cluster,
    eventually,
    kill,
    leader_of,
    logs_on_failure,
    resident_bytes,
    restart,
    settled,
)

MIB = 1024 * 1024
VALUE_BYTES = 4096
BEHIND_SECONDS_MAX = 300.0
BEHIND_KEYS = 256
"""Written again and again while the follower is away, until the log is cut past what it has."""
LOAD_TASKS = 8
LOAD_PAUSE_SECONDS = 0.01
"""Between two operations of a task: a load that the cluster bears easily, so that latencies show what disturbs it."""
PHASE_SECONDS = 15.0
MOVE_SECONDS_MAX = 1800.0
GROWTH_MAX = 96 * MIB
"""What either end may hold in memory beyond what it held before, whatever the range's size."""


class Load:
    """Puts and gets of keys all over the range, and how long each took."""

    def __init__(self, kv: Client, keys: int) -> None:
        self._kv = kv
        self._keys = keys
        self.phase = "before"
        self.seconds: dict[str, list[float]] = {}
        self.errors: dict[str, int] = {}

    async def run(self, number: int) -> None:
        chooser = random.Random(number)
        value = chooser.randbytes(VALUE_BYTES)
        while True:
            key = b"key/%010d" % chooser.randrange(self._keys)
            phase, began = self.phase, trio.current_time()
            try:
                if chooser.random() < 0.5:
                    await self._kv.put(key, value)
                else:
                    await self._kv.get(key)
            except ShardKVError:
                self.errors[phase] = self.errors.get(phase, 0) + 1
            else:
                self.seconds.setdefault(phase, []).append(trio.current_time() - began)
            await trio.sleep(LOAD_PAUSE_SECONDS)

    def describe(self, phase: str) -> str:
        cuts = statistics.quantiles(self.seconds[phase], n=1000)
        return (
            f"{phase}: {len(self.seconds[phase])} operations, p50 {cuts[499] * 1e3:.1f} ms, p99 {cuts[989] * 1e3:.1f}"
            f" ms, max {max(self.seconds[phase]) * 1e3:.0f} ms, {self.errors.get(phase, 0)} errors"
        )


class Memory:
    """The most that each node held, sampled."""

    def __init__(self, world: LocalCluster) -> None:
        self._world = world
        self.most: dict[str, int] = {}

    async def run(self) -> None:
        while True:
            for name, process in self._world.processes.items():
                if process.running:
                    try:
                        self.most[name] = max(self.most.get(name, 0), resident_bytes(process.pid))
                    except (AssertionError, OSError):
                        pass  # it ended just now
            await trio.sleep(0.05)


def _pairs(first: int, count: int) -> Iterator[tuple[bytes, bytes]]:
    blob = random.Random(1).randbytes(8 * MIB)
    for number in range(first, first + count):
        start = number * 4099 % (len(blob) - VALUE_BYTES)
        yield b"key/%010d" % number, blob[start : start + VALUE_BYTES]


def _incoming_bytes(world: LocalCluster, name: str) -> int | None:
    """The size of what has arrived of a snapshot; None when none is arriving."""
    sizes = []
    for path in (world.directory / name / "ingest").iterdir():
        try:
            sizes.append(path.stat().st_size)
        except FileNotFoundError:
            pass
    return sum(sizes) if sizes else None


async def _moved(world: LocalCluster, name: str) -> tuple[float, float, int]:
    """Wait for a snapshot to come and to be in place: when it began and ended, and its size on the disk."""
    size, began = 0, None
    with trio.fail_after(MOVE_SECONDS_MAX):
        while True:
            now = _incoming_bytes(world, name)
            if now is not None:
                size = max(size, now)
                began = began or trio.current_time()
            elif began is not None:
                return began, trio.current_time(), size
            await trio.sleep(0.02)


async def _leave_behind(kv: Client, late: str) -> None:
    """Write until the log of the leader begins after whatever a node has that is down now."""
    ((descriptor, _),) = await kv.ranges()
    range_id = descriptor.range_id
    has = (await kv.call(Method.SNAPSHOT, range_id, range_id=range_id))["applied"]
    with trio.fail_after(BEHIND_SECONDS_MAX):
        while True:
            await kv.put_many(_pairs(0, BEHIND_KEYS))
            cut = await kv.call(Method.SNAPSHOT, range_id, range_id=range_id)
            if cut["log_begins"] > has + 1:
                break
    print(f"{late} has at most {has}, the log begins at {cut['log_begins']}", flush=True)


async def move(world: LocalCluster, kv: Client, gib: float) -> None:
    keys = int(gib * 1024 * MIB) // VALUE_BYTES
    began = trio.current_time()
    await kv.put_many(_pairs(0, keys))
    print(f"{keys} keys of {VALUE_BYTES} bytes loaded in {trio.current_time() - began:.0f} s", flush=True)
    assert len(await kv.ranges()) == 1, "the range has split"
    leader = await leader_of(kv, b"key/")
    late, other = [name for name in world.processes if name != leader]
    load, memory = Load(kv, keys), Memory(world)
    async with trio.open_nursery() as nursery:
        for number in range(LOAD_TASKS):
            nursery.start_soon(load.run, number)
        await trio.sleep(PHASE_SECONDS)
        load.phase = "away"
        await kill(world, late)
        await _leave_behind(kv, late)
        before = {name: resident_bytes(world.processes[name].pid) for name in (leader, other)}
        nursery.start_soon(memory.run)
        await restart(world, late)
        before[late] = resident_bytes(world.processes[late].pid)
        load.phase = "during"
        began, ended, size = await _moved(world, late)
        load.phase = "after"
        moved = dict(memory.most)
        await trio.sleep(PHASE_SECONDS)
        load.phase = "end"
        nursery.cancel_scope.cancel()
    seconds = ended - began
    print(f"{gib:g} GiB ({size / MIB:.0f} MiB as files) from {leader} to {late} in {seconds:.1f} s", end=", ")
    print(f"{gib * 1024 / seconds:.1f} MiB/s")
    for name, role in ((leader, "sender"), (late, "receiver"), (other, "bystander")):
        print(f"{role} {name}: {before[name] / MIB:.0f} MiB before, {moved[name] / MIB:.0f} MiB at most")
    for phase in ("before", "during", "after"):
        print(load.describe(phase))
    await _stands_in(world, kv, late, other)
    assert leader == await leader_of(kv, b"key/"), "the leader has changed"
    assert moved[leader] - before[leader] < GROWTH_MAX, "the sender's memory has grown"
    assert moved[late] - before[late] < GROWTH_MAX, "the receiver's memory has grown"


async def _stands_in(world: LocalCluster, kv: Client, late: str, other: str) -> None:
    """With the other follower gone, a write is acknowledged only once the late one has caught up."""
    began = trio.current_time()
    await kill(world, other)

    async def written() -> bool:
        return await kv.put(b"proof", b"1") > 0

    await eventually("the late follower makes a majority", written)
    print(f"{late} makes a majority {trio.current_time() - began:.1f} s later")
    await restart(world, other)
    await settled(kv)


async def run(gib: float, directory: str | None, rate: str) -> None:
    options = ["--split-bytes", str(16 * 1024 * MIB), "--log-level", "info"]
    if rate:
        options += ["--snapshot-send-bytes-per-second", rate, "--snapshot-receive-bytes-per-second", rate]
    with tempfile.TemporaryDirectory(dir=directory) as path:
        async with cluster(Path(path), options=options) as world, client(world) as kv:
            with logs_on_failure(world):
                await settled(kv)
                await move(world, kv, gib)


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.cluster.soak snapshot", description=__doc__)
    parser.add_argument("--gib", type=float, default=1.0, help="size of the range")
    parser.add_argument("--directory", default=os.environ.get("TMPDIR"), help="where the nodes' data go meanwhile")
    parser.add_argument("--rate", default="", help="bytes a second, such as 8MiB, in place of the nodes' default")
    given = parser.parse_args(arguments)
    trio.run(run, given.gib, given.directory, given.rate)
