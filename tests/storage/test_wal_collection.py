"""Which segments go, what is moved forward so that they can, and how much of it (DESIGN 4.3)."""

from random import Random

import pytest

from shardkv.raft.messages import HardState
from shardkv.storage.record import CompactLog, LogUpdate, Tombstone
from shardkv.storage.segment import segment_path
from shardkv.storage.wal import Wal, WalSettings
from shardkv.types import RangeId, ReplicaId

from .model import DIRECTORY, SMALL, Driver, state_of
from .support import MemoryDisk, MemoryFile
from .updates import R1, R2, R3, create, entry, opened


def test_segments_go_when_all_groups_have_compacted_past_them() -> None:
    disk = MemoryDisk()
    driver = Driver(disk, Random(0), WalSettings(segment_bytes=2048, move_live_fraction_max=0.0))
    driver.append(create(R1), create(R2))
    driver.append(LogUpdate(R2, HardState(1, 0, 0), (entry(1, bytes(300)),)))
    for index in range(1, 60):
        driver.append(LogUpdate(R1, HardState(1, 0, index), (entry(index, bytes(100)),)))
    driver.append(LogUpdate(R1, compact=CompactLog(59, 1)))
    driver.sync()
    assert driver.wal.statistics().segments > 4
    assert driver.wal.collect() is None, "range 2 still needs the first segment"
    driver.append(LogUpdate(R2, HardState(1, 0, 1), compact=CompactLog(1, 1)))
    driver.collect()
    driver.sync()
    assert driver.wal.statistics().segments == 1
    assert [name for name in disk.names if name.endswith(".wal")] == [
        f"{DIRECTORY}/{driver.wal.statistics().oldest_segment_id:016x}.wal"
    ]
    assert state_of(opened_with_token(disk.lost())) == driver.model.state()


def opened_with_token(disk: MemoryDisk) -> Wal:
    return Wal.open(disk, DIRECTORY, SMALL, token=b"token")


def test_a_straggler_is_written_forward_so_that_its_segment_can_go() -> None:
    """DESIGN 4.3: one idle group must not hold back the log of all others."""
    disk = MemoryDisk()
    driver = Driver(disk, Random(0), WalSettings(segment_bytes=2048))
    driver.append(create(R1), create(R2))
    driver.append(LogUpdate(R2, HardState(1, 0, 0), (entry(1, b"idle"), entry(2, b"range"))))
    for index in range(1, 40):
        driver.append(LogUpdate(R1, HardState(1, 0, index), (entry(index, bytes(100)),)))
    driver.append(LogUpdate(R1, compact=CompactLog(39, 1)))
    driver.sync()
    driver.collect()
    driver.sync()
    statistics = driver.wal.statistics()
    assert (statistics.segments, statistics.moved_entries) == (1, 2)
    for wal in (driver.wal, opened_with_token(disk.lost())):
        assert [found.data for found in wal.groups[R2].entries(1, 3, 1 << 30)] == [b"idle", b"range"]
        assert state_of(wal) == driver.model.state()


def test_old_entries_hold_back_no_more_segments_than_set_however_large_they_are() -> None:
    """The oldest segment is full of live entries: too much to move at once, but the log must not grow for ever."""
    disk = MemoryDisk()
    settings = WalSettings(segment_bytes=2048, closed_segments_max=4, move_bytes_max=300, cache_bytes_max=0)
    driver = Driver(disk, Random(0), settings)
    driver.append(create(R1), create(R2))
    for index in range(1, 9):
        driver.append(LogUpdate(R2, HardState(1, 0, 0), (entry(index, bytes([index]) * 200),)))
    for index in range(1, 400):
        driver.append(LogUpdate(R1, HardState(1, 0, index), (entry(index, bytes(100)),), compact=CompactLog(index, 1)))
        driver.sync()
        driver.collect()
        driver.sync()
        assert driver.wal.statistics().segments <= settings.closed_segments_max + 5
    assert driver.dropped > 10
    assert [found.data[:1] for found in driver.wal.groups[R2].entries(1, 9, 1 << 30)] == [
        bytes([n]) for n in range(1, 9)
    ]
    assert state_of(opened_with_token(disk.lost())) == driver.model.state()


