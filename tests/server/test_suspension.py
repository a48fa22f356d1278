"""A machine that is suspended between any two of a node's doings, and its lease (DESIGN 4.5; traps 6 and 7).

The node stands still at one of its calls of the world or readings of its clock: nothing that it has said leaves,
nothing reaches it, its timers and its disk wait, while time passes for everybody else and for its clock, which runs on
(CLOCK_BOOTTIME). Others are elected and write. Requests wait for it in its sockets; when it goes on, they come before
any word of its peers, so that only its clock can tell it.
"""

from contextlib import AsyncExitStack
from functools import partial
from typing import ClassVar

import trio

from shardkv.errors import ShardKVError
from shardkv.simulation import run_deterministically
from shardkv.simulation.clock import SimulationClock
from shardkv_client import Client, connect
from shardkv_client.core.settings import Settings
from tests.server.world import Cluster, SimulatedNode, world

POINTS = 24
SUSPENDED_SECONDS = 6.0
"""Far longer than a lease; others are elected, and the writer finds them."""
SHORTER_THAN_A_LEASE_SECONDS = 0.18
"""Promises last for 400 ms; the newest is at most a heartbeat's interval of 100 ms old."""
LATE_READS = 4
HASTY = Settings(ping_after_seconds=0.01, silence_seconds_max=0.02, dial_seconds=0.02)
PATIENT = Settings(silence_seconds_max=60, dial_seconds=60)
"""Of clients that wait for the node that is suspended, instead of asking another."""
AHEAD_SECONDS = 0.05
"""How much earlier than its peers' words the clients' requests reach a node that goes on."""


class Suspension:
    """One node's. It counts the node's calls in place of the node's own counter, and stops it at one of them."""

    of: ClassVar[dict[SimulationClock, "Suspension"]] = {}

    def __init__(self, cluster: Cluster, node: SimulatedNode, clients: tuple[str, ...]) -> None:
        self._cluster = cluster
        self._node = node
        self._clients = clients
        self.count = 0
        self.at: int | None = None
        self.stopped = trio.Event()
        self.resumed = trio.Event()
        self.resumed.set()
        self.frozen_ns: int | None = None
        environment = node.environment
        clock = environment.clock
        clock.__class__ = SuspendableClock
        self.of[clock] = self
        environment.disk.node_calls = clock.node_calls = environment.network.node_calls = self  # type: ignore[assignment]

    def hit(self) -> bool:
        """A call of the world, as ``Calls.hit``. It never crashes the node."""
        self.count += 1
        if self.at is not None and self.count >= self.at:
            self._stop()
        return False

    def arm(self, calls: int) -> None:
        """Stop at the ``calls``-th call from now."""
        self.at = self.count + calls
        self.stopped = trio.Event()

    def _stop(self) -> None:
        self.at = None
        environment = self._node.environment
        self.frozen_ns = SimulationClock.monotonic_ns(environment.clock)
        self.resumed = trio.Event()
        environment.disk.stall()
        for other in self._others():
            self._cluster.network.block(other, self._node.name)
            self._cluster.network.block(self._node.name, other)
        self.stopped.set()

    def _others(self) -> list[str]:
        return [*self._clients, *(name for name in self._cluster.nodes if name != self._node.name)]

    async def resume_after(self, seconds: float) -> None:
        await trio.sleep(seconds)
        await self.resume()

    async def resume(self) -> None:
        """Go on. What clients have sent is there first."""
        self.frozen_ns = None
        self._unblock(self._clients)
        await trio.sleep(AHEAD_SECONDS)
        self._unblock(self._cluster.nodes)
        self._node.environment.disk.resume()
        self.resumed.set()

    def _unblock(self, names: object) -> None:
        for other in self._others():
            if other in names:  # type: ignore[operator]
                self._cluster.network.unblock(other, self._node.name)
                self._cluster.network.unblock(self._node.name, other)


class SuspendableClock(SimulationClock):
    """A simulated node's clock, put in place of its own: its sleepers sleep on while it is suspended."""

    __slots__ = ()

    def monotonic_ns(self) -> int:
        suspension = Suspension.of[self]
        suspension.hit()
        if suspension.frozen_ns is not None:
            # Whatever still runs at the moment of the suspension runs before it.
            return suspension.frozen_ns
        return super().monotonic_ns()

    async def sleep(self, seconds: float) -> None:
        await super().sleep(seconds)
        await Suspension.of[self].resumed.wait()


