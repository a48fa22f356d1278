"""A node that is told to join itself under another name than it listens at finds that out by what comes in."""

from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from shardkv.config import NodeConfig, StorageConfig
from shardkv.environment.real import real_environment
from shardkv.errors import ConfigError
from shardkv.server import internal_client
from shardkv.server.internal_client import DIALS_MIN, OwnAddresses
from shardkv.server.node import run_node
from shardkv.simulation import simulated_environment
from shardkv.simulation.network import SimulatedNetwork, SimulatedStream
from shardkv_bench.local_cluster import free_ports


async def test_a_node_that_joins_itself_by_another_name_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It dialled itself for a minute, and then advised to check that somebody runs there."""
    monkeypatch.setattr(internal_client, "DIALS_MIN", 1)  # a client waits before it dials again
    (port,) = free_ports(1)
    config = NodeConfig(
        name="n1",
        data=str(tmp_path / "d"),
        listen=f"127.0.0.1:{port}",
        join=(f"localhost:{port}",),
        storage=StorageConfig(engine="memory"),
    )
    stop = trio.Event()
    with trio.fail_after(180), pytest.raises(ConfigError, match=f"^--join localhost:{port} is this node's own address"):
        await run_node(config, real_environment(), ready=lambda name, address: None, stop=stop)


@pytest.mark.parametrize("comes_in_first", [False, True])
async def test_what_is_dialled_and_comes_in_here_is_this_nodes_own(
    autojump_clock: MockClock, comes_in_first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In whatever order the two ends are heard of. What is another's, or is over, is not."""
    monkeypatch.setattr(internal_client, "DIALS_MIN", 1)
    network = SimulatedNetwork(1)
    own, one, two = OwnAddresses(), *(simulated_environment(name, seed=1, network=network) for name in ("n1", "n2"))
    streams: list[SimulatedStream] = []

    async def keep(stream: SimulatedStream) -> None:
        streams.append(stream)
        await trio.sleep_forever()

    async with trio.open_nursery() as nursery:
        for environment, address in ((one, "n1:7000"), (two, "n2:7000")):
            await nursery.start(environment.network.listen, address, keep)
        dialled = {address: await one.network.dial(address) for address in ("n1:7000", "n2:7000")}
        await trio.sleep(1)
        mine = next(stream for stream in streams if stream.local == "n1:7000")
        assert (mine.remote, mine.local) == (dialled["n1:7000"].local, dialled["n1:7000"].remote)
        with own.accepted(await two.network.dial("n1:7000")):  # as from somebody else
            own.dialled(dialled["n2:7000"], "n2:7000")
        with own.accepted(mine):
            if not comes_in_first:
                own.dialled(dialled["n1:7000"], "n1:7000")
                assert own.found == {"n1:7000"}
        own.dialled(dialled["n1:7000"], "n1:7000")
        if comes_in_first:
            assert own.found == set(), "it was over"
            with own.accepted(mine):
                assert own.found == {"n1:7000"}
        with trio.fail_after(1):
            await own.are_all(["n1:7000"])
        nursery.cancel_scope.cancel()


def test_an_address_that_somebody_else_had_before_shows_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """On one machine the system gives the same port to several who dial, if they dial different addresses.

    What this node dialled is known by both ends: of two connections at a time only one has the same two.
    """
    monkeypatch.setattr(internal_client, "DIALS_MIN", 1)
    own = OwnAddresses()
    ours: Any = SimpleNamespace(local="127.0.0.1:40000", remote="127.0.0.1:7001")
    of_another: Any = SimpleNamespace(local="127.0.0.1:7002", remote="127.0.0.1:40000")
    back_here: Any = SimpleNamespace(local="127.0.0.1:7001", remote="127.0.0.1:40000")
    own.dialled(ours, "n1:7001")
    with own.accepted(of_another):
        assert own.found == set()
    with own.accepted(back_here):
        assert own.found == {"n1:7001"}


def test_a_name_that_others_share_with_this_node_is_not_its_own() -> None:
    """A name that stands for all nodes, or what spreads connections over them, leads elsewhere the next time: the node
    was refused to join by its very first connection. Only a name that has led here again and again, and nowhere else,
    is its own.
    """
    own = OwnAddresses()
    shared, mine = "all:7001", "alias:7001"
    ports = count(40000)

    def dial(address: str, *, leads_here: bool) -> None:
        port = next(ports)
        one_end: Any = SimpleNamespace(local=f"127.0.0.1:{port}", remote="127.0.0.1:7001")
        other_end: Any = SimpleNamespace(local="127.0.0.1:7001", remote=f"127.0.0.1:{port}")
        own.dialled(one_end, address)
        if leads_here:
            with own.accepted(other_end):
                pass

    dial(shared, leads_here=True)
    dial(shared, leads_here=False)
    for _ in range(2 * DIALS_MIN):
        dial(shared, leads_here=True)
    for _ in range(DIALS_MIN):
        assert own.found == set()
        dial(mine, leads_here=True)
    assert own.found == {mine}
