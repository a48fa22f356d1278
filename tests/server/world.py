"""A cluster of simulated nodes in virtual time: real node code, real client, simulated network, disk and clock.

``async with world(nodes=3) as cluster`` gives one that is formed. Everything that a test does to it is a method.
"""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any, ClassVar

import structlog
import trio

from shardkv.config import NodeConfig, RangesConfig, StorageConfig
from shardkv.errors import RoutingError, ShardKVError, Unavailable
from shardkv.server import node as node_module
from shardkv.server.internal_client import ClientEnvironment
from shardkv.server.node import run_node
from shardkv.simulation.disk import CrashChooser, SimulatedDisk
from shardkv.simulation.environment import SimulatedEnvironment, simulated_environment
from shardkv.simulation.network import SimulatedNetwork
from shardkv.storage.engine import Engine, WriteBatch
from shardkv.storage.memory import MemoryEngine
from shardkv.wire.requests import Method
from shardkv_client import Client, connect

FORMING_SECONDS = 30.0
PORT = 7000


class Recorder:
    """A requester that remembers what it was told."""

    def __init__(self) -> None:
        self.result: Any = None
        self.error: ShardKVError | None = None
        self.count = 0

    def answer(self, request_id: int, result: Any) -> None:
        self.result = result
        self.count += 1

    def refuse(self, request_id: int, error: ShardKVError) -> None:
        self.error = error
        self.count += 1


class _Inside(node_module._Node):
    """The composition of a node, within reach of tests: the last one made for each environment."""

    made: ClassVar[dict[int, "_Inside"]] = {}

    def __init__(self, config: NodeConfig, environment: Any, *rest: Any) -> None:
        super().__init__(config, environment, *rest)
        self.made[id(environment)] = self


node_module._Node = _Inside  # type: ignore[misc]


class SimulatedNode:
    """One node: its world, its engine, and the task that runs it."""

    def __init__(self, cluster: "Cluster", name: str, config: NodeConfig, environment: SimulatedEnvironment) -> None:
        self.cluster = cluster
        self.name = name
        self.config = config
        self.environment = environment
        self.engine = MemoryEngine(crashable=True)
        self.scope = trio.CancelScope()
        self.stop = trio.Event()
        self.ready = trio.Event()
        self.ended = trio.Event()
        self.error: BaseException | None = None
        self.alive = False

    @property
    def address(self) -> str:
        return self.config.listen

    @property
    def inside(self) -> Any:
        """The node's composition, to look into."""
        return _Inside.made[id(self.environment)]

    def check(self) -> None:
        """Every invariant of a running node."""
        inside = self.inside
        inside._catalog.check()
        for replica in inside._catalog.replicas.values():
            replica.check()
        inside._wal.check()
        inside._hybrid_clock.check()

    async def start(self) -> None:
        """Run until it is ready."""
        self.start_soon()
        with trio.fail_after(FORMING_SECONDS):
            await self.ready.wait()

    def start_soon(self) -> None:
        """Start a node that is down, without waiting for it."""
        if self.alive:
            return
        self.scope, self.stop, self.ready, self.ended = trio.CancelScope(), trio.Event(), trio.Event(), trio.Event()
        self.alive = True
        self.cluster.nursery.start_soon(self._run, self.environment)

    async def _run(self, environment: SimulatedEnvironment) -> None:
        def open_engine(config: NodeConfig, path: str) -> Engine:
            return self.engine

        try:
            with self.scope:
                await run_node(
                    self.config,
                    environment,
                    ready=lambda name, address: self.ready.set(),
                    stop=self.stop,
                    open_engine=open_engine,
                )
        except Exception as error:
            if self.alive and environment is self.environment:
                self.error = error
                self.alive = False
                if not self.cluster.tolerant:
                    raise
        finally:
            self.ended.set()

    async def shut_down(self) -> None:
        """SIGTERM."""
        self.stop.set()
        with trio.fail_after(FORMING_SECONDS):
            await self.ended.wait()
        self.alive = False
        self.environment.kill()
        self._reopen()
        self.environment = self.environment.restart()

    def _reopen(self) -> None:
        self.engine = self.engine.crash(lambda count: count)

    async def kill(self, *, kept_batches: Callable[[int], int] = lambda count: 0) -> None:
        """kill -9: the log as it was written; of the engine, what was flushed and ``kept_batches`` of the rest."""
        self.alive = False
        self.environment.kill()
        self.engine = self.engine.crash(kept_batches)
        self.scope.cancel()
        await self.ended.wait()
        self.environment = self.environment.restart()

    async def run_to_its_end(self) -> None:
        """Start a node that cannot go on. Raises what it ended with."""
        self.stop = trio.Event()
        with trio.fail_after(2 * FORMING_SECONDS):
            await run_node(
                self.config,
                self.environment,
                ready=lambda name, address: None,
                stop=self.stop,
                open_engine=lambda config, path: self.engine,
            )

    def wipe(self) -> None:
        """Somebody emptied the disk of a node that is down."""
        self.restore(SimulatedDisk(), MemoryEngine(crashable=True))

    def restore(self, disk: SimulatedDisk, engine: MemoryEngine) -> None:
        """Somebody put another disk into a node that is down."""
        self.environment = simulated_environment(
            self.name,
            seed=self.cluster.seed,
            network=self.cluster.network,
            disk=disk,
            clock=self.environment.clock,
            incarnation=self.environment.incarnation + 1,
        )
        self.engine = engine

    def copied_engine(self) -> MemoryEngine:
        """A copy of the engine of a node that is down."""
        batch = WriteBatch()
        for key, value in self.engine.scan(b"", b"\xff"):
            batch.put(key, value)
        copy = MemoryEngine(crashable=True)
        copy.write(batch)
        copy.flush()
        return copy

    async def power_off(
        self, *, kept_batches: Callable[[int], int] = lambda count: 0, chooser: CrashChooser | None = None
    ) -> None:
        """The machine dies: what was synced is left, and of the rest what ``chooser`` says."""
        self.alive = False
        self.environment.power_off(chooser)
        self.engine = self.engine.crash(kept_batches)
        self.scope.cancel()
        await self.ended.wait()
        self.environment = self.environment.restart()


