"""One node from start to stop: its parts put together, and what they tell each other.

The order of a start: lock the data directory and count the start, open log and engine, bind the address, join or
bootstrap if the directory is new, bring log and engine to agree, run. The order of a stop: hand leaderships over, send
clients elsewhere, stop the services, flush. Does not live here: what any part does.
"""

from collections.abc import Callable, Collection, Iterable
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

import structlog
import trio

from shardkv.address import Address, parse_address
from shardkv.config import NodeConfig
from shardkv.environment import Environment, Stream
from shardkv.errors import ConfigError, Corruption, OutOfSpace, ShardKVError, StorageError, WrongCluster
from shardkv.machine.clock import HybridClock
from shardkv.multiraft.catalog import Catalog, GroupTiming
from shardkv.multiraft.driver import Driver, DriverHooks
from shardkv.multiraft.maintenance import Maintenance
from shardkv.multiraft.replica import Replica
from shardkv.multiraft.snapshots import Snapshots
from shardkv.multiraft.space import Space
from shardkv.server.address_book import AddressBook
from shardkv.server.clock_health import ClockHealth
from shardkv.server.disk_health import DiskHealth
from shardkv.server.draining import hand_over_leaderships
from shardkv.server.garbage import Collector, GarbagePolicy
from shardkv.server.inside import Inside
from shardkv.server.internal_client import connect_cluster, join_cluster
from shardkv.server.introduction import FIRST_NODE, Introduction, first_ranges
from shardkv.server.known_nodes import KnownNodesFile
from shardkv.server.listener import Listener
from shardkv.server.loop_health import LoopProbe
from shardkv.server.missing_data import tell_of_missing_data
from shardkv.server.operations import Operations
from shardkv.server.peers import PoolPeers, SnapshotDialler, who_is_at
from shardkv.server.placement_service import PlacementExtension, PlacementService
from shardkv.server.requests import Asker, Requests
from shardkv.server.splitter import Splitter
from shardkv.storage.directory import DataDirectory, open_directory
from shardkv.storage.engine import Engine
from shardkv.storage.memory import MemoryEngine
from shardkv.storage.rocks import RocksEngine, RocksSettings
from shardkv.storage.wal import Wal, WalSettings
from shardkv.transport.groups import main_error
from shardkv.transport.handshake import KnownBoots, NodeIdentity
from shardkv.transport.pool import PeerPool, Purpose
from shardkv.types import PLACEMENT_RANGE, NodeId, RangeId, timestamp_at
from shardkv.wire.frames import FrameKind, encode_frame
from shardkv.wire.handshake import Hello
from shardkv.wire.requests import Request
from shardkv_placement.heartbeat import HeartbeatReply, Reporter

if TYPE_CHECKING:
    from shardkv.server.admin import Admin

YOUNG_SECONDS: Final = 600.0
"""A cluster that was made so lately gives way to one that has its only node's address."""
START_SECONDS: Final = 30.0
"""How long a connection waits for a node that is still starting."""
LOOK_AGAIN_SECONDS: Final = 1.0
"""Between two looks at the addresses of --join where nobody has answered yet."""
LOG_CACHE_BYTES_MAX: Final = 8 * 1024 * 1024
"""Log entries in memory, of all ranges: followers that are further behind are served from the disk."""

Ready = Callable[[str, str], None]
OpenEngine = Callable[[NodeConfig, str], Engine]
Observe = Callable[[Inside], None]


def open_engine(config: NodeConfig, path: str) -> Engine:
    """The engine that the configuration asks for. Blocks."""
    if config.storage.engine == "memory":
        return MemoryEngine(in_loop=trio.from_thread.run_sync)
    return RocksEngine(path, RocksSettings(block_cache_bytes=config.storage.cache_bytes))


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


def _of_an_old_copy(fatal: ShardKVError | None) -> bool:
    """Whether this node has been refused as one whose log has forgotten something: it must stop at once. It neither
    hands over what it may lead, nor waits for anything, for as long as it runs it votes and acknowledges."""
    return isinstance(fatal, WrongCluster) and fatal.old_copy


