r"""How keys and values look to people and to programs: escapes, base64, and the JSON rules. Pure.

On the command line bytes are UTF-8 with ``\xNN`` and ``\\`` escapes, or base64 where asked. What is shown can be typed
back in: ``unescape(escape(data)) == data`` for every ``data``.

In JSON versions are decimal strings (they exceed 2**53), a field that is not UTF-8 is renamed with ``_base64``, and an
unbounded end is null.
"""

import base64
import binascii
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

_ESCAPE: Final = re.compile(rb"\\(\\|x[0-9A-Fa-f]{2}|.?)", re.DOTALL)
_VERSION_FIELDS: Final = frozenset({"version", "current", "timestamp"})
BASE64_SUFFIX: Final = "_base64"


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
    return "".join(f"\\x{byte:02x}" for byte in character.encode("utf-8", "surrogateescape"))


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
        shown = match[0].decode("utf-8", "replace")
        raise ValueError(rf"{shown!r} is no escape; write \xNN for a byte and \\ for a backslash")

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
    """A key or value for the terminal, such that :func:`read` gives it back."""
    return base64.b64encode(data).decode("ascii") if base64_text else escape(data)


def json_field(name: str, value: object) -> tuple[str, object]:
    """One field of a JSON object after the rules: its name, which may change, and its value."""
    if isinstance(value, bytes | bytearray):
        try:
            return name, value.decode("utf-8")
        except UnicodeDecodeError:
            return name + BASE64_SUFFIX, base64.b64encode(value).decode("ascii")
    if name in _VERSION_FIELDS and isinstance(value, int) and not isinstance(value, bool):
        return name, str(value)
    return name, json_value(value)


def json_value(value: object) -> Any:
    """A value that ``json.dumps`` takes, with the rules applied to every object inside it."""
    if isinstance(value, Mapping):
        return dict(json_field(str(name), inner) for name, inner in value.items())
    if isinstance(value, bytes | bytearray):
        name, shown = json_field("", value)
        return {BASE64_SUFFIX.strip("_"): shown} if name else shown
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [json_value(inner) for inner in value]
    return value


def to_json(value: object, *, compact: bool = False) -> str:
    """One JSON document."""
    if compact:
        return json.dumps(json_value(value), ensure_ascii=False, separators=(",", ":"))
    return json.dumps(json_value(value), ensure_ascii=False, indent=2)


def bytes_from_json(fields: Mapping[str, object], name: str) -> bytes | None:
    """The inverse of :func:`json_field` for a bytes field; None when it is absent. Raises ValueError."""
    encoded = fields.get(name + BASE64_SUFFIX)
    if encoded is not None:
        if not isinstance(encoded, str):
            raise ValueError(f"{name}{BASE64_SUFFIX} must be text")
        return read(encoded, base64_text=True)
    plain = fields.get(name)
    if plain is None:
        return None
    if not isinstance(plain, str):
        raise ValueError(f"{name} must be text")
    return plain.encode("utf-8")
