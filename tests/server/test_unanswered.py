"""A node that the placement group does not answer says so once, with the reason, and once that it is over."""

from typing import Any

from trio.testing import MockClock

from tests.server.world import PORT, three_nodes

UNREGISTERED = "the placement group has not taken note of this node's start"
REGISTERED = "the placement group has taken note of this node's start"
UNANSWERED = "the placement group does not answer this node's heartbeats"
ANSWERED = "the placement group answers this node again"
SAID = (UNREGISTERED, REGISTERED, UNANSWERED, ANSWERED)


def of(lines: list[Any], name: str) -> list[str]:
    """What the node said of the placement group, in this order."""
    return [line["event"] for line in lines if line["event"] in SAID and line["node"] == name]


async def test_a_node_that_comes_back_alone_says_why_it_is_not_let_in(autojump_clock: MockClock) -> None:
    """At debug only, with each attempt, nobody saw why."""
    async with three_nodes() as (cluster, lines):
        for node in cluster.nodes.values():
            await node.kill()
        first = cluster.nodes["n3"]
        first.start_soon()
        await cluster.sleep(9.0)
        assert of(lines, "n3") == []
        await cluster.sleep(300.0)
        assert sorted(of(lines, "n3")) == sorted([UNREGISTERED, UNANSWERED])
        assert all(line["reason"] for line in lines if line["event"] in (UNREGISTERED, UNANSWERED))
        await cluster.restart_all()
        await cluster.sleep(20.0)
        assert sorted(of(lines, "n3")[2:]) == sorted([REGISTERED, ANSWERED])
        assert of(lines, "n1") == of(lines, "n2") == []


async def test_a_node_that_cannot_join_says_why_once(autojump_clock: MockClock) -> None:
    async with three_nodes() as (cluster, lines):
        late = cluster.add("n4", join=(f"nobody:{PORT}",))
        late.start_soon()
        await cluster.sleep(50.0)
        mine = [(line["log_level"], line["event"]) for line in lines if line["node"] == "n4"]
        assert mine == [("info", "joining"), ("warning", "could not join the cluster yet")]
        assert "nobody" in lines[-1]["reason"]
        await late.kill()
