"""Some nodes' multi-Raft parts without a server: catalog, driver, snapshots and maintenance over a simulated disk.

``async with world(3) as hosts`` gives one range with a voter on every node. The network between them is two hooks that
a test may set: ``hosts.passes`` decides about each Raft message, ``hosts.opens`` about each snapshot stream. Threads
can be held (``host.workers.hold_log()``), the engine can stall, and nodes crash in every way a disk allows.
"""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import structlog
import trio

from shardkv import codec
from shardkv.config import RaftConfig
from shardkv.environment import Environment
from shardkv.errors import ProtocolError, ShardKVError
from shardkv.machine.clock import HybridClock
from shardkv.machine.machine import INITIAL_INDEX, INITIAL_TERM, RangeMachine, conf_state_of
from shardkv.machine.reads import get
from shardkv.machine.snapshot import snapshot_rows
from shardkv.multiraft.catalog import Catalog, GroupTiming
from shardkv.multiraft.driver import Driver, DriverHooks
from shardkv.multiraft.maintenance import Maintenance
from shardkv.multiraft.replica import Replica, WaitingRead, WriteGroup
from shardkv.multiraft.snapshots import Snapshots
from shardkv.raft import Inconsistent
from shardkv.raft.messages import Message
from shardkv.ranges.split import plan_split
from shardkv.server.peers import receive_messages
from shardkv.simulation import CrashChooser, SimulatedDisk, SimulatedWorkers, SimulationClock
from shardkv.simulation.clock import SimulatedIds, SimulatedRandom
from shardkv.simulation.network import SimulatedNetwork
from shardkv.storage.directory import Note
from shardkv.storage.engine import WriteBatch
from shardkv.storage.memory import MemoryEngine
from shardkv.storage.wal import CreateGroup, LogUpdate, Wal, WalSettings
from shardkv.types import (
    EVERY_KEY,
    Epoch,
    KeyRange,
    Member,
    NodeId,
    RangeDescriptor,
    RangeId,
    ReplicaId,
    ReplicaRole,
)
from shardkv.wire import commands, raft_codec
from shardkv.wire.frames import FrameDecoder, FrameKind

RANGE = RangeId(1)
TICK_SECONDS = 0.05
ELECTION_TICKS = 10
PROMISE_NS = 400_000_000
WAIT_SECONDS = 10.0
SESSION = b"a session of 16."


class HeldWorkers(SimulatedWorkers):
    """Workers whose log thread, or whose other threads, a test can hold back."""

    def __init__(self, disk: SimulatedDisk, latency: Callable[[], float]) -> None:
        super().__init__(disk, latency)
        self.log_open = trio.Event()
        self.log_open.set()
        self.others_open = trio.Event()
        self.others_open.set()

    def hold_log(self) -> None:
        self.log_open = trio.Event()

    def hold_others(self) -> None:
        self.others_open = trio.Event()

    def release(self) -> None:
        self.log_open.set()
        self.others_open.set()

    async def run(self, function: Any, *args: Any) -> Any:
        await self.others_open.wait()
        return await super().run(function, *args)

    async def _drain(self, worker: Any) -> None:
        while worker.jobs:
            await self.log_open.wait()
            jobs = len(worker.jobs)
            await super()._drain(_First(worker, jobs))


class _First:
    """The jobs that a worker had when it last looked; what came since waits for the gate again."""

    def __init__(self, worker: Any, count: int) -> None:
        self.jobs = _Counted(worker.jobs, count)


class _Counted:
    def __init__(self, jobs: Any, count: int) -> None:
        self._jobs, self._count = jobs, count

    def __bool__(self) -> bool:
        return self._count > 0 and bool(self._jobs)

    def popleft(self) -> Any:
        self._count -= 1
        return self._jobs.popleft()

    def clear(self) -> None:
        self._jobs.clear()


