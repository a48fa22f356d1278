"""What a node tells the placement leader, and what it is told back: values, their wire form, and the node's reporter.

    heartbeat  [1, node_id, boot, sequence, since, address, full, draining, nodes_version,
                [report, ...], [range_id, ...], [disk_total_bytes, disk_free_bytes, used_bytes],
                slow_disk, fullness (left out where they are false and 0)]
               very many reports travel as the bytes of their array
    report     [range_id, membership, span, is_leader, term, bytes,
                [[replica_id, lag, active, receiving (left out where it is false)], ...]]
    reply      [1, full_wanted, nodes_version, [node, ...] | None, [[name, value], ...], [range_id, ...]]
    node       [node_id, name, address, boot, decommissioned, start_token]

A heartbeat names the ranges that have changed since the last one that was acknowledged; a *full* one names all. A
node that is asked for a full one, and a node that has just started, sends it next. How the placement leader puts
these together is :mod:`.statistics`'s matter.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from shardkv import codec
from shardkv.codec import malformed
from shardkv.types import TOKEN_BYTES, Fullness, NodeId, RangeId, ReplicaId
from shardkv_placement import fields
from shardkv_placement.operators import CATCH_UP_LAG_MAX
from shardkv_placement.state import DECOMMISSIONED_MAX, NODES_MAX

FORMAT: Final = 1
REPORTS_MAX: Final = 200_000
"""Ranges in one heartbeat: far above what a node is made for, and far below what a frame holds."""
PLAIN_ITEMS_MAX: Final = codec.ITEMS_MAX * 3 // 4
"""CBOR items of reports that are sent as they are: more go as the bytes of their array, for a request has a bound."""
REPORT_ITEMS_MAX: Final = 1 << 20
"""CBOR items in those bytes: 37,000 ranges of five replicas that one node leads, or three times as many that it does
not."""
DESCRIPTORS_WANTED_MAX: Final = 1_024
"""Ranges whose descriptors one reply asks for; the next one asks for more."""
NODE_ENTRIES_MAX: Final = NODES_MAX + DECOMMISSIONED_MAX
"""Entries of a node table."""
BYTES_CHANGE_MIN: Final = 1024 * 1024
"""A range whose size alone has changed, by less than this, is not reported."""


class Progress(NamedTuple):
    """How far a replica is behind its leader, as the leader sees it."""

    replica_id: ReplicaId
    lag: int
    """Entries that the leader has and the replica is not known to have."""
    active: bool
    """Whether the replica has answered lately, and has acknowledged something: a new one has nothing of the range."""
    receiving: bool = False
    """Whether it is being sent a snapshot, of which some has arrived."""


class RangeReport(NamedTuple):
    """One replica's word on its range. Only a leader's has ``progress``, with one for every replica, its own too."""

    range_id: RangeId
    membership: int
    span: int
    is_leader: bool
    term: int
    bytes: int
    progress: tuple[Progress, ...] = ()


class Capacity(NamedTuple):
    """A node's disk, in bytes."""

    disk_total_bytes: int = 0
    disk_free_bytes: int = 0
    used_bytes: int = 0


NO_CAPACITY: Final = Capacity()
"""Not known."""


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """A node's report."""

    node_id: NodeId
    boot: int
    sequence: int
    """Counts the heartbeats of one boot."""
    since: int
    """The newest acknowledged one: every later change is named here. A receiver that has not got that one (somebody
    else acknowledged it) has missed something."""
    address: str
    full: bool
    draining: bool
    nodes_version: int
    """The newest node table that the sender has."""
    ranges: tuple[RangeReport, ...] = ()
    removed: tuple[RangeId, ...] = ()
    """Ranges that the sender holds no replica of any more."""
    capacity: Capacity = NO_CAPACITY
    slow_disk: bool = False
    """Its log's syncs stall, so it gives its leaderships away and should not be given any."""
    fullness: Fullness = Fullness.ROOMY
    """Nodes with more room should lead."""


class NodeEntry(NamedTuple):
    """A node as the others need it: to dial it, and to refuse old copies of it."""

    node_id: NodeId
    name: str
    address: str
    boot: int
    decommissioned: bool
    start_token: bytes


@dataclass(frozen=True, slots=True)
class HeartbeatReply:
    """The placement leader's answer. ``nodes`` is None when the sender's table is the newest."""

    full_wanted: bool
    nodes_version: int
    nodes: tuple[NodeEntry, ...] | None
    settings: dict[str, int]
    """See ``Settings.for_nodes``."""
    descriptors_wanted: tuple[RangeId, ...] = ()
    """Ranges that the sender leads and of which it has a newer descriptor than the map: report them again."""


def encode(heartbeat: Heartbeat) -> list[Any]:
    reports = [[*report[:6], [_encode_progress(each) for each in report.progress]] for report in heartbeat.ranges]
    return [
        FORMAT,
        heartbeat.node_id,
        heartbeat.boot,
        heartbeat.sequence,
        heartbeat.since,
        heartbeat.address,
        heartbeat.full,
        heartbeat.draining,
        heartbeat.nodes_version,
        reports if _items_of(heartbeat.ranges) <= PLAIN_ITEMS_MAX else codec.dumps(reports),
        list(heartbeat.removed),
        list(heartbeat.capacity),
        *_health(heartbeat),
    ]


