"""What the admin endpoint answers, as a plain ASGI application. It changes nothing and knows no web server.

Lives here: the paths, when the node is healthy and when ready, and the bounds on what an asker may cost. Does not live
here: how the answers look (``metrics``, ``page``, ``shardkv.json_rules``). The rule: only GET, no bodies, every answer
within a deadline, and one answer for all who ask at about the same time.
"""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Final

import trio
from starlette.applications import Starlette
from starlette.requests import Request as HttpRequest
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from shardkv.environment import Environment
from shardkv.errors import ShardKVError
from shardkv.json_rules import to_json
from shardkv.server.admin import page
from shardkv.server.admin.metrics import CONTENT_TYPE, Metrics
from shardkv.server.parts import STARTING, Parts
from shardkv.wire.requests import Method, Request

REQUEST_SECONDS: Final = 8.0
"""For one answer; above the five seconds that the placement group's leader is given."""
REQUESTS_AT_ONCE_MAX: Final = 32
TURN_SECONDS: Final = 2.0
"""A driver that was woken and takes no turn for so long is not alive."""
POLL_SECONDS: Final = 0.01
PAGE_SECONDS: Final = 1.5
"""For the page's first filling; a cluster in trouble must not keep people waiting for the page that says so."""
FRESH_SECONDS: Final = 1.0
"""An answer about the cluster is good for everybody for so long; below the page's two seconds."""


