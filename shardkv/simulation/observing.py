"""What nodes show to the checkers: looks at every running node from time to time, and at its leaderships as they come.

The rule: looking changes nothing. It reads what nodes hold in memory, never their disks, so that a run is the same
however often somebody looks.
"""

from collections.abc import Iterator
from dataclasses import replace
from hashlib import blake2b
from typing import Final

import trio

from shardkv.machine.snapshot import snapshot_rows
from shardkv.multiraft.replica import Replica
from shardkv.raft import Role
from shardkv.server.parts import Parts
from shardkv.simulation.checkers.growth import NothingGrows
from shardkv.simulation.checkers.leaders import Leader, OneLeaderPerTerm
from shardkv.simulation.checkers.logs import LogMatching, Seen
from shardkv.simulation.checkers.machines import IdenticalMachines
from shardkv.simulation.checkers.ranges import RangesTile, Span
from shardkv.simulation.checkers.sessions import SessionsBounded
from shardkv.simulation.checkers.violation import Checker, Violation
from shardkv.simulation.checkers.voters import VotersHaveData
from shardkv.simulation.cluster import Cluster
from shardkv.simulation.node import SimulatedNode
from shardkv.types import PLACEMENT_RANGE, RangeId, ReplicaId, ReplicaRole, timestamp_ms

SESSIONS_MAX: Final = 64
"""Clients, and nodes as clients, that write to one range within the life of a record."""

LIMITS: Final = {
    "waiting write bytes": 5 * 1024 * 1024,
    "proposals under way": 100,
    "waiting reads": 500,
    "log bytes on disk": 24 * 1024 * 1024,
    "log segments": 150,
    "log entries of a range": 2_500,
    "connections": 200,
    "tasks": 1_000,
    "session records of a range": 256,
    "files": 120,
    "ranges": 256,
}
"""What a run of any length stays under, with the workloads here, on up to five nodes; a size that grows with the run
passes it. Two to five times what hundreds of runs came to, and ten times and more where that is next to nothing."""


