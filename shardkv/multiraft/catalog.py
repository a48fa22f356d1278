"""The replicas of one node: how they come to be, whom they belong to, and what a restart makes of what it finds.

Lives here: the map of replicas, the map of which range owns which span, and every way in which a replica begins:
bootstrap, a split, a first message, recovery. Does not live here: running them. The rules (traps 1, 2, 20): no two
replicas own overlapping spans; a replica that has no state yet owns no span and never campaigns; a group's creation is
a record in the log before anything follows from it; and what a replayed split finds already there is never overwritten.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final

from shardkv.environment import Environment
from shardkv.errors import ConfigError, Corruption, OutOfSpace, ProtocolError, StorageError
from shardkv.machine import keys
from shardkv.machine.machine import INITIAL_INDEX, INITIAL_TERM, Extension, RangeMachine, SplitResult
from shardkv.machine.rows import AppliedState, read_applied
from shardkv.machine.snapshot import installing
from shardkv.multiraft.replica import Replica
from shardkv.raft import LeaseSettings, RaftNode, RaftSettings
from shardkv.raft.messages import NONE, ConfState, HardState, Message, Snapshot
from shardkv.raft.settings import never
from shardkv.ranges.admission import Admission, admit_message
from shardkv.ranges.spans import SpanMap
from shardkv.ranges.split import RightHalf, adopt
from shardkv.storage.directory import Note
from shardkv.storage.engine import REPLACE_ADVICE, Engine, Reader, WriteBatch
from shardkv.storage.wal import CreateGroup, GroupLog, LogUpdate, ResetLog, Wal
from shardkv.types import (
    PLACEMENT_RANGE,
    TIMESTAMP_MAX,
    NodeId,
    RangeDescriptor,
    RangeId,
    ReplicaId,
    timestamp_ms,
)

UNCOMMITTED_BYTES_MAX: Final = 4 * 1024 * 1024
"""Payload in a leader's log that is not applied yet: what clients that send faster than disks write can fill."""
INFLIGHT_BYTES_MAX: Final = 2 * 1024 * 1024
"""Appends on their way to one follower: a few of the largest entries."""
PROBE_HEARTBEATS_MAX: Final = 20
"""A follower without room answers heartbeats alone; else each answer would be one more append that it drops."""


@dataclass(frozen=True, slots=True)
class GroupTiming:
    """What every group of a node runs by."""

    election_ticks: int
    heartbeat_ticks: int
    promise_ns: int
    spare_entries_max: int


