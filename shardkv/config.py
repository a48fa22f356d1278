"""A node's configuration: frozen dataclasses, and the bounds of every setting.

Pure. Every setting is declared once, as a dataclass field made by :func:`_setting`; its flag, its environment variable,
its place in the TOML file and its bounds follow from that one line. Does not live here: where values come from
(``config_sources``). A value out of bounds is a :class:`~shardkv.errors.ConfigError` that names the setting.
"""

import dataclasses
import re
from collections.abc import Collection
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Final, NamedTuple

from shardkv.address import parse_address
from shardkv.errors import ConfigError
from shardkv.types import ADDRESS_BYTES_MAX, LABELS_MAX, NAME_BYTES_MAX

ENVIRONMENT_PREFIX: Final = "SHARDKV_"
ENGINES: Final = ("rocksdb", "memory")
LOG_LEVELS: Final = ("debug", "info", "warning", "error")

_MIB: Final = 1024 * 1024
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


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
    """What every Raft group runs by. ``heartbeat_ticks < election_ticks``; a lease promise outlives a heartbeat
    interval and ends no later than an election timeout, else a lease is never held or outlives its leader's doubt."""

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
    spare_entries_max: int = _setting(
        Kind.COUNT,
        8,
        low=1,
        high=256,
        help="Log entries that a follower which no quorum needs is sent in one; 1: everybody each at once.",
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
        problem = problem_with(setting, value)
        if problem:
            raise ConfigError(f"{setting.name} {problem}")


def problem_with(setting: Setting, value: Any) -> str | None:
    """What is wrong with a value of the right type, as the end of a sentence, or None."""
    match setting.kind:
        case Kind.NAME:
            if len(value) > NAME_BYTES_MAX or not _NAME.fullmatch(value):
                return (
                    f"must be 1 to {NAME_BYTES_MAX} letters, digits, dots, dashes or underscores,"
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
        case Kind.ADDRESS | Kind.LISTEN_ADDRESS:
            return _address_problem(value, port_zero=setting.kind is Kind.LISTEN_ADDRESS)
        case Kind.ADDRESSES:
            return next(filter(None, map(_address_problem, value)), None)
        case Kind.LABELS:
            return _labels_problem(value)
        case Kind.SWITCH:
            pass
    return None


def _address_problem(address: str, *, port_zero: bool = False) -> str | None:
    try:
        parse_address(address, port_zero=port_zero)
    except ConfigError as problem:
        return f"must be an address: {problem}"
    if len(address.encode()) > ADDRESS_BYTES_MAX:
        return f"must be an address: {address[:40]!r}… is longer than {ADDRESS_BYTES_MAX} bytes"
    return None


def _labels_problem(labels: Collection[tuple[str, str]]) -> str | None:
    if len(labels) > LABELS_MAX or len(dict(labels)) != len(labels):
        return f"must be at most {LABELS_MAX} labels, each key once"
    for key, text in labels:
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
        if len(key) > NAME_BYTES_MAX or len(text.encode()) > NAME_BYTES_MAX:
            return f"must have at most {NAME_BYTES_MAX} bytes in its key, and in its value, unlike {label!r}"
    return None


def _is_unicode(text: str) -> bool:
    """Not so what the command line or the environment held in another encoding."""
    return not any("\ud800" <= character <= "\udfff" for character in text)
