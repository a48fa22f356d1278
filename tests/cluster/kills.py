"""kill -9 at random moments under a running workload: ``python -m tests.cluster.soak kills --kills 200``.

Any node dies, every second time the leader of a key in use, now and then two nodes at the same moment, or a node that
has not come up again. What each client saw must be linearizable, and no acknowledged write may be missing at the end.
"""

import argparse
import random
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import trio

from shardkv_client.client import Client
from tests.cluster.harness import SECONDS_MAX, LocalCluster, client, cluster, kill, leader_of, ranges_of, settled
from tests.cluster.workload import Workload

OPTIONS = ("--split-bytes", "32KiB", "--log-level", "info")
CLIENTS = 3


@dataclass(slots=True)
class Kills:
    """What a run has done, and with which chances it does it."""

    count: int
    seed: int = 1
    done: int = 0
    leaders: int = 0
    pairs: int = 0
    starting: int = 0
    """Nodes killed again before they served."""
    ranges: int = 0

    def describe(self) -> str:
        return (
            f"{self.done} kills ({self.leaders} of a leader, {self.pairs} pairs at once, {self.starting} while "
            f"starting)" + (f", {self.ranges} ranges at the end" if self.ranges else "")
        )


async def run(world: LocalCluster, kills: Kills, *, show: bool = False) -> Workload:
    """Kill so often; the workload that went on meanwhile, judged. Raises AssertionError with the history."""
    async with client(world) as one, client(world) as two, client(world) as three:
        await settled(one)
        workload = Workload(kills.seed, (one, two, three))
        strike = partial(_kill_once, world, kills, workload, one)
        await workload.run_under(kills, strike, one, show=show)
        kills.ranges = len(await ranges_of(one)) - 1
    return workload


async def _kill_once(world: LocalCluster, kills: Kills, workload: Workload, kv: Client, chance: random.Random) -> None:
    for name, process in world.processes.items():
        assert process.running, f"{name} ended by itself with {process.exit_code}\n{process.stderr_tail()}"
    victims = [chance.choice(world.names)]
    if chance.random() < 0.5:
        victims = [await leader_of(kv, workload.key(chance))]
        kills.leaders += 1
    if chance.random() < 0.2:
        victims.append(chance.choice([name for name in world.names if name not in victims]))
        kills.pairs += 1
    for name in victims:
        world.processes[name].signal(9)
    for name in victims:
        await kill(world, name)
    kills.done += len(victims)
    await trio.sleep(chance.choice([0.0, chance.uniform(0, 0.5), chance.uniform(0, 2.5)]))
    for name in victims:
        world.start_node(name)
    if chance.random() < 0.15:
        await trio.sleep(chance.uniform(0, 1.5))
        await kill(world, victims[0])
        kills.done += 1
        kills.starting += 1
        world.start_node(victims[0])
    await trio.to_thread.run_sync(world.wait_ready, victims, SECONDS_MAX)


def main(arguments: Sequence[str]) -> None:
    """The subcommand."""
    parser = argparse.ArgumentParser(prog="python -m tests.cluster.soak kills", description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--nodes", type=int, default=3)
    given = parser.parse_args(arguments)
    trio.run(_soak, Kills(given.kills, given.seed), given.nodes)


async def _soak(kills: Kills, nodes: int) -> None:
    with tempfile.TemporaryDirectory() as directory:
        async with cluster(Path(directory), nodes=nodes, options=OPTIONS) as world:
            workload = await run(world, kills, show=True)
    print(f"kills: {kills.describe()}; {workload.describe()}; every history is linearizable and nothing was lost")
