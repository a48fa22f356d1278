"""The parts of a node, each made of those before it, and whom each of them tells of what.

Lives here: who is handed what. Does not live here: what any part does, nor when it runs (``node``). The rule: what a
part tells one that is made after it goes by a function that looks the other up when it is called, or by an attribute
that is set here, before anything runs.
"""

from typing import Any, Final

import trio

from shardkv.config import NodeConfig
from shardkv.environment import Environment
from shardkv.machine.clock import HybridClock
from shardkv.multiraft.catalog import Catalog, GroupTiming
from shardkv.multiraft.driver import Driver, DriverHooks
from shardkv.multiraft.maintenance import Maintenance
from shardkv.multiraft.snapshots import Snapshots
from shardkv.multiraft.space import Space
from shardkv.server.clock_health import ClockHealth
from shardkv.server.disk_health import DiskHealth
from shardkv.server.garbage import Collector, GarbagePolicy
from shardkv.server.introduction import FIRST_NODE, Introduction, first_ranges
from shardkv.server.known_nodes import KnownNodesFile
from shardkv.server.listener import Listener
from shardkv.server.loop_health import LoopProbe
from shardkv.server.membership import Membership
from shardkv.server.missing_data import require_other_copies
from shardkv.server.operations import Operations
from shardkv.server.other_nodes import OtherNodes
from shardkv.server.peers import PoolPeers, SnapshotDialler
from shardkv.server.placement_group import PlacementExtension
from shardkv.server.placement_service import PlacementService
from shardkv.server.requests import Requests
from shardkv.server.splitter import Splitter
from shardkv.server.stop import Stop
from shardkv.server.stores import Stores
from shardkv.storage.directory import DataDirectory
from shardkv.transport.handshake import NodeIdentity
from shardkv.types import timestamp_at
from shardkv_placement.heartbeat import Reporter

STARTING: Final = "the node is starting"


