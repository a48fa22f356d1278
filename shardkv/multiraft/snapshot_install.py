"""What the install of a snapshot does to the engine: the rows of one replica go, those of a file come.

Lives here: the order of the steps, and waiting for room. Does not live here: how the file came, and what becomes of the
group's log (``snapshot_receiver``), nor which rows make up a range (``machine.snapshot``). The rule (trap 19): an
ingested file is durable at once while batches written before it are not; hence the install first deletes the old data
and leaves a mark, flushes, and then ingests a file that holds the range's applied state and overwrites the mark. A
crash before the ingest leaves the mark, by which the replica knows that it needs the snapshot again.
"""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Final

from shardkv.environment import Environment
from shardkv.errors import OutOfSpace, StorageError
from shardkv.machine.machine import RangeMachine
from shardkv.machine.snapshot import begin_install
from shardkv.multiraft.catalog import Catalog
from shardkv.multiraft.driver import Driver
from shardkv.multiraft.replica import Replica
from shardkv.storage.engine import Engine, WriteBatch
from shardkv.types import RangeDescriptor

FULL_DISK_RETRY_SECONDS: Final = 1.0
"""How long a step of an install that found no room waits until it is taken again."""
STALL_RETRY_SECONDS: Final = 0.05
"""How long an install waits until it looks again whether the engine takes writes."""


@dataclass(slots=True)
class Arrived:
    """A snapshot that has arrived whole and waits for its group to take it."""

    path: str
    descriptor: RangeDescriptor
    index: int
    term: int


class Installer:
    """Installs one snapshot at a time for each replica, which rests meanwhile."""

    def __init__(self, driver: Driver, environment: Environment, log: Any) -> None:
        self._driver = driver
        self._catalog: Catalog = driver.catalog
        self._engine: Engine = driver.engine
        self._environment = environment
        self._log = log

    async def until_writable(self) -> None:
        """Wait until the engine takes writes at once. Raises OutOfSpace when there is no room for an install."""
        while self._engine.stalled() and not self._engine.full:
            await self._environment.clock.sleep(STALL_RETRY_SECONDS)
        if self._driver.space.full:
            raise self._driver.space.refusal()

    async def replace_data(self, replica: Replica, arrived: Arrived) -> None:
        """Put the file's rows in the place of the replica's; every step may be the last before a crash."""
        engine, workers = self._engine, self._environment.workers
        old = replica.machine.descriptor if replica.machine is not None else None
        replica.machine = None
        batch = WriteBatch()
        begin_install(batch, arrived.descriptor, arrived.index, arrived.term, old, engine)
        await self._when_room(self._write, batch)
        await self._when_room(workers.run, engine.flush)
        await self._when_room(workers.run, engine.ingest, arrived.path)
        machine = RangeMachine.load(replica.range_id, engine, self._catalog.extension(replica.range_id))
        if machine is None or machine.applied_index != arrived.index:
            raise StorageError(f"a snapshot of range {replica.range_id} does not hold the state that it names")
        replica.machine = machine
        self._driver.hybrid_clock.absorb(machine.last_timestamp)
        self._catalog.installed(replica)

    async def _write(self, batch: WriteBatch) -> None:
        # A write now would hold up the loop, and every range with it. Without room it does not wait.
        while self._engine.stalled() and not self._engine.full:
            await self._environment.clock.sleep(STALL_RETRY_SECONDS)
        self._engine.write(batch)

    async def _when_room(self, step: Callable[..., Awaitable[object]], *arguments: Any) -> None:
        """Take a step of an install, and take it again where the disk was full: half way, the range has no data."""
        while True:
            try:
                await step(*arguments)
            except OutOfSpace as error:
                self._driver.space.failed("install", error)
                self._log.error("no room to install a snapshot", reason=str(error))
                await self._environment.clock.sleep(FULL_DISK_RETRY_SECONDS)
            else:
                self._driver.space.succeeded("install")
                return
