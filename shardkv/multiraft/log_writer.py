"""What groups want logged becomes durable: one record and one sync for all of them, again and again.

Lives here: what waits for a sync, the hand-over to the log's thread or the sync in the loop, the time that syncs take,
and jobs that found no room. Does not live here: the log itself (``storage.wal``), nor what follows from a sync
(``driver``). The rule: records get to the disk in the order in which they came, and what a record was written for is
told only when it is there.
"""

from collections.abc import Callable, Sequence
from typing import Final

import trio

from shardkv.environment import Environment, SerialWorker
from shardkv.errors import OutOfSpace
from shardkv.multiraft.catalog import Catalog
from shardkv.multiraft.replica import Replica
from shardkv.multiraft.space import Space
from shardkv.multiraft.turn import Turn, log_update
from shardkv.raft.messages import Message
from shardkv.storage.wal import LogUpdate, Wal

FULL_DISK_RETRY_TICKS: Final = 10
"""How long a log write that found no room waits until it is tried again."""

Job = Callable[[], object]
Done = Callable[[object, BaseException | None], None]


class LogWriter:
    """Writes the log of the groups in ``catalog``.

    Args:
        synced: called when a turn's record is durable, with the appends in it.
        failed: called with whatever a write or a sync failed with, but want of room.
        no_room: called when a job has found no room.
    """

    def __init__(
        self,
        catalog: Catalog,
        wal: Wal,
        environment: Environment,
        space: Space,
        *,
        synced: Callable[[list[tuple[Replica, Message]]], None],
        failed: Callable[[BaseException], None],
        no_room: Callable[[], None],
    ) -> None:
        self._catalog = catalog
        self._wal = wal
        self._environment = environment
        self._space = space
        self._synced = synced
        self._failed = failed
        self._no_room = no_room
        self._worker: SerialWorker
        self.appends: list[tuple[Replica, Message]] = []
        """Log appends that wait for the sync under way to end, or for one that is worth a sync."""
        self.must_sync = False
        """Whether somebody waits for one of ``appends``."""
        self.syncing = False
        """A turn's record is on its way to the disk."""
        self.roomless: list[tuple[Job, Done]] = []
        """Jobs that found no room, in their order. Nobody was told of what they were to write."""
        self._roomless_ticks = 0
        self._full = False
        """A job has found no room, and none has ended well since."""
        self.spare_taken = trio.Event()
        """Set once the log has begun another segment: the one after it should be made ready now."""
        self._spares_taken = wal.spares_taken
        self.syncs = 0
        """How many turns' records there have been since the start."""
        self._in_loop = False
        self._began_ns = self._ns_max = self._loop_ns = 0

    async def start(self, nursery: trio.Nursery) -> None:
        """Start the log's thread as a service of ``nursery``."""
        self._worker = await nursery.start(self._environment.workers.serial, "log-writer")

    @property
    def at_once(self) -> bool:
        """Whether a record would be synced in the loop now, since the disk is quick."""
        return self._worker.at_once and not self._catalog.reluctant()

    def add(self, turn: Turn) -> None:
        """Take a turn's appends; they are written by the next :meth:`write` that may."""
        if turn.appends:
            self.appends += turn.appends
            self.must_sync = self.must_sync or turn.must_sync

    def write(self, *, at_once: bool = False) -> None:
        """Hand everything that waits to the log's thread, as one record, unless a sync is running.

        With ``at_once`` the record is written and synced here, if the disk is quick.
        """
        if self.syncing or not self.must_sync:
            return
        self.must_sync = False
        # A replica that was replaced meanwhile has left its term and vote to its successor, whose log this is now.
        current = self._catalog.replicas.get
        appends = [item for item in self.appends if current(item[0].range_id) is item[0]]
        self.appends = []
        if not appends:
            return
        updates = [log_update(replica, message) for replica, message in appends]
        self.syncing = True
        self._began_ns = self._environment.clock.monotonic_ns()
        self.syncs += 1
        self._in_loop = at_once
        self.submit(self._wal.append(updates), lambda _, error: self._ended(appends, error), at_once=at_once)
        self._in_loop = False
        self._environment.workers.yield_interpreter()

    def _ended(self, appends: list[tuple[Replica, Message]], error: BaseException | None) -> None:
        self.syncing = False
        if error is not None:
            self._failed(error)
            return
        took = self._environment.clock.monotonic_ns() - self._began_ns
        self._ns_max = max(self._ns_max, took)
        if self._in_loop:
            self._loop_ns += took
        self._synced(appends)

    def write_all(self) -> None:
        """Write also what nobody waits for: how much is committed, as far as only memory knows it."""
        self.must_sync = bool(self.appends)
        self.write()

    def append(self, updates: Sequence[LogUpdate], then: Callable[[], None] | None = None) -> None:
        """Log what belongs to no turn (creations, compactions, snapshots), in order with everything else."""

        def logged(_: object, error: BaseException | None) -> None:
            if error is not None:
                self._failed(error)
            elif then is not None:
                then()

        self.submit(self._wal.append(updates), logged)

    def submit(self, job: Job, done: Done, *, at_once: bool = False) -> None:
        """Queue a job behind the log writes, in their thread."""

        def ended(result: object, error: BaseException | None) -> None:
            if self._wal.spares_taken != self._spares_taken:
                self._rotated()
            if isinstance(error, OutOfSpace):
                self._found_no_room(job, done, error)
            else:
                if self._full and not self.roomless:
                    self._full = False
                    self._space.succeeded("log")
                done(result, error)

        try:
            if not (at_once and self._worker.run_now(job, ended)):
                self._in_loop = False
                self._worker.submit(job, ended)
        except trio.ClosedResourceError:
            # The node is stopping: nobody waits for this any more, and closing the log writes what it has taken.
            return

    def _rotated(self) -> None:
        """The log has begun another segment. If it is the reserve, there is no room, and no time to find out again."""
        self._spares_taken = self._wal.spares_taken
        self.spare_taken.set()
        shortage = self._wal.shortage
        if shortage is not None:
            self._space.failed("spare", shortage)
            self._no_room()

    def _found_no_room(self, job: Job, done: Done, error: OutOfSpace) -> None:
        """Keep a job for later."""
        self.roomless.append((job, done))
        self._roomless_ticks = FULL_DISK_RETRY_TICKS
        self._full = True
        self._space.failed("log", error)
        self._no_room()

    def tick(self) -> None:
        """Try again, now and then, what found no room."""
        if not self.roomless:
            return
        self._roomless_ticks -= 1
        if self._roomless_ticks <= 0:
            jobs, self.roomless = self.roomless, []
            for job, done in jobs:
                self.submit(job, done)

    def slowest_ns(self, now: int) -> int:
        """The longest that a sync took which ended since this was last asked, or that the one under way takes so far.

        From the moment when the record was handed to the log's thread, so what else it does there counts, too.
        """
        slowest, self._ns_max = self._ns_max, 0
        return max(slowest, now - self._began_ns) if self.syncing else slowest

    def loop_ns(self) -> int:
        """For how long syncs have held up the loop since this was last asked."""
        held, self._loop_ns = self._loop_ns, 0
        return held
