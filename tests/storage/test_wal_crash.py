"""The shared log under attack: crashes at every moment, cut files, flipped bits. The judge is a plain model."""

from random import Random

import pytest

from shardkv.errors import Corruption, StorageError
from shardkv.raft.messages import ConfState, Entry, EntryType, HardState
from shardkv.simulation import LoseAll, PowerCut, SimulatedDisk
from shardkv.storage import recovery
from shardkv.storage.record import HEADER, HEADER_BYTES, CompactLog, CreateGroup, LogUpdate
from shardkv.storage.wal import Wal, WalSettings
from shardkv.types import RangeId, ReplicaId

from .model import DIRECTORY, SMALL, Driver, state_of
from .support import MemoryDisk

TOKEN = b"token"
R1, R2 = RangeId(1), RangeId(2)


class Crash(BaseException):
    """The process dies here."""


def crash_at(disk: MemoryDisk, operation: int) -> None:
    """Let ``disk`` kill whoever would carry out its ``operation``-th change."""

    def observe(_name: str, _path: str) -> None:
        if disk.operations == operation:
            raise Crash

    disk.observe = observe


def leftovers(disk: MemoryDisk, seed: int) -> list[MemoryDisk]:
    """What the next process may find: nothing unsynced, everything, or parts of it."""
    return [disk.lost(), disk.copy(), disk.torn(Random(seed)), disk.torn(Random(seed + 1))]


def run_until_crash(seed: int, operation: int, steps: int) -> Driver | None:
    """A driver whose process died at that disk operation; None if the run ends before."""
    disk = MemoryDisk()
    driver = Driver(disk, Random(seed))
    crash_at(disk, operation)
    try:
        driver.steps(steps)
    except Crash:
        return driver
    return None


@pytest.mark.parametrize("seed", range(3))
def test_a_crash_at_any_disk_operation_leaves_at_least_what_was_acknowledged(seed: int) -> None:
    """DESIGN 4.3: what is recovered is the state after some record, no older than the last acknowledged."""
    quiet = Driver(MemoryDisk(), Random(seed))
    start = quiet.disk.operations
    quiet.steps(90)
    statistics = quiet.wal.statistics()
    assert quiet.dropped > 2, "the run frees no segments"
    assert statistics.moved_entries > 0, "the run moves no stragglers"
    for operation in range(start, quiet.disk.operations):
        driver = run_until_crash(seed, operation, 90)
        assert driver is not None
        for disk in leftovers(driver.disk, operation):
            wal = Wal.open(disk, DIRECTORY, SMALL, token=TOKEN)
            wal.check()
            sequence = wal.statistics().sequence
            assert sequence >= driver.acknowledged
            assert state_of(wal) == driver.at(sequence)


def test_a_log_whose_very_beginning_a_crash_cut_off_is_begun_again() -> None:
    """A segment that has its name has its checkpoint, on the disk: without one it would be damaged, not new."""
    for operation in range(20):
        disk = MemoryDisk()
        crash_at(disk, operation)
        try:
            Wal.open(disk, DIRECTORY, SMALL, token=TOKEN)
            ended = True
        except Crash:
            ended = False
        for left in leftovers(disk, operation):
            wal = Wal.open(left, DIRECTORY, SMALL, token=TOKEN, create=not ended)
            assert wal.statistics().sequence == 1
        if ended:
            return
    raise AssertionError("the beginning takes no end")


