"""The faults of a run, drawn from its seed: which, when, to whom, how hard.

Lives here: every kind of fault by name, and the plan that lets them come and go. Does not live here: what breaks
(``disk``, ``network``, ``clock``, ``node``). The rules: faults may come in any number and any combination, to any
number of nodes at once; what they may not do is what no database survives, and that is said where it is left out.
"""

from collections.abc import Awaitable, Callable, Iterable
from typing import Final

import trio

from shardkv.errors import Corruption, OutOfSpace, ShardKVError, StorageError
from shardkv.simulation import determinism
from shardkv.simulation.checkers.violation import Violation
from shardkv.simulation.cluster import Cluster
from shardkv.simulation.crash_choosers import ChooseAtRandom
from shardkv.simulation.disk import CAPACITY_BYTES, OPERATIONS
from shardkv.simulation.node import SimulatedNode
from shardkv.simulation.sequences import SEQUENCES
from shardkv.wire.requests import Method

OFFSET_MS_MAX: Final = 200
"""How far a clock is stepped as a rule: two nodes stay within the offset that the database allows for."""
JUMP_MS_MAX: Final = 3_600_000
JUMPS: Final = 0.2
"""The share of steps that are jumps of the wall clock instead, far out of that offset."""
DRIFT_MAX: Final = 0.004
WALL_DRIFT_MS_MAX: Final = 40
CALLS_AHEAD_MAX: Final = 400
"""A crash at a numbered call comes within so many."""
DOWN_SECONDS_MAX: Final = 4.0
ADMIN_SECONDS: Final = 3.0
ADMIN_SECONDS_MAX: Final = 3 * ADMIN_SECONDS
"""Of two calls, one after the other, clocks that drift included."""
FLIPPING_READS_MAX: Final = 12
FLUSH_SECONDS_MAX: Final = 2.0
FAIL_SECONDS_MAX: Final = 8.0
PAUSE_SECONDS: Final = (0.05, 0.5, 2.0, 6.0)

Fault = Callable[["Faults", SimulatedNode, SimulatedNode], Awaitable[None]]


class Faults:
    """The plan of one run.

    Args:
        names: the kinds that may come, of :data:`KINDS`.
        keys: somewhere in the key space, for splits and transfers.
    """

    def __init__(self, cluster: Cluster, seed: int | str, names: Iterable[str], keys: Callable[[], bytes]) -> None:
        self.cluster = cluster
        self.chance = determinism.seeded_random("faults", seed)
        self.names = [name for name in KINDS if name in set(names)]
        self.keys = keys
        self.history: list[str] = []
        """What was done, in words, with the moment."""
        self.count = 0
        self.healing = False
        self.growing = False
        """Not every node has joined, or some range has not all its replicas. Sequences, which know who can do without
        whom, wait until it has."""
        self.slow_disks: set[str] = set()
        """The nodes whose disks are slow now."""
        self._suspects: dict[str, float] = {}
        """Nodes whose disks lied or were full, and until when that may show."""
        self._pause_seconds = self.chance.choice([0.1, 0.3, 0.8])
        # Every kind may come, but not in every run as often: what one fault shows, another may hide.
        self._weights = [self.chance.choice([0.1, 1, 1, 1, 5]) for _ in self.names]
        cluster.tolerates = self._tolerates

    def _tolerates(self, node: SimulatedNode, error: Exception) -> bool:
        """Nodes end by themselves only with a StorageError, and only after their disk failed them."""
        expected = isinstance(error, StorageError) and self.cluster.now < self._suspects.get(node.name, 0.0)
        if expected:
            self.note(f"{node.name} ended: {type(error).__name__}")
            self.cluster.nursery.start_soon(self.restart_later, node)
        return expected

    def note(self, what: str) -> None:
        self.history.append(f"{self.cluster.now:.3f} {what}")
        if self.cluster.trace is not None:
            self.cluster.trace.record("fault", what)

    def suspect(self, node: SimulatedNode, seconds: float) -> None:
        self._suspects[node.name] = max(self._suspects.get(node.name, 0.0), self.cluster.now + seconds)

    async def run(self, seconds: float) -> None:
        """Let faults come and go, with calm between them."""
        end = self.cluster.now + seconds
        calm_at = self.cluster.now + self.chance.uniform(5, 30)
        while self.names and self.cluster.now < end:
            await determinism.sleep(min(self.chance.expovariate(1 / self._pause_seconds), end - self.cluster.now))
            if self.cluster.now > calm_at:
                self.note("calm")
                self.cluster.heal()
                await determinism.sleep(self.chance.uniform(1, 4))
                calm_at = self.cluster.now + self.chance.uniform(5, 30)
            await self.one()
        if not self.names:
            await determinism.sleep(seconds)

    async def one(self) -> None:
        """One fault, drawn."""
        nodes = list(self.cluster.nodes.values())
        one, two = self.chance.sample(nodes, 2) if len(nodes) > 1 else (nodes[0], nodes[0])
        name = self.chance.choices(self.names, self._weights)[0]
        if self.growing and name in SEQUENCES:
            return
        self.count += 1
        self.note(f"{name} {one.name} {two.name}")
        await KINDS[name](self, one, two)

    def kept(self, count: int) -> int:
        """How many of ``count`` unflushed engine batches survive a crash."""
        return self.chance.choice([0, count, self.chance.randint(0, count)])

    async def restart_later(self, node: SimulatedNode) -> None:
        await determinism.sleep(self.chance.uniform(0, DOWN_SECONDS_MAX) * self.chance.random())
        await node.buried()
        node.start_soon()

    async def restart_once_crashed(self, node: SimulatedNode, starts: int, look_seconds: float) -> None:
        """After a crash that was armed in the node's start number ``starts``, unless it never comes."""
        while node.alive and node.starts == starts and node.environment.calls.armed:
            await determinism.sleep(look_seconds)
        if not node.alive:
            await self.restart_later(node)

    def soon(self, function: Callable[..., Awaitable[object]], *args: object) -> None:
        self.cluster.nursery.start_soon(self._run, function, args)

    async def _run(self, function: Callable[..., Awaitable[object]], args: tuple[object, ...]) -> None:
        await function(*args)

    async def heal_for_good(self) -> None:
        """No fault any more."""
        self.healing = True
        self.note("healed for good")
        self.cluster.heal()


