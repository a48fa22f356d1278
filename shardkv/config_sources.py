"""How the command line's flags, the process's environment and a TOML file become one configuration of a node.

Pure: no file is read and no variable looked up here; callers hand in what they found. Does not live here: which
settings there are, and their bounds (``config``). The rules: flag wins over environment, environment over file, file
over default; each error is a :class:`~shardkv.errors.ConfigError` that names the setting and where its value came from.
"""

import dataclasses
import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, NamedTuple

from shardkv.config import SECTIONS, SETTINGS, Kind, NodeConfig, Setting, problem_with
from shardkv.errors import ConfigError

_SIZE: Final = re.compile(r"(-?[0-9][0-9_]*)\s*(B|KiB|MiB|GiB|TiB)?")
_UNITS: Final = {"": 1, "B": 1, "KiB": 1024, "MiB": 1024**2, "GiB": 1024**3, "TiB": 1024**4}
_TRUE: Final = frozenset({"1", "true", "yes", "on"})
_FALSE: Final = frozenset({"0", "false", "no", "off"})


class Given(NamedTuple):
    """A value somebody gave for a setting, and where, in the words that an error message quotes."""

    value: Any
    origin: str
    rank: int
    """0 file, 1 environment, 2 flag; the highest wins."""


def load_node_config(
    flags: Mapping[str, object],
    variables: Mapping[str, str],
    file_text: str | None = None,
    file_name: str = "",
) -> NodeConfig:
    """One configuration from the three sources, checked.

    Args:
        flags: Setting name to the text given on the command line (bool for a switch, a sequence for the settings
            that repeat); None or an empty sequence where the flag was not given.
        variables: The process's environment.
        file_text: The TOML file's content, or None without a file; ``file_name`` is for messages.

    Raises:
        ConfigError: something is missing, unknown, of the wrong type or out of bounds; the message names the setting
            and where its value came from.
    """
    given: dict[str, Given] = {}
    if file_text is not None:
        given |= _from_file(file_text, file_name)
    given |= _from_environment(variables)
    given |= _from_flags(flags)
    _choose_first_start(given)
    values: dict[str, dict[str, Any]] = {section: {} for section in ("", *SECTIONS)}
    for name, setting in SETTINGS.items():
        if name in given:
            values[setting.section][name] = _checked(setting, given[name])
        elif setting.default is dataclasses.MISSING:
            raise ConfigError(
                f"{name} is missing: give {setting.flag}, the environment variable {setting.variable},"
                f" or {setting.path} in the configuration file"
            )
    try:
        sections = {section: cls(**values[section]) for section, cls in SECTIONS.items()}
        return NodeConfig(**values[""], **sections)
    except ConfigError as problem:
        raise ConfigError(f"{problem}{_origins(str(problem), given)}") from None


def _origins(message: str, given: Mapping[str, Given]) -> str:
    """Where the settings that a message about several of them names came from."""
    words = set(re.findall(r"[a-z_]+", message))
    parts = [f"{name} from {given[name].origin}" for name in SETTINGS if name in words and name in given]
    return f" ({', '.join(parts)})" if parts else ""


def _choose_first_start(given: dict[str, Given]) -> None:
    """``bootstrap`` and ``join`` are two answers to one question: the source of higher rank answers it."""
    bootstrap, join = given.get("bootstrap"), given.get("join")
    if not bootstrap or not join or bootstrap.rank == join.rank:
        return
    denied = str(bootstrap.value).lower() in _FALSE  # False among them
    parts = [join.value] if isinstance(join.value, str) else join.value
    nobody = isinstance(parts, Sequence) and not any(str(part).strip(" ,") for part in parts)
    if not denied and not nobody:
        del given["join" if bootstrap.rank > join.rank else "bootstrap"]


def _from_flags(flags: Mapping[str, object]) -> dict[str, Given]:
    given = {}
    for name, value in flags.items():
        setting = SETTINGS.get(name)
        if setting is None:
            raise ConfigError(f"unknown option --{name.replace('_', '-')}")
        if value is not None and value != () and value != []:
            given[name] = Given(value, setting.flag, 2)
    return given


