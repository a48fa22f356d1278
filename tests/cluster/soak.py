"""Long variants of the cluster tests, with numbers: ``python -m tests.cluster.soak NAME``, NAME one of failover, cuts,
flood, memory, kills, stops, partitions and snapshot.

Each starts a cluster of its own in a temporary directory, prints what it measured, and fails when a budget is missed.
"""

import argparse
import statistics
import sys
import tempfile
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import click
import trio

from shardkv.program import run_program
from shardkv_client.client import Client
from tests.cluster import kills, partitions, soak_snapshot, stops
from tests.cluster.flood import FLOODS, GROWTH_MAX, MIB, flood
from tests.cluster.harness import (
    LocalCluster,
    client,
    kill,
    leader_of,
    logs_on_failure,
    resident_bytes,
    restart,
    settled,
    started,
)

FAILOVERS = 10
FAILOVER_SECONDS_MEDIAN = 0.8
FAILOVER_SECONDS_WORST = 1.5
"""DESIGN section 5, with default settings."""
FLOOD_HOLD_SECONDS = 4.0
FLOOD_SECONDS = 6.0
"""So long clients that were dropped come back with the same requests."""
KEYS = 100_000
RESIDENT_MAX = 150 * MIB


async def failover(world: LocalCluster, kv: Client) -> None:
    """kill -9 of the leader, to the next successful write."""
    seconds = []
    for number in range(FAILOVERS):
        await settled(kv)
        await kv.put(b"failover", b"before")
        victim = await leader_of(kv, b"failover")
        process = world.processes[victim]
        before = trio.current_time()
        process.signal(9)
        await kv.put(b"failover", b"after", timeout=30)
        seconds.append(trio.current_time() - before)
        print(f"{number + 1}. {victim}: {seconds[-1]:.3f} s", flush=True)
        await kill(world, victim)
        await restart(world, victim)
    print(f"median {statistics.median(seconds):.3f} s, worst {max(seconds):.3f} s")
    assert statistics.median(seconds) < FAILOVER_SECONDS_MEDIAN
    assert max(seconds) < FAILOVER_SECONDS_WORST


async def cuts(world: LocalCluster, kv: Client) -> None:
    """Every position of a request and its answer, for each kind of write."""
    from tests.cluster.test_retries import both, cut_conditional_puts, cut_increments, cut_puts

    for writes in (cut_increments, cut_conditional_puts, cut_puts):
        async with both(world) as (cut, direct, proxies):
            count = await writes(cut, direct, proxies, 1_000_000)
            print(f"{writes.__name__}: {count} cuts, each write applied once", flush=True)


async def gibibyte(name: str) -> None:
    """100 clients send 1 GiB in all, or ask for it, and never read."""
    with tempfile.TemporaryDirectory() as directory, started(Path(directory)) as world, logs_on_failure(world):
        async with client(world) as kv:
            await settled(kv)
        found = await flood(world, 1024 * MIB, FLOODS[name], hold_seconds=FLOOD_HOLD_SECONDS, seconds=FLOOD_SECONDS)
        print(f"{name}: {found.describe()}", flush=True)
        assert found.growth < GROWTH_MAX
        assert found.served_in_flood
        assert found.large_served


def floods(arguments: Sequence[str]) -> None:
    """The subcommand."""
    parser = argparse.ArgumentParser(prog="python -m tests.cluster.soak flood", description=gibibyte.__doc__)
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=f"{' | '.join(FLOODS)}; all without any")
    given = parser.parse_args(arguments)
    for name in given.kinds:
        if name not in FLOODS:
            parser.error(f"there is no flood {name!r}; there are {' | '.join(FLOODS)}")
    for name in given.kinds or FLOODS:
        trio.run(gibibyte, name)


async def memory(world: LocalCluster, kv: Client) -> None:
    """A node with 100,000 keys of 100 bytes."""
    print({name: f"{resident_bytes(process.pid) / MIB:.0f} MiB empty" for name, process in world.processes.items()})
    before = trio.current_time()
    await kv.put_many((b"key/%08d" % number, bytes(100)) for number in range(KEYS))
    print(f"{KEYS} puts in {trio.current_time() - before:.1f} s")
    sizes = {name: resident_bytes(process.pid) for name, process in world.processes.items()}
    print({name: f"{size / MIB:.0f} MiB" for name, size in sizes.items()})
    count = 0
    async for _ in kv.scan(prefix=b"key/"):
        count += 1
    assert count == KEYS
    sizes = {name: resident_bytes(process.pid) for name, process in world.processes.items()}
    print({name: f"{size / MIB:.0f} MiB after a scan" for name, size in sizes.items()})
    assert max(sizes.values()) < RESIDENT_MAX


SOAKS: dict[str, Callable[[LocalCluster, Client], Awaitable[None]]] = {
    "failover": failover,
    "cuts": cuts,
    "memory": memory,
}


async def run(name: str) -> None:
    with tempfile.TemporaryDirectory() as directory, started(Path(directory)) as world, logs_on_failure(world):
        async with client(world) as kv:
            await settled(kv)
            await SOAKS[name](world, kv)


OWN: dict[str, Callable[[Sequence[str]], None]] = {
    "kills": kills.main,
    "stops": stops.main,
    "partitions": partitions.main,
    "snapshot": soak_snapshot.main,
    "flood": floods,
}
"""Those that make their own cluster and take arguments of their own."""


def main(name: str = "", *arguments: str) -> None:
    if name in OWN:
        OWN[name](arguments)
    elif name in SOAKS and not arguments:
        trio.run(run, name)
    else:
        raise click.UsageError(f"python -m tests.cluster.soak {'|'.join((*SOAKS, *OWN))}")


if __name__ == "__main__":
    run_program(lambda: main(*sys.argv[1:]))
