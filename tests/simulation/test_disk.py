"""What a crash leaves of a simulated disk: no more than was synced or chosen, and no less than was synced."""

import pytest
import trio
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from shardkv.errors import DataDirectoryError, OutOfSpace, StorageError
from shardkv.simulation import ChooseAtRandom, KeepAll, LoseAll, PowerCut, SimulatedDisk, TearLast, seeded_random
from shardkv.simulation.files import Unsynced


def disk_with(path: str, content: bytes) -> SimulatedDisk:
    """A disk with one durable file."""
    disk = SimulatedDisk()
    disk.make_directory("/data")
    disk.write_atomically(path, content)
    return disk


def after_crash(disk: SimulatedDisk, chooser: object = None) -> dict[str, bytes]:
    disk.check()
    disk.crash(chooser)  # type: ignore[arg-type]
    restarted = disk.restart()
    restarted.check()
    return restarted.files()


def test_what_was_not_synced_vanishes() -> None:
    disk = disk_with("/data/f", b"old content")
    file = disk.open("/data/f")
    file.pwrite(b"NEW", 0)
    assert file.pread(11, 0) == b"NEW content"
    assert after_crash(disk) == {"/data/f": b"old content"}


def test_what_was_synced_stays() -> None:
    disk = disk_with("/data/f", b"old")
    file = disk.open("/data/f")
    file.pwrite(b"new", 3)
    file.sync()
    file.pwrite(b"lost", 6)
    assert after_crash(disk) == {"/data/f": b"oldnew"}


def test_a_new_name_vanishes_although_its_file_was_synced() -> None:
    """POSIX promises the entry only once the directory is synced."""
    disk = SimulatedDisk()
    disk.make_directory("/data")
    file = disk.open("/data/f", create=True)
    file.pwrite(b"content", 0)
    file.sync()
    assert after_crash(disk) == {}


def test_a_synced_directory_keeps_the_name_but_not_the_content() -> None:
    disk = SimulatedDisk()
    disk.make_directory("/data")
    disk.open("/data/f", create=True).pwrite(b"content", 0)
    disk.sync_directory("/data")
    assert after_crash(disk) == {"/data/f": b""}


def test_a_killed_process_loses_nothing() -> None:
    disk = disk_with("/data/f", b"old")
    disk.open("/data/g", create=True).pwrite(b"new", 0)
    disk.unlink("/data/f")
    assert after_crash(disk, KeepAll()) == {"/data/g": b"new"}


def test_what_a_killed_process_wrote_is_there_for_the_next_one_and_no_more_durable_than_before() -> None:
    """It is in the system's cache: whoever builds on it syncs it first, else a power cut takes it from under them."""
    for sync in (False, True):
        disk = disk_with("/data/f", b"old")
        disk.open("/data/f").pwrite(b"new", 0)
        disk.open("/data/g", create=True)
        disk.rename("/data/g", "/data/h")
        disk.kill()
        again = disk.restart()
        again.check()
        assert again.files() == {"/data/f": b"new", "/data/h": b""}
        disk.open("/data/f").pwrite(b"of the dead", 0)
        if sync:
            again.open("/data/f").sync()
            again.sync_directory("/data")
        assert after_crash(again) == ({"/data/f": b"new", "/data/h": b""} if sync else {"/data/f": b"old"})


def test_the_last_write_may_be_torn() -> None:
    disk = disk_with("/data/f", b"")
    file = disk.open("/data/f")
    file.pwrite(b"first", 0)
    file.pwrite(b"second", 5)
    assert after_crash(disk, TearLast(3)) == {"/data/f": b"firstsec"}


def test_a_later_write_may_survive_an_earlier_one() -> None:
    """Writes reach the platter in any order; a log must not take the second for proof of the first."""

    class KeepSecond(LoseAll):
        def spans(self, change: object) -> list[tuple[int, int]]:
            return [(0, 100)] if change.data == b"second" else []  # type: ignore[attr-defined]

    disk = disk_with("/data/f", b"")
    file = disk.open("/data/f")
    file.pwrite(b"first", 0)
    file.pwrite(b"second", 5)
    assert after_crash(disk, KeepSecond()) == {"/data/f": b"\0\0\0\0\0second"}


def test_an_unsynced_truncation_comes_back() -> None:
    disk = disk_with("/data/f", b"0123456789")
    disk.open("/data/f").truncate(3)
    assert disk.read("/data/f") == b"012"
    assert after_crash(disk) == {"/data/f": b"0123456789"}


