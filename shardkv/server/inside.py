"""What a node is made of, for whoever has to look inside: the simulator and its checkers.

Nothing here acts. The rule: a node never reads this itself, so that what looks inside cannot become a way in.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from shardkv.machine.clock import HybridClock
    from shardkv.multiraft.catalog import Catalog
    from shardkv.multiraft.driver import Driver
    from shardkv.multiraft.maintenance import Maintenance
    from shardkv.multiraft.snapshots import Snapshots
    from shardkv.server.clock_health import ClockHealth
    from shardkv.server.disk_health import DiskHealth
    from shardkv.server.listener import Listener
    from shardkv.server.placement_service import PlacementService
    from shardkv.server.splitter import Splitter
    from shardkv.storage.engine import Engine
    from shardkv.storage.wal import Wal
    from shardkv.transport.pool import PeerPool


@dataclass(frozen=True, slots=True)
class Inside:
    """The parts of a node that has been put together and recovered, and is about to run."""

    catalog: "Catalog"
    wal: "Wal"
    engine: "Engine"
    driver: "Driver"
    hybrid_clock: "HybridClock"
    maintenance: "Maintenance"
    snapshots: "Snapshots"
    splitter: "Splitter"
    placement: "PlacementService"
    pool: "PeerPool"
    listener: "Listener"
    disk_health: "DiskHealth"
    clock_health: "ClockHealth"
