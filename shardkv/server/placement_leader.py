"""What the placement group's leader does: it hears the other nodes, decides, and has carried out what it decided.

Lives here: for how long what was heard counts, the loop that carries operators on, the bound on requests for them, and
what is said of those that fail. Does not live here: what is decided (``shardkv_placement``, pure). The rule: with a
leadership ends all that was heard in it (trap 15); what must survive is in the group's state.
"""

from collections.abc import Iterator
from typing import Any, Final

import trio

from shardkv.environment import Clock
from shardkv.errors import NotFound, RequestError, ShardKVError
from shardkv.multiraft.driver import Driver
from shardkv.server.placement_group import CALL_SECONDS, PlacementGroup
from shardkv.server.shared_addresses import SharedAddresses
from shardkv.types import RangeId
from shardkv.wire.requests import Method
from shardkv_placement import commands
from shardkv_placement.commands import Command, FinishOperator
from shardkv_placement.controller import Controller, Propose
from shardkv_placement.heartbeat import Heartbeat, HeartbeatReply
from shardkv_placement.operators import ChangeReplicas, Operator, Outcome
from shardkv_placement.statistics import Statistics
from shardkv_placement.view import ClusterView, RangeView, ViewBuilder

LEADER_TICK_SECONDS: Final = 0.1
LEADER_IDLE_SECONDS: Final = 0.25
"""Instead, while nothing is under way."""
REQUESTS_AT_ONCE_MAX: Final = 64
"""Operators' requests to other nodes under way."""
FAILURE_SECONDS: Final = 600.0
"""Until it is told again that the same could not be done about a range: it is tried again and again."""
FAILURES_MAX: Final = 32
"""Failures of operators that are told in that time; of many ranges that fail alike the first ones say it all."""


class _Failures:
    """Which failures of operators have been told lately."""

    def __init__(self) -> None:
        self._told: dict[tuple[RangeId, str], float] = {}

    def first(self, operator: Operator, now: float) -> bool:
        """Whether this one's is to be told: what was to be done, and to which range, has not been lately."""
        self._told = {key: at for key, at in self._told.items() if now - at < FAILURE_SECONDS}
        key = (operator.range_id, operator.reason)
        if key in self._told or len(self._told) >= FAILURES_MAX:
            return False
        self._told[key] = now
        return True


class PlacementLeader:
    """A service, :meth:`run`, which rests while another node leads the group."""

    def __init__(self, group: PlacementGroup, driver: Driver, clock: Clock, log: Any) -> None:
        self._group = group
        self._driver = driver
        self._clock = clock
        self._log = log
        self.statistics: Statistics | None = None
        """What this node has heard since it leads the group."""
        self._views: ViewBuilder | None = None
        self._controller: Controller | None = None
        self._lead_wanted = trio.Event()
        self._failures = _Failures()
        self._shared_addresses = SharedAddresses(log)
        self._requests = 0

    def wake(self) -> None:
        """This node leads the group now."""
        self._lead_wanted.set()

    def receive(self, beat: Heartbeat) -> HeartbeatReply:
        """A node's heartbeat, while this node leads."""
        now = self._now()
        return self._heard(now).receive(self._group.state, beat, now)

    async def run(self, nursery: trio.Nursery) -> None:
        """While this node leads the group: keep statistics, schedule, carry operators on, each in ``nursery``."""
        while True:
            await self._clock.sleep(LEADER_TICK_SECONDS if self._group.state.operators else LEADER_IDLE_SECONDS)
            if not self._group.leads or not self._group.state.bootstrapped:
                self.statistics = self._views = self._controller = None
                replica = self._group.replica
                if replica is None or not replica.leads:
                    self._lead_wanted = trio.Event()
                    await self._lead_wanted.wait()
                continue
            view = self.view()
            self._shared_addresses.look(view)
            assert self._controller is not None, "a view is made of a leader's statistics"
            for action in self._controller.tick(view):
                if self._requests < REQUESTS_AT_ONCE_MAX:
                    self._requests += 1
                    nursery.start_soon(self._perform, action, self._controller)

    def _heard(self, now: float) -> Statistics:
        """What this node has heard since it leads the group; nothing yet, if it does just now."""
        if self.statistics is None:
            self.statistics = Statistics(now)
            self._views = ViewBuilder(self._group.state, self.statistics)
            self._controller = Controller()
        return self.statistics

    def view(self) -> ClusterView:
        now = self._now()
        self._heard(now)
        assert self._views is not None, "views come with statistics"
        return self._views.build(now, self._driver.hybrid_clock.ms())

    def ranges_above(self, start: bytes | None) -> Iterator[RangeView]:
        """The ranges of keys that start above ``start``, in the order of their keys. No view: that looks at all."""
        reported = self._heard(self._now()).ranges
        for descriptor in self._group.state.ranges.descriptors_above(start):
            yield RangeView(descriptor, reported.get(descriptor.range_id))

    async def _perform(self, action: Any, controller: Controller) -> None:
        try:
            if isinstance(action, Propose):
                await self._propose_for(action.command)
                controller.answered(action.command)
            elif isinstance(action, ChangeReplicas):
                await self._group.call(
                    Method.CHANGE_REPLICAS,
                    action.range_id,
                    action.changes,
                    action.membership,
                    node_id=action.leader,
                    timeout=CALL_SECONDS,
                )
            else:
                await self._group.call(
                    Method.TRANSFER, action.range_id, action.target, node_id=action.leader, timeout=CALL_SECONDS
                )
        except ShardKVError as error:
            self._log.debug("placement action failed", action=str(action)[:200], reason=str(error))
            # A node that is not found may just not be known yet.
            if isinstance(error, RequestError) and not isinstance(error, NotFound) and not isinstance(action, Propose):
                characters_max = commands.MESSAGE_BYTES_MAX // 4
                controller.refused(action, str(error)[:characters_max])
        finally:
            self._requests -= 1

    async def _propose_for(self, command: Command) -> None:
        """Propose what the controller wants."""
        failed = command if isinstance(command, FinishOperator) and command.outcome is Outcome.FAILED else None
        running = self._group.state.operators.values() if failed is not None else ()
        operator = next((each for each in running if failed and each.operator_id == failed.operator_id), None)
        ended = await self._group.propose_here(commands.encode(command))
        if failed and operator and ended and self._failures.first(operator, self._now()):
            self._log.warning(
                "what was to be done about a range has failed",
                range=operator.range_id,
                operator=operator.kind.value,
                why=operator.reason,
                reason=failed.message,
            )

    def _now(self) -> float:
        return self._clock.monotonic_ns() / 1e9
