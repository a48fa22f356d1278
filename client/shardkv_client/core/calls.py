"""Calls: what a caller waits for, from the moment it asks until it is answered.

Plain slotted records; :class:`~shardkv_client.core.engine.Core` moves them about. A call is in exactly one queue or
request at a time and is ``done`` exactly once. Queues do not search for calls that ended early, they skip them.
"""

from collections.abc import Callable
from enum import IntEnum
from typing import Any, Final

from shardkv.types import RangeDescriptor
from shardkv.wire.commands import Op
from shardkv.wire.requests import Consistency, Method

CALL_BYTES: Final = 64
"""What a call is taken to cost besides its key and value."""

LINEARIZABLE: Final = int(Consistency.LINEARIZABLE)
STALE: Final = int(Consistency.STALE)
BOUNDED_STALE: Final = STALE + 1
"""What stale reads with a bound on their age are to routing: replicas that are too old for them serve the others."""


class Kind(IntEnum):
    WRITE = 0
    READ = 1
    SCAN = 2
    ADMIN = 3


class Call:
    """The part that all calls share.

    ``key`` routes the call (None: it is not routed by key). ``deadline`` is in seconds of the client's clock.
    ``notify`` is called once, with the call, when it is done; None once nobody waits any more. ``attempts`` counts how
    often its bytes were handed to a connection; of a write, without the attempts that came to nothing for certain.
    """

    __slots__ = (
        "admitted",
        "attempts",
        "deadline",
        "done",
        "error",
        "internal",
        "key",
        "lane",
        "notify",
        "result",
        "size",
        "task",
    )

    kind: Kind

    def __init__(self, key: bytes | None, deadline: float, size: int) -> None:
        self.key: bytes | None = key
        self.deadline: float = deadline
        self.size: int = size
        self.notify: Callable[[Any], None] | None = None
        self.attempts: int = 0
        self.done: bool = False
        self.admitted: bool = False
        """Counted against the in-flight bounds."""
        self.lane: Any = None
        """The ledger's, whose bounds those are."""
        self.internal: bool = False
        """One of the client's own lookups: outside the in-flight bound."""
        self.result: Any = None
        self.error: Exception | None = None
        self.task: Any = None
        """For whoever waits: a parked task or a future."""


class WriteCall(Call):
    """One command. ``sealed`` is set at the first attempt and from then on sent unchanged."""

    __slots__ = ("body", "op", "sealed", "sequence")

    kind = Kind.WRITE

    def __init__(self, op: Op, key: bytes, body: bytes, deadline: float) -> None:
        self.key: bytes | None = key
        self.deadline = deadline
        self.size: int = len(body) + CALL_BYTES
        self.notify: Callable[[Any], None] | None = None
        self.attempts = 0
        self.done = False
        self.admitted = False
        self.lane: Any = None
        self.internal = False
        self.result: Any = None
        self.error: Exception | None = None
        self.task: Any = None
        self.op: Op = op
        self.body: bytes = body
        self.sealed: bytes | None = None
        self.sequence: int = 0


class DeleteRangeCall(WriteCall):
    """The piece of a delete_range that lies in one range, from ``key`` on.

    Its result is where the next piece starts, or None when everything up to ``end`` is deleted.
    """

    __slots__ = ("cut_generation", "end", "sealed_end")

    def __init__(self, start: bytes, end: bytes | None, deadline: float) -> None:
        super().__init__(Op.DELETE_RANGE, start, b"", deadline)
        self.size: int = CALL_BYTES + len(start) + len(end or b"")
        self.end: bytes | None = end
        self.sealed_end: bytes | None = None
        """The end in the sealed bytes: up to there everything is deleted, or nothing."""
        self.cut_generation: int = -1
        """The span generation of the range that the sealed piece was cut to."""


