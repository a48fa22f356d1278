"""Real node processes for tests: a cluster on loopback in the test's own directory, and clients on it.

The process manager is the one that the demo and the load generator use. Blocking calls go through a thread, so a test
may kill and restart nodes while its own client tasks carry on. When a test fails, every node's last log lines are
shown. No test sleeps to let something happen: it waits until it can be seen to have happened, with a deadline.
"""

import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, suppress
from functools import partialmethod
from pathlib import Path
from typing import TypeVar

import trio

from shardkv.errors import OutcomeUnknown, RequestError, Unavailable
from shardkv.types import RangeDescriptor, ReplicaRole
from shardkv.wire.requests import Method
from shardkv_bench.local_cluster import LocalCluster
from shardkv_client import Environment, Settings
from shardkv_client.client import Client

__all__ = [
    "SECONDS_MAX",
    "LocalCluster",
    "client",
    "cluster",
    "eventually",
    "kill",
    "leader_of",
    "logs_on_failure",
    "node_names",
    "ranges_of",
    "resident_bytes",
    "restart",
    "settled",
    "show_logs",
    "started",
    "started_and_settled",
    "terminate",
    "transfer",
]

SECONDS_MAX = 600.0
"""What a condition, a start or a stop may take, on however slow a machine: it only ends tests that would hang."""
POLL_SECONDS = 0.05

T = TypeVar("T")


@asynccontextmanager
async def cluster(
    directory: Path,
    *,
    nodes: int = 3,
    options: Iterable[str] = (),
    variables: Mapping[str, str] | None = None,
    start: bool = True,
) -> AsyncIterator[LocalCluster]:
    """A running cluster, stopped at the end. ``start=False`` leaves starting to the test."""
    world = LocalCluster(directory, nodes=nodes, options=options, variables=variables)
    try:
        if start:
            await trio.to_thread.run_sync(world.start, SECONDS_MAX)
        yield world
    except BaseException:
        show_logs(world)
        raise
    finally:
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(world.stop)


@contextmanager
def started(directory: Path, *, nodes: int = 3, options: Iterable[str] = ()) -> Iterator[LocalCluster]:
    """A running cluster for a fixture that the tests of a module share. It may still be growing."""
    with LocalCluster(directory, nodes=nodes, options=options) as world:
        world.start(SECONDS_MAX)
        yield world


@contextmanager
def started_and_settled(directory: Path) -> Iterator[LocalCluster]:
    """The same with three nodes, once every range has a voter on each."""

    async def settle() -> None:
        async with client(running) as kv:
            await settled(kv)

    with started(directory) as running:
        trio.run(settle)
        yield running


@contextmanager
def logs_on_failure(world: LocalCluster) -> Iterator[None]:
    try:
        yield
    except BaseException:
        show_logs(world)
        raise


class PatientClient(Client):
    """A client whose calls may take as long as anything in a test, unless they say otherwise: the ten seconds that a
    program waits are no measure of a machine that has much else to do."""

    put = partialmethod(Client.put, timeout=SECONDS_MAX)  # type: ignore[assignment]
    get = partialmethod(Client.get, timeout=SECONDS_MAX)  # type: ignore[assignment]
    delete = partialmethod(Client.delete, timeout=SECONDS_MAX)  # type: ignore[assignment]
    increment = partialmethod(Client.increment, timeout=SECONDS_MAX)  # type: ignore[assignment]
    get_many = partialmethod(Client.get_many, timeout=SECONDS_MAX)  # type: ignore[assignment]
    put_many = partialmethod(Client.put_many, timeout=SECONDS_MAX)  # type: ignore[assignment]
    delete_range = partialmethod(Client.delete_range, timeout=SECONDS_MAX)  # type: ignore[assignment]
    scan = partialmethod(Client.scan, timeout=SECONDS_MAX)  # type: ignore[assignment]
    call = partialmethod(Client.call, timeout=SECONDS_MAX)  # type: ignore[assignment]
    status = partialmethod(Client.status, timeout=SECONDS_MAX)  # type: ignore[assignment]
    nodes = partialmethod(Client.nodes, timeout=SECONDS_MAX)  # type: ignore[assignment]
    ranges = partialmethod(Client.ranges, timeout=SECONDS_MAX)  # type: ignore[assignment]


