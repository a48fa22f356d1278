"""What the admin endpoint answers, and what an asker may cost, in virtual time: a node of stand-ins, no web server."""

import json
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import trio

from shardkv.amounts import human_bytes
from shardkv.errors import Unavailable
from shardkv.json_rules import to_json
from shardkv.server.admin import app, page
from shardkv.server.parts import Parts
from shardkv.simulation.environment import simulated_environment
from shardkv.simulation.network import SimulatedNetwork


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class FakeDriver:
    """A driver that takes a turn when it is woken, unless it is ``stuck``."""

    def __init__(self) -> None:
        self.turns = 0
        self.stuck = False
        self.failed = False
        self.wal = SimpleNamespace(statistics=lambda: SimpleNamespace(failed=self.failed))

    def statistics(self) -> Any:
        return SimpleNamespace(turns=self.turns)

    def wake(self) -> None:
        if not self.stuck:
            self.turns += 1


class FakePlacement:
    def __init__(self) -> None:
        self.reporting = SimpleNamespace(draining=False)
        self.seconds = 0.0
        self.asked = 0
        self.error: Exception | None = None
        self.rows: list[dict[str, Any]] = []

    async def status(self, request: Any) -> Any:
        self.asked += 1
        await trio.sleep(self.seconds)
        if self.error is not None:
            raise self.error
        table = [{"name": "<n1>", "id": 1, "address": "a:1", "state": "live", "replicas": 2, "leaders": 2}]
        return {
            "cluster_id": "0123456789",
            "version": "1",
            "nodes": 1,
            "live": 1,
            "ranges": len(self.rows),
            "placement_leader": 1,
            "settled": False,
            "unsettled": "<u>range 1</u> lacks voters",
            "operators": [{"id": 9, "kind": "repair", "range": 1, "reason": "<i>because</i>"}],
            "node_table": table,
        }

    async def ranges(self, request: Any) -> Any:
        return self.rows


class FakeNode:
    """What is looked at of a node's parts."""

    unready = Parts.unready

    def __init__(self, world: "World") -> None:
        self.name = "n1"
        self.driver, self.placement, self.ready = world.driver, world.placement, world.ready


class World:
    """The application with a node of stand-ins, called as a web server calls it."""

    def __init__(self) -> None:
        self.application = app.Application(simulated_environment("n1", seed=1, network=SimulatedNetwork(1)))
        self.driver, self.placement = FakeDriver(), FakePlacement()
        self.ready = trio.Event()
        self.ready.set()
        self.application.parts = FakeNode(self)  # type: ignore[assignment]

    async def get(self, path: str) -> Answer:
        sent: list[Any] = []

        async def receive() -> Any:
            await trio.sleep_forever()

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {"type": "http", "method": "GET", "path": path, "root_path": "", "query_string": b"", "headers": []}
        await self.application(scope, receive, send)
        body = b"".join(message.get("body", b"") for message in sent)
        headers = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
        return Answer(sent[0]["status"], headers, body)


@pytest.fixture
def world() -> World:
    return World()


async def test_a_starting_node_is_neither_healthy_nor_ready_and_its_page_says_so(
    world: World, autojump_clock: Any
) -> None:
    world.application.parts = None
    for path in ("/healthz", "/readyz", "/status.json", "/ranges.json"):
        answer = await world.get(path)
        assert (path, answer.status) == (path, 503)
        assert b"the node is starting" in answer.body
    shown = await world.get("/")
    assert shown.status == 200
    assert b"the node is starting" in shown.body


async def test_a_draining_node_is_healthy_but_not_ready(world: World, autojump_clock: Any) -> None:
    world.placement.reporting.draining = True
    assert (await world.get("/healthz")).status == 200
    unready = await world.get("/readyz")
    assert (unready.status, unready.body) == (503, b"the node is draining\n")


async def test_a_node_that_has_not_said_that_it_is_ready_is_not(world: World, autojump_clock: Any) -> None:
    world.ready = trio.Event()
    world.application.parts = FakeNode(world)  # type: ignore[assignment]
    assert (await world.get("/healthz")).status == 200
    assert (await world.get("/readyz")).status == 503


async def test_a_failed_log_is_not_healthy(world: World, autojump_clock: Any) -> None:
    world.driver.failed = True
    unhealthy = await world.get("/healthz")
    assert unhealthy.status == 503
    assert b"the log has failed" in unhealthy.body
    assert (await world.get("/readyz")).status == 503


async def test_a_driver_that_takes_no_turn_is_not_healthy(world: World, autojump_clock: Any) -> None:
    world.driver.stuck = True
    unhealthy = await world.get("/healthz")
    assert unhealthy.status == 503
    assert b"has taken no turn" in unhealthy.body


