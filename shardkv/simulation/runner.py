"""One run from its seed: a safety phase under any faults, a liveness phase on a healed quorum, and then the verdict.

Lives here: the order of a run, and what it comes to. Does not live here: faults, clients, checkers. The rule: a run is
a function of its settings; nothing of the machine, the process or the time of day gets in.
"""

import gc
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import Final

import trio

from shardkv.config import StorageConfig
from shardkv.environment import Clock
from shardkv.errors import ShardKVError
from shardkv.multiraft.snapshot_parts import Pace
from shardkv.program import leaf, leaves_of
from shardkv.server.parts import Parts
from shardkv.simulation import determinism
from shardkv.simulation.checkers.linearizability import Operation
from shardkv.simulation.checkers.violation import Violation
from shardkv.simulation.cluster import Cluster, simulated_cluster
from shardkv.simulation.faults import KINDS, Faults
from shardkv.simulation.node import SimulatedNode
from shardkv.simulation.observing import Observing, apart
from shardkv.simulation.trace import Lines, Trace
from shardkv.simulation.workload import CALL_SECONDS, CLIENTS, COUNTERS, LEDGERS, REGISTERS, WORKLOADS, Workload
from shardkv_client import Client

LIVENESS_SECONDS_MAX: Final = 10.0
"""From the moment when a quorum is healed and up to a successful write of every key."""
AGREE_SECONDS_MAX: Final = 30.0
"""From the moment when all is healed until all replicas of a range stand at the same index."""
GROWING_SHARE: Final = 0.3
SLOW_SNAPSHOTS: Final = (None, 20_000, 2_000)
"""Bytes a second while a cluster grows; None: as nodes are set. What a range holds here would else be there at once."""
SLOW_STEP_SECONDS: Final = 0.1
JOIN_SECONDS_MAX: Final = 8.0
"""Between two nodes that join."""
GROWN_SECONDS_MAX: Final = AGREE_SECONDS_MAX + 2 * JOIN_SECONDS_MAX
"""From the healing of all to replicas everywhere; some node may not have been started yet."""
LOOK_SECONDS: Final = 1.0
LOOK_DEEPER_SECONDS: Final = 10.0
SPLIT_BYTES: Final = 32_768
DEEPER_LOOKS: Final = round(LOOK_DEEPER_SECONDS / LOOK_SECONDS)
ALLOCATIONS_PER_COLLECTION: Final = 50_000
"""Between two collections of cyclic garbage: a run makes little of it, and by default it is looked for all the time."""


@dataclass(frozen=True, slots=True)
class RunSettings:
    """All that a run follows from."""

    seed: int
    minutes: float = 1.0
    """Of virtual time, for the safety phase."""
    nodes: int = 3
    workload: str = "mixed"
    rate: float = 20.0
    """Calls per second of all clients together."""
    faults: tuple[str, ...] = tuple(KINDS)

    def __post_init__(self) -> None:
        assert self.workload in WORKLOADS, f"no workload {self.workload!r}; there are {', '.join(WORKLOADS)}"
        unknown = [name for name in self.faults if name not in KINDS]
        assert not unknown, f"no faults {unknown}; there are {', '.join(KINDS)}"

    def command(self) -> str:
        """The shell command that repeats this run."""
        parts = ["python -m shardkv.simulation", f"--seed {self.seed}", f"--minutes {_exact(self.minutes)}"]
        if self.nodes != 3:
            parts.append(f"--nodes {self.nodes}")
        if self.workload != "mixed":
            parts.append(f"--workload {self.workload}")
        if self.rate != 20:
            parts.append(f"--rate {_exact(self.rate)}")
        if self.faults != tuple(KINDS):
            parts.append(f"--faults {','.join(self.faults) or 'none'}")
        return " ".join(parts)


def _exact(number: float) -> str:
    """As short as it may be and still be that number: another number is another run."""
    short = f"{number:g}"
    return short if float(short) == number else repr(number)


@dataclass(frozen=True, slots=True)
class RunResult:
    """What a run came to. ``violation`` None: everything held."""

    settings: RunSettings
    digest: str
    """Of everything that happened; equal for equal settings."""
    virtual_seconds: float
    calls: int
    answered: int
    unknown: int
    faults: int
    events: int
    heal_seconds: float
    """From the healing of a quorum to a write of every key."""
    highest: dict[str, int]
    """The largest that anything which is bounded became."""
    violation: str | None
    history: tuple[str, ...]
    """The faults, in words."""


