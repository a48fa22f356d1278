"""The admin endpoint of a node of the real environment on loopback, asked over HTTP."""

import json
import re
import resource
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import h2.connection
import h2.events
import pytest
import structlog
import trio
from structlog.testing import capture_logs
from trio.testing import wait_all_tasks_blocked

from shardkv.config import NodeConfig, StorageConfig
from shardkv.environment.real import real_environment
from shardkv.errors import ConfigError
from shardkv.server import run_node
from shardkv.server.admin import serving
from shardkv.wire.requests import Method
from shardkv_client import connect
from tests.cluster.harness import SECONDS_MAX as SECONDS
from tests.cluster.harness import LocalCluster, terminate


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


async def exchange(address: str, sent: bytes) -> bytes:
    """Everything that the endpoint says to ``sent``, until it closes."""
    host, port = address.rsplit(":", 1)
    async with await trio.open_tcp_stream(host, int(port)) as stream:
        await stream.send_all(sent)
        received = b""
        while data := await stream.receive_some():
            received += data
        return received


async def ask(address: str, path: str, method: str = "GET") -> Answer:
    request = f"{method} {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n"
    head, _, body = (await exchange(address, request.encode())).partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in lines)
    return Answer(int(first.split()[1]), headers, body)


@dataclass
class Node:
    address: str
    admin: str
    logs: list[Any]


def config_of(directory: Path, **changes: Any) -> NodeConfig:
    config = NodeConfig(
        name="n1",
        data=str(directory),
        listen="127.0.0.1:0",
        admin="127.0.0.1:0",
        bootstrap=True,
        storage=StorageConfig(engine="memory", segment_bytes=64 * 1024),
    )
    return replace(config, **changes)


@asynccontextmanager
async def node(directory: Path) -> AsyncIterator[Node]:
    """A node in this process, stopped cleanly at the end."""
    stop, ready, addresses = trio.Event(), trio.Event(), []

    def is_ready(name: str, address: str) -> None:
        addresses.append(address)
        ready.set()

    with capture_logs() as logs, trio.fail_after(SECONDS):
        async with trio.open_nursery() as nursery:

            async def run() -> None:
                await run_node(config_of(directory), real_environment(), ready=is_ready, stop=stop)

            nursery.start_soon(run)
            await ready.wait()
            (admin,) = [line["address"] for line in logs if line["event"] == "admin endpoint"]
            yield Node(addresses[0], admin, logs)
            stop.set()


async def test_a_node_is_healthy_ready_and_shows_its_figures(tmp_path: Path) -> None:
    async with node(tmp_path) as it:
        health, ready = await ask(it.admin, "/healthz"), await ask(it.admin, "/readyz")
        assert (health.status, health.body) == (200, b"ok\n")
        assert (ready.status, ready.body) == (200, b"ready\n")
        metrics = await ask(it.admin, "/metrics")
        assert metrics.status == 200
        assert metrics.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
        samples = dict(line.rsplit(" ", 1) for line in metrics.body.decode().splitlines() if not line.startswith("#"))
        assert float(samples["shardkv_turns_total"]) > 0
        assert float(samples["shardkv_syncs_total"]) > 0
        assert samples["shardkv_replicas"] == samples["shardkv_leaders"] == "2.0"
        assert samples["shardkv_log_segments"] == "1.0"
        assert samples["shardkv_ready"] == "1.0"
        assert float(samples["shardkv_client_connections"]) <= float(samples["shardkv_connections"])
        assert float(samples["process_resident_memory_bytes"]) > 0
        assert samples['shardkv_admin_requests_total{path="/healthz"}'] == "1.0"
        assert 'shardkv_loop_lateness_seconds_bucket{le="+Inf"}' in samples
        info = next(name for name in samples if name.startswith("shardkv_node_info"))
        assert 'name="n1"' in info
        assert f'address="{it.address}"' in info


