"""Whether this node's disk keeps up, and what becomes of the leaderships when it does not (trap 14).

A leader whose log syncs stall goes on sending heartbeats, so nobody else would take its place while its clients wait.
Lives here: the judgement, from how long syncs take (one that has not ended counts as it runs), and the handing over.
Does not live here: the measuring (the driver knows when a record was handed to the log's thread and when it was on
disk), nor what a node does that is offered a leadership while its own disk is slow (``raft.election``: it declines).
The rule: nobody's safety rests on any of this, and no range goes without a leader for it. A slow node leads on what
nobody takes.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import trio

from shardkv.environment import Clock
from shardkv.multiraft.driver import Driver
from shardkv.multiraft.replica import Replica
from shardkv.types import NodeId, RangeId

PROBE_SECONDS: Final = 0.1
IDLE_PROBE_SECONDS: Final = 0.4
"""While no sync is under way and none has ended since the last probe. A sync that stalls is found no later for it: the
first probe that sees it is the last of these, and comes long before the bound is reached; half of the bound if that
is less."""
WELL_SECONDS: Final = 10.0
"""A slow disk is well when for so long no sync took more than half of the bound."""
WELL_SECONDS_MAX: Final = 300.0
"""A disk that becomes slow again soon must be well for twice as long as the last time, up to this."""
RELAPSE_SECONDS: Final = 120.0
RETRY_SECONDS: Final = 10.0
"""A node that did not take a leadership is asked again after so long; one that is quicker counts as that until then."""
STALLED_BOUNDS: Final = 3
"""A sync that takes so many times the bound stalls: then a leadership is offered to nodes that have shown nothing."""
TRIAL_SECONDS: Final = 5.0
"""How long a node may take to lead after it was offered the first leadership."""
LATE_SECONDS: Final = 0.05
LATES_MAX: Final = 64
HANDOVERS_AT_ONCE_MAX: Final = 256
"""Transfers begun in one probe."""


@dataclass(frozen=True, slots=True)
class DiskStatistics:
    """A frozen picture of the disk's health."""

    slow: bool
    slow_count: int
    """How often the disk became slow."""
    sync_seconds_max: float
    """The slowest since the start."""
    given_away: int
    """Leaderships that others took because of it."""