class _Complaints(logging.Handler):
    """What clients say of bugs of their own: they go on without the connection, and callers hear nothing of it."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.first: str | None = None

    def emit(self, record: logging.LogRecord) -> None:
        if self.first is None:
            error = record.exc_info[1] if record.exc_info else None
            self.first = record.getMessage() + (f": {_described(error)}" if error is not None else "")

    def check(self) -> None:
        if self.first is not None:
            raise Violation("client-bug", self.first)


class Run:
    """One run under way."""

    def __init__(self, settings: RunSettings, trace: Trace, progress: Callable[[float], object] | None = None) -> None:
        self.settings = settings
        self.trace = trace
        self.progress = progress
        self.heal_seconds = 0.0
        self.ended_at = 0.0
        self.faults: Faults | None = None
        self.workload: Workload | None = None
        self.observing: Observing | None = None
        self.complaints = _Complaints()
        self._slow_bytes_per_second: int | None = None
        """Of each snapshot on its way, while snapshots are slow."""

    async def main(self) -> None:
        settings = self.settings
        seed = settings.seed
        self.trace.record("run", settings)
        try:
            segment_bytes = determinism.seeded_random("segments", seed).choice([64 * 1024, 256 * 1024])
            storage = StorageConfig(engine="memory", segment_bytes=segment_bytes)
            # In some runs the cluster grows from its first node under the faults, in the others it stands before them.
            grows = settings.faults and determinism.seeded_random("grows", seed).random() < GROWING_SHARE
            async with simulated_cluster(
                1 if grows else settings.nodes, seed=seed, split_bytes=SPLIT_BYTES, trace=self.trace, storage=storage
            ) as cluster:
                chance = determinism.seeded_random("keys", seed)
                workload = self.workload = Workload(cluster, seed, settings.workload, settings.rate)
                self.observing = Observing(cluster)
                self._short_logs(cluster)
                faults = self.faults = Faults(cluster, seed, settings.faults, lambda: workload.some_key(chance))
                async with trio.open_nursery() as nursery:
                    for number in range(CLIENTS):
                        nursery.start_soon(workload.work, number)
                    nursery.start_soon(self._look)
                    if grows:
                        faults.growing = True
                        nursery.start_soon(self._grow, cluster, storage)
                    await faults.run(settings.minutes * 60)
                    await self._liveness(cluster)
                    workload.stopped = True
                await self._final(cluster)
        finally:
            self.ended_at = determinism.now()

    def _short_logs(self, cluster: Cluster) -> None:
        """Logs are compacted so far, in some runs, that whoever is a little behind needs a snapshot."""
        kept = determinism.seeded_random("logs", self.settings.seed).choice([None, (20, 40), (0, 4)])

        def shorten(node: SimulatedNode, inside: Parts) -> None:
            inside.maintenance.kept = kept

        _for_each_start(cluster, shorten)

    def _slow_snapshots(self, cluster: Cluster) -> None:
        """Until the cluster has grown snapshots take a while, in some runs, and much happens meanwhile."""
        self._slow_bytes_per_second = determinism.seeded_random("snapshots", self.settings.seed).choice(SLOW_SNAPSHOTS)

        def slow(node: SimulatedNode, inside: Parts) -> None:
            sender = inside.snapshots.sender
            sender.pace = _SlowPace(
                node.environment.clock, sender.pace.bytes_per_second, lambda: self._slow_bytes_per_second
            )

        _for_each_start(cluster, slow)

    async def _grow(self, cluster: Cluster, storage: StorageConfig) -> None:
        """The other nodes join, and every range comes to its replicas."""
        assert self.faults is not None, "grown before there are faults"
        self._slow_snapshots(cluster)
        chance = determinism.seeded_random("growth", self.settings.seed)
        for number in range(1, self.settings.nodes):
            await determinism.sleep(chance.uniform(0, JOIN_SECONDS_MAX))
            cluster.add(f"n{number + 1}", storage=storage).start_soon()
        await cluster.grown()
        self._slow_bytes_per_second = None
        self.faults.note("grown")
        self.faults.growing = False

    async def _look(self) -> None:
        assert self.workload is not None, "looked at before there is a workload"
        assert self.observing is not None, "looked at before anybody observes"
        looks = 0
        while not self.workload.stopped:
            await determinism.sleep(LOOK_SECONDS)
            looks += 1
            self.complaints.check()
            if looks % DEEPER_LOOKS:
                self.observing.look()
            else:
                self.observing.look_deeper()
                self.workload.judge()
            if self.progress is not None:
                self.progress(determinism.now())

    async def _liveness(self, cluster: Cluster) -> None:
        """A quorum is healed and stays so; whoever is not in it is down. It must get on with the work by itself."""
        assert self.faults is not None, "live before there were faults"
        assert self.workload is not None, "live before there is a workload"
        await self.faults.heal_for_good()
        if self.faults.growing:
            await self._grown(cluster)
        nodes = list(cluster.nodes.values())
        absent = determinism.seeded_random("absent", self.settings.seed).choice(nodes) if len(nodes) > 2 else None
        if absent is not None and absent.alive:
            await absent.power_off()
        for node in nodes:
            if node is not absent:
                await self._up(node)
        healed = cluster.now
        async with cluster.client(*(node.name for node in nodes if node is not absent)) as kv:
            await self._write_everything(kv, healed)
        self.heal_seconds = cluster.now - healed
        await determinism.sleep(2)
        for node in nodes:
            await self._up(node)

    async def _grown(self, cluster: Cluster) -> None:
        """Once all is well the cluster comes to its size."""
        assert self.faults is not None, "grown before there are faults"
        self._slow_bytes_per_second = None
        with determinism.deadline_after(GROWN_SECONDS_MAX):
            while self.faults.growing:
                for node in list(cluster.nodes.values()):
                    await self._up(node)
                await determinism.sleep(0.1)
        if self.faults.growing:
            raise Violation("liveness", f"{GROWN_SECONDS_MAX:g} s after all was healed the cluster has not grown")

    async def _up(self, node: SimulatedNode) -> None:
        with determinism.deadline_after(AGREE_SECONDS_MAX):
            while not node.serving:
                if not node.alive:
                    await node.buried()
                    node.start_soon()
                await determinism.sleep(0.02)
        if not node.serving:
            raise Violation("liveness", f"{node.name} does not serve {AGREE_SECONDS_MAX:g} s after all was healed")

    async def _write_everything(self, kv: Client, healed: float) -> None:
        workload = self.workload
        assert workload is not None, "written to before there is a workload"
        generation = workload.generation
        value = b"after the faults"
        calls: list[Callable[[], Awaitable[bool]]] = []
        for key in workload.keys("r", REGISTERS, generation):
            calls.append(partial(self._put, kv, key, value))
        for key in workload.keys("c", COUNTERS, generation):
            calls.append(partial(workload.increment, kv, key))
        for key in workload.keys("l", LEDGERS, generation):
            calls.append(partial(self._put_ledger, kv, key, value))
        await self._all(calls, healed)
        # Only now, for a range whose split nobody had applied yet may have been made by the writes before.
        await self._all([partial(self._put_beside, kv, start + b"\0") for start in sorted(self._starts())], healed)

    async def _all(self, calls: list[Callable[[], Awaitable[bool]]], healed: float) -> None:
        for call in calls:
            while not await call():
                self._progress(healed)
            self._progress(healed)

    async def _put(self, kv: Client, key: bytes, value: bytes) -> bool:
        assert self.workload is not None, "written to before there is a workload"
        return await self.workload.register_call(kv, key, Operation("put", value))

    async def _put_ledger(self, kv: Client, key: bytes, value: bytes) -> bool:
        assert self.workload is not None, "written to before there is a workload"
        return await self.workload.ledger_put(kv, key, b"%b %d" % (value, self.workload.calls))

    def _starts(self) -> set[bytes]:
        """Where ranges begin: most hold none of the keys that are in use now."""
        assert self.observing is not None, "written to before anybody observes"
        return self.observing.starts()

    async def _put_beside(self, kv: Client, key: bytes) -> bool:
        """A put of which nothing is judged but that it is answered."""
        assert self.workload is not None, "written to before there is a workload"
        how, _ = await self.workload.call("put", key, kv.put(key, b"after the faults", timeout=CALL_SECONDS))
        return how == "ok"

    def _progress(self, healed: float) -> None:
        elapsed = determinism.now() - healed
        if elapsed > LIVENESS_SECONDS_MAX:
            raise Violation("liveness", f"writes do not all go on {elapsed:.1f} s after a quorum was healed")

    async def _final(self, cluster: Cluster) -> None:
        """Read everything back, wait for all replicas to agree, and judge."""
        workload, observing = self.workload, self.observing
        assert workload is not None, "judged before there is a workload"
        assert observing is not None, "judged before anybody observes"
        async with cluster.client() as kv:
            for key in list(workload.registers.histories):
                await self._surely(workload.register_call(kv, key, Operation("get")), key)
            for generation in range(workload.generation + 1):
                for key in workload.keys("c", COUNTERS, generation):
                    await self._surely(workload.count(kv, key), key)
                for key in workload.keys("l", LEDGERS, generation):
                    await self._surely(workload.ledger_get(kv, key), key)
            await self._surely(workload.scan(kv, None), b"")
            await self._surely(workload.scan(kv, None, reverse=True, near=True), b"")
        await self._agree(cluster)
        observing.look_deeper()
        observing.check()
        self.complaints.check()
        workload.judge(everything=True)
        workload.counters.check()
        workload.ledger.check()
        workload.staleness.check()

    async def _surely(self, call: Awaitable[bool], key: bytes) -> None:
        if not await call:
            raise Violation("liveness", f"a read of {key!r} fails in a healthy cluster")

    async def _agree(self, cluster: Cluster) -> None:
        with determinism.deadline_after(AGREE_SECONDS_MAX):
            while apart(cluster):
                await determinism.sleep(0.1)
        reason = apart(cluster)
        if reason:
            raise Violation("replicas-agree", f"{AGREE_SECONDS_MAX:g} s after all was healed {reason}")


class _SlowPace(Pace):
    """A node's pace, and before it one that is slower, for as long as there is one."""

    def __init__(self, clock: Clock, bytes_per_second: int, slow_bytes_per_second: Callable[[], int | None]) -> None:
        super().__init__(clock, bytes_per_second)
        self._slow_bytes_per_second = slow_bytes_per_second

    async def spend(self, count: int) -> None:
        while count > 0 and (rate := self._slow_bytes_per_second()) is not None:
            await determinism.sleep(SLOW_STEP_SECONDS)
            count -= round(rate * SLOW_STEP_SECONDS)
        await super().spend(max(0, count))