class Catalog:
    """See the module. ``log`` is set by the driver: it appends updates at once, in order with everything else. So is
    ``unreadable``: it is told of an old log entry that cannot be read back, by whichever task asked for it.

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
        promise_note: Note,
        *,
        reluctant: Callable[[], bool] = never,
    ) -> None:
        self.node_id = node_id
        self.replicas: dict[RangeId, Replica] = {}
        self.spans = SpanMap()
        self.log: Callable[[Sequence[LogUpdate]], None]
        self.unreadable: Callable[[StorageError], None] = _ignore
        self._tell_unreadable: Callable[[StorageError], None] = lambda error: self.unreadable(error)
        self._wal = wal
        self._engine = engine
        self._environment = environment
        self._timing = timing
        self._make_extension = make_extension
        self._promise_note = promise_note
        self.reluctant = reluctant
        """Whether this node's disk is so slow that its replicas had better not lead."""
        self._extensions: dict[RangeId, Extension | None] = {}
        self._refuse_until_ns = 0
        """Until then no replica of this node votes: before its start it may have promised not to (trap 7)."""
        self._promise_ns = 0
        """The longest promise that is on record as one that may have been given: a restart may come with a shorter one.
        No replica gives a longer one."""

    def extension(self, range_id: RangeId) -> Extension | None:
        """The extension of a range's machine, made once; reloading a machine reloads it."""
        if range_id != PLACEMENT_RANGE:
            return None
        if range_id not in self._extensions:
            self._extensions[range_id] = self._make_extension(range_id)
        return self._extensions[range_id]

    # Beginnings

    def bootstrap(self, descriptors: Sequence[RangeDescriptor], timestamp: int) -> None:
        """The first ranges of a new cluster, each with one replica here. Idempotent: what is there already stays.

        Raises ConfigError if ``timestamp`` is none, for this machine's clock is too far off.
        """
        batch = WriteBatch()
        updates = []
        for descriptor in descriptors:
            range_id = descriptor.range_id
            if range_id in self._wal.groups or range_id in self._wal.tombstones:
                continue
            if not 0 <= timestamp <= TIMESTAMP_MAX:
                raise ConfigError(
                    f"this machine's clock stands at {timestamp_ms(timestamp) // 1000:+,} seconds from 1970, where no "
                    "cluster can begin: set it, then start the node again"
                )
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

    def recover(self, *, used_before: bool = True) -> None:
        """Make a replica of every group in the log, after bringing log and engine to agree (trap 20).

        ``used_before``: whether any process may have run on this data before this one. Only where none has is there
        nothing that it promised; a start that ended at once counts, for nobody can tell what it did.
        """
        # What was promised before the start is forgotten; refuse for as long as it may last. That binds groups that
        # come to be within that time too: a crash may have lost the split that made them, or the record of it (trap 7).
        promise_ns = self._timing.promise_ns
        self._promise_ns = self._promise_note.read()
        if used_before:
            self._refuse_until_ns = self._environment.clock.monotonic_ns() + max(promise_ns, self._promise_ns)
        if promise_ns > self._promise_ns:
            try:
                self.note_promise(promise_ns)
            except OutOfSpace:
                if not self._promise_ns:
                    raise
                # Nobody would know of it after a crash, so this run promises no more than those before it.
                self._timing = replace(self._timing, promise_ns=self._promise_ns)
        updates = self._unrecorded_groups()
        if updates:
            self._wal.append(updates)()
        updates = []
        machines: dict[RangeId, RangeMachine | None] = {}
        for range_id, log in sorted(self._wal.groups.items()):
            if not log.ended:
                machine = machines[range_id] = RangeMachine.load(range_id, self._engine, self.extension(range_id))
                if machine is not None:
                    updates += self._reconcile(log, machine)
        if updates:
            # Recorded, not only remembered: what is logged from now on rests on it.
            self._wal.append(updates)()
        for range_id, machine in machines.items():
            log = self._wal.groups[range_id]
            self._add(Replica(range_id, log.replica_id, self._raft_node(log, machine), log, machine))
            # It had state, for it has a log. What it lost is a split, which its left half will apply once more, unless
            # that gets a snapshot from behind the split; or an install did not come to its end. Nobody else would
            # notice: what the leader sends fits the log. While the left half owns the span, no snapshot is let in.
            self.replicas[range_id].needs_snapshot = machine is None and log.last_index() > 0
            mark = installing(self._engine, range_id)
            if mark is not None:
                self.replicas[range_id].needs_snapshot = True
                if range_id != PLACEMENT_RANGE:
                    self.spans.claim(range_id, mark.descriptor.span)
        self.check()

    def engine_is_gone(self) -> bool:
        """Whether the log tells of ranges that had data here, and the engine holds not one range.

        No crash leaves that: a range's first batch is flushed before the log knows the range, or comes with the batch
        of the range that it was split from.
        """
        return _is_gone(self._wal, self._engine)

    def note_promise(self, promise_ns: int) -> None:
        """Put on record how long promises are from now on. Blocks. Raises OutOfSpace."""
        self._promise_note.write(promise_ns)
        self._promise_ns = promise_ns

    def shorter_promise_ns(self) -> int | None:
        """What may be put on record instead: where promises have become shorter, the longer ones of before the start
        count no more once they have ended. To be asked now and then."""
        promise_ns = self._timing.promise_ns
        ended = self._environment.clock.monotonic_ns() >= self._refuse_until_ns
        return promise_ns if promise_ns < self._promise_ns and ended else None

    def _unrecorded_groups(self) -> list[LogUpdate]:
        """The creation of every range that the engine holds and the log does not know.

        The right half of a split: the engine's batch was flushed before the record of the group's creation was synced.
        Then nothing that follows from the record has left this node, so the group begins where the split let it.
        """
        updates = []
        start, end = keys.SYSTEM_PREFIX, keys.SYSTEM_END
        while (first := next(self._engine.scan(start, end), None)) is not None:
            range_id = RangeId(keys.system_key_range_id(first[0]))
            start = keys.system_span(range_id)[1]
            if range_id in self._wal.groups:
                continue
            machine = RangeMachine.load(range_id, self._engine)
            member = machine.descriptor.replica_on(self.node_id) if machine is not None else None
            if machine is None or member is None or member.replica_id <= self._wal.tombstones.get(range_id, 0):
                continue
            begin = (machine.applied_index, machine.applied_term, machine.conf_state)
            updates.append(LogUpdate(range_id, create=CreateGroup(member.replica_id, *begin)))
        return updates

    def _reconcile(self, log: GroupLog, machine: RangeMachine) -> list[LogUpdate]:
        """What the log has to be told of the state in the engine."""
        applied = machine.applied_index
        _require_reaching(log, applied)
        term, vote, commit = log.hard_state  # no entry of the log has a higher term
        if applied > log.last_index() or log.term(applied) != machine.applied_term:
            if applied < commit:
                raise Corruption(
                    f"range {machine.range_id} has applied {applied} in term {machine.applied_term}, and its log has "
                    "committed another entry there: engine and log do not belong together. Put back what does, if you "
                    "can; else keep them, and start a node under another name with an empty data directory"
                )
            # The engine is ahead: it was flushed and the log's last records were not, or a snapshot was ingested and
            # the crash came before that was logged. What the log holds there was never committed, or is in the engine.
            reset = ResetLog(applied, machine.applied_term, machine.conf_state)
            return [LogUpdate(machine.range_id, reset=reset)]
        if commit < applied:
            return [LogUpdate(machine.range_id, hard_state=HardState(term, vote, applied))]
        return []

    def create(self, range_id: RangeId, replica_id: ReplicaId, node_of_sender: tuple[int, NodeId]) -> Replica:
        """An uninitialised replica, made by the first message to it: it can vote and take a snapshot, no more."""
        self.log([LogUpdate(range_id, create=CreateGroup(replica_id, 0, 0, ConfState()))])
        log = self._wal.groups[range_id]
        replica = Replica(range_id, replica_id, self._raft_node(log, None), log, None)
        replica.learn_node(*node_of_sender)
        self._add(replica)
        return replica

    def admit(self, range_id: RangeId, message: Message, sender: NodeId) -> Replica | None:
        """The replica that a message from another node is for, made if it must be; None: the message is dropped.

        Raises ProtocolError when the sender speaks for a replica that is not its own.
        """
        replica = self.replicas.get(range_id)
        if replica is not None and message.to == replica.replica_id and replica.machine is not None:
            # As nearly always: one that lives has no tombstone, and one that has state is delivered everything.
            replica.learn_node(message.from_, sender)
            return replica
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
            if message.from_ in (NONE, message.to):
                raise ProtocolError(f"node {sender} speaks for replica {message.from_} of range {range_id}")
            return self.create(range_id, ReplicaId(message.to), (message.from_, sender))
        # Nothing ends a replica in this version, so nobody has to be told of it, nor makes way for another.
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
        # A snapshot of the left half on its way was made before this split, and the log was faster: it will not be
        # taken. Made after it, its span lies in what the left half owns anyway.
        self.spans.cancel(left.range_id)
        if decision in (RightHalf.KEEP, RightHalf.DROP):
            if decision is RightHalf.DROP:
                split.drop(batch)
            self.spans.replace([left_span])
            return None
        held = self._wal.groups.get(range_id)
        if existing is not None and held is not None and held.compact_index > machine.applied_index:
            # It was further on, its state is lost, and its log does not follow the split any more: only a snapshot
            # brings it back. The left half's state came from a leader that had not applied the split.
            split.drop(batch)
            self.spans.replace([left_span])
            existing.needs_snapshot = True
            return None
        promised_ns = existing.raft.raft.refuse_until if existing is not None else 0
        log = self._begin_log(range_id, member.replica_id, machine)
        split.keep(batch)
        self.spans.replace([left_span, (range_id, split.right.span)])
        raft = self._raft_node(log, machine, promised_ns=promised_ns)
        right = Replica(range_id, member.replica_id, raft, log, machine)
        self._add(right, claim=False)
        if existing is not None:
            right.nodes = existing.nodes
            leader, vote, term = existing.raft.leader, existing.raft.vote, existing.raft.term
            if leader != NONE:
                # Nobody would wait for a snapshot that is not needed, nor may there be room for one.
                right.answer_leader(leader, term, self._environment.clock.monotonic_ns())
            elif vote != NONE:
                right.answer_candidate(vote, term, self._environment.clock.monotonic_ns())
        return right

    def _begin_log(self, range_id: RangeId, replica_id: ReplicaId, machine: RangeMachine) -> GroupLog:
        """The log of a split's right half: made, or that of its uninitialised replica, which keeps its vote."""
        log = self._wal.groups.get(range_id)
        begin = (machine.applied_index, machine.applied_term, machine.conf_state)
        if log is None:
            self.log([LogUpdate(range_id, create=CreateGroup(replica_id, *begin))])
            return self._wal.groups[range_id]
        existing = self.replicas.pop(range_id, None)
        if existing is not None:
            assert existing.machine is None, f"a split would overwrite range {range_id}, which is initialised"
            self.log([LogUpdate(range_id, hard_state=_inherited(existing))])
        if log.last_index() < machine.applied_index:
            self.log([LogUpdate(range_id, reset=ResetLog(*begin))])
        return log

    def reincarnate(self, replica: Replica, update: LogUpdate) -> None:
        """Go on with new state and the old log, term and vote, after an install that Raft did not ask for."""
        term, vote, commit = _inherited(replica)
        if update.reset is not None:
            if update.reset.term > term:
                term, vote = update.reset.term, NONE
            commit = update.reset.index
        elif update.compact is not None:
            commit = max(commit, update.compact.index)
        update.hard_state = HardState(term, vote, commit)
        self.log([update])
        promised_ns = replica.raft.raft.refuse_until
        replica.abandon()
        del self.replicas[replica.range_id]
        raft = self._raft_node(replica.log, replica.machine, promised_ns=promised_ns)
        self._add(Replica(replica.range_id, replica.replica_id, raft, replica.log, replica.machine), claim=False)

    def _raft_node(self, log: GroupLog, machine: RangeMachine | None, *, promised_ns: int = 0) -> RaftNode:
        """The Raft core of a replica. ``promised_ns``: until when the core that it replaces had promised its vote."""
        timing = self._timing
        now = self._environment.clock.monotonic_ns()
        settings = RaftSettings(
            replica_id=log.replica_id,
            randrange=self._environment.random.randrange,
            election_ticks=timing.election_ticks,
            heartbeat_ticks=timing.heartbeat_ticks,
            disable_proposal_forwarding=True,
            step_down_on_removal=True,
            lease=LeaseSettings(promise_ns=timing.promise_ns),
            vote_refusal_ns=max(self._refuse_until_ns - now, promised_ns - now, 0),
            reluctant=self.reluctant,
            patient_elections=True,
            probe_heartbeats_max=PROBE_HEARTBEATS_MAX,
            commit_broadcast=False,
            commit_rides=True,
            spare_entries_max=timing.spare_entries_max,
            uncommitted_bytes_max=UNCOMMITTED_BYTES_MAX,
            inflight_bytes_max=INFLIGHT_BYTES_MAX,
        )
        applied = log.compact_index
        # A replica without state knows no members, whatever its log says: so it never campaigns (trap 2).
        log.applied_conf_state = ConfState()
        if machine is not None:
            applied = machine.applied_index
            log.applied_conf_state = machine.conf_state
        return RaftNode(settings, log, applied=applied, now=now)

    def _add(self, replica: Replica, *, claim: bool = True) -> None:
        assert replica.range_id not in self.replicas, f"range {replica.range_id} has a replica here already"
        self.replicas[replica.range_id] = replica
        replica.log.snapshot_source = lambda: self._snapshot_of(replica)
        replica.log.unreadable = self._tell_unreadable  # one for all replicas: there may be very many
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


