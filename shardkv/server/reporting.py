"""What this node tells the placement group of itself: heartbeats, and descriptors that are new or have changed.

Lives here: when either is sent, and what a report of a range consists of. Does not live here: what a heartbeat need not
repeat (``shardkv_placement.heartbeat``), and what the group's leader makes of it (``placement_leader``). The rule: what
has changed is told soon, and what changes all the time no more often than heartbeats go; nothing here asks the disk.
"""

from collections.abc import Callable
from itertools import islice
from math import inf
from typing import Any, Final, NamedTuple

import trio

from shardkv.environment import Clock
from shardkv.errors import ShardKVError, WrongCluster
from shardkv.multiraft.driver import Driver
from shardkv.multiraft.replica import Replica
from shardkv.outage import UNANSWERED_SECONDS, Outage
from shardkv.server.missing_leaders import MissingLeaders
from shardkv.server.placement_group import CALL_SECONDS, PlacementGroup
from shardkv.server.stop import Stop
from shardkv.types import PLACEMENT_RANGE, Fullness, RangeDescriptor, RangeId, ReplicaId
from shardkv.wire.requests import Method
from shardkv_placement import heartbeat
from shardkv_placement.commands import ReportRanges
from shardkv_placement.heartbeat import Capacity, HeartbeatReply, Progress, RangeReport, Reporter
from shardkv_placement.settings import Settings

RETRY_SECONDS: Final = 0.25
POLL_SECONDS: Final = 0.02
HEARTBEAT_SECONDS_MIN: Final = 0.1
"""Changes are reported at once, but not more often than this."""
LOOKS_PER_HEARTBEAT: Final = 2
"""So often a node looks whether there is something new to tell; one with nothing new says just that it lives."""
DEFAULTS: Final = Settings()
REPORTS_AT_ONCE_MAX: Final = 512
"""Descriptors in one report: 4 MiB with the largest keys, where a call may have 8, and no more items than it may."""


class _Health(NamedTuple):
    """What of a node itself is told soon."""

    draining: bool
    slow_disk: bool
    fullness: Fullness