@pytest.mark.parametrize("seed", range(3))
def test_a_log_goes_on_after_crash_upon_crash(seed: int) -> None:
    """A torn tail is cut before anything is appended, so that a second crash cannot bring it back."""
    random = Random(seed)
    disk = MemoryDisk()
    state = ((), ())
    for life in range(40):
        driver = Driver(disk, random, state=state)
        crash_at(disk, disk.operations + random.randrange(60))
        try:
            driver.steps(30)
        except Crash:
            pass
        disk = random.choice(leftovers(driver.disk, life))
        # The next life may die in its recovery, more than once.
        while True:
            crash_at(disk, disk.operations + random.randrange(8))
            try:
                wal = Wal.open(disk, DIRECTORY, SMALL, token=TOKEN)
                break
            except Crash:
                disk = random.choice(leftovers(disk, life))
        sequence = wal.statistics().sequence
        state = state_of(wal)
        assert sequence >= driver.acknowledged
        assert state == driver.at(sequence)
        disk = disk.copy()


def test_what_a_start_found_is_there_after_a_power_cut_wherever_the_life_before_it_was_killed() -> None:
    """What a killed process left unsynced, names of files too, counts once a start has read it: DESIGN 4.3."""

    def life(disk: SimulatedDisk) -> None:
        wal = Wal.open(disk, DIRECTORY, SMALL, token=TOKEN)
        wal.append([LogUpdate(R1, create=CreateGroup(ReplicaId(11), 0, 0, ConfState((11, 12)), b"p"))])()
        for index in range(1, 30):
            entry = Entry(1, index, EntryType.NORMAL, bytes(100))
            wal.append([LogUpdate(R1, HardState(1, 11, index - 1), (entry,))])()
        assert wal.statistics().segments > 2, "no segment is full"

    number = 0
    ended = False
    while not ended:
        number += 1
        disk = SimulatedDisk()
        disk.make_directory(DIRECTORY)
        disk.cut_power_at(disk.calls + number)
        try:
            life(disk)
            ended = True
        except PowerCut:
            pass
        disk.kill()
        again = disk.restart()
        found = Wal.open(again, DIRECTORY, SMALL, token=TOKEN).statistics().sequence
        again.crash(LoseAll())
        wal = Wal.open(again.restart(), DIRECTORY, SMALL, token=TOKEN, create=False)
        assert wal.statistics().sequence == found, f"killed at call {number}"


def small_log(records: int = 6) -> tuple[MemoryDisk, Driver, str]:
    """A short log in one segment: a creation, then one entry a record, all acknowledged one by one."""
    disk = MemoryDisk()
    settings = WalSettings(segment_bytes=1024)
    driver = Driver(disk, Random(0), settings)
    driver.append(LogUpdate(R1, create=CreateGroup(ReplicaId(11), 0, 0, ConfState((11, 12)), b"p")))
    driver.sync()
    for index in range(1, records):
        entry = Entry(1, index, EntryType.NORMAL, b"entry %d" % index)
        driver.append(LogUpdate(R1, HardState(1, 11, index - 1), (entry,)))
        driver.sync()
    path = f"{DIRECTORY}/{1:016x}.wal"
    return disk, driver, path


def records_in(content: bytes) -> list[tuple[int, int, int, int]]:
    """``start, end, sequence, synced`` of every record of a sound segment."""
    found, offset = [], 0
    while len(content) - offset >= HEADER_BYTES and content[offset : offset + 4] != bytes(4):
        _, _, meta, data, _, sequence, synced = HEADER.unpack_from(content, offset)
        end = offset + HEADER_BYTES + meta + data
        found.append((offset, end, sequence, synced))
        offset = end
    return found


def recovered_or_corrupt(disk: MemoryDisk, settings: WalSettings) -> Wal | None:
    try:
        return Wal.open(disk, DIRECTORY, settings, token=TOKEN)
    except Corruption:
        return None