def admit_engine(wal: Wal, reader: Reader) -> bool:
    """Whether an engine, which ``reader`` shows, holds a range, if the log tells of any that had data.

    Raises Corruption where the state of a range ends before its log begins.
    """
    for range_id, log in wal.groups.items():
        applied = None if log.ended else read_applied(reader, range_id)
        if isinstance(applied, AppliedState):
            _require_reaching(log, applied.index)
    return not _is_gone(wal, reader)


def _is_gone(wal: Wal, reader: Reader) -> bool:
    had = any(not log.ended and log.last_index() > 0 for log in wal.groups.values())
    return had and next(reader.scan(keys.SYSTEM_PREFIX, keys.SYSTEM_END), None) is None


def _require_reaching(log: GroupLog, applied: int) -> None:
    if applied < log.compact_index:
        raise Corruption(
            f"range {log.range_id} has applied {applied}, but its log begins after {log.compact_index}: the engine has "
            f"lost data, or is an old copy; {REPLACE_ADVICE}"
        )


def _ignore(error: StorageError) -> None:
    """Before the driver runs: the error itself ends the start."""


def _inherited(replica: Replica) -> HardState:
    """What the core of a replica that is replaced leaves to its successor.

    Its term and vote, for they may be on their way to the disk, and its vote to a candidate; and of what it knows to be
    committed as much as is in the log.
    """
    raft = replica.raft
    commit = min(raft.committed, raft.raft.log.stable)
    return HardState(raft.term, raft.vote, max(replica.log.hard_state.commit, commit))
