"""The world as it is: the operating system's clock, randomness, files, threads and sockets behind the seams.

The only package of a node that may touch them; everything else takes an :class:`~shardkv.environment.Environment`.
"""

from shardkv.environment import Environment
from shardkv.environment.real.disk import RealDisk
from shardkv.environment.real.network import RealNetwork
from shardkv.environment.real.time import RealClock, RealIds, RealRandom
from shardkv.environment.real.workers import RealWorkers

__all__ = ["RealClock", "RealDisk", "RealIds", "RealNetwork", "RealRandom", "RealWorkers", "real_environment"]


def real_environment() -> Environment:
    """All seams, on the operating system. One for each node of the process."""
    clock = RealClock()
    return Environment(
        clock=clock,
        random=RealRandom(),
        ids=RealIds(),
        disk=RealDisk(),
        workers=RealWorkers(),
        network=RealNetwork(clock),
    )
