"""Clusters of real node processes on this machine, as the demo uses them.

The manager itself stands one layer below, in ``shardkv_bench``, because the load generator needs it as well and must
not import the command line.
"""

from shardkv_bench.local_cluster import LocalCluster, NodeFailed, Process, cpu_seconds, free_ports

__all__ = ["LocalCluster", "NodeFailed", "Process", "cpu_seconds", "free_ports"]
