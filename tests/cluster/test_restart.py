"""A node's identity is its data directory: what a restart may and may not bring (trap 24)."""

import os
import shutil
from pathlib import Path

import pytest
import trio

from shardkv_bench.local_cluster import LocalCluster, Process, free_ports
from tests.cluster.harness import SECONDS_MAX, client, cluster, eventually, kill, restart, settled, terminate

pytestmark = pytest.mark.cluster


def start_with(world: LocalCluster, name: str, *more: str) -> Process:
    """Start a node on its data with these flags in place of --bootstrap or --join."""
    command = [
        *(*world.node_command, "--name", name, "--data", str(world.directory / name)),
        *("--listen", world.addresses[name], "--parent-pipe", "{parent_pipe}", *more),
    ]
    world.processes[name] = Process(command, world.directory / f"{name}.log", _environment())
    return world.processes[name]


def _environment() -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if not key.startswith("SHARDKV_")}


async def test_a_second_start_carries_on_with_or_without_bootstrap_and_join(tmp_path: Path) -> None:
    """DESIGN 2.2: on the same data the flags of the first start make no difference, not even the wrong one."""
    async with cluster(tmp_path, nodes=3) as world, client(world) as kv:
        await settled(kv)
        await kv.put(b"kept", b"1")
        join_others = ["--join", world.addresses["n1"]]
        for name, more in (
            ("n1", []),
            ("n1", ["--join", world.addresses["n2"]]),
            ("n1", ["--bootstrap"]),
            ("n2", []),
            ("n2", ["--bootstrap"]),
            ("n2", join_others),
        ):
            assert await terminate(world, name) == 0
            start_with(world, name, *more)
            await trio.to_thread.run_sync(world.wait_ready, [name], SECONDS_MAX)
            await settled(kv)
            entry = await kv.get(b"kept")
            assert entry is not None
            assert entry.value == b"1"
        status = await kv.status()
        assert sorted(row["name"] for row in status["node_table"]) == ["n1", "n2", "n3"]


async def test_trap_24_a_node_on_an_empty_directory_under_its_old_name_is_refused_with_a_clear_message(
    tmp_path: Path,
) -> None:
    """Trap 24: it would vote again in terms in which it has voted. The cluster goes on without it."""
    async with cluster(tmp_path) as world, client(world) as kv:
        await settled(kv)
        await kill(world, "n3")
        await trio.to_thread.run_sync(shutil.rmtree, world.directory / "n3")
        process = world.start_node("n3")
        assert await trio.to_thread.run_sync(process.wait, SECONDS_MAX) == 1
        message = process.stderr_tail()
        assert "n3" in message
        assert "choose another name" in message, message
        assert process.lines == []
        assert await kv.put(b"without n3", b"1") > 0
        async with client(world) as again:
            assert len(await again.nodes()) == 3


async def test_trap_24_a_node_on_an_old_copy_of_its_directory_is_refused(tmp_path: Path) -> None:
    """Trap 24: a restored disk has a lower boot counter than the cluster has seen."""
    async with cluster(tmp_path) as world, client(world) as kv:
        await settled(kv)
        assert await terminate(world, "n3") == 0
        copy = world.directory / "copy"
        await trio.to_thread.run_sync(shutil.copytree, world.directory / "n3", copy)
        for _ in range(2):
            await restart(world, "n3")
            await settled(kv)
            assert await terminate(world, "n3") == 0
        await trio.to_thread.run_sync(shutil.rmtree, world.directory / "n3")
        await trio.to_thread.run_sync(copy.rename, world.directory / "n3")
        process = world.start_node("n3")
        assert await trio.to_thread.run_sync(process.wait, SECONDS_MAX) == 1
        assert "old copy" in process.stderr_tail(), process.stderr_tail()
        assert await kv.put(b"without n3", b"1") > 0


async def test_a_node_keeps_its_data_when_its_address_changes(tmp_path: Path) -> None:
    """DESIGN 4.10: identity is an id, not an address; the others learn the new one from the placement group."""
    async with cluster(tmp_path) as world, client(world) as kv:
        await settled(kv)
        await kv.put(b"kept", b"1")
        await terminate(world, "n2")
        world.addresses["n2"] = f"127.0.0.1:{free_ports(1)[0]}"
        await restart(world, "n2")
        async with client(world) as again:
            await settled(again)
            await kill(world, "n3")
            entry = await again.get(b"kept")
            assert entry is not None

            async def known() -> bool:
                return {node.name: node.address for node in await again.nodes()}["n2"] == world.addresses["n2"]

            await eventually("everybody knows the new address", known)
