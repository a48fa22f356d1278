"""Files of the operating system, with its errors translated once: what failed, where, and what to do about it.

The rule: a call that returned has happened, and one that promises durability has synced. Nothing is buffered here.
``FileNotFoundError`` and ``FileExistsError`` pass through as they are, for they are answers; every other error leaves
as :class:`~shardkv.errors.StorageError`.
"""

import errno
import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Final

from shardkv.errors import DataDirectoryError, OutOfSpace, StorageError

ALLOCATE_PIECE_BYTES: Final = 1024 * 1024
"""Zeros are written in pieces of this size."""
_ZEROS: Final = bytes(ALLOCATE_PIECE_BYTES)
_sync_data: Final[Callable[[int], None]] = getattr(os, "fdatasync", os.fsync)
_FULL: Final = frozenset((errno.ENOSPC, errno.EDQUOT))
_ADVICE: Final = {
    errno.EACCES: "check the owner and the permissions",
    errno.EPERM: "check the owner and the permissions",
    errno.EROFS: "the file system is mounted read-only; check the system's log for disk errors",
    errno.EIO: "the disk reports an error; check the system's log and replace the disk",
    errno.EMFILE: "raise the limit on open files (ulimit -n)",
    errno.ENFILE: "the machine is out of file handles; raise fs.file-max",
    errno.ENOTDIR: "a part of the path is a file, not a directory",
    errno.EISDIR: "the path is a directory, not a file",
    errno.EFBIG: "raise the limit on the size of files (ulimit -f)",
    errno.ESTALE: "its file system was mounted anew, or it was replaced there; restart the node",
    **dict.fromkeys(
        (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP),
        "the file system lacks this, which a node needs; put its data on another",
    ),
}


def storage_error(error: OSError, action: str, path: str) -> StorageError:
    """``error`` as one of ours, saying what failed and what to do."""
    if error.errno in _FULL:
        return OutOfSpace(f"no space left while trying to {action} {path}; free space or enlarge the disk")
    advice = _ADVICE.get(error.errno or 0, "check the disk and the path")
    return StorageError(f"cannot {action} {path}: {error.strerror or error}; {advice}")


@contextmanager
def _translated(action: str, path: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        if os.path.islink(path):
            # Something was there, and whoever takes it for absent forgets what it said.
            raise StorageError(
                f"cannot {action} {path}: it is a link that leads nowhere; mount what it leads to, or put that back"
            ) from error
        raise
    except FileExistsError:
        raise
    except OSError as error:
        raise storage_error(error, action, path) from error


class RealFile:
    """Implements :class:`shardkv.environment.File`."""

    __slots__ = ("_descriptor", "_failed", "_path")

    def __init__(self, descriptor: int, path: str) -> None:
        self._descriptor = descriptor
        self._path = path
        self._failed = False
        """A sync has failed: the system may have dropped the data and forgotten about it, so no later sync counts."""

    def pwrite(self, data: bytes | bytearray | memoryview, offset: int) -> None:
        try:
            written = os.pwrite(self._descriptor, data, offset)
            if written == len(data):
                return
            rest = memoryview(data).cast("B")
            while written < len(rest):
                written += os.pwrite(self._descriptor, rest[written:], offset + written)
        except OSError as error:
            raise storage_error(error, "write", self._path) from error

    def pread(self, count: int, offset: int) -> bytes:
        with _translated("read", self._path):
            data = os.pread(self._descriptor, count, offset)
            if len(data) == count or not data:
                return data
            pieces = [data]
            missing = count - len(data)
            while missing and (data := os.pread(self._descriptor, missing, offset + count - missing)):
                pieces.append(data)
                missing -= len(data)
            return b"".join(pieces)

    def size(self) -> int:
        with _translated("inspect", self._path):
            return os.fstat(self._descriptor).st_size

    def allocate(self, size: int) -> None:
        present = self.size()
        while present < size:
            count = min(ALLOCATE_PIECE_BYTES, size - present)
            self.pwrite(_ZEROS if count == ALLOCATE_PIECE_BYTES else _ZEROS[:count], present)
            present += count
        self._synced_by(os.fsync)

    def truncate(self, size: int) -> None:
        with _translated("truncate", self._path):
            os.ftruncate(self._descriptor, size)

    def sync(self) -> None:
        self._synced_by(_sync_data)

    def _synced_by(self, call: Callable[[int], None]) -> None:
        if self._failed:
            raise StorageError(
                f"an earlier sync of {self._path} failed; what it holds cannot be trusted: restart the node"
            )
        try:
            call(self._descriptor)
        except OSError as error:
            self._failed = True
            self._forget()
            raise storage_error(error, "sync", self._path) from error

    def _forget(self) -> None:
        """Have the system drop what it keeps of the file in memory and takes for written: after a failed sync, that is
        also what never got to the disk. The next start would read it there, and no sync would write it any more."""
        advise = getattr(os, "posix_fadvise", None)
        if advise is not None:
            with suppress(OSError):
                advise(self._descriptor, 0, 0, os.POSIX_FADV_DONTNEED)

    def is_at(self, path: str) -> bool:
        try:
            return os.path.samestat(os.stat(path), os.fstat(self._descriptor))
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.EBADF):
                return False
            raise storage_error(error, "inspect", path) from error

    def renamed(self, path: str) -> None:
        self._path = path

    def close(self) -> None:
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            with _translated("close", self._path):
                os.close(descriptor)


