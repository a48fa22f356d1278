"""All schedulers together: from a view to the operators to start, and why a range was left alone.

Each scheduler is a function from a view to operators, and sees those of the ones before it as running. None keeps
anything between two calls: what must be remembered (what runs, what just ended) is replicated state and so in the view.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace
from types import MappingProxyType
from typing import Final

from shardkv.types import PLACEMENT_RANGE, RangeId
from shardkv_placement import leader_schedulers, replica_schedulers
from shardkv_placement.operators import Operator
from shardkv_placement.view import ClusterView

Scheduler = Callable[[ClusterView], tuple[Operator, ...]]

SCHEDULERS: Final[tuple[Scheduler, ...]] = (
    replica_schedulers.place_replicas,
    leader_schedulers.drain_leaders,
    leader_schedulers.balance_leaders,
)
"""In the order of their urgency."""


def schedule(view: ClusterView) -> tuple[Operator, ...]:
    """The operators to start now; none from a view whose statistics are not complete, whatever it seems to show."""
    if not view.complete or not view.settings.scheduling:
        return ()
    found: list[Operator] = []
    for scheduler in SCHEDULERS:
        made = scheduler(view)
        found.extend(made)
        view = with_running(view, made)
    return tuple(found)


def with_running(view: ClusterView, operators: Iterable[Operator]) -> ClusterView:
    """The view as if ``operators`` ran already."""
    added = {operator.range_id: operator for operator in operators}
    if not added:
        return view
    return replace(view, operators=MappingProxyType({**added, **view.operators}))


def explain(view: ClusterView, range_id: RangeId) -> str:
    """Why a range was not moved, or what is being done with it, for a person. Changes nothing."""
    range_view = view.ranges.get(range_id)
    if range_view is None:
        return f"there is no range {range_id}"
    running = view.operators.get(range_id)
    if running is not None:
        return (
            f"range {range_id}: operator {running.operator_id} ({running.kind.value}) is at step {running.step + 1} of "
            f"{len(running.steps)}, {running.current.tag}, because {running.reason}"
        )
    if not view.complete:
        return f"range {range_id}: nothing is scheduled, the placement leader has not heard every node yet"
    if not view.settings.scheduling:
        return f"range {range_id}: nothing is scheduled, the setting `scheduling` is off"
    for operator in schedule(view):
        if operator.range_id == range_id:
            return f"range {range_id}: about to {operator.kind.value}, because {operator.reason}"
    replicas = replica_schedulers.why_not(view, range_view)
    if not view.settings.leader_balance:
        return f"range {range_id}: replicas: {replicas}; leader: the setting `leader_balance` is off"
    return f"range {range_id}: replicas: {replicas}; leader: {leader_schedulers.why_not(view, range_view)}"


def why_unsettled(view: ClusterView) -> str | None:
    """What is still missing or under way, for a person; None where every range has the voters that it should have and
    nothing is about to move."""
    if not view.complete:
        return "the placement leader has not heard every node yet"
    lacking = replica_schedulers.lacking_voters(view)
    if lacking:
        first = lacking[-1]  # a range of keys, if one of those is among them
        name = "the placement group" if first.range_id == PLACEMENT_RANGE else f"range {first.range_id}"
        others = f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
        idle = "" if view.settings.scheduling else " (nothing new is begun, the setting `scheduling` is off)"
        return f"{name}{others}: {replica_schedulers.why_not(view, first)}{idle}"
    if view.operators:
        return (
            f"{len(view.operators)} operators are under way" if len(view.operators) > 1 else "an operator is under way"
        )
    return None
