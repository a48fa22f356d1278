"""The driver: one trio loop that carries out the turns of all groups of a node.

Lives here: when things happen. While a sync runs, acknowledgements, commits and applies go on, and what must be logged
collects; when it ends, all that has collected is proposed, appended as one record and synced once. Does not live here:
what a group wants (``turn``), who waits for it (``replica``), what is proposed (``proposer``), how replicas come to be
(``catalog``), how a record gets to the disk (``log_writer``), an entry into the engine (``applier``) and a message into
a frame (``outgoing``).

One turn steps in this order: propose what waits, take every ready group's work, hand the log record to the writer
thread and let it have the interpreter, send what may leave, apply what is committed, answer, flush the connections, and
write one engine batch.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final, Protocol

import trio

from shardkv.environment import Environment
from shardkv.errors import StorageError
from shardkv.machine.clock import HybridClock
from shardkv.multiraft.applier import Applier
from shardkv.multiraft.catalog import Catalog
from shardkv.multiraft.hedger import Hedger
from shardkv.multiraft.log_writer import LogWriter
from shardkv.multiraft.outgoing import Outgoing, Peers
from shardkv.multiraft.proposer import Proposer
from shardkv.multiraft.replica import GATHER_NS, Replica
from shardkv.multiraft.space import Space
from shardkv.multiraft.turn import Turn, gather
from shardkv.raft import Role
from shardkv.raft.messages import NONE, Message, MessageType
from shardkv.storage.engine import Engine
from shardkv.storage.wal import LogUpdate, Wal
from shardkv.types import PLACEMENT_RANGE, NodeId, RangeId

ROUNDS_PER_TURN_MAX: Final = 8
"""How often one turn goes round the ready groups before it lets the connections run again."""
CAMPAIGNS_MAX: Final = 20
_FOR_THE_LOG: Final = frozenset({MessageType.APP, MessageType.PROP, MessageType.SNAP, MessageType.VOTE})
"""What may leave something to be logged. The others' work is done as soon as it is there."""
ASKS_AGAIN_NS: Final = 1_000_000_000
ASKS_AGAIN_TICKS: Final = 3
"""A replica that waits for its data asks for them with every tick; one that has not for so long has them."""


