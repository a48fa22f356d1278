"""The shared log on a disk whose calls fail: an error at every numbered call of a run, and no room at every one.

The run starts, appends, rotates, prepares spares, moves stragglers and collects; the model says what must be left. An
I/O error ends the log (a failed sync is never tried again, DESIGN 4.3); a full disk only holds it up (DESIGN 4.11).
"""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from random import Random

import pytest

from shardkv.errors import OutOfSpace, StorageError
from shardkv.raft.messages import ConfState, Entry, EntryType, HardState
from shardkv.simulation.disk import SimulatedDisk
from shardkv.storage.record import CompactLog, CreateGroup, LogUpdate
from shardkv.storage.wal import Wal, WalSettings
from shardkv.types import RangeId, ReplicaId

from .model import DIRECTORY, SMALL, Driver, state_of
from .support import MemoryDisk, MemoryFile

TOKEN = b"token"
R1 = RangeId(1)
STEPS = 90
ADVICE = "the disk reports an error; check the system's log and replace the disk"
WRITING = ("pwrite", "truncate", "rename", "unlink", "create")
"""What may find a disk full and can be done again; a sync cannot."""


def broken(operation: str, path: str) -> StorageError:
    """As :mod:`shardkv.environment.real.disk` words it."""
    return StorageError(f"cannot {operation} {path}: Input/output error; {ADVICE}")


def full(operation: str, path: str) -> OutOfSpace:
    return OutOfSpace(f"no space left while trying to {operation} {path}; free space or enlarge the disk")


def fail_at(
    disk: MemoryDisk, number: int, error: Callable[[str, str], StorageError], kinds: tuple[str, ...] = ()
) -> list[str]:
    """Let the ``number``-th change of ``disk`` fail; the list gets its name once it has."""
    met: list[str] = []

    def observe(operation: str, path: str) -> None:
        if not met and disk.operations >= number and (not kinds or operation in kinds):
            met.append(operation)
            raise error(operation, path)

    disk.observe = observe
    return met


def run_until_error(seed: int, number: int) -> tuple[Driver, str, StorageError] | None:
    """A driver whose disk failed at that call, the call, and what the log said. None if the run ends before."""
    disk = MemoryDisk()
    driver = Driver(disk, Random(seed))
    met = fail_at(disk, number, broken)
    try:
        driver.steps(STEPS)
    except StorageError as error:
        return driver, met[0], error
    assert not met, f"call {number}, a {met}, failed and nobody said so"
    return None


@pytest.mark.parametrize("seed", [0, 1])
def test_an_io_error_at_any_call_ends_the_log_names_the_file_and_loses_nothing_acknowledged(seed: int) -> None:
    """Whatever the page cache makes of it: all of what was unsynced may be there after, none of it, or parts."""
    quiet = Driver(MemoryDisk(), Random(seed))
    start = quiet.disk.operations
    quiet.steps(STEPS)
    assert quiet.wal.statistics().moved_entries > 0, "the run moves no stragglers"
    assert quiet.dropped > 2, "the run frees no segments"
    kinds = set()
    for number in range(start, quiet.disk.operations):
        found = run_until_error(seed, number)
        assert found is not None
        driver, kind, error = found
        kinds.add(kind)
        assert DIRECTORY in str(error)
        assert ADVICE in str(error)
        driver.disk.observe = lambda operation, path: None
        failed = driver.wal.statistics().failed
        # Only making a file ahead of time leaves the log as it was: nothing was written to it.
        assert failed or kind in ("create", "truncate", "pwrite", "unlink")
        if failed:
            with pytest.raises(StorageError, match="failed before"):
                driver.wal.append([LogUpdate(R1, HardState(99))])
        for disk in (driver.disk.lost(), driver.disk.copy(), driver.disk.torn(Random(number))):
            wal = Wal.open(disk, DIRECTORY, SMALL, token=TOKEN)
            sequence = wal.statistics().sequence
            assert sequence >= driver.acknowledged
            assert state_of(wal) == driver.at(sequence)
    assert kinds >= {"pwrite", "sync", "rename", "sync_directory", "truncate", "unlink"}, kinds


