"""A node, composed: listener, requests, reads, placement service, splitting, snapshots, start and stop.

``node`` puts everything together; ``listener`` takes connections, ``requests`` answers them. Everything below is
handed in, so that the same code runs in virtual time.
"""

from shardkv.server.node import run_node

__all__ = ["run_node"]
