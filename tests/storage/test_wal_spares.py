"""Segments that are made ahead: the spare and the reserve, which the preparing thread and the writer share."""

from collections.abc import Callable
from typing import Any

import pytest

from shardkv.errors import OutOfSpace
from shardkv.raft.messages import HardState
from shardkv.storage.record import LogUpdate
from shardkv.storage.segment import Segment, Spares, segment_path

from .model import DIRECTORY, state_of
from .support import MemoryDisk
from .updates import R1, count_operations, create, entry, opened


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
