"""The client's named bounds and delays, in one frozen value, and which cluster it is for.

None of them can lose or corrupt anything: they trade memory, load on the cluster and the time until trouble is noticed.
"""

from dataclasses import dataclass
from typing import Final

TIMEOUT_SECONDS: Final = 10.0
"""How long a call may take when the caller does not say."""


@dataclass(frozen=True, slots=True)
class Settings:
    """One client's bounds and delays: ``_max`` of bytes or counts, ``_seconds`` of its monotonic clock."""

    calls_in_flight_max: int = 1_024
    """Calls beyond these wait for one to end; their deadlines run while they wait."""
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