def test_every_flipped_bit_of_a_small_log_is_corruption_or_a_cut_above_the_synced_record() -> None:
    """DESIGN 4.3: damage above the highest synced offset is a torn tail, below it is Corruption, never skipped."""
    disk, driver, path = small_log()
    content = bytes(disk.names[path].current)
    records = records_in(content)
    assert len(records) == 7
    outcomes = {"whole": 0, "cut": 0, "corrupt": 0}
    for position in range(len(content)):
        hit = next((record for record in records if record[0] <= position < record[1]), None)
        for bit in range(8):
            broken = disk.copy()
            broken.names[path].current[position] ^= 1 << bit
            wal = recovered_or_corrupt(broken, WalSettings(segment_bytes=1024))
            if hit is None:
                assert wal is not None
                assert state_of(wal) == driver.model.state()
                outcomes["whole"] += 1
                continue
            known = max((synced for _, _, sequence, synced in records if sequence > hit[2]), default=0)
            if hit[2] == 1 or known >= hit[2]:
                assert wal is None, f"bit {bit} of byte {position} went unnoticed"
                outcomes["corrupt"] += 1
            else:
                assert wal is not None
                assert state_of(wal) == driver.at(hit[2] - 1)
                outcomes["cut"] += 1
    assert all(outcomes.values()), outcomes


def test_a_file_cut_at_any_byte_is_corruption_or_a_cut_above_the_synced_record() -> None:
    disk, driver, path = small_log()
    records = records_in(bytes(disk.names[path].current))
    for size in range(records[-1][1]):
        broken = disk.copy()
        del broken.names[path].current[size:]
        wal = recovered_or_corrupt(broken, WalSettings(segment_bytes=1024))
        whole = [record for record in records if record[1] <= size]
        if not whole:
            assert wal is None, "the oldest segment lost its beginning"
        else:
            assert wal is not None
            assert state_of(wal) == driver.at(whole[-1][2])


@pytest.mark.parametrize("seed", range(3))
def test_damage_anywhere_in_a_log_of_many_segments_is_never_silent(seed: int) -> None:
    """One flipped bit in every seventh byte that was written: only what no later record vouches for may be cut."""
    random = Random(seed)
    disk = MemoryDisk()
    driver = Driver(disk, random)
    driver.steps(60)
    whole = driver.model.state()
    names = [name for name in sorted(disk.names) if name.endswith(".wal")]
    assert len(names) > 2
    records = [(name, *record) for name in names for record in records_in(bytes(disk.names[name].current))]
    outcomes = {"cut": 0, "corrupt": 0}
    for name, start, end, sequence, _ in records:
        known = max((synced for *_, other, synced in records if other > sequence), default=0)
        for position in range(start, end, 7):
            broken = disk.copy()
            broken.names[name].current[position] ^= 1 << random.randrange(8)
            wal = recovered_or_corrupt(broken, SMALL)
            if known >= sequence or sequence == records[0][3]:
                assert wal is None, f"a flipped bit in byte {position} of {name} went unnoticed"
                outcomes["corrupt"] += 1
            else:
                assert wal is not None
                assert state_of(wal) == driver.at(sequence - 1)
                outcomes["cut"] += 1
    assert all(outcomes.values()), outcomes
    wal = recovered_or_corrupt(disk.copy(), SMALL)
    assert wal is not None
    assert state_of(wal) == whole


TINY = WalSettings(segment_bytes=512, cache_bytes_max=0, move_bytes_max=60, closed_segments_max=1)


def worn_log() -> tuple[MemoryDisk, Driver]:
    """A small log with a past: it has rotated, moved a straggler and freed segments, each record acknowledged."""
    disk = MemoryDisk()
    driver = Driver(disk, Random(0), TINY)
    driver.append(*(LogUpdate(each, create=CreateGroup(ReplicaId(1), 0, 0, ConfState())) for each in (R1, R2)))
    driver.append(LogUpdate(R1, HardState(1), (Entry(1, 1, EntryType.NORMAL, b"a straggler"),)))
    driver.sync()
    for index in range(1, 9):
        driver.append(LogUpdate(R2, HardState(1, 0, index), (Entry(1, index, EntryType.NORMAL, b"%d" % index * 99),)))
        driver.sync()
        driver.append(LogUpdate(R2, compact=CompactLog(index, 1)))
        driver.collect()
        driver.sync()
    for index in (9, 10):
        driver.append(LogUpdate(R2, HardState(1, 0, index), (Entry(1, index, EntryType.NORMAL, b"%d" % index * 50),)))
        driver.sync()
    statistics = driver.wal.statistics()
    assert statistics.moved_entries > 1
    assert driver.dropped > 2
    assert statistics.segments > 1
    return disk, driver