class Answer:
    """A requester that remembers what it was told."""

    def __init__(self) -> None:
        self.result: Any = None
        self.error: ShardKVError | None = None
        self.count = 0
        self._arrived = trio.Event()

    def answer(self, request_id: int, result: Any) -> None:
        self.result = result
        self.count += 1
        self._arrived.set()

    def refuse(self, request_id: int, error: ShardKVError) -> None:
        self.error = error
        self.count += 1
        self._arrived.set()

    @property
    def arrived(self) -> bool:
        return self.count > 0

    async def wait(self) -> Any:
        with trio.fail_after(WAIT_SECONDS):
            await self._arrived.wait()
        if self.error is not None:
            raise self.error
        return self.result


class FakePeers:
    """The driver's way to others: frames go to the hosts' inboxes, unless the world's ``passes`` says no."""

    def __init__(self, host: "Host") -> None:
        self._host = host
        self.frames: list[tuple[NodeId, int]] = []
        """Every frame sent: to whom, and how many messages it held."""

    def send(self, node_id: NodeId, frame: bytes, *, urgent: bool) -> None:
        host = self._host
        assert node_id is not None, "a frame for nobody"
        ((kind, payload),) = FrameDecoder(64 << 20).feed(frame)
        assert kind is FrameKind.RAFT, kind
        messages = codec.loads(payload)
        self.frames.append((node_id, len(messages)))
        for item in messages:
            decoded = raft_codec.decode(raft_codec.join([codec.dumps(item)]))[0]
            if host.world.passes(host.node_id, node_id, decoded.range_id, decoded.message):
                host.world.post(host, node_id, codec.dumps(item))

    def flush(self) -> None:
        pass


class _Pipe:
    """One end of a snapshot stream in memory."""

    def __init__(self, out: Any, into: Any) -> None:
        self._out, self._into = out, into

    async def send(self, message: list[Any]) -> None:
        await self._out.send(codec.dumps(message))

    async def receive(self) -> list[Any]:
        try:
            received: list[Any] = codec.loads(await self._into.receive())
        except trio.EndOfChannel:
            raise ProtocolError("the other side went away") from None
        return received

    async def aclose(self) -> None:
        await self._out.aclose()
        await self._into.aclose()


