"""Housekeeping of a node's storage: flushing the engine, compacting the groups' logs, freeing segments.

Lives here: when, and in which order. Does not live here: how (``storage``). The rule (trap 20): an entry leaves the log
only after an engine flush that covers the batch in which it was applied; what a follower will need next stays longer,
but only within a bound (trap 11).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Final

import trio

from shardkv.environment import Environment
from shardkv.errors import OutOfSpace, StorageError
from shardkv.multiraft.driver import Driver
from shardkv.multiraft.replica import Replica
from shardkv.raft import ProgressState
from shardkv.raft.progress import NEVER
from shardkv.storage.wal import CompactLog, LogUpdate

INTERVAL_SECONDS: Final = 0.25
IDLE_MEASURES: Final = 4
MEASURED_BYTES: Final = 1024 * 1024
"""While less than this was logged, only one look in so many asks how much room is left: it costs a thread's hop."""
MARK_SECONDS: Final = 10.0
"""At most so often it is noted how far the log is on disk. What is lost of it beyond that, a start takes for what a
crash left unfinished."""
FULL_DISK_FLUSH_SECONDS: Final = 2.0
"""After a flush that found no room, the next one waits this long."""
FLUSH_BYTES: Final = 24 * 1024 * 1024
"""The engine is flushed once about this much has been written since the last flush."""
LOG_SEGMENTS_MAX: Final = 6
"""And when the log has grown to more segments than this."""
IDLE_FLUSH_SECONDS: Final = 30.0
"""What was written last does not stay only in the log for longer than this."""
ENTRIES_KEPT: Final = 256
"""Entries behind the applied index that stay in every log, for followers that are a little behind."""
KEPT_BYTES_MAX: Final = 1024 * 1024
"""And of one group no more than this, while the log has more than LOG_SEGMENTS_MAX segments: with large values it would
hold so many of every range, and each start would read them all."""
LAG_ENTRIES_MAX: Final = 10_000
"""How far behind a follower may be and still find its next entry in the leader's log; further, it gets a snapshot."""
LAG_BYTES_MAX: Final = 16 * 1024 * 1024
"""The same in bytes of one group's log."""
KEEPING_SEGMENTS_MAX: Final = 12
"""For one that is being sent a snapshot, or catches up after it, the log keeps all that follows, until it has grown to
so many segments: else a large range under load would need the next snapshot as soon as it has the first. For one that
is away nothing is kept either in a log of so many, and in one of twice as many for nobody who is behind: one may take
nothing for days, for want of room say, and of ten thousand ranges it would be too much."""
AWAY_SECONDS: Final = 5.0
"""Who has not answered a heartbeat for so long is away."""
COMPACTED_AT_ONCE_MAX: Final = 256
"""So many groups' logs are looked at before others may do something."""
REST_SECONDS: Final = 60.0
"""So often what only ranges in use need in memory is let go from those at rest."""


