"""One simulated node: what may be done to it from outside, and what its life leaves.

Does not live here: the node itself, which is the real one (``shardkv.server``), and what it shares with others
(``cluster``). The rule: a crash fences the node's world first and cancels its tasks then, so that nothing is tidied up.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import trio

from shardkv.config import NodeConfig
from shardkv.multiraft.snapshots import Snapshots
from shardkv.server.node import run_node
from shardkv.server.parts import Parts
from shardkv.simulation.crash_choosers import CrashChooser
from shardkv.simulation.disk import SimulatedDisk
from shardkv.simulation.environment import SimulatedEnvironment, simulated_environment
from shardkv.simulation.patience import FORMING_SECONDS, within
from shardkv.simulation.scheduler import Process
from shardkv.storage.engine import Engine, Reader, WriteBatch
from shardkv.storage.memory import MemoryEngine

if TYPE_CHECKING:
    from shardkv.simulation.cluster import Cluster


def keep_none(count: int) -> int:
    """Of ``count`` unflushed engine batches none survive."""
    return 0


class SimulatedNode:
    """One node: its world, its engine, and the task that runs it.

    ``name``, ``address``, ``config``; ``environment`` holds its disk, clock and network, anew after each crash;
    ``alive`` is whether it runs, ``error`` what it ended with by itself.
    """

    def __init__(self, cluster: "Cluster", name: str, config: NodeConfig, environment: SimulatedEnvironment) -> None:
        self.cluster = cluster
        self.name = name
        self.config = config
        self.environment: SimulatedEnvironment = environment
        self.engine: MemoryEngine = MemoryEngine(crashable=True)
        self.scope: trio.CancelScope = trio.CancelScope()
        self.stop: trio.Event = trio.Event()
        self.ready: trio.Event = trio.Event()
        self.ended: trio.Event = trio.Event()
        self.error: BaseException | None = None
        self.alive: bool = False
        self.starts: int = 0
        self.out_of_service = False
        """Somebody works on its disk: it is not started meanwhile."""
        self._buried = True
        self._inside: Parts | None = None
        self._process = Process()

    @property
    def address(self) -> str:
        return self.config.listen

    @property
    def paused(self) -> bool:
        return self._process.suspended

    @property
    def serving(self) -> bool:
        """Whether it runs and has said that it is ready."""
        return self.alive and self.ready.is_set()

    @property
    def inside(self) -> Parts:
        """The parts of the node that runs, or ran last, to look into."""
        assert self._inside is not None, f"{self.name} has not been put together yet"
        return self._inside

    @property
    def composed(self) -> bool:
        """Whether the node that runs now has been put together, so that there is something to look into."""
        return self.alive and self._inside is not None

    def check(self) -> None:
        """Every invariant of a running node."""
        inside = self.inside
        inside.catalog.check()
        for replica in inside.catalog.replicas.values():
            replica.check()
        inside.driver.space.check()
        if isinstance(inside.driver.snapshots, Snapshots):
            inside.driver.snapshots.check()
        inside.wal.check()
        inside.clock_health.check()
        contradicted = list(inside.listener.contradictions)
        assert not contradicted, f"{self.name} was sent what its logs of ranges {contradicted} contradict"

    # Starting

    async def start(self) -> None:
        """Run until it is ready."""
        self.start_soon()
        with within(FORMING_SECONDS, f"{self.name} did not become ready"):
            await self.ready.wait()

    def start_soon(self) -> None:
        """Start a node that is down, without waiting for it. Does nothing to one that is up or is still dying."""
        if self.alive or not self._buried or self.out_of_service:
            return
        self.scope, self.stop, self.ready, self.ended = trio.CancelScope(), trio.Event(), trio.Event(), trio.Event()
        self.alive = True
        self.error = None
        self.starts += 1
        self._inside = None
        self._process = Process()
        self.cluster.nursery.start_soon(self._run, self.environment, self._process)

    async def _run(self, environment: SimulatedEnvironment, process: Process) -> None:
        process.run_here()
        try:
            with self.scope:
                await self._run_node()
            if self.alive and environment is self.environment and not self.stop.is_set():
                raise AssertionError(f"{self.name} ended by itself, and without an error")
        except Exception as error:
            if not self.alive or environment is not self.environment:
                return  # What the remains of a crashed node say counts for nothing.
            self.error = error
            if not self.cluster.tolerates(self, error):
                raise
            self._die(power=False, kept_batches=keep_none, chooser=None)
            self._bury()
        finally:
            self.ended.set()

    async def _run_node(self) -> None:
        await run_node(
            self.config,
            self.environment,
            ready=lambda name, address: self.ready.set(),
            stop=self.stop,
            open_engine=self._open_engine,
            observe=self._observe,
        )

    def _open_engine(self, config: NodeConfig, path: str, admit: Callable[[Reader], bool]) -> Engine:
        admit(self.engine)
        return self.engine

    def _observe(self, inside: Parts) -> None:
        self._inside = inside
        for observer in self.cluster.observers:
            observer(self, inside)

    async def run_to_its_end(self) -> None:
        """Start a node that cannot go on. Raises what it ended with."""
        self.stop = trio.Event()
        with within(2 * FORMING_SECONDS, f"{self.name} neither served nor failed"):
            await self._run_node()

    # Pausing

    def pause(self) -> None:
        """SIGSTOP: until :meth:`resume` it does nothing; its clocks go on, and its system takes what is sent to it.

        To a node that is down, or paused, nothing happens.
        """
        if self.alive:
            self._process.suspend()

    def resume(self) -> None:
        """SIGCONT."""
        self._process.resume()

    # Ending

    async def shut_down(self) -> None:
        """SIGTERM. One that is paused ends once it is resumed."""
        self.stop.set()
        with within(FORMING_SECONDS, f"{self.name} did not stop"):
            await self.ended.wait()
        if self.alive:
            self._die(power=False, kept_batches=lambda count: count, chooser=None)
            self._bury()

    async def kill(self, *, kept_batches: Callable[[int], int] = keep_none) -> None:
        """kill -9: the log as it was written; of the engine, what was flushed and ``kept_batches`` of the rest."""
        self._die(power=False, kept_batches=kept_batches, chooser=None)
        await self.buried()

    async def power_off(
        self, *, kept_batches: Callable[[int], int] = keep_none, chooser: CrashChooser | None = None
    ) -> None:
        """The machine dies: what was synced is left, and of the rest what ``chooser`` says."""
        self._die(power=True, kept_batches=kept_batches, chooser=chooser)
        await self.buried()

    def crash_at_call(
        self,
        number: int,
        *,
        power: bool = False,
        kept_batches: Callable[[int], int] = keep_none,
        chooser: CrashChooser | None = None,
    ) -> None:
        """Let the node die inside its call ``number`` of disk, network or sleep, as :meth:`kill` or :meth:`power_off`.

        ``environment.calls.count`` is the number of the last one made. Wait for it with :meth:`buried`.
        """

        def die() -> None:
            if self.alive:
                self._die(power=power, kept_batches=kept_batches, chooser=chooser)
                self.cluster.nursery.start_soon(self.buried)

        self.environment.calls.crash_at(number, die)

    def _die(self, *, power: bool, kept_batches: Callable[[int], int], chooser: CrashChooser | None) -> None:
        """At this moment. What its tasks still do leaves no trace."""
        assert self.alive, f"{self.name} is not running"
        self.alive = False
        self._buried = False
        self.environment.calls.disarm()
        if power:
            self.environment.power_off(chooser)
        else:
            self.environment.kill()
        self.engine = self.engine.crash(kept_batches)
        self.scope.cancel()
        self.resume()

    async def buried(self) -> None:
        """Wait until nothing of a node that was told to die runs any more; then it can be started again.

        Does nothing to one that is up.
        """
        if not self.alive and self.starts:
            await self.ended.wait()
            self._bury()

    def _bury(self) -> None:
        if not self.alive and not self._buried:
            self._buried = True
            self.environment = self.environment.restart()

    # The disk of a node that is down

    def wipe(self) -> None:
        """Somebody emptied the disk of a node that is down."""
        self.restore(SimulatedDisk(), MemoryEngine(crashable=True))

    def restore(self, disk: SimulatedDisk, engine: MemoryEngine) -> None:
        """Somebody put another disk into a node that is down."""
        self.environment = simulated_environment(
            self.name,
            seed=self.cluster.seed,
            network=self.cluster.network,
            disk=disk,
            clock=self.environment.clock,
            incarnation=self.environment.incarnation + 1,
            calls=self.environment.calls,
        )
        self.engine = engine

    def copied_engine(self) -> MemoryEngine:
        """A copy of the engine of a node that is down."""
        batch = WriteBatch()
        for key, value in self.engine.scan(b"", b"\xff"):
            batch.put(key, value)
        copy = MemoryEngine(crashable=True)
        copy.write(batch)
        copy.flush()
        return copy