class Host:
    """One node: started, crashed and looked into by tests."""

    def __init__(self, world: "Hosts", node_id: int) -> None:
        self.world = world
        self.node_id = NodeId(node_id)
        self.disk = SimulatedDisk()
        self.engine = MemoryEngine(crashable=True)
        self.clock = SimulationClock()
        self.incarnation = 0
        self.alive = False
        self.descriptors: list[RangeDescriptor] = []
        """Of every call of the descriptor hook."""
        self.error: BaseException | None = None

    def prepare(self) -> None:
        """Everything up to the point where the services start."""
        self.workers = HeldWorkers(self.disk, lambda: 0.0002)
        self.environment = Environment(
            clock=self.clock,
            random=SimulatedRandom(self.world.seed, self.node_id, self.incarnation),
            ids=SimulatedIds(self.world.seed, self.node_id, self.incarnation),
            disk=self.disk,
            workers=self.workers,
            network=SimulatedNetwork(0).node(f"n{self.node_id}"),
        )
        self.wal = Wal.open(self.disk, "/wal", WalSettings(segment_bytes=64 * 1024))
        self.hybrid_clock = HybridClock(self.clock)
        timing = GroupTiming(ELECTION_TICKS, 2, PROMISE_NS, RaftConfig().spare_entries_max)
        note = Note(self.disk, "/promise", bytes(16), "")
        self.catalog = Catalog(self.node_id, self.wal, self.engine, self.environment, timing, lambda _: None, note)
        self.peers = FakePeers(self)
        hooks = DriverHooks(
            leadership=lambda replica: None,
            descriptor=lambda replica: self.descriptors.append(replica.machine.descriptor),  # type: ignore[union-attr]
            flush=lambda: None,
        )
        self.driver = Driver(
            self.catalog,
            self.wal,
            self.engine,
            self.environment,
            self.hybrid_clock,
            self.peers,
            hooks,
            tick_seconds=TICK_SECONDS,
            read_expiry_seconds=1.0,
        )
        log = structlog.get_logger()
        self.snapshots = Snapshots(self.driver, self.environment, "/ingest", self._dial, log=log)
        self.driver.snapshots = self.snapshots
        self.maintenance = Maintenance(self.driver, self.environment, log)

    def begin(self, descriptor: RangeDescriptor, *, rows: dict[bytes, bytes] | None = None) -> None:
        """Give this node its replica of a range that exists from the beginning."""
        member = descriptor.replica_on(self.node_id)
        if member is None:
            return
        batch = WriteBatch()
        RangeMachine.create(descriptor).write(batch)
        for key, value in (rows or {}).items():
            batch.put(key, value)
        self.engine.write(batch)
        self.engine.flush()
        create = CreateGroup(member.replica_id, INITIAL_INDEX, INITIAL_TERM, conf_state_of(descriptor))
        self.wal.append([LogUpdate(descriptor.range_id, create=create)])()

    async def start(self) -> None:
        if self.incarnation or not hasattr(self, "wal"):
            self.prepare()
        self.catalog.recover()
        self.scope = trio.CancelScope()
        self.inbox: list[tuple[NodeId, bytes]] = []
        self.inbox_filled = trio.Event()
        self.ended = trio.Event()
        self.error = None
        await self.world.nursery.start(self._run)
        self.alive = True

    async def _run(self, *, task_status: trio.TaskStatus[None]) -> None:
        try:
            with self.scope:
                async with trio.open_nursery() as nursery:
                    self.nursery = nursery
                    await nursery.start(self.driver.run)
                    self.snapshots.use(nursery)
                    nursery.start_soon(self._receive)
                    task_status.started()
        except Exception as error:
            self.error = error
            if not self.world.tolerant:
                raise
        finally:
            self.alive = False
            self.ended.set()

    async def _receive(self) -> None:
        while True:
            await self.inbox_filled.wait()
            self.inbox_filled = trio.Event()
            await trio.sleep(0.0003)
            inbox, self.inbox = self.inbox, []
            for sender, item in inbox:
                frame_payload = raft_codec.join([item])
                frame = FrameDecoder().feed(_frame(frame_payload))[0]
                receive_messages(self.driver, sender, frame, _must_not_contradict)
            self.driver.settle()

    @asynccontextmanager
    async def _dial(self, node_id: NodeId) -> AsyncIterator[Any]:
        target = self.world[node_id]
        if not target.alive or not self.world.opens(self.node_id, node_id):
            raise OSError("nobody answers")
        there, here = trio.open_memory_channel[bytes](4), trio.open_memory_channel[bytes](4)
        mine, theirs = _Pipe(there[0], here[1]), _Pipe(here[0], there[1])
        target.serve_snapshot(theirs, self.node_id)
        try:
            yield mine
        finally:
            await mine.aclose()

    def serve_snapshot(self, pipe: _Pipe, sender: NodeId) -> None:
        async def serve() -> None:
            try:
                await self.snapshots.receive(pipe, sender)
            except (ShardKVError, trio.BrokenResourceError, trio.ClosedResourceError) as error:
                self.world.stream_errors.append(error)
            finally:
                with trio.CancelScope(shield=True):
                    await pipe.aclose()

        self.nursery.start_soon(serve)

    async def crash(
        self,
        *,
        power: bool = False,
        kept_batches: Callable[[int], int] = lambda count: 0,
        chooser: CrashChooser | None = None,
    ) -> None:
        """``kill -9``, or with ``power`` the loss of what was not synced; the engine keeps some of what it held."""
        self.disk.fence()
        self.workers.fence()
        if power:
            self.disk.crash(chooser)
        else:
            self.disk.kill()
        self.engine = self.engine.crash(kept_batches)
        self.scope.cancel()
        with trio.fail_after(WAIT_SECONDS):
            await self.ended.wait()
        self.disk = self.disk.restart()
        self.incarnation += 1

    async def restart(self, **how: Any) -> None:
        await self.crash(**how)
        await self.start()

    # Looking into it

    def replica(self, range_id: int = RANGE) -> Replica:
        return self.catalog.replicas[RangeId(range_id)]

    def machine(self, range_id: int = RANGE) -> RangeMachine:
        machine = self.replica(range_id).machine
        assert machine is not None, f"range {range_id} is not initialised on node {self.node_id}"
        return machine

    def value(self, key: bytes, range_id: int = RANGE) -> bytes | None:
        found = get(self.machine(range_id), self.engine, [key])[0]
        return None if found is None else found[0]

    def rows(self, range_id: int = RANGE) -> dict[bytes, bytes]:
        """The range's rows as a snapshot would hold them, without the configuration of its own replica."""
        return dict(snapshot_rows(self.engine, self.machine(range_id).descriptor))

    def check(self) -> None:
        self.catalog.check()
        for replica in self.catalog.replicas.values():
            replica.check()
        self.wal.check()

    # Asking it

    def read(self, key: bytes, range_id: int = RANGE) -> Answer:
        """A linearizable read by ReadIndex, lease or not."""
        answer = Answer()
        replica = self.replica(range_id)
        generation = self.machine(range_id).descriptor.epoch.span

        def serve(which: Replica) -> Any:
            found = get(which.check_route(generation), self.engine, [key])[0]
            return None if found is None else found[0]

        replica.await_read(WaitingRead(answer, 0, serve))
        self.driver.proposer.later(replica)
        return answer

    def put(self, key: bytes, value: bytes, range_id: int = RANGE, *, if_version: int | None = None) -> Answer:
        return self.send(self.world.command(commands.Op.PUT, commands.pack_put(key, value, if_version)), range_id)

    def send(self, data: bytes, range_id: int = RANGE) -> Answer:
        """A write request's commands, as a client made them; sent again they are a retry."""
        answer = Answer()
        replica = self.replica(range_id)
        replica.enqueue(WriteGroup(answer, 0, SESSION, data, commands.decode(data)))
        self.driver.proposer.later(replica)
        return answer

    def split(self, key: bytes, right: int, *, range_id: int = RANGE, first_replica: int = 100) -> Answer:
        machine = self.machine(range_id)
        ids = {member.node_id: ReplicaId(first_replica + member.node_id) for member in machine.descriptor.replicas}
        answer = Answer()
        self.driver.proposer.split(
            self.replica(range_id), plan_split(machine.descriptor, key, RangeId(right), ids), answer, 0
        )
        return answer


