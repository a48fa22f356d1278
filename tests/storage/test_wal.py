"""The shared log at work: one record a turn, one sync for many, rotation, collection, cache, tombstones."""

from collections.abc import Callable
from random import Random
from typing import Any

import pytest

from shardkv.errors import Corruption, OutOfSpace, StorageError
from shardkv.raft.errors import SnapshotTemporarilyUnavailable
from shardkv.raft.messages import ConfState, Entry, EntryType, HardState, Snapshot, SnapshotMetadata
from shardkv.storage import record
from shardkv.storage import wal as wal_module
from shardkv.storage.log_state import LogState
from shardkv.storage.record import CompactLog, CreateGroup, LogUpdate, ResetLog, Tombstone
from shardkv.storage.recovery import FIRST_SEGMENT_BYTES
from shardkv.storage.segment import Segment, Spares, segment_path
from shardkv.storage.wal import Wal, WalSettings
from shardkv.types import RangeId, ReplicaId

from .model import DIRECTORY, SMALL, Driver, state_of
from .support import MemoryDisk, MemoryFile

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


def test_a_prepared_spare_spares_the_writer_from_making_a_segment() -> None:
    disk = MemoryDisk()
    wal = opened(disk)
    wal.append([create(R1)])()
    for ready in (False, True):
        prepare = wal.prepare()
        assert prepare is not None
        assert wal.prepare() is None, "it is being made"
        prepare()
        assert wal.statistics().spare_ready == ready, "the reserve is made first"
    assert wal.prepare() is None
    operations = count_operations(disk)
    wal.append([LogUpdate(R1, HardState(1), (entry(1, bytes(1750)),))])()
    wal.append([LogUpdate(R1, entries=(entry(2, bytes(1750)),))])()
    assert operations == ["pwrite", "sync", "rename", "sync_directory", "pwrite", "pwrite", "sync"]
    assert wal.prepare() is not None


def test_a_spare_in_the_making_and_a_segment_made_on_the_spot_are_two_files() -> None:
    """The preparing thread and the writer meet when a segment fills up before its successor is ready."""
    disk = MemoryDisk()
    wal = opened(disk)
    wal.append([create(R1)])()
    reserve = wal.prepare()
    assert reserve is not None
    reserve()
    prepare = wal.prepare()
    job = wal.append([LogUpdate(R1, HardState(1), (entry(1, bytes(1990)),))])
    assert prepare is not None

    def observe(name: str, path: str) -> None:
        disk.observe = lambda name, path: None
        job()

    disk.observe = observe
    prepare()
    for index in (2, 3):
        wal.append([LogUpdate(R1, entries=(entry(index, bytes(1750)),))])()
    wal.check()
    assert len({id(segment.file) for segment in wal._state.segments.values()}) == wal.statistics().segments
    assert state_of(opened(disk.lost())) == state_of(wal)


def test_a_spare_that_gets_ready_while_a_segment_is_made_on_the_spot_is_not_lost() -> None:
    """It would keep its room on the disk, and its descriptor, for as long as the node runs."""

    class Late(Spares):
        """Where the preparing thread is done right after the writer has looked."""

        late: Callable[[], None] | None = None

        @property
        def _ready(self) -> Any:
            found = self.__dict__["found"]
            late, self.late = self.late, None
            if late is not None:
                late()
            return found

        @_ready.setter
        def _ready(self, spare: Any) -> None:
            self.__dict__["found"] = spare

    disk = MemoryDisk()
    disk.make_directory(DIRECTORY)
    spares = Late(disk, DIRECTORY, 4096, 4096)
    segment = Segment(2, segment_path(DIRECTORY, 2), 4096)
    reserve = spares.prepare()
    assert reserve is not None
    reserve()
    spares.late = spares.prepare()
    spares.install(segment)
    assert segment.file is not None
    assert spares.ready
    assert disk.list(DIRECTORY) == ["0000000000000002.wal", "reserve-1", "spare-ahead-2"]


