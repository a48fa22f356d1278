"""Which entries' data are in memory, and which are read back from the segments."""

from random import Random

import pytest

from shardkv.errors import Corruption
from shardkv.raft.messages import Entry, HardState
from shardkv.storage.record import CompactLog, LogUpdate
from shardkv.storage.wal import WalSettings

from .support import MemoryDisk
from .updates import R1, R2, create, entry, opened


def test_old_data_leave_memory_and_are_read_back_from_the_segment() -> None:
    disk = MemoryDisk()
    wal = opened(disk, WalSettings(segment_bytes=1 << 20, cache_bytes_max=5_000))
    wal.append([create(R1)])()
    random = Random(0)
    written = [random.randbytes(100) for _ in range(100)]
    for index, data in enumerate(written, 1):
        wal.append([LogUpdate(R1, entries=(entry(index, data),))])()
        assert wal.statistics().cached_bytes <= 5_000
    log = wal.groups[R1]
    cached = sum(isinstance(item, Entry) for item in log._items)
    assert 5 < cached < 20
    assert [found.data for found in log.entries(1, 101, 1 << 30)] == written


def test_data_that_are_not_on_disk_yet_stay_in_memory() -> None:
    """Evicted before its write, an entry would be read back as zeros."""
    disk = MemoryDisk()
    wal = opened(disk, WalSettings(segment_bytes=1 << 20, cache_bytes_max=0))
    wal.append([create(R1)])()
    jobs = [wal.append([LogUpdate(R1, entries=(entry(index, b"%d" % index * 50),))]) for index in range(1, 10)]
    log = wal.groups[R1]
    assert all(isinstance(item, Entry) for item in log._items)
    assert [found.index for found in log.entries(1, 10, 1 << 30)] == list(range(1, 10))
    jobs[-1]()
    wal.append([LogUpdate(R1, entries=(entry(10),))])()
    assert not any(isinstance(item, Entry) for item in log._items[:9])


def test_an_entry_that_rotted_on_disk_is_corruption_when_it_is_read_back() -> None:
    disk = MemoryDisk()
    wal = opened(disk, WalSettings(segment_bytes=1 << 20, cache_bytes_max=0))
    wal.append([create(R1)])()
    wal.append([LogUpdate(R1, entries=(entry(1, b"precious"), entry(2)))])()
    wal.append([LogUpdate(R1, entries=(entry(3),))])()
    (path,) = [name for name in disk.names if name.endswith(".wal")]
    content = disk.names[path].current
    content[content.index(b"precious")] ^= 1
    with pytest.raises(Corruption, match="not what was written"):
        wal.groups[R1].entries(1, 2, 1 << 30)


def test_recovery_of_a_large_log_keeps_no_data_in_memory() -> None:
    disk = MemoryDisk()
    wal = opened(disk, WalSettings(segment_bytes=1 << 20))
    wal.append([create(R1)])()
    for index in range(1, 200):
        wal.append([LogUpdate(R1, entries=(entry(index, bytes(1000)),))])()
    again = opened(disk.lost())
    assert again.statistics().cached_bytes == 0
    assert not any(isinstance(item, Entry) for item in again.groups[R1]._items)
    assert again.groups[R1].entries(199, 200, 1 << 30)[0].data == bytes(1000)


def test_an_entry_that_was_moved_stays_in_memory_until_its_copy_is_on_disk() -> None:
    """A follower may ask for it between the collection and its sync, which a full disk may put off for long."""
    disk = MemoryDisk()
    wal = opened(disk, WalSettings(segment_bytes=2048, cache_bytes_max=0))
    wal.append([create(R1, 11), create(R2, 22)])()
    wal.append([LogUpdate(R1, HardState(1), (entry(1, b"a straggler"),))])()
    for index in range(1, 12):
        wal.append([LogUpdate(R2, HardState(1, 0, index), (entry(index, bytes(400)),))])()
    wal.append([LogUpdate(R2, compact=CompactLog(11, 1))])()
    job = wal.collect()
    assert job is not None
    assert wal.statistics().moved_entries == 1
    wal.append([LogUpdate(R2, HardState(2, 0, 11))])  # which trims the cache
    assert wal.groups[R1].entries(1, 2, 1 << 30)[0].data == b"a straggler"
    job()
    wal.append([LogUpdate(R2, HardState(3, 0, 11))])()
    wal.append([LogUpdate(R2, HardState(4, 0, 11))])()
    assert wal.statistics().cached_bytes == 0
    assert not isinstance(wal.groups[R1]._items[0], Entry)
    assert wal.groups[R1].entries(1, 2, 1 << 30)[0].data == b"a straggler"


def test_an_entry_that_was_overwritten_stays_in_memory_until_the_new_one_is_on_disk() -> None:
    """The cache lets go of the old one by its index, under which the new one stands."""
    disk = MemoryDisk()
    wal = opened(disk, WalSettings(segment_bytes=4096, cache_bytes_max=600))
    wal.append([create(R1, 11), create(R2, 22)])()
    wal.append([LogUpdate(R1, HardState(1), (entry(1, b"the old one"),))])()
    wal.append([LogUpdate(R1, HardState(2), (entry(1, b"the new one", term=2),))])
    wal.append([LogUpdate(R2, HardState(1), (entry(1, bytes(500)),))])
    assert wal.groups[R1].entries(1, 2, 1 << 30)[0].data == b"the new one"