def _must_not_contradict(range_id: RangeId, error: Inconsistent) -> None:
    raise AssertionError(f"range {range_id}: {error}")


def _frame(payload: bytes) -> bytes:
    from shardkv.wire.frames import encode_frame

    return encode_frame(FrameKind.RAFT, payload)


class Hosts(dict[int, Host]):
    """All nodes, by id."""

    def __init__(self, nursery: trio.Nursery, seed: int) -> None:
        super().__init__()
        self.nursery = nursery
        self.seed = seed
        self.tolerant = False
        """Whether a node that ends with an error is a part of the test; else it ends the test."""
        self.sequence = 0
        self.stream_errors: list[BaseException] = []
        self.down: set[tuple[int, int]] = set()
        self.passes: Callable[[int, int, int, Message], bool] = lambda source, target, range_id, message: True
        self.opens: Callable[[int, int], bool] = lambda source, target: True

    def command(self, op: int, body: bytes) -> bytes:
        self.sequence += 1
        issued = next(iter(self.values())).clock.wall_ms()
        return commands.join([commands.seal(op, body, self.sequence, issued, max(1, self.sequence - 900))])

    def post(self, source: Host, target: NodeId, item: bytes) -> None:
        host = self.get(target)
        if host is not None and host.alive and (source.node_id, target) not in self.down:
            host.inbox.append((source.node_id, item))
            host.inbox_filled.set()

    def isolate(self, node_id: int) -> None:
        for other in self:
            self.down |= {(node_id, other), (other, node_id)}

    def heal(self) -> None:
        self.down.clear()

    def leader(self, range_id: int = RANGE) -> Host:
        """The node that leads a range in the highest term."""
        led = [
            (replica.raft.term, host.node_id)
            for host in self.values()
            if host.alive
            and (replica := host.catalog.replicas.get(RangeId(range_id))) is not None
            and replica.leads
            and replica.raft.committed_in_term
        ]
        assert led, f"range {range_id} has no leader"
        return self[max(led)[1]]

    def relied_on(self) -> Host:
        """The follower whose acknowledgement the range's leader waits for, of three."""
        replica = self.leader().replica()
        node_id = replica.node_of(replica.raft.raft.preferred[0])
        assert node_id is not None, "the descriptor names every voter"
        return self[node_id]

    def follower(self) -> Host:
        """The first node that does not lead the range."""
        return next(host for host in self.values() if not host.replica().leads)

    async def until(self, wanted: Callable[[], Any], what: str = "it", seconds: float = WAIT_SECONDS) -> None:
        with trio.move_on_after(seconds):
            while not wanted():  # noqa: ASYNC110
                await trio.sleep(0.01)
        assert wanted(), f"{what} did not come about in {seconds} s"

    async def led(self, range_id: int = RANGE) -> Host:
        """Wait for a leader."""

        def has() -> bool:
            try:
                self.leader(range_id)
            except AssertionError:
                return False
            return True

        await self.until(has, f"a leader of range {range_id}")
        return self.leader(range_id)

    async def write(self, key: bytes, value: bytes, range_id: int = RANGE) -> None:
        """Put through whoever leads, until it is acknowledged."""
        with trio.fail_after(WAIT_SECONDS):
            while True:
                host = await self.led(range_id)
                try:
                    (outcomes,) = [await host.put(key, value, range_id).wait()]
                    assert isinstance(outcomes[0], int), outcomes
                    return
                except ShardKVError:
                    await trio.sleep(0.05)

    async def agreed(self, range_id: int = RANGE) -> None:
        """Wait until every live replica has applied all that its leader has committed; their rows are then the same."""

        def same() -> bool:
            replicas = [
                replica
                for host in self.values()
                if host.alive and (replica := host.catalog.replicas.get(RangeId(range_id))) is not None
            ]
            indexes = {replica.machine.applied_index if replica.machine else None for replica in replicas}
            led = any(replica.leads and replica.raft.committed_in_term for replica in replicas)
            return led and indexes == {max(replica.raft.committed for replica in replicas)}

        await self.until(same, "the same applied index everywhere")
        rows = [
            host.rows(range_id) for host in self.values() if host.alive and RangeId(range_id) in host.catalog.replicas
        ]
        assert all(each == rows[0] for each in rows), "replicas differ at the same applied index"

    async def commit_handed_out(self, host: "Host") -> None:
        """Wait for the tick with which a group's commit index is handed out that nothing else has come after."""
        await self.until(lambda: host.driver.log_writer.appends, "a tick")

    async def restart_all(self, kept_batches: Callable[[int], int]) -> None:
        """Every node loses power at once."""
        for host in self.values():
            await host.crash(power=True, kept_batches=kept_batches)
        for host in self.values():
            await host.start()
        await self.led()

    def check(self) -> None:
        for host in self.values():
            if host.alive:
                host.check()