class Cluster:
    """The nodes, their network and a client. See the module."""

    def __init__(self, nursery: trio.Nursery, network: SimulatedNetwork, seed: int, split_bytes: int) -> None:
        self.nursery = nursery
        self.network = network
        self.seed = seed
        self.nodes: dict[str, SimulatedNode] = {}
        self.tolerant = False
        self._split_bytes = split_bytes
        self._clients = 0

    def add(self, name: str, **changes: Any) -> SimulatedNode:
        """A node that is not started yet; the first one bootstraps, the others join it."""
        first = next(iter(self.nodes.values()), None)
        config = NodeConfig(
            name=name,
            data=f"/{name}",
            listen=f"{name}:{PORT}",
            bootstrap=first is None,
            join=() if first is None else (first.address,),
            storage=StorageConfig(engine="memory", segment_bytes=256 * 1024),
            ranges=RangesConfig(split_bytes=self._split_bytes),
        )
        environment = simulated_environment(name, seed=self.seed, network=self.network)
        node = SimulatedNode(self, name, replace(config, **changes), environment)
        self.nodes[name] = node
        return node

    @asynccontextmanager
    async def client(self, *names: str) -> AsyncIterator[Client]:
        """A client that knows these nodes, or all."""
        self._clients += 1
        environment = simulated_environment(f"client{self._clients}", seed=self.seed, network=self.network)
        addresses = ",".join(self.nodes[name].address for name in names or self.nodes)
        async with connect(addresses, environment=ClientEnvironment(environment)) as client:
            yield client

    async def ask(self, client: Client, method: Method, *arguments: Any, **how: Any) -> Any:
        """A request that is repeated until the cluster is in a state to answer it."""
        with trio.fail_after(FORMING_SECONDS):
            while True:
                try:
                    return await client.call(method, *arguments, **how)
                except (RoutingError, Unavailable):
                    await trio.sleep(0.1)

    async def until(self, client: Client, wanted: Callable[[dict[str, Any], list[dict[str, Any]]], bool]) -> None:
        """Wait until ``wanted(status, ranges)`` holds."""
        status: Any = None
        ranges: Any = None
        with trio.move_on_after(FORMING_SECONDS):
            while True:
                try:
                    status, ranges = await client.call(Method.STATUS), await client.call(Method.RANGES)
                    if wanted(status, ranges):
                        return
                except ShardKVError:
                    pass
                await trio.sleep(0.1)
        raise AssertionError(f"the cluster did not get there in {FORMING_SECONDS} s: {status}, {ranges}")

    async def leader_of(self, client: Client, key: bytes) -> SimulatedNode:
        """The node that leads the key's range now."""
        with trio.fail_after(FORMING_SECONDS):
            while True:
                try:
                    ((_, leader),) = await client.call(Method.ROUTES, key, 1)
                    table = {each[0]: each[1] for each in await client.call(Method.NODES)}
                    if leader is not None and self.nodes[table[leader]].alive:
                        return self.nodes[table[leader]]
                except ShardKVError:
                    pass
                await trio.sleep(0.05)


@asynccontextmanager
async def world(
    nodes: int = 3, *, seed: int = 1, split_bytes: int = 64 * 1024 * 1024, **changes: Any
) -> AsyncIterator[Cluster]:
    """A formed cluster: every range has as many replicas as it should, and leaders are where they should be.

    ``changes`` are made to each node's configuration.
    """
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(50))
    async with trio.open_nursery() as nursery:
        cluster = Cluster(nursery, SimulatedNetwork(seed), seed, split_bytes)
        for number in range(nodes):
            await cluster.add(f"n{number + 1}", **changes).start()
        async with cluster.client() as client:
            await cluster.until(
                client,
                lambda status, ranges: (
                    status["nodes"] == nodes
                    and status["settled"]
                    and all(len(each["replicas"]) == min(nodes, 3) for each in ranges)
                ),
            )
        yield cluster
        nursery.cancel_scope.cancel()
