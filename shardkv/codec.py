"""CBOR as shardkv speaks it: plain values only, whole inputs only, and ``struct`` helpers for the hot envelopes.

Everything decoded here may come from an enemy. Tags (which build arbitrary objects), indefinite lengths, deep nesting,
map keys that are not strings (of text or bytes), and trailing bytes are refused with
:class:`~shardkv.errors.MalformedRequest`. What CBOR calls simple values comes out as objects of cbor2's, which have
none of the types that a message is made of.
"""

from collections.abc import Callable
from io import BytesIO
from struct import Struct
from typing import Any, Final, Never

import cbor2

from shardkv.errors import MalformedRequest

DEPTH_MAX: Final = 24
"""Deeper than anything the protocol has, and far from what the C stack bears."""

UNCOUNTED_BYTES_MAX: Final = 256 * 1024
"""Input of a client up to this size is decoded as it is; all of it tiny items, it is 16 MiB of lists."""
ITEMS_MAX: Final = 1 << 18
"""Items in larger input; requests that large have few, for their bytes are keys and values."""

_HEAD16: Final = Struct(">BH")
_HEAD32: Final = Struct(">BI")
_HEAD64: Final = Struct(">BQ")


def _refuse_tag(*_: object) -> Never:
    raise ValueError("CBOR tags are not allowed")


# A built-in decoder of a tag runs before `tag_hook` is asked, so each is overridden by name.
_TAGS_BUILT_IN: Final = (
    0,
    1,
    2,
    3,
    4,
    5,
    25,
    28,
    29,
    30,
    35,
    36,
    37,
    52,
    54,
    100,
    256,
    258,
    260,
    261,
    1004,
    43000,
    55799,
)
_SEMANTIC_DECODERS: Final = dict.fromkeys(_TAGS_BUILT_IN, _refuse_tag)

dumps: Final[Callable[[object], bytes]] = cbor2.dumps
"""Encode one value. Bytes must be ``bytes``: a memoryview would become an array of integers."""


def malformed(reason: str) -> MalformedRequest:
    return MalformedRequest(f"malformed message: {reason}")


def loads(data: bytes) -> Any:
    """The one value in ``data``. Raises MalformedRequest for anything that is not exactly one plain CBOR value."""
    source = BytesIO(data)
    try:
        value = cbor2.CBORDecoder(
            source,
            tag_hook=_refuse_tag,
            semantic_decoders=_SEMANTIC_DECODERS,
            max_depth=DEPTH_MAX,
            allow_indefinite=False,
            allow_duplicate_keys=False,
            strict_hashable_types=True,
        ).decode()
    except (cbor2.CBORError, ValueError, TypeError, OverflowError, MemoryError, RecursionError) as error:
        raise malformed(f"not CBOR as this protocol allows it ({error})") from error
    if source.tell() != len(data):
        raise malformed(f"{len(data) - source.tell()} bytes follow its end")
    return value


def loads_bounded(data: bytes) -> Any:
    """:func:`loads` for what a client sent: one byte of it may be a list of 56, so large input is counted first."""
    if len(data) > UNCOUNTED_BYTES_MAX and count_items(data, ITEMS_MAX) > ITEMS_MAX:
        raise malformed(f"{len(data)} bytes with more than {ITEMS_MAX} items")
    return loads(data)


def count_items(data: bytes, count_max: int) -> int:
    """How many CBOR items follow each other in ``data``, inner ones too; stops above ``count_max``, and at nonsense."""
    position, size, count = 0, len(data), 0
    while position < size and count <= count_max:
        head = data[position]
        position += 1
        count += 1
        argument = head & 0x1F
        if argument >= 24:
            if argument > 27:
                break
            width = 1 << argument - 24
            argument = int.from_bytes(data[position : position + width])
            position += width
        if 0x40 <= head < 0x80:
            position += argument
    return count


def loads_own(data: bytes) -> Any:
    """The value in bytes that this cluster wrote and a checksum guards, at half the cost of :func:`loads`."""
    return cbor2.loads(data)


def _head(major: int, value: int) -> bytes:
    if value < 24:
        return bytes((major | value,))
    if value < 1 << 8:
        return bytes((major | 24, value))
    if value < 1 << 16:
        return _HEAD16.pack(major | 25, value)
    if value < 1 << 32:
        return _HEAD32.pack(major | 26, value)
    return _HEAD64.pack(major | 27, value)


def array_head(count: int) -> bytes:
    """What precedes the ``count`` encoded values of an array."""
    return _head(0x80, count)


def bytes_head(count: int) -> bytes:
    """What precedes the ``count`` bytes of a byte string."""
    return _head(0x40, count)


def unsigned(value: int) -> bytes:
    """A whole unsigned integer."""
    return _head(0x00, value)