async def test_status_and_ranges_are_the_cluster_under_the_rules_for_json(tmp_path: Path) -> None:
    """DESIGN 2.2: a field that is not UTF-8 is renamed with _base64, an unbounded end is null."""
    async with node(tmp_path) as it:
        async with connect(it.address) as kv:
            await kv.call(Method.SPLIT, "ключ".encode(), key="ключ".encode())
            await kv.call(Method.SPLIT, b"\xff\x00", key=b"\xff\x00")
            expected = await kv.call(Method.RANGES)
            while len(expected) < 3:
                await trio.sleep(0.02)
                expected = await kv.call(Method.RANGES)
        ranges = await ask(it.admin, "/ranges.json")
        assert (ranges.status, ranges.headers["content-type"]) == (200, "application/json")
        first, second, third = ranges.json
        assert (first["start"], first["end"]) == ("", "ключ")
        assert (second["start"], second["end_base64"]) == ("ключ", "/wA=")
        assert "end" not in second
        assert (third["start_base64"], third["end"]) == ("/wA=", None)
        assert [row["id"] for row in ranges.json] == [row["id"] for row in expected]
        status = (await ask(it.admin, "/status.json")).json
        assert status["ranges"] == 3
        assert status["node_table"][0]["name"] == "n1"
        assert status["placement_leader"] == 1


async def test_the_page_is_complete_in_itself_and_filled_in_before_its_script_runs(tmp_path: Path) -> None:
    async with node(tmp_path) as it:
        shown = await ask(it.admin, "/")
        text = shown.body.decode()
        assert shown.status == 200
        assert shown.headers["content-type"] == "text/html; charset=utf-8"
        assert shown.headers["content-security-policy"].startswith("default-src 'none'; script-src 'sha256-")
        assert f"<td>n1</td><td class=n>1</td><td>{it.address}</td><td>" in text
        assert "<td>−∞</td><td>+∞</td>" in text
        assert "1 of 1 nodes live · 1 ranges · placement led by n1</p>" in text
        assert "<!--" not in text
        assert "://" not in text


async def test_only_get_is_answered_and_only_known_paths_are(tmp_path: Path) -> None:
    async with node(tmp_path) as it:
        for method in ("POST", "PUT", "DELETE", "PATCH", "OPTIONS", "HEAD"):
            refused = await ask(it.admin, "/healthz", method)
            assert (method, refused.status, refused.headers["allow"]) == (method, 405, "get")
        assert (await ask(it.admin, "/secrets")).status == 404
        assert (await ask(it.admin, "/secrets", "POST")).status == 405


async def test_an_asker_who_sends_a_body_in_crumbs_is_answered_and_let_go(tmp_path: Path) -> None:
    """A body that nobody reads fills the web server's queue, behind which the end of the connection would wait."""
    async with node(tmp_path) as it:
        head = b"POST /healthz HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
        assert b"405" in (await exchange(it.admin, head + b"1\r\nx\r\n" * 5_000)).splitlines()[0]
        answer = await exchange(it.admin, head.replace(b"POST", b"GET") + b"1\r\nx\r\n" * 5_000)
        assert answer.startswith(b"HTTP/1.1 200")


async def test_a_request_that_breaks_the_web_server_ends_neither_node_nor_endpoint(tmp_path: Path) -> None:
    """The web server lets the error of a malformed upgrade out."""
    async with node(tmp_path) as it:
        broken = (
            b"GET / HTTP/1.1\r\nHost: x\r\nConnection: Upgrade, HTTP2-Settings\r\n"
            b"Upgrade: h2c\r\nHTTP2-Settings: A\r\n\r\n"
        )
        await exchange(it.admin, broken)
        assert (await ask(it.admin, "/healthz")).status == 200
        (line,) = [line for line in it.logs if line["event"] == "a connection to the admin endpoint failed"]
        assert line["log_level"] == "warning"


async def served(*, task_status: Any) -> None:
    """Service: the admin endpoint alone, of a node that is still starting."""
    admin = serving.Admin(real_environment(), structlog.get_logger())
    await admin.run("127.0.0.1:0", task_status=task_status)


async def receive(stream: trio.SocketStream, end: bytes) -> None:
    received = b""
    while not received.endswith(end):
        data = await stream.receive_some()
        assert data, f"closed after {received!r}"
        received += data