def records_of(disk: MemoryDisk) -> list[tuple[str, int, int, int, int]]:
    """``path, start, end, sequence, synced`` of every record of a sound log, oldest first."""
    names = [name for name in sorted(disk.names) if name.endswith(".wal")]
    return [(name, *record) for name in names for record in records_in(bytes(disk.names[name].current))]


def vouched(records: list[tuple[str, int, int, int, int]], sequence: int) -> bool:
    """Whether a later record, or the next segment's mere beginning, says that this record was synced."""
    return sequence == records[0][3] or max((each[4] for each in records if each[3] > sequence), default=0) >= sequence


def check_damaged(broken: MemoryDisk, driver: Driver, sequence: int, corrupt: bool, what: str) -> None:
    """Open a log in which record ``sequence`` is damaged: Corruption that says where and what to do, or a cut there."""
    if corrupt:
        with pytest.raises(Corruption, match=r"/data/wal[^ ]*: .*do not delete anything"):
            Wal.open(broken, DIRECTORY, TINY, token=TOKEN)
        return
    wal = recovered_or_corrupt(broken, TINY)
    assert wal is not None, what
    assert state_of(wal) == driver.at(sequence - 1), what
    wal.check()


def test_every_flipped_bit_of_a_log_with_a_past_is_corruption_or_a_cut_above_the_synced_record() -> None:
    """Every bit of every record that is left after rotations, moves and collections; the unused rest is no matter."""
    disk, driver = worn_log()
    records = records_of(disk)
    cut = corrupt = 0
    for path, start, end, sequence, _ in records:
        known = vouched(records, sequence)
        for position in range(start, end):
            for bit in range(8):
                broken = disk.copy()
                broken.names[path].current[position] ^= 1 << bit
                check_damaged(broken, driver, sequence, known, f"bit {bit} of byte {position} of {path}")
                cut, corrupt = cut + (not known), corrupt + known
    assert cut > 100
    assert corrupt > 100


def test_the_files_of_a_log_with_a_past_cut_at_any_byte_are_corruption_or_end_at_the_cut() -> None:
    """The newest segment, and the one before it, whose records the newest one vouches for."""
    disk, driver = worn_log()
    records = records_of(disk)
    for path in sorted({record[0] for record in records})[-2:]:
        mine = [record for record in records if record[0] == path]
        for size in range(mine[-1][2]):
            broken = disk.copy()
            del broken.names[path].current[size:]
            sequence = next(record[3] for record in mine if record[2] > size)
            # What was cut off with it vouches for nothing.
            left = [records[0], *(each for each in records[1:] if each[0] != path or each[2] <= size)]
            check_damaged(broken, driver, sequence, vouched(left, sequence), f"{path} cut at {size}")


@pytest.mark.parametrize("which", range(4))
def test_a_missing_segment_is_corruption(which: int) -> None:
    """Nobody removes a segment but the log itself, oldest first. (Of the newest only the mark tells; see below.)"""
    disk = MemoryDisk()
    driver = Driver(disk, Random(1))
    while driver.wal.statistics().segments < 5:
        driver.append(*(driver.update(RangeId(range_id)) for range_id in (1, 2, 3)))
    driver.sync()
    names = [name for name in sorted(disk.names) if name.endswith(".wal")]
    broken = disk.copy()
    del broken.names[names[which]]
    with pytest.raises(Corruption, match="in no segment"):
        Wal.open(broken, DIRECTORY, SMALL, token=TOKEN)


