"""The driver: one trio loop that carries out the turns of all groups of a node.

Lives here: when things happen. While a sync runs, acknowledgements, commits and applies go on, and what must be logged
collects; when it ends, all that has collected is proposed, appended as one record and synced once. Does not live here:
what a group wants (``turn``), who waits for it (``replica``), how replicas come and go (``catalog``).

One turn steps in this order: propose what waits, take every ready group's work, hand the log record to the writer
thread and let it have the interpreter, send what may leave, apply what is committed as one engine batch, answer, and
flush each connection once.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

import trio

from shardkv.environment import Environment, SerialWorker
from shardkv.errors import Busy, EpochMismatch, NotLeader, OutOfSpace, RequestError, ShardKVError, StorageError
from shardkv.machine.clock import HybridClock
from shardkv.machine.entries import encode_split_entry
from shardkv.machine.machine import SplitResult
from shardkv.machine.split import SplitCommand
from shardkv.multiraft.catalog import Catalog
from shardkv.multiraft.replica import GATHER_NS, Proposal, Replica, Requester
from shardkv.multiraft.space import Space
from shardkv.multiraft.turn import Turn, gather, log_update
from shardkv.raft import InvalidConfChange, ProposalDropped, decode_conf_change
from shardkv.raft.messages import NONE, ConfChange, Entry, EntryType, Message, MessageType
from shardkv.storage.engine import BATCH_KEYS_MAX, Engine, WriteBatch
from shardkv.storage.wal import LogUpdate, Wal
from shardkv.types import PLACEMENT_RANGE, NodeId, RangeId
from shardkv.wire import raft_codec
from shardkv.wire.frames import FrameKind, encode_frame
from shardkv.wire.raft_codec import MESSAGES_PER_FRAME_MAX, ReplicaNotice

ROUNDS_PER_TURN_MAX: Final = 8
"""How often one turn goes round the ready groups before it lets the connections run again."""
CAMPAIGNS_MAX: Final = 20
FULL_DISK_RETRY_TICKS: Final = 10
"""How long a log write that found no room waits until it is tried again."""
DECODED_BYTES_MAX: Final = 256 * 1024
"""Up to this size an entry is kept decoded until it is applied; a larger one would be in memory twice for little."""
APPLIES_LATER_MAX: Final = 16
APPLIES_LATER_BYTES: Final = 256 * 1024
"""Nobody waits for what a follower applies: so much of it, of all groups together, may wait for company, until the next
tick at the latest. Writing to the engine costs nearly the same for one entry as for several."""
PEER_FRAME_BYTES: Final = 4 * 1024 * 1024
"""A turn's messages for one peer are cut into frames of about this size."""

_URGENT: Final = frozenset(
    {
        MessageType.HEARTBEAT,
        MessageType.HEARTBEAT_RESP,
        MessageType.VOTE,
        MessageType.VOTE_RESP,
        MessageType.PRE_VOTE,
        MessageType.PRE_VOTE_RESP,
        MessageType.TIMEOUT_NOW,
    }
)


class Peers(Protocol):
    """How frames reach other nodes. Never waits; what cannot be sent is dropped, as Raft allows."""

    def send(self, node_id: NodeId, frame: bytes, *, urgent: bool) -> None: ...

    def flush(self) -> None: ...


class SnapshotService(Protocol):
    """Streams snapshots out, and installs the ones that came in."""

    def send(self, replica: Replica, message: Message) -> None: ...

    def install(self, replica: Replica, message: Message) -> None: ...

    def log_needed(self, range_id: RangeId, replica_id: int) -> int | None:
        """After which index a replica that is being sent a snapshot, or was a moment ago, will need the log."""
        ...


@dataclass(frozen=True, slots=True)
class DriverHooks:
    """What the layer above wants to hear of. Called in the loop; must return at once."""

    leadership: Callable[[Replica], None]
    """A replica's role, or the leader it follows, changed."""
    descriptor: Callable[[Replica], None]
    """A replica's descriptor changed, or the replica is new."""
    flush: Callable[[], None]
    """Answers may stand in the connections' buffers."""


@dataclass(frozen=True, slots=True)
class DriverStatistics:
    """A frozen snapshot of what the driver has done since it started."""

    turns: int
    syncs: int
    entries_applied: int


