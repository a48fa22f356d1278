"""Clusters under a workload and every kind of fault, in virtual time; afterwards everything is checked.

    python -m tests.server.soak --seeds 50          seeds 1 to 50, one after the other
    python -m tests.server.soak --seed 17           one run, again exactly as it was

A run forms a cluster, lets clients work while faults come and go, then heals everything and looks: no client call
outlived its timeout, writes go on within a bounded time, every key's history is linearizable (so no acknowledged write
is lost and no increment counts twice), replicas that applied the same index hold the same rows, and the ranges tile the
key space. The invariants of every node are checked all along.
"""

import argparse
import random
import statistics
import sys
import time
from collections.abc import Awaitable, Callable
from itertools import pairwise
from typing import Any

import trio

from shardkv.errors import (
    NotAnInteger,
    OutcomeUnknown,
    ShardKVError,
    Unavailable,
    VersionMismatch,
)
from shardkv.machine.snapshot import snapshot_rows
from shardkv.simulation import ChooseAtRandom, run_deterministically
from shardkv.simulation.checkers.linearizability import Operation, Outcome, linearizable
from shardkv.types import PLACEMENT_RANGE
from shardkv.wire.requests import Method
from shardkv_client import Client
from tests.server.world import Cluster, SimulatedNode, world

CLIENTS = 4
KEYS = 8
CALL_SECONDS = 3.0
FAULT_SECONDS = 8.0
HEAL_SECONDS_MAX = 5.0
"""From the moment when everything is healed to the next successful write of every key."""
CHECK_SECONDS = 0.25

FAULTS = (
    *("partition", "one way", "drop", "cut", "kill", "kill", "power", "power", "all", "stop"),
    *("slow", "drift", "step", "stall", "split", "transfer", "flush", "heal"),
)