def test_zeros_over_a_synced_record_are_no_end_of_the_log() -> None:
    """A lost write leaves zeros, which look like the unused rest of the segment."""
    disk, _, path = small_log()
    for start, end, sequence, _ in records_in(bytes(disk.names[path].current))[1:-1]:
        broken = disk.copy()
        broken.names[path].current[start:end] = bytes(end - start)
        with pytest.raises(Corruption, match=rf"offset {start} \(number {sequence}\)"):
            Wal.open(broken, DIRECTORY, SMALL, token=TOKEN)


def test_a_witness_is_found_wherever_the_windows_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """The search reads in windows; a record may begin across the border of two."""
    disk, _, path = small_log(3)
    start, end, _, _ = records_in(bytes(disk.names[path].current))[-2]
    for window_bytes in range(5, 60):
        monkeypatch.setattr(recovery, "WINDOW_BYTES", window_bytes)
        broken = disk.copy()
        broken.names[path].current[start:end] = bytes(end - start)
        with pytest.raises(Corruption, match="says that it was synced"):
            Wal.open(broken, DIRECTORY, SMALL, token=TOKEN)


def test_a_record_missing_at_the_end_of_a_closed_segment_is_corruption() -> None:
    """Also one that leaves the checkpoint after it as it was: it overwrote an entry by one of the same index."""
    disk = MemoryDisk()
    wal = Wal.open(disk, DIRECTORY, SMALL, token=TOKEN)
    wal.append([LogUpdate(R1, create=CreateGroup(ReplicaId(1), 0, 0, ConfState()))])()
    wal.append([LogUpdate(R1, HardState(2), (Entry(1, 1), Entry(1, 2)))])()
    wal.append([LogUpdate(R1, entries=(Entry(2, 2, EntryType.NORMAL, b"the truth"),))])()
    wal.append([LogUpdate(R1, entries=(Entry(2, 3, EntryType.NORMAL, bytes(1700)),))])()
    first, second = (f"{DIRECTORY}/{number:016x}.wal" for number in (1, 2))
    assert second in disk.names
    start, end, sequence, _ = records_in(bytes(disk.names[first].current))[-1]
    disk.names[first].current[start:end] = bytes(end - start)
    with pytest.raises(Corruption, match=rf"number {sequence}\)"):
        Wal.open(disk, DIRECTORY, SMALL, token=TOKEN)


def test_the_checkpoint_of_a_new_segment_vouches_for_all_before_it() -> None:
    """One job wrote the end of a segment and the beginning of the next; nothing later says that the former was synced,
    but the writer syncs a segment before it writes to another."""
    disk = MemoryDisk()
    wal = Wal.open(disk, DIRECTORY, SMALL, token=TOKEN)
    wal.append([LogUpdate(R1, create=CreateGroup(ReplicaId(1), 0, 0, ConfState()))])()
    wal.append([LogUpdate(R1, HardState(1), (Entry(1, 1),))])
    wal.append([LogUpdate(R1, entries=(Entry(1, 2, EntryType.NORMAL, bytes(1800)),))])()
    first = f"{DIRECTORY}/{1:016x}.wal"
    start, _, sequence, _ = records_in(bytes(disk.names[first].current))[-1]
    disk.names[first].current[start + HEADER_BYTES] ^= 1
    with pytest.raises(Corruption, match=rf"number {sequence}\)"):
        Wal.open(disk, DIRECTORY, SMALL, token=TOKEN)