class Application:
    """The ASGI application. ``parts`` is None until the node stands."""

    def __init__(self, environment: Environment) -> None:
        self.parts: Parts | None = None
        self._clock = environment.clock
        self._status = _Shared(environment, lambda parts, request: parts.placement.status(request), Method.STATUS)
        self._ranges = _Shared(environment, lambda parts, request: parts.placement.ranges(request), Method.RANGES)
        self._under_way = 0
        handlers = {
            "/": self._page,
            "/healthz": self._healthz,
            "/readyz": self._readyz,
            "/metrics": self._metrics,
            "/status.json": self._status_json,
            "/ranges.json": self._ranges_json,
        }
        self._answered = dict.fromkeys([*handlers, "other"], 0)
        self._figures = Metrics(lambda: self.parts, lambda: self._answered)
        self._routed: ASGIApp = Starlette(routes=[Route(path, handler) for path, handler in handlers.items()])

    # The bounds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            # Start and stop messages, and web sockets, which find no route and are refused.
            await self._routed(scope, receive, send)
            return
        self._answered[scope["path"] if scope["path"] in self._answered else "other"] += 1
        async with trio.open_nursery() as nursery:
            # What the asker sends is read while it is answered: a body that nobody takes would block its connection.
            nursery.start_soon(_discard, receive)
            await self._bounded(scope, _nothing, send)
            nursery.cancel_scope.cancel()

    async def _bounded(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["method"] != "GET":
            await _plain("only GET is answered here", 405, Allow="GET")(scope, receive, send)
            return
        if self._under_way >= REQUESTS_AT_ONCE_MAX:
            await _unavailable(f"{self._under_way} requests are being answered already")(scope, receive, send)
            return
        self._under_way += 1
        begun = False

        async def sending(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            with self._clock.deadline(REQUEST_SECONDS) as deadline:
                await self._routed(scope, receive, sending)
            if deadline.cancelled_caught and not begun:
                await _unavailable(f"no answer within {REQUEST_SECONDS:g} s")(scope, receive, send)
        finally:
            self._under_way -= 1

    # The paths

    async def _healthz(self, request: HttpRequest) -> Response:
        problem = await self._unhealthy()
        return _unavailable(problem) if problem else _plain("ok")

    async def _readyz(self, request: HttpRequest) -> Response:
        problem = await self._unhealthy() or (self.parts.unready() if self.parts is not None else STARTING)
        return _unavailable(problem) if problem else _plain("ready")

    async def _unhealthy(self) -> str:
        """Why the node does not do its work; empty when it does."""
        if self.parts is None:
            return STARTING
        driver = self.parts.driver
        if driver.wal.statistics().failed:
            return "the log has failed; see this node's messages, and start it again once its disk is well"
        turns = driver.statistics().turns
        driver.wake()
        with self._clock.deadline(TURN_SECONDS):
            while driver.statistics().turns == turns:
                await self._clock.sleep(POLL_SECONDS)
        if driver.statistics().turns == turns:
            return f"the driver has taken no turn for {TURN_SECONDS:g} s"
        return ""

    async def _metrics(self, request: HttpRequest) -> Response:
        return Response(self._figures.render(), headers={"Content-Type": CONTENT_TYPE, "Cache-Control": "no-store"})

    async def _status_json(self, request: HttpRequest) -> Response:
        return await self._json(self._status)

    async def _ranges_json(self, request: HttpRequest) -> Response:
        return await self._json(self._ranges)

    async def _json(self, shared: "_Shared") -> Response:
        if self.parts is None:
            return _json_response(_document({"error": "Unavailable", "message": STARTING}), 503)
        try:
            return _json_response((await shared.get(self.parts)).encoded, 200)
        except ShardKVError as error:
            return _json_response(_document({"error": type(error).__name__, "message": str(error)}), 503)

    async def _page(self, request: HttpRequest) -> Response:
        """The page as it would look after its first refresh, so that it also serves browsers without scripts."""
        parts = self.parts
        if parts is None:
            return _page("", None, None, STARTING)
        status: Any = None
        ranges: Any = None
        problem = ""
        with self._clock.deadline(PAGE_SECONDS) as deadline:
            try:
                status = (await self._status.get(parts)).value
                ranges = (await self._ranges.get(parts)).value
            except ShardKVError as error:
                problem = f"{type(error).__name__}: {error}"
        if deadline.cancelled_caught:
            problem = f"The cluster has not said within {PAGE_SECONDS:g} s how it is."
        return _page(parts.name, status, ranges, problem)


@dataclass(frozen=True, slots=True)
class _Answer:
    value: Any
    encoded: bytes
    """As JSON."""


class _Shared:
    """One answer about the cluster for everybody who asks within FRESH_SECONDS, and one asking at a time."""

    def __init__(
        self, environment: Environment, ask: Callable[[Parts, Request], Awaitable[Any]], method: Method
    ) -> None:
        self._clock = environment.clock
        self._workers = environment.workers
        self._ask = ask
        self._request = Request(0, method, 0, 0, 0, [])
        self._lock = trio.Lock()
        self._answer: _Answer | None = None
        self._answered_ns = 0

    async def get(self, parts: Parts) -> _Answer:
        """Raises any ShardKVError; a failure is nobody else's answer."""
        async with self._lock:
            if self._answer is None or self._clock.monotonic_ns() - self._answered_ns > FRESH_SECONDS * 1e9:
                self._answer = None
                value = await self._ask(parts, self._request)
                # Ten thousand ranges are more than a megabyte: not in the loop.
                self._answer = _Answer(value, await self._workers.run(_document, value))
                self._answered_ns = self._clock.monotonic_ns()
            return self._answer


def _json_response(encoded: bytes, status: int) -> Response:
    return Response(encoded, status, {"Content-Type": "application/json", "Cache-Control": "no-store"})


def _page(name: str, status: Any, ranges: Any, problem: str) -> Response:
    return Response(page.render(name, status, ranges, problem), headers=page.HEADERS)


def _plain(text: str, status: int = 200, **headers: str) -> Response:
    return PlainTextResponse(text + "\n", status, {"Cache-Control": "no-store", **headers})


def _unavailable(reason: str) -> Response:
    return _plain(reason, 503)


async def _discard(receive: Receive) -> None:
    """Read and forget what the asker sends, until it has no more to say."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def _nothing() -> Message:
    return {"type": "http.request", "body": b"", "more_body": False}


def _document(value: object) -> bytes:
    """One JSON document in UTF-8."""
    return to_json(value, compact=True).encode() + b"\n"