class Readers:
    """Clients that read one key from each node all along, and what must not happen: an old value after a new one."""

    def __init__(self, key: bytes) -> None:
        self.key = key
        self.newest = 0
        self.served = 0
        self.overtaken = 0
        """How often a write was acknowledged by others while the leader was suspended."""
        self.done = trio.Event()

    async def read(self, kv: Client, *, once: bool = False) -> None:
        while not self.done.is_set():
            floor = self.newest
            try:
                entry = await kv.get(self.key, timeout=2 * SUSPENDED_SECONDS)
            except ShardKVError:
                continue
            assert entry is not None
            assert int(entry.value) >= floor, f"read {entry.value!r} after {floor} had been acknowledged"
            self.served += 1
            if once:
                return
            await trio.sleep(0.02)

    async def write(self, kv: Client) -> None:
        await kv.put(self.key, b"%d" % (self.newest + 1), timeout=10)
        self.newest += 1


async def suspended_at_each_of(points: int, seconds: float, *, transfer: bool, seed: int) -> Readers:
    """Suspend the leader at one call after the other, while everything goes on elsewhere."""
    async with world(3, seed=seed) as cluster, cluster.client() as kv, AsyncExitStack() as stack:
        readers = Readers(b"k")
        await readers.write(kv)
        near = []
        for settings in (PATIENT, PATIENT, PATIENT, HASTY):
            opened = connect(cluster.addresses, environment=cluster.client_environment(), settings=settings)
            near.append(await stack.enter_async_context(opened))
        writer = near.pop()
        machines = tuple(f"client{number}" for number in range(2, 7))
        suspensions = {name: Suspension(cluster, node, machines) for name, node in cluster.nodes.items()}
        async with trio.open_nursery() as nursery:
            for each in near:
                nursery.start_soon(readers.read, each)
            for point in range(1, points + 1):
                leader = await cluster.leader_of(kv, b"k")
                await trio.sleep(1.0)
                served = readers.served
                suspension = suspensions[leader.name]
                if transfer:
                    _transfer(leader)
                suspension.arm(point)
                await suspension.stopped.wait()
                nursery.start_soon(suspension.resume_after, seconds)
                await readers.write(writer)
                if suspension.frozen_ns is not None:
                    readers.overtaken += 1
                for each in near * LATE_READS:
                    nursery.start_soon(partial(readers.read, each, once=True))
                await suspension.resumed.wait()
                await trio.sleep(0.5)
                assert readers.served > served, "nobody was served"
            readers.done.set()
    return readers


def _transfer(leader: SimulatedNode) -> None:
    """Begin to hand the key's range over; the leader may be suspended before or after its word has left."""
    replica = leader.inside.catalog.replica_for_key(b"k")
    assert replica is not None
    others = [each for each in replica.raft.configuration.voters if each != replica.replica_id]
    replica.raft.transfer_leader(others[0])
    leader.inside.driver.touch(replica)


def run(points: int, seconds: float, *, transfer: bool, seed: int) -> Readers:
    found: list[Readers] = []

    async def main() -> None:
        found.append(await suspended_at_each_of(points, seconds, transfer=transfer, seed=seed))

    try:
        run_deterministically(main, seed=seed)
    finally:
        Suspension.of.clear()
    return found[0]


def test_trap_07_a_leader_suspended_at_any_point_serves_nothing_old_when_it_goes_on() -> None:
    """The clock is read after a request came in, so whatever was known before the suspension counts for nothing."""
    assert run(POINTS, SUSPENDED_SECONDS, transfer=False, seed=7).overtaken == POINTS


def test_trap_06_a_leader_suspended_in_the_middle_of_a_transfer_serves_nothing_old() -> None:
    """It goes on while the promises it had would still hold, but its TimeoutNow has bypassed them."""
    assert run(POINTS, SHORTER_THAN_A_LEASE_SECONDS, transfer=True, seed=6).overtaken > POINTS // 4