def test_a_segment_that_was_named_and_never_written_to_goes() -> None:
    disk = MemoryDisk()
    wal = Wal.open(disk, DIRECTORY, SMALL, token=TOKEN)
    wal.append([LogUpdate(R1, create=CreateGroup(ReplicaId(1), 0, 0, ConfState()))])()
    job = wal.append([LogUpdate(R1, HardState(1), (Entry(1, 1, EntryType.NORMAL, bytes(2000)),))])
    second = f"{DIRECTORY}/{2:016x}.wal"

    def observe(_name: str, _path: str) -> None:
        if second in disk.names:
            raise Crash

    disk.observe = observe
    with pytest.raises(Crash):
        job()
    survivor = disk.copy()
    again = Wal.open(survivor, DIRECTORY, SMALL, token=TOKEN)
    assert again.statistics().sequence == 2
    assert [name for name in survivor.lost().names if name.endswith(".wal")] == [f"{DIRECTORY}/{1:016x}.wal"]


def test_an_old_segment_whose_removal_a_crash_undid_goes_again() -> None:
    """Segments are unlinked oldest first; the directory's blocks need not reach the disk in that order."""
    disk = MemoryDisk()
    driver = Driver(disk, Random(1))
    while driver.wal.statistics().segments < 4:
        driver.append(*(driver.update(RangeId(range_id)) for range_id in (1, 2, 3)))
    driver.sync()
    oldest = f"{DIRECTORY}/{1:016x}.wal"
    saved = disk.names[oldest]
    while driver.wal.statistics().oldest_segment_id < 3:
        driver.step()
    driver.sync()
    assert f"{DIRECTORY}/{2:016x}.wal" not in disk.names
    crashed = disk.copy()
    crashed.names[oldest] = crashed.durable_names[oldest] = saved
    again = Wal.open(crashed, DIRECTORY, SMALL, token=TOKEN)
    assert state_of(again) == driver.model.state()
    assert oldest not in crashed.lost().names


def test_a_user_value_that_looks_like_a_record_is_no_witness() -> None:
    """A torn tail holds what a user wrote; without the directory's token nobody can forge a record in it."""
    disk, driver, path = small_log()
    content = bytes(disk.names[path].current)
    forged_disk = MemoryDisk()
    forger = Wal.open(forged_disk, DIRECTORY, WalSettings(segment_bytes=1024), token=b"another")
    for _ in range(20):
        forger.append(
            [LogUpdate(R1, create=CreateGroup(ReplicaId(1), 0, 0, ConfState()))]
            if not forger.groups
            else [LogUpdate(R1, HardState(1))]
        )()
    forged = bytes(forged_disk.names[path].current)
    start, end, _, _ = records_in(forged)[-1]
    last_start, last_end, last_sequence, _ = records_in(content)[-1]
    broken = disk.copy()
    broken.names[path].current[last_start : last_start + 20] = bytes(20)
    broken.names[path].current[last_end : last_end + end - start] = forged[start:end]
    wal = Wal.open(broken, DIRECTORY, WalSettings(segment_bytes=1024), token=TOKEN)
    assert state_of(wal) == driver.at(last_sequence - 1)
    assert wal.statistics().cut_bytes > 0


def test_the_log_of_another_directory_is_refused_and_left_alone() -> None:
    disk, _, path = small_log()
    before = bytes(disk.names[path].current)
    with pytest.raises(Corruption, match="another data directory"):
        Wal.open(disk, DIRECTORY, SMALL, token=b"another")
    assert bytes(disk.names[path].current) == before


def test_corruption_changes_nothing_on_disk() -> None:
    """Whoever looks into it finds what recovery found."""
    disk, _, path = small_log()
    disk.names[path].current[200] ^= 1
    before = {name: bytes(node.current) for name, node in disk.names.items()}
    with pytest.raises(Corruption):
        Wal.open(disk, DIRECTORY, SMALL, token=TOKEN)
    assert {name: bytes(node.current) for name, node in disk.names.items()} == before


def check_refused(disk: MemoryDisk, settings: WalSettings, mark: int) -> None:
    """The log is not opened for what its mark says, and nothing on disk is changed."""
    before = {name: bytes(node.current) for name, node in disk.names.items()}
    with pytest.raises(Corruption, match=rf"on disk up to record {mark}: .*Put back|no segment of the log"):
        Wal.open(disk, DIRECTORY, settings, token=TOKEN, mark=mark)
    assert {name: bytes(node.current) for name, node in disk.names.items()} == before


