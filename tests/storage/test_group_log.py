"""A group's log against the Raft core's own storage in memory: the core must not notice which one it has."""

from collections.abc import Callable
from random import Random

import pytest

from shardkv.raft.errors import RaftError
from shardkv.raft.messages import ConfState, Entry, EntryType, HardState, Snapshot, SnapshotMetadata
from shardkv.raft.storage import MemoryStorage, RaftStorage
from shardkv.storage.record import CompactLog, CreateGroup, LogUpdate, ResetLog
from shardkv.storage.wal import Wal
from shardkv.types import RangeId, ReplicaId

from .model import DIRECTORY, SMALL
from .support import MemoryDisk

R1 = RangeId(1)


def outcome(call: Callable[..., object], *arguments: int) -> object:
    try:
        found = call(*arguments)
    except RaftError as error:
        return type(error)
    return list(found) if isinstance(found, (list, tuple)) else found


def compare(log: RaftStorage, memory: MemoryStorage) -> None:
    assert (log.first_index(), log.last_index()) == (memory.first_index(), memory.last_index())
    low, high = memory.first_index() - 3, memory.last_index() + 3
    for index in range(low, high):
        assert outcome(log.term, index) == outcome(memory.term, index)
        for end in range(index + 1, high):
            for bytes_max in (0, 60, 1 << 30):
                mine = outcome(log.entries, index, end, bytes_max)
                assert mine == outcome(memory.entries, index, end, bytes_max)


@pytest.mark.parametrize("seed", range(5))
def test_a_group_log_answers_like_the_cores_own_storage(seed: int) -> None:
    random = Random(seed)
    disk = MemoryDisk()
    wal = Wal.open(disk, DIRECTORY, SMALL)
    memory = MemoryStorage()
    wal.append([LogUpdate(R1, create=CreateGroup(ReplicaId(1), 0, 0, ConfState()))])()
    term = commit = 0
    for _ in range(60):
        choice = random.random()
        last = memory.last_index()
        if choice < 0.7:
            first = random.randrange(commit, last + 1) + 1
            term += random.randrange(2)
            commit = max(commit, min(first, commit + 1))
            entries = tuple(
                Entry(term, index, EntryType.NORMAL, random.randbytes(random.randrange(40)))
                for index in range(first, first + random.randrange(1, 4))
            )
            memory.append(entries)
            wal.append([LogUpdate(R1, HardState(term, 0, min(commit, first)), entries)])()
            commit = min(commit, first)
        elif choice < 0.9 and commit >= memory.first_index():
            index = random.randrange(memory.first_index(), commit + 1)
            wal.append([LogUpdate(R1, compact=CompactLog(index, memory.term(index)))])()
            memory.compact(index)
        elif choice > 0.97:
            commit = last + random.randrange(1, 4)
            conf_state = ConfState((1, 2))
            memory.apply_snapshot(Snapshot(SnapshotMetadata(commit, term, conf_state)))
            wal.append([LogUpdate(R1, reset=ResetLog(commit, term, conf_state))])()
        compare(wal.groups[R1], memory)
        wal.check()
    compare(Wal.open(disk.lost(), DIRECTORY, SMALL).groups[R1], memory)
