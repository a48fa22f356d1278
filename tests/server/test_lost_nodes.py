"""The loss of a node, or of a majority, is in the logs of those that are left: once, and once that it is over."""

from typing import Any

from trio.testing import MockClock

from shardkv.simulation import run_deterministically
from shardkv.types import NodeId
from tests.server.world import three_nodes

UNREACHABLE, REACHABLE = "cannot reach a node", "a node can be reached again"
LEADERLESS = "ranges have had no leader for 10 s"
LED = "every range of this node has a leader again"


def those(lines: list[Any], event: str) -> list[tuple[str, str]]:
    """Who said so, and how loudly."""
    return sorted((line["node"], line["log_level"]) for line in lines if line["event"].startswith(event))


async def test_a_node_that_dies_is_told_of_once_by_each_of_the_others(autojump_clock: MockClock) -> None:
    async with three_nodes() as (cluster, lines):
        third = cluster.nodes["n3"]
        await third.kill()
        await cluster.sleep(60.0)
        async with cluster.client("n1") as kv:
            status = await kv.status()
        assert (status["nodes"], status["live"]) == (3, 2), "one that is down is a node all the same"
        assert those(lines, UNREACHABLE) == [("n1", "warning"), ("n2", "warning")]
        for line in lines:
            if line["event"] == UNREACHABLE:
                assert (line["peer"], line["address"]) == (3, third.address)
                assert "nobody listens" in line["reason"]
        assert those(lines, REACHABLE) == []
        await third.start()
        await cluster.sleep(5.0)
        assert those(lines, REACHABLE) == [("n1", "info"), ("n2", "info")]
        assert len(those(lines, UNREACHABLE)) == 2
        assert those(lines, LEADERLESS) == []


def test_a_node_that_hangs_is_told_of_once_by_each_of_the_others() -> None:
    """Its connections stand, for its system keeps them: nothing was said of it while it was stopped."""

    async def main() -> None:
        async with three_nodes() as (cluster, lines):
            third = cluster.nodes["n3"]
            third.pause()
            await cluster.sleep(10.0)
            assert those(lines, UNREACHABLE) == [("n1", "warning"), ("n2", "warning")]
            for line in lines:
                if line["event"] == UNREACHABLE:
                    assert (line["peer"], line["address"]) == (3, third.address)
                    assert "answers nothing" in line["reason"]
            for name in ("n1", "n2"):
                assert not cluster.nodes[name].inside.others.pool.connected(NodeId(3))
            await cluster.sleep(300.0)
            assert len(those(lines, UNREACHABLE)) == 2
            third.resume()
            await cluster.sleep(10.0)
            assert those(lines, REACHABLE) == [("n1", "info"), ("n2", "info")]
            assert len(those(lines, UNREACHABLE)) == 2, "nor does it tell of those that it could not hear"

    run_deterministically(main, seed=1)


def test_a_node_that_hangs_for_a_moment_is_not_told_of() -> None:
    async def main() -> None:
        async with three_nodes() as (cluster, lines):
            third = cluster.nodes["n3"]
            third.pause()
            await cluster.sleep(3.0)
            third.resume()
            await cluster.sleep(60.0)
            assert those(lines, UNREACHABLE) == those(lines, REACHABLE) == []

    run_deterministically(main, seed=1)


async def test_a_node_that_is_soon_back_is_not_told_of(autojump_clock: MockClock) -> None:
    """Nor does one that stops tell of those that stop at the same time."""
    async with three_nodes() as (cluster, lines):
        third = cluster.nodes["n3"]
        await third.shut_down()
        await cluster.sleep(1.0)
        await third.start()
        await cluster.sleep(10.0)
        for node in cluster.nodes.values():
            node.stop.set()
        await cluster.sleep(20.0)
        assert those(lines, UNREACHABLE) == those(lines, REACHABLE) == []


async def test_ranges_without_a_majority_are_told_of_in_one_line(autojump_clock: MockClock) -> None:
    async with three_nodes() as (cluster, lines):
        for name in ("n2", "n3"):
            await cluster.nodes[name].kill()
        await cluster.sleep(8.0)
        assert those(lines, LEADERLESS) == []
        await cluster.sleep(60.0)
        (line,) = [line for line in lines if line["event"].startswith(LEADERLESS)]
        assert (line["node"], line["log_level"]) == ("n1", "warning")
        assert (sorted(line["ranges"]), line["count"]) == ([0, 1], 2)
        assert those(lines, LED) == []
        await cluster.restart_all()
        await cluster.sleep(10.0)
        assert those(lines, LED) == [("n1", "info")]
