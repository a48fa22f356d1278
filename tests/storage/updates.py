"""Updates of the shared log in a word each, for three ranges, and a log that is opened over a disk in memory."""

from shardkv.raft.messages import ConfState, Entry, EntryType
from shardkv.storage.record import CreateGroup, LogUpdate
from shardkv.storage.wal import Wal, WalSettings
from shardkv.types import RangeId, ReplicaId

from .model import DIRECTORY, SMALL
from .support import MemoryDisk

R1, R2, R3 = RangeId(1), RangeId(2), RangeId(3)
NODES = ConfState((1, 2, 3))


def entry(index: int, data: bytes = b"x", term: int = 1) -> Entry:
    return Entry(term, index, EntryType.NORMAL, data)


def create(range_id: RangeId, replica_id: int = 10, index: int = 0, term: int = 0) -> LogUpdate:
    return LogUpdate(range_id, create=CreateGroup(ReplicaId(replica_id), index, term, NODES, b"payload"))


def opened(disk: MemoryDisk | None = None, settings: WalSettings = SMALL) -> Wal:
    return Wal.open(disk or MemoryDisk(), DIRECTORY, settings)


def count_operations(disk: MemoryDisk) -> list[str]:
    operations: list[str] = []
    disk.observe = lambda name, path: operations.append(name)
    return operations
