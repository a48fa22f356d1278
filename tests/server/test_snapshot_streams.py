"""Snapshots over the nodes' own connections: settings reach them, and a network that breaks them costs little."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, cast

import pytest
import trio
from trio.testing import MockClock

from shardkv.config import SnapshotsConfig
from shardkv.errors import OutOfSpace, ProtocolError, ShardKVError
from shardkv.multiraft import maintenance
from shardkv.multiraft.snapshot_stream import StreamBroken, hear
from shardkv.multiraft.snapshots import Snapshots
from shardkv.server.peers import DIAL_SECONDS_MAX, FrameStream
from shardkv.types import FIRST_RANGE
from shardkv.wire.frames import Frame, FrameDecoder
from shardkv.wire.handshake import encode_refused
from shardkv_client import Client
from tests.multiraft.world import world as simulated_hosts
from tests.server.world import Cluster, SimulatedNode, world

MIB = 1024 * 1024
VALUES = 48
VALUE_BYTES = 64 * 1024
SLOW = SnapshotsConfig(snapshot_send_bytes_per_second=MIB)


def service(node: SimulatedNode) -> Snapshots:
    return cast(Snapshots, node.inside.driver.snapshots)


@asynccontextmanager
async def moving(
    monkeypatch: pytest.MonkeyPatch, config: SnapshotsConfig = SLOW
) -> AsyncIterator[tuple[Cluster, Client, SimulatedNode, SimulatedNode]]:
    """A cluster in which a node has just begun to be sent a range of 3 MiB: its client, the sender, the receiver."""
    monkeypatch.setattr(maintenance, "ENTRIES_KEPT", 5)
    monkeypatch.setattr(maintenance, "LAG_ENTRIES_MAX", 5)
    async with world(3, snapshots=config) as cluster, cluster.client() as kv:
        leader = await cluster.leader_of(kv, b"k")
        late = next(node for node in cluster.nodes.values() if node is not leader)
        await late.kill()
        for number in range(VALUES):
            await kv.put(b"key%03d" % number, bytes([number]) * VALUE_BYTES)
        for _ in range(3):
            await leader.inside.maintenance.flush_and_compact()
        await late.start()
        with trio.fail_after(10):
            while not service(late).statistics().chunks_received:  # noqa: ASYNC110
                await trio.sleep(0.01)
        yield cluster, kv, leader, late


async def whole(leader: SimulatedNode, late: SimulatedNode, seconds: float) -> None:
    """Wait until the late node has applied what its leader has."""

    def applied(node: SimulatedNode) -> int:
        machine = node.inside.catalog.replicas[FIRST_RANGE].machine
        return machine.applied_index if machine is not None else 0

    with trio.fail_after(seconds):
        while applied(late) < applied(leader):  # noqa: ASYNC110
            await trio.sleep(0.05)


async def test_a_range_arrives_over_connections_that_are_reset_again_and_again(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every chunk arrives once, though no connection lives long enough for the whole range."""
    async with moving(monkeypatch) as (cluster, kv, leader, late):
        for _ in range(4):
            await trio.sleep(0.4)
            assert service(late).statistics().receiving, "the stream was over before it was cut"
            cluster.network.drop(leader.name, late.name)
            with trio.fail_after(5):
                while not service(late).statistics().receiving:  # noqa: ASYNC110
                    await trio.sleep(0.01)
        await whole(leader, late, 30)
        await kv.put(b"after", b"v")
        assert service(leader).statistics().resumed >= 4
        assert service(late).statistics().chunks_received <= VALUES * VALUE_BYTES // (128 * 1024) + 2
        service(leader).check()
        service(late).check()


async def test_a_range_arrives_after_a_partition_in_the_middle(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither end hears that its connection is of no use; both give it up and go on over another."""
    async with moving(monkeypatch) as (cluster, _, leader, late):
        await trio.sleep(0.5)
        others = [node.name for node in cluster.nodes.values() if node is not late]
        cluster.network.partition([late.name], others)
        await trio.sleep(15)
        assert not service(late).statistics().receiving
        assert service(late).statistics().waiting == 1
        cluster.network.heal()
        await whole(leader, late, 30)
        assert service(leader).statistics().resumed == 1
        assert service(late).statistics().chunks_received <= VALUES * VALUE_BYTES // (128 * 1024) + 2


async def test_a_dial_that_nobody_answers_is_given_up_soon(autojump_clock: MockClock) -> None:
    """The system tries for minutes, at growing intervals; meanwhile the ranges of every other node would wait."""
    async with world(3) as cluster:
        one, two, _ = cluster.nodes.values()
        cluster.network.partition([one.name], [two.name])
        dial = service(one).sender._dial(two.inside.catalog.node_id)
        with trio.fail_after(2 * DIAL_SECONDS_MAX), pytest.raises(TimeoutError, match="no answer from n2"):
            await dial.__aenter__()


async def test_a_receiver_that_is_killed_in_the_middle_begins_anew_and_keeps_no_file(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with moving(monkeypatch) as (_, kv, leader, late):
        await trio.sleep(0.5)
        await late.kill()
        await late.start()
        await whole(leader, late, 60)
        assert await kv.get(b"key000") is not None
        assert service(late).statistics().waiting == 0


@pytest.mark.parametrize(
    "config, seconds_min",
    [
        (SnapshotsConfig(snapshot_send_bytes_per_second=MIB), 2.5),
        (SnapshotsConfig(snapshot_receive_bytes_per_second=MIB), 2.5),
        (SnapshotsConfig(), 0),
    ],
    ids=["sender", "receiver", "default"],
)
async def test_trap_16_the_rates_in_a_nodes_configuration_hold_and_writes_go_on_meanwhile(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch, config: SnapshotsConfig, seconds_min: float
) -> None:
    async with moving(monkeypatch, config) as (_, kv, leader, late):
        began = trio.current_time()
        written = 0
        while service(leader).statistics().sending:
            put = trio.current_time()
            await kv.put(b"during", b"%d" % written)
            assert trio.current_time() - put < 0.1, "a write waited for the snapshot"
            written += 1
            await trio.sleep(0.05)
        seconds = trio.current_time() - began
        assert seconds >= seconds_min
        assert seconds < 5
        assert written > seconds_min / 0.15
        await whole(leader, late, 30)


@pytest.mark.parametrize(
    ("refusal", "expected"), [(OutOfSpace("its disk is full"), OutOfSpace), (ProtocolError("no"), StreamBroken)]
)
async def test_a_receiver_that_cannot_keep_a_snapshot_ends_it_and_one_that_breaks_off_does_not(
    refusal: ShardKVError, expected: type[ShardKVError]
) -> None:
    """The first is the same on every connection; dialling again and again would only hold a place for sending."""
    ((kind, payload),) = FrameDecoder().feed(encode_refused(refusal))
    nothing: Any = None
    stream = FrameStream(nothing, FrameDecoder(), [Frame(kind, payload)], nothing)
    async with simulated_hosts(1) as hosts:
        with pytest.raises(expected, match=str(refusal)):
            await hear(hosts[1].clock, stream)
