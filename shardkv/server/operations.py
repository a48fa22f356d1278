"""Requests that take several steps: lookups that may go to another node, splits, transfers, membership changes.

Lives here: one handler per method, each a short async function in a task of its own, bounded in number. Does not live
here: reads and writes of keys (``requests``), what the placement group decides (``placement_service``).
"""

from collections.abc import Awaitable, Callable
from typing import Any, Final

import trio

import shardkv
from shardkv.environment import Clock
from shardkv.errors import (
    Busy,
    EpochMismatch,
    InvalidRange,
    MalformedRequest,
    NotFound,
    OutcomeUnknown,
    RangeNotFound,
    RequestError,
    ShardKVError,
    Unavailable,
)
from shardkv.machine.entries import encode_membership
from shardkv.machine.machine import RangeMachine
from shardkv.multiraft.driver import Driver
from shardkv.multiraft.maintenance import Maintenance
from shardkv.multiraft.replica import Replica
from shardkv.raft.messages import ConfChange, ConfChangeSingle, ConfChangeType
from shardkv.ranges.split import plan_split
from shardkv.server.placement_service import PlacementService
from shardkv.server.reply import Reply
from shardkv.server.requests import Asker
from shardkv.types import KEY_BYTES_MAX, NodeId, RangeDescriptor, RangeId, ReplicaId, ReplicaRole
from shardkv.wire.requests import Method, Request
from shardkv_placement import commands as placement_commands
from shardkv_placement.fields import ID_MAX, REPLICAS_MAX
from shardkv_placement.operators import CATCH_UP_LAG_MAX

TASKS_MAX: Final = 256
"""Requests of this kind under way at once; more are told Busy."""
OUTCOME_SECONDS: Final = 8.0
"""How long a proposal's outcome is waited for."""
TRANSFER_SECONDS: Final = 3.0
HEARD_SECONDS: Final = 1.0
"""How long an answer of the node that is to take over is waited for; it answers several heartbeats in that time."""
POLL_SECONDS: Final = 0.02
_LISTINGS: Final = frozenset((Method.ROUTES, Method.NODES, Method.STATUS, Method.RANGES, Method.NODE_STATUS))
"""What may be asked again: for want of room for its answer it is told Busy."""


