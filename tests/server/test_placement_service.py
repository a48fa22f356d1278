"""The bounds of a node's part in placement: requests under way, reports together and in pieces, heartbeats."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from shardkv.errors import NotLeader, OutOfSpace, Unavailable
from shardkv.machine.clock import HybridClock
from shardkv.multiraft.space import Space
from shardkv.server import placement_leader
from shardkv.server.placement_leader import LEADER_IDLE_SECONDS, LEADER_TICK_SECONDS, REQUESTS_AT_ONCE_MAX
from shardkv.server.placement_service import PlacementService
from shardkv.server.reporting import (
    HEARTBEAT_SECONDS_MIN,
    LOOKS_PER_HEARTBEAT,
    REPORTS_AT_ONCE_MAX,
    RETRY_SECONDS,
)
from shardkv.server.stop import Stop
from shardkv.simulation.clock import SimulationClock
from shardkv.types import (
    KEY_BYTES_MAX,
    PLACEMENT_RANGE,
    Epoch,
    KeyRange,
    Member,
    NodeId,
    RangeDescriptor,
    RangeId,
    ReplicaId,
)
from shardkv.wire.requests import Method
from shardkv_client.limits import check_request
from shardkv_placement import heartbeat
from shardkv_placement.commands import REPORTS_MAX, ReportRanges, encode, validate
from shardkv_placement.fields import REPLICAS_MAX
from shardkv_placement.heartbeat import HeartbeatReply, Reporter
from shardkv_placement.operators import Transfer
from tests.placement.worlds import Group

HEARTBEAT_SECONDS = 0.5


class World:
    """A placement service whose node has the ranges that a test gives it, and whose calls a test answers."""

    def __init__(self) -> None:
        self.group = Group()
        self.replicas: dict[int, Any] = {}
        self.reports: list[ReportRanges] = []
        self.report_error: Exception | None = None
        self.report_gate = trio.Event()
        self.report_gate.set()
        self.beats: list[float] = []
        self.calls: list[tuple[Any, ...]] = []
        self.under_way = self.under_way_max = 0
        self.call_gate = trio.Event()
        self.disk = SimpleNamespace(free_bytes=lambda path: 1_000_000)
        environment: Any = SimpleNamespace(clock=SimulationClock(), disk=self.disk)
        self.space = Space()
        driver: Any = SimpleNamespace(
            catalog=SimpleNamespace(replicas=self.replicas),
            hybrid_clock=HybridClock(environment.clock),
            space=self.space,
        )
        extension: Any = SimpleNamespace(state=self.group.state)
        log: Any = SimpleNamespace(
            debug=lambda *_, **__: None, info=lambda *_, **__: None, warning=lambda *_, **__: None
        )
        self.service = PlacementService(
            driver,
            environment,
            extension=extension,
            reporter=Reporter(NodeId(1), 1, "h:1"),
            bytes_of=lambda replica: 1000,
            on_nodes=lambda reply: None,
            address_book=SimpleNamespace(),  # type: ignore[arg-type]
            cluster_id=b"c" * 16,
            stop=Stop(trio.Event()),
            log=log,
        )
        self._beaten = trio.Event()
        self.service.group.call = self._call
        self.service.group.propose = self._propose  # type: ignore[method-assign]

    async def _call(self, method: Method, *arguments: Any, **how: Any) -> Any:
        if method is Method.HEARTBEAT:
            await trio.lowlevel.checkpoint()
            self.beats.append(trio.current_time())
            self._beaten.set()
            self._beaten = trio.Event()
            settings = {"heartbeat_ms": int(HEARTBEAT_SECONDS * 1000)}
            return heartbeat.encode_reply(HeartbeatReply(False, 1, None, settings, ()))
        self.calls.append((method, *arguments))
        self.under_way += 1
        self.under_way_max = max(self.under_way_max, self.under_way)
        try:
            await self.call_gate.wait()
            if len(self.calls) % 3 == 0:
                raise Unavailable("the node is not there")
        finally:
            self.under_way -= 1
        return None

    async def beat_after(self, count: int) -> None:
        """Wait until there have been more than ``count``."""
        while len(self.beats) <= count:
            await self._beaten.wait()

    async def _propose(self, command: Any) -> None:
        encoded = encode(command)
        assert validate(encoded) is None, "the group would refuse this"
        check_request(Method.PLACEMENT, (encoded,), key=None, range_id=PLACEMENT_RANGE, node_id=None)
        await self.report_gate.wait()
        if self.report_error is not None:
            raise self.report_error
        self.reports.append(command)

    def add(
        self,
        range_id: int,
        *,
        leads: bool = True,
        leader: int = 1,
        generation: int = 2,
        key_bytes: int = 7,
        replicas: int = 1,
    ) -> Any:
        key = b"%06d" % range_id
        descriptor = RangeDescriptor(
            RangeId(range_id),
            KeyRange(key.ljust(key_bytes, b"\x00"), key.ljust(key_bytes, b"\x01")),
            Epoch(generation, generation),
            tuple(Member(NodeId(node), ReplicaId(range_id + 1000 * node)) for node in range(1, replicas + 1)),
        )
        self.replicas[range_id] = SimpleNamespace(
            range_id=range_id,
            leads=leads,
            machine=SimpleNamespace(descriptor=descriptor),
            raft=SimpleNamespace(
                leader=leader, term=3, last_index=9, committed_in_term=True, status=lambda: SimpleNamespace(progress={})
            ),
        )
        return self.replicas[range_id]

    @property
    def reported(self) -> list[int]:
        return [each.range_id for report in self.reports for each in report.descriptors]


@asynccontextmanager
async def running() -> AsyncIterator[World]:
    world = World()
    async with trio.open_nursery() as nursery:
        await nursery.start(world.service.run)
        await trio.sleep(0.01)
        yield world
        nursery.cancel_scope.cancel()


async def test_changes_that_come_while_a_report_is_under_way_go_together(autojump_clock: MockClock) -> None:
    async with running() as world:
        world.report_gate = trio.Event()
        world.service.reporting.descriptor_changed(world.add(10))
        await trio.sleep(0.01)
        for range_id in (11, 12, 13):
            world.service.reporting.descriptor_changed(world.add(range_id))
        for generation in (3, 4, 5):
            world.service.reporting.descriptor_changed(world.add(12, generation=generation))
        world.report_gate.set()
        await trio.sleep(0.1)
        first, second = world.reports
        assert [each.range_id for each in first.descriptors] == [10]
        assert sorted(each.range_id for each in second.descriptors) == [11, 12, 13]
        assert next(each for each in second.descriptors if each.range_id == 12).epoch == Epoch(5, 5)


async def test_more_changes_than_a_report_holds_go_in_several(autojump_clock: MockClock) -> None:
    """The group refuses a report of more than REPORTS_MAX: in one piece, a node with more ranges never got through."""
    async with running() as world:
        count = 2 * REPORTS_MAX + 7
        for range_id in range(10, 10 + count):
            world.service.reporting.descriptor_changed(world.add(range_id))
        await trio.sleep(0.1)
        assert sorted(world.reported) == list(range(10, 10 + count))
        assert max(len(each.descriptors) for each in world.reports) <= REPORTS_MAX


async def test_a_report_is_no_larger_than_a_call_whatever_the_keys_and_replicas(autojump_clock: MockClock) -> None:
    """It would be refused, and tried again, for ever: nothing of that node's ranges would be in the map any more."""
    async with running() as world:
        count = 2 * REPORTS_AT_ONCE_MAX + 7
        for range_id in range(10, 10 + count):
            replica = world.add(range_id, key_bytes=KEY_BYTES_MAX, replicas=REPLICAS_MAX)
            world.service.reporting.descriptor_changed(replica)
        await trio.sleep(0.1)
        assert sorted(world.reported) == list(range(10, 10 + count))


