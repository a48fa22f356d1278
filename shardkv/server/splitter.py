"""Splitting ranges that have grown too large: measure, choose a key, split. One range at a time, in slices.

Lives here: when a range is measured and that it is then split. Does not live here: the split itself. A range is
measured once its writes since the last time could have taken it over the size; a slice reads few keys, so that the
loop's other work goes on in between.
"""

from collections.abc import Awaitable, Callable
from typing import Any, Final

import trio

from shardkv.environment import Clock
from shardkv.errors import ShardKVError
from shardkv.machine.size import RangeMeasure
from shardkv.multiraft.driver import Driver
from shardkv.multiraft.replica import Replica
from shardkv.types import PLACEMENT_RANGE, RangeId

INTERVAL_SECONDS: Final = 0.1
IDLE_SECONDS: Final = 0.5
"""The interval while little is applied: no range grows much. At most this late is what a burst of writes begins."""
BUSY_ENTRIES: Final = 8
"""So many entries applied between two looks are not little."""
SLICE_KEYS: Final = 1_000
"""About a millisecond of the loop's time."""
RETRY_SECONDS: Final = 2.0
"""After a split that did not come about."""


class Splitter:
    """The node's splitting service, for the ranges that it leads. ``sizes`` are the last measured bytes of each."""

    def __init__(
        self,
        driver: Driver,
        clock: Clock,
        split: Callable[[RangeId, bytes], Awaitable[object]],
        split_bytes: Callable[[], int],
        log: Any,
    ) -> None:
        self._driver = driver
        self._clock = clock
        self._split = split
        self._split_bytes = split_bytes
        self._log = log
        self.sizes: dict[RangeId, int] = {}
        self._retry_at_ns: dict[RangeId, int] = {}
        self._single: set[RangeId] = set()
        """Ranges of too many bytes and a single key; measured again only once they were written."""

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        task_status.started()
        applied = 0
        while True:
            before, applied = applied, self._driver.statistics().entries_applied
            idle = applied - before < BUSY_ENTRIES
            await self._clock.sleep(IDLE_SECONDS if idle else INTERVAL_SECONDS)
            self._forget()
            for replica in list(self._driver.catalog.replicas.values()):
                if self._wants_measuring(replica):
                    await self._measure(replica)

    def _forget(self) -> None:
        """Drop what is known of ranges that this node holds no more; ids are never reused."""
        held = self._driver.catalog.replicas
        if len(self.sizes) + len(self._retry_at_ns) > len(held):
            self.sizes = {range_id: size for range_id, size in self.sizes.items() if range_id in held}
            self._retry_at_ns = {range_id: at for range_id, at in self._retry_at_ns.items() if range_id in held}
            self._single &= held.keys()

    def bytes_of(self, replica: Replica) -> int:
        """About how large a range is: as last measured, and what was written since."""
        written = replica.machine.bytes_written if replica.machine is not None else 0
        return self.sizes.get(replica.range_id, 0) + written

    def _wants_measuring(self, replica: Replica) -> bool:
        machine = replica.machine
        if machine is None or replica.range_id == PLACEMENT_RANGE or not replica.leads:
            return False
        if self._driver.space.low:
            return False  # it grows no more; and where others are full, they take the split no more than other entries
        if self._clock.monotonic_ns() < self._retry_at_ns.get(replica.range_id, 0):
            return False
        if replica.range_id in self._single and not machine.bytes_written:
            return False
        size = self.sizes.get(replica.range_id)
        return size is None or size + machine.bytes_written > self._split_bytes()

    async def _measure(self, replica: Replica) -> None:
        machine = replica.machine
        assert machine is not None, f"range {replica.range_id} is measured uninitialised"
        machine.bytes_written = 0
        generation = machine.descriptor.epoch.span
        snapshot = self._driver.engine.snapshot()
        try:
            measure = RangeMeasure(snapshot, machine.descriptor.span)
            while not measure.step(SLICE_KEYS):
                await self._clock.sleep(0)
        finally:
            snapshot.close()
        if replica.machine is not machine or machine.descriptor.epoch.span != generation:
            return
        self.sizes[replica.range_id] = measure.bytes
        self._single.discard(replica.range_id)
        if measure.bytes <= self._split_bytes():
            return
        if measure.split_key is None:
            self._single.add(replica.range_id)
            return
        try:
            await self._split(replica.range_id, measure.split_key)
            self.sizes[replica.range_id] = measure.bytes // 2
            self._log.info("split", range=replica.range_id, bytes=measure.bytes)
        except ShardKVError as error:
            self._log.info("split put off", range=replica.range_id, reason=str(error))
            self._retry_at_ns[replica.range_id] = self._clock.monotonic_ns() + int(RETRY_SECONDS * 1e9)
