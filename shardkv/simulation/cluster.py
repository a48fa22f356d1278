"""A cluster of simulated nodes in one process: real node code, real clients, and every fault a method away.

``async with simulated_cluster(nodes=3, seed=1) as cluster`` gives one that is formed and serves, inside
:func:`~shardkv.simulation.run_deterministically`. Does not live here: which faults come when (``faults``), and what
must hold (``checkers``). The rule: a node is only ever touched as the world touches it, through its environment.
"""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import fields, replace
from typing import Any, Final

import structlog
import trio

from shardkv.config import NodeConfig, RangesConfig, StorageConfig
from shardkv.errors import RoutingError, ShardKVError, Unavailable
from shardkv.multiraft.snapshots import Snapshots
from shardkv.server.internal_client import ClientEnvironment
from shardkv.server.node import run_node
from shardkv.server.parts import Parts
from shardkv.simulation import determinism
from shardkv.simulation.disk import CAPACITY_BYTES, CrashChooser, SimulatedDisk
from shardkv.simulation.environment import SimulatedEnvironment, simulated_environment
from shardkv.simulation.network import SimulatedNetwork
from shardkv.simulation.scheduler import Process
from shardkv.simulation.trace import Trace
from shardkv.storage.engine import Engine, WriteBatch
from shardkv.storage.memory import MemoryEngine
from shardkv.types import RangeId
from shardkv.wire.requests import Method
from shardkv_client import Client, connect

FORMING_SECONDS: Final = 30.0
"""How long a cluster may take to get where a method waits for it to be."""
ASK_AGAIN_SECONDS: Final = 0.1
PORT: Final = 7000
SPLIT_BYTES: Final = 64 * 1024 * 1024
SILENT: Final = 50
"""The level of logging: what a node has to say is of no use to a run that passes."""


def keep_none(count: int) -> int:
    """Of ``count`` unflushed engine batches none survive."""
    return 0