class SnapshotService(Protocol):
    """Streams snapshots out, and installs the ones that came in."""

    def send(self, replica: Replica, message: Message) -> None: ...

    def install(self, replica: Replica, message: Message) -> None: ...

    def log_needed(self, range_id: RangeId, replica_id: int, held: int, applied: int) -> int | None:
        """After which index a replica that is being sent a snapshot, or was a moment ago, will need the log."""
        ...

    def receives(self, range_id: RangeId, replica_id: int) -> bool:
        """Whether a replica is being sent a snapshot, and some of it has arrived there."""
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
        space: Space | None = None,
    ) -> None:
        self.catalog = catalog
        self.wal = wal
        self.engine = engine
        self.environment = environment
        self.hybrid_clock = hybrid_clock
        self.peers = peers
        self._outgoing = Outgoing(peers)
        self.hooks = hooks
        self.snapshots: SnapshotService
        self._tick_seconds = tick_seconds
        self._read_expiry_ns = int(read_expiry_seconds * 1e9)
        self._awake = trio.Event()
        self._ready: dict[RangeId, Replica] = {}
        """Groups that may have work, in the order in which they got it."""
        self._eager: dict[RangeId, int] = {}
        """Groups that this node should lead before anybody's election timeout, and how often it still campaigns."""
        self._prompt = False
        """Groups were stepped that have work which need not wait for others'."""
        self._timed = False
        """:meth:`run` does not only wait to be woken, but also for the end of a time for gathering."""
        self._turning = False
        self.space = space or Space()
        """How much room there is; whoever takes writes asks it first."""
        self.log_writer = LogWriter(
            catalog,
            wal,
            environment,
            self.space,
            synced=self._synced,
            failed=self.fail,
            no_room=self._found_no_room,
        )
        self.hedger = Hedger(environment.clock, patience_seconds_max=tick_seconds, touch=self.touch)
        self.proposer = Proposer(
            self.log_writer,
            self.space,
            environment.clock,
            hybrid_clock,
            wake=self.wake,
            touch=self.touch,
            proposed=self.hedger.proposed,
        )
        self.applier = Applier(
            catalog,
            engine,
            self.space,
            environment.clock,
            hybrid_clock=hybrid_clock,
            flush=lambda: self.hooks.flush(),
            applied=self._applied,
            divided=self._divided,
            changed=lambda replica: self.hooks.descriptor(replica),
        )
        for replica in catalog.replicas.values():
            if replica.machine is not None:
                hybrid_clock.absorb(replica.machine.last_timestamp)
        self.failure: BaseException | None = None
        """What ends this node in a moment. Until then nobody reads: the engine may lack what was answered already."""
        self._turns = 0

    # What others call

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Service. Ends only by cancellation, or with the StorageError that makes this node unfit to go on."""
        proposer = self.proposer
        async with trio.open_nursery() as nursery:
            await self.log_writer.start(nursery)
            self.catalog.log = self.log_writer.append
            self.catalog.unreadable = self.fail
            self._campaign_for_own()
            nursery.start_soon(self._tick)
            nursery.start_soon(self.hedger.run)
            task_status.started()
            while True:
                awake = self._awake
                self._timed = proposer.gather_until_ns is not None
                if proposer.gather_until_ns is None:
                    await awake.wait()
                    if awake is not self._awake:
                        continue  # a turn elsewhere has set a time
                else:
                    left_ns = proposer.gather_until_ns - self.environment.clock.monotonic_ns()
                    with self.environment.clock.deadline(max(0, left_ns) / 1e9) as waiting:
                        await awake.wait()
                    if waiting.cancelled_caught:
                        proposer.gather_until_ns = None
                        if not proposer.groups:
                            continue  # none of those just answered has come back
                # Once round the loop: what has arrived meanwhile on other connections shares the turn and its sync.
                await trio.lowlevel.cancel_shielded_checkpoint()
                self._awake = trio.Event()
                self._try_turn()
                if self.failure is not None:
                    raise self.failure

    def wake(self) -> None:
        self._awake.set()

    def touch(self, replica: Replica) -> None:
        """A group was stepped: look at it in the next turn."""
        self._ready[replica.range_id] = replica
        self._awake.set()

    def step(self, replica: Replica, message: Message) -> None:
        """Hand a peer's message to its group. Once all that has come is handed over, :meth:`settle`."""
        # One that waits for its data can let go of nothing that it logs: it would fill the disk until there is no room
        # for the snapshot that ends its wait.
        crowded = self.space.full or (self.space.short and replica.needs_snapshot)
        if crowded and replica.range_id != PLACEMENT_RANGE:
            taken = self.space.taken(message)
            if taken is None:
                return  # as if it were lost: the leader tries again, and goes on with those that have room
            message = taken
        if replica.installing:
            return  # nothing leaves its group until it is done, so what this made ready would only pile up
        replica.raft.step(message, self.environment.clock.monotonic_ns())
        if replica.raft.has_ready():
            self._ready[replica.range_id] = replica
            if message.type in _FOR_THE_LOG:
                self._awake.set()
            else:
                self._prompt = True

    def settle(self) -> None:
        """All that has come from a peer has been stepped: do at once what followed from it, but what the log wants.

        A record is shared by all that comes within a round of the loop; an acknowledgement or a heartbeat has nothing
        to share, and another task's turn would cost two wakes more.
        """
        if self._prompt:
            self._prompt = False
            if not self._awake.is_set():  # else there is a turn soon, which takes this too
                self._turn_here()

    def doubt_node(self, node_id: NodeId) -> None:
        """The connections to a node broke: groups that it leads campaign as soon as their promise has run out, and
        those that are led here rely on others."""
        now = self.environment.clock.monotonic_ns()
        for replica in self.catalog.replicas.values():
            if replica.leads:
                for replica_id in replica.raft.configuration.voters:
                    if replica.node_of(replica_id) == node_id:
                        replica.raft.distrust(replica_id)
                        if replica.raft.has_ready():
                            self.touch(replica)
            elif replica.node_of(replica.raft.leader) == node_id:
                replica.raft.doubt(now)
                self.touch(replica)

    def snapshot_needed(self, range_id: RangeId, to: int, from_: int, sender: NodeId) -> None:
        """A replica whose install was interrupted asks this one, if it leads, for the snapshot again."""
        replica = self.catalog.replicas.get(range_id)
        if replica is None or replica.replica_id != to or replica.machine is None:
            return
        if from_ in replica.raft.status().progress:  # it is empty unless this replica leads
            replica.learn_node(from_, sender)
            asks_again_ns = max(ASKS_AGAIN_NS, ASKS_AGAIN_TICKS * round(self._tick_seconds * 1e9))
            replica.asked_for_data(from_, self.environment.clock.monotonic_ns() + asks_again_ns)
            self.snapshots.send(replica, Message(MessageType.SNAP, from_, to, replica.raft.term))

    def statistics(self) -> DriverStatistics:
        return DriverStatistics(self._turns, self.log_writer.syncs, self.applier.entries)

    # The turn

    def _turn(self) -> None:
        self._turning = True
        self._turns += 1
        if self.proposer.groups:
            for replica in self.proposer.propose():
                self._ready[replica.range_id] = replica
        self.applier.catch_up()
        for _ in range(ROUNDS_PER_TURN_MAX):
            if not self._ready:
                break
            ready, self._ready = self._ready, {}
            self._perform(gather(ready.values()))
        if self.applier.later_due:
            self.applier.apply_later()  # not before: others wait for what is acknowledged above
        self.log_writer.write()  # what waited for writes that were refused after all
        if self._ready:
            self._awake.set()
        self._turning = False
        self.peers.flush()
        self.hooks.flush()

    def _try_turn(self) -> None:
        """A turn, unless one has failed: what that applied and did not write would be missing below the next one's."""
        try:
            if self.failure is None:
                self._turn()
        except Exception as error:  # noqa: BLE001  # for :meth:`run`, which may not be the task that is in here
            self.failure = error

    def _turn_here(self) -> None:
        """A turn in the task that found the work: waking another costs more.

        What goes wrong in it is :meth:`run`'s, for this task is not to blame, and may forgive much.
        """
        self._try_turn()
        if self.failure is not None:
            self._awake.set()
        elif self.proposer.gather_until_ns is not None and not self._timed and not self._awake.is_set():
            # Not for a turn: another event stands for that from now on.
            awake, self._awake = self._awake, trio.Event()
            awake.set()

    def _perform(self, turn: Turn) -> None:
        log = self.log_writer
        log.add(turn)
        at_once = log.must_sync and log.at_once
        if not at_once:
            log.write()  # the sync runs while everything else is done
        if turn.messages:
            self._outgoing.messages(turn.messages)
        if at_once:
            self.peers.flush()  # what may leave before the sync does, so that others sync at the same time
            log.write(at_once=True)
            self.peers.flush()  # whoever waits for the record need not wait for what is applied
        for replica, message in turn.snapshots:
            self.snapshots.send(replica, message)
        for replica, message in turn.installs:
            self.snapshots.install(replica, message)
        if turn.applies:
            self.applier.apply(turn.applies)
        for replica in turn.confirmed:
            replica.serve_confirmed()
            if replica.confirmed and self.applier.later:
                self.applier.apply_later()
        for replica in turn.changed:
            self._role_changed(replica)

    # What follows from the log and from applying

    def _synced(self, appends: list[tuple[Replica, Message]]) -> None:
        """A turn's record is durable: deliver what waited for it."""
        now = self.environment.clock.monotonic_ns()
        outgoing: list[tuple[Replica, Message]] = []
        for replica, message in appends:
            self._deliver(replica, message.responses, now, outgoing)
        self._outgoing.messages(outgoing)
        if self._turning:
            return  # in the middle of a turn, which goes on with what this has made ready
        # Writes that have waited for this belong into the next record. Else what other leaders send, of which there may
        # always be some, would keep them out.
        proposes = self.proposer.may_propose(now)
        if not proposes:
            self.log_writer.write()
        if proposes or self._ready or self.proposer.worth_a_turn:
            self._awake.set()
        else:
            self.peers.flush()

    def _applied(self, replica: Replica, message: Message) -> None:
        """A group's entries are in the engine and answered."""
        outgoing: list[tuple[Replica, Message]] = []
        now = self.environment.clock.monotonic_ns()
        self._deliver(replica, message.responses, now, outgoing)
        assert not outgoing, f"an apply has responses for other replicas: {outgoing}"
        if replica.leads and not replica.proposals:
            self.hedger.committed(replica.answered_ns - replica.proposed_ns)
        if replica.confirmed:
            replica.serve_confirmed()
        if replica.waiting and replica.may_propose(now):
            self._awake.set()
        elif replica.expected and not replica.proposals and now < replica.answered_ns + GATHER_NS:
            # Set before they come: those just answered need not wake the loop one by one. For a single one there is
            # nobody to wait for.
            self.proposer.gather(replica)

    def _divided(self, left: Replica, right: Replica | None) -> None:
        if right is not None:
            if left.leads:
                self._eager[right.range_id] = CAMPAIGNS_MAX
            self.touch(right)

    def _deliver(
        self, replica: Replica, responses: Iterable[Message], now: int, outgoing: list[tuple[Replica, Message]]
    ) -> None:
        """Step a group's own responses; collect those for its peers."""
        if self.catalog.replicas.get(replica.range_id) is not replica:
            return
        for message in replica.raft.acknowledge(responses, now):
            outgoing.append((replica, message))
        if replica.raft.has_ready():
            self._ready[replica.range_id] = replica

    def fail(self, error: BaseException) -> None:
        """What the page cache holds after a failed write is unknown; only a restart from what is on disk is safe.

        A failed read ends the node too: it leads, or may, and has not what its followers lack.
        """
        self.failure = error if isinstance(error, StorageError) else StorageError(f"the log failed: {error!r}")
        self._awake.set()

    def _found_no_room(self) -> None:
        self.proposer.refuse_waiting()
        self._awake.set()  # for the turn that sends the refusals

    def log_snapshot(self, replica: Replica, update: LogUpdate, message: Message) -> None:
        """A snapshot is in the engine: log it, after which its group goes on."""

        def logged() -> None:
            replica.installing = False
            outgoing: list[tuple[Replica, Message]] = []
            self._deliver(replica, message.responses, self.environment.clock.monotonic_ns(), outgoing)
            self._outgoing.messages(outgoing)
            replica.serve_confirmed()  # what the snapshot brought is never applied
            self._awake.set()

        self.log_writer.append([update], logged)

    async def all_logged(self, replica: Replica) -> None:
        """Wait until the log has everything that this group, which is resting, wanted logged before."""
        while any(waiting is replica for waiting, _ in self.log_writer.appends):
            self.log_writer.write_all()
            await self.environment.clock.sleep(self._tick_seconds)

    # Roles and time

    def _role_changed(self, replica: Replica) -> None:
        if not replica.leads and (replica.led or replica.waiting or replica.proposals or replica.reads):
            replica.abandon()
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
                if replica.reads or replica.confirmed:
                    replica.expire_reads(expired)
                    wanted = True
                if replica.installing:
                    continue
                raft = replica.raft
                raft.tick(now)
                if replica.range_id in self._eager:
                    self._campaign(replica, now)
                if replica.needs_snapshot and raft.leader != NONE:
                    self._outgoing.snapshot_wanted(replica)
                    wanted = True
                if raft.has_ready():
                    self._ready[replica.range_id] = replica
            self.log_writer.tick()
            if self.applier.tick() or self.applier.held or wanted or self._ready or self.proposer.groups:
                self._turn_here()  # most ticks at rest find nothing to do

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
        if replica.raft.role is Role.CANDIDATE:
            return  # it waits for votes, its own too, to be on disk: another campaign would give this one up
        left = self._eager[replica.range_id] - 1
        if replica.raft.leader != NONE or not left:
            del self._eager[replica.range_id]
            return
        self._eager[replica.range_id] = left
        replica.raft.campaign(now)