def test_a_last_record_that_no_other_vouches_for_is_missed_by_the_mark() -> None:
    """Without it, the damage looks like what a crash leaves of a record that nobody was told about."""
    disk, driver, path = small_log()
    settings = WalSettings(segment_bytes=1024)
    mark = driver.wal.synced_sequence
    assert Wal.open(disk.copy(), DIRECTORY, settings, token=TOKEN, mark=mark).synced_sequence == mark
    start, end, sequence, _ = records_in(bytes(disk.names[path].current))[-1]
    assert sequence == mark
    for position in range(start, end):
        broken, cut = disk.copy(), disk.copy()
        broken.names[path].current[position] ^= 1
        check_refused(broken, settings, mark)
        del cut.names[path].current[position:]
        check_refused(cut, settings, mark)
        assert Wal.open(cut, DIRECTORY, settings, token=TOKEN, mark=mark - 1).synced_sequence == mark - 1


@pytest.mark.parametrize("lost", ["the newest segment", "all that came after a copy was made", "all segments"])
def test_a_log_of_which_the_end_was_taken_away_is_missed_by_the_mark(lost: str) -> None:
    """A node that went on without it would have forgotten votes, and writes that others count on (trap 24)."""
    disk = MemoryDisk()
    driver = Driver(disk, Random(1))
    older = disk.copy()
    while driver.wal.statistics().segments < 5:
        driver.append(*(driver.update(RangeId(range_id)) for range_id in (1, 2, 3)))
        driver.sync()
        if driver.wal.statistics().segments == 3:
            older = disk.copy()
    mark = driver.wal.synced_sequence
    broken = disk.copy()
    names = [name for name in sorted(disk.names) if name.endswith(".wal")]
    if lost == "the newest segment":
        del broken.names[names[-1]]
    elif lost == "all segments":
        for name in names:
            del broken.names[name]
    else:
        broken = older
    check_refused(broken, SMALL, mark)


@pytest.mark.parametrize("operation", ["pwrite", "sync", "rename", "sync_directory"])
def test_a_failed_write_or_sync_is_final(operation: str) -> None:
    """After a failed fsync nobody knows what is on disk (DESIGN 4.3): the log refuses everything from then on."""
    disk = MemoryDisk()
    wal = Wal.open(disk, DIRECTORY, SMALL, token=TOKEN)
    first = wal.append([LogUpdate(R1, create=CreateGroup(ReplicaId(1), 0, 0, ConfState()))])

    def observe(name: str, _path: str) -> None:
        if name == operation:
            raise OSError(5, "the disk is gone")

    first()
    big = Entry(1, 1, EntryType.NORMAL, bytes(1990))  # Needs a new segment.
    job = wal.append([LogUpdate(R1, HardState(1), (big,))])
    disk.observe = observe
    with pytest.raises(StorageError, match="must end"):
        job()
    disk.observe = lambda name, path: None
    for attempt in (job, lambda: wal.append([LogUpdate(R1, HardState(2))]), wal.collect):
        with pytest.raises(StorageError, match="failed before"):
            attempt()
    assert wal.statistics().failed
    survivor = Wal.open(disk.lost(), DIRECTORY, SMALL, token=TOKEN)
    assert survivor.groups[R1].last_index() == 0


