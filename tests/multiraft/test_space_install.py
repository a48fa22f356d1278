"""Replication and a disk without room: what is taken on, what goes on, and what waits until there is room."""

from itertools import pairwise
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from shardkv import codec
from shardkv.errors import OutOfSpace
from shardkv.multiraft.snapshot_sender import RETRY_SECONDS_MAX, RETRY_SECONDS_MIN
from shardkv.multiraft.snapshot_stream import RESUME_SECONDS_MAX, StreamBroken
from shardkv.raft.messages import MessageType
from tests.multiraft.scenes import Stream, behind, carried, led_by_another, spelled, split_on_two
from tests.multiraft.world import RANGE, world

FULL = OutOfSpace("no space left while trying to write the engine; free space or enlarge the disk")


async def test_a_node_that_is_low_on_space_takes_no_snapshot(autojump_clock: MockClock) -> None:
    async with world(3) as hosts:
        late = await behind(hosts)
        leader = hosts[hosts.leader().node_id]
        late.driver.space.failed("log", FULL)
        stream = Stream(*spelled(leader, late.replica().replica_id))
        await late.snapshots.receive(stream, leader.node_id)
        assert stream.answers[0][0] == "refused"
        late.driver.space.succeeded("log")
        hosts.heal()
        await hosts.agreed()