# The network


async def _partition(faults: Faults, one: SimulatedNode, two: SimulatedNode) -> None:
    names = list(faults.cluster.nodes)
    faults.cluster.partition([one.name], [name for name in names if name != one.name])


async def _one_way(faults: Faults, one: SimulatedNode, two: SimulatedNode) -> None:
    if one is not two:
        faults.cluster.network.block(one.name, two.name)


async def _drop(faults: Faults, one: SimulatedNode, two: SimulatedNode) -> None:
    faults.cluster.network.drop(one.name, two.name)


async def _cut(faults: Faults, one: SimulatedNode, two: SimulatedNode) -> None:
    faults.cluster.network.cut_after(one.name, two.name, faults.chance.randrange(20_000))


async def _slow(faults: Faults, one: SimulatedNode, two: SimulatedNode) -> None:
    link = faults.cluster.network.link(one.name, two.name)
    link.delay_seconds_max = faults.chance.choice([0.02, 0.2, 0.6])
    link.bytes_per_second = faults.chance.choice([None, 1_000_000.0, 20_000.0])


async def _loss(faults: Faults, one: SimulatedNode, two: SimulatedNode) -> None:
    faults.cluster.network.link(one.name, two.name).loss_probability = faults.chance.choice([0.01, 0.1, 0.4])


async def _duplicate(faults: Faults, one: SimulatedNode, two: SimulatedNode) -> None:
    """New connections are needed for it: the old ones are reset."""
    faults.cluster.network.link(one.name, two.name).duplicate_probability = faults.chance.choice([0.05, 0.5])
    faults.cluster.network.drop(one.name, two.name)


async def _reorder(faults: Faults, one: SimulatedNode, two: SimulatedNode) -> None:
    faults.cluster.network.link(one.name, two.name).reorder_probability = faults.chance.choice([0.05, 0.3])
    faults.cluster.network.drop(one.name, two.name)


async def _clients(faults: Faults, one: SimulatedNode, two: SimulatedNode) -> None:
    """Between a node and its clients, or one of them, nothing or not everything gets through, or not at once."""
    network, chance = faults.cluster.network, faults.chance
    names = {stream.owner.name for stream in network.streams.values() if stream.incoming.source == one.name}
    clients = sorted(names - set(faults.cluster.nodes))
    what = chance.choice(["cut off", "hears nothing", "is not heard", "slow", "loss", "cut"])
    if clients and chance.random() < 0.5:
        clients = [chance.choice(clients)]
    for name in clients:
        if what in ("cut off", "hears nothing"):
            network.block(one.name, name)
        if what in ("cut off", "is not heard"):
            network.block(name, one.name)
        for link in (network.link(one.name, name), network.link(name, one.name)):
            if what == "slow":
                link.delay_seconds_max = chance.choice([0.02, 0.2, 0.6])
                link.bytes_per_second = chance.choice([None, 1_000_000.0, 20_000.0])
            elif what == "loss":
                link.loss_probability = chance.choice([0.01, 0.1, 0.4])
            elif what == "cut":
                link.cut_after_bytes = chance.randrange(2_000)


