"""A node's configuration: frozen dataclasses with their bounds, and how flags, environment and file become one.

Pure: no file is read and no variable looked up here; callers hand in what they found. Every setting is declared once,
as a dataclass field made by :func:`_setting`; its flag, its environment variable, its place in the TOML file and its
bounds follow from that one line. Flag wins over environment, environment over file, file over default; each error is
a :class:`~shardkv.errors.ConfigError` that names the setting and where its value came from.
"""

import dataclasses
import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Final, NamedTuple

from shardkv.address import parse_address
from shardkv.errors import ConfigError

ENVIRONMENT_PREFIX: Final = "SHARDKV_"
ENGINES: Final = ("rocksdb", "memory")
LOG_LEVELS: Final = ("debug", "info", "warning", "error")
NAME_CHARACTERS_MAX: Final = 64
LABELS_MAX: Final = 32
LABEL_BYTES_MAX: Final = 64
"""Of a label's key, and of its value."""
ADDRESS_BYTES_MAX: Final = 256
"""Of these the placement group takes no more: it would refuse the node's start, which nobody but its debug log says."""

_MIB: Final = 1024 * 1024
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_SIZE: Final = re.compile(r"(-?[0-9][0-9_]*)\s*(B|KiB|MiB|GiB|TiB)?")
_UNITS: Final = {"": 1, "B": 1, "KiB": 1024, "MiB": 1024**2, "GiB": 1024**3, "TiB": 1024**4}
_TRUE: Final = frozenset({"1", "true", "yes", "on"})
_FALSE: Final = frozenset({"0", "false", "no", "off"})


class Kind(Enum):
    """What a setting's value is; how it is read from text, and checked, follows from this."""

    NAME = "name"
    PATH = "path"
    SWITCH = "switch"
    CHOICE = "choice"
    COUNT = "count"
    BYTES = "bytes"
    """A count of bytes; text may end in KiB, MiB, GiB or TiB."""
    ADDRESS = "address"
    LISTEN_ADDRESS = "listen address"
    """An address to bind, where port 0 means any free port."""
    ADDRESSES = "addresses"
    LABELS = "labels"


def _setting(
    kind: Kind,
    default: object = dataclasses.MISSING,
    *,
    help: str,
    low: int | None = None,
    high: int | None = None,
    choices: tuple[str, ...] = (),
    metavar: str = "",
) -> Any:
    """A configurable field. ``low`` and ``high`` are both allowed values."""
    metadata = {"kind": kind, "help": help, "low": low, "high": high, "choices": choices, "metavar": metavar}
    if default is dataclasses.MISSING:
        return field(metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, slots=True)
class RaftConfig:
    """Timing of every Raft group. ``heartbeat_ticks < election_ticks``; a lease promise outlives a heartbeat interval
    and ends no later than an election timeout, else a lease is never held or outlives its leader's doubt."""

    tick_ms: int = _setting(Kind.COUNT, 50, low=1, high=10_000, help="Milliseconds between two ticks.")
    heartbeat_ticks: int = _setting(Kind.COUNT, 2, low=1, high=1_000, help="Ticks between two heartbeats of a leader.")
    election_ticks: int = _setting(
        Kind.COUNT, 10, low=2, high=10_000, help="Ticks without a leader before a follower campaigns."
    )
    promise_ms: int = _setting(
        Kind.COUNT, 400, low=1, high=60_000, help="How long a follower promises a leader to let nobody else lead."
    )
    sync_stall_ms: int = _setting(
        Kind.COUNT,
        1_000,
        low=50,
        high=600_000,
        help="A node whose log sync takes longer than this gives its leaderships away.",
    )

    def __post_init__(self) -> None:
        check_bounds(self)
        if self.heartbeat_ticks >= self.election_ticks:
            raise ConfigError(
                f"heartbeat_ticks ({self.heartbeat_ticks}) must be smaller than election_ticks ({self.election_ticks})"
            )
        heartbeat_ms, election_ms = self.heartbeat_ticks * self.tick_ms, self.election_ticks * self.tick_ms
        if not heartbeat_ms < self.promise_ms <= election_ms:
            raise ConfigError(
                f"promise_ms ({self.promise_ms}) must be above heartbeat_ticks * tick_ms ({heartbeat_ms})"
                f" and at most election_ticks * tick_ms ({election_ms})"
            )


@dataclass(frozen=True, slots=True)
class StorageConfig:
    """The Raft log and the engine of one node."""

    engine: str = _setting(
        Kind.CHOICE, "rocksdb", choices=ENGINES, help="rocksdb keeps data on disk; memory is for throw-away clusters."
    )
    segment_bytes: int = _setting(
        Kind.BYTES, 64 * _MIB, low=64 * 1024, high=1024 * _MIB, help="Size of one Raft log segment file."
    )
    cache_bytes: int = _setting(
        Kind.BYTES, 32 * _MIB, low=_MIB, high=1024 * 1024 * _MIB, help="The engine's block cache."
    )

    free_bytes_min: int = _setting(
        Kind.BYTES,
        256 * _MIB,
        low=_MIB,
        high=1024 * 1024 * _MIB,
        help="With less than this free on its disk a node refuses writes, but not deletes and reads.",
    )

    def __post_init__(self) -> None:
        check_bounds(self)


