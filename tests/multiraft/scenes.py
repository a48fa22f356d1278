"""Situations in which several tests begin, and snapshots spelled out message by message."""

from typing import Any
from zlib import crc32

import trio

from shardkv import codec
from shardkv.errors import ProtocolError
from shardkv.machine.machine import RangeMachine
from shardkv.machine.snapshot import snapshot_rows
from shardkv.multiraft.replica import Replica
from shardkv.raft.messages import Entry, HardState
from shardkv.storage.wal import CompactLog, LogUpdate
from shardkv.types import RangeId
from tests.multiraft.world import RANGE, Host, Hosts, descriptor_on


async def led_by_another(hosts: Hosts, node_id: int) -> Host:
    """Range 1 is led by another node than this one, and all agree; its leader."""
    leader = hosts.leader()
    if leader.node_id == node_id:
        leader.replica().raft.transfer_leader(1)
        leader.driver.touch(leader.replica())
        await hosts.until(lambda: hosts.leader().node_id == 1, "a transfer to node 1")
    await hosts.agreed()
    return hosts.leader()


async def split_on_two(hosts: Hosts) -> Host:
    """Split range 1 at m while node 3, a follower, hears of nothing; node 3."""
    await hosts.write(b"a", b"1")
    await hosts.write(b"z", b"2")
    leader = await led_by_another(hosts, 3)
    hosts.passes = lambda source, target, range_id, message: 3 not in (source, target)
    await leader.split(b"m", 2).wait()
    await hosts.until(lambda: all(2 in hosts[each].catalog.replicas for each in (1, 2)), "the split on two nodes")
    await hosts.led(2)
    return hosts[3]


def with_log(host: Host, *, commit: int) -> Replica:
    """The replica of range 1 after a start, with entries 11 to 30 in its log and a state as of 20."""
    update = LogUpdate(RANGE, hard_state=HardState(6, 1, commit))
    update.entries = tuple(Entry(6, index, data=b"") for index in range(11, 31))
    host.wal.append([update])()
    host.catalog.recover()
    host.catalog.log = lambda updates: host.wal.append(updates)()
    replica = host.replica()
    replica.machine = RangeMachine.create(descriptor_on(1), applied_index=20, applied_term=6)
    return replica


def compact(host: Host, range_id: int = RANGE) -> None:
    """Let go of the whole log, so that whoever lacks something needs a snapshot."""
    log = host.replica(range_id).log
    index = min(host.machine(range_id).applied_index, log.hard_state.commit)
    if index > log.compact_index:
        host.driver.log_writer.append([LogUpdate(RangeId(range_id), compact=CompactLog(index, log.term(index)))])


async def behind(hosts: Hosts, *, writes: int = 5) -> Host:
    """Node 3, cut off while the others wrote and compacted; still cut off."""
    await hosts.write(b"old", b"1")
    await led_by_another(hosts, 3)
    hosts.isolate(3)
    for number in range(writes):
        await hosts.write(b"new%d" % number, b"2")
    await hosts.until(lambda: hosts[1].machine().applied_index == hosts[2].machine().applied_index)
    await trio.sleep(0.2)
    for node_id in (1, 2):
        compact(hosts[node_id])
    return hosts[3]


class Stream:
    """The sending end of a snapshot, spelled out; answers are collected."""

    def __init__(self, *parts: list[Any]) -> None:
        self.parts = list(parts)
        self.answers: list[list[Any]] = []
        """The outcome."""
        self.progress: list[list[Any]] = []
        """Where the receiver began, and what it acknowledged."""
        self.more = trio.Event()

    async def send(self, message: list[Any]) -> None:
        (self.progress if message[0] in ("from", "have") else self.answers).append(message)

    async def receive(self) -> list[Any]:
        await trio.sleep(0.001)
        if not self.parts:
            await self.more.wait()
            if not self.parts:
                raise ProtocolError("the other side went away")
        return self.parts.pop(0)


def spelled(host: Host, to: int, range_id: int = RANGE, **changes: Any) -> list[list[Any]]:
    """The messages of a snapshot of a host's range as it is now."""
    machine = host.machine(range_id)
    metadata = machine.snapshot_metadata()
    fields: dict[str, Any] = {
        "id": b"a stream of 16 B",
        "range": range_id,
        "to": to,
        "sender": host.replica(range_id).replica_id,
        "term": host.replica(range_id).raft.term,
        "index": metadata.index,
        "log_term": metadata.term,
        "conf_state": [list(part) if isinstance(part, tuple) else part for part in metadata.conf_state],
        "descriptor": machine.descriptor.to_wire(),
        "rows": [item for pair in snapshot_rows(host.engine, machine.descriptor) for item in pair],
        **changes,
    }
    rows = fields.pop("rows")
    return [["begin", *fields.values()], *carried(rows, fields["term"])]


def carried(rows: list[Any], term: int = 9, *, chunks: int = 1, count: int | None = None) -> list[list[Any]]:
    """Rows as the parts of a stream that follow its beginning; ``count`` is what the end says instead of the truth."""
    parts: list[list[Any]] = []
    checksum = 0
    size = -(-len(rows) // 2 // chunks) * 2
    for number, first in enumerate(range(0, len(rows), size or 1), 1):
        packed = codec.dumps(rows[first : first + size])
        checksum = crc32(packed, checksum)
        parts.append(["rows", number, packed, checksum])
    return [*parts, ["end", len(parts), len(rows) // 2 if count is None else count, checksum, term]]