def _encode_progress(progress: Progress) -> list[Any]:
    return list(progress if progress.receiving else progress[:3])


def _health(heartbeat: Heartbeat) -> list[bool | int]:
    if heartbeat.fullness:
        return [heartbeat.slow_disk, int(heartbeat.fullness)]
    return [True] if heartbeat.slow_disk else []


def _fullness(value: Any) -> Fullness:
    number = fields.integer(value, "a disk's fullness")
    if number > max(Fullness):
        raise malformed(f"there is no fullness {number}")
    return Fullness(number)


def decode(value: Any) -> Heartbeat:
    """The heartbeat in a decoded CBOR value. Raises MalformedRequest."""
    match value:
        case [
            1,
            node_id,
            boot,
            sequence,
            since,
            address,
            full,
            draining,
            version,
            reports,
            removed,
            capacity,
            *health,
        ] if len(health) <= 2:
            numbers = [
                fields.integer(each, "a count of bytes") for each in fields.array(capacity, "a node's capacity", 3)
            ]
            if len(numbers) != 3:
                raise malformed("a node's capacity must be three counts of bytes")
            return Heartbeat(
                node_id=NodeId(fields.integer(node_id, "a node id", 1)),
                boot=fields.integer(boot, "a boot counter", 1),
                sequence=fields.integer(sequence, "a heartbeat's number", 1),
                since=fields.integer(since, "a heartbeat's number"),
                address=fields.address(address),
                full=fields.flag(full, "full"),
                draining=fields.flag(draining, "draining"),
                nodes_version=fields.integer(version, "a version"),
                ranges=_reports(reports),
                removed=_range_ids(removed, REPORTS_MAX),
                capacity=Capacity(*numbers),
                slow_disk=len(health) > 0 and fields.flag(health[0], "slow disk"),
                fullness=_fullness(health[1]) if len(health) > 1 else Fullness.ROOMY,
            )
    raise malformed(f"not a heartbeat: {value!r:.200}")


def _items_of(reports: tuple[RangeReport, ...]) -> int:
    return sum([8 + 4 * len(report.progress) for report in reports])


def _reports(value: Any) -> tuple[RangeReport, ...]:
    if type(value) is bytes:
        if codec.count_items(value, REPORT_ITEMS_MAX) > REPORT_ITEMS_MAX:
            raise malformed(f"reports of more than {REPORT_ITEMS_MAX} items")
        value = codec.loads(value)
    return tuple(_report(each) for each in fields.array(value, "reports", REPORTS_MAX))


def _report(value: Any) -> RangeReport:
    match value:
        case [range_id, membership, span, is_leader, term, size, progress]:
            return RangeReport(
                RangeId(fields.integer(range_id, "a range id")),
                fields.integer(membership, "a membership generation"),
                fields.integer(span, "a span generation"),
                fields.flag(is_leader, "is_leader"),
                fields.integer(term, "a term"),
                fields.integer(size, "a count of bytes"),
                tuple(_progress(each) for each in fields.array(progress, "progress", fields.REPLICAS_MAX)),
            )
    raise malformed(f"not a report on a range: {value!r:.200}")


def _progress(value: Any) -> Progress:
    match value:
        case [replica_id, lag, active, *receiving] if len(receiving) <= 1:
            return Progress(
                ReplicaId(fields.integer(replica_id, "a replica id", 1)),
                fields.integer(lag, "a lag"),
                fields.flag(active, "active"),
                len(receiving) > 0 and fields.flag(receiving[0], "receiving"),
            )
    raise malformed(f"not a replica's progress: {value!r:.200}")


def _range_ids(value: Any, count_max: int) -> tuple[RangeId, ...]:
    return tuple(RangeId(fields.integer(each, "a range id")) for each in fields.array(value, "range ids", count_max))


def encode_reply(reply: HeartbeatReply) -> list[Any]:
    return [
        FORMAT,
        reply.full_wanted,
        reply.nodes_version,
        None if reply.nodes is None else [list(entry) for entry in reply.nodes],
        [[name, value] for name, value in reply.settings.items()],
        list(reply.descriptors_wanted),
    ]


def decode_reply(value: Any) -> HeartbeatReply:
    """The reply in a decoded CBOR value. Raises MalformedRequest. Settings that this node does not know are kept."""
    match value:
        case [1, full_wanted, version, nodes, [*settings], wanted]:
            found: dict[str, int] = {}
            for pair in settings:
                match pair:
                    case [str(name), number]:
                        found[name] = fields.integer(number, name)
                    case _:
                        raise malformed(f"a setting must be [name, value], not {pair!r:.100}")
            return HeartbeatReply(
                fields.flag(full_wanted, "full_wanted"),
                fields.integer(version, "a version"),
                None if nodes is None else tuple(map(_entry, fields.array(nodes, "nodes", NODE_ENTRIES_MAX))),
                found,
                _range_ids(wanted, DESCRIPTORS_WANTED_MAX),
            )
    raise malformed(f"not the reply to a heartbeat: {value!r:.200}")


