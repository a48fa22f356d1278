"""What happened in a run, in order, and its digest: equal for equal seeds, whatever the process.

Disk calls, bytes as they are received, what nodes applied and what clients were answered all come here. The rule: only
what follows from the seed may be recorded; no address in memory, no hash of a string, nothing of the real clock.
"""

from hashlib import blake2b
from typing import Final, Protocol
from zlib import crc32

from shardkv.simulation import determinism

PENDING_MAX: Final = 4_096
"""Events that are kept before they go into the digest."""


class Lines(Protocol):
    """Somewhere to write text to; an open file is one."""

    def write(self, text: str, /) -> object: ...


class Trace:
    """``file``, if given, has each event written to it as a line: to find where two runs part."""

    __slots__ = ("_file", "_hash", "_pending", "events")

    def __init__(self, file: Lines | None = None) -> None:
        self._hash = blake2b(digest_size=16)
        self._pending: list[str] = []
        self._file = file
        self.events: int = 0

    def record(self, *parts: object) -> None:
        self.events += 1
        pending = self._pending
        pending.append(f"{determinism.now():.9f} {parts}")
        if len(pending) >= PENDING_MAX:
            self._settle()

    def record_bytes(self, source: str, target: str, data: bytes) -> None:
        """Bytes that a node has received."""
        self.events += 1
        pending = self._pending
        pending.append(f"{determinism.now():.9f} {source} {target} {len(data)} {crc32(data)}")
        if len(pending) >= PENDING_MAX:
            self._settle()

    def digest(self) -> str:
        """In hexadecimal, of everything up to now."""
        self._settle()
        return self._hash.hexdigest()

    def _settle(self) -> None:
        if self._pending:
            text = "\n".join(self._pending) + "\n"
            self._pending.clear()
            self._hash.update(text.encode())
            if self._file is not None:
                self._file.write(text)
