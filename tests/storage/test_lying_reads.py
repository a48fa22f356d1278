"""A disk whose reads now and then give other bits than were written, while the log is recovered."""

import pytest

from shardkv.errors import StorageError
from shardkv.raft.messages import ConfState, Entry, EntryType, HardState
from shardkv.simulation.crash_choosers import LoseAll
from shardkv.simulation.disk import SimulatedDisk
from shardkv.storage.record import CreateGroup, LogUpdate
from shardkv.storage.wal import Wal, WalSettings
from shardkv.types import RangeId, ReplicaId

R1 = RangeId(1)
SETTINGS = WalSettings(segment_bytes=64 * 1024)


def written() -> SimulatedDisk:
    """A log of five synced entries, as a power cut left it."""
    disk = SimulatedDisk()
    disk.make_directory("/wal")
    wal = Wal.open(disk, "/wal", SETTINGS, token=b"token", create=True)
    wal.append([LogUpdate(R1, create=CreateGroup(ReplicaId(1), 10, 5, ConfState(voters=(1,))))])()
    for index in range(11, 16):
        entry = Entry(5, index, EntryType.NORMAL, b"entry %d" % index)
        wal.append([LogUpdate(R1, hard_state=HardState(5, 1, 10), entries=(entry,))])()
    disk.crash(LoseAll())
    return disk.restart()


def test_a_synced_record_is_not_cut_off_because_one_read_of_it_lied() -> None:
    """DESIGN 4.3: a record that was synced is never given up. Nobody says of the last one that it was, so only a second
    look tells a bit that flipped on the way from a write that was torn."""
    whole = written()
    (segment,) = [path for path in whole.files() if path.startswith("/wal/")][:1]
    end = whole.files()[segment].rindex(b"entry 15")
    for position in range(end - 40, end + 8):
        disk = whole.copy()
        lies = [True]

        def lie(path: str, found: bytes, position: int = position, lies: list[bool] = lies) -> bytes:
            if not lies or len(found) <= position:
                return found
            lies.clear()
            return found[:position] + bytes([found[position] ^ 4]) + found[position + 1 :]

        disk.on_read = lie
        with pytest.raises(StorageError, match="different bytes"):
            Wal.open(disk, "/wal", SETTINGS, token=b"token", create=False)
        assert disk.files() == whole.files(), "nothing may be changed"
        found = Wal.open(disk, "/wal", SETTINGS, token=b"token", create=False)
        assert not lies
        assert found.groups[R1].last_index() == 15


def test_a_torn_tail_is_cut_off_as_ever() -> None:
    whole = written()
    (segment,) = [path for path in whole.files() if path.startswith("/wal/")][:1]
    end = whole.files()[segment].rindex(b"entry 15")
    file = whole.open(segment)
    file.pwrite(b"torn", end)
    file.sync()
    wal = Wal.open(whole, "/wal", SETTINGS, token=b"token", create=False)
    assert wal.groups[R1].last_index() == 14
    assert wal.statistics().cut_bytes > 0


def test_the_guard_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the second look the entry is gone for good, though its disk has it."""
    monkeypatch.setattr("shardkv.storage.recovery._Recovery._read_again", lambda *_: None)
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        test_a_synced_record_is_not_cut_off_because_one_read_of_it_lied()
