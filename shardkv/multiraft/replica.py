"""One range's replica on this node: its Raft group, its state machine, and who waits for what.

Lives here: the queue of writes to propose, the proposals under way, the reads that wait for a confirmation, and the
rule for serving a read at once. Does not live here: any I/O. The driver feeds it and carries its work out.
"""

from collections.abc import Callable
from typing import Any, Final, NamedTuple, Protocol

from shardkv.errors import Busy, EpochMismatch, NotLeader, ProtocolError, ShardKVError
from shardkv.machine.machine import RangeMachine
from shardkv.raft import PeerStatus, RaftNode, Role
from shardkv.raft.messages import NONE, Message, MessageType
from shardkv.storage.wal import GroupLog
from shardkv.types import NodeId, RangeId, ReplicaId
from shardkv.wire.commands import Command

ENTRY_BYTES_MAX: Final = 1024 * 1024
"""Waiting writes become one log entry up to this size: larger ones would hold up every other group's sync."""
ENTRY_COMMANDS_MAX: Final = 1_024
WAITING_BYTES_MAX: Final = 4 * 1024 * 1024
"""Writes that wait to be proposed; past it a replica answers Busy."""
PIPELINE_NS: Final = 20_000_000
PIPELINE_BYTES: Final = 256 * 1024
"""An entry is proposed behind one that is under way only after so long, or with so much in it. It costs every node the
same whatever it holds: behind a busy follower many small ones would only make it busier."""
GATHER_NS: Final = 3_000_000
"""Who has just been answered is about to write again. An entry with nothing under way before it waits so long for most
of them, for several clients are never heard at the same moment."""
WAITING_READS_MAX: Final = 4_096
"""Reads that wait for one confirmation."""
CONFIRMATIONS_MAX: Final = 8
"""ReadIndex requests under way at once; reads that come meanwhile share the next one."""


class Requester(Protocol):
    """Who asked: a client's connection, or a task of this node."""

    def answer(self, request_id: int, result: Any) -> None: ...

    def refuse(self, request_id: int, error: ShardKVError) -> None: ...


class WriteGroup(NamedTuple):
    """The commands of one session in one request, answered together."""

    requester: Requester
    request_id: int
    session: bytes
    commands: bytes
    """As the client sent them; the log entry holds these bytes."""
    decoded: list[Command]


class Proposal(NamedTuple):
    """An entry under way, and who waits for each part of its outcome."""

    term: int
    waiting: tuple[tuple[Requester, int], ...]
    commands: int = 1
    decoded: Any = None
    """The entry as its machine decodes it, so that the leader need not decode it again."""


class WaitingRead(NamedTuple):
    requester: Requester
    request_id: int
    serve: Callable[["Replica"], Any]
    """Reads the applied state; runs when the read is known to be linearizable."""


