"""The replicas of one node: how they come to be, whom they belong to, and what a restart makes of what it finds.

Lives here: the map of replicas, the map of which range owns which span, and every way in which a replica begins:
bootstrap, a split, a first message, recovery. Does not live here: running them. The rules (traps 1, 2, 20): no two
replicas own overlapping spans; a replica that has no state yet owns no span and never campaigns; a group's creation is
a record in the log before anything follows from it; and what a replayed split finds already there is never overwritten.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from shardkv.environment import Environment
from shardkv.errors import Corruption
from shardkv.machine.machine import INITIAL_INDEX, INITIAL_TERM, Extension, RangeMachine, SplitResult
from shardkv.machine.snapshot import installing
from shardkv.multiraft.replica import Replica
from shardkv.raft import LeaseSettings, RaftNode, RaftSettings
from shardkv.raft.messages import ConfState, HardState, Message, Snapshot
from shardkv.ranges.admission import Admission, admit_message
from shardkv.ranges.spans import SpanMap
from shardkv.ranges.split import RightHalf, adopt
from shardkv.storage.engine import Engine, WriteBatch
from shardkv.storage.wal import CreateGroup, GroupLog, LogUpdate, ResetLog, Wal
from shardkv.types import PLACEMENT_RANGE, NodeId, RangeDescriptor, RangeId, ReplicaId


@dataclass(frozen=True, slots=True)
class GroupTiming:
    """What every group of a node runs by."""

    election_ticks: int
    heartbeat_ticks: int
    promise_ns: int


class Catalog:
    """See the module. ``log`` is set by the driver: it appends updates at once, in order with everything else.

    Invariants: the span map holds the spans of exactly the initialised user ranges (and of snapshots on their way).
    """

    def __init__(
        self,
        node_id: NodeId,
        wal: Wal,
        engine: Engine,
        environment: Environment,
        timing: GroupTiming,
        make_extension: Callable[[RangeId], Extension | None],
    ) -> None:
        self.node_id = node_id
        self.replicas: dict[RangeId, Replica] = {}
        self.spans = SpanMap()
        self.log: Callable[[Sequence[LogUpdate]], None]
        self._wal = wal
        self._engine = engine
        self._environment = environment
        self._timing = timing
        self._make_extension = make_extension
        self._extensions: dict[RangeId, Extension | None] = {}

    def extension(self, range_id: RangeId) -> Extension | None:
        """The extension of a range's machine, made once; reloading a machine reloads it."""
        if range_id != PLACEMENT_RANGE:
            return None
        if range_id not in self._extensions:
            self._extensions[range_id] = self._make_extension(range_id)
        return self._extensions[range_id]

    # Beginnings

    def bootstrap(self, descriptors: Sequence[RangeDescriptor], timestamp: int) -> None:
        """The first ranges of a new cluster, each with one replica here. Idempotent: what is there already stays."""
        batch = WriteBatch()
        updates = []
        for descriptor in descriptors:
            range_id = descriptor.range_id
            if range_id in self._wal.groups:
                continue
            replica = descriptor.replica_on(self.node_id)
            assert replica is not None, f"bootstrap of {descriptor}, which is not on node {self.node_id}"
            conf_state = ConfState(voters=(replica.replica_id,))
            RangeMachine.create(descriptor, last_timestamp=timestamp, extension=self.extension(range_id)).write(batch)
            updates.append(
                LogUpdate(
                    range_id,
                    create=CreateGroup(replica.replica_id, INITIAL_INDEX, INITIAL_TERM, conf_state),
                )
            )
        # The engine first: a group without its data would wait for a snapshot that nobody can send.
        self._engine.write(batch)
        self._engine.flush()
        if updates:
            self._wal.append(updates)()

    def recover(self) -> None:
        """Make a replica of every group in the log, after bringing log and engine to agree (trap 20)."""
        for range_id, log in sorted(self._wal.groups.items()):
            if log.ended:
                continue
            machine = RangeMachine.load(range_id, self._engine, self.extension(range_id))
            if machine is not None:
                self._reconcile(log, machine)
            self._add(Replica(range_id, log.replica_id, self._raft_node(log, machine, restarted=True), log, machine))
            mark = installing(self._engine, range_id)
            if mark is not None:
                self.replicas[range_id].needs_snapshot = True
                if range_id != PLACEMENT_RANGE:
                    self.spans.claim(range_id, mark.descriptor.span)
        self.check()

    def _reconcile(self, log: GroupLog, machine: RangeMachine) -> None:
        applied = machine.applied_index
        if applied < log.compact_index:
            raise Corruption(
                f"range {machine.range_id} has applied {applied}, but its log begins after {log.compact_index}: data "
                "of this node are lost. Remove the data directory and let the node join anew."
            )
        if applied > log.last_index():
            # The engine was flushed, the log's last records were not: what they held is in the engine.
            self._wal.append(
                [LogUpdate(machine.range_id, reset=ResetLog(applied, machine.applied_term, machine.conf_state))]
            )()
        term, vote, commit = log.hard_state
        if commit < applied:
            log.set_hard_state(HardState(max(term, machine.applied_term), vote, applied))

    def create(self, range_id: RangeId, replica_id: ReplicaId, node_of_sender: tuple[int, NodeId]) -> Replica:
        """An uninitialised replica, made by a leader's first message: it can vote and take a snapshot, no more."""
        self.log([LogUpdate(range_id, create=CreateGroup(replica_id, 0, 0, ConfState()))])
        log = self._wal.groups[range_id]
        replica = Replica(range_id, replica_id, self._raft_node(log, None), log, None)
        replica.learn_node(*node_of_sender)
        self._add(replica)
        return replica

    def admit(self, range_id: RangeId, message: Message, sender: NodeId) -> Replica | None:
        """The replica that a message from another node is for, made if it must be; None: the message is dropped."""
        replica = self.replicas.get(range_id)
        decision = admit_message(
            message.type,
            to=ReplicaId(message.to),
            local=replica.replica_id if replica is not None else None,
            tombstone=self._wal.tombstones.get(range_id),
            initialised=replica is not None and replica.machine is not None,
        )
        if decision is Admission.DELIVER:
            assert replica is not None, f"range {range_id} has no replica to deliver to"
            replica.learn_node(message.from_, sender)
            return replica
        if decision is Admission.CREATE:
            return self.create(range_id, ReplicaId(message.to), (message.from_, sender))
        return None

    def split(self, left: Replica, split: SplitResult, batch: WriteBatch) -> Replica | None:
        """A split was applied by ``left``: its right half's replica here, or None if that has ended already.

        The right half's rows, or their deletion, go into ``batch``, the one in which the left half changes.

        The right half may exist as an uninitialised replica (its leader was faster): it keeps its term and vote, and
        its log begins where the split lets it (traps 2, 20).
        """
        machine = split.machine
        range_id = split.right.range_id
        member = split.right.replica_on(self.node_id)
        assert member is not None, f"range {range_id}, split off from {left.range_id}, has no replica here"
        assert left.machine is not None, f"range {left.range_id} split without a machine"
        existing = self.replicas.get(range_id)
        decision = adopt(
            member.replica_id,
            local=existing.replica_id if existing is not None else None,
            initialised=existing is not None and existing.machine is not None,
            tombstone=self._wal.tombstones.get(range_id),
        )
        left_span = (left.range_id, left.machine.descriptor.span)
        if decision in (RightHalf.KEEP, RightHalf.DROP):
            if decision is RightHalf.DROP:
                split.drop(batch)
            self.spans.replace([left_span])
            return None
        log = self._begin_log(range_id, member.replica_id, machine)
        split.keep(batch)
        self.spans.replace([left_span, (range_id, split.right.span)])
        right = Replica(range_id, member.replica_id, self._raft_node(log, machine), log, machine)
        self._add(right, claim=False)
        return right

    def _begin_log(self, range_id: RangeId, replica_id: ReplicaId, machine: RangeMachine) -> GroupLog:
        """The log of a split's right half: made, or that of its uninitialised replica, which keeps its vote."""
        log = self._wal.groups.get(range_id)
        begin = (machine.applied_index, machine.applied_term, machine.conf_state)
        if log is None:
            self.log([LogUpdate(range_id, create=CreateGroup(replica_id, *begin))])
            return self._wal.groups[range_id]
        self._adopt_vote(range_id, log)
        if log.last_index() < machine.applied_index:
            self.log([LogUpdate(range_id, reset=ResetLog(*begin))])
        return log

    def _adopt_vote(self, range_id: RangeId, log: GroupLog) -> None:
        """The term and vote of the replica in memory, which may be ahead of the log, live on in its successor."""
        existing = self.replicas.pop(range_id, None)
        if existing is not None:
            assert existing.machine is None, f"a split would overwrite range {range_id}, which is initialised"
            raft = existing.raft
            log.set_hard_state(HardState(raft.term, raft.vote, max(log.hard_state.commit, raft.committed)))

    def reincarnate(self, replica: Replica, update: LogUpdate) -> None:
        """Go on with new state and the old log, term and vote, after an install that Raft did not ask for."""
        raft = replica.raft
        log = replica.log
        term, vote, commit = log.hard_state
        if raft.term > term or (raft.term == term and raft.vote != vote):
            log.set_hard_state(HardState(raft.term, raft.vote, commit))
        if update.compact is not None:
            term, vote, commit = log.hard_state
            log.set_hard_state(HardState(term, vote, max(commit, update.compact.index)))
        self.log([update])
        del self.replicas[replica.range_id]
        self._add(
            Replica(replica.range_id, replica.replica_id, self._raft_node(log, replica.machine), log, replica.machine),
            claim=False,
        )

    def _raft_node(self, log: GroupLog, machine: RangeMachine | None, *, restarted: bool = False) -> RaftNode:
        timing = self._timing
        settings = RaftSettings(
            replica_id=log.replica_id,
            randrange=self._environment.random.randrange,
            election_ticks=timing.election_ticks,
            heartbeat_ticks=timing.heartbeat_ticks,
            disable_proposal_forwarding=True,
            step_down_on_removal=True,
            lease=LeaseSettings(promise_ns=timing.promise_ns),
            # What was promised before the restart is forgotten; refuse for as long as it may last (trap 7).
            vote_refusal_ns=timing.promise_ns if restarted else 0,
            commit_broadcast=False,
        )
        applied = log.compact_index
        log.conf_state = ConfState()
        if machine is not None:
            applied = machine.applied_index
            log.conf_state = machine.conf_state
        return RaftNode(settings, log, applied=applied, now=self._environment.clock.monotonic_ns())

    def _add(self, replica: Replica, *, claim: bool = True) -> None:
        assert replica.range_id not in self.replicas, f"range {replica.range_id} has a replica here already"
        self.replicas[replica.range_id] = replica
        replica.log.snapshot_source = lambda: self._snapshot_of(replica)
        if claim and replica.machine is not None and replica.range_id != PLACEMENT_RANGE:
            self.spans.claim(replica.range_id, replica.machine.descriptor.span)

    def _snapshot_of(self, replica: Replica) -> Snapshot:
        machine = replica.machine
        assert machine is not None, f"range {replica.range_id} has nothing to make a snapshot of"
        return Snapshot(machine.snapshot_metadata())

    # Changes

    def installed(self, replica: Replica) -> None:
        """A snapshot is in place: the span is this replica's from now on."""
        assert replica.machine is not None, f"range {replica.range_id} installed nothing"
        replica.needs_snapshot = False
        if replica.range_id != PLACEMENT_RANGE:
            self.spans.fulfil(replica.range_id, replica.machine.descriptor.span)

    def replica_for_key(self, key: bytes) -> Replica | None:
        range_id = self.spans.owner_at(key)
        return self.replicas.get(range_id) if range_id is not None else None

    def check(self) -> None:
        self.spans.check()
        for range_id, replica in self.replicas.items():
            assert replica.range_id == range_id, f"{replica.range_id} stands under {range_id}"
            machine = replica.machine
            if machine is not None and range_id != PLACEMENT_RANGE:
                owner = self.spans.owner_at(machine.descriptor.span.start)
                assert owner == range_id, f"{machine.descriptor.span} of range {range_id} is owned by {owner}"