async def test_a_request_that_breaks_the_web_server_ends_no_connection_but_its_own() -> None:
    """DATA on an HTTP/2 stream that was answered early is an error in the web server, and an ordinary request."""
    request = b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"
    with capture_logs() as logs, trio.fail_after(SECONDS):
        async with trio.open_nursery() as nursery, AsyncExitStack() as opened:
            host, port = (await nursery.start(served)).rsplit(":", 1)
            other = await opened.enter_async_context(await trio.open_tcp_stream(host, int(port)))
            await other.send_all(request)
            await receive(other, b"starting\n")

            stream = await opened.enter_async_context(await trio.open_tcp_stream(host, int(port)))
            client = h2.connection.H2Connection()
            client.initiate_connection()
            head = {":method": "POST", ":path": "/", ":authority": "x", ":scheme": "http"}
            client.send_headers(1, list(head.items()))
            await stream.send_all(client.data_to_send())
            answered = False
            while not answered:
                events = client.receive_data(await stream.receive_some())
                answered = any(isinstance(event, h2.events.StreamEnded) for event in events)
            await wait_all_tasks_blocked()  # the web server, too, is through with the answer
            client.send_data(1, b"x", end_stream=True)
            await stream.send_all(client.data_to_send())
            while await stream.receive_some():
                pass

            await other.send_all(request)
            await receive(other, b"starting\n")
            nursery.cancel_scope.cancel()
    assert [line["event"] for line in logs] == ["a connection to the admin endpoint failed"]


async def test_a_web_server_that_fails_is_started_again(monkeypatch: pytest.MonkeyPatch) -> None:
    accept = serving._BoundedListener.accept

    async def fail(listener: serving._BoundedListener) -> trio.SocketStream:
        monkeypatch.setattr(serving._BoundedListener, "accept", accept)
        raise ValueError("no connection")

    monkeypatch.setattr(serving._BoundedListener, "accept", fail)
    with capture_logs() as logs, trio.fail_after(SECONDS):
        async with trio.open_nursery() as nursery:
            assert (await ask(await nursery.start(served), "/healthz")).status == 503
            nursery.cancel_scope.cancel()
    assert [line["event"] for line in logs] == ["the admin endpoint failed and is started again"]