def test_what_a_killed_process_left_unsynced_is_synced_before_it_counts() -> None:
    """After kill -9 the page cache still has an unsynced record; recovery shows it, so it must be durable by then."""
    disk = MemoryDisk()
    wal = Wal.open(disk, DIRECTORY, SMALL, token=TOKEN)
    wal.append([LogUpdate(R1, create=CreateGroup(ReplicaId(1), 0, 0, ConfState()))])()
    job = wal.append([LogUpdate(R1, HardState(3, 2, 0))])

    def observe(name: str, _path: str) -> None:
        if name == "sync":
            raise Crash

    disk.observe = observe
    with pytest.raises(Crash):
        job()
    disk.observe = lambda name, path: None
    second = Wal.open(disk, DIRECTORY, SMALL, token=TOKEN)
    assert second.groups[R1].hard_state == HardState(3, 2, 0)
    third = Wal.open(disk.lost(), DIRECTORY, SMALL, token=TOKEN)
    assert third.groups[R1].hard_state == HardState(3, 2, 0)


def test_a_segment_goes_only_after_the_compaction_that_freed_it_is_synced() -> None:
    """Else a crash brings the entries back by name and not by content."""
    disk = MemoryDisk()
    settings = WalSettings(segment_bytes=1024, move_live_fraction_max=0.0)
    driver = Driver(disk, Random(0), settings)
    driver.append(LogUpdate(R1, create=CreateGroup(ReplicaId(1), 0, 0, ConfState())))
    for index in range(1, 12):
        driver.append(LogUpdate(R1, HardState(1, 0, index), (Entry(1, index, EntryType.NORMAL, bytes(200)),)))
    driver.sync()
    driver.append(LogUpdate(R1, compact=CompactLog(11, 1)))
    driver.collect()
    assert driver.dropped > 2
    # The collection's job runs alone; the compaction before it was never synced by its own.
    removals: list[int] = []

    def observe(name: str, _path: str) -> None:
        if name == "unlink" and not removals:
            removals.append(Wal.open(disk.lost(), DIRECTORY, settings, token=TOKEN).groups[R1].first_index())

    disk.observe = observe
    driver.jobs[-1][1]()
    assert removals == [12]


@pytest.mark.parametrize("window_bytes", [64, 300, 100_000])
def test_damage_in_a_record_that_is_larger_than_a_window_is_found_in_every_entry(
    window_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Recovery reads such a record entry by entry."""
    monkeypatch.setattr(recovery, "WINDOW_BYTES", window_bytes)
    disk = MemoryDisk()
    driver = Driver(disk, Random(0), WalSettings(segment_bytes=4096))
    driver.append(LogUpdate(R1, create=CreateGroup(ReplicaId(11), 0, 0, ConfState((11, 12)), b"p")))
    entries = tuple(Entry(1, index, EntryType.NORMAL, bytes([index]) * 200) for index in (1, 2, 3))
    driver.append(LogUpdate(R1, HardState(1, 11, 0), entries))
    driver.sync()
    path = f"{DIRECTORY}/{1:016x}.wal"
    start, end, sequence, _ = records_in(bytes(disk.names[path].current))[-1]
    whole = Wal.open(disk.copy(), DIRECTORY, SMALL, token=TOKEN)
    assert (state_of(whole), whole.statistics().cut_bytes) == (driver.model.state(), 0)
    for position in range(start, end, 37):
        broken = disk.copy()
        broken.names[path].current[position] ^= 4
        assert state_of(Wal.open(broken, DIRECTORY, SMALL, token=TOKEN)) == driver.at(sequence - 1)


def test_a_checkpoint_that_differs_from_the_records_before_it_is_corruption() -> None:
    """Every checksum is right: what wrote it, or what reads it, is wrong, and nobody knows which."""
    disk = MemoryDisk()
    wal = Wal.open(disk, DIRECTORY, SMALL, token=TOKEN)
    wal.append([LogUpdate(R1, create=CreateGroup(ReplicaId(1), 0, 0, ConfState()))])()
    wal._state.tombstones[R2] = ReplicaId(7)
    wal.append([LogUpdate(R1, HardState(1), (Entry(1, 1, EntryType.NORMAL, bytes(2000)),))])()
    with pytest.raises(Corruption, match="differs from the records before it"):
        Wal.open(disk, DIRECTORY, SMALL, token=TOKEN)
