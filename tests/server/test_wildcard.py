"""Whoever is told to connect to every interface connects to itself."""

from pathlib import Path

import pytest
import trio

from shardkv.config import NodeConfig, StorageConfig
from shardkv.environment.real import real_environment
from shardkv.errors import ConfigError
from shardkv.server.node import run_node


@pytest.mark.parametrize("host", ["0", "0x0", "[::ffff:0.0.0.0]"])
async def test_a_name_of_every_interface_is_not_told_to_others(tmp_path: Path, host: str) -> None:
    told: list[str] = []
    stop = trio.Event()

    def ready(name: str, address: str) -> None:
        told.append(address)
        stop.set()

    with trio.fail_after(180), pytest.raises(ConfigError, match="advertise must be given"):
        config = NodeConfig(
            name="n1",
            data=str(tmp_path / "d"),
            listen=f"{host}:0",
            bootstrap=True,
            storage=StorageConfig(engine="memory"),
        )
        await run_node(config, real_environment(), ready=ready, stop=stop)
    assert not told