class Reporting:
    """Two services, :meth:`report_descriptors` and :meth:`heartbeats`.

    Args:
        reporter: puts this node's heartbeats together.
        bytes_of: about how large a range is.
        on_nodes: called with each answer to a heartbeat, which may hold a newer node table.
    """

    def __init__(
        self,
        group: PlacementGroup,
        driver: Driver,
        clock: Clock,
        *,
        reporter: Reporter,
        bytes_of: Callable[[Replica], int],
        on_nodes: Callable[[HeartbeatReply], None],
        stop: Stop,
        log: Any,
    ) -> None:
        self._group = group
        self._driver = driver
        self._clock = clock
        self._reporter = reporter
        self._bytes_of = bytes_of
        self._on_nodes = on_nodes
        self._stop = stop
        self._log = log
        self.draining = False
        self.slow_disk: Callable[[], bool] = lambda: False
        """Whether this node's disk is slow; set before the first heartbeat."""
        self.settings: dict[str, int] = {}
        """What the last heartbeat's reply said."""
        self._told: _Health | None = None
        """What the group has heard of this node's health."""
        self._unreported: dict[RangeId, RangeDescriptor] = {}
        self._report_wanted = trio.Event()
        self._beat_wanted = trio.Event()
        self._missing_leaders = MissingLeaders(log)

    def beat_soon(self) -> None:
        """Something about this node itself has changed that the placement group should know."""
        self._beat_wanted.set()

    def descriptor_changed(self, replica: Replica) -> None:
        """A range is new or has changed: tell the placement group, if nobody else will."""
        machine = replica.machine
        assert machine is not None, f"range {replica.range_id} changed uninitialised"
        self._unreported[replica.range_id] = machine.descriptor
        self._report_wanted.set()
        self._beat_wanted.set()

    async def report_descriptors(self) -> None:
        """Send changed descriptors until the group has them, as many at once as a report holds.

        Every replica's node does: reports are idempotent.
        """
        while True:
            await self._report_wanted.wait()
            self._report_wanted = trio.Event()
            while self._unreported:
                reports = dict(islice(self._unreported.items(), REPORTS_AT_ONCE_MAX))
                for range_id in reports:
                    del self._unreported[range_id]
                wanted = {range_id: it for range_id, it in reports.items() if self._worth_reporting(range_id)}
                if not wanted:
                    continue
                try:
                    await self._group.propose(ReportRanges(tuple(wanted.values())))
                except ShardKVError as error:
                    self._log.debug("descriptors not reported yet", reason=str(error))
                    self._unreported = {**wanted, **self._unreported}
                    await self._clock.sleep(RETRY_SECONDS)

    def _worth_reporting(self, range_id: RangeId) -> bool:
        """The leader reports; a follower's word is wanted only if the leader died, and then a heartbeat asks for it."""
        replica = self._driver.catalog.replicas.get(range_id)
        if replica is None or replica.machine is None:
            return False
        known = self._group.state.descriptor(range_id) if self._group.state.bootstrapped else None
        if known is not None and not replica.machine.descriptor.newer_than(known):
            return False
        return replica.leads or not replica.raft.leader

    def introduced(self, range_id: RangeId | None) -> bool:
        """Whether the group has heard of this node since its start, and that it leads the range, if one is given."""
        return self._reporter.heard and (range_id is None or self._reporter.leads_by_report(range_id))

    async def heartbeats(self) -> None:
        """Say how this node is, again and again, and do what the answers ask for."""
        while self._group.being_made:
            # The first one would wait for the group and then say what was true before there was one.
            await self._clock.sleep(POLL_SECONDS)
        outage = Outage(UNANSWERED_SECONDS)
        answered = -inf
        while True:
            interval = self.settings.get("heartbeat_ms", DEFAULTS.heartbeat_ms) / 1000
            self._observe_replicas()
            urgent = self._beat_wanted.is_set() or self._reporter.urgent or self._health() != self._told
            if urgent or self._now() - answered >= interval:
                self._beat_wanted = trio.Event()
                outage.begin(self._now())
                if await self._beat(outage):
                    answered = self._now()
            await self._clock.sleep(min(HEARTBEAT_SECONDS_MIN, interval))
            with self._clock.deadline(interval / LOOKS_PER_HEARTBEAT):
                await self._beat_wanted.wait()

    async def _beat(self, outage: Outage) -> bool:
        """Say once how this node is; whether the group has answered."""
        health = self._health()
        beat = self._reporter.heartbeat(capacity=self._capacity(), **health._asdict())
        try:
            answer = await self._group.call(
                Method.HEARTBEAT, heartbeat.encode(beat), range_id=PLACEMENT_RANGE, timeout=CALL_SECONDS
            )
            self._acknowledged(beat, heartbeat.decode_reply(answer))
            self._told = health
        except WrongCluster as error:
            self._stop.for_good(error)
        except ShardKVError as error:
            self._log.debug("heartbeat not answered", reason=str(error))
            if outage.lasts(self._now()):
                self._log.warning("the placement group does not answer this node's heartbeats", reason=str(error))
        else:
            if outage.end():
                self._log.info("the placement group answers this node again")
            return True
        return False

    def _acknowledged(self, beat: heartbeat.Heartbeat, reply: HeartbeatReply) -> None:
        self._reporter.acknowledged(beat, reply)
        self.settings = reply.settings
        self._on_nodes(reply)
        for range_id in reply.descriptors_wanted:
            replica = self._driver.catalog.replicas.get(range_id)
            if replica is not None and replica.machine is not None:
                self.descriptor_changed(replica)

    def _observe_replicas(self) -> None:
        self._missing_leaders.look(self._driver.catalog.replicas.values(), self._now())
        for replica in self._driver.catalog.replicas.values():
            if replica.machine is not None:
                self._reporter.report(self._report_of(replica))

    def _report_of(self, replica: Replica) -> RangeReport:
        machine, raft = replica.machine, replica.raft
        assert machine is not None, f"a report of range {replica.range_id}, which is not initialised"
        progress: tuple[Progress, ...] = ()
        if replica.leads:
            last, now = raft.last_index, self._clock.monotonic_ns()
            # Of one that has acknowledged nothing, the lag is the log's whole length, which may be small.
            progress = tuple(
                Progress(
                    ReplicaId(replica_id),
                    max(0, last - peer.match),
                    replica_id == raft.replica_id
                    or (peer.recent_active and peer.match > 0 and replica.could_lead(replica_id, now)),
                    self._driver.snapshots.receives(replica.range_id, replica_id),
                )
                for replica_id, peer in raft.status().progress.items()
            )
        epoch = machine.descriptor.epoch
        return RangeReport(
            replica.range_id, epoch.membership, epoch.span, replica.leads, raft.term, self._bytes_of(replica), progress
        )

    def _health(self) -> _Health:
        return _Health(self.draining, self.slow_disk(), self._driver.space.fullness)

    def _capacity(self) -> Capacity:
        return Capacity(disk_free_bytes=self._driver.space.free_bytes)

    def _now(self) -> float:
        return self._clock.monotonic_ns() / 1e9
