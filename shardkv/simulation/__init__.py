"""Whole clusters in virtual time, with faults: for our tests and for yours.

``cluster`` is where to begin: real nodes and real clients in one process. ``node`` is what may be done to one of the
nodes, ``patience`` how long is waited. ``determinism`` makes a run repeat from its seed, with a ``scheduler`` for the
tasks of trio; ``trace`` digests what happened in it.

* A node's world is its ``environment``: ``clock``, ``workers``, ``disk`` (on ``files``, of which ``crash_choosers``
  choose what a crash leaves), ``network`` (of ``pipes``, in some of which ``frames`` are repeated or overtaken).
  ``calls`` numbers what it asks of that world, to crash it there.
* A run is ``runner``'s: ``faults`` and ``sequences`` of them, some with ``bad_disks``, a ``workload`` with ``errands``,
  ``observing`` what nodes hold, and the ``checkers`` that judge it. ``swarm`` does it for many seeds, ``command`` from
  the command line.
* ``pytest_plugin`` brings it to tests of your own.

Nothing is imported here before it is asked for, for pytest loads the plugin into every test suite.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shardkv.simulation.checkers.violation import Violation
    from shardkv.simulation.clock import SimulatedIds, SimulatedRandom, SimulationClock
    from shardkv.simulation.cluster import Cluster, simulated_cluster
    from shardkv.simulation.crash_choosers import ChooseAtRandom, CrashChooser, KeepAll, LoseAll, TearLast
    from shardkv.simulation.determinism import run_deterministically, seeded_random
    from shardkv.simulation.disk import Call, PowerCut, SimulatedDisk
    from shardkv.simulation.environment import SimulatedEnvironment, simulated_environment
    from shardkv.simulation.files import Unsynced
    from shardkv.simulation.network import NodeNetwork, SimulatedNetwork
    from shardkv.simulation.node import SimulatedNode
    from shardkv.simulation.pipes import Link
    from shardkv.simulation.runner import RunResult, RunSettings, run
    from shardkv.simulation.trace import Trace
    from shardkv.simulation.workers import SimulatedWorkers

__all__ = [
    "Call",
    "ChooseAtRandom",
    "Cluster",
    "CrashChooser",
    "KeepAll",
    "Link",
    "LoseAll",
    "NodeNetwork",
    "PowerCut",
    "RunResult",
    "RunSettings",
    "SimulatedDisk",
    "SimulatedEnvironment",
    "SimulatedIds",
    "SimulatedNetwork",
    "SimulatedNode",
    "SimulatedRandom",
    "SimulatedWorkers",
    "SimulationClock",
    "TearLast",
    "Trace",
    "Unsynced",
    "Violation",
    "run",
    "run_deterministically",
    "seeded_random",
    "simulated_cluster",
    "simulated_environment",
]

_MODULES = {
    "checkers.violation": ("Violation",),
    "clock": ("SimulatedIds", "SimulatedRandom", "SimulationClock"),
    "cluster": ("Cluster", "simulated_cluster"),
    "crash_choosers": ("ChooseAtRandom", "CrashChooser", "KeepAll", "LoseAll", "TearLast"),
    "determinism": ("run_deterministically", "seeded_random"),
    "disk": ("Call", "PowerCut", "SimulatedDisk"),
    "environment": ("SimulatedEnvironment", "simulated_environment"),
    "files": ("Unsynced",),
    "network": ("NodeNetwork", "SimulatedNetwork"),
    "node": ("SimulatedNode",),
    "pipes": ("Link",),
    "runner": ("RunResult", "RunSettings", "run"),
    "trace": ("Trace",),
    "workers": ("SimulatedWorkers",),
}
_HOMES = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    module = _HOMES.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{module}"), name)
