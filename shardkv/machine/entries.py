"""The bytes of a range's log entries: how a leader makes them and how every replica reads them.

Lives here: the layout. Does not live here: what an entry does. An entry is one CBOR array

    [format, kind, stamp, span generation, ...]

and empty bytes are the entry with which a new leader begins its term. By kind there follow

    WRITE      one flat array: session, [command, ...], session, [command, ...], ...
    SPLIT      membership generation, split key, right range id, [[node id, replica id], ...]
    EXTENSION  one value, the extension's own

A leader copies the clients' bytes of a command array into a WRITE entry without looking at them again (it has checked
them on arrival), and one call decodes the whole entry. ``stamp`` is the leader's hybrid clock when it proposed.
``span generation`` is that of the descriptor by which it checked the requests; see :mod:`machine` for what happens when
it has moved on by the time the entry is applied.
"""

from collections.abc import Sequence
from enum import IntEnum
from struct import Struct
from typing import Any, Final

import cbor2

from shardkv import codec
from shardkv.errors import Corruption
from shardkv.machine.split import SplitCommand
from shardkv.types import SESSION_BYTES, Epoch, NodeId, RangeId, ReplicaId

ENTRY_FORMAT: Final = 1
"""Raised only as far as the replicated cluster version allows."""


class EntryKind(IntEnum):
    WRITE = 0
    SPLIT = 1
    EXTENSION = 2


FORMAT, KIND, STAMP, GENERATION, BODY = range(5)
"""Positions in a decoded entry; a SPLIT has four fields from BODY on."""

DecodedEntry = list[Any]

# Array head, format, kind, stamp and generation as 64-bit integers, in one pack.
_HEAD: Final = Struct(">BBBBQBQ")
_UINT64: Final = 0x1B
_ARRAY: Final = 0x80
_SESSION_HEAD: Final = codec.bytes_head(SESSION_BYTES)


def _head(fields: int, kind: int, timestamp: int, generation: int) -> bytes:
    return _HEAD.pack(_ARRAY | fields, ENTRY_FORMAT, kind, _UINT64, timestamp, _UINT64, generation)


def encode_write_entry(groups: Sequence[tuple[bytes, bytes]], timestamp: int, generation: int) -> bytes:
    """One entry of commands.

    ``groups`` are pairs of a session (16 bytes) and the bytes of :func:`shardkv.wire.commands.join`, already checked;
    a session may have several. They are executed in this order.
    """
    parts = [_head(5, EntryKind.WRITE, timestamp, generation), codec.array_head(2 * len(groups))]
    for session, commands in groups:
        assert len(session) == SESSION_BYTES, f"a session has {SESSION_BYTES} bytes, not {len(session)}"
        parts += (_SESSION_HEAD, session, commands)
    return b"".join(parts)


def encode_split_entry(command: SplitCommand, timestamp: int) -> bytes:
    """One entry that splits the range; its span generation is that of the epoch for which the split was planned."""
    return _head(8, EntryKind.SPLIT, timestamp, command.epoch.span) + b"".join(
        (
            codec.unsigned(command.epoch.membership),
            codec.dumps(command.split_key),
            codec.unsigned(command.right_range_id),
            codec.dumps([[node_id, replica_id] for node_id, replica_id in command.right_replicas]),
        )
    )


def split_command(entry: DecodedEntry) -> SplitCommand:
    """What a decoded SPLIT entry says. Raises Corruption for one of another shape."""
    match entry[GENERATION:]:
        case [int(generation), int(membership), bytes(split_key), int(right_range_id), [*right_replicas]]:
            return SplitCommand(
                Epoch(membership, generation), split_key, RangeId(right_range_id), tuple(map(_replica, right_replicas))
            )
    raise Corruption(f"a log entry says to split and is {entry!r:.100}, which no version wrote")


def encode_extension_entry(command: object, timestamp: int, generation: int = 0) -> bytes:
    """One entry for the range's extension; ``command`` is any value that CBOR holds."""
    return _head(5, EntryKind.EXTENSION, timestamp, generation) + codec.dumps(command)


def decode(data: bytes) -> DecodedEntry:
    """The fields of a non-empty entry. Raises Corruption when it is none, or one of a newer format."""
    try:
        entry = codec.loads_own(data)
    except cbor2.CBORDecodeError as problem:
        raise Corruption(f"a log entry that begins with {data[:16].hex()} is damaged: {problem}") from problem
    if type(entry) is not list or len(entry) <= BODY:
        raise Corruption(f"a log entry begins with {data[:16].hex()}, which is no command entry")
    if entry[FORMAT] != ENTRY_FORMAT:
        raise Corruption(f"a log entry has format {entry[FORMAT]!r}; this version knows {ENTRY_FORMAT}: upgrade it")
    return entry


def encode_membership(added: Sequence[tuple[int, int]]) -> bytes:
    """The context of a membership change: pairs of node id and replica id of the replicas that it brings in."""
    return codec.dumps([ENTRY_FORMAT, [[node_id, replica_id] for node_id, replica_id in added]])


def decode_membership(context: bytes) -> list[tuple[NodeId, ReplicaId]]:
    """The inverse of :func:`encode_membership`; empty bytes (leaving a joint configuration) bring in nobody.

    Raises Corruption, or MalformedRequest for what is no CBOR.
    """
    if not context:
        return []
    match codec.loads(context):
        case [int(form), [*added]] if form == ENTRY_FORMAT:
            return [_replica(each) for each in added]
    raise Corruption(f"the context of a membership change is {context[:32].hex()}, which no version wrote")


def _replica(fields: object) -> tuple[NodeId, ReplicaId]:
    match fields:
        case [int(node_id), int(replica_id)] if (
            type(node_id) is type(replica_id) is int and min(node_id, replica_id) >= 0
        ):
            return NodeId(node_id), ReplicaId(replica_id)
    raise Corruption(f"a log entry names a replica as {fields!r:.100}, which no version wrote")
