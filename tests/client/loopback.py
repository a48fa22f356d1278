"""Run a test's body with a client of a fake cluster, on the event loop that the ``backend`` fixture names."""

from collections.abc import Awaitable, Callable
from typing import Any

import anyio

from shardkv_client import Client, connect
from tests.client.fake_server import FakeServer


def run(backend: str, body: Callable[[], Awaitable[Any]]) -> Any:
    """Run ``body`` on the event loop, and fail rather than hang."""

    async def bounded() -> Any:
        with anyio.fail_after(180):
            return await body()

    return anyio.run(bounded, backend=backend)


def with_client(backend: str, server: FakeServer, body: Callable[[Client], Awaitable[Any]], **options: Any) -> Any:
    async def main() -> Any:
        async with connect(server.addresses, **options) as kv:
            result = await body(kv)
            kv._open_host().core.check()
            return result

    return run(backend, main)