async def test_a_report_that_failed_is_tried_again_with_what_has_changed_since(autojump_clock: MockClock) -> None:
    async with running() as world:
        world.report_error = NotLeader("an election is under way")
        world.service.reporting.descriptor_changed(world.add(10))
        await trio.sleep(RETRY_SECONDS * 0.5)
        world.report_error = None
        world.service.reporting.descriptor_changed(world.add(10, generation=7))
        world.service.reporting.descriptor_changed(world.add(11))
        await trio.sleep(RETRY_SECONDS)
        (report,) = world.reports
        assert {each.range_id: each.epoch.span for each in report.descriptors} == {10: 7, 11: 2}


async def test_only_who_leads_reports_or_who_knows_of_no_leader(autojump_clock: MockClock) -> None:
    async with running() as world:
        world.service.reporting.descriptor_changed(world.add(10, leads=False, leader=2))
        world.service.reporting.descriptor_changed(world.add(11, leads=False, leader=0))
        gone = world.add(12)
        world.service.reporting.descriptor_changed(gone)
        del world.replicas[12]
        await trio.sleep(0.1)
        assert world.reported == [11]


async def test_a_heartbeat_asks_the_disk_for_nothing(autojump_clock: MockClock) -> None:
    """A disk that does not answer would hold up the loop; and where the data directory is gone, whoever watches it says
    what to do, and must not find the node ended by its heartbeat, which cannot."""

    def gone(path: str) -> int:
        raise FileNotFoundError(2, "No such file or directory", path)

    async with running() as world:
        world.disk.free_bytes = gone
        before = len(world.beats)
        await trio.sleep(2.0)
        assert len(world.beats) > before