class SimulatedNode:
    """One node: its world, its engine, and the task that runs it.

    ``name``, ``address``, ``config``; ``environment`` holds its disk, clock and network, anew after each crash;
    ``alive`` is whether it runs, ``error`` what it ended with by itself.
    """

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
        self.starts = 0
        self.out_of_service = False
        """Somebody works on its disk: it is not started meanwhile."""
        self._buried = True
        self._inside: Parts | None = None
        self._process = Process()

    @property
    def address(self) -> str:
        return self.config.listen

    @property
    def paused(self) -> bool:
        return self._process.suspended

    @property
    def serving(self) -> bool:
        """Whether it runs and has said that it is ready."""
        return self.alive and self.ready.is_set()

    @property
    def inside(self) -> Parts:
        """The parts of the node that runs, or ran last, to look into."""
        assert self._inside is not None, f"{self.name} has not been put together yet"
        return self._inside

    @property
    def composed(self) -> bool:
        """Whether the node that runs now has been put together, so that there is something to look into."""
        return self.alive and self._inside is not None

    def check(self) -> None:
        """Every invariant of a running node."""
        inside = self.inside
        inside.catalog.check()
        for replica in inside.catalog.replicas.values():
            replica.check()
        inside.driver.space.check()
        if isinstance(inside.driver.snapshots, Snapshots):
            inside.driver.snapshots.check()
        inside.wal.check()
        inside.clock_health.check()
        contradicted = list(inside.listener.contradictions)
        assert not contradicted, f"{self.name} was sent what its logs of ranges {contradicted} contradict"

    # Starting

    async def start(self) -> None:
        """Run until it is ready."""
        self.start_soon()
        with trio_deadline(FORMING_SECONDS, f"{self.name} did not become ready"):
            await self.ready.wait()

    def start_soon(self) -> None:
        """Start a node that is down, without waiting for it. Does nothing to one that is up or is still dying."""
        if self.alive or not self._buried or self.out_of_service:
            return
        self.scope, self.stop, self.ready, self.ended = trio.CancelScope(), trio.Event(), trio.Event(), trio.Event()
        self.alive = True
        self.error = None
        self.starts += 1
        self._inside = None
        self._process = Process()
        self.cluster.nursery.start_soon(self._run, self.environment, self._process)

    async def _run(self, environment: SimulatedEnvironment, process: Process) -> None:
        process.run_here()
        try:
            with self.scope:
                await self._run_node()
            if self.alive and environment is self.environment and not self.stop.is_set():
                raise AssertionError(f"{self.name} ended by itself, and without an error")
        except Exception as error:
            if not self.alive or environment is not self.environment:
                return  # What the remains of a crashed node say counts for nothing.
            self.error = error
            if not self.cluster.tolerates(self, error):
                raise
            self._die(power=False, kept_batches=keep_none, chooser=None)
            self._bury()
        finally:
            self.ended.set()

    async def _run_node(self) -> None:
        await run_node(
            self.config,
            self.environment,
            ready=lambda name, address: self.ready.set(),
            stop=self.stop,
            open_engine=self._open_engine,
            observe=self._observe,
        )

    def _open_engine(self, config: NodeConfig, path: str) -> Engine:
        return self.engine

    def _observe(self, inside: Parts) -> None:
        self._inside = inside
        for observer in self.cluster.observers:
            observer(self, inside)

    async def run_to_its_end(self) -> None:
        """Start a node that cannot go on. Raises what it ended with."""
        self.stop = trio.Event()
        with trio_deadline(2 * FORMING_SECONDS, f"{self.name} neither served nor failed"):
            await self._run_node()

    # Pausing

    def pause(self) -> None:
        """SIGSTOP: until :meth:`resume` it does nothing; its clocks go on, and its system takes what is sent to it.

        To a node that is down, or paused, nothing happens.
        """
        if self.alive:
            self._process.suspend()

    def resume(self) -> None:
        """SIGCONT."""
        self._process.resume()

    # Ending

    async def shut_down(self) -> None:
        """SIGTERM. One that is paused ends once it is resumed."""
        self.stop.set()
        with trio_deadline(FORMING_SECONDS, f"{self.name} did not stop"):
            await self.ended.wait()
        if self.alive:
            self._die(power=False, kept_batches=lambda count: count, chooser=None)
            self._bury()

    async def kill(self, *, kept_batches: Callable[[int], int] = keep_none) -> None:
        """kill -9: the log as it was written; of the engine, what was flushed and ``kept_batches`` of the rest."""
        self._die(power=False, kept_batches=kept_batches, chooser=None)
        await self.buried()

    async def power_off(
        self, *, kept_batches: Callable[[int], int] = keep_none, chooser: CrashChooser | None = None
    ) -> None:
        """The machine dies: what was synced is left, and of the rest what ``chooser`` says."""
        self._die(power=True, kept_batches=kept_batches, chooser=chooser)
        await self.buried()

    def crash_at_call(
        self,
        number: int,
        *,
        power: bool = False,
        kept_batches: Callable[[int], int] = keep_none,
        chooser: CrashChooser | None = None,
    ) -> None:
        """Let the node die inside its call ``number`` of disk, network or sleep, as :meth:`kill` or :meth:`power_off`.

        ``environment.calls.count`` is the number of the last one made. Wait for it with :meth:`buried`.
        """

        def die() -> None:
            if self.alive:
                self._die(power=power, kept_batches=kept_batches, chooser=chooser)
                self.cluster.nursery.start_soon(self.buried)

        self.environment.calls.crash_at(number, die)

    def _die(self, *, power: bool, kept_batches: Callable[[int], int], chooser: CrashChooser | None) -> None:
        """At this moment. What its tasks still do leaves no trace."""
        assert self.alive, f"{self.name} is not running"
        self.alive = False
        self._buried = False
        self.environment.calls.disarm()
        if power:
            self.environment.power_off(chooser)
        else:
            self.environment.kill()
        self.engine = self.engine.crash(kept_batches)
        self.scope.cancel()
        self.resume()

    async def buried(self) -> None:
        """Wait until nothing of a node that was told to die runs any more; then it can be started again.

        Does nothing to one that is up.
        """
        if not self.alive and self.starts:
            await self.ended.wait()
            self._bury()

    def _bury(self) -> None:
        if not self.alive and not self._buried:
            self._buried = True
            self.environment = self.environment.restart()

    # The disk of a node that is down

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
            calls=self.environment.calls,
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