@asynccontextmanager
async def client(
    world: LocalCluster,
    *,
    addresses: str | None = None,
    environment: Environment | None = None,
    settings: Settings | None = None,
) -> AsyncIterator[Client]:
    """A patient client of the cluster. When the test fails inside, the nodes' logs are shown."""
    with logs_on_failure(world):
        async with PatientClient(addresses or world.connect, environment=environment, settings=settings) as kv:
            yield kv


async def eventually(what: str, condition: Callable[[], Awaitable[T]], seconds: float = SECONDS_MAX) -> T:
    """The condition's answer once it is true; an error of the database counts as not yet. Fails after ``seconds``."""
    answer: object = None
    with trio.move_on_after(seconds):
        while True:
            try:
                found = await condition()
            except (Unavailable, OutcomeUnknown) as error:
                answer = error
            else:
                if found:
                    return found
                answer = found
            await trio.sleep(POLL_SECONDS)
    raise AssertionError(f"after {seconds:g} s it is not so that {what}; last seen: {answer!r}")


async def kill(world: LocalCluster, name: str) -> None:
    """End a node as a crash would."""
    await trio.to_thread.run_sync(world.kill, name)


async def terminate(world: LocalCluster, name: str) -> int:
    """Stop a node cleanly; its exit code."""
    return await trio.to_thread.run_sync(world.terminate, name, SECONDS_MAX)


async def restart(world: LocalCluster, *names: str) -> None:
    """Start nodes again on their data and wait until they serve."""
    for name in names:
        world.start_node(name)
    await trio.to_thread.run_sync(world.wait_ready, names, SECONDS_MAX)


async def ranges_of(kv: Client) -> list[tuple[RangeDescriptor, int | None]]:
    """Every range and its leader's node id, the placement group first."""
    placement = await kv.call(Method.ROUTES, None, 1)
    return [(RangeDescriptor.from_wire(descriptor), leader) for descriptor, leader in placement] + await kv.ranges()


async def settled(kv: Client, nodes: int = 3) -> None:
    """Wait until every range and the placement group have a voter on each of ``nodes`` nodes, and nothing moves."""

    async def looks_so() -> bool:
        for descriptor, leader in await ranges_of(kv):
            voters = [replica for replica in descriptor.replicas if replica.role is ReplicaRole.VOTER]
            if leader is None or len(voters) != nodes or len(descriptor.replicas) != nodes:
                return False
        status = await kv.status()
        return bool(status["settled"]) and all(row["state"] == "live" for row in status["node_table"])

    await eventually(f"every range has {nodes} voters and nothing moves", looks_so)


async def node_names(kv: Client) -> dict[int, str]:
    return {node.id: node.name for node in await kv.nodes()}


async def leader_of(kv: Client, key: bytes) -> str:
    """The name of the node that leads the key's range; waits until there is one."""

    async def known() -> str | None:
        for descriptor, leader in await kv.ranges():
            if descriptor.span.contains(key) and leader is not None:
                return (await node_names(kv)).get(leader)
        return None

    return str(await eventually(f"{key!r} has a leader", known))


async def transfer(kv: Client, key: bytes, to: str | None = None) -> None:
    """Have another node lead the key's range, or the node called ``to``; wait until it does."""
    first = await leader_of(kv, key)
    if to is None:
        to = next(name for name in sorted((await node_names(kv)).values()) if name != first)
    number = next(node.id for node in await kv.nodes() if node.name == to)

    async def leads() -> bool:
        if await leader_of(kv, key) == to:
            return True
        for descriptor, _ in await kv.ranges():
            if descriptor.span.contains(key):
                # A node that has no time to answer its leader is not given the range.
                with suppress(RequestError):
                    await kv.call(Method.TRANSFER, descriptor.range_id, number, range_id=descriptor.range_id)
        return False

    await eventually(f"{to} leads {key!r}", leads)


def resident_bytes(pid: int) -> int:
    """What a process holds in memory."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise AssertionError(f"process {pid} has no VmRSS")


def show_logs(world: LocalCluster) -> None:
    for name, process in world.processes.items():
        print(f"--- {name} (exit code {process.exit_code}) ---\n{process.stderr_tail()}", file=sys.stderr)
