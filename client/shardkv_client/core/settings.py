"""The client's named bounds and delays, in one frozen value, and which cluster it is for.

None of them can lose or corrupt anything: they trade memory, load on the cluster and the time until trouble is noticed.
"""

from dataclasses import dataclass, fields
from typing import Final

from shardkv.errors import ConfigError
from shardkv.types import CLUSTER_ID_BYTES, NodeId

TIMEOUT_SECONDS: Final = 10.0
"""How long a call may take when the caller does not say."""
SECONDS_END: Final = 1e9
"""No delay is this long."""
_TAKEN_MAX: Final = {
    "commands_per_write_max": 1_024,
    "bytes_per_write_max": 8 * 1024 * 1024,
    "keys_per_get_max": 2_048,
    "requests_per_frame_max": 4_096,
    "frame_bytes_target": 8 * 1024 * 1024,
}
"""What nodes take in one request and one frame, with the largest keys; a larger one would fail whole."""


@dataclass(frozen=True, slots=True)
class Settings:
    """One client's bounds and delays: ``_max`` of bytes or counts, ``_seconds`` of its monotonic clock."""

    calls_in_flight_max: int = 1_024
    """Calls beyond these wait for one to end; their deadlines run while they wait. Writes, reads that need a leader,
    and everything else have as many places each."""
    bytes_in_flight_max: int = 16 * 1024 * 1024
    """The same, counted in the bytes of keys and values that are to be sent."""
    commands_per_write_max: int = 512
    bytes_per_write_max: int = 1024 * 1024
    """A write request is closed once it holds this much; the last command may take it past by its own size."""
    keys_per_get_max: int = 512
    requests_per_frame_max: int = 256
    frame_bytes_target: int = 2 * 1024 * 1024
    """A request frame is closed once it holds this much; far below the protocol's bound with one request on top."""
    scan_page_entries_max: int = 1_000
    scan_page_bytes_max: int = 1024 * 1024
    backoff_seconds_min: float = 0.01
    backoff_seconds_max: float = 0.1
    """Well under an election, so that a new leader is found soon after it exists."""
    dial_seconds: float = 2.0
    """For the connection and its greeting together."""
    ping_after_seconds: float = 0.5
    """A node that owes an answer and has been silent for this long is asked whether it lives."""
    silence_seconds_max: float = 1.5
    """And when it has been silent for this long, its connection is given up and its requests go elsewhere."""
    dials_at_once_max: int = 3
    """When any node will do: how many are tried at the same time."""
    moved_seconds: float = 1.0
    """How often nodes are asked where they all are while one of them cannot be reached."""
    nodes_refresh_seconds: float = 30.0
    """How old the list of nodes grows while there is somebody to ask: a cluster may have grown since, and then lose all
    the nodes that were in it."""
    dial_patience_seconds: float = 0.1
    """When any node will do: how long a dial without an answer counts among those. It goes on after that, too."""
    routes_per_lookup: int = 256
    lookups_at_once_max: int = 4
    lookup_seconds: float = 5.0
    ranges_cached_max: int = 100_000
    cluster_id: bytes | None = None
    """Only nodes of this cluster are spoken to; None: of that which the first node that answers belongs to."""
    node_id: NodeId | None = None
    """The node whose own calls these are, which take no places of clients; None: a client's."""

    def __post_init__(self) -> None:
        """Raises ConfigError for a bound or delay that no client could work with."""
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name == "cluster_id":
                if value is not None and not (isinstance(value, bytes) and len(value) == CLUSTER_ID_BYTES):
                    raise ConfigError(f"cluster_id must be {CLUSTER_ID_BYTES} bytes or None, not {value!r:.60}")
            elif field.name == "node_id":
                if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                    raise ConfigError(f"node_id must be a whole number from 1 on or None, not {value!r:.60}")
            elif field.type is int:
                if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                    raise ConfigError(f"{field.name} must be a whole number from 1 on, not {value!r:.60}")
                if value > _TAKEN_MAX.get(field.name, value):
                    raise ConfigError(f"{field.name} must be at most {_TAKEN_MAX[field.name]}, not {value!r:.60}")
            elif not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < SECONDS_END:
                raise ConfigError(
                    f"{field.name} must be a number of seconds above 0 and below {SECONDS_END:g}, not {value!r:.60}"
                )
        if self.backoff_seconds_min > self.backoff_seconds_max:
            raise ConfigError("backoff_seconds_min is above backoff_seconds_max; raise the one or lower the other")
        if self.ping_after_seconds >= self.silence_seconds_max:
            raise ConfigError("ping_after_seconds must be below silence_seconds_max: the answer needs time")