def test_a_log_that_is_mostly_live_is_not_written_anew_for_ever() -> None:
    """Where moving frees next to nothing, new records pay for it: a log that rests is let rest, and one that is
    written to stays within a quarter more than what is live in it, and some segments."""
    disk = MemoryDisk()
    settings = WalSettings(segment_bytes=2048, closed_segments_max=4, move_bytes_max=600, cache_bytes_max=0)
    driver = Driver(disk, Random(0), settings)
    driver.append(create(R1), create(R2))

    def collected() -> int:
        """How many entries are moved until there is nothing to do."""
        before = driver.wal.statistics().moved_entries
        for _ in range(1_000):
            driver.sync()
            driver.collect()
            if not driver.jobs:
                break
        else:
            raise AssertionError("a log to which nothing is added is moved and moved")
        driver.sync()
        return driver.wal.statistics().moved_entries - before

    live = 20 * 2048
    for index in range(1, live // 200 + 1):
        driver.append(LogUpdate(R2, HardState(1, 0, 0), (entry(index, bytes(200)),)))
    collected()
    assert collected() == 0
    segments = driver.wal.statistics().segments
    for index in range(1, 1_000):
        driver.append(LogUpdate(R1, HardState(1, 0, index), (entry(index, bytes(100)),), compact=CompactLog(index, 1)))
        collected()
        assert driver.wal.statistics().segments <= segments * 5 // 4 + settings.closed_segments_max
    assert collected() == 0
    assert driver.dropped > segments
    assert state_of(opened_with_token(disk.lost())) == driver.model.state()


@pytest.mark.parametrize("bound", [{"move_entries_max": 3}, {"move_bytes_max": 90}])
def test_one_collection_moves_no_more_than_set(bound: dict[str, int]) -> None:
    """What it moves is read and encoded in the loop."""
    driver = Driver(MemoryDisk(), Random(0), WalSettings(segment_bytes=4096, **bound))
    driver.append(create(R1), create(R2))
    driver.append(LogUpdate(R2, HardState(1), tuple(entry(index, bytes(30)) for index in range(1, 9))))
    for index in range(1, 60):
        driver.append(LogUpdate(R1, HardState(1, 0, index), (entry(index, bytes(100)),), compact=CompactLog(index, 1)))
    driver.sync()
    for moved in (3, 6, 8):
        assert driver.wal.statistics().oldest_segment_id == 1
        driver.collect()
        driver.sync()
        assert driver.wal.statistics().moved_entries == moved
    assert driver.wal.statistics().oldest_segment_id > 1


def test_a_segment_that_is_collected_before_its_successor_is_synced_is_not_missed() -> None:
    """What is on disk ends in a segment that is on its way out, and the next one has no file yet."""
    wal = opened()
    wal.append([create(R1)])()
    wal.append([LogUpdate(R1, HardState(1, 0, 1), (entry(1, bytes(1990)),), compact=CompactLog(1, 1))])
    drop = wal.collect()
    assert drop is not None
    wal.require_in_place()
    drop()
    wal.require_in_place()


def test_a_segment_that_is_dropped_while_it_is_looked_for_is_not_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The look is taken in another thread; a node must not end for what it removed itself."""
    disk = MemoryDisk()
    wal = opened(disk)
    wal.append([create(R1)])()
    wal.require_in_place()
    is_at = MemoryFile.is_at

    def after_a_while(file: MemoryFile, path: str) -> bool:
        monkeypatch.undo()
        wal.append([LogUpdate(R1, HardState(1, 0, 1), (entry(1, bytes(1990)),), compact=CompactLog(1, 1))])()
        assert wal.statistics().segments == 2
        drop = wal.collect()
        assert drop is not None
        drop()
        assert not is_at(file, path)
        return False

    monkeypatch.setattr(MemoryFile, "is_at", after_a_while)
    wal.require_in_place()
    wal.require_in_place()
    assert wal.statistics().oldest_segment_id == 2
    disk.unlink(segment_path(DIRECTORY, 2))
    with pytest.raises(FileNotFoundError, match="was removed"):
        wal.require_in_place()


def test_metadata_alone_holds_back_no_segment() -> None:
    """Every segment starts with a checkpoint of all groups, so idle groups without entries pin nothing."""
    disk = MemoryDisk()
    driver = Driver(disk, Random(0), SMALL)
    driver.append(*(create(RangeId(number)) for number in range(1, 6)))
    driver.append(LogUpdate(R2, HardState(7, 3, 0)), LogUpdate(R3, tombstone=Tombstone(ReplicaId(10), b"gone")))
    for index in range(1, 100):
        driver.append(LogUpdate(R1, HardState(1, 0, index), (entry(index, bytes(100)),), compact=CompactLog(index, 1)))
        driver.collect()
    driver.sync()
    assert driver.wal.statistics().segments == 1
    assert driver.wal.statistics().moved_entries == 0
    again = opened_with_token(disk.lost())
    assert again.groups[R2].hard_state == HardState(7, 3, 0)
    assert again.tombstones == {R3: 10}
    assert state_of(again) == driver.model.state()