class ReadCall(Call):
    """One key of a GET. Its result is ``[value, version]`` or None."""

    __slots__ = ("age_us", "age_us_max", "batch_max", "consistency")

    kind = Kind.READ

    def __init__(
        self, key: bytes, consistency: int, deadline: float, batch_max: int, age_us_max: int | None = None
    ) -> None:
        self.key: bytes | None = key
        self.deadline = deadline
        self.size: int = len(key) + CALL_BYTES
        self.notify: Callable[[Any], None] | None = None
        self.attempts = 0
        self.done = False
        self.admitted = False
        self.lane: Any = None
        self.internal = False
        self.result: Any = None
        self.error: Exception | None = None
        self.task: Any = None
        self.consistency: int = consistency
        self.age_us_max: int | None = age_us_max
        """Of a stale read: how old its answer may be at most, or None."""
        self.age_us: int = 0
        """Of a stale read that was answered: how old its answer was at most."""
        self.batch_max: int = batch_max
        """With how many others it may share a request; halved when a node finds the answer too large."""


class ScanCall(Call):
    """One page of a scan. Its result is ``(flat triples, more, descriptor)`` of the range that answered."""

    __slots__ = (
        "age_us",
        "age_us_max",
        "bytes_max",
        "consistency",
        "end",
        "keys_only",
        "limit",
        "reverse",
        "start",
    )

    kind = Kind.SCAN

    def __init__(
        self,
        key: bytes,
        start: bytes,
        end: bytes | None,
        *,
        consistency: int,
        limit: int,
        bytes_max: int,
        reverse: bool,
        keys_only: bool,
        deadline: float,
        age_us_max: int | None = None,
    ) -> None:
        super().__init__(key, deadline, CALL_BYTES + len(start) + len(end or b""))
        self.start: bytes = start
        self.end: bytes | None = end
        self.consistency: int = consistency
        self.limit: int = limit
        self.bytes_max: int = bytes_max
        self.reverse: bool = reverse
        self.keys_only: bool = keys_only
        self.age_us_max: int | None = age_us_max
        self.age_us: int = 0
        """Both as in :class:`ReadCall`."""


class AdminCall(Call):
    """Any other method, for the leader of a range (by ``key`` or ``range_id``), for one node, or for any node.

    ``repeatable`` says whether it may be sent again after an attempt whose answer was lost.
    """

    __slots__ = ("arguments", "failures", "method", "node_id", "range_id", "repeatable")

    kind = Kind.ADMIN

    def __init__(
        self,
        method: int,
        arguments: tuple[object, ...],
        deadline: float,
        *,
        key: bytes | None = None,
        range_id: int | None = None,
        node_id: int | None = None,
        repeatable: bool = False,
    ) -> None:
        super().__init__(key, deadline, CALL_BYTES)
        self.method: int = method
        self.arguments: tuple[object, ...] = arguments
        self.range_id: int | None = range_id
        self.node_id: int | None = node_id
        self.repeatable: bool = repeatable
        self.failures: int = 0


REPEATABLE_METHODS: Final = frozenset(
    {Method.ROUTES, Method.NODES, Method.STATUS, Method.RANGES, Method.NODE_STATUS, Method.JOIN, Method.HEARTBEAT}
)
"""Methods that do nothing a second time: reads, a heartbeat, and a join, which names the node that joins."""


def routed_as(calls: list[Any], consistency: int) -> int:
    """What calls of one consistency and bound are to routing."""
    return BOUNDED_STALE if consistency == STALE and calls[0].age_us_max is not None else consistency


class Sent:
    """A request on a connection: the calls that its answer settles, and under which routing it was sent."""

    __slots__ = ("calls", "consistency", "descriptor", "id", "kind", "mark", "route", "routed_as", "size")

    def __init__(
        self,
        request_id: int,
        kind: Kind,
        calls: list[Any],
        route: Any,
        consistency: int,
    ) -> None:
        self.id: int = request_id
        self.kind: Kind = kind
        self.calls: list[Any] = calls
        self.route: Any = route
        self.consistency: int = consistency
        self.routed_as: int = routed_as(calls, consistency)
        self.size: int = 0
        """Its bytes."""
        self.mark: int = route.mark if route is not None else 0
        self.descriptor: RangeDescriptor | None = route.descriptor if route is not None else None
