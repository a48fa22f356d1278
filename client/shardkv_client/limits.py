"""Checks of what callers pass in, before anything is sent.

A wrong type is a TypeError, everything else one of shardkv's RequestErrors; each says what is allowed.
"""

from collections.abc import Callable, Iterable, Sequence
from math import inf, isfinite
from typing import Final

from shardkv.errors import InvalidRange, KeyTooLarge, MalformedRequest, RequestError, ValueTooLarge
from shardkv.types import KEY_BYTES_MAX, TIMESTAMP_MAX, VALUE_BYTES_MAX
from shardkv.wire.frames import FRAME_BYTES_MAX
from shardkv.wire.requests import Consistency, decode_requests, encode_request, join

_CONSISTENCY: Final = {
    "linearizable": int(Consistency.LINEARIZABLE),
    "follower": int(Consistency.FOLLOWER),
    "stale": int(Consistency.STALE),
}
TEXT_LIKE: Final = (bytes, bytearray, memoryview, str)
"""Types that can be iterated over, and are never meant as a list of keys or pairs, not even when they are empty."""
_INT64_MIN: Final = -(1 << 63)
_INT64_END: Final = 1 << 63


def check_key_type(key: bytes) -> None:
    if not isinstance(key, bytes):
        raise TypeError(f"a key must be bytes, not {type(key).__name__}{_how_to_bytes(key, 'key')}")


def check_value_type(value: bytes) -> None:
    if not isinstance(value, bytes):
        raise TypeError(f"a value must be bytes, not {type(value).__name__}{_how_to_bytes(value, 'value')}")


def _how_to_bytes(given: object, name: str) -> str:
    if isinstance(given, (bytearray, memoryview)):
        return f"; copy it first, bytes({name})"
    return f"; encode text first, for example {name}.encode()" if isinstance(given, str) else ""


def check_key_size(key: bytes) -> None:
    if not 0 < len(key) <= KEY_BYTES_MAX:
        raise KeyTooLarge(f"a key must have 1 to {KEY_BYTES_MAX} bytes; this one has {len(key)}")


def check_value_size(value: bytes) -> None:
    if len(value) > VALUE_BYTES_MAX:
        raise ValueTooLarge(
            f"a value may have {VALUE_BYTES_MAX} bytes; this one has {len(value)}: spread it over several keys"
        )


def check_pair(key: bytes, value: bytes) -> None:
    """A key and a value, as every put has them: one look, if nothing is wrong."""
    if type(key) is bytes and type(value) is bytes and 0 < len(key) <= KEY_BYTES_MAX and len(value) <= VALUE_BYTES_MAX:
        return
    check_key_type(key)
    check_value_type(value)
    check_key_size(key)
    check_value_size(value)


def distinct(keys: Iterable[bytes]) -> list[bytes]:
    """Checked keys in the order given, each once."""
    if isinstance(keys, TEXT_LIKE):
        raise TypeError(f"a list of keys is wanted, not one {type(keys).__name__}; put it into a list")
    if not isinstance(keys, Iterable):
        raise TypeError(f"a list of keys is wanted, not {type(keys).__name__}")
    wanted = list(keys)
    for key in wanted:
        check_key_type(key)
    for key in wanted:
        check_key_size(key)
    return list(dict.fromkeys(wanted))


def check_request(
    method: int, arguments: Sequence[object], *, key: bytes | None, range_id: int | None, node_id: int | None
) -> None:
    """Check a request of any kind, which others will share a frame with: what nobody can encode or read stays here."""
    if key is not None:
        check_key_type(key)
    numbers = {"method": method, "range_id": range_id, "node_id": node_id}
    for name, number in numbers.items():
        if number is None and name != "method":
            continue
        if not isinstance(number, int) or isinstance(number, bool):
            raise TypeError(f"{name} must be an int, not {type(number).__name__}")
        if not 0 <= number < _INT64_END:
            raise RequestError(f"{name} must be from 0 to {_INT64_END - 1}, not {number}")
    try:
        encoded = encode_request(0, method, 0, 0, 0, *arguments)
    except Exception as error:
        raise TypeError(f"the arguments of a call must be plain values: {error}") from error
    if len(encoded) > FRAME_BYTES_MAX // 2:
        raise RequestError(f"a call may have {FRAME_BYTES_MAX // 2} bytes; this one has {len(encoded)}")
    try:
        decode_requests(join([encoded]))
    except MalformedRequest as error:
        raise MalformedRequest(
            f"the arguments of a call must be plain values, and integers fit in 64 bits: {error}"
        ) from error


def check_version(version: int) -> None:
    if not isinstance(version, int) or isinstance(version, bool):
        raise TypeError(f"if_version must be an int, not {type(version).__name__}; it is what a get returned")
    if not 0 <= version <= TIMESTAMP_MAX:
        raise RequestError(f"if_version {version} is no version; use what a get returned, or 0 for an absent key")


def check_delta(delta: int) -> None:
    if not isinstance(delta, int) or isinstance(delta, bool):
        raise TypeError(f"an increment's delta must be an int, not {type(delta).__name__}")
    if not _INT64_MIN <= delta < _INT64_END:
        raise RequestError("an increment's delta must fit in a signed 64-bit integer")


