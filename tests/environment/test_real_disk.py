"""Files of the operating system: what the seam promises, and what its errors say."""

import errno
import fcntl
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from shardkv.environment.real import disk as real_disk
from shardkv.environment.real.disk import ALLOCATE_PIECE_BYTES, RealDisk, RealFile
from shardkv.environment.real.time import RealIds
from shardkv.errors import DataDirectoryError, OutOfSpace, StorageError
from shardkv.storage.directory import open_directory


@pytest.fixture
def disk() -> RealDisk:
    return RealDisk()


def test_a_file_reads_what_was_written(disk: RealDisk, tmp_path: Path) -> None:
    file = disk.open(str(tmp_path / "f"), create=True)
    file.pwrite(b"hello", 3)
    file.pwrite(memoryview(b"HE"), 3)
    file.sync()
    assert file.size() == 8
    assert file.pread(100, 0) == b"\0\0\0HEllo"
    assert file.pread(2, 4) == b"El"
    assert file.pread(5, 8) == b""
    file.truncate(4)
    assert file.pread(100, 0) == b"\0\0\0H"
    file.close()
    file.close()


def test_opening_what_is_not_there_is_an_answer(disk: RealDisk, tmp_path: Path) -> None:
    path = str(tmp_path / "absent")
    with pytest.raises(FileNotFoundError):
        disk.open(path)
    with pytest.raises(FileNotFoundError):
        disk.read(path)
    disk.open(path, exclusive=True).close()
    with pytest.raises(FileExistsError):
        disk.open(path, exclusive=True)
    assert disk.exists(path)


def test_allocated_space_is_zero_and_keeps_what_was_there(disk: RealDisk, tmp_path: Path) -> None:
    file = disk.open(str(tmp_path / "f"), create=True)
    file.pwrite(b"abc", 0)
    size = 2 * ALLOCATE_PIECE_BYTES + 5
    file.allocate(size)
    assert file.size() == size
    assert file.pread(size, 0) == b"abc" + bytes(size - 3)
    blocks = os.stat(tmp_path / "f").st_blocks * 512
    assert blocks >= size - 4096, "the space must be written, not a hole"
    file.allocate(10)
    assert file.size() == size
    file.close()


def test_a_small_file_is_replaced_as_a_whole(disk: RealDisk, tmp_path: Path) -> None:
    path = str(tmp_path / "f")
    disk.write_atomically(path, b"one, and long")
    disk.write_atomically(path, b"two")
    assert disk.read(path) == b"two"
    assert disk.list(str(tmp_path)) == ["f"]