def test_a_reserve_in_the_making_is_never_the_file_that_the_writer_takes() -> None:
    """The writer takes the reserve that the process before left, and before it has renamed it, the preparing thread
    makes the next one: in the same file it would be zeros over what was acknowledged."""
    disk = MemoryDisk()
    disk.make_directory(DIRECTORY)
    disk.open(f"{DIRECTORY}/reserve-2", create=True).allocate(4096)
    spares = Spares(disk, DIRECTORY, 4096, 4096)
    spares.inherit()
    ahead = spares.prepare()
    assert ahead is not None
    ahead()
    spares.install(Segment(1, segment_path(DIRECTORY, 1), 4096))

    def observe(name: str, path: str) -> None:
        if name == "create":
            raise OutOfSpace("no space left")
        if name == "rename":
            disk.observe = lambda name, path: None
            prepare = spares.prepare()
            assert prepare is not None
            prepare()

    disk.observe = observe
    segment = Segment(2, segment_path(DIRECTORY, 2), 4096)
    spares.install(segment)
    reserves = [name for name in disk.list(DIRECTORY) if name.startswith("reserve-")]
    assert len(reserves) == 1
    assert segment.file is not None
    segment.file.pwrite(b"acknowledged", 0)
    assert disk.read(f"{DIRECTORY}/{reserves[0]}") == bytes(4096)


def test_a_full_disk_while_preparing_is_no_failure_yet() -> None:
    """DESIGN 4.11: an out-of-space node refuses writes and serves on; it must learn of it before it is too late."""
    disk = MemoryDisk()
    wal = opened(disk)

    def full(name: str, _path: str) -> None:
        if name == "pwrite":
            raise OutOfSpace("no space left")

    disk.observe = full
    prepare = wal.prepare()
    assert prepare is not None
    with pytest.raises(OutOfSpace):
        prepare()
    disk.observe = lambda name, path: None
    assert not wal.statistics().failed
    wal.append([create(R1)])()
    while (again := wal.prepare()) is not None:
        again()
    assert wal.statistics().spare_ready


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


def test_the_owner_answers_for_snapshots_and_the_applied_configuration() -> None:
    wal = opened()
    wal.append([create(R1)])()
    log = wal.groups[R1]
    with pytest.raises(SnapshotTemporarilyUnavailable):
        log.snapshot()
    made = Snapshot(SnapshotMetadata(3, 1, NODES), b"state")
    log.snapshot_source = lambda: made
    assert log.snapshot() is made
    assert log.initial_state() == (HardState(0, 0, 0), NODES)
    log.applied_conf_state = ConfState((1, 2))
    assert log.initial_state() == (HardState(0, 0, 0), ConfState((1, 2)))


def test_trap_10_term_and_vote_never_move_back() -> None:
    """TRAPS 10: a vote given twice in a term elects two leaders."""
    for second in (HardState(4, 2, 1), HardState(5, 3, 1), HardState(5, 0, 1), HardState(6, 0, 0)):
        wal = opened()
        wal.append([create(R1)])()
        wal.append([LogUpdate(R1, HardState(5, 2, 1), (entry(1),))])()
        with pytest.raises(AssertionError, match=r"moves back|vote changes"):
            wal.append([LogUpdate(R1, second)])
    wal = opened()
    wal.append([create(R1)])()
    for allowed in (HardState(5, 0, 0), HardState(5, 2, 0), HardState(5, 2, 0), HardState(6, 0, 0)):
        wal.append([LogUpdate(R1, allowed)])()
    assert wal.groups[R1].hard_state == HardState(6, 0, 0)


def test_trap_10_a_committed_entry_is_never_overwritten() -> None:
    for update in (LogUpdate(R1, entries=(entry(2, term=3),)), LogUpdate(R1, reset=ResetLog(1, 3, NODES))):
        wal = opened()
        wal.append([create(R1)])()
        wal.append([LogUpdate(R1, HardState(1, 0, 2), (entry(1), entry(2), entry(3)))])()
        with pytest.raises(AssertionError, match="commit"):
            wal.append([update])


def test_trap_10_an_overwritten_tail_does_not_come_back() -> None:
    """TRAPS 10, ABA: entries of an old term that a new leader replaced are gone, whatever is still in the segments."""
    disk = MemoryDisk()
    wal = opened(disk)
    wal.append([create(R1)])()
    wal.append([LogUpdate(R1, HardState(1, 0, 1), tuple(entry(index, b"old") for index in range(1, 6)))])()
    wal.append([LogUpdate(R1, HardState(2, 0, 1), (entry(2, b"new", term=2),))])()
    for log in (wal.groups[R1], opened(disk.lost()).groups[R1]):
        assert log.last_index() == 2
        assert [(found.term, found.data) for found in log.entries(1, 3, 1 << 30)] == [(1, b"old"), (2, b"new")]