def _entry(value: Any) -> NodeEntry:
    match value:
        case [node_id, name, address, boot, gone, token, *_]:
            return NodeEntry(
                NodeId(fields.integer(node_id, "a node id", 1)),
                fields.name(name),
                fields.address(address),
                fields.integer(boot, "a boot counter"),
                fields.flag(gone, "decommissioned"),
                fields.blob(token, "a token", TOKEN_BYTES) if token else b"",
            )
    raise malformed(f"not an entry of the node table: {value!r:.200}")


class Reporter:
    """The node's side: remembers what the placement leader has not been told yet, and makes the next heartbeat.

    The server calls :meth:`report` whenever a replica's standing may have changed (a report that says nothing new
    costs nothing), :meth:`remove` when a replica goes, :meth:`heartbeat` every ``heartbeat_ms``, and
    :meth:`acknowledged` with each reply. A heartbeat without a reply needs no call: its changes go out again.
    """

    def __init__(self, node_id: NodeId, boot: int, address: str) -> None:
        self._node_id = node_id
        self._boot = boot
        self._address = address
        self._sequence = 0
        self._acknowledged = 0
        self._reports: dict[RangeId, RangeReport] = {}
        self._told: dict[RangeId, RangeReport] = {}
        """What each range's last report that was marked as changed said: the base of comparison."""
        self._changed: dict[RangeId, int] = {}
        """Ranges to name, and the sequence of the first heartbeat that names (or will name) this change."""
        self._removed: dict[RangeId, int] = {}
        self._full_from = 1
        """The number of the first heartbeat that is to be full, until one is acknowledged; 0 when none is wanted."""
        self.nodes_version = 0

    def report(self, report: RangeReport) -> None:
        range_id = report.range_id
        self._reports[range_id] = report
        self._removed.pop(range_id, None)
        told = self._told.get(range_id)
        if told is None or _differs(told, report):
            self._told[range_id] = report
            self._changed[range_id] = self._sequence + 1

    def remove(self, range_id: RangeId) -> None:
        if self._reports.pop(range_id, None) is not None:
            self._told.pop(range_id, None)
            self._changed.pop(range_id, None)
            self._removed[range_id] = self._sequence + 1

    def want_full(self) -> None:
        """Name everything next time: the placement leader has changed, say."""
        self._full_from = self._sequence + 1

    @property
    def urgent(self) -> bool:
        """Whether there is something to tell that should not wait for the next interval."""
        return self._full_from > 0 or bool(self._changed) or bool(self._removed)

    @property
    def heard(self) -> bool:
        """Whether any heartbeat of this boot was acknowledged."""
        return self._acknowledged > 0

    def leads_by_report(self, range_id: RangeId) -> bool:
        """Whether it was acknowledged that this node leads the range, and nothing else has been said of it since."""
        told = self._told.get(range_id)
        return told is not None and told.is_leader and range_id not in self._changed

    def heartbeat(
        self,
        *,
        draining: bool = False,
        capacity: Capacity = NO_CAPACITY,
        slow_disk: bool = False,
        fullness: Fullness = Fullness.ROOMY,
    ) -> Heartbeat:
        """The next heartbeat; each has a number of its own, whether it arrives or not."""
        self._sequence += 1
        full = self._full_from > 0
        named: Iterable[RangeId] = self._reports if full else self._changed
        return Heartbeat(
            node_id=self._node_id,
            boot=self._boot,
            sequence=self._sequence,
            since=self._acknowledged,
            address=self._address,
            full=full,
            draining=draining,
            nodes_version=self.nodes_version,
            ranges=tuple(self._reports[range_id] for range_id in named),
            removed=() if full else tuple(self._removed),
            capacity=capacity,
            slow_disk=slow_disk,
            fullness=fullness,
        )

    def acknowledged(self, heartbeat: Heartbeat, reply: HeartbeatReply) -> None:
        """``heartbeat`` arrived: what it named need not be named again, unless it has changed since."""
        sequence = heartbeat.sequence
        self._changed = {key: first for key, first in self._changed.items() if first > sequence}
        self._removed = {key: first for key, first in self._removed.items() if first > sequence}
        self._acknowledged = max(self._acknowledged, sequence)
        if reply.full_wanted:
            self.want_full()
        elif heartbeat.full and sequence >= self._full_from:
            self._full_from = 0
        if reply.nodes is not None:
            self.nodes_version = reply.nodes_version


def _differs(told: RangeReport, report: RangeReport) -> bool:
    """Whether a report says something new enough: sizes and lags that drift a little do not count."""
    if told[:5] != report[:5] or len(told.progress) != len(report.progress):
        return True
    if abs(told.bytes - report.bytes) >= max(BYTES_CHANGE_MIN, told.bytes // 16):
        return True
    for before, after in zip(told.progress, report.progress):
        if before.replica_id != after.replica_id or before[2:] != after[2:]:
            return True
        if (before.lag <= CATCH_UP_LAG_MAX) != (after.lag <= CATCH_UP_LAG_MAX):
            return True
    return False
