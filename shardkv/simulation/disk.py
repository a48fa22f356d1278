"""A disk in memory that loses what was not synced: a node's calls, their faults, and the end of a life.

The model is as hostile as POSIX allows. Each unsynced write survives a crash whole, torn or not at all, independently
of the others, and the size that it gave its file may survive without its bytes; a name is new, renamed or removed for
good only if its directory was synced, else by chance, each change independently of the others; syncing a file says
nothing about its name. A process that is killed loses nothing, but what it left unsynced is as unsynced to its
successor. The rule: nothing survives that the chooser did not choose or a sync did not promise.
"""

import posixpath
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, NamedTuple

import trio

from shardkv.errors import DataDirectoryError, OutOfSpace, StorageError
from shardkv.simulation.calls import Calls
from shardkv.simulation.crash_choosers import CrashChooser, LoseAll
from shardkv.simulation.files import Content, Directory, Entry, Inode, Unsynced
from shardkv.simulation.trace import Trace

CAPACITY_BYTES: Final = 1 << 40

OPERATIONS: Final = frozenset(
    ("open", "pwrite", "pread", "allocate", "truncate", "sync", "make_directory", "rename", "unlink", "sync_directory")
)
"""What is counted, traced and can be made to fail."""


class PowerCut(BaseException):
    """Raised by every call of a disk whose power is gone. No :class:`Exception`: the node's code cannot handle it."""


class Call(NamedTuple):
    """One call of the disk, as hooks and traces see it."""

    number: int
    """From 1, counted over all files of the disk."""
    operation: str
    path: str
    offset: int = 0
    size: int = 0


@dataclass(slots=True)
class _Fault:
    """An error that calls will meet."""

    operation: str
    path_part: str
    error: Exception
    skip: int
    """Matching calls that go well first."""
    times: int
    """Matching calls that fail then."""