def test_trap_11_compaction_keeps_every_entry_after_its_index() -> None:
    """TRAPS 11: a follower one entry behind must not need a snapshot; the term before the first entry stays known."""
    disk = MemoryDisk()
    wal = opened(disk)
    wal.append([create(R1)])()
    entries = tuple(entry(index, b"%d" % index) for index in range(1, 11))
    wal.append([LogUpdate(R1, HardState(1, 0, 10), entries)])()
    wal.append([LogUpdate(R1, compact=CompactLog(9, 1))])()
    wal.append([LogUpdate(R1, compact=CompactLog(4, 1))])()
    for log in (wal.groups[R1], opened(disk.lost()).groups[R1]):
        assert (log.first_index(), log.last_index(), log.term(9)) == (10, 10, 1)
        assert log.entries(10, 11, 0)[0].data == b"10"


def test_trap_11_only_committed_entries_are_compacted() -> None:
    wal = opened()
    wal.append([create(R1)])()
    wal.append([LogUpdate(R1, HardState(1, 0, 1), (entry(1), entry(2)))])()
    with pytest.raises(AssertionError, match="committed 1"):
        wal.append([LogUpdate(R1, compact=CompactLog(2, 1))])


def test_trap_20_creation_tombstone_and_hard_state_survive_without_the_engine() -> None:
    """TRAPS 20: the engine may have lost the split's or the removal's batch; the log has the truth and says so."""
    disk = MemoryDisk()
    wal = opened(disk)
    wal.append([create(R1, 11), create(R2, 22, index=5, term=4)])()
    wal.append([LogUpdate(R2, HardState(9, 22, 5)), LogUpdate(R1, tombstone=Tombstone(ReplicaId(11), b"merged"))])()
    again = opened(disk.lost())
    child = again.groups[R2]
    assert (child.replica_id, child.payload, child.hard_state) == (22, b"payload", HardState(9, 22, 5))
    assert (child.first_index(), child.last_index(), child.term(5)) == (6, 5, 4)
    assert again.groups[R1].tombstone == Tombstone(ReplicaId(11), b"merged")
    assert again.tombstones == {R1: 11}


def test_trap_20_an_ended_groups_log_stays_until_it_is_released() -> None:
    """TRAPS 20: freed before the engine was flushed past the batch that ended the group, its log could not be
    replayed."""
    disk = MemoryDisk()
    wal = opened(disk)
    wal.append([create(R1, 11)])()
    wal.append([LogUpdate(R1, HardState(1, 0, 2), (entry(1), entry(2)))])()
    wal.append([LogUpdate(R1, tombstone=Tombstone(ReplicaId(11), b"why"))])()
    ended = opened(disk.lost()).groups[R1]
    assert ended.ended
    assert [found.index for found in ended.entries(1, 3, 1 << 30)] == [1, 2]
    with pytest.raises(AssertionError, match="has ended"):
        opened(disk.copy()).append([LogUpdate(R1, entries=(entry(3),))])
    with pytest.raises(AssertionError, match="has ended"):
        opened(disk.copy()).append([LogUpdate(R1, HardState(2, 0, 2))])
    with pytest.raises(AssertionError, match="is not released"):
        opened(disk.copy()).append([create(R1, 12)])
    wal.append([LogUpdate(R1, release=True)])()
    assert (dict(wal.groups), wal.tombstones) == ({}, {R1: 11})
    wal.append([create(R1, 12)])()
    assert opened(disk.lost()).groups[R1].replica_id == 12


def test_trap_20_only_an_ended_group_is_released() -> None:
    wal = opened()
    wal.append([create(R1, 11)])()
    with pytest.raises(AssertionError, match="has not ended"):
        wal.append([LogUpdate(R1, release=True)])


@pytest.mark.parametrize("known", [True, False])
def test_trap_03_an_ended_replica_is_not_created_again(known: bool) -> None:
    """TRAPS 3: replica ids are never reused; the tombstone counts for replicas that were never here, too."""
    disk = MemoryDisk()
    wal = opened(disk)
    if known:
        wal.append([create(R1, 11)])()
    wal.append([LogUpdate(R1, tombstone=Tombstone(ReplicaId(11)))])()
    if known:
        wal.append([LogUpdate(R1, release=True)])()
    for range_id in (10, 11):
        with pytest.raises(AssertionError, match="11 has ended"):
            opened(disk.lost()).append([create(R1, range_id)])
    opened(disk.lost()).append([create(R1, 12)])()