async def _heal(faults: Faults, one: SimulatedNode, two: SimulatedNode) -> None:
    faults.cluster.network.heal()
    faults.cluster.network.restore_links()


# Crashes


async def _kill(faults: Faults, one: SimulatedNode, two: SimulatedNode) -> None:
    if one.alive:
        await one.kill(kept_batches=faults.kept)
    faults.soon(faults.restart_later, one)


async def _power(faults: Faults, one: SimulatedNode, two: SimulatedNode) -> None:
    if one.alive:
        await one.power_off(kept_batches=faults.kept, chooser=ChooseAtRandom(faults.chance))
    faults.soon(faults.restart_later, one)


async def _call(faults: Faults, one: SimulatedNode, two: SimulatedNode) -> None:
    """A crash inside one of the next calls of disk, network or sleep."""
    if not one.alive:
        return
    number = one.environment.calls.count + faults.chance.randint(1, CALLS_AHEAD_MAX)
    power = faults.chance.random() < 0.5
    starts = one.starts
    one.crash_at_call(number, power=power, kept_batches=faults.kept, chooser=ChooseAtRandom(faults.chance))
    faults.soon(faults.restart_once_crashed, one, starts, 0.05)


async def _stop(faults: Faults, one: SimulatedNode, two: SimulatedNode) -> None:
    if one.serving:
        with determinism.deadline_after(20):
            await one.shut_down()
    faults.soon(faults.restart_later, one)


async def _pause(faults: Faults, one: SimulatedNode, two: SimulatedNode) -> None:
    """A node does nothing for a while, as under SIGSTOP, or on a machine that has no processor for it."""
    if one.paused:
        return
    one.pause()
    seconds = faults.chance.choice(PAUSE_SECONDS) * faults.chance.random()
    starts = one.starts

    async def resume() -> None:
        await determinism.sleep(seconds)
        if one.starts == starts:
            one.resume()

    faults.soon(resume)


async def _everything(faults: Faults, one: SimulatedNode, two: SimulatedNode) -> None:
    """The power of the whole place goes, once in a while."""
    if faults.chance.random() < 0.8:
        return
    for each in faults.cluster.nodes.values():
        if each.alive:
            await each.power_off(kept_batches=faults.kept, chooser=ChooseAtRandom(faults.chance))
    for each in faults.cluster.nodes.values():
        await each.buried()
        each.start_soon()


# Disks


async def _stall(faults: Faults, one: SimulatedNode, two: SimulatedNode) -> None:
    disk = one.environment.disk
    disk.stall()
    seconds = faults.chance.choice([0.05, 0.5, 1.5, 4.0]) * faults.chance.random()

    async def resume() -> None:
        await determinism.sleep(seconds)
        disk.resume()

    faults.soon(resume)


async def _full(faults: Faults, one: SimulatedNode, two: SimulatedNode) -> None:
    """Somebody else fills the disk, and makes room again."""
    disk = one.environment.disk
    seconds = faults.chance.uniform(0.2, 4)
    faults.suspect(one, seconds + 5)
    disk.leave(faults.chance.choice([0, 5_000, 300_000]))

    async def make_room() -> None:
        await determinism.sleep(seconds)
        for each in (disk, one.environment.disk):
            each.capacity_bytes = CAPACITY_BYTES

    faults.soon(make_room)


async def _flip(faults: Faults, one: SimulatedNode, two: SimulatedNode) -> None:
    """A bit of what the disk hands out is not what was written; read again it may be right.

    Of a node that is down it is the next start that reads so, its log included.
    """
    disk = one.environment.disk
    faults.suspect(one, 8)
    left = faults.chance.randint(1, FLIPPING_READS_MAX)
    chance = faults.chance

    def flip(path: str, found: bytes) -> bytes:
        nonlocal left
        if not found or not left:
            return found
        left -= 1
        if chance.random() < 0.5:
            return found
        faults.suspect(one, 8)
        position = chance.randrange(len(found))
        return found[:position] + bytes([found[position] ^ (1 << chance.randrange(8))]) + found[position + 1 :]

    disk.on_read = flip