def test_an_error_of_a_segment_names_it_as_it_lies_in_the_directory() -> None:
    """It named a spare that was not there any more, and whoever looked for the damaged file found none."""
    disk = MemoryDisk()
    looked_for: list[str] = []

    def observe(operation: str, path: str) -> None:
        if operation in ("pwrite", "sync"):
            looked_for.append(path)
            assert path in disk.names, f"{operation} {path}: there is {disk.list(DIRECTORY)}"

    disk.observe = observe
    Driver(disk, Random(0)).steps(STEPS)
    assert len({path for path in looked_for if path.endswith(".wal")}) > 5, "the run makes no segments"


def test_an_io_error_at_any_call_of_a_start_loses_nothing_and_the_next_start_goes_well() -> None:
    """Also of a start that has a torn tail to cut, segments to remove and spares to throw away."""
    driver = Driver(MemoryDisk(), Random(3))
    driver.steps(60)
    driver.append(LogUpdate(RangeId(9), create=CreateGroup(ReplicaId(1), 0, 0, ConfState(), bytes(300))))
    driver.prepare()
    driver.prepare()
    torn = driver.disk.copy()
    last = max(name for name in torn.names if name.endswith(".wal"))
    end = len(bytes(torn.names[last].current).rstrip(b"\0"))
    torn.names[last].current[end - 5 : end] = (
        b"\xee" * 5
    )  # the end of the newest record, which no later one vouches for
    expected = state_of(Wal.open(torn.copy(), DIRECTORY, SMALL, token=TOKEN))
    number, kinds = 0, set()
    while True:
        disk = torn.copy()
        met = fail_at(disk, disk.operations + number, broken)
        said = ""
        try:
            Wal.open(disk, DIRECTORY, SMALL, token=TOKEN)
        except StorageError as error:
            said = str(error)
        if not met:
            break
        assert DIRECTORY in said
        kinds.add(met[0])
        for survivor in (disk.lost(), disk.copy(), disk.torn(Random(number))):
            assert state_of(Wal.open(survivor, DIRECTORY, SMALL, token=TOKEN)) == expected
        number += 1
    assert kinds >= {"truncate", "pwrite", "sync", "unlink"}, kinds