class Operations:
    """The slow half of a node's method table. :meth:`start` is what ``requests`` calls."""

    def __init__(
        self,
        driver: Driver,
        clock: Clock,
        placement: PlacementService,
        maintenance: Maintenance,
        flush: Callable[[], None],
    ) -> None:
        self._driver = driver
        self._catalog = driver.catalog
        self._clock = clock
        self._placement = placement
        self._maintenance = maintenance
        self._flush = flush
        self._nursery: trio.Nursery
        self._tasks = 0
        self._handlers: dict[int, Callable[[Request], Awaitable[Any]]] = {
            Method.ROUTES: placement.routes,
            Method.NODES: placement.nodes,
            Method.STATUS: placement.status,
            Method.RANGES: placement.ranges,
            Method.JOIN: placement.join,
            Method.PLACEMENT: placement.command,
            Method.HEARTBEAT: placement.heartbeat,
            Method.NODE_STATUS: self._node_status,
            Method.SPLIT: self._split,
            Method.TRANSFER: self._transfer,
            Method.SNAPSHOT: self._snapshot,
            Method.CHANGE_REPLICAS: self._change_replicas,
        }
        assert self._handlers.keys() | {Method.WRITE, Method.GET, Method.SCAN} == set(Method), "a method has no handler"

    def use(self, nursery: trio.Nursery) -> None:
        """Where its tasks run: a nursery that stays open for as long as any connection is served."""
        self._nursery = nursery

    def start(self, requester: Asker, request: Request) -> None:
        """Begin a task for the request. Raises Busy."""
        if self._tasks >= TASKS_MAX:
            raise Busy(f"{self._tasks} requests of this kind are under way")
        self._tasks += 1
        self._nursery.start_soon(self._handle, requester, request)

    async def _handle(self, requester: Asker, request: Request) -> None:
        try:
            result = await self._handlers[request.method](request)
        except ShardKVError as error:
            requester.refuse(request.id, error)
        else:
            (requester.later if request.method in _LISTINGS else requester).answer(request.id, result)
        finally:
            self._tasks -= 1
        self._flush()

    def _leader_of(self, range_id: int) -> tuple[Replica, RangeMachine]:
        replica = self._catalog.replicas.get(RangeId(range_id))
        if replica is None:
            raise RangeNotFound(f"this node holds no replica of range {range_id}")
        if not replica.leads or replica.machine is None:
            raise replica.not_leader()
        return replica, replica.machine

    async def _node_status(self, request: Request) -> Any:
        statistics = self._driver.statistics()
        wal = self._driver.wal.statistics()
        return {
            "version": shardkv.__version__,
            "turns": statistics.turns,
            "syncs": statistics.syncs,
            "entries_applied": statistics.entries_applied,
            "replicas": len(self._catalog.replicas),
            "leaders": sum(replica.leads for replica in self._catalog.replicas.values()),
            "log_segments": wal.segments,
            "log_bytes": wal.segment_bytes,
            "engine_unflushed_bytes": self._driver.engine.unflushed_bytes,
        }

    async def _split(self, request: Request) -> Any:
        match request.arguments:
            case [bytes(key)] if 0 < len(key) <= KEY_BYTES_MAX:
                pass
            case _:
                raise MalformedRequest(f"a split's argument is a key of 1 to {KEY_BYTES_MAX} bytes")
        owner = self._catalog.replica_for_key(key)
        if owner is None:
            raise RangeNotFound("this node holds no replica of that key's range")
        left, right = await self.split(owner.range_id, key)
        return [left.to_wire(), right.to_wire()]

    async def split(self, range_id: RangeId, key: bytes) -> tuple[RangeDescriptor, RangeDescriptor]:
        """Split a range that this node leads at ``key``. Raises the reason why not, any ShardKVError."""
        replica, machine = self._leader_of(range_id)
        if key == machine.descriptor.span.start:
            raise InvalidRange("there is a range that starts at this key already")
        nodes = [member.node_id for member in machine.descriptor.replicas]
        try:
            first_range, first_replica = await self._placement.group.propose(placement_commands.Allocate(1, len(nodes)))
        except OutcomeUnknown as error:
            # Ids that nobody uses do no harm, and the range is as it was.
            raise Unavailable(f"no ids for the new range: {error}") from error
        replica, machine = self._leader_of(range_id)
        ids = {node_id: ReplicaId(first_replica + position) for position, node_id in enumerate(nodes)}
        command = plan_split(machine.descriptor, key, RangeId(first_range), ids, joint=machine.joint)
        reply = Reply()
        self._driver.proposer.split(replica, command, reply, 0)
        left, right = await reply.wait(self._clock, OUTCOME_SECONDS)
        return RangeDescriptor.from_wire(left), RangeDescriptor.from_wire(right)

    async def _transfer(self, request: Request) -> Any:
        match request.arguments:
            case [int(range_id), int(node_id)]:
                pass
            case _:
                raise MalformedRequest("a transfer's arguments are a range id and a node id")
        await self.transfer(RangeId(range_id), NodeId(node_id))
        return True

    async def transfer(self, range_id: RangeId, node_id: NodeId) -> None:
        """Hand a range's leadership to the voter on a node. Raises the reason why not, any ShardKVError."""
        replica, machine = self._leader_of(range_id)
        target = machine.descriptor.replica_on(node_id)
        if target is None or target.role is not ReplicaRole.VOTER:
            raise RequestError(f"node {node_id} holds no voter of range {range_id}; `ranges` shows who does")
        if target.replica_id == replica.replica_id:
            return
        # What it has not answered lately it may answer in a moment: the leader counts anew in each election timeout.
        with self._clock.deadline(HEARD_SECONDS):
            while not self._could_lead(replica, target.replica_id):
                await self._clock.sleep(POLL_SECONDS)
        replica, _ = self._leader_of(range_id)
        if not self._could_lead(replica, target.replica_id):
            # It could not take over, and meanwhile the range would take no writes.
            raise RequestError(
                f"the leader of range {range_id} has not heard of node {node_id} lately, or that node waits for the "
                "range's data; `nodes` shows its state"
            )
        replica.raft.transfer_leader(target.replica_id)
        self._driver.touch(replica)
        with self._clock.deadline(TRANSFER_SECONDS):
            while replica.raft.leader != target.replica_id:
                await self._clock.sleep(POLL_SECONDS)
        if replica.raft.leader != target.replica_id:
            raise Unavailable(f"node {node_id} did not take over range {range_id} in time; it may be behind or away")

    def _could_lead(self, replica: Replica, replica_id: int) -> bool:
        return _is_heard(replica, replica_id) and replica.could_lead(replica_id, self._clock.monotonic_ns())

    async def _snapshot(self, request: Request) -> Any:
        match request.arguments:
            case [int(range_id)]:
                pass
            case _:
                raise MalformedRequest("a snapshot's argument is a range id")
        replica, machine = self._leader_of(range_id)
        await self._maintenance.flush_and_compact()
        return {"range": range_id, "applied": machine.applied_index, "log_begins": replica.log.first_index()}

    async def _change_replicas(self, request: Request) -> Any:
        match request.arguments:
            case [int(range_id), [*items], int(membership)]:
                pass
            case _:
                raise MalformedRequest("a membership change's arguments are a range id, changes, and an epoch")
        replica, machine = self._leader_of(range_id)
        if machine.descriptor.epoch.membership != membership or machine.joint:
            raise EpochMismatch(current=(machine.descriptor,))
        changes, added = _membership_changes(machine.descriptor, items)
        for kind, replica_id in changes:
            now_ns = self._clock.monotonic_ns()
            follows = _follows_closely(replica, replica_id) and replica.could_lead(replica_id, now_ns)
            if kind is ConfChangeType.ADD_NODE and not follows:
                # Whoever asked may have seen what was so a moment ago. With votes that have no data behind them the
                # range could commit nothing until they have, or be lost with the one that has them.
                raise Busy(f"replica {replica_id} of range {range_id} does not follow closely yet")
        reply = Reply()
        change = ConfChange(tuple(changes), context=encode_membership(added))
        self._driver.proposer.membership(replica, change, reply, 0)
        return await reply.wait(self._clock, OUTCOME_SECONDS)