@pytest.mark.parametrize("how", ["the node is full", "the file finds no room", "the end of the file finds no room"])
async def test_a_snapshot_that_finds_no_room_half_way_is_refused_and_its_file_goes(
    autojump_clock: MockClock, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rest of it would take what is left for Raft's own records; a node may be sent more than its disk holds."""

    class Filling(Stream):
        async def send(self, message: list[Any]) -> None:
            await super().send(message)
            if message[0] == "have" and how == "the node is full":
                late.driver.space.failed("log", FULL)

    def fails(*_: object) -> None:
        raise FULL

    async with world(3) as hosts:
        late = await behind(hosts)
        leader = hosts[hosts.leader().node_id]
        builder = late.engine.builder

        def failing(path: str) -> Any:
            built = builder(path)
            if how == "the file finds no room":
                built.put = fails  # type: ignore[method-assign]
            elif how != "the node is full":
                built.finish = fails  # type: ignore[method-assign]
            return built

        monkeypatch.setattr(late.engine, "builder", failing)
        begin, (_, _, rows, _), _ = spelled(leader, late.replica().replica_id)
        stream = Filling(begin, *carried(codec.loads(rows), chunks=4))
        await late.snapshots.receive(stream, leader.node_id)
        assert [answer[:1] for answer in stream.answers] == [["refused"]]
        assert "free space" in stream.answers[0][1]
        assert len(stream.progress) <= (2 if how == "the node is full" else 5)
        assert not late.snapshots.receiver._waiting
        assert not late.snapshots.receiver._receiving
        assert late.catalog.spans._reserved.by_range == {}
        monkeypatch.undo()
        late.driver.space.succeeded("log")
        hosts.heal()
        await hosts.agreed()


async def test_an_unfinished_file_that_a_full_disk_does_not_let_go_of_ends_no_node(autojump_clock: MockClock) -> None:
    """Some file systems need room to remove a file, too. What is left goes at the next start."""
    async with world(3) as hosts:
        late = await behind(hosts)
        leader = hosts[hosts.leader().node_id]
        begin, (_, _, rows, _), _ = spelled(leader, late.replica().replica_id)
        stream = Stream(begin, *carried(codec.loads(rows), chunks=4)[:2])
        stream.more.set()
        with pytest.raises(StreamBroken):
            await late.snapshots.receive(stream, leader.node_id)
        incoming = late.snapshots.receiver._waiting[RANGE]
        late.disk.make_directory("/ingest")
        late.disk.open(incoming.path, create=True)
        incoming.builder.paths = (incoming.path,)  # type: ignore[misc]
        late.disk.fail("unlink", FULL, path_part="/ingest")
        await trio.sleep(RESUME_SECONDS_MAX + 1)
        assert not late.snapshots.receiver._waiting
        assert late.disk.exists(incoming.path)
        assert late.alive
        hosts.heal()
        await hosts.agreed()


@pytest.mark.parametrize("step", ["write", "flush", "ingest"])
async def test_a_step_of_an_install_that_finds_no_room_is_taken_again(
    autojump_clock: MockClock, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half way the range has no data here: to give up would end the node, or leave it without."""
    async with world(3) as hosts:
        late = await behind(hosts)
        original = getattr(late.engine, step)
        left = 3

        def failing(*arguments: Any) -> Any:
            nonlocal left
            if late.replica().installing and left:
                left -= 1
                raise FULL
            return original(*arguments)

        monkeypatch.setattr(late.engine, step, failing)
        hosts.heal()
        await hosts.until(lambda: late.driver.space.full, "a step that found no room")
        await hosts.agreed()
        assert left == 0
        assert not late.driver.space.low


class Said:
    """A log that remembers at which level it was told of what."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, str]] = []

    def __getattr__(self, level: str) -> Any:
        return lambda event, **fields: self.lines.append((level, event))


async def test_trap_16_a_snapshot_that_is_refused_again_and_again_is_offered_and_reported_ever_more_rarely(
    autojump_clock: MockClock,
) -> None:
    """A disk may stay full for days. The pauses double up to a bound, and so does what is said, without one."""
    async with world(3) as hosts:
        late = await behind(hosts)
        late.driver.space.failed("log", FULL)
        leader = hosts[hosts.leader().node_id]
        leader.snapshots.sender._log = said = Said()
        offered: list[float] = []
        hosts.opens = lambda source, target: bool(target == 3 and (offered.append(trio.current_time()) or True))
        hosts.heal()
        await trio.sleep(60)
        pauses = [round(after - before, 3) for before, after in pairwise(offered)]
        expected = RETRY_SECONDS_MIN
        for pause in pauses:
            assert expected <= pause <= expected + 0.3  # Raft asks after a heartbeat
            expected = min(2 * expected, RETRY_SECONDS_MAX)
        assert expected == RETRY_SECONDS_MAX
        assert 32 <= len(offered) < 64
        refused = [level for level, event in said.lines if event == "snapshot refused"]
        assert len(refused) == len(offered)
        assert [number for number, level in enumerate(refused, 1) if level != "debug"] == [1, 2, 4, 8, 16, 32]
        late.driver.space.succeeded("log")
        await hosts.agreed()
        assert not leader.snapshots.sender._failures


async def test_a_full_node_that_refuses_the_snapshot_of_a_range_which_it_has_says_how_far_its_log_goes(
    autojump_clock: MockClock,
) -> None:
    """It had no state when the right half's leader first spoke to it, and what it said when a split had brought that
    was lost. The leader would offer it snapshots for as long as it has no room for one, and needs none."""
    async with world(3) as hosts:
        late = await split_on_two(hosts)
        hosts.passes = lambda source, target, range_id, message: range_id == 2
        await hosts.until(lambda: 2 in late.catalog.replicas, "the right half by a message")
        hosts.passes = lambda source, target, range_id, message: range_id == 1 or source != 3
        await hosts.until(lambda: late.replica(2).machine is not None, "the right half by the split")
        await trio.sleep(1)
        late.driver.space.failed("log", FULL)
        hosts.passes = lambda source, target, range_id, message: True
        await hosts.agreed(2)


async def test_a_new_leader_begins_its_term_on_a_full_node_that_lacks_what_its_predecessor_wrote_last(
    autojump_clock: MockClock,
) -> None:
    """What it lacks is committed, and stands before the beginning of the term: without it no read would be served."""
    async with world(3) as hosts:
        old = await led_by_another(hosts, 3)
        behind = next(host for host in hosts.values() if host not in (old, hosts[3]))
        hosts.passes = lambda source, target, range_id, message: (
            target != behind.node_id or message.type is not MessageType.APP
        )
        await old.put(b"k", b"v").wait()
        behind.driver.space.failed("log", FULL)
        hosts.passes = lambda source, target, range_id, message: old.node_id not in (source, target)
        await hosts.until(lambda: hosts[3].replica().raft.committed_in_term, "the begin of a term at node 3")
        assert await hosts[3].read(b"k").wait() == b"v"
        last = behind.replica().raft.last_index
        write = hosts[3].put(b"k", b"w")
        await trio.sleep(1)
        assert behind.replica().raft.last_index == last
        assert not write.arrived
        hosts.passes = lambda source, target, range_id, message: True
        behind.driver.space.succeeded("log")
        await hosts.agreed()


async def test_a_new_leader_begins_its_term_on_full_nodes_though_it_was_sent_data_already(
    autojump_clock: MockClock,
) -> None:
    """Until they have taken the first entry of its term it can serve no read, and these they must serve."""
    async with world(3) as hosts:
        leader = await led_by_another(hosts, 3)
        term = leader.replica().raft.term
        hosts.passes = lambda source, target, range_id, message: (
            message.type is not MessageType.APP or message.term == term
        )
        leader.replica().raft.transfer_leader(3)
        leader.driver.touch(leader.replica())
        new = hosts[3]
        await hosts.until(lambda: new.replica().leads, "a transfer to node 3")
        write = new.put(b"k", b"v")
        await trio.sleep(0.1)
        for node_id in (1, 2):
            hosts[node_id].driver.space.failed("log", FULL)
        hosts.passes = lambda source, target, range_id, message: True
        await hosts.until(lambda: new.replica().raft.committed_in_term, "the begin of the term")
        assert await new.read(b"k").wait() is None
        assert not write.arrived
        for node_id in (1, 2):
            hosts[node_id].driver.space.succeeded("log")
        assert await write.wait()
        await hosts.agreed()
