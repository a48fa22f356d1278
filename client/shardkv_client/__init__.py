"""The Python client of shardkv.

    async with connect("127.0.0.1:7001") as kv:       # under trio or asyncio
        await kv.put(b"k", b"v")

    with connect_blocking("127.0.0.1:7001") as kv:    # from any thread
        kv.put(b"k", b"v")

What it raises is in :mod:`shardkv.errors`, and for convenience also here.
"""

from shardkv.errors import (
    BatchError,
    ClientClosed,
    ConfigError,
    InvalidRange,
    KeyTooLarge,
    NotAnInteger,
    NotFound,
    OutcomeUnknown,
    PermissionDenied,
    RequestError,
    ShardKVError,
    StorageError,
    Unauthenticated,
    Unavailable,
    ValueTooLarge,
    VersionMismatch,
)
from shardkv.types import Entry
from shardkv_client.blocking import BlockingClient, BlockingScan, connect_blocking
from shardkv_client.client import Client, connect
from shardkv_client.core import NodeInfo, Settings
from shardkv_client.environment import Environment, RealEnvironment, Stream
from shardkv_client.scan import Scan

__all__ = [
    # Opening
    "connect",
    "connect_blocking",
    "Settings",
    "Environment",
    "RealEnvironment",
    "Stream",
    # What calls take and return
    "Client",
    "BlockingClient",
    "Scan",
    "BlockingScan",
    "Entry",
    "NodeInfo",
    # What they raise
    "ShardKVError",
    "RequestError",
    "KeyTooLarge",
    "ValueTooLarge",
    "InvalidRange",
    "NotAnInteger",
    "NotFound",
    "VersionMismatch",
    "BatchError",
    "Unavailable",
    "OutcomeUnknown",
    "ClientClosed",
    "ConfigError",
    "PermissionDenied",
    "Unauthenticated",
    "StorageError",
]
