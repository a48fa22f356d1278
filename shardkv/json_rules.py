"""How keys and values look in JSON: text where they are UTF-8, else base64 in a field whose name says so. Pure.

Versions are decimal strings, for they exceed 2**53, and an unbounded end is null.

The command line's ``--json`` and a node's admin endpoint follow the same rules, so a program reads both alike.
"""

import base64
import json
from collections.abc import Mapping, Sequence
from typing import Any, Final

BASE64_SUFFIX: Final = "_base64"
_VERSION_FIELDS: Final = frozenset({"version", "current", "timestamp"})
"""Numbers that exceed 2**53, which many JSON readers cannot hold, and so become decimal text."""


def json_field(name: str, value: object) -> tuple[str, Any]:
    """One field of an object after the rules: its name, which may change, and its value."""
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


def to_json(value: object, *, compact: bool = False, ascii_only: bool = False) -> str:
    """One JSON document. With ``ascii_only`` other characters are JSON's own escapes."""
    if compact:
        return json.dumps(json_value(value), ensure_ascii=ascii_only, separators=(",", ":"))
    return json.dumps(json_value(value), ensure_ascii=ascii_only, indent=2)
