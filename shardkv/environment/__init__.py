"""The seams between a node and the world, as protocols: time, chance, identity, disk, threads, network.

Node code takes every one of these from the :class:`Environment` that is handed to it; ruff's banned-api holds the line.
``shardkv.environment.real`` is the only module that implements them with the operating system; the simulator
implements them with virtual time and faults. Nothing here has behaviour of its own.
"""

from collections.abc import Awaitable, Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import trio

T = TypeVar("T")


class Clock(Protocol):
    """Time as one node sees it; clocks of different nodes drift apart."""

    def monotonic_ns(self) -> int:
        """Nanoseconds since some fixed moment. Never goes back, and runs on while the machine is suspended."""
        ...

    def wall_ms(self) -> int:
        """Milliseconds since 1970. May jump."""
        ...

    async def sleep(self, seconds: float) -> None: ...

    def deadline(self, seconds: float) -> AbstractContextManager[trio.CancelScope]:
        """A cancel scope that ends ``seconds`` from now. Never one per request: see the deadline heap."""
        ...


class Random(Protocol):
    def random(self) -> float: ...

    def randrange(self, stop: int) -> int: ...


class Ids(Protocol):
    def random_bytes(self, count: int) -> bytes:
        """``count`` unpredictable bytes, for session, cluster and directory ids."""
        ...


class File(Protocol):
    """An open file. Calls block; the ones that may take long go through :class:`Workers`."""

    def pwrite(self, data: bytes | bytearray | memoryview, offset: int) -> None:
        """Write all of ``data`` at ``offset``. Raises OutOfSpace or StorageError."""
        ...

    def pread(self, count: int, offset: int) -> bytes:
        """Up to ``count`` bytes from ``offset``; fewer only at the end of the file."""
        ...

    def size(self) -> int: ...

    def allocate(self, size: int) -> None:
        """Make the file at least ``size`` bytes long, zero-filled and written, so that later syncs move no metadata."""
        ...

    def truncate(self, size: int) -> None: ...

    def sync(self) -> None:
        """Make every completed write durable (fdatasync). A failure is final: the file must not be trusted again."""
        ...

    def is_at(self, path: str) -> bool:
        """Whether ``path`` names this file, as it is now; not once the file is closed."""
        ...

    def renamed(self, path: str) -> None:
        """The file was given the name ``path``: errors call it so from now on."""
        ...

    def close(self) -> None: ...


class DirectoryLock(Protocol):
    def release(self) -> None: ...


class Disk(Protocol):
    """The files of one node. Paths are absolute strings.

    Errors are shardkv's StorageError family, but for FileNotFoundError and FileExistsError, which are answers.
    """

    def open(self, path: str, *, create: bool = False, exclusive: bool = False) -> File:
        """Open for reading and writing.

        ``create`` makes it if absent (the entry is durable after :meth:`sync_directory`); ``exclusive`` makes it and
        raises FileExistsError if it is there.
        """
        ...

    def read(self, path: str) -> bytes:
        """The whole of a small file. Raises FileNotFoundError."""
        ...

    def write_atomically(self, path: str, data: bytes) -> None:
        """Write a small file: a crash leaves the old content or the new. Durable at return."""
        ...

    def exists(self, path: str) -> bool: ...

    def list(self, path: str) -> list[str]:
        """The names in a directory, sorted."""
        ...

    def make_directory(self, path: str) -> None:
        """Make it and its parents, durably; no error if it is there."""
        ...

    def rename(self, source: str, target: str) -> None: ...

    def unlink(self, path: str) -> None: ...

    def sync_directory(self, path: str) -> None: ...

    def lock(self, path: str) -> DirectoryLock:
        """Take the directory of ``path``, a file that says so and is made if absent, for this process alone.

        Raises DataDirectoryError when another process has it, also if that file was deleted meanwhile.
        """
        ...

    def free_bytes(self, path: str) -> int: ...


class SerialWorker(Protocol):
    """One thread that runs jobs in order; what each returned or raised is handed to a callback in the loop.

    Made for the log writer: a hand-off and its completion cost about 15 µs together, a fifth of a general thread hop.
    """

    def submit(self, job: Callable[[], object], done: Callable[[object, BaseException | None], None]) -> None:
        """Queue ``job``; ``done(result, error)`` is called in the loop, in the order of submission."""
        ...

    @property
    def at_once(self) -> bool:
        """Whether :meth:`run_now` would run a job: nothing is queued, and jobs have lately been quick."""
        ...

    def run_now(self, job: Callable[[], object], done: Callable[[object, BaseException | None], None]) -> bool:
        """Run ``job`` and then ``done`` here and now if :attr:`at_once`; otherwise do nothing. Whether it ran.

        A sync of a fast disk takes less time than waking a thread, handing it the interpreter, and being woken by it.
        """
        ...


class Workers(Protocol):
    async def run(self, function: Callable[..., T], *args: Any) -> T:
        """Run a blocking function in a thread. Not cancellable: it is waited for."""
        ...

    async def serial(self, name: str, *, task_status: trio.TaskStatus[SerialWorker] = trio.TASK_STATUS_IGNORED) -> None:
        """Service: start with ``nursery.start``, which returns the worker.

        Cancelling it finishes the queued jobs first, callbacks included; ``submit`` raises trio.ClosedResourceError
        from then on.
        """
        ...

    def yield_interpreter(self) -> None:
        """Let the serial worker that was just handed a job begin it, before going on to step for milliseconds."""
        ...


class Stream(Protocol):
    """A reliable, ordered byte stream between two nodes, or a client and a node. Errors: trio.BrokenResourceError and
    trio.ClosedResourceError."""

    @property
    def remote(self) -> str:
        """The other side's address, for messages to people."""
        ...

    @property
    def local(self) -> str:
        """This side's address: what the other side has for ``remote``, unless something in between translates."""
        ...

    def send_nowait(self, data: bytes | bytearray | memoryview) -> int:
        """Hand over as much of ``data`` as fits without waiting; the count of bytes taken, 0 if none."""
        ...

    async def send_all(self, data: bytes | bytearray | memoryview) -> None: ...

    async def receive(self, count_max: int) -> bytes:
        """The next bytes, or ``b""`` once the other side has closed."""
        ...

    async def aclose(self) -> None: ...

    def close_now(self) -> None:
        """Close without waiting; tasks inside the stream get ClosedResourceError."""
        ...


class Listener(Protocol):
    @property
    def address(self) -> str:
        """``host:port`` as bound; the port is the real one where 0 was asked for."""
        ...


class Network(Protocol):
    async def listen(
        self,
        address: str,
        handler: Callable[[Stream], Awaitable[None]],
        *,
        task_status: trio.TaskStatus[Listener] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Service: accept streams on ``host:port`` and run ``handler`` for each in its own task, until cancelled.

        A stream is closed when its handler returns, or lets out a broken stream or one of shardkv's errors: those end
        one connection. Anything else that it lets out is our own bug and ends the service. Raises ConfigError when the
        address cannot be bound.
        """
        ...

    async def dial(self, address: str) -> Stream:
        """Connect to ``host:port``. Raises OSError when nobody answers."""
        ...

    def connections_max(self) -> int:
        """How many connections can stand at once, dialled ones and those of others. Beyond, what others open is ended
        at once."""
        ...


@dataclass(frozen=True, slots=True)
class Environment:
    """All that a node gets from outside."""

    clock: Clock
    random: Random
    ids: Ids
    disk: Disk
    workers: Workers
    network: Network
