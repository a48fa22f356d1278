"""All seams of one simulated node put together, and how it dies and comes back.

The rule: a crash fences everything first, so that no ``finally`` of the dying node tidies up; what its tasks do between
the fence and their cancellation leaves no trace anywhere.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from shardkv.environment import Environment
from shardkv.simulation import determinism
from shardkv.simulation.calls import Calls
from shardkv.simulation.clock import SimulatedIds, SimulatedRandom, SimulationClock
from shardkv.simulation.crash_choosers import CrashChooser
from shardkv.simulation.disk import SimulatedDisk
from shardkv.simulation.network import NodeNetwork, SimulatedNetwork
from shardkv.simulation.workers import SimulatedWorkers

UPTIME_SECONDS_MAX: Final = 30 * 86_400
"""Of a machine when a run begins."""
BOOT_SECONDS_MAX: Final = 20
"""Of a machine when a node on it starts after a power cut."""


@dataclass(frozen=True, slots=True)
class SimulatedEnvironment(Environment):
    """An :class:`~shardkv.environment.Environment` whose faults are in the test's hands."""

    name: str
    seed: int | str
    incarnation: int
    """How often the node has been started before."""
    calls: Calls
    """Of all the node's lives."""
    clock: SimulationClock
    disk: SimulatedDisk
    workers: SimulatedWorkers
    network: NodeNetwork

    def fence(self) -> None:
        """Cut the node off: later calls of its disk do nothing, its jobs do not run, what it sends goes nowhere."""
        self.disk.fence()
        self.workers.fence()
        self.network.fence()

    def kill(self) -> None:
        """The process dies (``kill -9``): the system keeps what was written and closes its sockets.

        Cancel the node's tasks next.
        """
        self.fence()
        self.network.network.kill(self.network)
        self.disk.kill()

    def power_off(self, chooser: CrashChooser | None = None) -> None:
        """The machine dies: what was not synced survives as ``chooser`` says (by default not), and no peer is told.

        Cancel the node's tasks next.
        """
        self.fence()
        self.network.network.power_off(self.network)
        self.disk.crash(chooser)

    def restart(self) -> "SimulatedEnvironment":
        """What the node finds when it starts again after :meth:`kill` or :meth:`power_off`. Not while it still runs."""
        if self.network.network.is_off(self.name):
            up = determinism.seeded_random("boot", self.seed, self.name, self.incarnation)
            self.clock.reboot(up.randrange(BOOT_SECONDS_MAX * 10**9))
        return simulated_environment(
            self.name,
            seed=self.seed,
            network=self.network.network,
            disk=self.disk.restart(),
            clock=self.clock,
            latency_seconds=self.workers.latency_seconds,
            incarnation=self.incarnation + 1,
            calls=self.calls,
        )


def _at_once(seed: int | str, name: str, incarnation: int) -> Callable[[], bool]:
    """Whether a job runs in the loop: in one life of a node always, in another never, in a third now and then."""
    chance = determinism.seeded_random("at once", seed, name, incarnation)
    share = chance.choice((0.0, 0.5, 1.0))
    return lambda: chance.random() < share


def simulated_environment(
    name: str,
    *,
    seed: int | str,
    network: SimulatedNetwork,
    disk: SimulatedDisk | None = None,
    clock: SimulationClock | None = None,
    latency_seconds: Callable[[], float] | None = None,
    incarnation: int = 0,
    calls: Calls | None = None,
) -> SimulatedEnvironment:
    """The world of the node ``name``.

    Args:
        seed: of the whole run; the node's own chance follows from it, its name and its incarnation.
        network: shared by all nodes of the run.
        disk: a fresh one if not given.
        clock: if not given, one without drift, of a machine that is up for some time.
        latency_seconds: called for each job of the node's workers; 50 to 500 µs by default, about a fast disk's sync.
        calls: of the node's earlier lives.
    """
    disk = disk or SimulatedDisk()
    if clock is None:
        up = determinism.seeded_random("uptime", seed, name)
        clock = SimulationClock(monotonic_offset_ns=up.randrange(UPTIME_SECONDS_MAX * 10**9))
    if latency_seconds is None:
        latency_random = determinism.seeded_random("latency", seed, name, incarnation)

        def latency_seconds() -> float:
            return 0.00005 + 0.00045 * latency_random.random()

    environment = SimulatedEnvironment(
        clock=clock,
        random=SimulatedRandom(seed, name, incarnation),
        ids=SimulatedIds(seed, name, incarnation),
        disk=disk,
        workers=SimulatedWorkers(disk, latency_seconds, _at_once(seed, name, incarnation)),
        network=network.node(name),
        name=name,
        seed=seed,
        incarnation=incarnation,
        calls=calls or Calls(),
    )
    disk.on_power_cut = environment.fence
    disk.run_trace = network.trace
    disk.node_calls = environment.clock.node_calls = environment.network.node_calls = environment.calls
    return environment