def _is_heard(replica: Replica, replica_id: int) -> bool:
    """Whether it has answered its leader, which this replica is, lately."""
    peer = replica.raft.status().progress.get(replica_id)
    return peer is not None and peer.recent_active


def _follows_closely(replica: Replica, replica_id: int) -> bool:
    """Whether it answers, and has the range's log but for the last few entries."""
    if not _is_heard(replica, replica_id):
        return False
    match = replica.raft.status().progress[replica_id].match
    return match > 0 and replica.raft.last_index - match <= CATCH_UP_LAG_MAX


def _membership_changes(
    descriptor: RangeDescriptor, items: list[Any]
) -> tuple[list[ConfChangeSingle], list[tuple[int, int]]]:
    """What a request asks for, and (node id, replica id) of the replicas that it brings in.

    Every replica of the range will carry it out, so whatever does not fit is refused here. Raises RequestError.
    """
    changes: list[ConfChangeSingle] = []
    added: list[tuple[int, int]] = []
    nodes = {int(member.node_id) for member in descriptor.replicas}
    ids = {int(member.replica_id): member for member in descriptor.replicas}
    for item in items:
        match item:
            case ["add_learner", int(node_id), int(replica_id)] if 0 < node_id <= ID_MAX and 0 < replica_id <= ID_MAX:
                if node_id in nodes:
                    raise RequestError(f"node {node_id} holds a replica of range {descriptor.range_id} already")
                if replica_id in ids or any(replica_id == other for _, other in added):
                    raise RequestError(f"the replica id {replica_id} is in use; ids are never used twice")
                if len(nodes) == REPLICAS_MAX:
                    raise RequestError(f"a range has at most {REPLICAS_MAX} replicas")
                nodes.add(node_id)
                added.append((node_id, replica_id))
                changes.append(ConfChangeSingle(ConfChangeType.ADD_LEARNER_NODE, replica_id))
            case ["promote", int(node_id), int(replica_id)]:
                member = ids.get(replica_id)
                if member is None or member.node_id != node_id or member.role is not ReplicaRole.LEARNER:
                    raise RequestError(f"replica {replica_id} is no learner of range {descriptor.range_id} there")
                changes.append(ConfChangeSingle(ConfChangeType.ADD_NODE, replica_id))
            case _:
                raise RequestError(f"this version cannot carry out the membership change {item!r:.100}")
    if not changes:
        raise NotFound("a membership change without changes")
    return changes, added
