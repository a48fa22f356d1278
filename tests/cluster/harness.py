"""Real node processes for tests: a cluster on loopback in the test's own directory, and a client on it.

The process manager is the one that the demo and the load generator use. Blocking calls go through a thread, so a test
may kill and restart nodes while its own client tasks carry on. When a test fails, every node's last log lines are
shown. No test sleeps: it waits for a ``ready`` line, an answer or an exit.
"""

import sys
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

import trio

from shardkv_bench.local_cluster import LocalCluster

__all__ = ["LocalCluster", "cluster", "kill", "restart", "show_logs", "terminate"]


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
            await trio.to_thread.run_sync(world.start)
        yield world
    except BaseException:
        show_logs(world)
        raise
    finally:
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(world.stop)


async def kill(world: LocalCluster, name: str) -> None:
    """End a node as a crash would."""
    await trio.to_thread.run_sync(world.kill, name)


async def terminate(world: LocalCluster, name: str) -> int:
    """Stop a node cleanly; its exit code."""
    return await trio.to_thread.run_sync(world.terminate, name)


async def restart(world: LocalCluster, name: str) -> None:
    """Start a node again on its data and wait until it serves."""
    await trio.to_thread.run_sync(world.restart, name)


def show_logs(world: LocalCluster) -> None:
    for name, process in world.processes.items():
        print(f"--- {name} (exit code {process.exit_code}) ---\n{process.stderr_tail()}", file=sys.stderr)
