"""Raft messages between nodes: one RAFT frame carries what all groups of a turn have for one peer.

    frame    [message, ...]
    message  [range_id, to, from, type, term, log_term, index, commit, reject, reject_hint, vote, context,
              lease_stamp, lease_promise, follower_stamp, [[term, type, data], ...]]

``to`` and ``from`` are replica ids, which are never reused; cluster and nodes were named when the connection opened.
Entries follow each other from ``index + 1``. A snapshot never travels here: it has a connection of its own. Two types
that Raft itself does not have are about replicas: NEED_SNAPSHOT asks the leader for a snapshot because an earlier
install was interrupted; GONE, which nobody sends yet, tells a sender that the replica it speaks to was removed.
"""

import struct
from enum import IntEnum
from typing import Final, NamedTuple

from shardkv import codec
from shardkv.raft.messages import Entry, EntryType, Message, MessageType
from shardkv.types import RangeId

MESSAGES_PER_FRAME_MAX: Final = 16_384
_NUMBER_END: Final = 1 << 63
"""Ids, terms and indexes are below it; what a group adds to one of them still travels."""
_STAMP_END: Final = 1 << 64


class ReplicaNotice(IntEnum):
    """Message types about replicas, beside Raft's own."""

    GONE = 200
    NEED_SNAPSHOT = 201


class GroupMessage(NamedTuple):
    """A message and the group it belongs to. ``notice`` is set, and the rest of ``message`` empty, for a notice."""

    range_id: RangeId
    message: Message
    notice: ReplicaNotice | None = None


# What may come from another node. The rest are for a group's own use and would be an attack.
_FROM_PEERS: Final = frozenset(
    {
        MessageType.PROP,
        MessageType.APP,
        MessageType.APP_RESP,
        MessageType.VOTE,
        MessageType.VOTE_RESP,
        MessageType.HEARTBEAT,
        MessageType.HEARTBEAT_RESP,
        MessageType.TRANSFER_LEADER,
        MessageType.TIMEOUT_NOW,
        MessageType.READ_INDEX,
        MessageType.READ_INDEX_RESP,
        MessageType.PRE_VOTE,
        MessageType.PRE_VOTE_RESP,
    }
)
_HEAD: Final = codec.array_head(16)
_NO_ENTRIES: Final = codec.array_head(0)
_ENTRY: Final = struct.Struct(">B BI B BI")
"""An entry but for its data, if the term is as small as it usually is."""
_PLAIN: Final = struct.Struct(">B BI BI BI B BI BI BI BI B BI BI B BQ BQ BQ")
"""All fields but the entries of a message without a context whose numbers are as small as they usually are: valid CBOR,
packed in a fraction of the time that CBOR itself takes."""
_ARRAY_OF_3, _ARRAY_OF_16, _UNSIGNED_32, _UNSIGNED_64 = 0x83, 0x90, 0x1A, 0x1B
_FALSE, _TRUE, _NO_BYTES, _BYTES_32 = 0xF4, 0xF5, 0x40, 0x5A
_TYPES: Final = {int(type_): type_ for type_ in _FROM_PEERS}
_NOTICES: Final = {int(notice): notice for notice in ReplicaNotice}
_ENTRY_TYPES: Final = {int(type_): type_ for type_ in EntryType}


def encode_entries(entries: tuple[Entry, ...]) -> bytes:
    """The last field of a message; the same for every follower that is sent the same entries."""
    if not entries:
        return _NO_ENTRIES
    parts = [codec.array_head(len(entries))]
    try:
        for term, _, kind, data in entries:
            parts += _ENTRY.pack(_ARRAY_OF_3, _UNSIGNED_32, term, kind, _BYTES_32, len(data)), data
    except struct.error:  # a term of more than 32 bits
        return codec.dumps([(entry.term, int(entry.type), entry.data) for entry in entries])
    return b"".join(parts)


