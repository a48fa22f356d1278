"""One node from start to stop.

The order of a start: lock the data directory and count the start, open log and engine, bind the address, join or
bootstrap if the directory is new, bring log and engine to agree, run. The order of a stop: hand leaderships over, send
clients elsewhere, stop the services, flush. Does not live here: what the node is made of (``parts``), and what any part
does.
"""

from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

import structlog
import trio

from shardkv.address import parse_address
from shardkv.config import NodeConfig
from shardkv.environment import Environment, Stream
from shardkv.errors import ConfigError, OutOfSpace, StorageError
from shardkv.machine.clock import HybridClock
from shardkv.server.draining import hand_over_leaderships
from shardkv.server.garbage import Collector
from shardkv.server.internal_client import ClientEnvironment, OwnAddresses, connect_cluster
from shardkv.server.known_nodes import KnownNodesFile
from shardkv.server.membership import become_member, require_way_in
from shardkv.server.missing_data import tell_of_missing_data
from shardkv.server.parts import Parts
from shardkv.server.stop import Stop
from shardkv.server.stores import OpenEngine, Stores, open_engine, open_stores
from shardkv.storage.directory import DataDirectory, open_directory
from shardkv.transport.groups import main_error

if TYPE_CHECKING:
    from shardkv.server.admin import Admin

START_SECONDS: Final = 30.0
"""How long a connection waits for a node that is still starting."""

Ready = Callable[[str, str], None]
Observe = Callable[[Parts], None]


async def run_node(
    config: NodeConfig,
    environment: Environment,
    *,
    ready: Ready,
    stop: trio.Event,
    open_engine: OpenEngine = open_engine,
    collector: Collector | None = None,
    observe: Observe | None = None,
) -> None:
    """Run one node until ``stop`` is set, then drain and stop it cleanly.

    ``ready(name, address)`` is called once the node serves. ``open_engine`` makes its engine; a simulation hands in one
    whose crashes it controls. ``collector`` is the process's collector of cyclic garbage, the module ``gc``: handed in
    by a process that is this node and nothing else, it runs when the node says, until the node ends. ``observe`` is
    handed the node's parts once they are put together: a simulation looks into them. Raises ShardKVError when it cannot
    start, or must not go on: DataDirectoryError, ConfigError, WrongCluster, StorageError; the message says what to do.
    """
    try:
        await _Node(
            config,
            environment,
            ready=ready,
            stop=stop,
            open_engine=open_engine,
            collector=collector,
            observe=observe,
        ).run()
    except BaseExceptionGroup as group:
        raise main_error(group) from group


