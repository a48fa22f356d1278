"""The controller: carries operators on. Sans-IO: each tick takes a view and returns what to do.

It is level-triggered: it looks at what is, not at what happened, so an action that is lost is simply wanted again on
a later tick, and one that is repeated does no harm. All it remembers is when it last asked for something, to spare the
asked; a new placement leader begins with a new controller and goes on with the replicated operators.
"""

from collections.abc import Mapping
from typing import Final, NamedTuple

from shardkv.types import Fullness, RangeId
from shardkv_placement.commands import AddOperator, AdvanceOperator, Command, FinishOperator
from shardkv_placement.operators import Operator, Outcome, Request
from shardkv_placement.schedulers import schedule, with_running
from shardkv_placement.view import ClusterView, NodeState, RangeView

REQUEST_SECONDS: Final = 1.0
"""Between two requests for the same step to the same leader."""
PROPOSAL_SECONDS: Final = 2.0
"""After which a proposal whose effect is not seen is made again."""
SCHEDULE_SECONDS: Final = 5.0
"""How often schedulers run when nothing they look at has changed: cooldowns end without a change."""


class Propose(NamedTuple):
    """Propose a command to the placement group. A refusal needs no handling: the next view shows why."""

    command: Command


Action = Propose | Request
"""What the server performs: a proposal, a ``ChangeReplicas`` or a ``Transfer``. Answers need not be reported back."""


class _Seen(NamedTuple):
    """What the schedulers last looked at."""

    ranges: Mapping[RangeId, RangeView]
    operators: Mapping[RangeId, Operator]
    nodes: tuple[tuple[int, NodeState, bool, bool, Fullness], ...]
    settings: object
    at: float


class Controller:
    """One placement leader's. Call :meth:`tick` after applied commands and heartbeats, and at intervals."""

    def __init__(self) -> None:
        self._asked: dict[tuple[int, int, object], float] = {}
        """When each request or proposal about (operator, step) was last made; entries expire."""
        self._pending: dict[RangeId, tuple[Operator, float]] = {}
        """Operators that were proposed and are not seen running yet."""
        self._refused: dict[RangeId, tuple[Request, str]] = {}
        """Requests that a range's leader will never carry out, and why."""
        self._seen: _Seen | None = None

    def tick(self, view: ClusterView) -> list[Action]:
        """What is to be done now, by a view of now."""
        now = view.now
        self._asked = {key: at for key, at in self._asked.items() if now - at < PROPOSAL_SECONDS}
        for range_id, (_, at) in list(self._pending.items()):
            if range_id in view.operators:
                del self._pending[range_id]
            elif now - at >= PROPOSAL_SECONDS:
                del self._pending[range_id]
                self._seen = None  # It was lost, or refused: schedule anew, even if nothing else has changed.
        if self._refused:
            self._refused = {key: refused for key, refused in self._refused.items() if key in view.operators}
        actions: list[Action] = []
        for operator in view.operators.values():
            action = self._carry_on(view, operator)
            if action is not None:
                actions.append(action)
        actions.extend(self._start(view))
        return actions

    def answered(self, command: Command) -> None:
        """Optional: a proposal has been answered, so its effect, if any, is in the next view; do not wait for it."""
        if isinstance(command, AddOperator):
            self._pending.pop(command.operator.range_id, None)
            self._seen = None

    def refused(self, request: Request, reason: str) -> None:
        """Optional: the leader says that the request is wrong; its operator ends now, not when its time is over."""
        self._refused[request.range_id] = (request, reason)

    def _carry_on(self, view: ClusterView, operator: Operator) -> Action | None:
        range_view = view.ranges.get(operator.range_id)
        if range_view is None:
            return self._propose(view, operator, FinishOperator(operator.operator_id, Outcome.FAILED, "no such range"))
        position = operator.progress(view, range_view)
        if position == len(operator.steps):
            return self._propose(view, operator, FinishOperator(operator.operator_id, Outcome.DONE))
        if position > operator.step:
            return self._propose(view, operator, AdvanceOperator(operator.operator_id, position))
        failure = operator.failure(view, range_view) if view.complete else None
        if failure is not None:
            return self._propose(view, operator, FinishOperator(operator.operator_id, Outcome.FAILED, failure))
        request = operator.current.request(range_view)
        refused, reason = self._refused.pop(operator.range_id, (None, ""))
        if request is not None and request == refused:
            return Propose(FinishOperator(operator.operator_id, Outcome.FAILED, reason))
        if request is None or not self._due(view, (operator.operator_id, operator.step, request.leader)):
            return None
        return request

    def _propose(self, view: ClusterView, operator: Operator, command: Command) -> Action | None:
        if not self._due(view, (operator.operator_id, operator.step, type(command))):
            return None
        return Propose(command)

    def _due(self, view: ClusterView, key: tuple[int, int, object]) -> bool:
        seconds = PROPOSAL_SECONDS if isinstance(key[2], type) else REQUEST_SECONDS
        asked = self._asked.get(key)
        if asked is not None and view.now - asked < seconds:
            return False
        self._asked[key] = view.now
        return True

    def _start(self, view: ClusterView) -> list[Action]:
        seen = _Seen(
            view.ranges,
            view.operators,
            tuple(
                (node.node_id, node.state, node.draining, node.slow_disk, node.fullness) for node in view.nodes.values()
            ),
            view.settings,
            view.now,
        )
        if not view.complete or self._unchanged(seen):
            return []
        self._seen = seen
        view = with_running(view, [operator for operator, _ in self._pending.values()])
        operators = schedule(view)
        for operator in operators:
            self._pending[operator.range_id] = (operator, view.now)
        return [Propose(AddOperator(operator)) for operator in operators]

    def _unchanged(self, seen: _Seen) -> bool:
        before = self._seen
        if before is None or seen.at - before.at >= SCHEDULE_SECONDS:
            return False
        return (
            seen.ranges is before.ranges
            and seen.operators is before.operators
            and seen.nodes == before.nodes
            and seen.settings is before.settings
        )