def _from_environment(variables: Mapping[str, str]) -> dict[str, Given]:
    return {
        name: Given(variables[setting.variable], f"the environment variable {setting.variable}", 1)
        for name, setting in SETTINGS.items()
        if variables.get(setting.variable)
    }


def _from_file(text: str, file_name: str) -> dict[str, Given]:
    try:
        document = tomllib.loads(text)
    except (ValueError, RecursionError) as problem:
        raise ConfigError(f"{file_name} is not a TOML file: {problem}") from None
    given: dict[str, Given] = {}
    for key, value in document.items():
        if key in SECTIONS:
            if not isinstance(value, dict):
                raise ConfigError(f"{key} in {file_name} must be a table")
            for name, inner in value.items():
                given[_known(key, name, file_name)] = Given(inner, f"{key}.{name} in {file_name}", 0)
        else:
            given[_known("", key, file_name)] = Given(value, f"{key} in {file_name}", 0)
    return given


def _known(section: str, name: str, file_name: str) -> str:
    setting = SETTINGS.get(name)
    if setting is not None and setting.section == section:
        return name
    path = f"{section}.{name}" if section else name
    meant = f"; it belongs at {setting.path}" if setting is not None else ""
    raise ConfigError(f"unknown setting {path} in {file_name}{meant}")


def _checked(setting: Setting, given: Given) -> Any:
    """The value in its final type. Raises ConfigError that names setting and origin."""
    try:
        value = _READERS[setting.kind](given.value)
    except ValueError as problem:
        raise ConfigError(f"{setting.name} {problem} (from {given.origin})") from None
    out_of_bounds = problem_with(setting, value)
    if out_of_bounds:
        raise ConfigError(f"{setting.name} {out_of_bounds} (from {given.origin})")
    return value


def _read_text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(f"must be text, not {value!r}")
    return value


def _read_switch(value: object) -> bool:
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.lower() in _TRUE | _FALSE:
        return value.lower() in _TRUE
    raise ValueError(f"must be true or false, not {value!r}")


def _read_count(value: object) -> int:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, str) and re.fullmatch(r"-?[0-9][0-9_]*", value):
        return int(value)
    raise ValueError(f"must be a whole number, not {value!r}")


def _read_bytes(value: object) -> int:
    if isinstance(value, str):
        match = _SIZE.fullmatch(value.strip())
        if match is None:
            raise ValueError(f"must be a count of bytes such as 67108864 or 64MiB, not {value!r}")
        return int(match[1]) * _UNITS[match[2] or ""]
    return _read_count(value)


def _texts(value: object) -> list[str]:
    """The parts of a setting that repeats: a sequence of texts, each a comma-separated list."""
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, Sequence) or not all(isinstance(each, str) for each in value):
        raise ValueError(f"must be text or a list of texts, not {value!r}")
    return [part.strip() for each in value for part in each.split(",") if part.strip()]


def _read_address(value: object) -> str:
    return _read_text(value).strip()


def _read_addresses(value: object) -> tuple[str, ...]:
    return tuple(_texts(value))


def _read_labels(value: object) -> tuple[tuple[str, str], ...]:
    if isinstance(value, Mapping):
        pairs = [(str(key), text) for key, text in value.items()]
        for key, text in pairs:
            if not isinstance(text, str):
                raise ValueError(f"must have text for {key}, not {text!r}")
        return tuple(sorted(pairs))
    pairs = []
    for each in _texts(value):
        key, equals, text = each.partition("=")
        if not equals:
            raise ValueError(f"must be KEY=VALUE, not {each!r}")
        pairs.append((key, text))
    return tuple(sorted(pairs))


_READERS: Final[dict[Kind, Callable[[object], Any]]] = {
    Kind.NAME: _read_text,
    Kind.PATH: _read_text,
    Kind.SWITCH: _read_switch,
    Kind.CHOICE: _read_text,
    Kind.COUNT: _read_count,
    Kind.BYTES: _read_bytes,
    Kind.ADDRESS: _read_address,
    Kind.LISTEN_ADDRESS: _read_address,
    Kind.ADDRESSES: _read_addresses,
    Kind.LABELS: _read_labels,
}
assert set(_READERS) == set(Kind), set(Kind) - set(_READERS)