def check_timeout(timeout: float) -> None:
    if type(timeout) is float and 0 <= timeout < inf:
        return
    if not isinstance(timeout, (int, float)) or isinstance(timeout, bool):
        raise TypeError(f"timeout must be a number of seconds, not {type(timeout).__name__}")
    if not (_is_finite(timeout) and timeout >= 0):
        raise RequestError("timeout must be a finite number of seconds from 0 on: no call may hang")


def _is_finite(number: float) -> bool:
    try:
        return isfinite(number)
    except OverflowError:  # an int beyond all floats
        return False


def consistency_of(name: str) -> int:
    """The wire's number for a consistency."""
    if not isinstance(name, str):
        raise TypeError(f"consistency must be a str, not {type(name).__name__}")
    number = _CONSISTENCY.get(name)
    if number is None:
        raise RequestError(f"consistency {name!r} is unknown; use one of {', '.join(map(repr, _CONSISTENCY))}")
    return number


def age_us_of(max_age: float | None, consistency: int) -> int | None:
    """The wire's number for the age that an answer may have, rounded down to whole microseconds."""
    if max_age is None:
        return None
    if not isinstance(max_age, (int, float)) or isinstance(max_age, bool):
        raise TypeError(f"max_age must be a number of seconds or None, not {type(max_age).__name__}")
    if not (_is_finite(max_age) and max_age >= 0):
        raise RequestError("max_age must be a finite number of seconds from 0 on; None allows any age")
    if consistency != Consistency.STALE:
        raise RequestError('max_age is for reads with consistency="stale"; the others are never old')
    return int(min(max_age * 1e6, TIMESTAMP_MAX))  # in this order: the product may be infinite


def check_span(start: bytes, end: bytes | None) -> None:
    if not isinstance(start, bytes):
        raise TypeError(f"start must be bytes, not {type(start).__name__}")
    if end is not None and not isinstance(end, bytes):
        raise TypeError(f"end must be bytes or None, not {type(end).__name__}")
    for name, bound in (("start", start), ("end", end)):
        if bound is not None and len(bound) > KEY_BYTES_MAX:
            raise KeyTooLarge(f"{name} must have at most {KEY_BYTES_MAX} bytes; this one has {len(bound)}")
    if start and end == b"":
        raise InvalidRange("no key comes before an end of b''; leave it out, or None, to go to the last key")
    if end is not None and end < start:
        raise InvalidRange(f"the range ends before it starts ({start!r:.60} to {end!r:.60}); swap start and end")


def span_of(start: bytes, end: bytes | None, prefix: bytes | None) -> tuple[bytes, bytes | None]:
    """The half-open span that a caller asked for, by its bounds or by a prefix."""
    if prefix is None:
        check_span(start, end)
        return start, end
    if not isinstance(prefix, bytes):
        raise TypeError(f"prefix must be bytes, not {type(prefix).__name__}")
    if start != b"" or end is not None:
        raise InvalidRange("prefix excludes start and end; pass either the one or the others")
    if len(prefix) > KEY_BYTES_MAX:
        raise KeyTooLarge(f"a prefix must have at most {KEY_BYTES_MAX} bytes; this one has {len(prefix)}")
    return prefix, after_prefix(prefix)


def deleted_span_of(start: bytes | None, end: bytes | None, prefix: bytes | None) -> tuple[bytes, bytes | None]:
    """As :func:`span_of`, but for every key there is the caller has to say so: a tenant's name that is None or empty
    must not delete the others'."""
    span = span_of(b"" if start is None else start, end, prefix)
    if not prefix and start is None and end is None:
        raise InvalidRange(
            "this would delete every key: give start, end or a longer prefix, or say start=b'' if it shall"
        )
    return span


def after_prefix(prefix: bytes) -> bytes | None:
    """The first key above every key that starts with ``prefix``; None if there is none."""
    stripped = prefix.rstrip(b"\xff")
    return stripped[:-1] + bytes((stripped[-1] + 1,)) if stripped else None


def before(end: bytes | None) -> bytes:
    """The greatest key below ``end``, given that no key is longer than allowed."""
    if end is None:
        return b"\xff" * KEY_BYTES_MAX
    head, last = end[:-1], end[-1]
    if last == 0:
        return head
    return head + bytes((last - 1,)) + b"\xff" * (KEY_BYTES_MAX - len(end))


def check_flag(name: str, flag: bool) -> None:
    if not isinstance(flag, bool):
        raise TypeError(f"{name} must be True or False, not {type(flag).__name__}")


def check_function(name: str, function: Callable[..., object] | None) -> None:
    if function is not None and not callable(function):
        raise TypeError(f"{name} must be a function or None, not {type(function).__name__}")


def check_limit(limit: int | None) -> None:
    if limit is None:
        return
    if not isinstance(limit, int) or isinstance(limit, bool):
        raise TypeError(f"limit must be an int or None, not {type(limit).__name__}")
    if limit < 0:
        raise RequestError(f"limit must be 0 or more, not {limit}")