def _for_each_start(cluster: Cluster, act: Callable[[SimulatedNode, Parts], None]) -> None:
    """``act`` on every node that runs, and on each that is started from now on."""
    cluster.observers.append(act)
    for node in cluster.nodes.values():
        if node.composed:
            act(node, node.inside)


def run(
    settings: RunSettings, *, lines: Lines | None = None, progress: Callable[[float], object] | None = None
) -> RunResult:
    """Make one run. Never raises for what went wrong inside it: that is the result's ``violation``.

    ``lines``: somewhere to write every event to, to compare two runs. ``progress``: told once in a virtual second or
    so how many have passed.

    Raises KeyboardInterrupt: that somebody has had enough is no violation.
    """
    trace = Trace(lines)
    state = Run(settings, trace, progress)
    violation: str | None = None
    thresholds = gc.get_threshold()
    gc.collect()
    gc.freeze()
    gc.set_threshold(ALLOCATIONS_PER_COLLECTION)
    clients = logging.getLogger("shardkv_client")
    clients.addHandler(state.complaints)
    try:
        determinism.run_deterministically(state.main, seed=settings.seed)
    except BaseException as error:  # noqa: BLE001  # whatever else ended the run is what the run found
        if isinstance(interrupt := leaf(error), KeyboardInterrupt):
            raise interrupt from None
        violation = _reason(error)
    finally:
        clients.removeHandler(state.complaints)
        gc.set_threshold(*thresholds)
        gc.unfreeze()
    workload, faults, observing = state.workload, state.faults, state.observing
    return RunResult(
        settings=settings,
        digest=trace.digest(),
        virtual_seconds=state.ended_at,
        calls=workload.calls if workload else 0,
        answered=workload.answered if workload else 0,
        unknown=workload.unknown if workload else 0,
        faults=faults.count if faults else 0,
        events=trace.events,
        heal_seconds=state.heal_seconds,
        highest=observing.growth.highest if observing else {},
        violation=violation,
        history=tuple(faults.history) if faults else (),
    )


def _reason(error: BaseException) -> str:
    """The first violation in a group of errors, else the first error that is none of the cluster's own."""
    found = leaves_of(error)
    for wanted in (Violation, AssertionError):
        for each in found:
            if isinstance(each, wanted):
                return _described(each)
    for each in found:
        if not isinstance(each, ShardKVError):
            return _described(each)
    return _described(found[0])


def _described(error: BaseException) -> str:
    place = ""
    traceback = error.__traceback__
    while traceback is not None:
        code = traceback.tb_frame.f_code
        place = f" ({code.co_filename.rsplit('/', 2)[-2]}/{code.co_filename.rsplit('/', 1)[-1]}:{traceback.tb_lineno})"
        traceback = traceback.tb_next
    return f"{type(error).__name__}: {error}{place}"