class RealLock:
    """Implements :class:`shardkv.environment.DirectoryLock`. The system frees it when the process dies."""

    __slots__ = ("_descriptors",)

    def __init__(self, descriptors: tuple[int, ...]) -> None:
        self._descriptors = descriptors

    def release(self) -> None:
        descriptors, self._descriptors = self._descriptors, ()
        for descriptor in descriptors:
            os.close(descriptor)


class RealDisk:
    """Implements :class:`shardkv.environment.Disk`."""

    __slots__ = ()

    def open(self, path: str, *, create: bool = False, exclusive: bool = False) -> RealFile:
        flags = os.O_RDWR | os.O_CLOEXEC
        if create or exclusive:
            flags |= os.O_CREAT
        if exclusive:
            flags |= os.O_EXCL
        with _translated("open", path):
            return RealFile(os.open(path, flags, 0o600), path)

    def read(self, path: str) -> bytes:
        file = self.open(path)
        try:
            return file.pread(file.size(), 0)
        finally:
            file.close()

    def write_atomically(self, path: str, data: bytes) -> None:
        temporary = path + ".temporary"
        # A crash amid the rename may have left both names to one file, where the file system keeps no journal.
        with suppress(FileNotFoundError):
            self.unlink(temporary)
        try:
            file = self.open(temporary, create=True)
            try:
                file.truncate(0)
                file.pwrite(data, 0)
                file.sync()
            finally:
                file.close()
            self.rename(temporary, path)
        except StorageError:
            with suppress(OSError):
                os.unlink(temporary)
            raise
        self.sync_directory(os.path.dirname(path))

    def exists(self, path: str) -> bool:
        return os.path.lexists(path)

    def list(self, path: str) -> list[str]:
        with _translated("list", path):
            return sorted(os.listdir(path))

    def make_directory(self, path: str) -> None:
        assert os.path.isabs(path), f"{path!r} is not absolute"
        missing: list[str] = []
        while not os.path.isdir(path):
            missing.append(path)
            path = os.path.dirname(path)
        # Whoever made the last that is there may have been killed before it was durable. Where another file system
        # begins, or the parent may not be read, that was no node.
        parent = os.path.dirname(path)
        if not os.path.ismount(path) and os.access(parent, os.R_OK):
            self.sync_directory(parent)
        for directory in reversed(missing):
            with _translated("make the directory", directory):
                os.mkdir(directory, 0o700)
            self.sync_directory(os.path.dirname(directory))

    def rename(self, source: str, target: str) -> None:
        with _translated("rename", source):
            os.replace(source, target)

    def unlink(self, path: str) -> None:
        with _translated("remove", path):
            os.unlink(path)

    def sync_directory(self, path: str) -> None:
        with _translated("sync the directory", path):
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

    def lock(self, path: str) -> RealLock:
        # The directory itself, for a lock file can be deleted and the next to come would lock another one in its place;
        # and the file, which says who holds the lock, and is all there is where a directory cannot be locked (NFS).
        directory = os.path.dirname(path)
        with _translated("open the directory", directory):
            whole = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            try:
                fcntl.flock(whole, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno == errno.EWOULDBLOCK:
                    raise _in_use(path) from error
            descriptor = _lock_file(path)
        except BaseException:
            os.close(whole)
            raise
        return RealLock((descriptor, whole))

    def free_bytes(self, path: str) -> int:
        with _translated("inspect", path):
            statistics = os.statvfs(path)
        return statistics.f_bavail * statistics.f_frsize


def _lock_file(path: str) -> int:
    """Lock the file at ``path`` and write into it who did; its descriptor."""
    with _translated("open the lock file", path):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
            raise storage_error(error, "lock", path) from error
        raise _in_use(path) from error
    # For the message below only; the lock itself is the system's, and held whether or not there is room for this.
    with suppress(OSError):
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, b"%d\n" % os.getpid(), 0)
    return descriptor


def _in_use(path: str) -> DataDirectoryError:
    holder = ""
    with suppress(OSError), open(path, "rb") as file:
        holder = file.read(32).decode("ascii", "replace").strip()
    who = f"process {holder}" if holder else "another process"
    return DataDirectoryError(
        f"{os.path.dirname(path)} is in use by {who}; stop that node first, or give this one another --data"
    )
