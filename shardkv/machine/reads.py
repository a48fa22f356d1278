"""Reading a range's user keys: single keys and pages of a scan.

Pure of when a read is allowed (leases, ReadIndex, staleness): the caller has settled that, and calls in the same step.
The rule: keys outside the machine's applied span are never answered, whatever the engine holds there (trap 21).
"""

from collections.abc import Sequence
from typing import Any

from shardkv.errors import EpochMismatch
from shardkv.machine import keys
from shardkv.machine.envelope import FORMAT, HEAD_BYTES, unpack_head, unreadable
from shardkv.machine.machine import RangeMachine
from shardkv.storage.engine import Reader
from shardkv.types import KeyRange


def get(machine: RangeMachine, reader: Reader, user_keys: Sequence[bytes]) -> list[list[Any] | None]:
    """``[value, version]`` of each key, None where it is absent.

    Raises EpochMismatch when a key lies outside the range, Corruption when a value cannot be understood.
    """
    if not user_keys:
        return []
    span = machine.descriptor.span
    if min(user_keys) < span.start or (span.end is not None and max(user_keys) >= span.end):
        raise EpochMismatch(current=(machine.descriptor,))
    prefix = keys.USER_PREFIX
    if len(user_keys) == 1:
        envelopes = [reader.get(prefix + user_keys[0])]
    else:
        envelopes = reader.get_many([prefix + key for key in user_keys])
    found: list[list[Any] | None] = []
    for envelope in envelopes:
        if envelope is None:
            found.append(None)
            continue
        head, version = unpack_head(envelope)
        if head != FORMAT:
            raise unreadable(envelope)
        found.append([envelope[HEAD_BYTES:], version])
    return found


def scan_page(
    machine: RangeMachine,
    reader: Reader,
    start: bytes,
    end: bytes | None,
    limit: int,
    bytes_max: int,
    reverse: bool = False,
    keys_only: bool = False,
) -> tuple[list[Any], bool]:
    """Keys of the range from ``start`` to ``end``, in order or with ``reverse`` in the opposite one.

    The first is ``[key, value, version, key, value, version, ...]`` (value None with ``keys_only``): at most ``limit``
    keys, and no key is begun once keys and values make ``bytes_max`` bytes, so one key always fits. The second says
    whether keys of the span remain in this range. ``start`` and ``end`` are cut to the range's span. Raises Corruption.
    """
    span = machine.descriptor.span
    wanted = KeyRange(max(start, span.start), _lower(end, span.end))
    found: list[Any] = []
    if wanted.empty:
        return found, False
    append = found.append
    left, room = limit, bytes_max
    for key, envelope in reader.scan(*keys.user_span(wanted), reverse=reverse):
        if left <= 0 or room <= 0:
            return found, True
        left -= 1
        head, version = unpack_head(envelope)
        if head != FORMAT:
            raise unreadable(envelope)
        append(key[1:])
        if keys_only:
            room -= len(key)
            append(None)
        else:
            room -= len(key) + len(envelope)
            append(envelope[HEAD_BYTES:])
        append(version)
    return found, False


def _lower(one: bytes | None, other: bytes | None) -> bytes | None:
    """The lower of two ends; None is above all."""
    if one is None:
        return other
    return one if other is None else min(one, other)