class Maintenance:
    """The node's housekeeper: a service, and :meth:`flush_and_compact` also for people."""

    def __init__(
        self,
        driver: Driver,
        environment: Environment,
        log: Any,
        directory: str | None = None,
        note_log_mark: Callable[[int], None] = lambda sequence: None,
    ) -> None:
        """``directory`` lies on the disk whose free space is watched. ``note_log_mark`` is called in worker threads, as
        :attr:`shardkv.storage.directory.DataDirectory.log_mark` is written."""
        self.kept: tuple[int, int] | None = None
        """Instead of ENTRIES_KEPT and LAG_ENTRIES_MAX, at any time: a simulation's short logs meet more snapshots."""
        self._directory = directory
        self._note_log_mark = note_log_mark
        self._marked = -1
        self._marked_ns = 0
        """Up to which record the log was noted to be on disk, and when."""
        self._driver = driver
        self._environment = environment
        self._log = log
        self._collecting = False
        self._noting = False
        """A shorter promise is being put on record."""
        self._flushed_ns = 0
        self._flushed_segment = -1
        """The newest segment at the last flush: flushing again before there is another frees none."""
        self._measured_bytes = -MEASURED_BYTES
        """What the log had written when the room was last measured; so much less at first that it is at once."""
        self._unmeasured = 0
        """Looks since then."""
        self._room = (False, False, False)
        """What was last said of it: short, low, full."""
        self._rested_ns = 0
        self._flush_again_ns = 0
        """When to try again a flush that found no room; 0 if the last one went well."""

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        clock = self._environment.clock
        self._flushed_ns = self._rested_ns = self._marked_ns = clock.monotonic_ns()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._watch_room)
            nursery.start_soon(self._keep_spares)
            task_status.started()
            while True:
                await clock.sleep(INTERVAL_SECONDS)
                if self._due():
                    try:
                        await self.flush_and_compact()
                    except OutOfSpace as error:
                        # What was not flushed is still in the log. Until it is flushed nothing is compacted either.
                        if not self._flush_again_ns:
                            self._log.error(
                                "no room to flush the engine: it is tried until there is", reason=str(error)
                            )
                        self._flush_again_ns = clock.monotonic_ns() + int(FULL_DISK_FLUSH_SECONDS * 1e9)
                self._collect()
                if clock.monotonic_ns() - self._rested_ns > REST_SECONDS * 1e9:
                    self._rest()

    async def _watch_room(self) -> None:
        """Also while a flush takes long: the log goes on meanwhile, and others fill the disk."""
        while True:
            await self._environment.clock.sleep(INTERVAL_SECONDS)
            with _in_place():
                await self._measure()

    async def _keep_spares(self) -> None:
        """Have the next log segment's file ready before it is needed, and the reserve."""
        log_writer = self._driver.log_writer
        prepared = False
        while True:
            if prepared:
                await log_writer.spare_taken.wait()
            else:
                await self._environment.clock.sleep(INTERVAL_SECONDS)
            log_writer.spare_taken = trio.Event()
            with _in_place():
                prepared = await self._prepare()

    async def _measure(self) -> None:
        """Look how much room is left, and say when what the node takes changes by it."""
        space = self._driver.space
        if self._directory is not None and self._worth_measuring():
            space.measured(await self._environment.workers.run(self._look, self._directory))
        # An engine that found no room goes on when it is asked, and nobody else may have a reason to ask it.
        engine = self._driver.engine
        engine.stalled()
        if engine.full:
            # However much is free now, by a quota or after a compaction that was given up. A node that does not count
            # as full holds back what is to be applied, reads that wait for it with it, until a flush has failed, too.
            space.failed("writes", OutOfSpace("the engine has found no room"))
        else:
            space.succeeded("writes")
        before, self._room = self._room, (space.short, space.low, space.full)
        if self._room != before:
            if space.low:
                self._log.error("the disk is nearly full: writes are refused", reason=str(space.refusal()))
            elif any(before[1:]):
                self._log.info("the disk has room again: writes are taken")
            elif space.short:
                self._log.warning(
                    "the disk fills up: nodes with more room are to lead, and soon writes are refused",
                    advice="free space or enlarge the disk",
                )
            else:
                self._log.info("the disk has room again")

    def _look(self, directory: str) -> int:
        """How much room is left; in a worker thread. Raises FileNotFoundError if the log is not where it was."""
        self._driver.wal.require_in_place()
        self._mark()
        return self._environment.disk.free_bytes(directory)

    def _mark(self) -> None:
        """Note, now and then, how far the log is on disk; in a worker thread."""
        synced, now = self._driver.wal.synced_sequence, self._environment.clock.monotonic_ns()
        if now - self._marked_ns >= MARK_SECONDS * 1e9 and synced != self._marked:
            with suppress(OutOfSpace):  # the old note stays true
                self._note_log_mark(synced)
                self._marked, self._marked_ns = synced, now

    def _worth_measuring(self) -> bool:
        """At every look while this node writes much or lacks room; what others write it may learn of a little later."""
        written = self._driver.wal.statistics().written_bytes
        self._unmeasured += 1
        busy = written - self._measured_bytes >= MEASURED_BYTES or self._driver.space.short
        if not busy and self._unmeasured < IDLE_MEASURES:
            return False
        self._measured_bytes, self._unmeasured = written, 0
        return True

    def _due(self) -> bool:
        engine, wal = self._driver.engine, self._driver.wal
        if self._flush_again_ns:
            return self._environment.clock.monotonic_ns() >= self._flush_again_ns
        if engine.unflushed_bytes > FLUSH_BYTES:
            return True
        log = wal.statistics()
        long = log.segments > LOG_SEGMENTS_MAX
        if long and log.oldest_segment_id + log.segments != self._flushed_segment:
            return True
        idle_ns = self._environment.clock.monotonic_ns() - self._flushed_ns
        return (long or engine.unflushed_bytes > 0) and idle_ns > IDLE_FLUSH_SECONDS * 1e9

    async def flush_and_compact(self) -> None:
        """Make the applied state durable in the engine, then let go of the log that it covers. Raises OutOfSpace."""
        if self._driver.failure is not None:
            return  # what was applied last may not be in the engine, and this node ends
        applied = [
            (replica, replica.machine.applied_index)
            for replica in self._driver.catalog.replicas.values()
            if replica.machine is not None and not replica.installing
        ]
        shorter_ns = self._driver.catalog.shorter_promise_ns()
        if shorter_ns is not None and not self._noting:
            self._noting = True  # people flush, too, at the same time; two threads must not write one file
            try:
                with suppress(OutOfSpace):  # the longer one stands
                    await self._environment.workers.run(self._driver.catalog.note_promise, shorter_ns)
            finally:
                self._noting = False
        log = self._driver.wal.statistics()
        self._flushed_segment = log.oldest_segment_id + log.segments
        # Compaction goes only as far as the log knows entries to be committed.
        self._driver.log_writer.write_all()
        try:
            await self._environment.workers.run(self._driver.engine.flush)
        except OutOfSpace as error:
            self._driver.space.failed("engine", error)
            raise
        self._driver.space.succeeded("engine")
        self._flush_again_ns = 0
        self._flushed_ns = self._environment.clock.monotonic_ns()
        segments = self._driver.wal.statistics().segments
        for position in range(0, len(applied), COMPACTED_AT_ONCE_MAX):
            if position:
                await trio.lowlevel.checkpoint()
            looked_at = applied[position : position + COMPACTED_AT_ONCE_MAX]
            found = [self._compaction(replica, index, segments) for replica, index in looked_at]
            updates = [update for update in found if update is not None]
            if updates:
                self._driver.log_writer.append(updates)

    def _rest(self) -> None:
        self._rested_ns = self._environment.clock.monotonic_ns()
        now_ms = self._driver.hybrid_clock.ms()
        for replica in self._driver.catalog.replicas.values():
            if replica.machine is not None:
                replica.machine.rest(now_ms)

    def _compaction(self, replica: Replica, applied: int, segments: int) -> LogUpdate | None:
        """What to let go of, while the log has so many ``segments``."""
        if self._driver.catalog.replicas.get(replica.range_id) is not replica:
            return None  # another one is in its place since: what that one has applied was not flushed
        if replica.machine is None or replica.installing or replica.needs_snapshot:
            return None
        entries_kept, lag_entries_max = self.kept or (ENTRIES_KEPT, LAG_ENTRIES_MAX)
        last = min(applied, replica.log.hard_state.commit)
        index = last - entries_kept
        if segments > LOG_SEGMENTS_MAX:
            index = max(index, _lowest_kept(replica, last, entries_kept, KEPT_BYTES_MAX))
        if replica.leads:
            away_ns = int(AWAY_SECONDS * 1e9)
            crowded = segments > KEEPING_SEGMENTS_MAX
            needed = _needed(replica, self._environment.clock.monotonic_ns() - away_ns if crowded else NEVER)
            if needed < index and segments <= 2 * KEEPING_SEGMENTS_MAX:
                index = max(needed, _lowest_kept(replica, index, lag_entries_max, LAG_BYTES_MAX))
            index = min(index, self._needed_after_snapshots(replica, applied))
        if index <= replica.log.compact_index:
            return None
        return LogUpdate(replica.range_id, compact=CompactLog(index, replica.log.term(index)))

    def _needed_after_snapshots(self, replica: Replica, applied: int) -> int:
        """The highest index below which no receiver of a snapshot will ask for an entry (trap 11)."""
        needed = replica.raft.last_index
        if self._driver.wal.statistics().segments <= KEEPING_SEGMENTS_MAX:
            for replica_id, peer in replica.raft.status().progress.items():
                begins = self._driver.snapshots.log_needed(replica.range_id, replica_id, peer.match, applied)
                if begins is not None:
                    needed = min(needed, max(begins, peer.match))
        return needed

    async def _prepare(self) -> bool:
        """Make what is missing; whether there was room for it."""
        space = self._driver.space
        while (job := self._driver.wal.prepare()) is not None:
            try:
                await self._environment.workers.run(job)
            except OutOfSpace as error:
                if not space.full:
                    self._log.error("no room for the next log segment", reason=str(error))
                space.failed("spare", error)
                return False
        space.succeeded("spare")
        return True

    def _collect(self) -> None:
        if self._collecting:
            return
        job = self._driver.wal.collect()
        if job is None:
            return
        self._collecting = True

        def collected(_: object, error: BaseException | None) -> None:
            self._collecting = False
            if error is not None:
                self._driver.fail(error)

        self._driver.log_writer.submit(job, collected)