class Soak:
    """One run."""

    def __init__(self, seed: int, *, nodes: int = 3, fault_seconds: float = FAULT_SECONDS) -> None:
        self.seed = seed
        self.chance = random.Random(f"soak {seed}")
        self.nodes = nodes
        self.fault_seconds = fault_seconds
        self.keys = [b"%c%d" % (ord("a") + 3 * number, number) for number in range(KEYS)]
        self.histories: dict[bytes, list[Operation]] = {key: [] for key in self.keys}
        self.faults: list[str] = []
        self.stop = trio.Event()
        self.calls = 0
        self.heal_seconds = 0.0

    async def run(self) -> None:
        async with world(self.nodes, seed=self.seed, split_bytes=16_384) as cluster:
            async with trio.open_nursery() as nursery:
                for number in range(CLIENTS):
                    nursery.start_soon(self._work, cluster, number)
                nursery.start_soon(self._watch, cluster)
                end = trio.current_time() + self.fault_seconds
                while trio.current_time() < end:
                    await trio.sleep(self.chance.uniform(0.05, 0.6))
                    await self._fault(cluster)
                await self._heal(cluster)
                await self._writes_go_on(cluster)
                self.stop.set()
            await self._final(cluster)

    # The workload

    async def _work(self, cluster: Cluster, number: int) -> None:
        chance = random.Random(f"client {self.seed} {number}")
        async with cluster.client() as kv:
            while not self.stop.is_set():
                await self._one_call(kv, chance)
                await trio.sleep(chance.uniform(0, 0.06))

    async def _one_call(self, kv: Client, chance: random.Random) -> None:
        key = chance.choice(self.keys)
        history = self.histories[key]
        known = [each.outcome.result for each in history[-12:] if each.kind == "put" and each.outcome]
        numeric = key == self.keys[0] or key == self.keys[-1]
        value = b"%d" % chance.randrange(100) if numeric else b"%d " % len(history) + bytes(chance.randrange(800))
        calls: list[tuple[Operation, Callable[[], Awaitable[Any]]]] = [
            (Operation("get"), lambda: kv.get(key, timeout=CALL_SECONDS)),
            (Operation("get"), lambda: kv.get(key, consistency="follower", timeout=CALL_SECONDS)),
            (Operation("put", value), lambda: kv.put(key, value, timeout=CALL_SECONDS)),
            (Operation("delete"), lambda: kv.delete(key, timeout=CALL_SECONDS)),
        ]
        if numeric:
            calls[2:] = [(Operation("increment", 1), lambda: kv.increment(key, timeout=CALL_SECONDS))] * 2
        else:
            version = chance.choice([0, *(each for each in known if each)])
            operation = Operation("put", value, version)
            calls.append((operation, lambda: kv.put(key, value, if_version=version, timeout=CALL_SECONDS)))
        operation, call = chance.choice(calls)
        await self._record(history, operation, call)

    async def _record(self, history: list[Operation], operation: Operation, call: Callable[[], Awaitable[Any]]) -> None:
        operation.called = trio.current_time()
        self.calls += 1
        try:
            with trio.fail_after(CALL_SECONDS + 1):
                result = await call()
        except VersionMismatch as error:
            operation.outcome = Outcome(mismatch=error.current)
        except (Unavailable, NotAnInteger):
            return
        except OutcomeUnknown:
            history.append(operation)
            return
        else:
            if operation.kind == "get" and result is not None:
                result = (result.value, result.version)
            operation.outcome = Outcome(result)
        operation.returned = trio.current_time()
        history.append(operation)

    async def _watch(self, cluster: Cluster) -> None:
        while not self.stop.is_set():
            check(cluster)
            await trio.sleep(CHECK_SECONDS)

    # Faults

    async def _fault(self, cluster: Cluster) -> None:
        chance, network = self.chance, cluster.network
        names = list(cluster.nodes)
        one, two = chance.sample(names, 2)
        fault = chance.choice(FAULTS)
        self.faults.append(f"{trio.current_time():.2f} {fault} {one} {two}")
        node = cluster.nodes[one]
        match fault:
            case "partition":
                network.partition([one], [name for name in names if name != one])
            case "one way":
                network.block(one, two)
            case "drop":
                network.drop(one, two)
            case "cut":
                network.cut_after(one, two, chance.randrange(20_000))
            case "kill" if node.alive:
                await node.kill(kept_batches=self._kept)
                await self._restart_later(node)
            case "power" if node.alive:
                await node.power_off(kept_batches=self._kept, chooser=ChooseAtRandom(chance))
                await self._restart_later(node)
            case "stop" if node.alive:
                await node.shut_down()
                await self._restart_later(node)
            case "all" if chance.random() < 0.3:
                for each in cluster.nodes.values():
                    if each.alive:
                        await each.power_off(kept_batches=self._kept, chooser=ChooseAtRandom(chance))
                for each in cluster.nodes.values():
                    each.start_soon()
            case "slow":
                link = network.link(one, two)
                link.delay_seconds_max = chance.choice([0.0005, 0.02, 0.2])
            case "drift":
                node.environment.clock.set_drift(chance.uniform(-0.004, 0.004))
            case "step":
                node.environment.clock.wall_offset_ms = chance.randrange(-200, 200)
            case "stall":
                node.environment.disk.stall()
                cluster.nursery.start_soon(_resume, node, node.environment, chance.uniform(0.05, 1.5))
            case "split" | "transfer" | "flush":
                cluster.nursery.start_soon(self._admin, cluster, fault, chance.choice(self.keys), chance.random())
            case "heal":
                network.heal()
                for name in names:
                    for other in names:
                        if name != other:
                            network.link(name, other).delay_seconds_max = 0.0005

    def _kept(self, count: int) -> int:
        return self.chance.choice([0, count, self.chance.randint(0, count)])

    async def _restart_later(self, node: SimulatedNode) -> None:
        await trio.sleep(self.chance.uniform(0, 1.5))
        node.start_soon()

    async def _admin(self, cluster: Cluster, what: str, key: bytes, where: float) -> None:
        try:
            async with cluster.client() as kv:
                ((descriptor, _),) = await kv.call(Method.ROUTES, key, 1, timeout=CALL_SECONDS)
                range_id = descriptor[0]
                if what == "split":
                    await kv.call(Method.SPLIT, key, key=key, timeout=CALL_SECONDS)
                elif what == "flush":
                    for node in cluster.nodes.values():
                        if node.alive and node.ready.is_set():
                            await node.inside.maintenance.flush_and_compact()
                else:
                    nodes = [each[0] for each in descriptor[5]]
                    target = nodes[int(where * len(nodes))]
                    await kv.call(Method.TRANSFER, range_id, target, range_id=range_id, timeout=CALL_SECONDS)
        except (ShardKVError, ValueError, AttributeError, trio.ClosedResourceError):
            pass

    async def _heal(self, cluster: Cluster) -> None:
        self.faults.append(f"{trio.current_time():.2f} healed for good")
        network = cluster.network
        network.heal()
        for name in cluster.nodes:
            for other in cluster.nodes:
                if name != other:
                    network.link(name, other).delay_seconds_max = 0.0005
        for node in cluster.nodes.values():
            node.environment.disk.resume()
            node.environment.clock.set_drift(0)
            node.environment.clock.wall_offset_ms = 0
        with trio.fail_after(30):
            for node in cluster.nodes.values():
                if not node.alive:
                    node.start_soon()
                await node.ready.wait()

    # Afterwards

    async def _writes_go_on(self, cluster: Cluster) -> None:
        healed = trio.current_time()
        async with cluster.client() as kv:
            for key in self.keys:
                await self._write_until_done(kv, key, healed)
        self.heal_seconds = trio.current_time() - healed

    async def _write_until_done(self, kv: Client, key: bytes, healed: float) -> None:
        while True:
            operation = Operation("put", b"7")
            history = self.histories[key]
            before = len(history)
            await self._record(history, operation, lambda: kv.put(key, b"7", timeout=CALL_SECONDS))
            if len(history) > before and operation.outcome is not None:
                break
            elapsed = trio.current_time() - healed
            assert elapsed < HEAL_SECONDS_MAX, f"no write of {key!r} for {elapsed:.1f} s after everything was healed"
        elapsed = trio.current_time() - healed
        assert elapsed < HEAL_SECONDS_MAX, f"the write of {key!r} took {elapsed:.1f} s after everything was healed"

    async def _final(self, cluster: Cluster) -> None:
        async with cluster.client() as kv:
            for key in self.keys:
                history = self.histories[key]
                await self._record(history, Operation("get"), lambda key=key: kv.get(key))  # type: ignore[misc]
        await agree(cluster)
        check(cluster)
        tile(cluster)
        for key, history in self.histories.items():
            assert linearizable(history), f"the history of {key!r} is not linearizable:\n" + "\n".join(
                map(str, sorted(history, key=lambda each: each.called))
            )