def test_a_synced_truncation_stays() -> None:
    disk = disk_with("/data/f", b"0123456789")
    file = disk.open("/data/f")
    file.truncate(3)
    file.truncate(5)
    file.sync()
    assert after_crash(disk) == {"/data/f": b"012\0\0"}


def test_allocated_space_is_durable() -> None:
    disk = disk_with("/data/f", b"ab")
    disk.open("/data/f").allocate(5)
    assert after_crash(disk) == {"/data/f": b"ab\0\0\0"}


@pytest.mark.parametrize("survive", [0, 1])
def test_a_rename_is_atomic(survive: int) -> None:
    """After a crash there is the old file or the new one, never neither and never a mixture."""

    class Chooser(LoseAll):
        def entries(self, directory: str, count: int) -> range:
            return range(survive)

    disk = disk_with("/data/f", b"old")
    disk.open("/data/g", create=True).pwrite(b"new", 0)
    disk.open("/data/g").sync()
    disk.sync_directory("/data")
    disk.rename("/data/g", "/data/f")
    assert disk.files() == {"/data/f": b"new"}
    expected = {"/data/f": b"new"} if survive else {"/data/f": b"old", "/data/g": b"new"}
    assert after_crash(disk, Chooser()) == expected


def test_of_the_changes_of_a_directory_any_may_survive_a_crash() -> None:
    """A rename may be lost where a later removal is not, and a removal where a later name stays: POSIX orders none."""

    class Chooser(LoseAll):
        def __init__(self, *kept: int) -> None:
            self.kept = kept

        def entries(self, directory: str, count: int) -> tuple[int, ...]:
            assert count == 3
            return self.kept

    outcomes = set()
    for kept in [(), (0,), (1,), (2,), (0, 1), (0, 2), (1, 2), (0, 1, 2)]:
        disk = disk_with("/data/f", b"f")
        disk.write_atomically("/data/g", b"g")
        disk.rename("/data/f", "/data/h")
        disk.unlink("/data/g")
        disk.open("/data/i", create=True)
        left = after_crash(disk, Chooser(*kept))
        assert ("/data/h" in left) == ("/data/f" not in left) == (0 in kept)
        assert ("/data/g" in left) == (1 not in kept)
        assert ("/data/i" in left) == (2 in kept)
        outcomes.add(tuple(left))
    assert len(outcomes) == 8
    chosen = {tuple(ChooseAtRandom(seeded_random(seed)).entries("/data", 3)) for seed in range(100)}
    assert len(chosen) == 8


def test_a_file_may_have_grown_without_the_bytes_that_it_grew_by() -> None:
    class SizeAlone(LoseAll):
        def spans(self, change: Unsynced) -> list[tuple[int, int]]:
            assert change.data is not None
            return [(len(change.data), len(change.data))]

    disk = disk_with("/data/f", b"old")
    disk.open("/data/f").pwrite(b"new", 2)
    assert after_crash(disk, SizeAlone()) == {"/data/f": b"old\0\0"}
    found = set()
    for seed in range(40):
        disk = disk_with("/data/f", b"old")
        disk.open("/data/f").pwrite(b"new", 2)
        found.add(after_crash(disk, ChooseAtRandom(seeded_random(seed)))["/data/f"])
    assert {b"old", b"old\0\0", b"olnew"} <= found


@pytest.mark.parametrize("chooser, left", [(LoseAll(), b"ab"), (KeepAll(), b"ab\0\0")])
def test_a_crash_in_the_middle_of_an_allocation_leaves_part_of_it_at_most(chooser: object, left: bytes) -> None:
    disk = disk_with("/data/f", b"ab")
    file = disk.open("/data/f")
    disk.cut_power_at(disk.calls + 1)
    with pytest.raises(PowerCut):
        file.allocate(6)
    assert after_crash(disk, chooser) == {"/data/f": left}


def test_a_removed_file_may_come_back() -> None:
    disk = disk_with("/data/f", b"old")
    disk.unlink("/data/f")
    assert not disk.exists("/data/f")
    assert after_crash(disk) == {"/data/f": b"old"}


def test_a_removal_stays_once_the_directory_is_synced() -> None:
    disk = disk_with("/data/f", b"old")
    disk.unlink("/data/f")
    disk.sync_directory("/data")
    assert after_crash(disk) == {}