class _Node:
    """The composition. Attributes come to be in the order of a start."""

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
        self._stop = stop
        self._open_engine = open_engine
        self._collector = collector
        self._observe = observe
        self._log: Any = structlog.get_logger().bind(node=config.name)
        self._hybrid_clock = HybridClock(environment.clock, config.clock_offset_max_ms)
        self._clock_health = ClockHealth(
            environment.clock,
            self._hybrid_clock,
            offset_ms_max=config.clock_offset_max_ms,
            ask=self._ping,
            log=self._log,
        )
        self._known_boots = KnownBoots()
        self._serving = trio.Event()
        self._founded_ns: int | None = None
        """When this start made a cluster, if it did."""
        self._address_book = AddressBook()
        self._is_ready = trio.Event()
        self._is_new = False
        """The directory has become this node's in this start."""
        self._admin: Admin | None = None
        self._told_of_address = False

    async def run(self) -> None:
        workers, disk, ids = self._environment.workers, self._environment.disk, self._environment.ids
        directory = await workers.run(open_directory, disk, ids, self._config.data)
        self._directory: DataDirectory = directory
        self._known_nodes = KnownNodesFile(self._environment, self._address_book, directory.path, self._log)
        try:
            directory.require(name=self._config.name)
            if not directory.identity.assigned and not self._config.bootstrap and not self._config.join:
                raise ConfigError(
                    f"if this node ran before, its data directory is not mounted: {self._config.data} is a new one. To "
                    "begin there, give --bootstrap to start a cluster, or --join HOST:PORT to join one"
                )
            self._wal = await workers.run(self._open_log)
            opened: list[tuple[str, Callable[[], None]]] = [("log", self._wal.close), ("log mark", self._note_log_mark)]
            # To be cancelled is to die: nothing is tidied up, for a crash must find what a crash leaves.
            try:
                await workers.run(self._note_log_mark)
                self._engine: Engine = await workers.run(self._open_engine, self._config, directory.engine_path)
                opened.append(("engine", self._engine.close))
                await self._listen_and_run()
            except Exception:
                await self._close(opened)
                raise
            failure = await self._close(opened)
            if failure is not None:
                raise failure
        finally:
            directory.close()

    async def _close(self, opened: Iterable[tuple[str, Callable[[], None]]]) -> Exception | None:
        """Close the log and the engine, each whatever became of the other; what failed first, if anything did.

        A node that ends because of its disk is likely to fail here, too, and ends with what came first all the same.
        """
        first: Exception | None = None
        for what, close in opened:
            try:
                await self._environment.workers.run(close)
            except Exception as error:  # noqa: BLE001 - logged, and the first is the caller's
                self._log.error("closing failed", what=what, reason=str(error))
                first = first or error
        return first

    def _open_log(self) -> Wal:
        storage = self._config.storage
        settings = WalSettings(segment_bytes=storage.segment_bytes, cache_bytes_max=LOG_CACHE_BYTES_MAX)
        directory = self._directory
        for name in self._environment.disk.list(directory.ingest_path):
            # Of a snapshot whose install a crash came before.
            self._environment.disk.unlink(f"{directory.ingest_path}/{name}")
        # A directory that belongs to a node has a log; without it, its votes and promises would be forgotten.
        identity = directory.identity
        return Wal.open(
            self._environment.disk,
            directory.wal_path,
            settings,
            token=identity.token,
            create=not identity.assigned,
            mark=directory.log_mark.read(),
        )

    def _note_log_mark(self) -> None:
        with suppress(OutOfSpace):  # what was noted before stays true
            self._directory.log_mark.write(self._wal.synced_sequence)

    async def _listen_and_run(self) -> None:
        async with trio.open_nursery() as nursery:
            listener = await nursery.start(self._environment.network.listen, self._config.listen, self._handle)
            self._address = self._config.advertise or listener.address
            if parse_address(self._address).is_wildcard:  # which not every name of it shows before it is looked up
                raise ConfigError(
                    f"advertise must be given: listen is {self._config.listen!r}, every interface, which others cannot "
                    "connect to"
                )
            await self._start_admin(nursery)
            if await self._become_member(listener.address):
                self._compose()
                # Connections may ask for such tasks until the last of them has ended, which is in this nursery.
                self._snapshots.use(nursery)
                self._operations.use(nursery)
                await self._run_services()
            nursery.cancel_scope.cancel()

    async def _handle(self, stream: Stream) -> None:
        """A connection; while the node is starting it waits."""
        with self._environment.clock.deadline(START_SECONDS):
            await self._serving.wait()
        if self._serving.is_set():
            await self._listener.handle(stream)

    async def _start_admin(self, nursery: trio.Nursery) -> None:
        """Before anything that cannot be undone: an address that is in use ends the start."""
        if self._config.admin is not None:
            # Imported here, for a node without it shall load no web server.
            from shardkv.server.admin import Admin

            self._admin = Admin(self._environment, self._log)
            address = await nursery.start(self._admin.run, self._config.admin)
            self._log.info("admin endpoint", address=address)

    # Membership

    async def _become_member(self, listens_at: str) -> bool:
        """Make sure that the directory belongs to a node of a cluster; False if told to stop before one lets it in."""
        identity = self._directory.identity
        workers = self._environment.workers
        self._is_new = not identity.assigned
        if identity.assigned:
            await self._known_nodes.load()
        elif self._config.bootstrap:
            cluster_id = self._environment.ids.random_bytes(16)
            self._founded_ns = self._environment.clock.monotonic_ns()
            await workers.run(self._directory.assign, cluster_id, FIRST_NODE, self._config.name)
        else:
            labels = [[key, value] for key, value in self._config.label]
            membership = await join_cluster(
                self._environment,
                self._others_to_join({parse_address(self._address), parse_address(listens_at)}),
                [self._config.name, self._address, identity.token, labels],
                log=self._log,
                stop=self._stop,
            )
            if membership is None:
                self._log.info("told to stop before it had joined the cluster")
                return False
            cluster_id, node_id, nodes = membership
            # The addresses first: once the directory is a node's, a start may be told no other.
            self._address_book.joined(nodes)
            await self._known_nodes.store()
            await workers.run(self._directory.assign, cluster_id, NodeId(node_id), self._config.name)
        return True

    def _others_to_join(self, own: Collection[Address]) -> list[str]:
        """Who may let this node in: it cannot itself, though a list for all nodes may name it, too."""
        others = [address for address in self._config.join if parse_address(address) not in own]
        if not others:
            raise ConfigError(
                f"--join {', '.join(self._config.join)} is this node's own address: name another node, one of the "
                "cluster that it is to join, or give --bootstrap to start a cluster"
            )
        return others

    # Composition

    def _compose(self) -> None:
        self._compose_groups()
        self._compose_services()
        if self._observe is not None:
            self._observe(
                Inside(
                    catalog=self._catalog,
                    wal=self._wal,
                    engine=self._engine,
                    driver=self._driver,
                    hybrid_clock=self._hybrid_clock,
                    maintenance=self._maintenance,
                    snapshots=self._snapshots,
                    splitter=self._splitter,
                    placement=self._placement,
                    pool=self._pool,
                    listener=self._listener,
                    disk_health=self._disk_health,
                    clock_health=self._clock_health,
                )
            )

    def _compose_groups(self) -> None:
        """The Raft groups, and what runs them."""
        config, environment = self._config, self._environment
        mine = self._directory.identity
        assert mine.cluster_id is not None, "composed before the node is a member"
        assert mine.node_id is not None, "composed before the node has an id"
        start_token, *earlier = mine.starts
        self._identity = NodeIdentity(
            mine.cluster_id, mine.node_id, mine.boot, self._address, start_token, tuple(earlier)
        )
        self._learn_boots()
        self._extension = PlacementExtension()
        raft = config.raft
        timing = GroupTiming(raft.election_ticks, raft.heartbeat_ticks, raft.promise_ms * 1_000_000)
        self._disk_health = DiskHealth(environment.clock, raft.sync_stall_ms / 1000, self._log)
        self._catalog = Catalog(
            mine.node_id,
            self._wal,
            self._engine,
            environment,
            timing=timing,
            make_extension=lambda range_id: self._extension,
            promise_note=self._directory.promise,
            reluctant=self._reluctant,
        )
        self._look_for_the_data()
        if mine.node_id == FIRST_NODE:
            self._catalog.bootstrap(first_ranges(), timestamp_at(self._hybrid_clock.ms()))
        self._catalog.recover(used_before=mine.boot > 1)
        for record in self._extension.state.nodes.values():
            if not record.decommissioned:
                self._address_book.recovered(record)
        self._learn_boots()
        self._pool = PeerPool(
            environment,
            self._identity,
            self._known_boots,
            on_connected=self._on_connected,
            on_disconnected=self._on_disconnected,
            on_stranger=self._on_stranger,
            on_unreachable=self._on_unreachable,
            on_reachable=self._on_reachable,
            on_old_copy=self._on_old_copy,
            on_pong=self._clock_health.answered,
        )
        hooks = DriverHooks(leadership=self._on_leadership, descriptor=self._on_descriptor, flush=self._flush)
        tick_seconds = raft.tick_ms / 1000
        self._driver = Driver(
            self._catalog,
            self._wal,
            self._engine,
            environment,
            hybrid_clock=self._hybrid_clock,
            peers=PoolPeers(self._pool),
            hooks=hooks,
            space=Space(config.storage.free_bytes_min, self._directory.path),
            tick_seconds=tick_seconds,
            read_expiry_seconds=2 * raft.election_ticks * tick_seconds,
        )
        dialler = SnapshotDialler(environment, self._identity, self._known_boots, self._address_book.address_of)
        self._snapshots = Snapshots(
            self._driver,
            environment,
            directory=self._directory.ingest_path,
            dial=dialler.dial,
            log=self._log,
            config=config.snapshots,
        )
        self._driver.snapshots = self._snapshots
        self._maintenance = Maintenance(
            self._driver, environment, self._log, self._directory.path, self._directory.log_mark.write
        )

    def _look_for_the_data(self) -> None:
        """Where the engine is gone and the log is not, other replicas bring the data back, if there may be any.

        Raises Corruption if there are none: the node would wait for them for ever.
        """
        if not self._catalog.engine_is_gone():
            return
        why = f"{self._directory.engine_path} holds nothing of them"
        remedy = f"restore all of {self._directory.path} from a backup"
        if self._config.storage.engine == "memory":
            why, remedy = "an engine in memory ends with its process", "start anew with an empty data directory"
        if not self._knows_others():
            raise Corruption(
                f"the data of this node's ranges are gone: {why}. No other node is known that could have them: "
                f"{remedy}. Only if other nodes do have replicas of these ranges, give --join HOST:PORT of one of "
                "them, and they are copied from there"
            )
        self._log.error(
            "the data of this node's ranges are gone and are copied from other nodes; a range that has no replica "
            "there is lost unless this node's directory is restored from a backup",
            reason=why,
        )

    def _compose_services(self) -> None:
        """What serves clients, peers and the placement group on top of the groups."""
        config, environment, identity = self._config, self._environment, self._identity
        assert identity.node_id is not None, "composed before the node has an id"
        assert identity.cluster_id is not None, "composed before the node is a member"
        self._splitter = Splitter(
            self._driver, environment.clock, split=self._split, split_bytes=self._split_bytes, log=self._log
        )
        self._placement = PlacementService(
            self._driver,
            environment,
            extension=self._extension,
            reporter=Reporter(identity.node_id, identity.boot, self._address),
            bytes_of=self._splitter.bytes_of,
            on_nodes=self._on_nodes,
            address_book=self._address_book,
            cluster_id=identity.cluster_id,
            log=self._log,
        )
        self._placement.slow_disk = self._disk_health.is_slow
        self._introduction = Introduction(
            environment,
            self._catalog,
            self._placement,
            self._extension.state,
            config=config,
            identity=self._directory.identity,
            start_token=identity.start_token,
            earlier_tokens=identity.earlier_tokens,
            address=self._address,
            # Who has joined, and died before it was introduced, has heard of none of its own starts.
            new=self._is_new or self._address_book.start_of(identity.node_id) == (0, b""),
            log=self._log,
        )
        self._operations = Operations(
            self._driver,
            environment.clock,
            placement=self._placement,
            maintenance=self._maintenance,
            flush=self._flush,
        )
        requests = Requests(self._driver, environment.clock, self._hybrid_clock, self._start_slow)
        self._listener = Listener(
            environment,
            self._driver,
            identity=self._identity,
            known_boots=self._known_boots,
            hybrid_clock=self._hybrid_clock,
            clock_health=self._clock_health,
            requests=requests,
            snapshots=self._snapshots,
            on_peer=self._on_peer,
            on_foreign=self._on_foreign,
            log=self._log,
            connections_max=config.limits.connections_max,
            inflight_max=config.limits.connection_requests_max,
        )
        self._probe = LoopProbe(environment.clock, self._log)
        self._garbage: GarbagePolicy | None = None
        if self._collector is not None:
            turns = self._driver.statistics
            self._garbage = GarbagePolicy(self._collector, environment.clock, lambda: turns().turns, self._log)

    def _show(self) -> None:
        """Hand the parts to the admin endpoint, if there is one."""
        if self._admin is not None:
            from shardkv.server.admin import NodeParts

            parts = NodeParts(
                name=self._config.name,
                address=self._address,
                identity=self._identity,
                driver=self._driver,
                pool=self._pool,
                listener=self._listener,
                placement=self._placement,
                probe=self._probe,
                garbage=self._garbage,
                ready=self._is_ready,
                disk_health=self._disk_health,
                clock_health=self._clock_health,
            )
            self._admin.observe(parts)

    def _start_slow(self, requester: Asker, request: Request) -> None:
        self._operations.start(requester, request)

    async def _split(self, range_id: RangeId, key: bytes) -> object:
        return await self._operations.split(range_id, key)

    def _split_bytes(self) -> int:
        return self._placement.settings.get("split_bytes", self._config.ranges.split_bytes)

    # Services

    async def _run_services(self) -> None:
        async with trio.open_nursery() as nursery:
            await nursery.start(self._driver.run)
            self._apply_addresses()
            self._warn_if_lost()
            await nursery.start(self._pool.run)
            await nursery.start(self._clock_health.run, self._peers)
            self._serving.set()
            seeds = [self._address, *(known.address for _, known in self._address_book), *self._config.join]
            async with connect_cluster(self._environment, seeds, self._identity.cluster_id) as call:
                self._placement.call = call
                self._placement.stop_with(self._stop.set)
                nursery.start_soon(self._placement.run)
                nursery.start_soon(self._introduction.register, self._stop)
                nursery.start_soon(self._known_nodes.run)
                nursery.start_soon(self._look_where_told)
                nursery.start_soon(tell_of_missing_data, self._catalog, self._environment.clock, self._log)
                await nursery.start(self._maintenance.run)
                await nursery.start(self._splitter.run)
                await nursery.start(self._probe.run)
                await nursery.start(self._disk_health.run, self._driver, self._placement.beat_soon)
                self._show()
                self._log.info("started", address=self._address, boot=self._directory.identity.boot)
                if await self._introduction.wait(self._stop):
                    self._is_ready.set()
                    self._ready(self._config.name, self._address)
                if self._garbage is not None:
                    await nursery.start(self._garbage.run)
                await self._stop.wait()
                if not _of_an_old_copy(self._placement.fatal):
                    await self._drain()
            nursery.cancel_scope.cancel()
        if self._placement.fatal is not None:
            await self._condemn_old_copy(self._placement.fatal)
            raise self._placement.fatal

    async def _condemn_old_copy(self, fatal: ShardKVError) -> None:
        """Whoever starts this node again and again shall not make its boot counter pass for the newest (trap 24)."""
        if _of_an_old_copy(fatal):
            try:
                await self._environment.workers.run(self._directory.condemn, str(fatal))
            except StorageError as error:
                self._log.error("the data directory could not be marked as an old copy", reason=str(error))

    # What the parts tell each other

    def _reluctant(self) -> bool:
        """Whether others should lead what this node could: its disk is slow, or it would refuse what clients write."""
        return self._disk_health.is_slow() or self._driver.space.low

    def _on_leadership(self, replica: Replica) -> None:
        self._placement.leadership_changed(replica)

    def _on_descriptor(self, replica: Replica) -> None:
        self._placement.descriptor_changed(replica)

    def _flush(self) -> None:
        self._listener.flush()

    def _peers(self) -> list[NodeId]:
        return [node_id for node_id, _ in self._address_book if node_id != self._identity.node_id]

    def _ping(self, node_id: NodeId, payload: bytes) -> None:
        if self._pool.connected(node_id):
            self._pool.send(node_id, Purpose.URGENT, encode_frame(FrameKind.PING, payload))
            self._pool.flush()

    def _on_connected(self, node_id: NodeId) -> None:
        self._clock_health.ask(node_id)
        if self._address_book.address_of(node_id) == self._address and not self._told_of_address:
            self._told_of_address = True
            self._log.error(
                "this node's address is that of another node, which answers there, so nobody can reach this one: "
                "correct --advertise",
                peer=node_id,
                address=self._address,
            )

    def _on_disconnected(self, node_id: NodeId) -> None:
        self._driver.doubt_node(node_id)

    def _on_nodes(self, reply: HeartbeatReply) -> None:
        """The node table has changed: connect to who is new or has moved."""
        if reply.nodes is None:
            return
        for entry in reply.nodes:
            if entry.decommissioned:
                self._pool.forget(entry.node_id)
        for entry in reply.nodes:
            self._known_boots.agree(entry.node_id, entry.boot, entry.start_token)
        self._address_book.table(reply.nodes, self._known_boots.is_newest)
        self._apply_addresses()
        self._known_nodes.changed()

    def _on_peer(self, hello: Hello) -> None:
        """A peer has dialled this node, so dialling it back will work, and it says where."""
        assert hello.node_id is not None, "a peer's greeting names its node"
        if hello.address is not None and self._address_book.greeted(
            hello.node_id, hello.address, hello.boot, hello.start_token, hello.earlier_tokens
        ):
            self._apply_addresses()
            self._known_nodes.changed()
        self._pool.retry_now(hello.node_id)

    async def _look_where_told(self) -> None:
        """Service: learn who is at the addresses of --join, until somebody has answered at each or the placement group
        has answered this node.

        Nodes that have all moved know each other's old addresses only, and without a majority no table says otherwise.
        """
        cluster_id = self._identity.cluster_id
        assert cluster_id is not None, "looks for others before it is a member"
        left = [address for address in self._config.join if address != self._address]
        while left:
            await self._environment.clock.sleep(LOOK_AGAIN_SECONDS)
            if self._placement.introduced(None):
                return  # the table does say where the others are
            for address in list(left):
                try:
                    found = await who_is_at(self._environment, cluster_id, address)
                except (OSError, trio.BrokenResourceError, trio.ClosedResourceError, ShardKVError) as error:
                    self._log.debug("nobody of the cluster there yet", address=address, reason=str(error))
                    continue
                left.remove(address)
                if found.node_id == self._identity.node_id:
                    continue  # itself, under another name; which of its starts is the newest, the table alone says
                known = dict(self._address_book)
                if found.node_id is None or found.node_id not in known or found.boot <= known[found.node_id].boot:
                    continue  # it has told, or will tell, where it advertises itself, which may be written otherwise
                try:
                    self._known_boots.require_newest(found.node_id, found.boot, found.start_token, found.earlier_tokens)
                except WrongCluster as error:
                    self._log.error("a node runs there on an old copy", address=address, reason=str(error))
                    continue
                if self._address_book.greeted(
                    found.node_id, address, found.boot, found.start_token, found.earlier_tokens
                ):
                    self._apply_addresses()
                    self._known_nodes.changed()

    def _on_stranger(self, node_id: NodeId, address: str, reason: str) -> None:
        self._log.error("somebody else is at a node's address", peer=node_id, address=address, reason=reason)

    def _on_unreachable(self, node_id: NodeId, address: str, reason: str) -> None:
        if not self._stop.is_set():
            self._log.warning("cannot reach a node", peer=node_id, address=address, reason=reason)

    def _on_reachable(self, node_id: NodeId) -> None:
        self._log.info("a node can be reached again", peer=node_id)

    def _on_old_copy(self, error: WrongCluster) -> None:
        """A node that has seen a newer start of this one refuses it. The placement group, which else says so, may not
        be there, and every start of this copy counts: in the end it would pass for the newest.

        But where the group has agreed that this very start is the newest, the other has heard a copy first, and will
        learn so.
        """
        mine = self._identity
        assert mine.node_id is not None, "dialled before the node has an id"
        agreed = self._address_book.start_of(mine.node_id) == (mine.boot, mine.start_token)
        if not agreed and self._placement.fatal is None:
            self._placement.fatal = error
            self._stop.set()

    def _on_foreign(self, hello: Hello) -> None:
        """A node of another cluster has dialled this one.

        If this one has just made a cluster of its own in place of a node whose data are gone, clients come to the one
        cluster or the other, and each acknowledges their writes.
        """
        mine = self._directory.identity
        now_ns = self._environment.clock.monotonic_ns()
        young = self._founded_ns is not None and now_ns - self._founded_ns < YOUNG_SECONDS * 1e9
        if not young or hello.destination_node_id != mine.node_id or self._knows_others():
            return
        assert hello.cluster_id is not None, "of another cluster without naming it"
        self._placement.fatal = WrongCluster(
            f"nodes of cluster {hello.cluster_id.hex()} take this address for that of their node {mine.node_id}, and "
            "this node has just made a cluster of its own: if it was theirs, its data directory is gone or not "
            "mounted, so put it back and start without --bootstrap; a new cluster needs another address",
            old_copy=True,
        )
        self._stop.set()

    def _knows_others(self) -> bool:
        """Whether there is an address of another node to turn to."""
        mine = self._directory.identity.node_id
        return bool(self._config.join) or any(node_id != mine for node_id, _ in self._address_book)

    def _warn_if_lost(self) -> None:
        """Other nodes may dial this one, but its answers have nowhere to go: nobody but a person can help.

        Who has a replica of the placement group has the node table in it.
        """
        placement = self._catalog.replicas.get(PLACEMENT_RANGE)
        if self._knows_others() or (placement is not None and placement.machine is not None):
            return
        self._log.warning(
            "no address of another node is known, so this node cannot take part in the cluster: start it once with "
            "--join HOST:PORT of another node",
            missing=self._known_nodes.path,
        )

    def _learn_boots(self) -> None:
        """An old copy of another node's disk is known by what is on record of that node, though this one has been
        restarted since it saw the newer one."""
        for node_id, known in self._address_book:
            self._known_boots.learn(node_id, known.boot, known.start_token, known.earlier_tokens)
            if known.agreed[0]:
                self._known_boots.agree(node_id, *known.agreed)

    def _apply_addresses(self) -> None:
        for node_id, known in self._address_book:
            if node_id != self._identity.node_id:
                self._pool.set_address(node_id, known.address)

    # The end

    async def _drain(self) -> None:
        """Hand every leadership to a follower that is up to date, then send the clients there."""
        self._log.info("draining")
        self._placement.draining = True
        clock = self._environment.clock
        await hand_over_leaderships(self._driver, clock)
        self._listener.goodbye()
        with suppress(OutOfSpace):  # the log has what is not flushed
            await self._environment.workers.run(self._engine.flush)
