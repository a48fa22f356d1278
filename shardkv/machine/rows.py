"""The layout of a range's two single rows: its applied state (or the mark of an unfinished install) and its descriptor.

Only layout: who writes them when is :mod:`machine`'s and :mod:`snapshot`'s matter. The mark takes the place of the
applied state, so that a replica has one or the other, and the install's last act overwrites it (trap 19).
"""

from struct import Struct, error
from typing import Final, NamedTuple

from shardkv import codec
from shardkv.errors import Corruption, MalformedRequest
from shardkv.machine import keys
from shardkv.raft.messages import ConfState
from shardkv.storage.engine import Reader
from shardkv.types import RangeDescriptor, RangeId

ROW_FORMAT: Final = 1
_STATE, _INSTALLING = 0, 1
_HEAD: Final = Struct(">BBQQQ")  # format, state or mark, index, term, replicated time; then CBOR


class AppliedState(NamedTuple):
    """Up to where a replica has applied its log, and what holds there."""

    index: int  # type: ignore[assignment]  # the domain name wins over tuple.index
    term: int
    last_timestamp: int
    conf_state: ConfState


class InstallMark(NamedTuple):
    """A snapshot whose rows may be there in part: the replica owns its span but knows nothing, and asks again."""

    descriptor: RangeDescriptor
    index: int  # type: ignore[assignment]
    term: int


def pack_conf_state(conf_state: ConfState) -> bytes:
    """What follows the head of an applied row; made once for each configuration."""
    return codec.dumps([list(part) if isinstance(part, tuple) else part for part in conf_state])


def pack_applied(index: int, term: int, last_timestamp: int, conf_bytes: bytes) -> bytes:
    """``conf_bytes`` come from :func:`pack_conf_state`."""
    return _HEAD.pack(ROW_FORMAT, _STATE, index, term, last_timestamp) + conf_bytes


def pack_mark(mark: InstallMark) -> bytes:
    return _HEAD.pack(ROW_FORMAT, _INSTALLING, mark.index, mark.term, 0) + codec.dumps(mark.descriptor.to_wire())


def pack_descriptor(descriptor: RangeDescriptor) -> bytes:
    return codec.dumps([ROW_FORMAT, descriptor.to_wire()])


def unpack_applied(row: bytes) -> AppliedState | InstallMark:
    """Raises Corruption."""
    try:
        form, state, index, term, last_timestamp = _HEAD.unpack_from(row)
        rest = codec.loads(row[_HEAD.size :])
        if form == ROW_FORMAT and state == _INSTALLING:
            return InstallMark(RangeDescriptor.from_wire(rest), index, term)
        if form == ROW_FORMAT and state == _STATE:
            voters, learners, outgoing, next_learners, auto_leave = rest
            if not all(type(each) is int and each >= 0 for part in rest[:4] for each in part):
                raise ValueError("a replica's id is an unsigned integer")
            conf_state = ConfState(
                tuple(voters), tuple(learners), tuple(outgoing), tuple(next_learners), bool(auto_leave)
            )
            return AppliedState(index, term, last_timestamp, conf_state)
    except (error, MalformedRequest, ValueError, TypeError) as problem:
        raise Corruption(f"an applied row is damaged: {row[:64].hex()}") from problem
    raise Corruption(f"an applied row has format {form}.{state}; this version knows {ROW_FORMAT}: upgrade it")


def unpack_descriptor(row: bytes) -> RangeDescriptor:
    """Raises Corruption."""
    try:
        form, fields = codec.loads(row)
        if form == ROW_FORMAT:
            return RangeDescriptor.from_wire(fields)
    except (MalformedRequest, ValueError, TypeError) as problem:
        raise Corruption(f"a descriptor row is damaged: {row[:64].hex()}") from problem
    raise Corruption(f"a descriptor row has format {form!r}; this version knows {ROW_FORMAT}: upgrade it")


def read_applied(reader: Reader, range_id: RangeId) -> AppliedState | InstallMark | None:
    """What a replica knows of itself; None if it has nothing. Raises Corruption."""
    row = reader.get(keys.applied_key(range_id))
    return None if row is None else unpack_applied(row)