def test_small_files_are_replaced_atomically_at_every_point_of_power_loss() -> None:
    """The recipe of write_atomically, cut at each of its calls and torn in every way that the seed gives."""
    outcomes = set()
    reference = disk_with("/data/f", b"old")
    base = reference.calls
    reference.write_atomically("/data/f", b"new and longer")
    for number in range(base + 1, reference.calls + 2):
        for seed in range(20):
            disk = disk_with("/data/f", b"old")
            disk.cut_power_at(number)
            try:
                disk.write_atomically("/data/f", b"new and longer")
                returned = True
            except PowerCut:
                returned = False
            disk.crash(ChooseAtRandom(seeded_random(seed)))
            content = disk.restart().read("/data/f")
            assert content in (b"old", b"new and longer")
            assert not returned or content == b"new and longer"
            outcomes.add((returned, content))
    assert len(outcomes) == 3


def test_after_the_power_cut_every_call_fails() -> None:
    disk = disk_with("/data/f", b"old")
    file = disk.open("/data/f")
    disk.cut_power_at(disk.calls + 2)
    file.pwrite(b"1", 0)
    with pytest.raises(PowerCut):
        file.sync()
    with pytest.raises(PowerCut):
        file.sync()
    with pytest.raises(PowerCut):
        file.pwrite(b"2", 0)
    assert after_crash(disk, KeepAll()) == {"/data/f": b"1ld"}


def test_the_write_that_the_power_cut_hits_may_be_torn() -> None:
    disk = disk_with("/data/f", b"")
    disk.cut_power_at(disk.calls + 2)
    with pytest.raises(PowerCut):
        disk.open("/data/f").pwrite(b"abcdef", 0)
    assert after_crash(disk, TearLast(2)) == {"/data/f": b"ab"}


def test_the_calls_of_a_fenced_node_change_nothing() -> None:
    """No ``finally`` of a crashed node may tidy up (DESIGN 3)."""
    disk = disk_with("/data/f", b"old")
    file = disk.open("/data/f")
    file.pwrite(b"O", 0)
    disk.fence()
    file.pwrite(b"new", 0)
    file.sync()
    file.truncate(0)
    file.allocate(100)
    disk.unlink("/data/f")
    disk.open("/data/g", create=True).pwrite(b"x", 0)
    disk.sync_directory("/data")
    assert after_crash(disk) == {"/data/f": b"old"}


def test_the_nth_call_can_be_made_to_fail() -> None:
    disk = disk_with("/data/f", b"")
    file = disk.open("/data/f")
    disk.fail("pwrite", StorageError("the disk is broken"), skip=1, times=1)
    file.pwrite(b"a", 0)
    with pytest.raises(StorageError, match="broken"):
        file.pwrite(b"b", 1)
    file.pwrite(b"c", 2)
    assert file.pread(9, 0) == b"a\0c"


def test_after_a_failed_sync_no_later_sync_counts() -> None:
    disk = disk_with("/data/f", b"old")
    file = disk.open("/data/f")
    file.pwrite(b"new", 0)
    disk.fail("sync", StorageError("input/output error"))
    with pytest.raises(StorageError, match="input/output"):
        file.sync()
    with pytest.raises(StorageError, match="cannot be trusted"):
        disk.open("/data/f").sync()
    assert after_crash(disk) == {"/data/f": b"old"}


def test_what_a_failed_sync_should_have_written_is_not_there_for_the_next_process() -> None:
    """The real disk has the system drop it: else the next start would read it, and no sync would write it."""
    disk = disk_with("/data/f", b"old")
    file = disk.open("/data/f")
    file.pwrite(b"new and more", 0)
    disk.fail("sync", StorageError("input/output error"))
    with pytest.raises(StorageError, match="input/output"):
        file.sync()
    assert file.pread(99, 0) == b"old"
    disk.kill()
    again = disk.restart()
    assert again.files() == {"/data/f": b"old"}
    again.open("/data/f").sync()
    assert after_crash(again) == {"/data/f": b"old"}