class Parts:
    """The parts of a node that has been put together and recovered, and is about to run. The admin endpoint looks
    at them and changes nothing; a simulation may change how some of them go about their work.

    Raises Corruption where the ranges' data are gone and nobody else can have them.
    """

    def __init__(
        self,
        config: NodeConfig,
        environment: Environment,
        *,
        directory: DataDirectory,
        stores: Stores,
        membership: Membership,
        address: str,
        known_nodes: KnownNodesFile,
        hybrid_clock: HybridClock,
        collector: Collector | None,
        stop: Stop,
        log: Any,
    ) -> None:
        self._config = config
        self._environment = environment
        self._stop = stop
        self._log = log
        self.name = config.name
        self.ready = trio.Event()
        """Set once the node has said that it is ready."""
        self.hybrid_clock = hybrid_clock
        self.wal = stores.wal
        self.engine = stores.engine
        self.identity = _identity(directory, address)
        self.clock_health = ClockHealth(
            environment.clock,
            hybrid_clock,
            offset_ms_max=config.clock_offset_max_ms,
            ask=lambda node_id, payload: self.pool.ping(node_id, payload),
            log=log,
        )
        self.others = OtherNodes(
            config,
            environment,
            self.identity,
            known_nodes=known_nodes,
            clock_health=self.clock_health,
            founded_ns=membership.founded_ns,
            doubt=lambda node_id: self.driver.doubt_node(node_id),
            stop=stop,
            log=log,
        )
        self.pool = self.others.pool
        self._make_groups(directory)
        self._make_services(directory, membership)
        self._make_process_health(collector)

    def _make_groups(self, directory: DataDirectory) -> None:
        """The Raft groups, recovered from the log and the engine, and what runs them."""
        config, environment, raft = self._config, self._environment, self._config.raft
        self.placement_extension = PlacementExtension()
        self.disk_health = DiskHealth(environment.clock, raft.sync_stall_ms / 1000, self._log)
        self.catalog = Catalog(
            self.identity.node_id,
            self.wal,
            self.engine,
            environment,
            timing=GroupTiming(
                raft.election_ticks, raft.heartbeat_ticks, raft.promise_ms * 1_000_000, raft.spare_entries_max
            ),
            make_extension=lambda range_id: self.placement_extension,
            promise_note=directory.promise,
            reluctant=self._reluctant,
        )
        require_other_copies(
            self.catalog, directory, engine=config.storage.engine, others_known=self.others.any_known(), log=self._log
        )
        if self.identity.node_id == FIRST_NODE:
            self.catalog.bootstrap(first_ranges(), timestamp_at(self.hybrid_clock.ms()))
        self.catalog.recover(used_before=self.identity.boot > 1)
        self.others.recovered(self.placement_extension.state.nodes.values())
        tick_seconds = raft.tick_ms / 1000
        self.driver = Driver(
            self.catalog,
            self.wal,
            self.engine,
            environment,
            hybrid_clock=self.hybrid_clock,
            peers=PoolPeers(self.pool),
            hooks=DriverHooks(
                leadership=lambda replica: self.placement.leadership_changed(replica),
                descriptor=lambda replica: self.placement.reporting.descriptor_changed(replica),
                flush=self._flush,
            ),
            space=Space(config.storage.free_bytes_min, directory.path),
            tick_seconds=tick_seconds,
            read_expiry_seconds=2 * raft.election_ticks * tick_seconds,
        )
        dialler = SnapshotDialler(
            environment, self.identity, self.others.known_boots, self.others.address_book.address_of
        )
        self.snapshots = Snapshots(
            self.driver,
            environment,
            directory=directory.ingest_path,
            dial=dialler.dial,
            log=self._log,
            config=config.snapshots,
        )
        self.driver.snapshots = self.snapshots
        self.maintenance = Maintenance(self.driver, environment, self._log, directory.path, directory.log_mark.write)

    def _make_services(self, directory: DataDirectory, membership: Membership) -> None:
        """What serves clients, peers and the placement group on top of the groups."""
        config, environment, identity = self._config, self._environment, self.identity
        address_book = self.others.address_book
        self.splitter = Splitter(
            self.driver,
            environment.clock,
            split=lambda range_id, key: self.operations.split(range_id, key),
            split_bytes=lambda: self.placement.reporting.settings.get("split_bytes", config.ranges.split_bytes),
            log=self._log,
        )
        self.placement = PlacementService(
            self.driver,
            environment,
            extension=self.placement_extension,
            reporter=Reporter(identity.node_id, identity.boot, identity.address),
            bytes_of=self.splitter.bytes_of,
            on_nodes=self.others.on_table,
            address_book=address_book,
            cluster_id=identity.cluster_id,
            stop=self._stop,
            log=self._log,
        )
        self.others.reporting = self.placement.reporting
        self.placement.reporting.slow_disk = self.disk_health.is_slow
        self.introduction = Introduction(
            environment,
            self.catalog,
            self.placement,
            self.placement_extension.state,
            config=config,
            identity=identity,
            directory_token=directory.identity.token,
            # Who has joined, and died before it was introduced, has heard of none of its own starts.
            new=membership.is_new or address_book.start_of(identity.node_id) == (0, b""),
            founding=identity.node_id == FIRST_NODE and address_book.start_of(FIRST_NODE) is None,
            stop=self._stop,
            log=self._log,
        )
        self.operations = Operations(
            self.driver,
            environment.clock,
            placement=self.placement,
            maintenance=self.maintenance,
            flush=self._flush,
        )
        self.listener = Listener(
            environment,
            self.driver,
            identity=identity,
            known_boots=self.others.known_boots,
            hybrid_clock=self.hybrid_clock,
            clock_health=self.clock_health,
            requests=Requests(self.driver, environment.clock, self.hybrid_clock, self.operations.start),
            snapshots=self.snapshots,
            on_peer=self.others.on_peer,
            on_foreign=self.others.on_foreign,
            log=self._log,
            peers=lambda: self.pool.peers,
            connections_max=config.limits.connections_max,
            inflight_max=config.limits.connection_requests_max,
        )

    def _make_process_health(self, collector: Collector | None) -> None:
        """What looks after the process as a whole."""
        clock, statistics = self._environment.clock, self.driver.statistics
        self.probe = LoopProbe(clock, self._log)
        self.garbage: GarbagePolicy | None = None
        if collector is not None:
            self.garbage = GarbagePolicy(collector, clock, lambda: statistics().turns, self._log)

    def unready(self) -> str:
        """Why this node should not be sent requests; empty when it should."""
        if not self.ready.is_set():
            return STARTING
        return "the node is draining" if self.placement.reporting.draining else ""

    def _reluctant(self) -> bool:
        """Whether others should lead what this node could: its disk is slow, or it would refuse what clients write."""
        return self.disk_health.is_slow() or self.driver.space.low

    def _flush(self) -> None:
        self.listener.flush()


def _identity(directory: DataDirectory, address: str) -> NodeIdentity:
    mine = directory.identity
    assert mine.cluster_id is not None, "put together before the node is a member"
    assert mine.node_id is not None, "put together before the node has an id"
    start_token, *earlier = mine.starts
    return NodeIdentity(mine.cluster_id, mine.node_id, mine.boot, address, start_token, tuple(earlier))