def run_without_room(seed: int, number: int, *, torn: bool) -> tuple[Driver, list[str]]:
    """A run in which one call finds no room, and is made again later, as the owner of the log makes it."""
    disk = MemoryDisk()
    driver = Driver(disk, Random(seed))
    met = fail_at(disk, number, full, WRITING)
    original = MemoryFile.pwrite

    def pwrite(self: MemoryFile, data: bytes, offset: int) -> None:
        try:
            original(self, data, offset)
        except OutOfSpace:
            observe, disk.observe = disk.observe, lambda operation, path: None
            original(self, bytes(data)[: len(data) // 2], offset)
            disk.observe = observe
            raise

    with pytest.MonkeyPatch.context() as patch:
        if torn:
            patch.setattr(MemoryFile, "pwrite", pwrite)
        for _ in range(STEPS):
            patient(driver.step, driver)
        patient(driver.sync, driver)
        driver.sync()
    return driver, met


def patient(step: Callable[[], None], driver: Driver) -> None:
    """Take a step. If it finds no room, the jobs that wait are run again; what they said so far must stay true."""
    jobs = list(driver.jobs)
    try:
        step()
    except OutOfSpace:
        known = driver.acknowledged
        assert not driver.wal.statistics().failed
        done = len(jobs) - len(driver.jobs)
        # The job that failed was taken off the list: it is still to be done, before the others.
        if done > 0:
            driver.jobs.insert(0, jobs[done - 1])
        assert driver.wal.synced_sequence >= known


@pytest.mark.parametrize("torn", [False, True], ids=["nothing written", "half written"])
@pytest.mark.parametrize("seed", [0, 1])
def test_a_call_that_finds_no_room_is_made_again_and_changes_nothing(seed: int, torn: bool) -> None:
    """Any call but a sync: the record is written again at the same place, before anything else is."""
    quiet = Driver(MemoryDisk(), Random(seed))
    start = quiet.disk.operations
    quiet.steps(STEPS)
    kinds = set()
    for number in range(start, quiet.disk.operations):
        driver, met = run_without_room(seed, number, torn=torn)
        kinds.update(met)
        assert not driver.wal.statistics().failed
        assert state_of(driver.wal) == driver.model.state()
        driver.wal.check()
        again = Wal.open(driver.disk.lost(), DIRECTORY, SMALL, token=TOKEN)
        assert state_of(again) == driver.model.state()
    assert kinds >= {"pwrite", "rename", "truncate", "unlink"}, kinds


@pytest.mark.parametrize("seed", [0, 1])
def test_a_crash_after_a_call_that_found_no_room_leaves_the_acknowledged_prefix(seed: int) -> None:
    """What was half written and never done again is a torn tail like any other."""
    quiet = Driver(MemoryDisk(), Random(seed))
    start = quiet.disk.operations
    quiet.steps(STEPS)
    for number in range(start, quiet.disk.operations, 3):
        disk = MemoryDisk()
        driver = Driver(disk, Random(seed))
        met = fail_at(disk, number, full, WRITING)
        with suppress(OutOfSpace):
            driver.steps(STEPS)
        if not met:
            break  # the run ends with calls that need no room
        for left in (disk.lost(), disk.copy(), disk.torn(Random(number))):
            wal = Wal.open(left, DIRECTORY, SMALL, token=TOKEN)
            sequence = wal.statistics().sequence
            assert sequence >= driver.acknowledged
            assert state_of(wal) == driver.at(sequence)


@pytest.mark.parametrize("operation", ["sync", "sync_directory"])
def test_a_sync_that_finds_no_room_is_final(operation: str) -> None:
    """TRAPS 10: after a failed fsync the system may have dropped the pages, and the next one says that all is well."""
    disk = MemoryDisk()
    wal = Wal.open(disk, DIRECTORY, SMALL, token=TOKEN)
    wal.append([LogUpdate(R1, create=CreateGroup(ReplicaId(1), 0, 0, ConfState()))])()
    job = wal.append([LogUpdate(R1, HardState(1), (Entry(1, 1, EntryType.NORMAL, bytes(1990)),))])
    fail_at(disk, 0, full, (operation,))
    with pytest.raises(StorageError, match="restart the node") as caught:
        job()
    assert not isinstance(caught.value, OutOfSpace)
    with pytest.raises(StorageError, match="failed before"):
        job()


def test_a_spare_that_has_no_room_is_not_begun() -> None:
    """It is tried four times a second, for days: each time the disk would be written full for a moment, and the engine
    and everybody else would find no room."""
    disk = SimulatedDisk()
    wal = Wal.open(disk, DIRECTORY, SMALL, token=TOKEN)
    disk.leave(SMALL.segment_bytes + SMALL.reserve_bytes - 1)
    reserve = wal.prepare()
    assert reserve is not None
    reserve()
    disk.trace = []
    for _ in range(3):
        prepare = wal.prepare()
        assert prepare is not None
        with pytest.raises(OutOfSpace, match=f"{DIRECTORY}.*free space or enlarge the disk"):
            prepare()
    assert not disk.trace
    disk.leave(SMALL.segment_bytes)
    prepare = wal.prepare()
    assert prepare is not None
    prepare()
    assert wal.statistics().spare_ready


def test_trying_again_for_a_spare_leaves_no_files_behind() -> None:
    """Else a disk that is nearly full would be filled to its last byte by the attempts."""
    disk = MemoryDisk()
    wal = Wal.open(disk, DIRECTORY, SMALL, token=TOKEN)
    before = set(disk.names)
    for _ in range(5):
        fail_at(disk, disk.operations, full, ("pwrite",))
        prepare = wal.prepare()
        assert prepare is not None
        with pytest.raises(OutOfSpace):
            prepare()
        assert set(disk.names) == before


def prepared(settings: WalSettings = SMALL) -> tuple[SimulatedDisk, Wal]:
    """A log with a spare and a reserve."""
    disk = SimulatedDisk()
    wal = Wal.open(disk, DIRECTORY, settings, token=TOKEN)
    wal.append([LogUpdate(R1, create=CreateGroup(ReplicaId(1), 0, 0, ConfState()))])()
    while (job := wal.prepare()) is not None:
        job()
    assert len(disk.list(DIRECTORY)) == 3
    return disk, wal


@pytest.mark.parametrize("data_bytes", [1500, 4000], ids=["in a spare", "larger than a spare"])
def test_the_reserve_takes_what_is_on_its_way_when_no_segment_can_be_made_and_what_follows(data_bytes: int) -> None:
    """Else what Raft logs of its own would stand behind client data that have no room, and nobody could vote."""
    disk, wal = prepared(replace(SMALL, reserve_bytes=8192))
    disk.leave(0)
    index = 0
    while wal.shortage is None:
        index += 1
        wal.append([LogUpdate(R1, HardState(1), (Entry(1, index, EntryType.NORMAL, bytes(data_bytes)),))])()
    assert wal.spares_taken == index - (data_bytes < SMALL.segment_bytes)
    for term in range(2, 40):
        wal.append([LogUpdate(R1, HardState(term, 1))])()
    wal.check()
    disk.crash()
    again = Wal.open(disk.restart(), DIRECTORY, SMALL, token=TOKEN)
    assert state_of(again) == state_of(wal)


def test_the_reserve_stays_for_the_next_start_which_may_find_the_disk_full() -> None:
    """Its records have nowhere else to go: it could not even vote, nor take part in what gives back room."""
    disk, wal = prepared()
    wal.append([LogUpdate(R1, HardState(1), (Entry(1, 1, EntryType.NORMAL, bytes(1500)),))])()
    for _ in range(3):
        disk.kill()
        disk = disk.restart()
        wal = Wal.open(disk, DIRECTORY, SMALL, token=TOKEN)
        assert [name for name in disk.list(DIRECTORY) if not name.endswith(".wal")] == ["reserve-1"]
        prepare = wal.prepare()
        assert prepare is not None
        prepare()  # the spare: the reserve is there
        assert wal.statistics().spare_ready
    disk.kill()
    disk = disk.restart()
    wal = Wal.open(disk, DIRECTORY, SMALL, token=TOKEN)
    disk.leave(0)
    wal.append([LogUpdate(R1, HardState(2), (Entry(2, 2, EntryType.NORMAL, bytes(1500)),))])()
    assert wal.shortage is not None
    prepare = wal.prepare()
    assert prepare is not None
    with pytest.raises(OutOfSpace):
        prepare()
    disk.leave(1 << 20)
    while (job := wal.prepare()) is not None:
        job()
    wal.append([LogUpdate(R1, HardState(3), (Entry(3, 3, EntryType.NORMAL, bytes(1900)),))])()
    wal.check()
    disk.kill()
    assert state_of(Wal.open(disk.restart(), DIRECTORY, SMALL, token=TOKEN)) == state_of(wal)


@pytest.mark.parametrize("left", ["cut off", "longer", "written to"])
def test_what_is_not_a_whole_reserve_is_not_taken_for_one(left: str) -> None:
    """Of an attempt that a crash came before, of other settings, or by whomever: it goes, and another is made."""
    disk, wal = prepared()
    wal.close()
    file = disk.open(f"{DIRECTORY}/reserve-1")
    if left == "cut off":
        file.truncate(SMALL.reserve_bytes - 1)
    elif left == "longer":
        file.allocate(SMALL.reserve_bytes + 1)
    else:
        file.pwrite(b"x", SMALL.reserve_bytes - 1)
    file.sync()
    disk.kill()
    disk = disk.restart()
    wal = Wal.open(disk, DIRECTORY, SMALL, token=TOKEN)
    assert disk.list(DIRECTORY) == ["0000000000000001.wal"]
    while (job := wal.prepare()) is not None:
        job()
    assert disk.list(DIRECTORY) == ["0000000000000001.wal", "reserve-1", "spare-ahead-2"]


def test_a_start_on_a_full_disk_without_a_reserve_moves_no_stragglers() -> None:
    """What room the segment has that is written to is not for copies either."""
    settings = replace(SMALL, closed_segments_max=1, move_live_fraction_max=1.0, moved_per_new_byte=1000)
    disk, wal = prepared(settings)
    for index in range(1, 4):
        wal.append([LogUpdate(R1, HardState(1, 0, index), (Entry(1, index, EntryType.NORMAL, bytes(1000)),))])()
    disk.unlink(f"{DIRECTORY}/reserve-1")
    disk.kill()
    disk = disk.restart()
    wal = Wal.open(disk, DIRECTORY, settings, token=TOKEN)
    disk.leave(0)
    prepare = wal.prepare()
    assert prepare is not None
    with pytest.raises(OutOfSpace):
        prepare()
    collected(wal)
    assert wal.statistics().moved_entries == 0
    disk.leave(1 << 20)
    while (job := wal.prepare()) is not None:
        job()
    collected(wal)
    assert wal.statistics().moved_entries > 0


def collected(wal: Wal) -> None:
    for _ in range(5):
        job = wal.collect()
        if job is not None:
            job()


def test_the_reserve_is_made_anew_once_there_is_room_and_not_touched_before_it_must() -> None:
    disk, wal = prepared()
    for index in range(1, 8):
        if index == 3:
            disk.leave(0)
        if index == 4:
            assert wal.shortage is not None
            disk.leave(1 << 20)
            while (job := wal.prepare()) is not None:
                job()
        wal.append([LogUpdate(R1, HardState(1), (Entry(1, index, EntryType.NORMAL, bytes(1500)),))])()
        assert (wal.shortage is None) == (index != 3), index
        wal.check()
    assert sum(not name.endswith(".wal") for name in disk.list(DIRECTORY)) == 1


def test_no_stragglers_are_moved_into_the_reserve_and_dead_segments_still_go() -> None:
    """A quarter of a large segment is more than the reserve holds, and nothing would be left for Raft's own records."""
    disk, wal = prepared(replace(SMALL, closed_segments_max=1, move_live_fraction_max=1.0, moved_per_new_byte=1000))
    disk.leave(0)
    index = 0
    while wal.shortage is None:
        index += 1
        wal.append([LogUpdate(R1, HardState(1, 0, index), (Entry(1, index, EntryType.NORMAL, bytes(1000)),))])()
    sequence = wal.statistics().sequence
    assert wal.collect() is None
    assert wal.statistics().sequence == sequence
    wal.append([LogUpdate(R1, compact=CompactLog(index - 1, 1))])()
    job = wal.collect()
    assert job is not None
    job()
    assert wal.statistics().oldest_segment_id > 1
    wal.append([LogUpdate(RangeId(2), create=CreateGroup(ReplicaId(1), 0, 0, ConfState()))])()
    disk.leave(1 << 20)
    while (job := wal.prepare()) is not None:
        job()
    wal.append([LogUpdate(R1, HardState(1, 0, index + 1), (Entry(1, index + 1, EntryType.NORMAL, bytes(2000)),))])()
    assert wal.collect() is not None, "there is room to move what is left"
    wal.check()


@pytest.mark.parametrize("spare", [True, False], ids=["made-ahead", "made-now"])
def test_a_segment_that_finds_no_room_for_its_name_gives_back_its_file(spare: bool) -> None:
    """It is tried again and again, each time with another file: on a full disk nobody would ever have that room."""
    disk = MemoryDisk()
    wal = Wal.open(disk, DIRECTORY, SMALL, token=TOKEN)
    wal.append([LogUpdate(R1, create=CreateGroup(ReplicaId(1), 0, 0, ConfState()))])()
    before = set(disk.names)
    while spare and (prepare := wal.prepare()) is not None:
        prepare()
    job = wal.append([LogUpdate(R1, HardState(1), (Entry(1, 1, EntryType.NORMAL, bytes(1990)),))])
    for _ in range(3):
        fail_at(disk, disk.operations, full, ("rename",))
        with pytest.raises(OutOfSpace):
            job()
        assert len(set(disk.names) - before) == spare, "only the reserve is left"
    job()
    assert Wal.open(disk.lost(), DIRECTORY, SMALL, token=TOKEN).groups[R1].last_index() == 1


def test_closing_a_log_without_room_closes_its_files_and_loses_nothing_acknowledged() -> None:
    driver = Driver(MemoryDisk(), Random(0))
    driver.append(LogUpdate(R1, create=CreateGroup(ReplicaId(1), 0, 0, ConfState())))
    driver.sync()
    driver.append(LogUpdate(R1, HardState(3, 2, 0)))
    fail_at(driver.disk, 0, full, ("pwrite",))
    driver.wal.close()
    assert all(segment.file._closed for segment in driver.wal._state.segments.values())
    wal = Wal.open(driver.disk.copy(), DIRECTORY, SMALL, token=TOKEN)
    assert state_of(wal) == driver.at(driver.acknowledged)


def test_a_segment_that_finds_no_room_where_there_is_no_reserve_is_asked_for_again() -> None:
    """Nothing is lost, and the log has not failed."""
    disk = MemoryDisk()
    wal = Wal.open(disk, DIRECTORY, SMALL, token=TOKEN)
    wal.append([LogUpdate(R1, create=CreateGroup(ReplicaId(1), 0, 0, ConfState()))])()
    before = set(disk.names)
    job = wal.append([LogUpdate(R1, HardState(1), (Entry(1, 1, EntryType.NORMAL, bytes(4000)),))])
    for call in (1, 2):
        writes: list[str] = []

        def observe(operation: str, path: str, call: int = call, writes: list[str] = writes) -> None:
            if operation == "pwrite":
                writes.append(path)
                if len(writes) == call:
                    raise full(operation, path)

        disk.observe = observe
        with pytest.raises(OutOfSpace):
            job()
        assert not wal.statistics().failed
        assert set(disk.names) == before, "its room is given back"
    disk.observe = lambda operation, path: None
    job()
    assert Wal.open(disk.lost(), DIRECTORY, SMALL, token=TOKEN).groups[R1].last_index() == 1


def test_closing_a_log_that_has_failed_closes_its_files_although_one_was_never_made() -> None:
    disk = MemoryDisk()
    wal = Wal.open(disk, DIRECTORY, SMALL, token=TOKEN)
    wal.append([LogUpdate(R1, create=CreateGroup(ReplicaId(1), 0, 0, ConfState()))])()
    job = wal.append([LogUpdate(R1, HardState(1), (Entry(1, 1, EntryType.NORMAL, bytes(1990)),))])
    fail_at(disk, 0, broken, ("create",))
    with pytest.raises(StorageError, match="Input/output error"):
        job()
    files = [segment.file for segment in wal._state.segments.values()]
    assert files[1:] == [None]
    wal.close()
    assert isinstance(files[0], MemoryFile)
    assert files[0]._closed


def test_segments_that_found_no_room_to_go_are_removed_once_there_is() -> None:
    """Some file systems need room to remove a file. What has gone is not looked for again."""
    disk = MemoryDisk()
    wal = Wal.open(disk, DIRECTORY, SMALL, token=TOKEN)
    wal.append([LogUpdate(R1, create=CreateGroup(ReplicaId(1), 0, 0, ConfState()))])()
    for index in (1, 2, 3):
        entry = Entry(1, index, EntryType.NORMAL, bytes(1990))
        wal.append([LogUpdate(R1, HardState(1, 0, index), (entry,), compact=CompactLog(index, 1))])()
    drop = wal.collect()
    assert drop is not None
    removals: list[str] = []

    def observe(operation: str, path: str) -> None:
        if operation == "unlink":
            removals.append(path)
            if len(removals) == 2:
                raise full(operation, path)

    disk.observe = observe
    with pytest.raises(OutOfSpace):
        drop()
    drop()
    assert len(removals) == 4
    assert removals[1] == removals[2]
    assert not wal.statistics().failed
    assert [name for name in disk.list(DIRECTORY) if name.endswith(".wal")] == [f"{4:016x}.wal"]