def test_a_full_disk_refuses_growth_and_takes_overwrites() -> None:
    disk = disk_with("/data/f", b"12345")
    file = disk.open("/data/f")
    disk.capacity_bytes = 8
    file.pwrite(b"678", 5)
    assert disk.free_bytes("/data") == 0
    with pytest.raises(OutOfSpace):
        file.pwrite(b"9", 8)
    with pytest.raises(OutOfSpace):
        file.allocate(9)
    file.pwrite(b"0", 0)
    assert disk.files() == {"/data/f": b"02345678"}


def test_calls_are_numbered_and_hooks_see_them_first() -> None:
    disk = disk_with("/data/f", b"")
    disk.trace = []
    seen = []
    disk.on_call = lambda call: seen.append((call.operation, call.offset, call.size))
    base = disk.calls
    file = disk.open("/data/f")
    file.pwrite(b"abc", 7)
    file.sync()
    assert [(call.number - base, call.operation) for call in disk.trace] == [(1, "open"), (2, "pwrite"), (3, "sync")]
    assert seen[1] == ("pwrite", 7, 3)


def test_a_lock_is_held_until_released_or_the_node_dies() -> None:
    disk = disk_with("/data/f", b"")
    disk.lock("/data/lock").release()
    disk.lock("/data/lock")
    with pytest.raises(DataDirectoryError):
        disk.lock("/data/lock")
    disk.crash(KeepAll())
    disk.restart().lock("/data/lock")


def test_answers_are_the_same_as_the_real_disk_gives() -> None:
    disk = SimulatedDisk()
    with pytest.raises(FileNotFoundError):
        disk.open("/data/f", create=True)
    disk.make_directory("/data/sub")
    with pytest.raises(FileNotFoundError):
        disk.open("/data/f")
    with pytest.raises(FileNotFoundError):
        disk.read("/data/f")
    with pytest.raises(FileNotFoundError):
        disk.unlink("/data/f")
    with pytest.raises(FileNotFoundError):
        disk.rename("/data/f", "/data/g")
    with pytest.raises(FileNotFoundError):
        disk.list("/nowhere")
    disk.open("/data/f", exclusive=True)
    with pytest.raises(FileExistsError):
        disk.open("/data/f", exclusive=True)
    assert disk.list("/data") == ["f", "sub"]
    assert disk.list("/") == ["data"]


def test_a_copy_is_a_backup() -> None:
    """A node restored from a backup has forgotten what came later (trap 24)."""
    disk = disk_with("/data/f", b"then")
    backup = disk.copy()
    disk.open("/data/f").pwrite(b"now!", 0)
    assert backup.files() == {"/data/f": b"then"}
    assert disk.files() == {"/data/f": b"now!"}


async def test_a_stalled_disk_moves_again_when_told_or_when_its_node_dies() -> None:
    for end in (SimulatedDisk.resume, SimulatedDisk.crash):
        disk = SimulatedDisk()
        disk.stall()
        with trio.move_on_after(0) as scope:
            await disk.moving()
        assert scope.cancelled_caught
        end(disk)
        await disk.moving()


class CrashingDisk(RuleBasedStateMachine):
    """Against a model that knows two things: what was written, and what a sync has promised."""

    def __init__(self) -> None:
        super().__init__()
        self.disk = disk_with("/data/f", b"")
        self.file = self.disk.open("/data/f")
        self.present = b""
        self.promised = b""
        self.touched: set[int] = set()

    @rule(data=st.binary(min_size=1, max_size=40), offset=st.integers(0, 60))
    def write(self, data: bytes, offset: int) -> None:
        self.file.pwrite(data, offset)
        padded = self.present.ljust(offset, b"\0")
        self.touched.update(range(min(len(self.present), offset), offset + len(data)))
        self.present = padded[:offset] + data + padded[offset + len(data) :]

    @rule()
    def sync(self) -> None:
        self.file.sync()
        self.promised = self.present
        self.touched.clear()

    @rule(seed=st.integers(0, 1000))
    def crash(self, seed: int) -> None:
        self.disk.crash(ChooseAtRandom(seeded_random(seed)))
        self.disk = self.disk.restart()
        self.file = self.disk.open("/data/f")
        content = self.file.pread(1000, 0)
        for position, byte in enumerate(self.promised):
            if position not in self.touched:
                assert content[position] == byte, f"byte {position} was synced and is lost"
        self.present = self.promised = content
        self.touched.clear()

    @invariant()
    def reads_are_right(self) -> None:
        assert self.file.pread(1000, 0) == self.present
        self.disk.check()


TestCrashingDisk = CrashingDisk.TestCase