def descriptor_on(
    nodes: int, *, range_id: int = RANGE, span: KeyRange = EVERY_KEY, first_replica: int = 0, learners: int = 0
) -> RangeDescriptor:
    """A range with replica ``first_replica + n`` on node ``n``; the last ``learners`` of them are learners."""
    return RangeDescriptor(
        RangeId(range_id),
        span,
        Epoch(1, 1),
        tuple(
            Member(
                NodeId(node),
                ReplicaId(first_replica + node),
                ReplicaRole.LEARNER if node > nodes - learners else ReplicaRole.VOTER,
            )
            for node in range(1, nodes + 1)
        ),
    )


@asynccontextmanager
async def world(
    nodes: int = 3, *, replicas: int | None = None, seed: int = 1, learners: int = 0, started: bool = True
) -> AsyncIterator[Hosts]:
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(50))
    async with trio.open_nursery() as nursery:
        hosts = Hosts(nursery, seed)
        descriptor = descriptor_on(nodes if replicas is None else replicas, learners=learners)
        for node_id in range(1, nodes + 1):
            host = hosts[node_id] = Host(hosts, node_id)
            host.prepare()
            host.begin(descriptor)
        if started:
            for host in hosts.values():
                await host.start()
            await hosts.led()
        try:
            yield hosts
            if started:
                hosts.check()
        finally:
            for host in hosts.values():
                host.workers.release()  # else a node that is cancelled would wait for its log thread for ever
        nursery.cancel_scope.cancel()