class Cluster:
    """The nodes by name, their network and their clients. See the module.

    A node that ends with an error fails the run unless ``tolerates(node, error)``, which says what ``tolerant`` does.
    ``observers`` are called with each node that is put together, and its parts.
    """

    def __init__(
        self,
        nursery: trio.Nursery,
        network: SimulatedNetwork,
        seed: int | str,
        split_bytes: int = SPLIT_BYTES,
        trace: Trace | None = None,
    ) -> None:
        self.nursery = nursery
        self.network = network
        self.seed = seed
        self.trace = trace
        self.nodes: dict[str, SimulatedNode] = {}
        self.tolerant = False
        """Whether nodes may end by themselves, with an error."""
        self.tolerates: Callable[[SimulatedNode, Exception], bool] = lambda node, error: self.tolerant
        self.observers: list[Callable[[SimulatedNode, Parts], None]] = []
        self._split_bytes = split_bytes
        self._clients = 0
        network.trace = trace

    @property
    def addresses(self) -> str:
        """Of all nodes, as ``connect`` takes them."""
        return ",".join(node.address for node in self.nodes.values())

    @property
    def now(self) -> float:
        """Virtual seconds since the run began."""
        return determinism.now()

    async def sleep(self, seconds: float) -> None:
        """Let virtual time pass."""
        await determinism.sleep(seconds)

    def add(self, name: str, **changes: Any) -> SimulatedNode:
        """A node that is not started yet; the first one bootstraps, the others join it.

        ``changes`` are fields of :class:`shardkv.config.NodeConfig`.
        """
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

    def client_environment(self) -> ClientEnvironment:
        """What a client lives in, for ``connect(cluster.addresses, environment=…)``: a machine of its own."""
        self._clients += 1
        return ClientEnvironment(simulated_environment(f"client{self._clients}", seed=self.seed, network=self.network))

    @asynccontextmanager
    async def client(self, *names: str) -> AsyncIterator[Client]:
        """A client that knows these nodes, or all. The first one's machine is called ``client1``, and so on."""
        addresses = ",".join(self.nodes[name].address for name in names or self.nodes)
        async with connect(addresses, environment=self.client_environment()) as client:
            yield client

    # Faults that are not one node's; see also ``network``

    def partition(self, *groups: list[str]) -> None:
        """Nothing gets through between nodes (or clients) of different groups, until :meth:`heal`."""
        self.network.partition(*groups)

    def heal(self) -> None:
        """Every link works as it did at the start, no disk stalls, fills or lies, no node is paused, every clock is
        right."""
        self.network.heal()
        self.network.restore_links()
        for node in self.nodes.values():
            node.resume()
            node.environment.calls.disarm()
            disk, clock = node.environment.disk, node.environment.clock
            disk.resume()
            disk.mend()
            disk.on_read = disk.on_call = None
            disk.capacity_bytes = CAPACITY_BYTES
            clock.set_drift(0)
            clock.wall_offset_ms = 0

    async def restart_all(self) -> None:
        """Start every node that is down, and wait until all are ready."""
        for node in self.nodes.values():
            if not node.alive:
                await node.buried()
            node.start_soon()
        for node in self.nodes.values():
            with trio_deadline(FORMING_SECONDS, f"{node.name} did not become ready"):
                await node.ready.wait()

    # Waiting

    async def ask(self, client: Client, method: Method, *arguments: Any, **how: Any) -> Any:
        """A request that is repeated until the cluster is in a state to answer it."""
        with trio_deadline(FORMING_SECONDS, f"{method!r} was not answered"):
            while True:
                try:
                    return await client.call(method, *arguments, **how)
                except (RoutingError, Unavailable):
                    await determinism.sleep(ASK_AGAIN_SECONDS)

    async def until(self, client: Client, wanted: Callable[[dict[str, Any], list[dict[str, Any]]], bool]) -> None:
        """Wait until ``wanted(status, ranges)`` holds."""
        status: Any = None
        ranges: Any = None
        with determinism.deadline_after(FORMING_SECONDS):
            while True:
                try:
                    status, ranges = await client.call(Method.STATUS), await client.call(Method.RANGES)
                    if wanted(status, ranges):
                        return
                except ShardKVError:
                    pass
                await determinism.sleep(ASK_AGAIN_SECONDS)
        raise AssertionError(f"the cluster did not get there in {FORMING_SECONDS} s: {status}, {ranges}")

    async def formed(self, client: Client) -> None:
        """Wait until every range has as many replicas as it should, and leaders are where they should be."""
        count = len(self.nodes)
        await self.until(
            client,
            lambda status, ranges: (
                status["live"] == count
                and status["settled"]
                and all(len(each["replicas"]) == self._replicas for each in ranges)
            ),
        )

    async def grown(self) -> None:
        """Wait until every range has as many voters as it should, whoever leads. Looks at the nodes, asks nobody."""
        while not self._all_vote():
            await determinism.sleep(ASK_AGAIN_SECONDS)

    @property
    def _replicas(self) -> int:
        return 3 if len(self.nodes) >= 3 else 1

    def _all_vote(self) -> bool:
        held: set[RangeId] = set()
        complete: set[RangeId] = set()
        for node in self.nodes.values():
            for range_id, replica in node.inside.catalog.replicas.items() if node.composed else ():
                held.add(range_id)
                configuration = replica.raft.configuration
                if replica.leads and len(configuration.voters) >= self._replicas and not configuration.voters_outgoing:
                    complete.add(range_id)
        return bool(held) and held == complete

    def _leads(self, key: bytes) -> SimulatedNode | None:
        """The node whose replica leads the key's range in the latest term. Looks at the nodes, asks nobody."""
        found: tuple[int, SimulatedNode] | None = None
        for node in self.nodes.values():
            replica = node.inside.catalog.replica_for_key(key) if node.serving else None
            if replica is not None and replica.leads and (found is None or replica.raft.term > found[0]):
                found = (replica.raft.term, node)
        return None if found is None else found[1]

    async def leader_of(self, client: Client, key: bytes) -> SimulatedNode:
        """The node that leads the key's range now."""
        with trio_deadline(FORMING_SECONDS, f"nobody leads the range of {key!r}"):
            while True:
                try:
                    ((_, leader),) = await client.call(Method.ROUTES, key, 1)
                    table = {each[0]: each[1] for each in await client.call(Method.NODES)}
                    if leader is not None and self.nodes[table[leader]].alive:
                        return self.nodes[table[leader]]
                    found = self._leads(key)
                    if leader is None and found is not None:
                        return found  # a node that holds no replica of the range may not know
                except ShardKVError:
                    pass
                await determinism.sleep(ASK_AGAIN_SECONDS / 2)


