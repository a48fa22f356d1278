"""Handing over leaderships at a stop."""

from types import SimpleNamespace
from typing import Any

from shardkv.server.draining import _transfer_all


class Group:
    """A range that this node leads, with two followers, of which the one that is furthest on declines."""

    def __init__(self) -> None:
        self.leads = True
        self.range_id = 1
        self.replica_id = 1
        self.offers: list[int] = []
        self.raft = self
        self.transferee = 0

    def status(self) -> Any:
        peers = {1: 9, 2: 9, 3: 5}
        return SimpleNamespace(
            progress={
                replica_id: SimpleNamespace(match=match, recent_active=True, is_learner=False)
                for replica_id, match in peers.items()
            }
        )

    def transfer_leader(self, target: int) -> None:
        self.offers.append(target)
        self.leads = target != 3


def test_who_declines_a_leadership_is_not_asked_again_before_the_others() -> None:
    group = Group()
    driver: Any = SimpleNamespace(catalog=SimpleNamespace(replicas={1: group}), touch=lambda replica: None)
    asked: dict[Any, set[int]] = {}
    while _transfer_all(driver, asked):
        assert len(group.offers) < 5
    assert group.offers == [2, 3]


def test_where_all_have_declined_all_are_asked_again() -> None:
    group = Group()
    group.transfer_leader = group.offers.append  # type: ignore[method-assign]
    driver: Any = SimpleNamespace(catalog=SimpleNamespace(replicas={1: group}), touch=lambda replica: None)
    asked: dict[Any, set[int]] = {}
    for _ in range(6):
        assert _transfer_all(driver, asked)
    assert sorted(group.offers[:2]) == sorted(group.offers[2:4]) == [2, 3]
