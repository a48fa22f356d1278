"""The Raft core, sans-IO: messages and ticks in, entries to write, messages to send and entries to apply out.

Standard library and ``shardkv.types`` only; no clock, no disk, no network, no randomness of its own.
"""

from shardkv.raft.errors import (
    Compacted,
    DropReason,
    Inconsistent,
    InvalidConfChange,
    ProposalDropped,
    RaftError,
    SnapshotOutOfDate,
    SnapshotTemporarilyUnavailable,
    Unavailable,
)
from shardkv.raft.membership import decode_conf_change, encode_conf_change
from shardkv.raft.node import PeerStatus, RaftNode, RaftStatus, Ready
from shardkv.raft.progress import ProgressState
from shardkv.raft.reads import ReadState
from shardkv.raft.settings import UNBOUNDED, LeaseSettings, RaftSettings, ReadOnly
from shardkv.raft.state import Role, SoftState
from shardkv.raft.storage import MemoryStorage, RaftStorage

__all__ = [
    "RaftNode", "RaftSettings", "LeaseSettings", "ReadOnly", "UNBOUNDED",
    "Ready", "ReadState", "SoftState", "Role", "RaftStatus", "PeerStatus", "ProgressState",
    "RaftStorage", "MemoryStorage",
    "encode_conf_change", "decode_conf_change",
    "RaftError", "Compacted", "Unavailable", "SnapshotTemporarilyUnavailable", "SnapshotOutOfDate", "Inconsistent",
    "InvalidConfChange", "ProposalDropped", "DropReason",
]  # fmt: skip
