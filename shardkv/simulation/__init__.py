"""Nodes in virtual time, with faults: the environment of a simulated node, for our tests and for yours.

``determinism`` makes a run repeat from its seed; ``clock``, ``disk``, ``workers`` and ``network`` are the seams;
``environment`` puts them together. Nothing here knows what a node does.
"""

from shardkv.simulation.clock import SimulatedIds, SimulatedRandom, SimulationClock
from shardkv.simulation.determinism import run_deterministically, seeded_random
from shardkv.simulation.disk import (
    Call,
    ChooseAtRandom,
    CrashChooser,
    KeepAll,
    LoseAll,
    PowerCut,
    SimulatedDisk,
    TearLast,
    Unsynced,
)
from shardkv.simulation.environment import SimulatedEnvironment, simulated_environment
from shardkv.simulation.network import Link, NodeNetwork, SimulatedNetwork
from shardkv.simulation.workers import SimulatedWorkers

__all__ = [
    "Call",
    "ChooseAtRandom",
    "CrashChooser",
    "KeepAll",
    "Link",
    "LoseAll",
    "NodeNetwork",
    "PowerCut",
    "SimulatedDisk",
    "SimulatedEnvironment",
    "SimulatedIds",
    "SimulatedNetwork",
    "SimulatedRandom",
    "SimulatedWorkers",
    "SimulationClock",
    "TearLast",
    "Unsynced",
    "run_deterministically",
    "seeded_random",
    "simulated_environment",
]
