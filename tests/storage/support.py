"""A disk in memory that remembers what has been synced, so that tests can crash at any moment and look.

Model: a write is durable once its file is synced; before that any part of it, sector by sector, may or may not be
there after a crash, and so may a change of length. A name is durable once its directory is synced; before that a
creation, rename or removal may or may not have happened.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random

from shardkv.errors import DataDirectoryError, StorageError

SECTOR_BYTES = 512


@dataclass
class Node:
    """A file: what is durable, what a reader sees, and the operations in between."""

    durable: bytearray = field(default_factory=bytearray)
    current: bytearray = field(default_factory=bytearray)
    pending: list[tuple[int, bytes] | int] = field(default_factory=list)
    """Unsynced writes ``(offset, data)`` and truncations ``size``, in order."""


def write_into(content: bytearray, offset: int, data: bytes) -> None:
    if len(content) < offset + len(data):
        content.extend(bytes(offset + len(data) - len(content)))
    content[offset : offset + len(data)] = data


def resize(content: bytearray, size: int) -> None:
    if size <= len(content):
        del content[size:]
    else:
        content.extend(bytes(size - len(content)))


class MemoryDisk:
    """Implements :class:`shardkv.environment.Disk`. ``observe`` is called before every operation that changes it."""

    def __init__(self) -> None:
        self.names: dict[str, Node] = {}
        self.durable_names: dict[str, Node] = {}
        self.directories: set[str] = {"/"}
        self.locks: set[str] = set()
        self.observe: Callable[[str, str], None] = lambda operation, path: None
        self.operations = 0

    def changing(self, operation: str, path: str) -> None:
        self.observe(operation, path)
        self.operations += 1

    def open(self, path: str, *, create: bool = False, exclusive: bool = False) -> "MemoryFile":
        if path in self.directories:
            raise StorageError(f"{path} is a directory")
        if path not in self.names:
            if not create:
                raise StorageError(f"{path} does not exist")
            self.changing("create", path)
            self.names[path] = Node()
        elif exclusive:
            raise StorageError(f"{path} exists")
        return MemoryFile(self, path, self.names[path])

    def read(self, path: str) -> bytes:
        if path not in self.names:
            raise FileNotFoundError(path)
        return bytes(self.names[path].current)

    def write_atomically(self, path: str, data: bytes) -> None:
        self.changing("write_atomically", path)
        self.names[path] = self.durable_names[path] = Node(bytearray(data), bytearray(data))

    def exists(self, path: str) -> bool:
        return path in self.names or path in self.directories

    def list(self, path: str) -> list[str]:
        if path in self.names:
            raise NotADirectoryError(path)
        prefix = path.rstrip("/") + "/"
        return sorted(
            {
                other[len(prefix) :].split("/")[0]
                for other in [*self.names, *self.directories]
                if other.startswith(prefix) and other != prefix
            }
        )

    def make_directory(self, path: str) -> None:
        parts = path.strip("/").split("/")
        for count in range(1, len(parts) + 1):
            directory = "/" + "/".join(parts[:count])
            if directory in self.names:
                raise StorageError(f"{directory} is not a directory")
            self.directories.add(directory)

    def rename(self, source: str, target: str) -> None:
        self.changing("rename", target)
        self.names[target] = self.names.pop(source)

    def unlink(self, path: str) -> None:
        self.changing("unlink", path)
        del self.names[path]

    def sync_directory(self, path: str) -> None:
        self.changing("sync_directory", path)
        prefix = path.rstrip("/") + "/"
        for name in [name for name in self.durable_names if name.startswith(prefix)]:
            del self.durable_names[name]
        for name, node in self.names.items():
            if name.startswith(prefix):
                self.durable_names[name] = node

    def lock(self, path: str) -> "MemoryLock":
        if path in self.locks:
            raise DataDirectoryError(f"{path} is held by another process")
        self.locks.add(path)
        self.names.setdefault(path, Node())
        return MemoryLock(self, path)

    def free_bytes(self, path: str) -> int:
        return 1 << 40

    # What a crash leaves

    def copy(self) -> "MemoryDisk":
        """The same content, all of it durable."""
        return self._after(self.names, lambda node: bytes(node.current))

    def lost(self) -> "MemoryDisk":
        """After a crash that took everything unsynced."""
        return self._after(self.durable_names, lambda node: bytes(node.durable))

    def torn(self, random: Random) -> "MemoryDisk":
        """After a crash that took a random part of what was unsynced."""
        names = dict(self.durable_names)
        for name in sorted({*self.names, *self.durable_names}):
            if self.names.get(name) is not self.durable_names.get(name) and random.random() < 0.5:
                if name in self.names:
                    names[name] = self.names[name]
                else:
                    del names[name]
        return self._after(names, lambda node: _torn(node, random))

    def _after(self, names: dict[str, Node], content: Callable[[Node], bytes]) -> "MemoryDisk":
        disk = MemoryDisk()
        disk.directories = set(self.directories)
        for name in sorted(names):
            data = content(names[name])
            disk.names[name] = disk.durable_names[name] = Node(bytearray(data), bytearray(data))
        return disk


def _torn(node: Node, random: Random) -> bytes:
    content = bytearray(node.durable)
    for operation in node.pending:
        if isinstance(operation, int):
            if random.random() < 0.5:
                resize(content, operation)
            continue
        offset, data = operation
        if random.random() < 0.3:
            write_into(content, offset, data)
            continue
        start = 0
        while start < len(data):
            stop = min(len(data), start + SECTOR_BYTES - (offset + start) % SECTOR_BYTES)
            if random.random() < 0.5:
                write_into(content, offset + start, data[start:stop])
            start = stop
    return bytes(content)


class MemoryFile:
    """Implements :class:`shardkv.environment.File`."""

    def __init__(self, disk: MemoryDisk, path: str, node: Node) -> None:
        self._disk = disk
        self._path = path
        self._node = node
        self._closed = False

    def _check(self) -> None:
        assert not self._closed, f"{self._path} is closed"

    def pwrite(self, data: bytes | bytearray | memoryview, offset: int) -> None:
        self._check()
        self._disk.changing("pwrite", self._path)
        write_into(self._node.current, offset, bytes(data))
        self._node.pending.append((offset, bytes(data)))

    def pread(self, count: int, offset: int) -> bytes:
        self._check()
        return bytes(self._node.current[offset : offset + count])

    def size(self) -> int:
        return len(self._node.current)

    def allocate(self, size: int) -> None:
        self._check()
        if size > len(self._node.current):
            self.pwrite(bytes(size - len(self._node.current)), len(self._node.current))

    def truncate(self, size: int) -> None:
        self._check()
        self._disk.changing("truncate", self._path)
        resize(self._node.current, size)
        self._node.pending.append(size)

    def sync(self) -> None:
        self._check()
        self._disk.changing("sync", self._path)
        self._node.durable[:] = self._node.current
        self._node.pending.clear()

    def is_at(self, path: str) -> bool:
        return not self._closed and self._disk.names.get(path) is self._node

    def renamed(self, path: str) -> None:
        self._path = path

    def close(self) -> None:
        self._closed = True


class MemoryLock:
    def __init__(self, disk: MemoryDisk, path: str) -> None:
        self._disk = disk
        self._path = path

    def release(self) -> None:
        self._disk.locks.discard(self._path)
