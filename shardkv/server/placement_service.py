"""A node's part in placement: it reports, it looks up, and where the placement group is led, it decides.

Lives here: the loop of heartbeats, the reports of new descriptors, the leader's loop that carries operators on, and the
requests about the cluster as a whole. Does not live here: what is decided (``shardkv_placement``, pure), how the group
replicates it (it is a range like any other), what the cluster looks like to people (``overview``). With the placement
group down, keys are read and written as before; only splits and moves wait.
"""

from collections.abc import Awaitable, Callable, Iterable
from itertools import islice
from math import inf
from typing import Any, Final

import trio

from shardkv.environment import Environment
from shardkv.errors import (
    Busy,
    MalformedRequest,
    NotFound,
    NotLeader,
    RangeNotFound,
    RequestError,
    ShardKVError,
    WrongCluster,
)
from shardkv.machine import keys
from shardkv.multiraft.driver import Driver
from shardkv.multiraft.replica import Replica
from shardkv.outage import UNANSWERED_SECONDS, Outage
from shardkv.server import overview
from shardkv.server.address_book import AddressBook
from shardkv.server.missing_leaders import MissingLeaders
from shardkv.server.reply import Reply
from shardkv.server.shared_addresses import SharedAddresses
from shardkv.server.stop import Stop
from shardkv.storage.engine import WriteBatch
from shardkv.types import PLACEMENT_RANGE, RangeDescriptor, RangeId, ReplicaId
from shardkv.wire.requests import Method, RangesListing, Request
from shardkv_placement import commands, heartbeat, router
from shardkv_placement.commands import Command, FinishOperator, ReportRanges
from shardkv_placement.controller import Controller, Propose
from shardkv_placement.heartbeat import Capacity, HeartbeatReply, Progress, RangeReport, Reporter
from shardkv_placement.operators import ChangeReplicas, Operator, Outcome
from shardkv_placement.settings import Settings
from shardkv_placement.state import PlacementState
from shardkv_placement.statistics import Statistics
from shardkv_placement.view import ClusterView, ViewBuilder

LEADER_TICK_SECONDS: Final = 0.1
LEADER_IDLE_SECONDS: Final = 0.25
"""Instead, while nothing is under way."""
OUTCOME_SECONDS: Final = 5.0
CALL_SECONDS: Final = 5.0
RETRY_SECONDS: Final = 0.25
POLL_SECONDS: Final = 0.02
HEARTBEAT_SECONDS_MIN: Final = 0.1
"""Changes are reported at once, but not more often than this."""
DEFAULTS: Final = Settings()
LOOKS_PER_HEARTBEAT: Final = 2
"""So often a node looks whether there is something new to tell; one with nothing new says just that it lives."""
REPORTS_AT_ONCE_MAX: Final = 512
"""Descriptors in one report: 4 MiB with the largest keys, where a call may have 8, and no more items than it may."""
REQUESTS_AT_ONCE_MAX: Final = 64
"""Operators' requests to other nodes under way."""
FAILURE_SECONDS: Final = 600.0
"""Until it is told again that the same could not be done about a range: it is tried again and again."""
FAILURES_MAX: Final = 32
"""Failures of operators that are told in that time; of many ranges that fail alike the first ones say it all."""

Call = Callable[..., Awaitable[Any]]
"""``call(method, *arguments, range_id=, node_id=, timeout=)``: ask another node, or this one, over the network."""


class PlacementExtension:
    """The placement group's state as the extension of range 0's machine."""

    def __init__(self) -> None:
        self._prefix = keys.extension_prefix(PLACEMENT_RANGE)
        self.state = PlacementState(self._prefix)

    def load(self, rows: Iterable[tuple[bytes, bytes]]) -> None:
        self.state.load(iter(rows))

    def apply(self, command: Any, timestamp: int, batch: WriteBatch) -> Any:
        return self.state.apply(command, timestamp, batch)


class _Failures:
    """Which failures of operators have been told lately."""

    def __init__(self) -> None:
        self._told: dict[tuple[RangeId, str], float] = {}

    def first(self, operator: Operator, now: float) -> bool:
        """Whether this one's is to be told: what was to be done, and to which range, has not been lately."""
        self._told = {key: at for key, at in self._told.items() if now - at < FAILURE_SECONDS}
        key = (operator.range_id, operator.reason)
        if key in self._told or len(self._told) >= FAILURES_MAX:
            return False
        self._told[key] = now
        return True