class _Node:
    """The course of a node's life. Attributes come to be in the order of a start."""

    def __init__(
        self,
        config: NodeConfig,
        environment: Environment,
        *,
        ready: Ready,
        stop: trio.Event,
        open_engine: OpenEngine,
        collector: Collector | None,
        observe: Observe | None,
    ) -> None:
        self._config = config
        self._environment = environment
        self._ready = ready
        self._stop = Stop(stop)
        self._open_engine = open_engine
        self._collector = collector
        self._observe = observe
        self._log: Any = structlog.get_logger().bind(node=config.name)
        self._hybrid_clock = HybridClock(environment.clock, config.clock_offset_max_ms)
        self._serving = trio.Event()
        self._own_addresses = OwnAddresses()
        self._admin: Admin | None = None

    # The start

    async def run(self) -> None:
        config, environment = self._config, self._environment
        self._directory: DataDirectory = await environment.workers.run(
            open_directory, environment.disk, environment.ids, config.data
        )
        try:
            self._directory.require(name=config.name)
            require_way_in(self._directory.identity, config)
            async with open_stores(config, environment, self._directory, self._open_engine, self._log) as stores:
                await self._listen_and_run(stores)
        finally:
            self._directory.close()

    async def _listen_and_run(self, stores: Stores) -> None:
        async with trio.open_nursery() as nursery:
            listener = await nursery.start(self._environment.network.listen, self._config.listen, self._handle)
            address = self._config.advertise or listener.address
            if parse_address(address).is_wildcard:  # which not every name of it shows before it is looked up
                raise ConfigError(
                    f"advertise must be given: listen is {self._config.listen!r}, every interface, which others cannot "
                    "connect to"
                )
            await self._start_admin(nursery)
            if await self._put_together(stores, address, listener.address):
                # Connections may ask for such tasks until the last of them has ended, which is in this nursery.
                self._parts.snapshots.use(nursery)
                self._parts.operations.use(nursery)
                await self._run_services()
            nursery.cancel_scope.cancel()

    async def _handle(self, stream: Stream) -> None:
        """A connection; while the node is starting it waits."""
        with self._environment.clock.deadline(START_SECONDS), self._own_addresses.accepted(stream):
            await self._serving.wait()
        if self._serving.is_set():
            await self._parts.listener.handle(stream)

    async def _start_admin(self, nursery: trio.Nursery) -> None:
        """Before anything that cannot be undone: an address that is in use ends the start."""
        if self._config.admin is not None:
            # Imported here, for a node without it shall load no web server.
            from shardkv.server.admin import Admin

            self._admin = Admin(self._environment, self._log)
            address = await nursery.start(self._admin.run, self._config.admin)
            self._log.info("admin endpoint", address=address)

    async def _put_together(self, stores: Stores, address: str, listens_at: str) -> bool:
        """Become a member, and make the parts of one; False if told to stop before a cluster lets this node in."""
        known_nodes = KnownNodesFile(self._environment, self._directory.path, self._log)
        membership = await become_member(
            self._config,
            self._environment,
            self._directory,
            address=address,
            listens_at=listens_at,
            known_nodes=known_nodes,
            own=self._own_addresses,
            stop=self._stop.asked,
            log=self._log,
        )
        if membership is None:
            return False
        self._parts = Parts(
            self._config,
            self._environment,
            directory=self._directory,
            stores=stores,
            membership=membership,
            address=address,
            known_nodes=known_nodes,
            hybrid_clock=self._hybrid_clock,
            collector=self._collector,
            stop=self._stop,
            log=self._log,
        )
        if self._observe is not None:
            self._observe(self._parts)
        return True

    # The services

    async def _run_services(self) -> None:
        parts, clock = self._parts, self._environment.clock
        placement, others = parts.placement, parts.others
        async with trio.open_nursery() as nursery:
            await nursery.start(parts.driver.run)
            others.connect()
            others.warn_if_lost(parts.catalog)
            await nursery.start(parts.pool.run)
            await nursery.start(parts.clock_health.run, others.ids)
            self._serving.set()
            client_environment = ClientEnvironment(self._environment)
            identity = parts.identity
            async with connect_cluster(
                client_environment, others.seeds(), identity.cluster_id, identity.node_id
            ) as call:
                placement.group.call = call
                nursery.start_soon(placement.run)
                nursery.start_soon(parts.introduction.register)
                nursery.start_soon(others.known_nodes.run)
                nursery.start_soon(others.look_where_told)
                nursery.start_soon(tell_of_missing_data, parts.catalog, clock, self._log)
                await nursery.start(parts.maintenance.run)
                await nursery.start(parts.splitter.run)
                await nursery.start(parts.probe.run)
                await nursery.start(parts.disk_health.run, parts.driver, placement.reporting.beat_soon)
                if self._admin is not None:
                    self._admin.observe(parts)
                self._log.info("started", address=parts.identity.address, boot=parts.identity.boot)
                if await parts.introduction.wait():
                    parts.ready.set()
                    self._ready(self._config.name, parts.identity.address)
                if parts.garbage is not None:
                    await nursery.start(parts.garbage.run)
                await self._stop.asked.wait()
                if not self._stop.as_old_copy:
                    await self._drain()
            nursery.cancel_scope.cancel()
        if self._stop.reason is not None:
            if self._stop.as_old_copy:
                await self._condemn(str(self._stop.reason))
            raise self._stop.reason

    # The stop

    async def _drain(self) -> None:
        """Hand every leadership to a follower that is up to date, then send the clients there."""
        parts = self._parts
        self._log.info("draining")
        parts.placement.reporting.draining = True
        await hand_over_leaderships(parts.driver, self._environment.clock)
        parts.listener.goodbye()
        with suppress(OutOfSpace):  # the log has what is not flushed
            await self._environment.workers.run(parts.engine.flush)

    async def _condemn(self, reason: str) -> None:
        """Started again and again, this old copy shall not make its boot counter pass for the newest (trap 24)."""
        try:
            await self._environment.workers.run(self._directory.condemn, reason)
        except StorageError as error:
            self._log.error("the data directory could not be marked as an old copy", reason=str(error))