async def test_many_changes_make_few_heartbeats(autojump_clock: MockClock) -> None:
    """Changes are reported at once, but not more often than HEARTBEAT_SECONDS_MIN."""
    async with running() as world:
        replica = world.add(10)
        begun = len(world.beats)
        for _ in range(1000):
            world.service.leadership_changed(replica)
            await trio.sleep(0.001)
        assert len(world.beats) - begun <= 1 / HEARTBEAT_SECONDS_MIN + 1
        assert len(world.beats) - begun >= 0.8 / HEARTBEAT_SECONDS_MIN
        assert all(
            later - earlier >= HEARTBEAT_SECONDS_MIN * 0.999
            for earlier, later in zip(world.beats, world.beats[1:], strict=False)
        )


class Restless:
    """A controller that always has something to do."""

    count = 200

    def __init__(self) -> None:
        self.answered_commands: list[Any] = []

    def tick(self, view: Any) -> list[Any]:
        return [Transfer(RangeId(number), NodeId(1), NodeId(2)) for number in range(self.count)]

    def answered(self, command: Any) -> None:
        self.answered_commands.append(command)


async def test_operators_have_a_bound_on_requests_under_way(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Past it nothing is started; the controller's next tick asks again."""
    monkeypatch.setattr(placement_leader, "Controller", Restless)
    async with running() as world:
        world.add(PLACEMENT_RANGE)
        await trio.sleep(LEADER_IDLE_SECONDS * 3)
        assert world.under_way == world.under_way_max == REQUESTS_AT_ONCE_MAX
        assert len(world.calls) == REQUESTS_AT_ONCE_MAX
        world.call_gate.set()
        await trio.sleep(LEADER_IDLE_SECONDS * 2.5)
        assert world.under_way_max == REQUESTS_AT_ONCE_MAX
        assert len(world.calls) >= 2 * REQUESTS_AT_ONCE_MAX, "a place is given back, after an error too"
        assert world.service.leader._requests == world.under_way


async def test_a_node_that_does_not_lead_the_group_starts_nothing(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(placement_leader, "Controller", Restless)
    async with running() as world:
        replica = world.add(PLACEMENT_RANGE, leads=False)
        await trio.sleep(LEADER_IDLE_SECONDS * 3)
        assert not world.calls
        replica.leads = True
        replica.raft.committed_in_term = False
        world.service.leadership_changed(replica)
        await trio.sleep(LEADER_IDLE_SECONDS * 3)
        assert not world.calls, "trap 15: a fresh leader does not schedule before its own term's entry is committed"
        replica.raft.committed_in_term = True
        await trio.sleep(LEADER_IDLE_SECONDS * 2)
        assert world.calls, "it waits for that, not for its next change of leader"


async def test_the_leader_looks_more_often_while_something_is_under_way(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = []

    class Looking(Restless):
        def tick(self, view: Any) -> list[Any]:
            looks.append(trio.current_time())
            return []

    monkeypatch.setattr(placement_leader, "Controller", Looking)
    async with running() as world:
        world.add(PLACEMENT_RANGE)
        await trio.sleep(4.5 * LEADER_IDLE_SECONDS)
        assert len(looks) == 4
        world.service.group.state.operators[RangeId(7)] = SimpleNamespace()  # type: ignore[assignment]
        await trio.sleep(LEADER_IDLE_SECONDS)
        looks.clear()
        await trio.sleep(4.5 * LEADER_TICK_SECONDS)
        assert len(looks) >= 4


def _new_term(world: World) -> None:
    world.replicas[5].raft.term += 1


def _draining(world: World) -> None:
    world.service.reporting.draining = True


def _slow_disk(world: World) -> None:
    world.service.reporting.slow_disk = lambda: True


def _full_disk(world: World) -> None:
    world.space.failed("log", OutOfSpace("full"))


@pytest.mark.parametrize("become", [_new_term, _draining, _slow_disk, _full_disk])
async def test_a_node_with_nothing_new_reports_once_an_interval_and_what_is_new_at_the_next_look(
    autojump_clock: MockClock, become: Callable[[World], None]
) -> None:
    async with running() as world:
        world.add(5)
        await trio.sleep(5)
        world.beats.clear()
        await trio.sleep(10)
        assert 10 <= len(world.beats) <= 10 / HEARTBEAT_SECONDS, "it lives"
        count = len(world.beats)
        with trio.fail_after(2):
            await world.beat_after(count)
        become(world)  # nobody says so
        await trio.sleep((HEARTBEAT_SECONDS_MIN + HEARTBEAT_SECONDS / LOOKS_PER_HEARTBEAT) * 1.01)
        assert len(world.beats) == count + 2
        assert world.beats[-1] - world.beats[-2] < HEARTBEAT_SECONDS