async def _resume(node: SimulatedNode, environment: Any, seconds: float) -> None:
    await trio.sleep(seconds)
    environment.disk.resume()


def check(cluster: Cluster) -> None:
    """The invariants of every node that runs."""
    for node in cluster.nodes.values():
        if node.alive and node.ready.is_set():
            node.check()


async def agree(cluster: Cluster) -> None:
    """Wait until every range's replicas have applied the same index; their rows must then be the same."""
    with trio.move_on_after(20):
        while _apart(cluster):  # noqa: ASYNC110
            await trio.sleep(0.05)
    for range_id, held in _machines(cluster).items():
        indexes = [machine.applied_index for _, machine in held]
        assert len(set(indexes)) == 1, f"the replicas of range {range_id} stand at {indexes}"
        rows = [dict(snapshot_rows(node.engine, machine.descriptor)) for node, machine in held]
        assert all(each == rows[0] for each in rows), f"the replicas of range {range_id} differ at {indexes[0]}"


def _apart(cluster: Cluster) -> bool:
    if any(replica.machine is None for node in cluster.nodes.values() for replica in _replicas(node)):
        return True
    return any(len({machine.applied_index for _, machine in held}) > 1 for held in _machines(cluster).values())


def _replicas(node: SimulatedNode) -> list[Any]:
    return list(node.inside.catalog.replicas.values())


def _machines(cluster: Cluster) -> dict[int, list[tuple[SimulatedNode, Any]]]:
    found: dict[int, list[tuple[SimulatedNode, Any]]] = {}
    for node in cluster.nodes.values():
        for range_id, replica in node.inside.catalog.replicas.items():
            assert replica.machine is not None, f"range {range_id} never got its state on {node.name}"
            found.setdefault(range_id, []).append((node, replica.machine))
    return found


def tile(cluster: Cluster) -> None:
    """The ranges cover every key, once."""
    spans = sorted(
        held[0][1].descriptor.span for range_id, held in _machines(cluster).items() if range_id != PLACEMENT_RANGE
    )
    assert spans[0].start == b"", spans
    assert spans[-1].end is None, spans
    assert all(one.end == two.start for one, two in pairwise(spans)), spans


def run(seed: int, *, nodes: int = 3, fault_seconds: float = FAULT_SECONDS) -> Soak:
    """One run from its seed. An AssertionError, or whatever else stopped it, carries the command that repeats it."""
    soak = Soak(seed, nodes=nodes, fault_seconds=fault_seconds)
    try:
        run_deterministically(soak.run, seed=seed)
    except BaseException as error:
        error.add_note(
            f"seed {seed}; to repeat it: python -m tests.server.soak --seed {seed} --nodes {nodes} "
            f"--fault-seconds {fault_seconds:g}\nfaults:\n  " + "\n  ".join(soak.faults)
        )
        raise
    return soak


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10, help="how many, from --first on")
    parser.add_argument("--first", type=int, default=1)
    parser.add_argument("--seed", type=int, help="just this one")
    parser.add_argument("--nodes", type=int, default=3)
    parser.add_argument("--fault-seconds", type=float, default=FAULT_SECONDS)
    arguments = parser.parse_args()
    seeds = range(arguments.first, arguments.first + arguments.seeds)
    if arguments.seed is not None:
        seeds = range(arguments.seed, arguments.seed + 1)
    failed, heals = [], []
    for seed in seeds:
        started = time.monotonic()
        try:
            soak = run(seed, nodes=arguments.nodes, fault_seconds=arguments.fault_seconds)
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt) or len(seeds) == 1:
                raise
            failed.append(seed)
            print(f"seed {seed} FAILED: {_reason(error)}", flush=True)
            continue
        heals.append(soak.heal_seconds)
        print(
            f"seed {seed} ok: {soak.calls} calls, {len(soak.faults)} faults, healed in {soak.heal_seconds:.2f} s, "
            f"{time.monotonic() - started:.1f} s",
            flush=True,
        )
    if heals:
        print(f"{len(heals)} ok; time to heal: median {statistics.median(heals):.2f} s, worst {max(heals):.2f} s")
    if failed:
        print(f"{len(failed)} failed: {failed}; repeat one with python -m tests.server.soak --seed {failed[0]}")
    return 1 if failed else 0


def _reason(error: BaseException) -> str:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return f"{type(error).__name__}: {str(error)[:300]}"


if __name__ == "__main__":
    sys.exit(main())
