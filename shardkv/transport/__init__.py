"""Connections between nodes and from clients: buffer-shaped, so that a request costs no task and a turn one flush.

``connection`` is one stream with its out-buffer; ``handshake`` greets on either side; ``pool`` keeps a node connected
to its peers; ``groups`` picks the error that matters when several of a connection's tasks end. What is said in the
frames belongs to ``wire``, what follows from it to the layers above.
"""

from shardkv.transport.connection import Connection, ConnectionStatistics
from shardkv.transport.handshake import KnownBoots, NodeIdentity, accept, greet
from shardkv.transport.pool import PeerPool, PeerStatistics, PoolSettings, Purpose

__all__ = [
    "Connection",
    "ConnectionStatistics",
    "NodeIdentity",
    "KnownBoots",
    "PeerPool",
    "PeerStatistics",
    "PoolSettings",
    "Purpose",
    "accept",
    "greet",
]
