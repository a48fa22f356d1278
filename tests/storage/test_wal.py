"""The shared log at work: one record a turn, one sync for many, and what is refused before it reaches the disk."""

from random import Random
from typing import Any

import pytest

from shardkv.errors import Corruption, StorageError
from shardkv.raft.messages import HardState
from shardkv.storage import record
from shardkv.storage import wal as wal_module
from shardkv.storage.log_state import LogState
from shardkv.storage.record import CompactLog, LogUpdate
from shardkv.storage.recovery import FIRST_SEGMENT_BYTES
from shardkv.storage.wal import Wal, WalSettings
from shardkv.types import RangeId

from .model import DIRECTORY, Driver
from .support import MemoryDisk
from .updates import R1, R2, R3, count_operations, create, entry, opened


def test_a_turn_of_many_groups_is_one_write_and_one_sync() -> None:
    """DESIGN 4.2: one record for the whole turn, one sync for all groups."""
    disk = MemoryDisk()
    wal = opened(disk)
    wal.append([create(R1), create(R2), create(R3)])()
    operations = count_operations(disk)
    job = wal.append([LogUpdate(group, HardState(1, 10, 0), (entry(1),)) for group in (R1, R2, R3)])
    assert operations == []
    job()
    assert operations == ["pwrite", "sync"]


def test_jobs_that_wait_are_merged_into_one_sync() -> None:
    disk = MemoryDisk()
    wal = opened(disk)
    wal.append([create(R1)])()
    operations = count_operations(disk)
    jobs = [wal.append([LogUpdate(R1, entries=(entry(index),))]) for index in range(1, 4)]
    for job in jobs:
        job()
    assert operations == ["pwrite", "pwrite", "pwrite", "sync"]
    assert opened(disk.lost()).groups[R1].last_index() == 3


def test_a_turn_without_updates_writes_no_record_and_waits_for_the_earlier_ones() -> None:
    disk = MemoryDisk()
    wal = opened(disk)
    wal.append([create(R1)])
    before = wal.statistics().sequence
    wal.append([])()
    assert wal.statistics().sequence == wal.synced_sequence == before
    assert R1 in opened(disk.lost()).groups


def test_the_loop_touches_no_file_when_it_appends_rotates_or_collects() -> None:
    """All of that is the writer thread's; the loop would stand still for milliseconds."""
    disk = MemoryDisk()
    driver = Driver(disk, Random(0), WalSettings(segment_bytes=2048, closed_segments_max=1000))
    operations = count_operations(disk)
    driver.append(create(R1))
    for index in range(1, 40):
        driver.append(LogUpdate(R1, HardState(1, 0, index), (entry(index, bytes(200)),)))
        driver.append(LogUpdate(R1, compact=CompactLog(index, 1)))
    assert driver.wal.statistics().segments > 3
    assert driver.wal.collect() is not None
    assert operations == []


def test_a_record_larger_than_a_segment_gets_a_segment_of_its_size() -> None:
    disk = MemoryDisk()
    wal = opened(disk)
    wal.append([create(R1)])()
    data = Random(0).randbytes(10_000)
    wal.append([LogUpdate(R1, HardState(1), (entry(1, data), entry(2, data)))])()
    wal.append([LogUpdate(R1, entries=(entry(3),))])()
    wal.check()
    again = opened(disk.lost())
    assert [found.data for found in again.groups[R1].entries(1, 4, 1 << 30)] == [data, data, b"x"]


def test_a_checkpoint_larger_than_a_segment_does_not_make_a_segment_of_every_turn() -> None:
    wal = opened()
    wal.append([create(RangeId(number)) for number in range(1, 401)])()
    before = wal.statistics().segments
    for index in range(1, 201):
        wal.append([LogUpdate(RangeId(1), entries=[entry(index, b"x" * 100)])])()
    assert wal.statistics().segments - before <= 4


def test_a_turn_too_large_for_one_record_is_read_back_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """While a sync lasts, hundreds of groups may collect megabytes each; a record that recovery takes for damaged,
    because none can be that large, would lose what was acknowledged."""
    monkeypatch.setattr(record, "DATA_BYTES_MAX", 20_000)
    monkeypatch.setattr(wal_module, "RECORD_DATA_BYTES_MAX", 10_000, raising=False)
    disk = MemoryDisk()
    wal = opened(disk)
    groups = [RangeId(number) for number in range(1, 8)]
    wal.append([create(group) for group in groups])()
    data = Random(0).randbytes(6_000)
    wal.append([LogUpdate(group, HardState(1), (entry(1, data), entry(2, b"x"))) for group in groups])()
    wal.check()
    again = opened(disk.lost())
    assert again.statistics().cut_bytes == 0
    for group in groups:
        assert [found.data for found in again.groups[group].entries(1, 3, 1 << 30)] == [data, b"x"]


