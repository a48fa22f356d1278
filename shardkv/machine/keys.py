"""The key space of a node's engine: which rows are the node's own, a range's system rows, or users' keys.

Lives here: the prefixes and how keys are built from them. Does not live here: what the rows hold. The rule: formats
here never change; a new kind of row gets a new prefix or a new kind byte.

    0x01 ...                               reserved: rows of this node only, never in a snapshot
    0x02 range id (8 bytes) kind ...       replicated rows of a range (kinds below); they travel in its snapshots
    0x10 user key                          the latest version of a user key
    0x11 ...                               reserved: older versions of user keys

User keys follow their prefix unescaped, so a version suffix could not be told from the end of a key there. Older
versions get a prefix of their own, where the key can be escaped or its length kept without touching the hot format.

Locks, transaction records and the expiry index belong at user keys too, behind prefixes that sort by user key, so that
a split moves them with their span without looking at them (trap 26). Only what belongs to the group as a whole
(applied state, descriptor, session table) is kept by range id.
"""

from struct import Struct
from typing import Final

from shardkv.types import KeyRange

LOCAL_PREFIX: Final = b"\x01"
"""Reserved for rows of this node only."""
SYSTEM_PREFIX: Final = b"\x02"
SYSTEM_END: Final = b"\x03"
"""The first key after every range's system rows."""
USER_PREFIX: Final = b"\x10"
USER_END: Final = b"\x11"
"""The first key after every user key; what an unbounded span ends at."""
HISTORY_PREFIX: Final = b"\x11"
"""Reserved."""

APPLIED: Final = b"a"
"""One row: applied index and term, replicated time, configuration; or the mark of an unfinished install."""
DESCRIPTOR: Final = b"d"
"""One row: the range's descriptor."""
SESSIONS: Final = b"s"
"""One row for each entry that recorded outcomes, keyed by the entry's index."""
EXTENSION: Final = b"x"
"""The rows of a range's extension (the placement group's, in range 0)."""

_SYSTEM_HEAD: Final = Struct(">cQ")
_SYSTEM_ROW: Final = Struct(">cQc")
_INDEXED_ROW: Final = Struct(">cQcQ")
_INDEX: Final = Struct(">Q")
SYSTEM_HEAD_BYTES: Final = _SYSTEM_HEAD.size


def system_prefix(range_id: int) -> bytes:
    """What all replicated system rows of a range begin with."""
    return _SYSTEM_HEAD.pack(SYSTEM_PREFIX, range_id)


def system_span(range_id: int) -> tuple[bytes, bytes]:
    """All replicated system rows of a range, half-open."""
    if range_id == (1 << 64) - 1:
        return system_prefix(range_id), SYSTEM_END
    return system_prefix(range_id), system_prefix(range_id + 1)


def system_key_range_id(key: bytes) -> int:
    """The range whose replicated system row a key names."""
    range_id: int = _SYSTEM_HEAD.unpack_from(key)[1]
    return range_id


def kind_span(range_id: int, kind: bytes) -> tuple[bytes, bytes]:
    """The rows of one kind of a range, half-open."""
    prefix = system_prefix(range_id)
    return prefix + kind, prefix + bytes((kind[0] + 1,))


def applied_key(range_id: int) -> bytes:
    return _SYSTEM_ROW.pack(SYSTEM_PREFIX, range_id, APPLIED)


def descriptor_key(range_id: int) -> bytes:
    return _SYSTEM_ROW.pack(SYSTEM_PREFIX, range_id, DESCRIPTOR)


def session_key(range_id: int, index: int) -> bytes:
    return _INDEXED_ROW.pack(SYSTEM_PREFIX, range_id, SESSIONS, index)


def session_key_index(key: bytes) -> int:
    """The entry index of a row that :func:`session_key` names."""
    index: int = _INDEX.unpack_from(key, SYSTEM_HEAD_BYTES + 1)[0]
    return index


def extension_prefix(range_id: int) -> bytes:
    """What the keys of a range's extension begin with."""
    return system_prefix(range_id) + EXTENSION


def user_key(key: bytes) -> bytes:
    """Where the latest version of a user's key is kept."""
    return USER_PREFIX + key


def user_span(span: KeyRange) -> tuple[bytes, bytes]:
    """The engine's half-open span for the user keys of ``span``."""
    return USER_PREFIX + span.start, USER_END if span.end is None else USER_PREFIX + span.end