class trio_deadline:  # a function in all but its shape
    """Raise an AssertionError that says ``what`` when the body takes longer than ``seconds`` of virtual time."""

    def __init__(self, seconds: float, what: str) -> None:
        self._seconds = seconds
        self._what = what
        self._scope = determinism.deadline_after(seconds)

    def __enter__(self) -> None:
        self._scope.__enter__()

    def __exit__(self, *error: Any) -> bool | None:
        handled = self._scope.__exit__(*error)
        if self._scope.cancelled_caught:
            raise AssertionError(f"{self._what} within {self._seconds:g} s")
        return handled


@asynccontextmanager
async def simulated_cluster(
    nodes: int = 3,
    *,
    seed: int | str = 1,
    split_bytes: int = SPLIT_BYTES,
    trace: Trace | None = None,
    network: SimulatedNetwork | None = None,
    **changes: Any,
) -> AsyncIterator[Cluster]:
    """A formed cluster of nodes ``n1``, ``n2`` and so on: every range has all its replicas, leaders are in place.

    Args:
        seed: all chance in nodes, network and disks follows from it; give the same to ``run_deterministically``.
        split_bytes: the size at which ranges split.
        trace: records what happens.
        network: one of your own making.
        changes: to each node's :class:`shardkv.config.NodeConfig`.

    Raises ValueError for less than one node, TypeError for a change of what no node has.
    """
    if nodes < 1:
        raise ValueError(f"a simulated cluster has at least one node; nodes={nodes} is none")
    settings = [field.name for field in fields(NodeConfig)]
    unknown = [name for name in changes if name not in settings]
    if unknown:
        raise TypeError(f"a simulated cluster takes no {', '.join(unknown)}; of each node: {', '.join(settings)}")
    configured = structlog.is_configured()
    if not configured:
        structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(SILENT))
    try:
        async with trio.open_nursery() as nursery:
            cluster = Cluster(nursery, network or SimulatedNetwork(seed), seed, split_bytes, trace)
            try:
                for number in range(nodes):
                    await cluster.add(f"n{number + 1}", **changes).start()
                async with cluster.client() as client:
                    await cluster.formed(client)
                yield cluster
            finally:
                # Whoever would have ended a stall may be cancelled; a log that is being closed waits for its disk.
                for node in cluster.nodes.values():
                    node.environment.disk.resume()
                    node.resume()
            nursery.cancel_scope.cancel()
    finally:
        if not configured:
            structlog.reset_defaults()
