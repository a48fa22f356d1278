"""Partitions of the real network under a running workload: ``python -m tests.cluster.soak partitions --partitions 30``.

Each node and each client lives in a network namespace of its own. A leader or any node is cut off from the others, both
ways or one way only, with a client on its side or alone, or loses its cable; a client may be cut off, too. What each
client saw must be linearizable. Everything that is made goes away with this process.

Every second time a leader is cut off from its peers and not from its clients: those that know it go on reading from
it, while somebody who never heard of it writes where the next leader will be. From then on until it stops to believe
in itself nothing but its lease keeps it from serving what is no longer so (DESIGN 4.5): without the lease's end the
soak fails.
"""

import argparse
import random
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import trio

from shardkv_client.client import Client
from tests.cluster.harness import SECONDS_MAX, client, leader_of, settled, show_logs
from tests.cluster.kills import OPTIONS
from tests.cluster.namespaces import InPlace, NamespacedCluster, Net, net, obstacle
from tests.cluster.workload import Workload

NODES = ("n1", "n2", "n3")
CLIENTS = ("c1", "c2", "c3")
SECONDS = (0.3, 1.0, 2.0, 4.0)
"""How long the network stays cut: less than a lease, an election, and long enough that clients give up."""
WRITER = "w"
"""The place of one who knows nothing of a leader that is cut off from its peers."""
FROM_PEERS = "from its peers"
FROM_PEERS_SECONDS = 2.0
"""Until there is another leader and the old one has noticed, with the default timing and some time to spare."""
KINDS = ("alone", "with a client", "deaf", "mute", "one link", "cable", "client", "nobody hears anybody", FROM_PEERS)
OTHERS = KINDS[:-1]


@dataclass(slots=True)
class Partitions:
    count: int
    seed: int = 1
    done: int = 0
    leaders: int = 0
    deposed: int = 0
    kinds: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))

    def describe(self) -> str:
        kinds = ", ".join(f"{count} {kind}" for kind, count in self.kinds.items() if count)
        return f"{self.done} partitions ({kinds}; {self.leaders} of a leader, {self.deposed} of them deposed meanwhile)"


@asynccontextmanager
async def namespaced(directory: Path) -> AsyncIterator[tuple[Net, NamespacedCluster]]:
    """Three nodes and three places for clients."""
    with net(*NODES, *CLIENTS, WRITER) as made:
        world = NamespacedCluster(directory, made, nodes=len(NODES), options=OPTIONS)
        try:
            await trio.to_thread.run_sync(world.start, SECONDS_MAX)
            yield made, world
        except BaseException:
            show_logs(world)
            raise
        finally:
            with trio.CancelScope(shield=True):
                made.heal()
                await trio.to_thread.run_sync(world.stop)


async def run(made: Net, world: NamespacedCluster, partitions: Partitions, *, show: bool = False) -> Workload:
    """Cut so often; the workload that went on meanwhile, judged. Raises AssertionError with the history."""
    async with AsyncExitStack() as stack:
        clients = []
        for name in CLIENTS:
            opened = client(world, environment=InPlace(made.places[name]))
            clients.append(await stack.enter_async_context(opened))
        kv = clients[0]
        await settled(kv)
        workload = Workload(partitions.seed, clients)
        strike = partial(_cut_once, made, world, partitions, workload, clients)
        await workload.run_under(partitions, strike, kv, show=show)
    return workload


async def _cut_once(
    made: Net,
    world: NamespacedCluster,
    partitions: Partitions,
    workload: Workload,
    clients: list[Client],
    chance: random.Random,
) -> None:
    kv = clients[0]
    key = workload.key(chance)
    leader = await leader_of(kv, key)
    kind = FROM_PEERS if partitions.done % 2 else OTHERS[partitions.done // 2 % len(OTHERS)]
    victim = leader if kind == FROM_PEERS or chance.random() < 0.7 else chance.choice(NODES)
    over = trio.Event()
    _cut(made, kind, victim, chance)
    try:
        if kind == FROM_PEERS:
            addresses = ",".join(world.addresses[name] for name in NODES if name != victim)
            async with client(world, addresses=addresses, environment=InPlace(made.places[WRITER])) as writer:
                await _hunt(made, workload, key, writer, clients, over, FROM_PEERS_SECONDS)
        else:
            await _hunt(made, workload, key, kv, clients[1:], over, chance.choice(SECONDS))
    finally:
        made.heal()
    partitions.done += 1
    partitions.kinds[kind] += 1
    if victim == leader and kind != "client":
        partitions.leaders += 1
        partitions.deposed += await leader_of(kv, key) != leader


async def _hunt(
    made: Net,
    workload: Workload,
    key: bytes,
    writer: Client,
    readers: Sequence[Client],
    over: trio.Event,
    seconds: float,
) -> None:
    """Write and read a key for so long; then the network heals, so that what is under way comes to its end."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(workload.hunt, key, writer, readers, over)
        await trio.sleep(seconds)
        made.heal()
        over.set()


def _cut(made: Net, kind: str, victim: str, chance: random.Random) -> None:
    others = [name for name in NODES if name != victim]
    match kind:
        case "alone":
            made.isolate([victim])
        case "with a client":
            made.isolate([victim, chance.choice(CLIENTS[1:])])
        case "deaf":
            for other in others:
                made.cut(other, victim)
        case "mute":
            for other in others:
                made.cut(victim, other)
        case "one link":
            made.cut(victim, chance.choice(others))
        case "cable":
            made.unplug(victim)
        case "client":
            made.isolate([chance.choice(CLIENTS)])
        case "from its peers":
            for other in others:
                made.cut(victim, other)
                made.cut(other, victim)
            made.refuse(WRITER, victim)
        case "nobody hears anybody":
            for name in NODES:
                made.isolate([name])
        case _:
            raise AssertionError(kind)


def main(arguments: Sequence[str]) -> None:
    """The subcommand."""
    parser = argparse.ArgumentParser(prog="python -m tests.cluster.soak partitions", description=__doc__)
    parser.add_argument("--partitions", type=int, default=32)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args(arguments)
    problem = obstacle()
    if problem is not None:
        raise SystemExit(f"no partitions here: {problem}")
    trio.run(_soak, Partitions(given.partitions, given.seed))


async def _soak(partitions: Partitions) -> None:
    with tempfile.TemporaryDirectory() as directory:
        async with namespaced(Path(directory)) as (made, world):
            workload = await run(made, world, partitions, show=True)
    print(
        f"partitions: {partitions.describe()}; {workload.describe()}; every history is linearizable, nothing was lost"
    )
