"""How a node reaches others as a client of theirs: by the client library, on the node's own environment."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final

import trio

from shardkv.environment import Environment
from shardkv.errors import RoutingError, ShardKVError, Unavailable
from shardkv.outage import UNANSWERED_SECONDS, Outage
from shardkv.server.placement_service import Call
from shardkv.wire.requests import Method
from shardkv_client import Settings, connect
from shardkv_client.environment import Stream

JOIN_SECONDS: Final = 60.0
"""How long a new node tries to join before it gives up."""
ATTEMPT_SECONDS: Final = 5.0
RETRY_SECONDS: Final = 0.25


class ClientEnvironment:
    """The node's environment in the shape that the client library wants."""

    def __init__(self, environment: Environment) -> None:
        self._environment = environment

    def monotonic(self) -> float:
        return self._environment.clock.monotonic_ns() / 1e9

    async def sleep(self, seconds: float) -> None:
        await self._environment.clock.sleep(seconds)

    def random(self) -> float:
        return self._environment.random.random()

    def random_bytes(self, count: int) -> bytes:
        return self._environment.ids.random_bytes(count)

    async def dial(self, address: str) -> Stream:
        return await self._environment.network.dial(address)


@asynccontextmanager
async def connect_cluster(
    environment: Environment, seeds: Sequence[str], cluster_id: bytes | None = None
) -> AsyncIterator[Call]:
    """A way to ask other nodes, for as long as the context lasts.

    A node of ``cluster_id`` asks that one's nodes only: an address may have gone to another cluster meanwhile.
    """
    addresses = ",".join(dict.fromkeys(seeds))
    settings = Settings(cluster_id=cluster_id)
    async with connect(addresses, environment=ClientEnvironment(environment), settings=settings) as client:
        yield client.call


Membership = tuple[bytes, int, list[list[Any]]]
"""The cluster's id, the id that it gave this node, and ``[[node id, name, address], ...]``."""


async def join_cluster(
    environment: Environment, seeds: Sequence[str], arguments: list[Any], *, log: Any, stop: trio.Event
) -> Membership | None:
    """Ask for a node id, until ``stop``: then the result is None.

    Raises the refusal, or Unavailable when nobody answered in time.
    """
    membership: Membership | None = None
    refusal: ShardKVError | None = None
    async with trio.open_nursery() as nursery:

        async def give_up() -> None:
            await stop.wait()
            nursery.cancel_scope.cancel()

        nursery.start_soon(give_up)
        try:
            membership = await _ask_to_join(environment, seeds, arguments, log)
        except ShardKVError as error:
            refusal = error
        nursery.cancel_scope.cancel()
    if refusal is not None:
        raise refusal
    return membership


async def _ask_to_join(environment: Environment, seeds: Sequence[str], arguments: list[Any], log: Any) -> Membership:
    clock = environment.clock
    async with connect_cluster(environment, seeds) as call:
        started = clock.monotonic_ns()
        outage = Outage(UNANSWERED_SECONDS)
        outage.begin(started / 1e9)
        log.info("joining", seeds=list(seeds))
        while True:
            try:
                cluster_id, node_id = await call(Method.JOIN, *arguments, timeout=ATTEMPT_SECONDS)
                nodes = await call(Method.NODES, timeout=ATTEMPT_SECONDS)
                return cluster_id, node_id, nodes
            except (Unavailable, RoutingError, OSError) as error:
                if clock.monotonic_ns() - started > JOIN_SECONDS * 1e9:
                    raise Unavailable(
                        f"could not join the cluster at {', '.join(seeds)}: {error}; check that it runs and can be "
                        "reached from here"
                    ) from error
                if outage.lasts(clock.monotonic_ns() / 1e9):
                    log.warning("could not join the cluster yet", seeds=list(seeds), reason=str(error))
            await clock.sleep(RETRY_SECONDS)
