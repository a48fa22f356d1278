r"""How keys and values look to people and to programs: escapes and base64. Pure.

On the command line bytes are UTF-8 with ``\xNN`` and ``\\`` escapes, or base64 where asked. What is shown can be typed
back in: ``unescape(escape(data)) == data`` for every ``data``.

What JSON looks like is said in ``shardkv.json_rules``; here is only how a field is read back.
"""

import base64
import binascii
import codecs
import re
from collections.abc import Mapping
from typing import Final

from shardkv.json_rules import BASE64_SUFFIX

ESCAPES: Final = "shardkv-escapes"
"""The name of an error handler for text files: what their encoding lacks is written as escapes."""
_ESCAPE: Final = re.compile(rb"\\(\\|x[0-9A-Fa-f]{2}|.?)", re.DOTALL)


def escape(data: bytes) -> str:
    """Printable text for any bytes; what is not printable UTF-8 becomes ``\\xNN``, a backslash ``\\\\``."""
    text = data.decode("utf-8", "surrogateescape")
    if text.isprintable() and "\\" not in text:
        return text
    return "".join(_shown(character) for character in text)


def _shown(character: str) -> str:
    if character == "\\":
        return "\\\\"
    if character.isprintable():
        return character
    return _escapes(character)


def _escapes(characters: str) -> str:
    return "".join(f"\\x{byte:02x}" for byte in characters.encode("utf-8", "surrogateescape"))


def _escape_what_is_lacking(problem: UnicodeError) -> tuple[str, int]:
    if not isinstance(problem, UnicodeEncodeError):
        raise problem
    return _escapes(problem.object[problem.start : problem.end]), problem.end


codecs.register_error(ESCAPES, _escape_what_is_lacking)


def unescape(text: str) -> bytes:
    """The bytes that a person typed. Raises ValueError for a backslash that starts neither escape."""
    data = text.encode("utf-8", "surrogateescape")
    if b"\\" not in data:
        return data

    def replace(match: re.Match[bytes]) -> bytes:
        escaped = match[1]
        if escaped == b"\\":
            return b"\\"
        if len(escaped) == 3:
            return bytes((int(escaped[1:], 16),))
        shown = data[match.start() :].decode("utf-8", "replace")[:2]
        raise ValueError(rf"{shown} is no escape; write \xNN for a byte and \\ for a backslash")

    return _ESCAPE.sub(replace, data)


def read(text: str, base64_text: bool = False) -> bytes:
    """A key or value from the command line. Raises ValueError."""
    if not base64_text:
        return unescape(text)
    try:
        return base64.b64decode(text.encode("ascii"), validate=True)
    except (binascii.Error, UnicodeEncodeError) as problem:
        raise ValueError(f"{text!r} is not base64: {problem}") from None


def show(data: bytes, base64_text: bool = False) -> str:
    """A key or value for the terminal, such that :func:`read` gives it back; typed, a single dash would be stdin."""
    if data == b"-" and not base64_text:
        return _escapes("-")
    return base64.b64encode(data).decode("ascii") if base64_text else escape(data)


def counted(count: int, noun: str) -> str:
    """Such as ``1 key`` and ``2,000 keys``."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def bytes_from_json(fields: Mapping[str, object], name: str) -> bytes | None:
    """The inverse of :func:`shardkv.json_rules.json_field` for bytes; None when they are absent.

    Raises ValueError, also where both forms are there: which one was meant nobody knows.
    """
    encoded, plain = fields.get(name + BASE64_SUFFIX), fields.get(name)
    if encoded is not None and plain is not None:
        raise ValueError(f"give {name} or {name}{BASE64_SUFFIX}, not both")
    if encoded is not None:
        if not isinstance(encoded, str):
            raise ValueError(f"{name}{BASE64_SUFFIX} must be text")
        return read(encoded, base64_text=True)
    if plain is None:
        return None
    if not isinstance(plain, str):
        raise ValueError(f"{name} must be text")
    return plain.encode("utf-8")