class SimulatedFile:
    """Implements :class:`shardkv.environment.File`."""

    __slots__ = ("_closed", "_disk", "_inode", "_path")

    def __init__(self, disk: "SimulatedDisk", inode: Inode, path: str) -> None:
        self._disk = disk
        self._inode = inode
        self._path = path
        self._closed = False

    def pwrite(self, data: bytes | bytearray | memoryview, offset: int) -> None:
        """A crash at this call finds the write on its way: any part of it may have got there."""
        content = bytes(data)
        self._check_open()
        # The power may go in the middle of a write: it is on its way before the call is counted, and may be torn.
        if self._disk._changes_nothing:
            return
        self._disk._check_space(self._path, max(0, offset + len(content) - self._inode.present.size))
        cut = self._disk._count_or_cut("pwrite", self._path, offset, len(content))
        change = Unsynced(self._path, offset, content)
        self._disk._last = change
        self._inode.change(change)
        if self._disk.node_calls is not None:
            self._disk.node_calls.hit()
        if cut:
            raise PowerCut(f"in the middle of writing {len(content)} bytes at {offset} of {self._path}")

    def pread(self, count: int, offset: int) -> bytes:
        self._check_open()
        self._disk._count("pread", self._path, offset, count)
        found = self._inode.present.read(offset, count)
        return self._disk.on_read(self._path, found) if self._disk.on_read is not None else found

    def size(self) -> int:
        self._check_open()
        return self._inode.present.size

    def allocate(self, size: int) -> None:
        present = self.size()
        if self._disk._changes_nothing:
            return
        self._disk._check_space(self._path, max(0, size - present))
        cut = self._disk._count_or_cut("allocate", self._path, present, max(0, size - present))
        if cut:
            if size > present:
                self._inode.change(Unsynced(self._path, (present + size) // 2, None))
            raise PowerCut(f"in the middle of allocating {size} bytes of {self._path}")
        if self._disk.fenced:
            return
        if size > present:
            self._inode.change(Unsynced(self._path, size, None))
        self._settle()

    def truncate(self, size: int) -> None:
        self._check_open()
        if self._disk._changes_nothing:
            return
        self._disk._count("truncate", self._path, size)
        if self._disk.fenced:
            return
        self._inode.change(Unsynced(self._path, size, None))

    def sync(self) -> None:
        self._check_open()
        if self._disk._changes_nothing:
            return
        try:
            self._disk._count("sync", self._path)
        except StorageError:
            self._inode.forget()
            raise
        if not self._disk.fenced:
            self._settle()

    def _settle(self) -> None:
        if self._inode.sync_failed:
            raise StorageError(f"an earlier sync of {self._path} failed; what it holds cannot be trusted")
        self._inode.settle()

    def is_at(self, path: str) -> bool:
        if self._disk._changes_nothing:
            return True
        directory, name = posixpath.split(path)
        found = self._disk._directories.get(directory)
        return not self._closed and found is not None and found.present.get(name) is self._inode

    def renamed(self, path: str) -> None:
        self._path = path

    def close(self) -> None:
        self._closed = True

    def _check_open(self) -> None:
        assert not self._closed, f"{self._path} is used after it was closed"


class SimulatedLock:
    """Implements :class:`shardkv.environment.DirectoryLock`."""

    __slots__ = ("_locks", "_path")

    def __init__(self, locks: set[str], path: str) -> None:
        self._locks = locks
        self._path = path

    def release(self) -> None:
        self._locks.discard(self._path)


class SimulatedDisk:
    """Implements :class:`shardkv.environment.Disk`, in memory.

    A node's life ends with :meth:`crash`, which decides what survives, or with :meth:`kill`, and its next one has the
    disk that :meth:`restart` returns. Handles from before keep the old disk, whose calls change nothing any more.

    ``on_call``, if set, is called before each call is performed and may raise what the call shall fail with.
    """

    def __init__(self, *, capacity_bytes: int = CAPACITY_BYTES) -> None:
        self._directories: dict[str, Directory] = {"/": Directory()}
        self._locks: set[str] = set()
        self._faults: list[_Fault] = []
        self._last: Unsynced | None = None
        self._cut_at: int | None = None
        self._changes_nothing = False
        """Fenced: the node has crashed, and what its remains still call must leave no trace."""
        self._crashed = False
        self._power_lost = False
        self._moving = trio.Event()
        self._moving.set()
        self.capacity_bytes: int = capacity_bytes
        """May be set at any time; writes that need more than is left raise OutOfSpace."""
        self.calls: int = 0
        """How many calls were made; the number of the last one."""
        self.trace: list[Call] | None = None
        """Set to a list to have every call recorded."""
        self.on_call: Callable[[Call], None] | None = None
        self.on_read: Callable[[str, bytes], bytes] | None = None
        """Given a path and what a read found there, returns what the reader gets: a bit that is not what it was."""
        self.node_calls: Calls | None = None
        """Where the node that this disk belongs to counts its calls."""
        self.run_trace: Trace | None = None
        """Of the whole run."""
        self.on_power_cut: Callable[[], None] | None = None
        """Called when the power goes, before the call that it hits fails: to fence the rest of the node."""

    # What the node calls

    def open(self, path: str, *, create: bool = False, exclusive: bool = False) -> SimulatedFile:
        directory, name = self._place(path)
        inode = directory.present.get(name)
        if inode is not None and exclusive:
            raise FileExistsError(f"{path} exists")
        if inode is None and not (create or exclusive):
            raise FileNotFoundError(f"{path} does not exist")
        self._count("open", path)
        if inode is None:
            inode = Inode()
            if not self._changes_nothing:
                directory.change(Entry(name, inode))
        return SimulatedFile(self, inode, path)

    def read(self, path: str) -> bytes:
        file = self.open(path)
        return file.pread(file.size(), 0)

    def write_atomically(self, path: str, data: bytes) -> None:
        temporary = path + ".temporary"
        if self.exists(temporary):
            self.unlink(temporary)
        file = self.open(temporary, create=True)
        file.truncate(0)
        file.pwrite(data, 0)
        file.sync()
        file.close()
        self.rename(temporary, path)
        self.sync_directory(posixpath.dirname(path))

    def exists(self, path: str) -> bool:
        if path in self._directories:
            return True
        directory = self._directories.get(posixpath.dirname(path))
        return directory is not None and posixpath.basename(path) in directory.present

    def list(self, path: str) -> list[str]:
        directory = self._directories.get(path)
        if directory is None:
            raise FileNotFoundError(f"{path} does not exist")
        below = [posixpath.basename(other) for other in self._directories if posixpath.dirname(other) == path != other]
        return sorted([*directory.present, *below])

    def make_directory(self, path: str) -> None:
        assert posixpath.isabs(path), f"{path!r} is not absolute"
        self._count("make_directory", path)
        while path not in self._directories and not self._changes_nothing:
            self._directories[path] = Directory()
            path = posixpath.dirname(path)

    def rename(self, source: str, target: str) -> None:
        directory, old = self._place(source)
        other, new = self._place(target)
        assert directory is other, f"renaming {source} to {target} in another directory is not simulated"
        inode = directory.present.get(old)
        if inode is None:
            raise FileNotFoundError(f"{source} does not exist")
        self._count("rename", source)
        if not self._changes_nothing:
            directory.change(Entry(new, inode, freed=old))

    def unlink(self, path: str) -> None:
        directory, name = self._place(path)
        if name not in directory.present:
            raise FileNotFoundError(f"{path} does not exist")
        self._count("unlink", path)
        if not self._changes_nothing:
            directory.change(Entry(name, None))

    def sync_directory(self, path: str) -> None:
        directory = self._directories.get(path)
        if directory is None:
            raise FileNotFoundError(f"{path} does not exist")
        self._count("sync_directory", path)
        if not self._changes_nothing:
            directory.settle()

    def lock(self, path: str) -> SimulatedLock:
        self._place(path)
        if path in self._locks:
            raise DataDirectoryError(f"{posixpath.dirname(path)} is in use by another process")
        self._locks.add(path)
        return SimulatedLock(self._locks, path)

    def free_bytes(self, path: str) -> int:
        return max(0, self.capacity_bytes - self._used())

    # What the test calls

    def leave(self, free_bytes: int) -> None:
        """Somebody else fills the disk up to so much."""
        self.capacity_bytes = self._used() + free_bytes

    @property
    def file_count(self) -> int:
        return sum(len(directory.present) for directory in self._directories.values())

    def fail(self, operation: str, error: Exception, *, skip: int = 0, times: int = 1, path_part: str = "") -> None:
        """Make calls of ``operation`` fail: after ``skip`` that go well, the next ``times``."""
        assert operation in OPERATIONS, f"no operation {operation!r}; there are {sorted(OPERATIONS)}"
        self._faults.append(_Fault(operation, path_part, error, skip, times))

    def mend(self) -> None:
        """No call is to fail any more."""
        self._faults.clear()

    def cut_power_at(self, number: int) -> None:
        """Let the power go at call ``number``: that call and all later ones raise :class:`PowerCut`.

        A write that is cut may leave any part of itself; a sync that is cut promises nothing.
        """
        assert number > self.calls, f"call {number} has been made already; the disk is at {self.calls}"
        self._cut_at = number

    def stall(self) -> None:
        """Let the node's workers wait from now on: a disk that neither answers nor fails."""
        if self._moving.is_set():
            self._moving = trio.Event()

    def resume(self) -> None:
        self._moving.set()

    @property
    def stalled(self) -> bool:
        return not self._moving.is_set()

    async def moving(self) -> None:
        """Wait until the disk does not stall."""
        await self._moving.wait()

    def fence(self) -> None:
        """From now on nothing that is called changes anything: what a crashed node's remains do must not count."""
        self._changes_nothing = True
        self.resume()

    @property
    def fenced(self) -> bool:
        return self._changes_nothing

    def crash(self, chooser: CrashChooser | None = None) -> None:
        """Lose what ``chooser`` does not keep (by default everything that was not synced), and fence the disk."""
        chooser = chooser or LoseAll()
        self.kill()
        self._power_lost = True
        for inode in self._inodes():
            inode.crash(lambda change: chooser.spans(change._replace(last=change is self._last)))
        for path, directory in self._directories.items():
            directory.crash(chooser.entries(path, len(directory.unsynced)) if directory.unsynced else ())

    def kill(self) -> None:
        """Fence the disk, and lose nothing: the process has died, and what it wrote is in the system's cache.

        What was not synced is still not: the next crash may take it, unless whoever starts then syncs it.
        """
        assert not self._crashed, "this disk has crashed already; go on with restart()"
        self.fence()
        self._crashed = True

    def restart(self) -> "SimulatedDisk":
        """The disk that the node finds when it starts again."""
        assert self._crashed, "restart() comes after crash() or kill()"
        if self._power_lost:
            return self._copied(lambda inode: inode.durable, lambda directory: directory.durable)
        disk = SimulatedDisk(capacity_bytes=self.capacity_bytes)
        copies = {id(inode): inode.copy() for inode in self._inodes()}
        for path, directory in self._directories.items():
            disk._directories[path] = directory.copy(copies)
        return disk

    def copy(self) -> "SimulatedDisk":
        """The disk as it stands, as a backup would have it; a node restored from it has forgotten what came later."""
        return self._copied(lambda inode: inode.present, lambda directory: directory.present)

    def files(self) -> dict[str, bytes]:
        """All files as reads see them, by path, in order."""
        return {
            posixpath.join(path, name): bytes(inode.present)
            for path, directory in sorted(self._directories.items())
            for name, inode in sorted(directory.present.items())
        }

    def check(self) -> None:
        """Walk every invariant."""
        for inode in self._inodes():
            inode.check()
        for path, directory in self._directories.items():
            directory.check(path)

    # What both need

    def _copied(
        self, content: Callable[[Inode], Content], names: Callable[[Directory], dict[str, Inode]]
    ) -> "SimulatedDisk":
        disk = SimulatedDisk(capacity_bytes=self.capacity_bytes)
        copies: dict[int, Inode] = {}
        for path, directory in self._directories.items():
            copied = Directory()
            for name, inode in names(directory).items():
                copy = copies.get(id(inode))
                if copy is None:
                    copy = copies[id(inode)] = Inode.holding(content(inode))
                copied.present[name] = copied.durable[name] = copy
            disk._directories[path] = copied
        return disk

    def _place(self, path: str) -> tuple[Directory, str]:
        directory = self._directories.get(posixpath.dirname(path))
        if directory is None:
            raise FileNotFoundError(f"the directory of {path} does not exist")
        assert path not in self._directories, f"{path} is a directory"
        return directory, posixpath.basename(path)

    def _inodes(self) -> tuple[Inode, ...]:
        """Every file that a name, present, durable or pending, leads to; each once, in a fixed order."""
        found: dict[int, Inode] = {}
        for directory in self._directories.values():
            pending = (entry.inode for entry in directory.unsynced if entry.inode is not None)
            for inode in (*directory.durable.values(), *directory.present.values(), *pending):
                found[id(inode)] = inode
        return tuple(found.values())

    def _used(self) -> int:
        return sum(
            inode.present.size for directory in self._directories.values() for inode in directory.present.values()
        )

    def _check_space(self, path: str, more_bytes: int) -> None:
        if more_bytes and self._used() + more_bytes > self.capacity_bytes:
            raise OutOfSpace(f"no space left while trying to write {path}; free space or enlarge the disk")

    def _count(self, operation: str, path: str, offset: int = 0, size: int = 0) -> None:
        if self._count_or_cut(operation, path, offset, size):
            raise PowerCut(f"at the {operation} of {path}, call {self.calls}")

    def _count_or_cut(self, operation: str, path: str, offset: int, size: int) -> bool:
        """Count a call, and fail it if a fault says so; whether the power goes right now."""
        if self._changes_nothing:
            return False
        self.calls += 1
        call = Call(self.calls, operation, path, offset, size)
        if self.run_trace is not None:
            self.run_trace.record(*call)
        if self.node_calls is not None and operation != "pwrite":
            self.node_calls.hit()
        if self.trace is not None:
            self.trace.append(call)
        if self._cut_at is not None and self.calls >= self._cut_at:
            if self.calls > self._cut_at:
                raise PowerCut(f"at the {operation} of {path}: the power has been gone since call {self._cut_at}")
            if self.on_power_cut is not None:
                self.on_power_cut()
            return True
        if self.on_call is not None:
            self.on_call(call)
        for fault in self._faults:
            if fault.operation == operation and fault.path_part in path:
                if fault.skip:
                    fault.skip -= 1
                elif fault.times:
                    fault.times -= 1
                    raise fault.error
        return False
