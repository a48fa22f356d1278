"""The replicated state machine of a range: commands, sessions, versions, splits, reads, snapshots.

Nothing here knows of Raft's rules, of disks or of the network: committed bytes go in, changes to one write batch and
outcomes come out. ``machine`` is the object that a replica owns; ``entries`` are the bytes it applies; ``execution``
runs commands; ``sessions`` makes retries apply once; ``keys``, ``rows`` and ``envelope`` fix how rows look;
``split`` divides a descriptor; ``reads``, ``size`` and ``snapshot`` look at a range's rows; ``clock`` gives stamps.
"""

from shardkv.machine.clock import HybridClock
from shardkv.machine.machine import (
    INITIAL_INDEX,
    INITIAL_TERM,
    Applied,
    Extension,
    RangeMachine,
    SplitResult,
    conf_state_of,
)
from shardkv.machine.split import SplitCommand

__all__ = [
    "INITIAL_INDEX",
    "INITIAL_TERM",
    "Applied",
    "Extension",
    "HybridClock",
    "RangeMachine",
    "SplitCommand",
    "SplitResult",
    "conf_state_of",
]