@dataclass(frozen=True, slots=True)
class RangesConfig:
    """When ranges change shape."""

    split_bytes: int = _setting(
        Kind.BYTES,
        64 * _MIB,
        low=16 * 1024,
        high=16 * 1024 * _MIB,
        help="A range is split in two once it holds more than this.",
    )
    replicas: int = _setting(
        Kind.COUNT, 3, low=1, high=7, help="How many nodes hold each range, as far as there are nodes; an odd number."
    )

    def __post_init__(self) -> None:
        check_bounds(self)
        if self.replicas % 2 == 0:
            raise ConfigError(
                f"replicas must be odd, not {self.replicas}: it survives no more failures than {self.replicas - 1}"
            )


@dataclass(frozen=True, slots=True)
class LimitsConfig:
    """Bounds on what clients may have under way. Past them a connection is not read, or a request is told Busy."""

    connections_max: int = _setting(Kind.COUNT, 4_096, low=8, high=1_000_000, help="Client connections of one node.")
    connection_requests_max: int = _setting(
        Kind.COUNT,
        4_096,
        low=1,
        high=1_000_000,
        help="Unanswered requests of one connection; above it the connection is not read.",
    )

    def __post_init__(self) -> None:
        check_bounds(self)


@dataclass(frozen=True, slots=True)
class SnapshotsConfig:
    """What streams of whole ranges between nodes may take from this node's other work."""

    snapshot_send_bytes_per_second: int = _setting(
        Kind.BYTES,
        32 * _MIB,
        low=_MIB,
        high=1024 * 1024 * _MIB,
        help="Rows of snapshots that this node sends in a second, all together.",
    )
    snapshot_receive_bytes_per_second: int = _setting(
        Kind.BYTES,
        32 * _MIB,
        low=_MIB,
        high=1024 * 1024 * _MIB,
        help="Rows of snapshots that this node takes in a second, all together.",
    )
    snapshots_sending_max: int = _setting(Kind.COUNT, 2, low=1, high=16, help="Snapshots sent at once.")
    snapshots_receiving_max: int = _setting(
        Kind.COUNT, 2, low=1, high=16, help="Snapshots received or installed at once."
    )

    def __post_init__(self) -> None:
        check_bounds(self)


@dataclass(frozen=True, slots=True)
class NodeConfig:
    """Everything that one node is told at its start.

    ``advertise`` None means the address that ``listen`` was bound to. Neither ``bootstrap`` nor ``join`` is for a node
    that starts again on its data. Raises ConfigError when a value is out of bounds or two contradict each other.
    """

    name: str = _setting(Kind.NAME, help="The node's name, unique in the cluster.", metavar="NAME")
    data: str = _setting(Kind.PATH, help="The directory that holds all of this node's data.", metavar="DIR")
    listen: str = _setting(
        Kind.LISTEN_ADDRESS, help="Where clients and other nodes connect; port 0 takes a free one.", metavar="HOST:PORT"
    )
    advertise: str | None = _setting(
        Kind.ADDRESS, None, help="The address others reach this node at, where it is not --listen.", metavar="HOST:PORT"
    )
    admin: str | None = _setting(
        Kind.LISTEN_ADDRESS, None, help="Where the admin page and metrics are served.", metavar="HOST:PORT"
    )
    bootstrap: bool = _setting(Kind.SWITCH, False, help="Start a new cluster with this node as its first.")
    join: tuple[str, ...] = _setting(
        Kind.ADDRESSES, (), help="Join the cluster of these nodes.", metavar="HOST:PORT,..."
    )
    label: tuple[tuple[str, str], ...] = _setting(
        Kind.LABELS, (), help="A label of this node, such as zone=a; may be repeated.", metavar="KEY=VALUE"
    )
    clock_offset_max_ms: int = _setting(
        Kind.COUNT, 500, low=10, high=60_000, help="Beyond it timestamps are refused and wall clocks not followed."
    )
    log_level: str = _setting(
        Kind.CHOICE, "info", choices=LOG_LEVELS, help="The least severe log line that is written."
    )
    raft: RaftConfig = field(default_factory=RaftConfig)
    storage: StorageConfig = field(default_factory=StorageConfig)
    ranges: RangesConfig = field(default_factory=RangesConfig)
    limits: LimitsConfig = field(default_factory=LimitsConfig)
    snapshots: SnapshotsConfig = field(default_factory=SnapshotsConfig)

    def __post_init__(self) -> None:
        check_bounds(self)
        if self.bootstrap and self.join:
            raise ConfigError("bootstrap and join exclude each other: a node starts a cluster or joins one")
        if self.advertise is None and parse_address(self.listen, port_zero=True).is_wildcard:
            raise ConfigError(
                f"advertise must be given: listen is {self.listen!r}, every interface, which others cannot connect to"
            )
        if self.advertise is not None and parse_address(self.advertise).is_wildcard:
            raise ConfigError(
                f"advertise must be where others connect to, not {self.advertise!r}, which is every interface"
            )