class Driver:
    """Runs the groups in ``catalog``. Everything but :meth:`run` is called in the loop and returns at once."""

    def __init__(
        self,
        catalog: Catalog,
        wal: Wal,
        engine: Engine,
        environment: Environment,
        hybrid_clock: HybridClock,
        peers: Peers,
        hooks: DriverHooks,
        *,
        tick_seconds: float,
        read_expiry_seconds: float,
    ) -> None:
        self.catalog = catalog
        self.wal = wal
        self.engine = engine
        self.environment = environment
        self.hybrid_clock = hybrid_clock
        self.peers = peers
        self.hooks = hooks
        self.snapshots: SnapshotService
        self._tick_seconds = tick_seconds
        self._read_expiry_ns = int(read_expiry_seconds * 1e9)
        self._writer: SerialWorker
        self._awake = trio.Event()
        self._ready: dict[RangeId, Replica] = {}
        """Groups that may have work, in the order in which they got it."""
        self._proposing: dict[RangeId, Replica] = {}
        """Groups with writes or reads that wait for the next turn."""
        self._gather_until_ns: int | None = None
        """When to look again at writes that wait only for more of their kind."""
        self._appends: list[tuple[Replica, Message]] = []
        """Log appends that wait for the sync under way to end, or for one that is worth a sync."""
        self._must_sync = False
        """Whether somebody waits for one of ``_appends``."""
        self._held: list[tuple[Replica, Message]] = []
        """Committed entries that wait for the engine to take writes again."""
        self._later: list[tuple[Replica, Message]] = []
        """Committed entries of followers that wait for company, in the order in which they must be applied."""
        self._later_bytes = 0
        self._later_due = False
        """A tick has passed over ``_later``."""
        self._eager: dict[RangeId, int] = {}
        """Groups that this node should lead before anybody's election timeout, and how often it still campaigns."""
        self._syncing = False
        self._turning = False
        self._roomless: list[tuple[Callable[[], object], Callable[[object, BaseException | None], None]]] = []
        """Jobs of the log thread that found no room, in their order. Nobody was told of what they were to write."""
        self._roomless_ticks = 0
        self.space = Space()
        """How much room there is; whoever takes writes asks it first."""
        self._failure: BaseException | None = None
        self._turns = self._syncs = self._entries_applied = 0
        self._sync_began_ns = self._sync_ns_max = self._loop_sync_ns = 0

    # What others call

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Service. Ends only by cancellation, or with the StorageError that makes this node unfit to go on."""
        async with trio.open_nursery() as nursery:
            self._writer = await nursery.start(self.environment.workers.serial, "log-writer")
            self.catalog.log = self.append_now
            self.catalog.unreadable = self.fail
            self._campaign_for_own()
            nursery.start_soon(self._tick)
            task_status.started()
            while True:
                if self._gather_until_ns is None:
                    await self._awake.wait()
                else:
                    left_ns = self._gather_until_ns - self.environment.clock.monotonic_ns()
                    with self.environment.clock.deadline(max(0, left_ns) / 1e9):
                        await self._awake.wait()
                self._awake = trio.Event()
                if self._failure is None:
                    self._turn()
                if self._failure is not None:
                    raise self._failure

    def wake(self) -> None:
        self._awake.set()

    def touch(self, replica: Replica) -> None:
        """A group was stepped: look at it in the next turn."""
        self._ready[replica.range_id] = replica
        self._awake.set()

    def propose_later(self, replica: Replica) -> None:
        """A group has writes or reads waiting."""
        self._proposing[replica.range_id] = replica
        self._awake.set()

    def step(self, replica: Replica, message: Message) -> None:
        """Hand a peer's message to its group."""
        if self.space.full and replica.range_id != PLACEMENT_RANGE and not self.space.takes(message):
            return  # as if it were lost: the leader tries again, and goes on with those that have room
        replica.raft.step(message, self.environment.clock.monotonic_ns())
        if replica.raft.has_ready():
            self.touch(replica)

    def run_in_log_thread(
        self, job: Callable[[], object], done: Callable[[object, BaseException | None], None]
    ) -> None:
        """Queue a job behind the log writes, in their thread."""
        self._submit(job, done)

    def _submit(
        self, job: Callable[[], object], done: Callable[[object, BaseException | None], None], *, at_once: bool = False
    ) -> None:
        def ended(result: object, error: BaseException | None) -> None:
            if isinstance(error, OutOfSpace):
                self._found_no_room(job, done, error)
            else:
                done(result, error)

        try:
            if not (at_once and self._writer.run_now(job, ended)):
                self._writer.submit(job, ended)
        except trio.ClosedResourceError:
            # The node is stopping: nobody waits for this any more, and closing the log writes what it has taken.
            return

    def _found_no_room(
        self,
        job: Callable[[], object],
        done: Callable[[object, BaseException | None], None],
        error: OutOfSpace,
    ) -> None:
        """Keep a log job for later. Writes that only wait to be proposed are refused, for that may take long."""
        self._roomless.append((job, done))
        self._roomless_ticks = FULL_DISK_RETRY_TICKS
        self.space.failed("log", error)
        for replica in self._proposing.values():
            replica.refuse_waiting(self.space.refusal())
        self._awake.set()

    def _try_for_room(self) -> None:
        """Try again, now and then, what found no room in the log."""
        self._roomless_ticks -= 1
        if self._roomless_ticks <= 0:
            jobs, self._roomless = self._roomless, []
            self.space.succeeded("log")  # unless one of them fails again
            for job, done in jobs:
                self._submit(job, done)

    def propose_split(self, replica: Replica, split: SplitCommand, requester: Requester, request_id: int) -> None:
        """Raises NotLeader or Busy."""
        assert replica.machine is not None, f"a split of range {replica.range_id}, which is not initialised"
        self._propose_entry(replica, encode_split_entry(split, self.hybrid_clock.now()), ((requester, request_id),))

    def propose_extension(self, replica: Replica, command: Any, requester: Requester, request_id: int) -> None:
        """Propose a command of the range's extension. Raises NotLeader or Busy."""
        assert replica.machine is not None, f"a command for range {replica.range_id}, which is not initialised"
        data = replica.machine.encode_extension_entry(command, self.hybrid_clock.now())
        self._propose_entry(replica, data, ((requester, request_id),))

    def propose_membership(self, replica: Replica, change: ConfChange, requester: Requester, request_id: int) -> None:
        """Propose a change of the replica set. Raises NotLeader or Busy."""
        if not replica.leads:
            raise replica.not_leader()
        try:
            term, index = replica.raft.propose_conf_change(change)
        except ProposalDropped as dropped:
            raise _refusal(replica, dropped) from dropped
        replica.proposals[index] = Proposal(term, ((requester, request_id),))
        self.touch(replica)

    def doubt_node(self, node_id: NodeId) -> None:
        """The connections to a node broke: groups that it leads campaign as soon as their promise has run out."""
        now = self.environment.clock.monotonic_ns()
        for replica in self.catalog.replicas.values():
            leader = replica.raft.leader
            if leader != NONE and not replica.leads and replica.node_of(leader) == node_id:
                replica.raft.doubt(now)
                self.touch(replica)

    def snapshot_needed(self, range_id: RangeId, to: int, from_: int, sender: NodeId) -> None:
        """A replica whose install was interrupted asks this one, if it leads, for the snapshot again."""
        replica = self.catalog.replicas.get(range_id)
        if replica is None or replica.replica_id != to or not replica.leads or replica.machine is None:
            return
        if from_ in replica.raft.status().progress:
            replica.learn_node(from_, sender)
            self.snapshots.send(replica, Message(MessageType.SNAP, from_, to, replica.raft.term))

    def slowest_sync_ns(self, now: int) -> int:
        """The longest that a sync took which ended since this was last asked, or that the one under way takes so far.

        From the moment when the record was handed to the log's thread, so what else it does there counts, too.
        """
        slowest, self._sync_ns_max = self._sync_ns_max, 0
        return max(slowest, now - self._sync_began_ns) if self._syncing else slowest

    def loop_sync_ns(self) -> int:
        """For how long syncs have held up the loop since this was last asked."""
        held, self._loop_sync_ns = self._loop_sync_ns, 0
        return held

    def statistics(self) -> DriverStatistics:
        return DriverStatistics(self._turns, self._syncs, self._entries_applied)

    # The turn

    def _turn(self) -> None:
        self._turning = True
        self._turns += 1
        if self._proposing:
            self._propose()
        if self._held and not self.engine.stalled():
            held, self._held = self._held, []
            self._apply(held)
        if self._later_due:
            self._apply_later()
        for _ in range(ROUNDS_PER_TURN_MAX):
            if not self._ready:
                break
            ready, self._ready = self._ready, {}
            turn, unfinished = gather(ready.values())
            for replica in unfinished:
                self._ready[replica.range_id] = replica
            self._perform(turn)
        if self._ready:
            self._awake.set()
        self._turning = False
        self.peers.flush()
        self.hooks.flush()

    def _perform(self, turn: Turn) -> None:
        if turn.appends:
            self._appends += turn.appends
            self._must_sync = self._must_sync or turn.must_sync
        at_once = self._writer.at_once
        if not at_once:
            self._log()  # the sync runs while everything else is done
        if turn.messages:
            self._send(turn.messages)
        if at_once and self._must_sync:
            self.peers.flush()  # what may leave before the sync does, so that others sync at the same time
            self._log(at_once=True)
        for replica, message in turn.snapshots:
            self.snapshots.send(replica, message)
        for replica, message in turn.installs:
            self.snapshots.install(replica, message)
        if turn.applies:
            self._apply_now_or_later(turn.applies)
        for replica in turn.confirmed:
            replica.serve_confirmed()
            if replica.confirmed and self._later:
                self._apply_later()
        for replica in turn.changed:
            self._role_changed(replica)

    def _propose(self) -> None:
        """Step the waiting reads, and, unless a sync is running, the waiting writes."""
        proposing, self._proposing = self._proposing, {}
        now = self.environment.clock.monotonic_ns()
        gather_until = None
        for replica in proposing.values():
            context = replica.take_open_reads(now)
            if context is not None:
                replica.raft.read_index(context)
                self._ready[replica.range_id] = replica
            if replica.waiting and not self._syncing:
                if replica.may_propose(now):
                    replica.proposed_ns = now
                    self._propose_writes(replica)
                    self._ready[replica.range_id] = replica
                elif not replica.proposals:
                    until = replica.answered_ns + GATHER_NS
                    gather_until = until if gather_until is None else min(gather_until, until)
            if replica.waiting or replica.open_reads:
                self._proposing[replica.range_id] = replica
        self._gather_until_ns = gather_until

    def _propose_writes(self, replica: Replica) -> None:
        machine = replica.machine
        assert machine is not None, f"writes wait for range {replica.range_id}, which is not initialised"
        while replica.waiting:
            groups = replica.take_waiting()
            timestamp = self.hybrid_clock.now()
            data, decoded = machine.encode_write_entry(
                [(group.session, group.commands, group.decoded) for group in groups], timestamp
            )
            waiting = tuple([(group.requester, group.request_id) for group in groups])
            commands = sum([len(group.decoded) for group in groups])
            try:
                term, index = replica.raft.propose(data)
            except ProposalDropped as dropped:
                error = _refusal(replica, dropped)
                for requester, request_id in waiting:
                    requester.refuse(request_id, error)
            else:
                kept = decoded if len(data) <= DECODED_BYTES_MAX else None
                replica.proposals[index] = Proposal(term, waiting, commands, kept)

    def _propose_entry(self, replica: Replica, data: bytes, waiting: tuple[tuple[Requester, int], ...]) -> None:
        if not replica.leads:
            raise replica.not_leader()
        try:
            term, index = replica.raft.propose(data)
        except ProposalDropped as dropped:
            raise _refusal(replica, dropped) from dropped
        replica.proposals[index] = Proposal(term, waiting)
        self.touch(replica)

    # Log

    def _log(self, *, at_once: bool = False) -> None:
        """Hand everything that waits to be logged to the writer thread, as one record, unless a sync is running.

        With ``at_once`` the record is written and synced here, if the disk is quick.
        """
        if self._syncing or not self._must_sync:
            return
        self._must_sync = False
        # A replica that was replaced meanwhile has left its term and vote to its successor, whose log this is now.
        current = self.catalog.replicas.get
        appends = [item for item in self._appends if current(item[0].range_id) is item[0]]
        self._appends = []
        if not appends:
            return
        updates = [log_update(replica, message) for replica, message in appends]
        self._syncing = True
        self._sync_began_ns = self.environment.clock.monotonic_ns()
        self._syncs += 1
        self._submit(self.wal.append(updates), lambda _, error: self._synced(appends, error), at_once=at_once)
        self.environment.workers.yield_interpreter()

    def _synced(self, appends: list[tuple[Replica, Message]], error: BaseException | None) -> None:
        """The record is durable: deliver what waited for it."""
        self._syncing = False
        if error is not None:
            self.fail(error)
            return
        now = self.environment.clock.monotonic_ns()
        took = now - self._sync_began_ns
        if took > self._sync_ns_max:
            self._sync_ns_max = took
        outgoing: list[tuple[Replica, Message]] = []
        for replica, message in appends:
            self._deliver(replica, message.responses, now, outgoing)
        self._send(outgoing)
        if self._turning:
            # In the middle of a turn, which goes on with what this has made ready.
            self._loop_sync_ns += took
            return
        self._log()
        if self._ready or self._proposing:
            self._awake.set()
        else:
            self.peers.flush()

    def _deliver(
        self, replica: Replica, responses: Iterable[Message], now: int, outgoing: list[tuple[Replica, Message]]
    ) -> None:
        """Step a group's own responses; collect those for its peers."""
        if self.catalog.replicas.get(replica.range_id) is not replica:
            return
        own = replica.replica_id
        for response in responses:
            if response.to == own:
                replica.raft.step(response, now)
            else:
                outgoing.append((replica, response))
        if replica.raft.has_ready():
            self._ready[replica.range_id] = replica

    def append_now(self, updates: Sequence[LogUpdate]) -> None:
        """Log what no message waits for (creations, compactions), in order with everything else."""

        def logged(_: object, error: BaseException | None) -> None:
            if error is not None:
                self.fail(error)

        self._submit(self.wal.append(updates), logged)

    def fail(self, error: BaseException) -> None:
        """What the page cache holds after a failed write is unknown; only a restart from what is on disk is safe.

        A failed read ends the node too: it leads, or may, and has not what its followers lack.
        """
        self._failure = error if isinstance(error, StorageError) else StorageError(f"the log failed: {error!r}")
        self._awake.set()

    def log_snapshot(self, replica: Replica, update: LogUpdate, message: Message) -> None:
        """A snapshot is in the engine: log it, after which its group goes on."""

        def logged(_: object, error: BaseException | None) -> None:
            if error is not None:
                self.fail(error)
                return
            replica.installing = False
            outgoing: list[tuple[Replica, Message]] = []
            self._deliver(replica, message.responses, self.environment.clock.monotonic_ns(), outgoing)
            self._send(outgoing)
            self._awake.set()

        self._submit(self.wal.append([update]), logged)

    def log_all(self) -> None:
        """Log also what nobody waits for: how much is committed, as far as only memory knows it."""
        self._must_sync = bool(self._appends)
        self._log()

    async def settled(self, replica: Replica) -> None:
        """Wait until the log has everything that this group, which is resting, wanted logged before."""
        while any(waiting is replica for waiting, _ in self._appends):
            self.log_all()
            await self.environment.clock.sleep(self._tick_seconds)

    # Messages

    def _send(self, messages: list[tuple[Replica, Message]]) -> None:
        """One frame per peer for everything in ``messages``, urgent ones apart."""
        frames: dict[tuple[NodeId, bool], list[bytes]] = {}
        entries: tuple[Entry, ...] = ()
        encoded_entries = raft_codec.encode_entries(entries)
        for replica, message in messages:
            node_id = replica.node_of(message.to)
            if node_id is None:
                continue
            key = (node_id, message.type in _URGENT)
            if message.entries != entries:
                # Followers are sent the same entries one after the other.
                entries = message.entries
                encoded_entries = raft_codec.encode_entries(entries)
            encoded = raft_codec.encode_message(replica.range_id, message, encoded_entries)
            parts = frames.get(key)
            if parts is None:
                frames[key] = [encoded]
            else:
                parts.append(encoded)
        for (node_id, urgent), parts in frames.items():
            for piece in _pieces(parts):
                self.peers.send(node_id, encode_frame(FrameKind.RAFT, raft_codec.join(piece)), urgent=urgent)

    # Apply

    def _apply_now_or_later(self, applies: list[tuple[Replica, Message]]) -> None:
        """Apply what somebody waits for, and whatever waits before it; let the rest wait for company."""
        later = self._later
        later += applies
        wanted = len(later) >= APPLIES_LATER_MAX
        for replica, message in applies:
            # A leader answers when it has applied, a read waits for it, and before a change of its members is applied
            # a replica does not campaign.
            wanted = wanted or replica.leads or bool(replica.confirmed)
            for entry in message.entries:
                self._later_bytes += len(entry.data)
                wanted = wanted or entry.type is not EntryType.NORMAL
        if wanted or self._later_bytes >= APPLIES_LATER_BYTES:
            self._apply_later()

    def _apply_later(self) -> None:
        later, self._later, self._later_bytes, self._later_due = self._later, [], 0, False
        self._apply(later)

    def _apply(self, applies: list[tuple[Replica, Message]]) -> None:
        """Apply committed entries of all groups in as few engine batches as the bound allows, then answer."""
        if self._held or self.engine.stalled():
            self._held += applies
            return
        batch = WriteBatch()
        answers: list[tuple[Proposal, Any]] = []
        answered: dict[Replica, int] = {}
        touched: dict[RangeId, Replica] = {}
        for replica, message in applies:
            machine = replica.machine
            if machine is None or self.catalog.replicas.get(replica.range_id) is not replica:
                # It has ended, or waits for the snapshot that alone can give it state.
                continue
            touched[replica.range_id] = replica
            for entry in message.entries:
                if entry.index <= machine.applied_index:
                    continue  # held back until a snapshot had brought it
                proposal = replica.proposals.pop(entry.index, None) if replica.proposals else None
                if proposal is not None and proposal.term != entry.term:
                    _refuse(proposal, replica.not_leader())
                    proposal = None
                outcome = self._apply_entry(replica, entry.type, entry, batch, proposal)
                if proposal is not None:
                    answers.append((proposal, outcome))
                    answered[replica] = answered.get(replica, 0) + proposal.commands
                if len(batch) >= BATCH_KEYS_MAX:
                    batch = self._write(batch, touched)
                    touched = {replica.range_id: replica}
        self._write(batch, touched)
        for proposal, outcome in answers:
            _answer(proposal, outcome)
        now = self.environment.clock.monotonic_ns()
        for replica, count in answered.items():
            replica.answered(count, now)
        outgoing: list[tuple[Replica, Message]] = []
        for replica, message in applies:
            if replica.machine is None and not replica.installing:
                continue
            # An install that goes on has made these entries void; unacknowledged they would stay under way for ever.
            self._deliver(replica, message.responses, now, outgoing)
            if replica.confirmed:
                replica.serve_confirmed()
            if replica.waiting:
                self._awake.set()
        assert not outgoing, f"an apply has responses for other replicas: {outgoing}"

    def _write(self, batch: WriteBatch, touched: dict[RangeId, Replica]) -> WriteBatch:
        """Write a batch together with the applied state of every range in it; the next, empty batch."""
        for replica in touched.values():
            if replica.machine is not None:
                replica.machine.finish(batch)
        if batch:
            self.engine.write(batch)
        return WriteBatch()

    def _apply_entry(
        self, replica: Replica, kind: EntryType, entry: Any, batch: WriteBatch, proposal: Proposal | None
    ) -> Any:
        """Apply one entry; its outcome for the proposer: a list with one item for each that waits, or an error."""
        machine = replica.machine
        assert machine is not None, f"range {replica.range_id} applies {entry.index} without a machine"
        self._entries_applied += 1
        if kind is not EntryType.NORMAL:
            change = decode_conf_change(entry.data)
            try:
                conf_state = replica.raft.apply_conf_change(change)
            except InvalidConfChange as error:
                # Every replica comes to the same: the entry is applied, and changes nothing.
                machine.apply(entry.index, entry.term, b"", batch, self.engine)
                return RequestError(f"the membership change does not fit the range: {error}")
            machine.apply_conf_change(entry.index, entry.term, change.context, conf_state, batch)
            self.hooks.descriptor(replica)
            return [machine.descriptor.to_wire()]
        decoded = proposal.decoded if proposal is not None else None
        applied = machine.apply(entry.index, entry.term, entry.data, batch, self.engine, decoded)
        if applied.split is not None:
            self._split(replica, applied.split, batch)
        if proposal is not None:
            # An answer carries a stamp no lower than the versions in it.
            self.hybrid_clock.observe(machine.last_timestamp)
        return applied.outcomes

    def _split(self, left: Replica, split: SplitResult, batch: WriteBatch) -> None:
        """A split was applied: the right half's replica comes to be.

        Writes that wait are proposed all the same: applying answers each command by its record, or by where its key
        is now. Reads that wait were confirmed, if at all, for a range that is no more.
        """
        right = self.catalog.split(left, split, batch)
        left.abandon_reads(EpochMismatch(current=(split.left, split.right)))
        self.hooks.descriptor(left)
        if right is not None:
            self.hooks.descriptor(right)
            if left.leads:
                self._eager[right.range_id] = CAMPAIGNS_MAX
            self.touch(right)

    # Roles and time

    def _role_changed(self, replica: Replica) -> None:
        if not replica.leads and (replica.led or replica.waiting or replica.proposals or replica.reads):
            replica.abandon(replica.not_leader())
        replica.led = replica.leads
        self.hooks.leadership(replica)

    async def _tick(self) -> None:
        clock = self.environment.clock
        while True:
            await clock.sleep(self._tick_seconds)
            now = clock.monotonic_ns()
            expired = now - self._read_expiry_ns
            wanted = False
            for replica in self.catalog.replicas.values():
                if replica.installing:
                    continue
                raft = replica.raft
                raft.tick(now)
                if replica.range_id in self._eager:
                    self._campaign(replica, now)
                if replica.reads:
                    replica.expire_reads(expired)
                    wanted = True
                if replica.needs_snapshot and raft.leader != NONE:
                    self._ask_for_snapshot(replica)
                    wanted = True
                if raft.has_ready():
                    self._ready[replica.range_id] = replica
            if self._roomless:
                self._try_for_room()
                wanted = True
            self._later_due = bool(self._later)
            if wanted or self._ready or self._later or self._held or self._proposing:
                self._awake.set()  # most ticks of a node at rest find nothing to do

    def _ask_for_snapshot(self, replica: Replica) -> None:
        leader = replica.raft.leader
        node_id = replica.node_of(leader)
        if node_id is not None:
            notice = raft_codec.encode_notice(replica.range_id, ReplicaNotice.NEED_SNAPSHOT, leader, replica.replica_id)
            self.peers.send(node_id, encode_frame(FrameKind.RAFT, raft_codec.join([notice])), urgent=False)

    def _campaign_for_own(self) -> None:
        """After a start, let one voter of each group campaign at once, a different one for different ranges.

        When all nodes start together nobody then waits for an election timeout; where a leader lives, the pre-vote
        fails and nothing is disturbed.
        """
        for range_id, replica in self.catalog.replicas.items():
            voters = sorted(replica.raft.configuration.voters)
            if voters and voters[range_id % len(voters)] == replica.replica_id:
                self._eager[range_id] = CAMPAIGNS_MAX

    def _campaign(self, replica: Replica, now: int) -> None:
        """Campaign for an eager group. The others may need a moment to hear of it, or to start; hence several tries.

        After a split it is the left half's leader that is eager for the right half: the data are here, and it is awake.
        """
        left = self._eager[replica.range_id] - 1
        if replica.raft.leader != NONE or not left:
            del self._eager[replica.range_id]
            return
        self._eager[replica.range_id] = left
        replica.raft.campaign(now)