async def test_an_address_in_use_ends_the_start_before_anything_is_done(tmp_path: Path) -> None:
    (taken,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    port = taken.socket.getsockname()[1]
    config = config_of(tmp_path, admin=f"127.0.0.1:{port}")
    async with taken:
        with capture_logs(), trio.fail_after(SECONDS), pytest.raises(ConfigError, match="is in use; choose another"):
            await run_node(config, real_environment(), ready=lambda name, address: None, stop=trio.Event())
    async with node(tmp_path) as it:
        assert (await ask(it.admin, "/readyz")).status == 200


async def test_an_address_that_is_not_ours_or_not_known_is_refused_with_advice() -> None:
    admin = serving.Admin(real_environment(), structlog.get_logger())
    with pytest.raises(ConfigError, match="no address of this machine"):
        await admin.run("192.0.2.1:0")


@pytest.mark.parametrize("known", [True, False])
async def test_addresses_of_a_kind_that_the_machine_has_not_are_passed_over(
    monkeypatch: pytest.MonkeyPatch, known: bool
) -> None:
    """46 is one that no system knows, as one without IPv6 knows nothing of that."""

    async def getaddrinfo(_host: str, port: int, **_: object) -> list[tuple[object, ...]]:
        families = [46, socket.AF_INET] if known else [46]
        return [(family, socket.SOCK_STREAM, 0, "", ("127.0.0.1", port)) for family in families]

    monkeypatch.setattr(trio.socket, "getaddrinfo", getaddrinfo)
    if known:
        listening, address = await serving._bind("name:0")
        listening.close()
        assert address.startswith("127.0.0.1:")
    else:
        with pytest.raises(ConfigError, match="no address of its kind"):
            await serving._bind("name:0")


async def test_an_asker_who_takes_nothing_does_not_keep_the_node_from_stopping(monkeypatch: pytest.MonkeyPatch) -> None:
    """The web server's sends cannot be cancelled, so the system breaks the connection (TCP_USER_TIMEOUT)."""
    monkeypatch.setattr(serving, "UNTAKEN_MS", 300)
    admin = serving.Admin(real_environment(), structlog.get_logger())
    sending, ended = trio.Event(), trio.Event()

    async def large(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            raise ValueError("no start or stop messages here")
        await send({"type": "http.response.start", "status": 200, "headers": []})
        sending.set()
        await send({"type": "http.response.body", "body": bytes(64 * 1024 * 1024)})

    admin._application = large  # type: ignore[assignment]

    async def run(*, task_status: Any) -> None:
        await admin.run("127.0.0.1:0", task_status=task_status)

    async def serve(*, task_status: Any) -> None:
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                task_status.started((await nursery.start(run), scope))
        ended.set()

    async with trio.open_nursery() as nursery:
        address, scope = await nursery.start(serve)
        host, port = address.rsplit(":", 1)
        async with await trio.open_tcp_stream(host, int(port)) as stream:
            await stream.send_all(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            await sending.wait()
            scope.cancel()
            with trio.move_on_after(SECONDS) as waiting:
                await ended.wait()
        await ended.wait()
        assert not waiting.cancelled_caught, "the endpoint waited for the asker"


@pytest.mark.parametrize("files", [None, 2 * serving.FILES_PER_CONNECTION])
async def test_connections_are_bounded_and_who_comes_then_waits(
    files: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever opened more and more of them took the open files that clients, peers and the log need. Of few files, 64
    connections did: the engine's next flush failed, and the node ended."""
    if files is None:
        monkeypatch.setattr(serving, "CONNECTIONS_MAX", 2)
    else:
        monkeypatch.setattr(resource, "getrlimit", lambda which: (files, files))
    admin = serving.Admin(real_environment(), structlog.get_logger())
    asked: list[str] = []
    asking, freed = trio.Event(), trio.Event()

    async def held(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            raise ValueError("no start or stop messages here")
        asked.append(scope["path"])
        if len(asked) >= 2:
            (asking if len(asked) == 2 else freed).set()
        while (await receive())["type"] != "http.disconnect":
            pass

    admin._application = held  # type: ignore[assignment]

    async def run(*, task_status: Any) -> None:
        await admin.run("127.0.0.1:0", task_status=task_status)

    with trio.fail_after(SECONDS):
        async with trio.open_nursery() as nursery, AsyncExitStack() as opened:
            host, port = (await nursery.start(run)).rsplit(":", 1)
            streams = []
            for number in range(3):
                streams.append(await opened.enter_async_context(await trio.open_tcp_stream(host, int(port))))
                await streams[-1].send_all(b"GET /%d HTTP/1.1\r\nHost: x\r\n\r\n" % number)
            await asking.wait()
            await wait_all_tasks_blocked(0.05)
            assert sorted(asked) == ["/0", "/1"]
            await streams[0].aclose()
            await freed.wait()
            assert sorted(asked) == ["/0", "/1", "/2"]
            nursery.cancel_scope.cancel()


@pytest.mark.cluster
async def test_a_real_node_says_where_it_serves_and_collects_its_own_garbage(tmp_path: Path) -> None:
    with LocalCluster(tmp_path, nodes=1, options=["--admin", "127.0.0.1:0", "--engine", "memory"]) as world:
        await trio.to_thread.run_sync(world.start, SECONDS)
        lines = (tmp_path / "n1.log").read_text().splitlines()
        (line,) = [line for line in lines if 'event="admin endpoint"' in line]
        (address,) = [word.removeprefix("address=") for word in line.split() if word.startswith("address=")]
        metrics = (await ask(address, "/metrics")).body.decode()
        assert 'shardkv_garbage_collections_total{kind="full"}' in metrics
        page = (Path(__file__).parents[2] / "docs/admin.md").read_text()
        shown = set(re.findall(r"^# TYPE (shardkv_\w+) ", metrics, re.MULTILINE))
        assert shown == set(re.findall(r"`(shardkv_\w+)[`{]", page)), "docs/admin.md has them all"
        assert await terminate(world, "n1") == 0


def test_a_node_without_the_endpoint_loads_no_web_server() -> None:
    """DESIGN 2.3's rule for the client, kept here for the node: start-up stays light."""
    script = (
        "import sys, shardkv.server, shardkv.cli.node;"
        "print([name for name in sys.modules if name.split('.')[0] in ('hypercorn', 'starlette', 'prometheus_client')])"
    )
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, check=True).stdout == b"[]\n"
