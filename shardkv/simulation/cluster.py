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
from shardkv.server.internal_client import ClientEnvironment
from shardkv.server.parts import Parts
from shardkv.simulation import determinism
from shardkv.simulation.disk import CAPACITY_BYTES
from shardkv.simulation.environment import simulated_environment
from shardkv.simulation.network import SimulatedNetwork
from shardkv.simulation.node import SimulatedNode
from shardkv.simulation.patience import FORMING_SECONDS, within
from shardkv.simulation.trace import Trace
from shardkv.types import RangeId
from shardkv.wire.requests import Method
from shardkv_client import Client, connect

ASK_AGAIN_SECONDS: Final = 0.1
PORT: Final = 7000
SPLIT_BYTES: Final = 64 * 1024 * 1024
SILENT: Final = 50
"""The level of logging: what a node has to say is of no use to a run that passes."""


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
            with within(FORMING_SECONDS, f"{node.name} did not become ready"):
                await node.ready.wait()

    # Waiting

    async def ask(self, client: Client, method: Method, *arguments: Any, **how: Any) -> Any:
        """A request that is repeated until the cluster is in a state to answer it."""
        with within(FORMING_SECONDS, f"{method!r} was not answered"):
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
        with within(FORMING_SECONDS, f"nobody leads the range of {key!r}"):
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