def _pieces(parts: list[bytes]) -> Iterable[list[bytes]]:
    """Encoded messages cut into frames' worth."""
    if len(parts) <= MESSAGES_PER_FRAME_MAX and sum(map(len, parts)) <= PEER_FRAME_BYTES:
        yield parts
        return
    piece: list[bytes] = []
    size = 0
    for part in parts:
        if piece and (size + len(part) > PEER_FRAME_BYTES or len(piece) >= MESSAGES_PER_FRAME_MAX):
            yield piece
            piece, size = [], 0
        piece.append(part)
        size += len(part)
    yield piece


def _refusal(replica: Replica, dropped: ProposalDropped) -> ShardKVError:
    if not replica.leads:
        return replica.not_leader()
    return Busy(f"range {replica.range_id} takes no proposal now: {dropped.reason.value}")


def _refuse(proposal: Proposal, error: NotLeader) -> None:
    for requester, request_id in proposal.waiting:
        requester.refuse(request_id, error)


def _answer(proposal: Proposal, outcomes: Any) -> None:
    if isinstance(outcomes, ShardKVError):
        for requester, request_id in proposal.waiting:
            requester.refuse(request_id, outcomes)
        return
    for (requester, request_id), outcome in zip(proposal.waiting, outcomes, strict=True):
        if isinstance(outcome, ShardKVError):
            requester.refuse(request_id, outcome)
        else:
            requester.answer(request_id, outcome)
