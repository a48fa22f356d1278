"""Commands: the writes that a range replicates, byte for byte as the client made them.

A client packs each command once; a retry sends the same bytes. Commands of one session for one range travel as a CBOR
array of arrays; the leader copies those bytes into its log entry without looking at them again, and every replica
decodes a whole entry with one call. Hence the layout: fixed-width CBOR integers that ``struct`` packs in one go.

A command is ``[op, sequence, issued_at_ms, acknowledged_below, digest, ...]``, followed by

    PUT           key, value, if_version (None: any; 0: the key must be absent)
    DELETE        key, if_version
    INCREMENT     key, delta
    DELETE_RANGE  start, end (None: to the last key of all; only a range that has no end carries it out)

Its outcome is: PUT, the new version; DELETE, whether the key was there; INCREMENT, the new number; DELETE_RANGE, True.
A command that failed has the outcome ``[code, message, details]`` of :func:`shardkv.errors.to_wire`.
"""

import zlib
from enum import IntEnum
from struct import Struct
from typing import Any, Final

from shardkv import codec


class Op(IntEnum):
    PUT = 0
    DELETE = 1
    INCREMENT = 2
    DELETE_RANGE = 3


Command = list[Any]
"""A decoded command; the shapes are in the module's docstring. A bare list: the decoder makes it at C speed."""

OP, SEQUENCE, ISSUED_AT, ACKNOWLEDGED_BELOW, DIGEST, KEY, VALUE, CONDITION = range(8)
"""Positions in a command. DELETE has its condition, INCREMENT its delta and DELETE_RANGE its end at VALUE."""

_HEAD: Final = Struct(">BBBQBQBQBI")
"""Array head and op; sequence, issued_at and acknowledged_below (64 bits) and digest (32), each behind its type."""
_KEY_HEAD: Final = Struct(">BH")
_VALUE_HEAD: Final = Struct(">BI")
_U64: Final = Struct(">BQ")
_NULL: Final = b"\xf6"
_U64_END: Final = 1 << 64
_U32_END: Final = 1 << 32

_ARRAY, _BYTES_U16, _BYTES_U32, _UINT32, _UINT64, _NEGATIVE64 = 0x80, 0x59, 0x5A, 0x1A, 0x1B, 0x3B


def _key(key: bytes) -> bytes:
    return _KEY_HEAD.pack(_BYTES_U16, len(key)) + key


def _integer(value: int) -> bytes:
    return _U64.pack(_UINT64, value) if value >= 0 else _U64.pack(_NEGATIVE64, -1 - value)


def _optional(value: int | None) -> bytes:
    return _NULL if value is None else _U64.pack(_UINT64, value)


def pack_put(key: bytes, value: bytes, if_version: int | None = None) -> bytes:
    """The body of a PUT: what :func:`seal` completes into a command."""
    return b"".join((_key(key), _VALUE_HEAD.pack(_BYTES_U32, len(value)), value, _optional(if_version)))


def pack_delete(key: bytes, if_version: int | None = None) -> bytes:
    return _key(key) + _optional(if_version)


def pack_increment(key: bytes, delta: int) -> bytes:
    return _key(key) + _integer(delta)


def pack_delete_range(start: bytes, end: bytes | None) -> bytes:
    return _key(start) + (_NULL if end is None else _key(end))


_FIELDS_BY_OP: Final = {Op.PUT: 8, Op.DELETE: 7, Op.INCREMENT: 7, Op.DELETE_RANGE: 7}
_ARRAY_HEAD_BY_OP: Final = {int(op): _ARRAY | fields for op, fields in _FIELDS_BY_OP.items()}


def seal(op: int, body: bytes, sequence: int, issued_at_ms: int, acknowledged_below: int) -> bytes:
    """A whole command. From here on its bytes never change, however often it is sent."""
    return (
        _HEAD.pack(
            _ARRAY_HEAD_BY_OP[op],
            op,
            _UINT64,
            sequence,
            _UINT64,
            issued_at_ms,
            _UINT64,
            acknowledged_below,
            _UINT32,
            zlib.crc32(body, op),
        )
        + body
    )


def join(commands: list[bytes]) -> bytes:
    """Sealed commands of one session as the CBOR array that a write request carries."""
    return codec.array_head(len(commands)) + b"".join(commands)


def decode(data: bytes) -> list[Command]:
    """The commands in what :func:`join` made; only the outer shape is checked. Raises MalformedRequest."""
    commands = codec.loads_bounded(data)
    if not isinstance(commands, list):
        raise codec.malformed("commands must be an array")
    return commands


def validate(command: Command, key_bytes_max: int, value_bytes_max: int) -> str | None:
    """What is wrong with a command that came from outside, or None. Limits in bytes."""
    # A sound PUT, the common case, in one expression at half the cost; it allows nothing that _problem does not.
    if type(command) is list and len(command) == 8:
        op, sequence, issued_at, below, digest, key, value, condition = command
        if (
            type(op) is type(sequence) is type(issued_at) is type(below) is type(digest) is int
            and op == 0
            and 0 <= sequence < _U64_END
            and 0 <= issued_at < _U64_END
            and 0 <= below < _U64_END
            and 0 <= digest < _U32_END
            and type(key) is type(value) is bytes
            and 0 < len(key) <= key_bytes_max
            and len(value) <= value_bytes_max
            and (condition is None or (type(condition) is int and 0 <= condition < _U64_END))
        ):
            return None
    return _problem(command, key_bytes_max, value_bytes_max)


def _problem(command: Command, key_bytes_max: int, value_bytes_max: int) -> str | None:
    if type(command) is not list or len(command) < 7:
        return "a command must be an array of at least 7 fields"
    op, sequence, issued_at, below, digest, key, argument = command[:7]
    for field in (op, sequence, issued_at, below, digest):
        if type(field) is not int or not 0 <= field < _U64_END:
            return "a command's first five fields must be unsigned 64-bit integers"
    if digest >= _U32_END:
        return "a command's digest must have 32 bits"
    if type(key) is not bytes or len(key) > key_bytes_max or (not key and op != Op.DELETE_RANGE):
        return f"a key must be 1 to {key_bytes_max} bytes"
    if len(command) != _FIELDS_BY_OP.get(op):
        return "a command has an unknown operation or the wrong number of fields"
    if op == Op.PUT:
        if type(argument) is not bytes or len(argument) > value_bytes_max:
            return f"a value must be at most {value_bytes_max} bytes"
        return _condition_problem(command[CONDITION])
    if op == Op.DELETE:
        return _condition_problem(argument)
    if op == Op.INCREMENT:
        if type(argument) is not int or not -(1 << 63) <= argument < 1 << 63:
            return "an increment's delta must fit in a signed 64-bit integer"
        return None
    if argument is not None and (
        type(argument) is not bytes or not key < argument or len(argument) > key_bytes_max + 1
    ):
        return "the end of a delete_range must be a key above its start, or null"
    return None


def _condition_problem(version: object) -> str | None:
    if version is None or (type(version) is int and 0 <= version < _U64_END):
        return None
    return "if_version must be an unsigned 64-bit integer or null"