class PlacementService:
    """See the module. ``call`` reaches other nodes; it is set before :meth:`run`.

    Args:
        reporter: puts this node's heartbeats together.
        bytes_of: about how large a range is.
        on_nodes: called with each answer to a heartbeat, which may hold a newer node table.
    """

    def __init__(
        self,
        driver: Driver,
        environment: Environment,
        *,
        extension: PlacementExtension,
        reporter: Reporter,
        bytes_of: Callable[[Replica], int],
        on_nodes: Callable[[HeartbeatReply], None],
        address_book: AddressBook,
        cluster_id: bytes,
        stop: Stop,
        log: Any,
    ) -> None:
        self._driver = driver
        self._environment = environment
        self._clock = environment.clock
        self._state = extension.state
        self._reporter = reporter
        self._bytes_of = bytes_of
        self._on_nodes = on_nodes
        self._address_book = address_book
        self._cluster_id = cluster_id
        self._stop = stop
        self._log = log
        self.call: Call
        self.draining = False
        self.slow_disk: Callable[[], bool] = lambda: False
        """Whether this node's disk is slow; set before :meth:`run`."""
        self.settings: dict[str, int] = {}
        """What the last heartbeat's reply said."""
        self._statistics: Statistics | None = None
        self._views: ViewBuilder | None = None
        self._controller: Controller | None = None
        self._unreported: dict[RangeId, RangeDescriptor] = {}
        self._report_wanted = trio.Event()
        self._beat_wanted = trio.Event()
        self._lead_wanted = trio.Event()
        self._missing_leaders = MissingLeaders(log)
        self._failures = _Failures()
        self._shared_addresses = SharedAddresses(log)
        self._requests = 0
        self._nursery: trio.Nursery

    # Services

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            nursery.start_soon(self._report_descriptors)
            nursery.start_soon(self._heartbeats)
            nursery.start_soon(self._lead)
            task_status.started()

    def leadership_changed(self, replica: Replica) -> None:
        self._beat_wanted.set()
        if replica.range_id == PLACEMENT_RANGE and replica.leads:
            self._lead_wanted.set()

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

    async def _report_descriptors(self) -> None:
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
                    await self.propose(ReportRanges(tuple(wanted.values())))
                except ShardKVError as error:
                    self._log.debug("descriptors not reported yet", reason=str(error))
                    self._unreported = {**wanted, **self._unreported}
                    await self._clock.sleep(RETRY_SECONDS)

    def _worth_reporting(self, range_id: RangeId) -> bool:
        """The leader reports; a follower's word is wanted only if the leader died, and then a heartbeat asks for it."""
        replica = self._driver.catalog.replicas.get(range_id)
        if replica is None or replica.machine is None:
            return False
        known = self._state.descriptor(range_id) if self._state.bootstrapped else None
        if known is not None and not replica.machine.descriptor.newer_than(known):
            return False
        return replica.leads or not replica.raft.leader

    def introduced(self, range_id: RangeId | None) -> bool:
        """Whether the group has heard of this node since its start, and that it leads the range, if one is given."""
        return self._reporter.heard and (range_id is None or self._reporter.leads_by_report(range_id))

    async def _heartbeats(self) -> None:
        while self._being_made:
            # The first one would wait for the group and then say what was true before there was one.
            await self._clock.sleep(POLL_SECONDS)
        outage = Outage(UNANSWERED_SECONDS)
        answered = -inf
        while True:
            interval = self.settings.get("heartbeat_ms", DEFAULTS.heartbeat_ms) / 1000
            self._observe_replicas()
            if self._beat_wanted.is_set() or self._reporter.urgent or self._now() - answered >= interval:
                self._beat_wanted = trio.Event()
                outage.begin(self._now())
                if await self._beat(outage):
                    answered = self._now()
            await self._clock.sleep(min(HEARTBEAT_SECONDS_MIN, interval))
            with self._clock.deadline(interval / LOOKS_PER_HEARTBEAT):
                await self._beat_wanted.wait()

    async def _beat(self, outage: Outage) -> bool:
        """Report to the placement group; whether it answered."""
        beat = self._reporter.heartbeat(
            draining=self.draining,
            capacity=self._capacity(),
            slow_disk=self.slow_disk(),
            fullness=self._driver.space.fullness,
        )
        try:
            answer = await self.call(
                Method.HEARTBEAT, heartbeat.encode(beat), range_id=PLACEMENT_RANGE, timeout=CALL_SECONDS
            )
            self._acknowledged(beat, heartbeat.decode_reply(answer))
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

    def _capacity(self) -> Capacity:
        return Capacity(disk_free_bytes=self._driver.space.free_bytes)

    def _now(self) -> float:
        return self._clock.monotonic_ns() / 1e9

    # The leader's loop

    @property
    def _replica(self) -> Replica | None:
        return self._driver.catalog.replicas.get(PLACEMENT_RANGE)

    @property
    def leads(self) -> bool:
        replica = self._replica
        return replica is not None and replica.leads and replica.raft.committed_in_term

    async def _lead(self) -> None:
        """While this node leads the group: keep statistics, schedule, carry operators on."""
        while True:
            await self._clock.sleep(LEADER_TICK_SECONDS if self._state.operators else LEADER_IDLE_SECONDS)
            if not self.leads or not self._state.bootstrapped:
                self._statistics = self._views = self._controller = None
                replica = self._replica
                if replica is None or not replica.leads:
                    self._lead_wanted = trio.Event()
                    await self._lead_wanted.wait()
                continue
            view = self._view()
            self._shared_addresses.look(view)
            assert self._controller is not None, "a view is made of a leader's statistics"
            for action in self._controller.tick(view):
                if self._requests < REQUESTS_AT_ONCE_MAX:
                    self._requests += 1
                    self._nursery.start_soon(self._perform, action, self._controller)

    def _heard(self, now: float) -> Statistics:
        """What this node has heard since it leads the group; nothing yet, if it does just now."""
        if self._statistics is None:
            self._statistics = Statistics(now)
            self._views = ViewBuilder(self._state, self._statistics)
            self._controller = Controller()
        return self._statistics

    def _view(self) -> ClusterView:
        now = self._now()
        self._heard(now)
        assert self._views is not None, "views come with statistics"
        return self._views.build(now, self._driver.hybrid_clock.ms())

    async def _perform(self, action: Any, controller: Controller) -> None:
        try:
            if isinstance(action, Propose):
                await self._propose_for(action.command)
                controller.answered(action.command)
            elif isinstance(action, ChangeReplicas):
                await self.call(
                    Method.CHANGE_REPLICAS,
                    action.range_id,
                    action.changes,
                    action.membership,
                    node_id=action.leader,
                    timeout=CALL_SECONDS,
                )
            else:
                await self.call(
                    Method.TRANSFER, action.range_id, action.target, node_id=action.leader, timeout=CALL_SECONDS
                )
        except ShardKVError as error:
            self._log.debug("placement action failed", action=str(action)[:200], reason=str(error))
            # A node that is not found may just not be known yet.
            if isinstance(error, RequestError) and not isinstance(error, NotFound) and not isinstance(action, Propose):
                characters_max = commands.MESSAGE_BYTES_MAX // 4
                controller.refused(action, str(error)[:characters_max])
        finally:
            self._requests -= 1

    async def _propose_for(self, command: Command) -> None:
        """Propose what the controller wants."""
        failed = command if isinstance(command, FinishOperator) and command.outcome is Outcome.FAILED else None
        running = self._state.operators.values() if failed is not None else ()
        operator = next((each for each in running if failed and each.operator_id == failed.operator_id), None)
        ended = await self._propose_here(commands.encode(command))
        if failed and operator and ended and self._failures.first(operator, self._now()):
            self._log.warning(
                "what was to be done about a range has failed",
                range=operator.range_id,
                operator=operator.kind.value,
                why=operator.reason,
                reason=failed.message,
            )

    # Proposals

    async def propose(self, command: Command) -> Any:
        """Have a command applied by the group, wherever it is led. Raises any ShardKVError."""
        encoded = commands.encode(command)
        if self.leads:
            return await self._propose_here(encoded)
        return await self.call(Method.PLACEMENT, encoded, range_id=PLACEMENT_RANGE, timeout=CALL_SECONDS)

    async def _propose_here(self, encoded: Any) -> Any:
        replica = self._require_leader()
        if encoded[0] != commands.Bootstrap.number:
            self._require_made()  # who wants to join need not give up for having come a moment early
        reply = Reply()
        self._driver.proposer.extension(replica, encoded, reply, 0)
        return await reply.wait(self._clock, OUTCOME_SECONDS)

    def _require_leader(self) -> Replica:
        replica = self._replica
        if replica is None or replica.machine is None:
            raise RangeNotFound("this node holds no replica of the placement group")
        if not replica.leads:
            raise replica.not_leader()
        return replica

    # Requests

    async def command(self, request: Request) -> Any:
        match request.arguments:
            case [encoded]:
                problem = commands.validate(encoded)
                if problem is not None:
                    raise MalformedRequest(problem)
                return await self._propose_here(encoded)
        raise MalformedRequest("a placement request has one command")

    async def heartbeat(self, request: Request) -> Any:
        match request.arguments:
            case [encoded]:
                beat = heartbeat.decode(encoded)
            case _:
                raise MalformedRequest("a heartbeat request has one argument")
        replica = self._require_leader()
        if not self.leads or not self._state.bootstrapped:
            raise NotLeader("the placement group has just got a new leader", hint=replica.node_of(replica.replica_id))
        now = self._now()
        return heartbeat.encode_reply(self._heard(now).receive(self._state, beat, now))

    async def join(self, request: Request) -> Any:
        """A new node asks for an id: ``[name, address, directory token, [[label, value], ...]]``."""
        match request.arguments:
            case [str(name), str(address), bytes(token), labels]:
                pass
            case _:
                raise MalformedRequest("a join's arguments are a name, an address, a token and labels")
        encoded = [commands.RegisterNode.number, name, address, token, labels]
        problem = commands.validate(encoded)
        if problem is not None:
            raise RequestError(problem)
        if self.leads:
            node_id = await self._propose_here(encoded)
        else:
            node_id = await self.call(Method.PLACEMENT, encoded, range_id=PLACEMENT_RANGE, timeout=CALL_SECONDS)
        return [self._cluster_id, node_id]

    @property
    def _knows(self) -> bool:
        """Whether this node holds the group's state, so that it can answer from it."""
        replica = self._replica
        return replica is not None and replica.machine is not None and self._state.bootstrapped

    @property
    def _being_made(self) -> bool:
        """Whether this is the first node of a new cluster, and the group's state has not been begun yet."""
        replica = self._replica
        return replica is not None and replica.machine is not None and not self._state.bootstrapped

    def _require_made(self) -> None:
        """Raise Busy while there is no cluster that could be described."""
        if self._being_made:
            raise Busy("the cluster is just being made; try again")

    async def routes(self, request: Request) -> Any:
        match request.arguments:
            case [None, int(), *_]:
                return await self._placement_route(request)
            case [bytes(start), int(limit), *_]:
                if not self._knows:
                    return await self._elsewhere(request)
                found = router.routes(self._state, self._statistics, start, limit)
                return [self._freshened(descriptor, leader) for descriptor, leader in found]
        raise MalformedRequest("a lookup's arguments are a key, or null for the placement group, and a limit")

    async def _placement_route(self, request: Request) -> Any:
        replica = self._replica
        if replica is None or replica.machine is None:
            return await self._elsewhere(request)
        return [self._freshened(replica.machine.descriptor, None)]

    def _freshened(self, descriptor: RangeDescriptor, leader: int | None) -> list[Any]:
        """A route in wire form, with what this node's own replica of the range knows better."""
        replica = self._driver.catalog.replicas.get(descriptor.range_id)
        if replica is None or replica.machine is None:
            return [descriptor.to_wire(), leader]
        own = replica.machine.descriptor
        if own.newer_than(descriptor):
            descriptor = own
        known = replica.node_of(replica.raft.leader) if replica.raft.leader else None
        return [descriptor.to_wire(), known if known is not None else leader]

    async def _elsewhere(self, request: Request) -> Any:
        """Answer from a node that holds the group's state; a lookup is passed on once."""
        if len(request.arguments) > 2:
            raise RangeNotFound("this node holds no replica of the placement group; ask another")
        return await self.call(request.method, *request.arguments, True, timeout=CALL_SECONDS)

    async def nodes(self, request: Request) -> Any:
        self._require_made()
        if not self._knows:
            # What this node was last told; a node that has just joined may know of few.
            return [[node_id, known.name, known.address] for node_id, known in self._address_book]
        return router.nodes(self._state)

    async def status(self, request: Request) -> Any:
        self._require_made()
        if not self.leads:
            return await self._from_leader(request)
        replica = self._require_leader()
        return overview.status(self._view(), replica.node_of(replica.replica_id))

    async def _from_leader(self, request: Request) -> Any:
        """Answer from the group's leader; the argument marks a request that was passed on already."""
        if request.arguments:
            self._require_leader()
            raise NotLeader("the placement group has just got a new leader")
        return await self.call(request.method, True, range_id=PLACEMENT_RANGE, timeout=CALL_SECONDS)

    async def ranges(self, request: Request) -> Any:
        """A page of them, or all of them for those who ask for no page."""
        self._require_made()
        match request.arguments:
            case [bytes() | None as after, *passed_on]:
                return await self._ranges_page(after, bool(passed_on))
        if self.leads:
            return overview.ranges(self._view())
        if request.arguments:
            return await self._from_leader(request)
        listing = RangesListing()
        while listing.take(await self._ranges_page(listing.after, False)):
            pass
        return listing.rows

    async def _ranges_page(self, after: bytes | None, passed_on: bool) -> Any:
        if self.leads:
            return overview.ranges_page(self._view(), after)
        if passed_on:
            self._require_leader()
            raise NotLeader("the placement group has just got a new leader")
        return await self.call(Method.RANGES, after, True, range_id=PLACEMENT_RANGE, timeout=CALL_SECONDS)
