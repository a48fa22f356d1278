"""Snapshots and a disk without room: none is taken on, and one that is half installed waits for room."""

from typing import Any

import pytest
from trio.testing import MockClock

from shardkv.errors import OutOfSpace
from tests.multiraft.test_snapshots import Stream, behind, spelled
from tests.multiraft.world import world

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