def test_a_small_file_is_on_disk_before_it_has_its_name_and_its_name_before_the_call_returns(
    disk: RealDisk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The simulated disk has a recipe of its own, so nothing else would miss a sync here."""
    done: list[tuple[str, object]] = []
    fsync, replace = os.fsync, os.replace

    def synced(descriptor: int) -> None:
        fsync(descriptor)
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        done.append(("sync", path.read_bytes() if path.is_file() else path))

    def renamed(source: str, target: str) -> None:
        replace(source, target)
        done.append(("rename", Path(target)))

    monkeypatch.setattr(real_disk, "_sync_data", synced)
    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", renamed)
    path = tmp_path / "f"
    disk.write_atomically(str(path), b"new")
    assert done == [("sync", b"new"), ("rename", path), ("sync", tmp_path)]


def test_a_failed_replacement_keeps_the_old_file(
    disk: RealDisk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(tmp_path / "f")
    disk.write_atomically(path, b"old")

    def fail(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", fail)
        with pytest.raises(OutOfSpace, match="free space"):
            disk.write_atomically(path, b"new")
    assert disk.read(path) == b"old"
    assert disk.list(str(tmp_path)) == ["f"]


def test_a_rename_that_a_crash_left_half_done_does_not_cost_the_file_that_was_renamed(
    disk: RealDisk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both names lead to it then (rename(2)): written to under the one, it would be cut under the other, too."""
    path = tmp_path / "f"
    path.write_bytes(b"old")
    os.link(path, tmp_path / "f.temporary")

    class Died(BaseException):
        pass

    def die(*_: object) -> int:
        raise Died

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", die)
        with pytest.raises(Died):
            disk.write_atomically(str(path), b"new")
    assert path.read_bytes() == b"old"
    disk.write_atomically(str(path), b"new")
    assert path.read_bytes() == b"new"


def test_a_link_that_leads_nowhere_is_not_taken_for_nothing(disk: RealDisk, tmp_path: Path) -> None:
    """What it leads to may be on a file system that is not mounted."""
    path = str(tmp_path / "f")
    os.symlink(tmp_path / "elsewhere" / "f", path)
    for call in (disk.read, disk.open, disk.list, disk.sync_directory):
        with pytest.raises(StorageError, match=f"{path}: it is a link that leads nowhere; mount what it leads to"):
            call(path)
    with pytest.raises(StorageError, match="leads nowhere"):
        disk.open(path, create=True)
    disk.unlink(path)
    with pytest.raises(FileNotFoundError):
        disk.read(path)


def test_a_data_directory_whose_identity_is_a_link_that_leads_nowhere_is_left_as_it_is(
    disk: RealDisk, tmp_path: Path
) -> None:
    """A start took it for a new directory, and wrote another identity in its place."""
    data, elsewhere = tmp_path / "data", tmp_path / "elsewhere"
    open_directory(disk, RealIds(), str(data)).close()
    elsewhere.mkdir()
    (data / "identity").rename(elsewhere / "identity")
    (data / "identity").symlink_to(elsewhere / "identity")
    elsewhere.rename(tmp_path / "unmounted")
    with pytest.raises(StorageError, match=f"{data}/identity: it is a link that leads nowhere"):
        open_directory(disk, RealIds(), str(data))
    assert (data / "identity").is_symlink()
    (tmp_path / "unmounted").rename(elsewhere)
    directory = open_directory(disk, RealIds(), str(data))
    assert directory.identity.boot == 2
    directory.close()


@pytest.mark.parametrize("name", ["wal", "engine", "ingest"])
@pytest.mark.parametrize("link", [False, True])
def test_what_is_no_directory_and_should_be_one_is_named_with_what_to_do(
    disk: RealDisk, tmp_path: Path, name: str, link: bool
) -> None:
    """It was an error of the system's, without advice."""
    open_directory(disk, RealIds(), str(tmp_path)).close()
    path = tmp_path / name
    path.rmdir()
    if link:
        path.symlink_to("/nowhere/at/all")
    else:
        path.write_bytes(b"")
    with pytest.raises(DataDirectoryError, match=f"{path} is not a directory: put back what was there, or mount"):
        open_directory(disk, RealIds(), str(tmp_path))


def test_what_fails_of_a_file_that_was_renamed_names_it_as_it_lies(
    disk: RealDisk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = str(tmp_path / "old"), str(tmp_path / "new")
    file = disk.open(old, create=True)
    disk.rename(old, new)
    file.renamed(new)

    def fail(descriptor: int, data: bytes, offset: int) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "pwrite", fail)
    with pytest.raises(StorageError, match=f"cannot write {new}: Input/output error"):
        file.pwrite(b"x", 0)
    file.close()


def test_names_are_listed_renamed_and_removed(disk: RealDisk, tmp_path: Path) -> None:
    root = str(tmp_path / "a" / "b")
    disk.make_directory(root)
    disk.make_directory(root)
    for name in ("z", "m", "a"):
        disk.open(f"{root}/{name}", create=True).close()
    disk.rename(f"{root}/z", f"{root}/m")
    disk.unlink(f"{root}/a")
    disk.sync_directory(root)
    assert disk.list(root) == ["m"]
    assert disk.free_bytes(root) > 0


def test_a_directory_that_a_killed_process_made_is_durable_before_anything_is_in_it(
    disk: RealDisk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between the making and the sync of the parent: a power cut later on would take all that is in it."""
    synced: list[int] = []
    fsync = os.fsync

    def noting(descriptor: int) -> None:
        synced.append(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noting)
    (tmp_path / "a").mkdir()
    disk.make_directory(str(tmp_path / "a"))
    assert synced == [tmp_path.stat().st_ino]
    synced.clear()
    disk.make_directory(str(tmp_path / "a" / "b" / "c"))
    assert synced == [path.stat().st_ino for path in (tmp_path, tmp_path / "a", tmp_path / "a" / "b")]
    synced.clear()
    (tmp_path / "data").mkdir()
    open_directory(disk, RealIds(), str(tmp_path / "data")).close()
    assert synced[0] == tmp_path.stat().st_ino
    synced.clear()
    open_directory(disk, RealIds(), str(tmp_path / "data")).close()
    assert tmp_path.stat().st_ino not in synced, "what holds an identity was synced when it was made"


@pytest.mark.parametrize("function, answer", [("access", False), ("path.ismount", True)])
def test_a_directory_made_by_an_administrator_is_taken(
    disk: RealDisk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str, answer: bool
) -> None:
    """In a parent that the node may not read, or on a file system of its own: there is nothing of a node's to sync."""
    (tmp_path / "a").mkdir()
    monkeypatch.setattr(f"os.{function}", lambda *arguments: answer)
    monkeypatch.setattr(os, "fsync", lambda descriptor: pytest.fail("something was synced"))
    disk.make_directory(str(tmp_path / "a"))


def test_a_second_lock_is_refused_and_names_the_holder(disk: RealDisk, tmp_path: Path) -> None:
    """One process per data directory (DESIGN 1)."""
    path = str(tmp_path / "lock")
    lock = disk.lock(path)
    with pytest.raises(DataDirectoryError, match=f"in use by process {os.getpid()}; stop"):
        disk.lock(path)
    lock.release()
    lock.release()
    disk.lock(path).release()


def test_a_lock_holds_when_its_file_is_deleted(disk: RealDisk, tmp_path: Path) -> None:
    """DESIGN 4.3: two processes on one directory would destroy it. Whoever came next made, and locked, another file."""
    path = str(tmp_path / "lock")
    lock = disk.lock(path)
    os.unlink(path)
    with pytest.raises(DataDirectoryError, match="in use by another process; stop"):
        disk.lock(path)
    lock.release()
    disk.lock(path).release()


def test_where_directories_cannot_be_locked_the_file_is(
    disk: RealDisk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on NFS, which locks only what is open for writing."""
    flock = fcntl.flock

    def of_files(descriptor: int, operation: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EBADF, "Bad file descriptor")
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", of_files)
    path = str(tmp_path / "lock")
    lock = disk.lock(path)
    with pytest.raises(DataDirectoryError, match=f"in use by process {os.getpid()}; stop"):
        disk.lock(path)
    lock.release()
    disk.lock(path).release()


def test_a_lock_needs_no_room_on_the_disk(disk: RealDisk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written is only for who finds the lock taken. A lock that failed and was held nevertheless would let
    nobody have it until the process ends."""
    path = str(tmp_path / "lock")

    def full(descriptor: int, data: bytes, offset: int) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    lock = disk.lock(path)
    with pytest.raises(DataDirectoryError, match="in use"):
        disk.lock(path)
    lock.release()
    monkeypatch.undo()
    disk.lock(path).release()


def test_the_lock_of_a_killed_process_is_free(disk: RealDisk, tmp_path: Path) -> None:
    path = str(tmp_path / "lock")
    program = (
        "import sys; from shardkv.environment.real.disk import RealDisk; l = RealDisk().lock(sys.argv[1]);"
        "print('locked', flush=True); sys.stdin.read()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "locked\n"
        with pytest.raises(DataDirectoryError, match=str(process.pid)):
            disk.lock(path)
        process.kill()
        process.wait()
    disk.lock(path).release()


@pytest.mark.parametrize(
    ("number", "kind", "advice"),
    [
        (errno.ENOSPC, OutOfSpace, "free space or enlarge the disk"),
        (errno.EDQUOT, OutOfSpace, "free space or enlarge the disk"),
        (errno.EIO, StorageError, "replace the disk"),
        (errno.EROFS, StorageError, "read-only"),
        (errno.EACCES, StorageError, "permissions"),
        (errno.EMFILE, StorageError, "ulimit -n"),
        (errno.EFBIG, StorageError, "ulimit -f"),
        (errno.ESTALE, StorageError, "restart the node"),
        (errno.EINVAL, StorageError, "put its data on another"),
        (errno.EOPNOTSUPP, StorageError, "put its data on another"),
    ],
)
def test_an_error_says_what_failed_and_what_to_do(
    disk: RealDisk,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    kind: type[StorageError],
    advice: str,
) -> None:
    """DESIGN 2.4: the error tells the caller what it may do next."""
    file = disk.open(str(tmp_path / "f"), create=True)

    def fail(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "pwrite", fail)
    with pytest.raises(kind, match=advice) as caught:
        file.pwrite(b"x", 0)
    assert type(caught.value) is kind
    assert str(tmp_path / "f") in str(caught.value)
    file.close()


def test_after_a_failed_sync_no_later_sync_counts(disk: RealDisk, tmp_path: Path) -> None:
    """The system drops dirty pages on an error and reports success the next time: failures stay (DESIGN 4.3)."""
    calls = 0

    def fail_once(_: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise OSError(errno.EIO, "Input/output error")

    file = disk.open(str(tmp_path / "f"), create=True)
    with pytest.raises(StorageError, match="sync"):
        file._synced_by(fail_once)
    with pytest.raises(StorageError, match="cannot be trusted"):
        file.sync()
    with pytest.raises(StorageError, match="cannot be trusted"):
        file.allocate(10)
    assert calls == 1
    file.close()


def test_a_file_knows_whether_it_is_at_its_path(disk: RealDisk, tmp_path: Path) -> None:
    path = str(tmp_path / "d" / "f")
    disk.make_directory(str(tmp_path / "d"))
    file = disk.open(path, create=True)
    assert file.is_at(path)
    (tmp_path / "d").rename(tmp_path / "e")
    assert not file.is_at(path)
    assert file.is_at(str(tmp_path / "e" / "f"))
    (tmp_path / "e").rename(tmp_path / "d")
    disk.unlink(path)
    assert not file.is_at(path)
    disk.open(path, create=True).close()
    assert not file.is_at(path), "that is another file"
    file.close()
    assert not file.is_at(path)


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="the system has no such call")
def test_after_a_failed_sync_the_next_start_reads_what_is_on_the_disk(
    disk: RealDisk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Linux keeps the pages that it could not write, and counts them as clean: read back, a record would look as sound
    as if it were on the disk, its sync would succeed, and a power cut would take it after others were told of it."""
    forgotten = []

    def advise(descriptor: int, offset: int, count: int, advice: int) -> None:
        assert (offset, count, advice) == (0, 0, os.POSIX_FADV_DONTNEED)
        forgotten.append(descriptor)

    def fail(descriptor: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    file = disk.open(str(tmp_path / "f"), create=True)
    file.pwrite(b"x", 0)
    file.sync()
    monkeypatch.setattr(os, "posix_fadvise", advise)
    assert not forgotten
    with pytest.raises(StorageError, match="the disk reports an error"):
        file._synced_by(fail)
    assert forgotten == [file._descriptor]
    file.close()


def test_a_short_write_is_completed(disk: RealDisk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """pwrite(2) may write less than asked, at a signal or a full disk."""
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: real(fd, bytes(data[:3]), offset))
    file = disk.open(str(tmp_path / "f"), create=True)
    file.pwrite(b"0123456789", 0)
    monkeypatch.undo()
    assert file.pread(20, 0) == b"0123456789"
    file.close()


def test_a_short_read_is_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file: RealFile = RealDisk().open(str(tmp_path / "f"), create=True)
    file.pwrite(b"0123456789", 0)
    real = os.pread
    monkeypatch.setattr(os, "pread", lambda fd, count, offset: real(fd, min(count, 3), offset))
    assert file.pread(20, 0) == b"0123456789"
    assert file.pread(5, 2) == b"23456"
    monkeypatch.undo()
    file.close()
