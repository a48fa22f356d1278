"""The cluster's settings: names, types, bounds and defaults. Replicated by the placement group; changed by people.

Only settings that may be changed at any time live here. What would corrupt data when changed is a format version, not
a setting.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Final

from shardkv.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Bounds:
    """What :func:`Settings.with_value` checks; ``for_nodes`` settings travel in every heartbeat's answer."""

    minimum: int
    maximum: int
    odd: bool = False
    for_nodes: bool = False


def _whole(default: int, minimum: int, maximum: int, *, odd: bool = False, for_nodes: bool = False) -> Any:
    return field(default=default, metadata={"bounds": Bounds(minimum, maximum, odd, for_nodes)})


@dataclass(frozen=True, slots=True)
class Settings:
    """Every setting with its value in force."""

    replication_factor: int = _whole(3, 1, 7, odd=True)
    """Voters of a range, where there are nodes enough."""
    placement_replicas_max: int = _whole(5, 1, 7, odd=True)
    """Voters of the placement group, which grows 1, 3, 5, ... with the number of live nodes up to this."""
    split_bytes: int = _whole(64 * 1024 * 1024, 4 * 1024, 16 * 1024 * 1024 * 1024, for_nodes=True)
    """A range that holds more than this is split."""
    heartbeat_ms: int = _whole(1_000, 50, 60_000, for_nodes=True)
    """How often a node reports to the placement leader. What is new it reports at once, or at the next look."""
    node_suspect_ms: int = _whole(3_000, 100, 600_000)
    """A node silent for this long gets nothing new."""
    node_down_ms: int = _whole(10_000, 200, 3_600_000)
    """A node silent for this long is taken for down."""
    scheduling: bool = True
    """Whether the placement leader makes new operators; running ones are finished either way."""
    leader_balance: bool = True
    """Whether leaderships are spread evenly."""
    transfers_per_node_max: int = _whole(4, 1, 256)
    """Leadership transfers in flight to or from one node."""
    learners_per_node_max: int = _whole(4, 1, 256)
    """New replicas that one node receives data for at the same time."""
    transfer_cooldown_ms: int = _whole(10_000, 0, 3_600_000)
    """A range's leadership is not balanced again within this time after a transfer."""

    def with_value(self, name: str, value: object) -> "Settings":
        """These settings with one changed. Raises ConfigError for an unknown name or a value out of bounds."""
        bounds = _BOUNDS.get(name)
        if bounds is None:
            raise ConfigError(f"there is no setting {name!r:.80}; there are {', '.join(_BOUNDS)}")
        if isinstance(bounds, Bounds):
            if type(value) is not int or not bounds.minimum <= value <= bounds.maximum:
                raise ConfigError(
                    f"{name} must be a whole number from {bounds.minimum} to {bounds.maximum}, not {value!r:.80}"
                )
            if bounds.odd and value % 2 == 0:
                raise ConfigError(
                    f"{name} must be odd, not {value}: an even number of voters survives no more failures"
                )
        elif type(value) is not bool:
            raise ConfigError(f"{name} must be true or false, not {value!r:.80}")
        changed: dict[str, Any] = {name: value}
        settings = replace(self, **changed)
        if settings.heartbeat_ms >= settings.node_suspect_ms:
            raise ConfigError(
                f"heartbeat_ms ({settings.heartbeat_ms}) must be below node_suspect_ms ({settings.node_suspect_ms}): "
                "every node would be suspect between two of its reports"
            )
        if settings.node_suspect_ms >= settings.node_down_ms:
            raise ConfigError(
                f"node_suspect_ms ({settings.node_suspect_ms}) must be below node_down_ms ({settings.node_down_ms})"
            )
        return settings

    @classmethod
    def of(cls, chosen: Mapping[str, int | bool]) -> "Settings":
        """The defaults with ``chosen`` values, which have been checked before, in place of some."""
        values: dict[str, Any] = dict(chosen)
        return cls(**values)

    def value(self, name: str) -> int | bool:
        """The value in force. Raises ConfigError for an unknown name."""
        if name not in _BOUNDS:
            raise ConfigError(f"there is no setting {name!r:.80}; there are {', '.join(_BOUNDS)}")
        value: int | bool = getattr(self, name)
        return value

    def for_nodes(self) -> dict[str, int]:
        """The settings that nodes act on."""
        return {name: getattr(self, name) for name in _FOR_NODES}


_BOUNDS: Final[dict[str, Bounds | bool]] = {item.name: item.metadata.get("bounds", True) for item in fields(Settings)}
_FOR_NODES: Final = tuple(name for name, bounds in _BOUNDS.items() if isinstance(bounds, Bounds) and bounds.for_nodes)
