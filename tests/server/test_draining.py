"""Handing over leaderships at a stop: to whom, and that a node does so before it ends."""

from collections import Counter
from types import SimpleNamespace
from typing import Any

from trio.testing import MockClock

from shardkv.server.draining import _transfer_all
from shardkv.types import RangeId
from tests.server.world import SimulatedNode, world


class Group:
    """A range that this node leads, with two followers, of which the one that is furthest on declines."""

    def __init__(self) -> None:
        self.leads = True
        self.range_id = 1
        self.replica_id = 1
        self.offers: list[int] = []
        self.raft = self
        self.transferee = 0

    def successors(self, now_ns: int) -> list[tuple[int, Any]]:
        return [(replica_id, SimpleNamespace(match=match)) for replica_id, match in ((2, 9), (3, 5))]

    def node_of(self, replica_id: int) -> int:
        return replica_id * 10

    def transfer_leader(self, target: int) -> None:
        self.offers.append(target)
        self.leads = target != 3


def driver_of(groups: dict[int, Group]) -> Any:
    environment = SimpleNamespace(clock=SimpleNamespace(monotonic_ns=lambda: 0))
    catalog = SimpleNamespace(replicas=groups)
    return SimpleNamespace(catalog=catalog, environment=environment, touch=lambda replica: None)


def test_who_declines_a_leadership_is_not_asked_again_before_the_others() -> None:
    group = Group()
    driver = driver_of({1: group})
    asked: dict[Any, set[int]] = {}
    while _transfer_all(driver, asked, Counter()):
        assert len(group.offers) < 5
    assert group.offers == [2, 3]


def test_where_all_have_declined_all_are_asked_again() -> None:
    group = Group()
    group.transfer_leader = group.offers.append  # type: ignore[method-assign]
    driver = driver_of({1: group})
    asked: dict[Any, set[int]] = {}
    for _ in range(6):
        assert _transfer_all(driver, asked, Counter())
    assert sorted(group.offers[:2]) == sorted(group.offers[2:4]) == [2, 3]


def test_leaderships_that_several_could_take_go_to_each_of_them_in_turn() -> None:
    groups = {}
    for number in range(1, 5):
        groups[number] = group = Group()
        group.range_id = number
        group.transfer_leader = group.offers.append  # type: ignore[method-assign]
        peers = [(replica_id, SimpleNamespace(match=9)) for replica_id in (2, 3)]
        group.successors = lambda now_ns, peers=peers: peers  # type: ignore[method-assign, misc]
    driver = driver_of(groups)
    assert _transfer_all(driver, {}, Counter())
    assert sorted(offer for group in groups.values() for offer in group.offers) == [2, 2, 3, 3]


def led_by(node: SimulatedNode) -> set[RangeId]:
    return {range_id for range_id, replica in node.inside.catalog.replicas.items() if replica.leads}


async def test_when_a_node_that_was_stopped_has_ended_other_nodes_lead_what_it_led(autojump_clock: MockClock) -> None:
    """DESIGN 2.2. At that very moment, so nobody waits for an election."""
    async with world(3) as cluster, cluster.client() as kv:
        await kv.put(b"k", b"v")
        leaving = await cluster.leader_of(kv, b"k")
        led = led_by(leaving)
        assert led
        await leaving.shut_down()
        others = [node for node in cluster.nodes.values() if node is not leaving]
        assert led <= set().union(*(led_by(node) for node in others))