async def _fail(faults: Faults, one: SimulatedNode, two: SimulatedNode) -> None:
    """Some call of the disk fails, and the node ends; a sync that failed has made nothing durable, now or later.

    Of a node that is down it may be the next start that meets it.
    """
    operation = faults.chance.choice([*sorted(OPERATIONS), "sync", "sync", "sync"])
    faults.suspect(one, FAIL_SECONDS_MAX)
    disk = one.environment.disk
    disk.fail(operation, StorageError(f"cannot {operation}: Input/output error"), skip=faults.chance.randrange(8))

    async def mend() -> None:
        await determinism.sleep(FAIL_SECONDS_MAX - 1)
        disk.mend()

    faults.soon(mend)


# Clocks


async def _drift(faults: Faults, one: SimulatedNode, two: SimulatedNode) -> None:
    one.environment.clock.wall_drift_ms_max = WALL_DRIFT_MS_MAX
    one.environment.clock.set_drift(faults.chance.uniform(-DRIFT_MAX, DRIFT_MAX))


async def _step(faults: Faults, one: SimulatedNode, two: SimulatedNode) -> None:
    offset_ms_max = JUMP_MS_MAX if faults.chance.random() < JUMPS else OFFSET_MS_MAX
    one.environment.clock.wall_offset_ms = faults.chance.randrange(-offset_ms_max, offset_ms_max)


# What operators do


async def _admin(faults: Faults, what: str, where: float) -> None:
    cluster, key = faults.cluster, faults.keys()
    began = cluster.now
    with determinism.deadline_after(ADMIN_SECONDS_MAX):
        await _asked(cluster, key, what, where)
    if cluster.now - began >= ADMIN_SECONDS_MAX:
        raise Violation("every-call-ends", f"a {what} at {key!r} has no answer {ADMIN_SECONDS_MAX:g} s later")


async def _asked(cluster: Cluster, key: bytes, what: str, where: float) -> None:
    try:
        async with cluster.client() as kv:
            ((descriptor, _),) = await kv.call(Method.ROUTES, key, 1, timeout=ADMIN_SECONDS)
            range_id = descriptor[0]
            if what == "split":
                await kv.call(Method.SPLIT, key, key=key, timeout=ADMIN_SECONDS)
            else:
                nodes = [each[0] for each in descriptor[5]]
                target = nodes[int(where * len(nodes))]
                await kv.call(Method.TRANSFER, range_id, target, range_id=range_id, timeout=ADMIN_SECONDS)
    except (ShardKVError, ValueError):
        pass


async def _split(faults: Faults, one: SimulatedNode, two: SimulatedNode) -> None:
    faults.soon(_admin, faults, "split", faults.chance.random())


async def _transfer(faults: Faults, one: SimulatedNode, two: SimulatedNode) -> None:
    faults.soon(_admin, faults, "transfer", faults.chance.random())


async def _flush(faults: Faults, one: SimulatedNode, two: SimulatedNode) -> None:
    """Engines are flushed and logs compacted: who is behind needs a snapshot now."""
    for node in faults.cluster.nodes.values():
        if node.serving and not node.paused:
            faults.soon(flush_one, node)


async def flush_one(node: SimulatedNode) -> None:
    """Flush a node's engine and compact its log, as far as the node can. One that dies meanwhile never comes to it."""
    inside = node.inside
    try:
        with determinism.deadline_after(FLUSH_SECONDS_MAX):
            await inside.maintenance.flush_and_compact()
    except (ShardKVError, trio.ClosedResourceError, Corruption, OutOfSpace):
        pass


KINDS: Final[dict[str, Fault]] = {
    "partition": _partition,
    "one-way": _one_way,
    "drop": _drop,
    "cut": _cut,
    "slow": _slow,
    "loss": _loss,
    "duplicate": _duplicate,
    "reorder": _reorder,
    "clients": _clients,
    "heal": _heal,
    "kill": _kill,
    "power": _power,
    "call": _call,
    "stop": _stop,
    "pause": _pause,
    "everything": _everything,
    "stall": _stall,
    "full": _full,
    "flip": _flip,
    "fail": _fail,
    "drift": _drift,
    "step": _step,
    "split": _split,
    "transfer": _transfer,
    "flush": _flush,
    **SEQUENCES,
}
"""By the name that ``--faults`` takes."""
