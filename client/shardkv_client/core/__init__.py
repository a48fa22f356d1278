"""The client's decisions, without I/O: routing, retries, sequences, batching, deadlines.

``engine`` puts them together; ``calls`` are what it moves, ``ledger`` which there are, and ``dispatch`` sends those
that are ready: ``cache`` and ``routing`` say where to, ``links`` over which connection, ``session`` under which
sequence, ``packing`` in which bytes. ``answers`` says what an error means, ``timers`` when, ``settings`` within which
bounds. No module here imports an event loop, a socket, a clock or a source of chance.
"""

from shardkv_client.core.calls import (
    REPEATABLE_METHODS,
    AdminCall,
    Call,
    DeleteRangeCall,
    Kind,
    ReadCall,
    ScanCall,
    WriteCall,
)
from shardkv_client.core.engine import Core
from shardkv_client.core.links import Link, NodeInfo
from shardkv_client.core.settings import TIMEOUT_SECONDS, Settings

__all__ = [
    "AdminCall",
    "Call",
    "Core",
    "DeleteRangeCall",
    "Kind",
    "Link",
    "NodeInfo",
    "REPEATABLE_METHODS",
    "ReadCall",
    "ScanCall",
    "Settings",
    "TIMEOUT_SECONDS",
    "WriteCall",
]