class Observing:
    """The node-side checkers of one run, and the looks that feed them."""

    def __init__(self, cluster: Cluster) -> None:
        self.leaders = OneLeaderPerTerm()
        self.logs = LogMatching()
        self.machines = IdenticalMachines()
        self.ranges = RangesTile()
        self.sessions = SessionsBounded(SESSIONS_MAX)
        self.voters = VotersHaveData()
        self.growth = NothingGrows(LIMITS)
        self._cluster = cluster
        self._read_to: dict[tuple[str, int, int], tuple[int, int]] = {}
        """Of each replica of each life of a node: the last entry that was looked at, and its term."""
        self._committed_to: dict[tuple[str, int, int], int] = {}
        """Likewise: the last entry that was seen to be committed, which may be long after it was looked at."""
        cluster.observers.append(self._attach)
        for node in cluster.nodes.values():
            if node.composed:
                self._attach(node, node.inside)

    @property
    def checkers(self) -> tuple[Checker, ...]:
        return self.leaders, self.logs, self.machines, self.ranges, self.sessions, self.voters

    def _attach(self, node: SimulatedNode, inside: Parts) -> None:
        """Hear of every change of leadership and of members."""
        told = inside.driver.hooks

        def leadership(replica: Replica) -> None:
            self._see_leader(node, replica)
            told.leadership(replica)

        def descriptor(replica: Replica) -> None:
            self._see_members(replica)
            told.descriptor(replica)

        inside.driver.hooks = replace(told, leadership=leadership, descriptor=descriptor)

    def _see_leader(self, node: SimulatedNode, replica: Replica) -> None:
        raft = replica.raft
        if raft.role is Role.LEADER:
            leader = Leader(replica.replica_id, node.starts, raft.raft.term_start)
            self.leaders.saw_leader(replica.range_id, raft.term, leader)

    def _see_members(self, replica: Replica) -> None:
        assert replica.machine is not None, f"range {replica.range_id} changed uninitialised"
        range_id = replica.range_id
        for member in replica.machine.descriptor.replicas:
            if member.role is ReplicaRole.LEARNER:
                self.voters.saw_learner(range_id, member.replica_id)
            elif replica.leads and self.voters.waits(range_id, member.replica_id):
                for _, inside in self._running():
                    if inside.catalog.node_id == member.node_id:  # of one that is down nobody can tell
                        other = inside.catalog.replicas.get(range_id)
                        has_data = other is not None and (other.machine is not None or other.log.last_index() > 0)
                        self.voters.saw_vote(range_id, member.replica_id, has_data=has_data)

    def starts(self) -> set[bytes]:
        """Where the ranges of keys begin that nodes hold now."""
        replicas = [replica for _, inside in self._running() for replica in inside.catalog.replicas.values()]
        machines = [replica.machine for replica in replicas if replica.range_id != PLACEMENT_RANGE]
        return {machine.descriptor.span.start for machine in machines if machine is not None}

    # Looks

    def _running(self) -> Iterator[tuple[SimulatedNode, Parts]]:
        for node in self._cluster.nodes.values():
            if node.composed:
                yield node, node.inside

    def look(self) -> None:
        """What is cheap: leaders, logs, spans."""
        spans: list[Span] = []
        whole = True
        trace = self._cluster.trace
        for node in self._cluster.nodes.values():
            whole = whole and node.serving
        for node, inside in self._running():
            for range_id, replica in inside.catalog.replicas.items():
                self._see_leader(node, replica)
                self._see_log(node, range_id, replica)
                machine = replica.machine
                if machine is None or replica.installing or replica.needs_snapshot:
                    whole = False
                    continue
                if trace is not None:
                    trace.record("applied", node.name, range_id, machine.applied_index, replica.raft.term)
                if range_id != PLACEMENT_RANGE:
                    descriptor = machine.descriptor
                    spans.append(Span(range_id, descriptor.span.start, descriptor.span.end, descriptor.epoch.span))
        self.ranges.saw_spans(spans, complete=whole)

    def look_deeper(self) -> None:
        """Everything: each node's own invariants, the whole state of replicas, sessions, and what might grow."""
        self.look()
        for node, inside in self._running():
            if node.serving:
                try:
                    node.check()
                except AssertionError as error:
                    raise Violation("node-invariants", f"{node.name}: {error}") from error
            for range_id, replica in inside.catalog.replicas.items():
                if replica.machine is not None and not replica.installing and not replica.needs_snapshot:
                    self._see_state(node, range_id, replica)
            self._see_sizes(node, inside)
        self._see_run()

    def check(self) -> None:
        """Judge what only the whole shows."""
        for checker in (*self.checkers, self.growth):
            checker.check()

    def _see_log(self, node: SimulatedNode, range_id: RangeId, replica: Replica) -> None:
        log = replica.log
        first, last = log.first_index(), log.last_index()
        key = (node.name, node.starts, replica.replica_id)
        index, term = self._read_to.get(key, (first, -1))
        if index > last or index < first or log.term(index) != term:
            index, previous = first, None
        else:
            index, previous = index + 1, term
        committed = min(log.hard_state.commit, last)
        for number in range(index, last + 1):
            term, size, checksum = log.fingerprint(number)
            self.logs.saw_entry(range_id, number, term, Seen(size, checksum, previous), node.name)
            previous = term
        for number in range(max(self._committed_to.get(key, 0) + 1, first), committed + 1):
            self.logs.saw_committed(range_id, number, log.term(number), node.name)
        self._committed_to[key] = committed
        if last >= first:
            self._read_to[key] = (last, log.term(last))

    def _see_state(self, node: SimulatedNode, range_id: RangeId, replica: Replica) -> None:
        machine = replica.machine
        assert machine is not None, f"range {range_id} on {node.name} is not initialised"
        state = blake2b(digest_size=16)
        for key, value in snapshot_rows(node.engine, machine.descriptor):
            state.update(b"%d %d " % (len(key), len(value)))
            state.update(key)
            state.update(value)
        digest = state.hexdigest()
        self.machines.saw_state(range_id, machine.applied_index, digest, node.name)
        if self._cluster.trace is not None:
            self._cluster.trace.record("state", node.name, range_id, machine.applied_index, digest)
        table = machine.sessions(node.engine)
        records = 0
        for session in table.sessions.values():
            count = sum(1 for _ in session.pieces)
            records += count
            self.sessions.saw_session(range_id, session.acknowledged_below, session.highest, count, node.name)
        rows = table.rows
        newest = max((row.issued_at for row in rows), default=0)
        oldest = rows[0].issued_at if rows else None
        now_ms = min(timestamp_ms(machine.last_timestamp), newest)
        self.sessions.saw_table(range_id, len(table.sessions), oldest, now_ms, node.name)
        self.growth.saw_size("session records of a range", records, node.name)

    def _see_sizes(self, node: SimulatedNode, inside: Parts) -> None:
        saw, name = self.growth.saw_size, node.name
        replicas = inside.catalog.replicas
        saw("ranges", len(replicas), name)
        for replica in replicas.values():
            saw("waiting write bytes", replica.waiting_bytes, name)
            saw("proposals under way", len(replica.proposals), name)
            reads = len(replica.open_reads or ()) + sum(len(each) for _, each in (replica.reads or {}).values())
            saw("waiting reads", reads + sum(len(each) for _, each, _ in replica.confirmed or ()), name)
            saw("log entries of a range", replica.log.last_index() - replica.log.compact_index, name)
        log = inside.wal.statistics()
        saw("log bytes on disk", log.segment_bytes, name)
        saw("log segments", log.segments, name)
        saw("files", node.environment.disk.file_count, name)

    def _see_run(self) -> None:
        self.growth.saw_size("connections", len(self._cluster.network.streams) // 2, "the network")
        self.growth.saw_size("tasks", trio.lowlevel.current_statistics().tasks_living, "the loop")


def apart(cluster: Cluster) -> str | None:
    """What keeps a cluster from having all replicas that it should, at the same index, with every node up; None if
    nothing does."""
    indexes: dict[RangeId, set[int]] = {}
    members: dict[RangeId, tuple[set[ReplicaId], set[ReplicaId]]] = {}
    """Those that a range should have, and those that there are."""
    for node in cluster.nodes.values():
        if not node.serving:
            return f"{node.name} does not serve"
        for range_id, replica in node.inside.catalog.replicas.items():
            if replica.machine is None or replica.installing or replica.needs_snapshot:
                return f"range {range_id} has no state on {node.name}"
            indexes.setdefault(range_id, set()).add(replica.machine.applied_index)
            wanted, found = members.setdefault(range_id, (set(), set()))
            wanted.update(each.replica_id for each in replica.machine.descriptor.replicas)
            found.add(replica.replica_id)
    for range_id, held in indexes.items():
        if len(held) > 1:
            return f"the replicas of range {range_id} stand at {sorted(held)}"
    for range_id, (wanted, found) in members.items():
        if wanted != found:
            return f"range {range_id} has the replicas {sorted(found)}, and should have {sorted(wanted)}"
    return None
