"""What one simulated disk holds: the content of files and the names in directories, each as it is and as it is synced.

Lives here: what a write, a change of a name, a sync and a crash make of the two states. Does not live here: the calls
of a node and their faults (``disk``), and what a crash chooses to leave (``crash_choosers``). The rule: what is present
is what is durable plus what was done since, in order.
"""

from collections.abc import Callable, Collection, Iterable
from typing import NamedTuple


class Unsynced(NamedTuple):
    """One change of a file's content that no sync has covered yet. ``data`` None cuts or extends it to ``offset``."""

    path: str
    offset: int
    data: bytes | None
    last: bool = False
    """The write that was issued last before the crash."""


class Content:
    """The bytes of a file: what was written, then zeros up to its size.

    The zeros are not held, so a file that was allocated and is yet to be written to costs nothing.
    """

    __slots__ = ("_written", "size")

    def __init__(self) -> None:
        self._written = bytearray()
        """Never longer than ``size``."""
        self.size: int = 0

    def apply(self, change: Unsynced) -> None:
        if change.data is None:
            del self._written[change.offset :]
            self.size = change.offset
        else:
            self.write(change.offset, change.data)

    def write(self, offset: int, data: bytes) -> None:
        if offset > len(self._written):
            self._written.extend(bytes(offset - len(self._written)))
        self._written[offset : offset + len(data)] = data
        self.size = max(self.size, len(self._written))

    def read(self, offset: int, count: int) -> bytes:
        count = max(0, min(count, self.size - offset))
        written = bytes(self._written[offset : offset + count])
        return written + bytes(count - len(written))

    def copy(self) -> "Content":
        copy = Content()
        copy._written = self._written.copy()
        copy.size = self.size
        return copy

    def check(self) -> None:
        assert len(self._written) <= self.size, f"{len(self._written)} bytes of a file whose size is {self.size}"

    def __bytes__(self) -> bytes:
        return self.read(0, self.size)


class Inode:
    """The content of one file: as reads see it, and as it stood at the last sync."""

    __slots__ = ("durable", "present", "sync_failed", "unsynced")

    def __init__(self) -> None:
        self.present: Content = Content()
        self.durable: Content = Content()
        self.unsynced: list[Unsynced] = []
        self.sync_failed: bool = False

    @classmethod
    def holding(cls, content: Content) -> "Inode":
        """A file whose content is synced."""
        inode = cls()
        inode.present = content.copy()
        inode.durable = content.copy()
        return inode

    def change(self, change: Unsynced) -> None:
        self.unsynced.append(change)
        self.present.apply(change)

    def settle(self) -> None:
        """A sync: what is present is durable."""
        for change in self.unsynced:
            self.durable.apply(change)
        self.unsynced.clear()

    def forget(self) -> None:
        """A sync has failed: what it should have written is given up by the system, and read by nobody any more."""
        self.sync_failed = True
        self.unsynced = [change for change in self.unsynced if change.data is None]
        self.present = self.durable.copy()
        for change in self.unsynced:
            self.present.apply(change)

    def crash(self, spans: Callable[[Unsynced], Iterable[tuple[int, int]]]) -> None:
        """Of what is not synced, keep the ``spans`` of each change: of a write's bytes, any of a change of size.

        An empty span of a write is the size alone.
        """
        for change in self.unsynced:
            for start, end in spans(change):
                if change.data is None:
                    self.durable.apply(change)
                elif start < end:
                    self.durable.write(change.offset + start, change.data[start:end])
                else:
                    self.durable.size = max(self.durable.size, change.offset + end)
        self.unsynced.clear()

    def check(self) -> None:
        self.present.check()
        self.durable.check()
        content = self.durable.copy()
        for change in self.unsynced:
            content.apply(change)
        assert bytes(content) == bytes(self.present), (
            "what is present is not what is durable plus what was written since"
        )

    def copy(self) -> "Inode":
        """The same with what is not synced; that a sync failed only the process knew that saw it."""
        copy = Inode()
        copy.present = self.present.copy()
        copy.durable = self.durable.copy()
        copy.unsynced = list(self.unsynced)
        return copy


class Entry(NamedTuple):
    """An unsynced change of one directory: ``name`` now means ``inode``, or nothing; a rename also frees ``freed``."""

    name: str
    inode: Inode | None
    freed: str | None = None


class Directory:
    """The names in one directory: as a listing sees them, and as they stood at the last sync."""

    __slots__ = ("durable", "present", "unsynced")

    def __init__(self) -> None:
        self.present: dict[str, Inode] = {}
        self.durable: dict[str, Inode] = {}
        self.unsynced: list[Entry] = []

    def change(self, entry: Entry) -> None:
        _apply_entry(self.present, entry)
        self.unsynced.append(entry)

    def settle(self) -> None:
        """A sync: what is present is durable."""
        self.crash(range(len(self.unsynced)))

    def crash(self, kept: Collection[int]) -> None:
        """Keep of the unsynced changes only those at the positions ``kept``: the system writes them in any order."""
        for position, entry in enumerate(self.unsynced):
            if position in kept:
                _apply_entry(self.durable, entry)
        self.unsynced.clear()

    def check(self, path: str) -> None:
        names = dict(self.durable)
        for entry in self.unsynced:
            _apply_entry(names, entry)
        assert names == self.present, f"the names in {path} are not the durable ones plus the changes since"

    def copy(self, inodes: dict[int, Inode]) -> "Directory":
        """The same with the copies of its files, by the ``id`` of what they are copies of."""
        copy = Directory()
        copy.present = {name: inodes[id(inode)] for name, inode in self.present.items()}
        copy.durable = {name: inodes[id(inode)] for name, inode in self.durable.items()}
        copy.unsynced = [
            entry._replace(inode=inodes[id(entry.inode)] if entry.inode is not None else None)
            for entry in self.unsynced
        ]
        return copy


def _apply_entry(names: dict[str, Inode], entry: Entry) -> None:
    if entry.freed is not None:
        names.pop(entry.freed, None)
    if entry.inode is None:
        names.pop(entry.name, None)
    else:
        names[entry.name] = entry.inode