def test_trap_03_a_late_tombstone_of_an_older_replica_does_not_end_the_newer_one() -> None:
    wal = opened()
    wal.append([create(R1, 12)])()
    wal.append([LogUpdate(R1, tombstone=Tombstone(ReplicaId(11)))])()
    assert not wal.groups[R1].ended
    assert wal.tombstones == {R1: 11}
    wal.check()


def test_trap_02_an_adopted_child_keeps_the_vote_it_gave_before_the_split() -> None:
    """TRAPS 2 and DESIGN 4.3: a split resets the log of a replica that a message had created, never its hard state."""
    disk = MemoryDisk()
    wal = opened(disk)
    wal.append([LogUpdate(R2, create=CreateGroup(ReplicaId(22), 0, 0, ConfState()))])()
    wal.append([LogUpdate(R2, HardState(7, 3, 0))])()
    wal.append([LogUpdate(R2, reset=ResetLog(5, 5, NODES))])()
    for log in (wal.groups[R2], opened(disk.lost()).groups[R2]):
        assert log.initial_state() == (HardState(7, 3, 5), NODES)
        assert (log.first_index(), log.term(5)) == (6, 5)


def test_an_installed_snapshot_replaces_the_log() -> None:
    disk = MemoryDisk()
    wal = opened(disk)
    wal.append([create(R1)])()
    wal.append([LogUpdate(R1, HardState(1, 2, 1), (entry(1), entry(2), entry(3)))])()
    wal.append([LogUpdate(R1, HardState(4, 0, 20), reset=ResetLog(20, 3, ConfState((4, 5, 6))))])()
    wal.append([LogUpdate(R1, HardState(4, 0, 20), (entry(21, term=4),))])()
    for log in (wal.groups[R1], opened(disk.lost()).groups[R1]):
        assert log.initial_state() == (HardState(4, 0, 20), ConfState((4, 5, 6)))
        assert (log.first_index(), log.last_index(), log.term(20), log.term(21)) == (21, 21, 3, 4)


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


@pytest.mark.parametrize(
    "term, expected", [(2, HardState(3, 10, 5)), (3, HardState(3, 10, 5)), (4, HardState(4, 0, 5))]
)
def test_a_reset_forgets_a_vote_only_where_its_snapshot_is_of_a_later_term(term: int, expected: HardState) -> None:
    """Raft paper, figure 2: one vote a term. A snapshot may come in the very term in which this node has voted."""
    disk = MemoryDisk()
    wal = opened(disk)
    wal.append([create(R1)])()
    wal.append([LogUpdate(R1, HardState(3, 10, 0))])()
    wal.append([LogUpdate(R1, reset=ResetLog(5, term, NODES))])()
    for log in (wal.groups[R1], opened(disk.lost()).groups[R1]):
        assert log.initial_state()[0] == expected


def test_a_checkpoint_says_the_configuration_of_the_last_reset() -> None:
    """Groups keep what seldom changes packed."""
    disk = MemoryDisk()
    wal = opened(disk)
    wal.append([create(R1), create(R2)])()
    after = ConfState((7, 8), (9,))
    for index in (1, 2):
        large = LogUpdate(R2, HardState(1, 0, index), (entry(index, bytes(1990)),), compact=CompactLog(index, 1))
        wal.append([large])()
        if index == 1:
            wal.append([LogUpdate(R1, reset=ResetLog(5, 3, after))])()
    drop = wal.collect()
    assert drop is not None
    drop()
    assert wal.statistics().segments == 1, "what was said before its checkpoint is gone"
    for log in (wal.groups[R1], opened(disk.lost()).groups[R1]):
        assert log.initial_state()[1] == after


def test_trap_03_a_tombstone_of_an_earlier_replica_lets_no_later_one_come_again() -> None:
    """TRAPS 3: news of an earlier life may come after that of a later one."""
    disk = MemoryDisk()
    wal = opened(disk)
    for replica_id in (5, 3):
        wal.append([LogUpdate(R1, tombstone=Tombstone(ReplicaId(replica_id)))])()
    for each in (wal, opened(disk.lost())):
        assert each.tombstones == {R1: 5}
        with pytest.raises(AssertionError, match="5 has ended"):
            each.append([create(R1, 4)])