@contextmanager
def _in_place() -> Iterator[None]:
    """Ends the node, in words for its user, when a file that it needs is gone."""
    try:
        yield
    except FileNotFoundError as error:
        raise StorageError(
            f"a part of the data directory is not there any more ({error}), so nothing that is written now can be "
            "kept: put it back as it was, or start a node under another name with an empty data directory"
        ) from error


def _needed(replica: Replica, heard_since_ns: int) -> int:
    """The highest index that every other replica is known to have, or will have with its snapshot.

    One that is not heard of counts too, if it was heard of since then: it may be installing the snapshot that it was
    sent, or be just restarting. But not one to which what the log still holds would be of no use: it gets a snapshot,
    whatever is kept.
    """
    needed = replica.raft.last_index
    for replica_id, peer in replica.raft.status().progress.items():
        if replica_id == replica.replica_id:
            continue
        held = peer.match
        if peer.state is ProgressState.SNAPSHOT:
            held = peer.pending_snapshot
        elif peer.state is ProgressState.PROBE and not peer.recent_active:
            held = max(held, peer.next - 1)  # where a snapshot that has arrived will let it go on
        unknown = not peer.match and peer.recent_active  # a new leader learns it from the first answer
        away = not peer.recent_active and peer.lease_stamp < heard_since_ns
        if (held >= replica.log.compact_index and not away) or unknown:
            needed = min(needed, held)
    return needed


def _lowest_kept(replica: Replica, index: int, entries_max: int, bytes_max: int) -> int:
    """How far the log may be compacted so that of what stays up to ``index`` there is no more than that."""
    log = replica.log
    lowest = max(index - entries_max, log.compact_index)
    if log.data_bytes <= bytes_max:
        return lowest
    left = bytes_max
    while index > lowest:
        left -= log.entry_bytes(index)
        if left < 0:
            return index
        index -= 1
    return lowest