def test_what_one_group_logs_at_once_is_one_record_however_much_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """It cannot be halved: its entries and the hard state that goes with them are durable together or not at all."""
    monkeypatch.setattr(wal_module, "RECORD_DATA_BYTES_MAX", 10_000)
    disk = MemoryDisk()
    wal = opened(disk)
    wal.append([create(R1), create(R2)])()
    before = wal.statistics().sequence
    data = bytes(6_000)
    large = LogUpdate(R1, HardState(1), (entry(1, data), entry(2, data)))
    wal.append([LogUpdate(R2, HardState(1), (entry(1),)), large])()
    assert wal.statistics().sequence >= before + 2
    again = opened(disk.lost())
    assert [found.data for found in again.groups[R1].entries(1, 3, 1 << 30)] == [data, data]
    assert again.groups[R2].last_index() == 1


def test_a_record_that_could_not_be_read_back_is_never_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """One group's entries are bounded far below it; if they were not, the node would rather end."""
    monkeypatch.setattr(record, "DATA_BYTES_MAX", 20_000)
    disk = MemoryDisk()
    wal = opened(disk)
    wal.append([create(R1)])()
    with pytest.raises(AssertionError, match="20001 bytes of data"):
        wal.append([LogUpdate(R1, HardState(1), (entry(1, bytes(20_001)),))])
    assert opened(disk.copy()).groups[R1].last_index() == 0


def test_the_first_segment_of_a_new_log_is_small_and_the_next_is_not() -> None:
    """A node's very first start waits until its segment is on the disk, zeros and all; no other waits for one."""
    disk = MemoryDisk()
    settings = WalSettings(segment_bytes=4 << 20, cache_bytes_max=0)
    wal = opened(disk, settings)
    assert wal.statistics().segment_bytes == FIRST_SEGMENT_BYTES < settings.segment_bytes
    wal.append([create(R1)])()
    written = [bytes([index]) * 300_000 for index in range(1, 8)]
    for index, data in enumerate(written, 1):
        wal.append([LogUpdate(R1, entries=(entry(index, data),))])()
    statistics = wal.statistics()
    assert statistics.segments == 2
    assert statistics.segment_bytes == FIRST_SEGMENT_BYTES + settings.segment_bytes
    log = opened(disk.lost(), settings).groups[R1]
    assert [found.data for found in log.entries(1, 8, 1 << 30)] == written


def test_an_empty_log_where_there_was_one_is_corruption() -> None:
    """TRAPS 24: a node on an emptied directory would vote again in old terms."""
    disk = MemoryDisk()
    with pytest.raises(Corruption, match="this node had one"):
        Wal.open(disk, DIRECTORY, create=False)
    Wal.open(disk, DIRECTORY).close()
    Wal.open(disk, DIRECTORY, create=False)


def test_closing_writes_what_is_queued() -> None:
    disk = MemoryDisk()
    wal = opened(disk)
    wal.append([create(R1)])
    wal.close()
    assert R1 in opened(disk.lost()).groups


def test_a_format_that_is_not_known_is_not_taken_for_damage() -> None:
    """A sound record of a later format must be refused, not cut off as a torn tail."""
    disk = MemoryDisk()
    wal = opened(disk)
    wal.append([create(R1)])()
    from shardkv.storage import record

    segment = wal._segment
    meta = bytes((record.RecordKind.TURN, record.FORMAT + 1))
    header = record.pack_header(wal._seed, meta, 0, segment.id, wal.statistics().sequence + 1, 0)
    assert segment.file is not None
    segment.file.pwrite(header + meta, segment.end)
    with pytest.raises(Corruption, match="its format is 2"):
        opened(disk)


def test_an_update_that_cannot_be_never_reaches_the_disk() -> None:
    """It is our own bug; the process ends, and what is on disk stays sound."""
    disk = MemoryDisk()
    wal = opened(disk)
    wal.append([create(R1)])()
    with pytest.raises(AssertionError, match="after 0"):
        wal.append([LogUpdate(R1, entries=(entry(5),))])
    with pytest.raises(StorageError, match="failed before"):
        wal.append([LogUpdate(R1, HardState(1))])
    assert opened(disk.copy()).groups[R1].last_index() == 0


def test_an_update_that_cannot_be_never_reaches_the_disk_with_what_came_before_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The writer may begin an earlier job at any moment, and takes whatever it finds queued. No start could read it."""
    disk = MemoryDisk()
    wal = opened(disk)
    wal.append([create(R1)])()
    earlier = wal.append([LogUpdate(R1, HardState(5, 1, 0))])
    apply = LogState.apply

    def apply_while_the_writer_works(*arguments: Any) -> Any:
        earlier()
        return apply(*arguments)

    monkeypatch.setattr(LogState, "apply", apply_while_the_writer_works)
    with pytest.raises(AssertionError, match="the term moves back"):
        wal.append([LogUpdate(R1, HardState(4, 1, 0))])
    monkeypatch.undo()
    assert opened(disk.lost()).groups[R1].hard_state == HardState(5, 1, 0)