SECTIONS: Final[dict[str, type]] = {
    "raft": RaftConfig,
    "storage": StorageConfig,
    "ranges": RangesConfig,
    "limits": LimitsConfig,
    "snapshots": SnapshotsConfig,
}


class Setting(NamedTuple):
    """One thing that can be configured. ``section`` is its table in the TOML file, empty for the top level."""

    name: str
    section: str
    default: Any
    """``dataclasses.MISSING`` where a value is required."""
    kind: Kind
    help: str
    low: int | None
    high: int | None
    choices: tuple[str, ...]
    metavar: str

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def variable(self) -> str:
        return ENVIRONMENT_PREFIX + self.name.upper()

    @property
    def path(self) -> str:
        return f"{self.section}.{self.name}" if self.section else self.name


def _settings_of(cls: Any, section: str) -> list[Setting]:
    return [
        Setting(each.name, section, each.default, **each.metadata) for each in dataclasses.fields(cls) if each.metadata
    ]


def _all_settings() -> dict[str, Setting]:
    found: dict[str, Setting] = {}
    for section, cls in {"": NodeConfig, **SECTIONS}.items():
        for setting in _settings_of(cls, section):
            assert setting.name not in found, f"two settings are called {setting.name}"
            found[setting.name] = setting
    return found


SETTINGS: Final[dict[str, Setting]] = _all_settings()
"""Every setting by its name, which is unique across the sections because its flag and variable have no section."""


def check_bounds(config: Any) -> None:
    """Check each field of a configuration dataclass by itself. Raises ConfigError that names the field."""
    for setting in _settings_of(type(config), ""):
        value = getattr(config, setting.name)
        if value is None and setting.default is None:
            continue
        problem = _problem(setting, value)
        if problem:
            raise ConfigError(f"{setting.name} {problem}")


def _problem(setting: Setting, value: Any) -> str | None:
    """What is wrong with a value of the right type, as the end of a sentence, or None."""
    match setting.kind:
        case Kind.NAME:
            if len(value) > NAME_CHARACTERS_MAX or not _NAME.fullmatch(value):
                return (
                    f"must be 1 to {NAME_CHARACTERS_MAX} letters, digits, dots, dashes or underscores,"
                    f" starting with a letter or digit, not {value!r}"
                )
        case Kind.PATH:
            if not value or "\0" in value:
                return f"must be a path, not {value!r}"
        case Kind.CHOICE:
            if value not in setting.choices:
                return f"must be one of {', '.join(setting.choices)}, not {value!r}"
        case Kind.COUNT | Kind.BYTES:
            if (setting.low is not None and value < setting.low) or (setting.high is not None and value > setting.high):
                # Python refuses to print numbers of thousands of digits, which a TOML file may hold in hexadecimal.
                shown = value if value.bit_length() <= 64 else f"one of {value.bit_length()} bits"
                return f"must be from {setting.low} to {setting.high}, not {shown}"
        case Kind.ADDRESS | Kind.LISTEN_ADDRESS | Kind.ADDRESSES:
            for address in value if setting.kind is Kind.ADDRESSES else (value,):
                try:
                    parse_address(address, port_zero=setting.kind is Kind.LISTEN_ADDRESS)
                except ConfigError as problem:
                    return f"must be an address: {problem}"
                if len(address.encode()) > ADDRESS_BYTES_MAX:
                    return f"must be an address: {address[:40]!r}… is longer than {ADDRESS_BYTES_MAX} bytes"
        case Kind.LABELS:
            if len(value) > LABELS_MAX or len(dict(value)) != len(value):
                return f"must be at most {LABELS_MAX} labels, each key once"
            for key, text in value:
                label = f"{key}={text}"
                if not key or not text:
                    return f"must be KEY=VALUE; there is no {'value' if key else 'key'} in {label!r}"
                if not _NAME.fullmatch(key):
                    return (
                        "must have a key of letters, digits, dots, dashes or underscores,"
                        f" starting with a letter or digit, not {key!r}"
                    )
                if not _is_unicode(text):
                    return f"must be UTF-8, not {label!r}"
                if len(key) > LABEL_BYTES_MAX or len(text.encode()) > LABEL_BYTES_MAX:
                    return f"must have at most {LABEL_BYTES_MAX} bytes in its key, and in its value, unlike {label!r}"
        case Kind.SWITCH:
            pass
    return None


def _is_unicode(text: str) -> bool:
    """Not so what the command line or the environment held in another encoding."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


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
    problem_found = _problem(setting, value)
    if problem_found:
        raise ConfigError(f"{setting.name} {problem_found} (from {given.origin})")
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
