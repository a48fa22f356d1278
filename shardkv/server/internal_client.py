"""How a node reaches others as a client of theirs: by the client library, on the node's own environment."""

from collections.abc import AsyncIterator, Collection, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import Any, Final

import trio

from shardkv.environment import Clock, Environment, Stream
from shardkv.errors import ConfigError, RoutingError, ShardKVError, Unavailable
from shardkv.outage import UNANSWERED_SECONDS, Outage
from shardkv.server.placement_group import Call
from shardkv.types import NodeId
from shardkv.wire.requests import Method
from shardkv_client import Settings, connect

JOIN_SECONDS: Final = 60.0
"""How long a new node tries to join before it gives up."""
ATTEMPT_SECONDS: Final = 5.0
RETRY_SECONDS: Final = 0.25
DIALS_MIN: Final = 5
"""So often must an address have led back to this node, and nowhere else, to pass for its own: a name may stand for all
nodes, or a load balancer, which leads elsewhere the next time. A client dials again after some two seconds."""


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


class OwnAddresses:
    """Which addresses lead back to this node, whatever their names: what it dials there comes in where it listens.

    For the time of a start, in which nobody is greeted here.
    """

    def __init__(self) -> None:
        self._dialled: dict[tuple[str, str], str] = {}
        """The address that was dialled, by the connection's ends: who dialled, who was dialled. One end alone would not
        do: the system gives its port to others who dial from the same machine. Those that came in here are gone."""
        self._dials: dict[str, int] = {}
        """How often each address was dialled."""
        self._back: dict[str, int] = {}
        """How often that led back here."""
        self._accepted: set[tuple[str, str]] = set()
        """The ends of each connection that waits here."""
        self.found: set[str] = set()
        self._more = trio.Event()

    def dialled(self, stream: Stream, address: str) -> None:
        ends = (stream.local, stream.remote)
        self._dialled[ends] = address
        self._dials[address] = self._dials.get(address, 0) + 1
        self._compare(ends)

    @contextmanager
    def accepted(self, stream: Stream) -> Iterator[None]:
        """For as long as an incoming connection waits."""
        ends = (stream.remote, stream.local)
        self._accepted.add(ends)
        self._compare(ends)
        try:
            yield
        finally:
            self._accepted.discard(ends)

    def _compare(self, ends: tuple[str, str]) -> None:
        if ends in self._dialled and ends in self._accepted:
            address = self._dialled.pop(ends)
            self._back[address] = self._back.get(address, 0) + 1
            if self._back[address] == self._dials[address] >= DIALS_MIN:
                self.found.add(address)
                self._more.set()

    async def are_all(self, addresses: Collection[str]) -> None:
        """Wait until each of these was found to be this node's."""
        while not self.found.issuperset(addresses):
            self._more = trio.Event()
            await self._more.wait()


class _JoiningEnvironment(ClientEnvironment):
    """Of a client that tells the node what it dials."""

    def __init__(self, environment: Environment, own: OwnAddresses) -> None:
        super().__init__(environment)
        self._own = own

    async def dial(self, address: str) -> Stream:
        stream = await super().dial(address)
        self._own.dialled(stream, address)
        return stream


@asynccontextmanager
async def connect_cluster(
    environment: ClientEnvironment,
    seeds: Sequence[str],
    cluster_id: bytes | None = None,
    node_id: NodeId | None = None,
) -> AsyncIterator[Call]:
    """A way to ask other nodes, for as long as the context lasts.

    Node ``node_id`` of ``cluster_id`` asks that one's nodes only: an address may have gone to another cluster.
    """
    addresses = ",".join(dict.fromkeys(seeds))
    settings = Settings(cluster_id=cluster_id, node_id=node_id)
    async with connect(addresses, environment=environment, settings=settings) as client:
        yield client.call


Membership = tuple[bytes, int, list[list[Any]]]
"""The cluster's id, the id that it gave this node, and ``[[node id, name, address], ...]``."""


async def join_cluster(
    environment: Environment,
    seeds: Sequence[str],
    arguments: list[Any],
    *,
    own: OwnAddresses,
    log: Any,
    stop: trio.Event,
) -> Membership | None:
    """Ask for a node id, until ``stop``: then the result is None.

    Raises the refusal, or Unavailable when nobody answered in time, or ConfigError when nobody else can.
    """
    membership: Membership | None = None
    refusal: ShardKVError | None = None
    async with trio.open_nursery() as nursery:

        async def give_up() -> None:
            await stop.wait()
            nursery.cancel_scope.cancel()

        async def find_out() -> None:
            nonlocal refusal
            await own.are_all(seeds)
            refusal = own_address(seeds)
            nursery.cancel_scope.cancel()

        nursery.start_soon(give_up)
        nursery.start_soon(find_out)
        try:
            client_environment = _JoiningEnvironment(environment, own)
            membership = await _ask_to_join(client_environment, environment.clock, seeds, arguments, log)
        except ShardKVError as error:
            refusal = error
        nursery.cancel_scope.cancel()
    if refusal is not None:
        raise refusal
    return membership


def own_address(join: Iterable[str]) -> ConfigError:
    """What is wrong where a node is to join itself."""
    return ConfigError(
        f"--join {', '.join(join)} is this node's own address: name another node, one of the cluster that it is to "
        "join, or give --bootstrap to start a cluster"
    )


async def _ask_to_join(
    environment: ClientEnvironment, clock: Clock, seeds: Sequence[str], arguments: list[Any], log: Any
) -> Membership:
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