def encode_message(range_id: int, message: Message, entries: bytes | None = None) -> bytes:
    """One message. ``entries`` is what :func:`encode_entries` made of its entries, if the caller has it already."""
    assert message.snapshot is None, f"a snapshot of range {range_id} in a Raft frame"
    if entries is None:
        entries = encode_entries(message.entries)
    if not message.context:
        try:
            return (
                _PLAIN.pack(
                    *(_ARRAY_OF_16, _UNSIGNED_32, range_id, _UNSIGNED_32, message.to, _UNSIGNED_32, message.from_),
                    *(message.type, _UNSIGNED_32, message.term, _UNSIGNED_32, message.log_term),
                    *(_UNSIGNED_32, message.index, _UNSIGNED_32, message.commit),
                    *(_TRUE if message.reject else _FALSE, _UNSIGNED_32, message.reject_hint),
                    *(_UNSIGNED_32, message.vote, _NO_BYTES),
                    *(_UNSIGNED_64, message.lease_stamp, _UNSIGNED_64, message.lease_promise),
                    *(_UNSIGNED_64, message.follower_stamp),
                )
                + entries
            )
        except struct.error:
            pass  # a number of more than 32 bits
    fields = codec.dumps(
        [
            range_id,
            message.to,
            message.from_,
            int(message.type),
            message.term,
            message.log_term,
            message.index,
            message.commit,
            message.reject,
            message.reject_hint,
            message.vote,
            message.context,
            message.lease_stamp,
            message.lease_promise,
            message.follower_stamp,
        ]
    )
    # The fields' own head counts one item too few, and is one byte long.
    return b"".join((_HEAD, fields[1:], entries))


def encode_notice(range_id: int, notice: ReplicaNotice, to: int, from_: int) -> bytes:
    return codec.dumps([range_id, to, from_, int(notice), 0, 0, 0, 0, False, 0, 0, b"", 0, 0, 0, []])


def join(messages: list[bytes]) -> bytes:
    """Encoded messages as the payload of one RAFT frame."""
    return codec.array_head(len(messages)) + b"".join(messages)


def decode(payload: bytes) -> list[GroupMessage]:
    """The messages in a RAFT frame. Raises MalformedRequest when any has the wrong shape or a type not for peers."""
    items = codec.loads(payload)
    if not isinstance(items, list) or len(items) > MESSAGES_PER_FRAME_MAX:
        raise codec.malformed(f"a Raft frame must hold an array of at most {MESSAGES_PER_FRAME_MAX} messages")
    return [_message(item) for item in items]


def _message(item: object) -> GroupMessage:
    if type(item) is not list or len(item) != 16:
        raise codec.malformed("a Raft message must be an array of 16 fields")
    (range_id, to, from_, kind, term, log_term, index, commit, reject, hint, vote, context,
     stamp, promise, follower, entries) = item  # fmt: skip
    for number in (range_id, to, from_, kind, term, log_term, index, commit, hint, vote, stamp, promise, follower):
        if type(number) is not int:
            raise codec.malformed("a Raft message's ids, terms and indexes must be integers")
    # Of numbers that are or-ed together, the result has the sign if one has it, and the highest bit of all.
    if not 0 <= range_id | to | from_ | term | log_term | index | commit | hint | vote < _NUMBER_END:
        raise codec.malformed("a Raft message's ids, terms and indexes must be unsigned and below 2^63")
    if not 0 <= stamp | promise | follower < _STAMP_END:
        raise codec.malformed("a Raft message's stamps must be unsigned and below 2^64")
    if not (to and from_):
        raise codec.malformed("a Raft message goes from one replica to another, and 0 is none")
    if type(context) is not bytes or type(reject) is not bool or type(entries) is not list:
        raise codec.malformed("a Raft message has a field of the wrong type")
    message_type = _TYPES.get(kind)
    if message_type is None:
        notice = _NOTICES.get(kind)
        if notice is None:
            raise codec.malformed(f"Raft message type {kind} is not one that nodes send each other")
        return GroupMessage(range_id, Message(MessageType.HUP, to=to, from_=from_), notice)
    return GroupMessage(
        range_id,
        Message(
            message_type,
            to,
            from_,
            term,
            log_term,
            index,
            _entries(entries, index) if entries else (),
            commit,
            vote,
            None,
            reject,
            hint,
            context,
            (),
            stamp,
            promise,
            follower,
        ),
    )


def _entries(items: list[object], index: int) -> tuple[Entry, ...]:
    entries = []
    if index + len(items) >= _NUMBER_END:
        raise codec.malformed(f"log entries behind index {index} would pass the last index there is")
    for item in items:
        index += 1
        match item:
            case [term, kind, bytes(data)] if (
                type(term) is int and 0 <= term < _NUMBER_END and type(kind) is int and kind in _ENTRY_TYPES
            ):
                entries.append(Entry(term, index, _ENTRY_TYPES[kind], data))
            case _:
                raise codec.malformed("a log entry must be [term, type, data]")
    return tuple(entries)
