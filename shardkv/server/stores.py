"""A node's log and engine, opened at its start and closed at its end.

Does not live here: what is in them, and the directory that they are in (``shardkv.storage``). The rules: a directory
that belongs to a node has a log, and is refused without it; to be cancelled is to die, and then nothing is tidied up,
for a crash must find what a crash leaves.
"""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import trio

from shardkv.config import NodeConfig, StorageConfig
from shardkv.environment import Disk, Environment, Workers
from shardkv.errors import OutOfSpace
from shardkv.multiraft.catalog import admit_engine
from shardkv.storage.directory import DataDirectory
from shardkv.storage.engine import Engine, Reader
from shardkv.storage.memory import MemoryEngine
from shardkv.storage.rocks import RocksEngine, RocksSettings
from shardkv.storage.wal import Wal, WalSettings

LOG_CACHE_BYTES_MAX: Final = 8 * 1024 * 1024
"""Log entries in memory, of all ranges: followers that are further behind are served from the disk."""

OpenEngine = Callable[[NodeConfig, str, Callable[[Reader], bool]], Engine]
"""Of the configuration, the path, and what is shown the engine's state before it is changed, and may refuse it, or tell
that nothing of what must be is there."""


@dataclass(frozen=True, slots=True)
class Stores:
    wal: Wal
    engine: Engine


def open_engine(config: NodeConfig, path: str, admit: Callable[[Reader], bool]) -> Engine:
    """The engine that the configuration asks for. Blocks."""
    if config.storage.engine == "memory":
        return MemoryEngine(in_loop=trio.from_thread.run_sync)
    return RocksEngine(path, RocksSettings(block_cache_bytes=config.storage.cache_bytes), admit)


@asynccontextmanager
async def open_stores(
    config: NodeConfig, environment: Environment, directory: DataDirectory, open_engine: OpenEngine, log: Any
) -> AsyncIterator[Stores]:
    """The log and the engine in a data directory, for as long as the context lasts.

    Raises StorageError, also when they cannot be closed; an error of the body comes first.
    """
    workers = environment.workers
    wal = await workers.run(_open_log, environment.disk, directory, config.storage)

    def note_log_mark() -> None:
        with suppress(OutOfSpace):  # what was noted before stays true
            directory.log_mark.write(wal.synced_sequence)

    opened: list[tuple[str, Callable[[], None]]] = [("log", wal.close), ("log mark", note_log_mark)]
    try:
        await workers.run(note_log_mark)
        engine = await workers.run(open_engine, config, directory.engine_path, partial(admit_engine, wal))
        opened.append(("engine", engine.close))
        yield Stores(wal, engine)
    except Exception:
        await _close(workers, opened, log)
        raise
    failure = await _close(workers, opened, log)
    if failure is not None:
        raise failure


def _open_log(disk: Disk, directory: DataDirectory, storage: StorageConfig) -> Wal:
    settings = WalSettings(segment_bytes=storage.segment_bytes, cache_bytes_max=LOG_CACHE_BYTES_MAX)
    for name in disk.list(directory.ingest_path):
        # Of a snapshot whose install a crash came before.
        disk.unlink(f"{directory.ingest_path}/{name}")
    # Without its log, a node's votes and promises would be forgotten.
    identity = directory.identity
    return Wal.open(
        disk,
        directory.wal_path,
        settings,
        token=identity.token,
        create=not identity.assigned,
        mark=directory.log_mark.read(),
    )


async def _close(workers: Workers, opened: list[tuple[str, Callable[[], None]]], log: Any) -> Exception | None:
    """Close each whatever became of the others; what failed first, if anything did.

    A node that ends because of its disk is likely to fail here, too, and ends with what came first all the same.
    """
    first: Exception | None = None
    for what, close in opened:
        try:
            await workers.run(close)
        except Exception as error:  # noqa: BLE001 - logged, and the first is the caller's
            log.error("closing failed", what=what, reason=str(error))
            first = first or error
    return first