class DiskHealth:
    """The judgement: ``stall_seconds`` is how long a sync may take. A service once :meth:`run`."""

    def __init__(self, clock: Clock, stall_seconds: float, log: Any) -> None:
        self.slow = False
        self._clock = clock
        self._stall_ns = int(stall_seconds * 1e9)
        self._log = log
        self._slow_count = self._given_away = 0
        self._last_ns = self._max_ns = 0
        self._slow_since_ns = 0
        self._bad_ns = 0
        """When a sync last took too long to call the disk well."""
        self._recovered_ns: int | None = None
        self._well_ns = int(WELL_SECONDS * 1e9)
        self._interval_ns = int(PROBE_SECONDS * 1e9)
        """How long the last probe was to come after the one before it."""
        self._lates: deque[tuple[int, int]] = deque(maxlen=LATES_MAX)
        """When the probe woke much too late, and by how much."""

    def is_slow(self) -> bool:
        return self.slow

    def statistics(self) -> DiskStatistics:
        return DiskStatistics(
            slow=self.slow,
            slow_count=self._slow_count,
            sync_seconds_max=self._max_ns / 1e9,
            given_away=self._given_away,
        )

    def disk_ns(self, sync_ns: int, late_ns: int, now_ns: int) -> int:
        """What of a sync's time was the disk's, at a probe that woke ``late_ns`` too late.

        A process that was suspended, or got no processor, was not kept waiting by its disk.
        """
        lates = self._lates
        if late_ns >= LATE_SECONDS * 1e9:
            lates.append((now_ns, late_ns))
        began_ns = now_ns - sync_ns - self._interval_ns
        return max(0, sync_ns - sum(late for at, late in lates if at >= began_ns))

    def observe(self, sync_ns: int, now_ns: int) -> None:
        """Judge anew: until now the slowest sync since the last time took, or takes, ``sync_ns``."""
        self._last_ns = sync_ns
        self._max_ns = max(self._max_ns, sync_ns)
        if sync_ns >= self._stall_ns // 2:
            self._bad_ns = now_ns
        if not self.slow:
            if sync_ns >= self._stall_ns:
                self._become_slow(sync_ns, now_ns)
        elif now_ns - self._bad_ns >= self._well_ns:
            self.slow = False
            self._recovered_ns = now_ns
            self._log.info("the disk keeps up again", slow_seconds=round((now_ns - self._slow_since_ns) / 1e9, 1))

    def _become_slow(self, sync_ns: int, now_ns: int) -> None:
        relapse = self._recovered_ns is not None and now_ns - self._recovered_ns < RELAPSE_SECONDS * 1e9
        longest = int(WELL_SECONDS_MAX * 1e9)
        self._well_ns = min(2 * self._well_ns, longest) if relapse else int(WELL_SECONDS * 1e9)
        self.slow = True
        self._slow_count += 1
        self._slow_since_ns = now_ns
        self._log.warning(
            "the disk is slow: a sync of the log stalls; leaderships go to other nodes until it keeps up again",
            sync_ms=sync_ns // 1_000_000,
            bound_ms=self._stall_ns // 1_000_000,
            advice="see what else writes to this disk, or replace it",
        )

    async def run(
        self,
        driver: Driver,
        changed: Callable[[], None],
        *,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Watch, and hand over. ``changed`` is called when the judgement has changed."""
        clock = self._clock
        handover = Handover(driver, self._log)
        idle_seconds = max(PROBE_SECONDS, min(IDLE_PROBE_SECONDS, self._stall_ns / 2e9))
        idle = False
        task_status.started()
        while True:
            interval = idle_seconds if idle else PROBE_SECONDS
            self._interval_ns = int(interval * 1e9)
            due_ns = clock.monotonic_ns() + self._interval_ns
            await clock.sleep(interval)
            now_ns = clock.monotonic_ns()
            was_slow = self.slow
            # A probe that is late because the loop itself was syncing is late by the disk's fault.
            late_ns = now_ns - due_ns - driver.log_writer.loop_ns()
            sync_ns = driver.log_writer.slowest_ns(now_ns)
            self.observe(self.disk_ns(sync_ns, late_ns, now_ns), now_ns)
            idle = not sync_ns and not self.slow
            if self.slow != was_slow:
                handover = Handover(driver, self._log)
                changed()
            if self.slow:
                stalled = self._last_ns >= STALLED_BOUNDS * self._stall_ns
                self._given_away += handover.step(now_ns, stalled=stalled)

    def check(self) -> None:
        assert self._last_ns <= self._max_ns, f"the last sync's {self._last_ns} ns are above the maximum"
        assert self._well_ns <= WELL_SECONDS_MAX * 1e9, f"well after {self._well_ns} ns"
        assert not self.slow or self._slow_count, "slow, and never became it"


class Handover:
    """Gives leaderships away while the disk is slow: to nodes whose disks are known to be quicker, if these are enough
    to elect one of them. Votes are synced, too, and where most disks are slow an election may take very long.

    A node has shown that it is when it has acknowledged entries that this node, which had them first, has not on disk
    yet. While a stall lasts nothing is proposed, so where no entries are under way nobody shows anything; then, after
    three times the bound, each node is offered one leadership, and more when it leads. A node whose disk is as slow
    declines, or wins no election for a long time: it must not be tried with each range, for a leadership on its way
    takes no writes, and a transfer costs the range its lease for the rest of the term.
    """

    def __init__(self, driver: Driver, log: Any) -> None:
        self._driver = driver
        self._log = log
        self._quicker: dict[NodeId, int] = {}
        """Until when a node that has shown itself to be quicker counts as that."""
        self._avoided: dict[NodeId, int] = {}
        """Until when a node that took no leadership is not offered one."""
        self._tried: dict[NodeId, tuple[Replica, int]] = {}
        """The one leadership that each other node was offered, and when, to see whether it leads."""
        self._moving: dict[RangeId, tuple[Replica, NodeId]] = {}
        self._told = False

    def step(self, now_ns: int, *, stalled: bool) -> int:
        """See what became of the transfers, and begin more; how many leaderships others have taken meanwhile.

        ``stalled``: a sync takes so long that nodes are offered a leadership which have shown nothing.
        """
        taken = self._take_stock(now_ns)
        replicas = self._driver.catalog.replicas.values()
        led = [replica for replica in replicas if replica.leads and not replica.raft.transferee]
        for replica in led:
            self._compare(replica, now_ns)
        stuck = 0
        for replica in led:
            if len(self._moving) >= HANDOVERS_AT_ONCE_MAX:
                break
            stuck += not self._begin(replica, now_ns, stalled)
        if stuck and stalled and not self._tried and not self._moving and not self._told:
            self._told = True
            self._log.warning("no other node takes the leaderships; this one leads on", ranges=stuck)
        return taken

    def _take_stock(self, now_ns: int) -> int:
        until_ns = now_ns + int(RETRY_SECONDS * 1e9)
        taken = 0
        for range_id, (replica, node_id) in list(self._moving.items()):
            if replica.raft.transferee:
                continue
            del self._moving[range_id]
            if replica.leads:
                self._avoided[node_id] = until_ns
            else:
                taken += 1
        for node_id, (replica, asked_ns) in list(self._tried.items()):
            leader = replica.raft.leader
            if leader and not replica.leads and replica.node_of(leader) == node_id:
                self._quicker[node_id] = until_ns
            elif not replica.leads and now_ns - asked_ns < TRIAL_SECONDS * 1e9:
                continue  # it campaigns
            else:
                self._avoided[node_id] = until_ns
            del self._tried[node_id]
        return taken

    def _compare(self, replica: Replica, now_ns: int) -> None:
        progress = replica.raft.status().progress
        own = progress.get(replica.replica_id)
        if own is None:
            return
        for replica_id, peer in progress.items():
            if peer.match > own.match:
                node_id = replica.node_of(replica_id)
                if node_id is not None:
                    self._quicker[node_id] = now_ns + int(RETRY_SECONDS * 1e9)

    def _quorum_is_quicker(self, replica: Replica, now_ns: int) -> bool:
        configuration = replica.raft.configuration
        for half in (configuration.voters, configuration.voters_outgoing):
            nodes = [replica.node_of(voter) for voter in half]
            quicker = sum(node is not None and self._quicker.get(node, 0) > now_ns for node in nodes)
            if half and 2 * quicker <= len(half):
                return False
        return True

    def _begin(self, replica: Replica, now_ns: int, stalled: bool) -> bool:
        """Offer a leadership to the best of those that may take it. False if there is nobody to ask."""
        candidates = sorted((-peer.match, replica_id) for replica_id, peer in replica.successors(now_ns))
        quorum = self._quorum_is_quicker(replica, now_ns)
        for _, replica_id in candidates:
            node_id = replica.node_of(replica_id)
            if node_id is None or self._avoided.get(node_id, 0) > now_ns:
                continue
            if not stalled and not quorum:
                return False
            if self._quicker.get(node_id, 0) <= now_ns:
                if not stalled:
                    continue
                if node_id in self._tried:
                    return True  # what becomes of that decides
                self._tried[node_id] = (replica, now_ns)
            replica.raft.transfer_leader(replica_id)
            self._moving[replica.range_id] = (replica, node_id)
            self._driver.touch(replica)
            return True
        return False