class Replica:
    """See the module. ``machine`` is None until the replica is initialised by a split or a snapshot.

    Invariants: ``waiting_bytes`` is the sum over ``waiting``; only a leader has ``waiting`` or ``proposals``;
    an uninitialised replica has neither a machine nor a span.
    """

    __slots__ = (
        "answered_ns",
        "confirmed",
        "expected",
        "installing",
        "led",
        "log",
        "machine",
        "needs_snapshot",
        "nodes",
        "open_reads",
        "proposals",
        "proposed_ns",
        "raft",
        "range_id",
        "read_number",
        "reads",
        "replica_id",
        "stateless",
        "waiting",
        "waiting_bytes",
        "waiting_commands",
    )

    def __init__(
        self, range_id: RangeId, replica_id: ReplicaId, raft: RaftNode, log: GroupLog, machine: RangeMachine | None
    ) -> None:
        self.range_id = range_id
        self.replica_id = replica_id
        self.raft = raft
        self.log = log
        self.machine = machine
        self.nodes: dict[int, NodeId] | None = None
        """Where replicas live that the descriptor does not name (yet): learned from their messages."""
        self.waiting: list[WriteGroup] = []
        self.waiting_bytes = self.waiting_commands = 0
        self.proposed_ns = 0
        """When something was last proposed."""
        self.answered_ns = 0
        """When writes were last answered."""
        self.expected = 0
        """So many commands are enough for the next entry, for that many were under way when they were answered."""
        self.proposals: dict[int, Proposal] = {}
        """By log index."""
        self.open_reads: list[WaitingRead] | None = None
        """Reads for which no ReadIndex request has been made yet."""
        self.reads: dict[bytes, tuple[int, list[WaitingRead]]] | None = None
        """By the context of the ReadIndex request that will confirm them: when it was made, and the reads."""
        self.confirmed: list[tuple[int, list[WaitingRead], int]] | None = None
        """Confirmed reads that wait until their index is applied, and when their confirmation was asked for."""
        self.read_number = 0
        """The next context is no lower, and no lower than the clock: none from before a restart comes again, for its
        answer, which may still be on its way, knows nothing of what was written since."""
        self.led = False
        """Whether the last turn saw this replica lead."""
        self.installing = False
        """A snapshot is being installed: nothing of this group is stepped out until it is done."""
        self.stateless: dict[int, int] | None = None
        """Other replicas that have asked this one for their data, and until when each counts as one without."""
        self.needs_snapshot = False
        """An earlier install was interrupted: the range's data are gone and only a snapshot brings them back."""

    @property
    def leads(self) -> bool:
        return self.raft.raft.role is Role.LEADER

    def node_of(self, replica_id: int) -> NodeId | None:
        """The node that holds another replica of this range, as far as known."""
        if self.machine is not None:
            for member in self.machine.descriptor.replicas:
                if member.replica_id == replica_id:
                    return member.node_id
        return self.nodes.get(replica_id) if self.nodes else None

    def learn_node(self, replica_id: int, node_id: NodeId) -> None:
        """A node has spoken for a replica. Raises ProtocolError if that lives elsewhere, or here."""
        if replica_id in (NONE, self.replica_id):
            raise ProtocolError(f"node {node_id} speaks for replica {replica_id} of range {self.range_id}")
        if self.machine is not None:
            for member in self.machine.descriptor.replicas:
                if member.replica_id == replica_id:
                    if member.node_id != node_id:
                        raise ProtocolError(f"node {node_id} speaks for {member} of range {self.range_id}")
                    return
        if self.nodes is None:
            self.nodes = {}
        self.nodes[replica_id] = node_id

    def asked_for_data(self, replica_id: int, until_ns: int) -> None:
        """Another replica has a log and no state; if it does not ask again by then, it has some."""
        if self.stateless is None:
            self.stateless = {}
        self.stateless[replica_id] = until_ns

    def could_lead(self, replica_id: int, now_ns: int) -> bool:
        """Whether another replica has state, as far as known. One without acknowledges entries like any other, but is
        in no position to take over."""
        return not self.stateless or now_ns > self.stateless.get(replica_id, -1)

    def successors(self, now_ns: int) -> list[tuple[int, PeerStatus]]:
        """Who could have this replica's leadership: voters that it has heard lately, and that have state."""
        return [
            (replica_id, peer)
            for replica_id, peer in self.raft.status().progress.items()
            if replica_id != self.replica_id
            and peer.recent_active
            and not peer.is_learner
            and self.could_lead(replica_id, now_ns)
        ]

    def not_leader(self) -> NotLeader:
        leader = self.raft.leader
        hint = self.node_of(leader) if leader not in (NONE, self.replica_id) else None
        return NotLeader(hint=hint)

    def check_route(self, span_generation: int) -> RangeMachine:
        """The machine, if the request's idea of the range is current. Raises NotLeader or EpochMismatch."""
        machine = self.machine
        if machine is None:
            raise self.not_leader()
        if machine.descriptor.epoch.span != span_generation:
            raise EpochMismatch(current=(machine.descriptor,))
        return machine

    def answer_leader(self, leader: int, term: int, now_ns: int) -> None:
        """Tell who leads in ``term`` how far this log is committed: it takes this replica for one without state.

        A split has given it its state since, and the leader, which has nothing below the split, would send nothing but
        snapshots. An append that is empty, and of which every log holds what precedes it, is answered with that.
        """
        assert self.raft.committed, f"range {self.range_id} has nothing that its leader could go on from"
        self.raft.step(Message(MessageType.APP, self.replica_id, leader, term), now_ns)

    def answer_candidate(self, candidate: int, term: int, now_ns: int) -> None:
        """Give a candidate once more the vote of ``term``, which it got before a split gave this replica its state.

        The first answer may have been waiting for the disk: then it went with the replica that this one replaces.
        """
        log = self.raft.raft.log
        vote = MessageType.VOTE
        self.raft.step(
            Message(vote, self.replica_id, candidate, term, log_term=log.last_term, index=log.last_index), now_ns
        )

    # Writes

    def enqueue(self, group: WriteGroup) -> None:
        """Queue a request's commands for the next turn. Raises NotLeader or Busy."""
        if not self.leads:
            raise self.not_leader()
        if self.waiting_bytes > WAITING_BYTES_MAX:
            raise Busy(f"{self.waiting_bytes} bytes of writes already wait for range {self.range_id}")
        self.waiting.append(group)
        self.waiting_bytes += len(group.commands)
        self.waiting_commands += len(group.decoded)

    def may_propose(self, now_ns: int) -> bool:
        """Whether the waiting writes should become an entry now, or collect until the one under way is applied.

        An entry costs all nodes the same whatever it holds, so it should hold what it can. Where the answer takes long
        (a distant or slow follower), or much is waiting, entries follow each other without waiting for it.
        """
        if self.waiting_bytes >= PIPELINE_BYTES:
            return True
        if self.proposals:
            return now_ns - self.proposed_ns >= PIPELINE_NS
        return now_ns - self.answered_ns >= GATHER_NS or self.waiting_commands >= self.expected

    def answered(self, commands: int, now_ns: int) -> None:
        """So many commands were answered in one go."""
        self.answered_ns = now_ns
        self.expected = (commands + self.waiting_commands) * 7 // 8

    def take_waiting(self) -> list[WriteGroup]:
        """The groups of the next entry, at least one and bounded in bytes and commands."""
        waiting = self.waiting
        size = commands = 0
        for count, group in enumerate(waiting):
            size += len(group.commands)
            commands += len(group.decoded)
            if count and (size > ENTRY_BYTES_MAX or commands > ENTRY_COMMANDS_MAX):
                taken, self.waiting = waiting[:count], waiting[count:]
                self.waiting_bytes -= size - len(group.commands)
                self.waiting_commands -= commands - len(group.decoded)
                return taken
        self.waiting = []
        self.waiting_bytes = self.waiting_commands = 0
        return waiting

    def refuse_waiting(self, error: ShardKVError) -> None:
        """Refuse the writes that wait to be proposed."""
        for group in self.waiting:
            group.requester.refuse(group.request_id, error)
        self.waiting = []
        self.waiting_bytes = self.waiting_commands = 0

    def abandon(self) -> None:
        """Refuse everyone who waits on this replica, which leads no more. A proposal may still be applied; its retry
        will find out."""
        error = self.not_leader()
        self.refuse_waiting(error)
        logged = NotLeader(hint=error.hint, logged=True)
        for proposal in self.proposals.values():
            for requester, request_id in proposal.waiting:
                requester.refuse(request_id, logged)
        self.proposals.clear()
        self.abandon_reads(error)

    # Reads

    def can_read(self, now_ns: int) -> bool:
        """Whether a read of the applied state, done before anything else happens, is linearizable.

        All of it is needed: the lease (which ends with a transfer, and begins with an entry of the own term committed),
        and nothing committed that is not applied, for a follower may have applied and shown it already, or it may be a
        split that has taken keys away from this range.
        """
        machine, raft = self.machine, self.raft
        return machine is not None and raft.lease_valid(now_ns) and machine.applied_index >= raft.committed

    def age_us(self, now_ns: int) -> int | None:
        """By how much the applied state lags at most behind what is committed, in microseconds; None: nobody knows.

        For replicas that do not lead; those that do confirm their reads.
        """
        machine = self.machine
        age_ns = self.raft.age_ns(machine.applied_index, now_ns) if machine is not None else None
        return None if age_ns is None else -(-age_ns // 1_000)

    def await_read(self, read: WaitingRead) -> None:
        """Queue a read for the next ReadIndex request. Raises Busy."""
        if self.open_reads is None:
            self.open_reads = []
        if len(self.open_reads) >= WAITING_READS_MAX:
            raise Busy(f"{len(self.open_reads)} reads already wait for range {self.range_id}")
        self.open_reads.append(read)

    def take_open_reads(self, now_ns: int) -> bytes | None:
        """The context of a ReadIndex request to make now for every read that waits, or None.

        A read may join only a request that has not been made: its index is fixed when the leader takes it.
        """
        if not self.open_reads:
            return None
        if self.reads is None:
            self.reads = {}
        if len(self.reads) >= CONFIRMATIONS_MAX:
            return None
        number = max(self.read_number, now_ns)
        context = number.to_bytes(8, "big")
        self.read_number = number + 1
        self.reads[context] = (now_ns, self.open_reads)
        self.open_reads = None
        return context

    def expire_reads(self, before_ns: int) -> None:
        """Refuse the reads whose confirmation was asked for before a moment.

        It, or its answer, was lost; or what it says must be applied first does not come: this replica may be cut off.
        """
        if self.reads:
            for context in [context for context, (asked_ns, _) in self.reads.items() if asked_ns < before_ns]:
                for read in self.reads.pop(context)[1]:
                    read.requester.refuse(read.request_id, Busy("no quorum confirmed the read in time"))
        if self.confirmed:
            late = [batch for _, batch, asked_ns in self.confirmed if asked_ns < before_ns]
            self.confirmed = [waiting for waiting in self.confirmed if waiting[2] >= before_ns] or None
            for batch in late:
                for read in batch:
                    read.requester.refuse(read.request_id, Busy("what the read waits for did not come in time"))

    def confirm_reads(self, context: bytes, index: int) -> None:
        """A quorum has confirmed that this context's reads may be served at ``index`` or later."""
        asked = self.reads.pop(context, None) if self.reads else None
        if asked is None:
            return
        if self.confirmed is None:
            self.confirmed = []
        self.confirmed.append((index, asked[1], asked[0]))

    def serve_confirmed(self) -> None:
        """Serve the confirmed reads whose index is applied."""
        if not self.confirmed or self.machine is None:
            return
        applied = self.machine.applied_index
        ready = [batch for index, batch, _ in self.confirmed if index <= applied]
        if not ready:
            return
        self.confirmed = [waiting for waiting in self.confirmed if waiting[0] > applied] or None
        for batch in ready:
            for read in batch:
                try:
                    result = read.serve(self)
                except ShardKVError as error:
                    read.requester.refuse(read.request_id, error)
                else:
                    read.requester.answer(read.request_id, result)

    def abandon_reads(self, error: ShardKVError) -> None:
        """Refuse every read that waits; a change of leader or of the span makes their confirmations worthless."""
        batches = [batch for _, batch in self.reads.values()] if self.reads else []
        batches += [batch for _, batch, _ in self.confirmed or ()]
        batches.append(self.open_reads or [])
        self.reads = self.confirmed = self.open_reads = None
        for batch in batches:
            for read in batch:
                read.requester.refuse(read.request_id, error)

    def check(self) -> None:
        self.raft.check()
        total = sum(len(group.commands) for group in self.waiting)
        assert total == self.waiting_bytes, f"range {self.range_id}: {total} bytes wait, counted {self.waiting_bytes}"
        total = sum(len(group.decoded) for group in self.waiting)
        assert total == self.waiting_commands, f"{total} commands wait, counted {self.waiting_commands}"
        assert self.machine is not None or not self.proposals, f"range {self.range_id} proposes uninitialised"
        if self.machine is not None:
            self.machine.check()
            assert self.machine.range_id == self.range_id, f"{self.machine.range_id} in {self.range_id}"
            applied, committed = self.machine.applied_index, self.raft.committed
            assert applied <= committed, f"range {self.range_id}: applied {applied} of {committed} committed"
