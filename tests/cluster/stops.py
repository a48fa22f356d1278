"""SIGSTOP of leaders under a running workload: ``python -m tests.cluster.soak stops --stops 20``.

A leader stands still for less or much longer than its lease while others are elected and write on; requests that were
sent to it wait in its sockets. When it goes on it must serve none of them from what it knew before. Now and then a
second node stands still, too. What each client saw must be linearizable.
"""

import argparse
import random
import tempfile
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import trio

from shardkv_client.client import Client
from shardkv_client.core.settings import Settings
from tests.cluster.harness import LocalCluster, client, cluster, leader_of, settled
from tests.cluster.kills import OPTIONS
from tests.cluster.workload import Workload

STOP_SECONDS = (0.05, 0.3, 0.5, 1.0, 2.0, 3.0)
"""Around the lease's 400 ms, around an election's 500 to 1,000 ms, and well past both."""


@dataclass(slots=True)
class Stops:
    count: int
    seed: int = 1
    done: int = 0
    leaders: int = 0
    pairs: int = 0
    seconds: float = 0.0
    deposed: int = 0
    """After how many of them another node led the key that was looked at."""

    def describe(self) -> str:
        return (
            f"{self.done} stops ({self.leaders} of a leader, {self.deposed} of them deposed meanwhile, {self.pairs} "
            f"pairs at once), {self.seconds:.1f} s in all"
        )


async def run(world: LocalCluster, stops: Stops, *, show: bool = False) -> Workload:
    """Stop so often; the workload that went on meanwhile, judged. Raises AssertionError with the history."""
    async with AsyncExitStack() as stack:
        # One client of each node: what it has sent to its node when that stops is answered after it goes on.
        clients = [await stack.enter_async_context(client(world, addresses=each)) for each in world.addresses.values()]
        kv = await stack.enter_async_context(client(world))
        await settled(kv)
        workload = Workload(stops.seed, [*clients, kv])
        waiting = client(world, settings=Settings(silence_seconds_max=60, dial_seconds=60))
        patient = await stack.enter_async_context(waiting)
        strike = partial(_stop_once, world, stops, workload, kv, patient)
        await workload.run_under(stops, strike, kv, show=show)
    return workload


async def _stop_once(
    world: LocalCluster, stops: Stops, workload: Workload, kv: Client, patient: Client, chance: random.Random
) -> None:
    """``patient`` waits for a node that stands still, so what it reads is what that node says when it goes on."""
    key = workload.key(chance)
    await patient.get(key)
    leader = await leader_of(kv, key)
    victims = [leader]
    if chance.random() < 0.2:
        victims = [chance.choice(world.names)]
    if chance.random() < 0.2:
        victims.append(chance.choice([name for name in world.names if name not in victims]))
        stops.pairs += 1
    seconds = chance.choice(STOP_SECONDS) * chance.uniform(0.7, 1.3)
    over = trio.Event()
    async with trio.open_nursery() as nursery:
        try:
            for name in victims:
                world.pause(name)
            nursery.start_soon(workload.hunt, key, kv, [patient], over)
            await trio.sleep(seconds)
        finally:
            for name in victims:
                world.resume(name)
        await trio.sleep(0.3)
        over.set()
    stops.done += 1
    stops.seconds += seconds
    if leader in victims:
        stops.leaders += 1
        stops.deposed += await leader_of(kv, key) != leader


def main(arguments: Sequence[str]) -> None:
    """The subcommand."""
    parser = argparse.ArgumentParser(prog="python -m tests.cluster.soak stops", description=__doc__)
    parser.add_argument("--stops", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args(arguments)
    trio.run(_soak, Stops(given.stops, given.seed))


async def _soak(stops: Stops) -> None:
    with tempfile.TemporaryDirectory() as directory:
        async with cluster(Path(directory), options=OPTIONS) as world:
            workload = await run(world, stops, show=True)
    print(f"stops: {stops.describe()}; {workload.describe()}; every history is linearizable and nothing was lost")