async def test_all_who_ask_at_about_the_same_time_share_one_answer(world: World, autojump_clock: Any) -> None:
    world.placement.seconds = 0.1
    async with trio.open_nursery() as nursery:
        for _ in range(20):
            nursery.start_soon(world.get, "/status.json")
    assert world.placement.asked == 1
    await trio.sleep(app.FRESH_SECONDS + 0.1)
    await world.get("/status.json")
    assert world.placement.asked == 2


async def test_a_failure_is_answered_with_its_name_and_is_nobody_elses_answer(
    world: World, autojump_clock: Any
) -> None:
    world.placement.error = Unavailable("nobody leads")
    failed = await world.get("/status.json")
    assert failed.status == 503
    assert failed.json == {"error": "Unavailable", "message": "nobody leads"}
    shown = await world.get("/")
    assert shown.status == 200
    assert b"Unavailable: nobody leads" in shown.body
    world.placement.error = None
    assert (await world.get("/status.json")).status == 200


async def test_an_answer_that_takes_too_long_is_given_up_and_the_page_sooner(world: World, autojump_clock: Any) -> None:
    world.placement.seconds = 1_000.0
    begun = trio.current_time()
    late = await world.get("/status.json")
    assert late.status == 503
    assert b"no answer within" in late.body
    assert trio.current_time() - begun == pytest.approx(app.REQUEST_SECONDS, abs=0.1)
    begun = trio.current_time()
    shown = await world.get("/")
    assert shown.status == 200
    assert b"has not said within" in shown.body
    assert trio.current_time() - begun == pytest.approx(app.PAGE_SECONDS, abs=0.1)


async def test_more_requests_than_the_bound_are_told_so_at_once(world: World, autojump_clock: Any) -> None:
    world.placement.seconds = 1.0
    answers: list[int] = []

    async def count() -> None:
        answers.append((await world.get("/status.json")).status)

    async with trio.open_nursery() as nursery:
        for _ in range(app.REQUESTS_AT_ONCE_MAX + 3):
            nursery.start_soon(count)
    assert sorted(answers) == [200] * app.REQUESTS_AT_ONCE_MAX + [503] * 3
    assert (await world.get("/status.json")).status == 200


async def test_what_users_wrote_is_text_on_the_page_and_nothing_else(world: World, autojump_clock: Any) -> None:
    row = {
        "id": 1,
        "start": b"",
        "end": b"<script>alert(1)</script>",
        "leader": None,
        "replicas": [1, 7],
        "learners": [7],
    }
    row |= {"epoch": [1, 2], "bytes": 1536}
    other = {**row, "id": 2, "start": row["end"], "end": None, "leader": 1}
    world.placement.rows = [row, other]
    text = (await world.get("/")).body.decode()
    assert "<td>&lt;script&gt;alert(1)&lt;/script&gt;</td>" in text
    assert "<script>alert" not in text
    assert "&lt;n1&gt;, 7" in text
    assert "&lt;i&gt;because&lt;/i&gt;" in text
    assert "1.5 KiB" in text


async def test_a_page_shows_only_so_many_ranges_and_says_how_many_more_there_are(
    world: World, autojump_clock: Any
) -> None:
    row = {"start": b"a", "end": b"b", "leader": 1, "replicas": [1], "learners": [], "epoch": [1, 1], "bytes": 0}
    world.placement.rows = [{"id": number, **row} for number in range(page.RANGES_MAX + 2)]
    text = (await world.get("/")).body.decode()
    assert text.count("<td>a</td>") == page.RANGES_MAX
    assert "2 more ranges" in text


def test_a_key_is_shown_readable_whatever_its_bytes() -> None:
    assert page.show_key("ключ/1".encode()) == "ключ/1"
    assert page.show_key(b"\xff\x00a\n") == r"\xff\x00a\n"
    assert [human_bytes(count) for count in (0, 1023, 1024, 5 * 1024**4)] == ["0 B", "1023 B", "1.0 KiB", "5.0 TiB"]


def test_json_has_the_rules_of_the_contract() -> None:
    """DESIGN 2.2, for every kind of field."""
    value = {"version": 2**60, "a": b"x", "b": b"\xff", "c": [b"y", b"\xfe", {"d": None, "current": 7}], "e": "ü"}
    assert json.loads(to_json(value)) == {
        "version": str(2**60),
        "a": "x",
        "b_base64": "/w==",
        "c": ["y", {"base64": "/g=="}, {"d": None, "current": "7"}],
        "e": "ü",
    }
