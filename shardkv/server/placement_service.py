"""A node's part in placement: it reports, it looks up, and where the placement group is led, it decides.

Lives here: the requests about the cluster as a whole. Does not live here: the way to the group (``placement_group``),
what this node tells it (``reporting``), what its leader does (``placement_leader``), what the cluster looks like to
people (``overview``). With the placement group down, keys are read and written as before; only splits and moves wait.
"""

from collections.abc import Callable
from typing import Any

import trio

from shardkv.environment import Environment
from shardkv.errors import MalformedRequest, NotLeader, RangeNotFound, RequestError
from shardkv.multiraft.driver import Driver
from shardkv.multiraft.replica import Replica
from shardkv.server import overview
from shardkv.server.address_book import AddressBook
from shardkv.server.placement_group import CALL_SECONDS, PlacementExtension, PlacementGroup
from shardkv.server.placement_leader import PlacementLeader
from shardkv.server.reporting import Reporting
from shardkv.server.stop import Stop
from shardkv.types import PLACEMENT_RANGE, RangeDescriptor
from shardkv.wire.requests import Method, RangesListing, Request
from shardkv_placement import commands, heartbeat, router
from shardkv_placement.heartbeat import HeartbeatReply, Reporter


class PlacementService:
    """See the module; ``reporter``, ``bytes_of`` and ``on_nodes`` are for :class:`Reporting`."""

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
        self._address_book = address_book
        self._cluster_id = cluster_id
        self.group = PlacementGroup(driver, environment.clock, extension)
        self.reporting = Reporting(
            self.group,
            driver,
            environment.clock,
            reporter=reporter,
            bytes_of=bytes_of,
            on_nodes=on_nodes,
            stop=stop,
            log=log,
        )
        self.leader = PlacementLeader(self.group, driver, environment.clock, log)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Service: all of it. The group's ``call`` is set before."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.reporting.report_descriptors)
            nursery.start_soon(self.reporting.heartbeats)
            nursery.start_soon(self.leader.run, nursery)
            task_status.started()

    def leadership_changed(self, replica: Replica) -> None:
        self.reporting.beat_soon()
        if replica.range_id == PLACEMENT_RANGE and replica.leads:
            self.leader.wake()

    # Requests

    async def command(self, request: Request) -> Any:
        match request.arguments:
            case [encoded]:
                problem = commands.validate(encoded)
                if problem is not None:
                    raise MalformedRequest(problem)
                return await self.group.propose_here(encoded)
        raise MalformedRequest("a placement request has one command")

    async def heartbeat(self, request: Request) -> Any:
        match request.arguments:
            case [encoded]:
                beat = heartbeat.decode(encoded)
            case _:
                raise MalformedRequest("a heartbeat request has one argument")
        replica = self.group.require_leader()
        if not self.group.leads or not self.group.state.bootstrapped:
            raise NotLeader("the placement group has just got a new leader", hint=replica.node_of(replica.replica_id))
        return heartbeat.encode_reply(self.leader.receive(beat))

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
        return [self._cluster_id, await self.group.propose_encoded(encoded)]

    async def routes(self, request: Request) -> Any:
        match request.arguments:
            case [None, int(), *_]:
                return await self._placement_route(request)
            case [bytes(start), int(limit), *_]:
                if not self.group.knows:
                    return await self._elsewhere(request)
                found = router.routes(self.group.state, self.leader.statistics, start, limit)
                return [self._freshened(descriptor, leader) for descriptor, leader in found]
        raise MalformedRequest("a lookup's arguments are a key, or null for the placement group, and a limit")

    async def _placement_route(self, request: Request) -> Any:
        replica = self.group.replica
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
        return await self.group.call(request.method, *request.arguments, True, timeout=CALL_SECONDS)

    async def nodes(self, request: Request) -> Any:
        self.group.require_made()
        if not self.group.knows:
            # What this node was last told; a node that has just joined may know of few.
            return [[node_id, known.name, known.address] for node_id, known in self._address_book]
        return router.nodes(self.group.state)

    async def status(self, request: Request) -> Any:
        self.group.require_made()
        if not self.group.leads:
            return await self._from_leader(request)
        replica = self.group.require_leader()
        return overview.status(self.leader.view(), replica.node_of(replica.replica_id))

    async def _from_leader(self, request: Request) -> Any:
        """Answer from the group's leader; the argument marks a request that was passed on already."""
        if request.arguments:
            self.group.require_leader()
            raise NotLeader("the placement group has just got a new leader")
        return await self.group.call(request.method, True, range_id=PLACEMENT_RANGE, timeout=CALL_SECONDS)

    async def ranges(self, request: Request) -> Any:
        """A page of them, or all of them for those who ask for no page."""
        self.group.require_made()
        match request.arguments:
            case [bytes() | None as after, *passed_on]:
                return await self._ranges_page(after, bool(passed_on))
        if self.group.leads:
            return overview.ranges(self.leader.ranges_above(None))
        if request.arguments:
            return await self._from_leader(request)
        listing = RangesListing()
        while listing.take(await self._ranges_page(listing.after, False)):
            pass
        return listing.rows

    async def _ranges_page(self, after: bytes | None, passed_on: bool) -> Any:
        if self.group.leads:
            return overview.ranges_page(self.leader.ranges_above(after))
        if passed_on:
            self.group.require_leader()
            raise NotLeader("the placement group has just got a new leader")
        return await self.group.call(Method.RANGES, after, True, range_id=PLACEMENT_RANGE, timeout=CALL_SECONDS)
