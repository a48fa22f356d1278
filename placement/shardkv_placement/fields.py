"""Checks of single fields of decoded CBOR, shared by commands, operators and heartbeats.

Each returns the value it was given, typed, or raises MalformedRequest naming the field. Nothing here knows a message.
"""

from typing import Any, Final

from shardkv.codec import malformed
from shardkv.types import ADDRESS_BYTES_MAX, LABELS_MAX, NAME_BYTES_MAX, RangeDescriptor

ID_MAX: Final = (1 << 62) - 1
"""Ids stay below 64 bits. That one mistaken report cannot exhaust a counter is :mod:`.state`'s matter."""
REPLICAS_MAX: Final = 16
"""Voters and learners of one range, a joint change's additions included."""

Labels = tuple[tuple[str, str], ...]
"""A node's labels, sorted by name."""


def integer(value: Any, what: str, minimum: int = 0, maximum: int = ID_MAX) -> int:
    if type(value) is not int or not minimum <= value <= maximum:
        raise malformed(f"{what} must be an integer from {minimum} to {maximum}, not {value!r:.100}")
    return value


def flag(value: Any, what: str) -> bool:
    if type(value) is not bool:
        raise malformed(f"{what} must be true or false, not {value!r:.100}")
    return value


def text(value: Any, what: str, bytes_max: int, *, empty: bool = False) -> str:
    if type(value) is not str or len(value.encode(errors="replace")) > bytes_max or not (value or empty):
        raise malformed(f"{what} must be text of {0 if empty else 1} to {bytes_max} bytes, not {value!r:.100}")
    return value


def name(value: Any) -> str:
    return text(value, "a node's name", NAME_BYTES_MAX)


def address(value: Any) -> str:
    return text(value, "a node's address", ADDRESS_BYTES_MAX)


def blob(value: Any, what: str, length: int) -> bytes:
    if type(value) is not bytes or len(value) != length:
        raise malformed(f"{what} must be {length} bytes")
    return value


def array(value: Any, what: str, count_max: int) -> list[Any]:
    if type(value) is not list or len(value) > count_max:
        raise malformed(f"{what} must be an array of at most {count_max}")
    return value


def labels(value: Any) -> Labels:
    """``[[name, value], ...]``, each name once; sorted."""
    found: dict[str, str] = {}
    for pair in array(value, "labels", LABELS_MAX):
        match pair:
            case [str(key), str(content)]:
                found[text(key, "a label", NAME_BYTES_MAX)] = text(
                    content, f"label {key!r:.80}", NAME_BYTES_MAX, empty=True
                )
            case _:
                raise malformed(f"a label must be a pair of texts, not {pair!r:.100}")
    return tuple(sorted(found.items()))


def labels_to_wire(pairs: Labels) -> list[list[str]]:
    return [[key, content] for key, content in pairs]


def descriptor(value: Any) -> RangeDescriptor:
    """A range descriptor whose ids are in bounds, whose replicas are distinct and on distinct nodes."""
    try:
        found = RangeDescriptor.from_wire(value)
    except ValueError as error:
        raise malformed(str(error)) from error
    integer(found.range_id, "a range id")
    integer(found.epoch.membership, "a membership generation")
    integer(found.epoch.span, "a span generation")
    if not 1 <= len(found.replicas) <= REPLICAS_MAX:
        raise malformed(f"range {found.range_id} must have 1 to {REPLICAS_MAX} replicas, not {len(found.replicas)}")
    for replica in found.replicas:
        integer(replica.node_id, "a node id", 1)
        integer(replica.replica_id, "a replica id", 1)
    if len({replica.node_id for replica in found.replicas}) != len(found.replicas):
        raise malformed(f"range {found.range_id} names a node twice")
    if len({replica.replica_id for replica in found.replicas}) != len(found.replicas):
        raise malformed(f"range {found.range_id} names a replica twice")
    return found
