"""The engine in memory in a real node: its jobs run in real threads, beside a loop that reads and writes it."""

import threading
from pathlib import Path

from sortedcontainers import SortedDict

from shardkv.config import NodeConfig, StorageConfig
from shardkv.environment.real.workers import RealWorkers
from shardkv.server.stores import open_engine


async def test_an_ingest_changes_the_engine_in_memory_in_the_loop(tmp_path: Path) -> None:
    """A snapshot comes while other ranges are served, and no map of Python's bears two threads that change it: keys
    would get lost, and a scan would end in the middle."""
    threads: set[int] = set()

    class Watched(SortedDict[bytes, bytes]):
        def __setitem__(self, key: bytes, value: bytes) -> None:
            threads.add(threading.get_ident())
            super().__setitem__(key, value)

    config = NodeConfig(
        name="n1", data=str(tmp_path), listen="127.0.0.1:0", bootstrap=True, storage=StorageConfig(engine="memory")
    )
    workers = RealWorkers()
    engine = await workers.run(open_engine, config, str(tmp_path / "engine"), print)
    engine._data = Watched()  # type: ignore[attr-defined]
    builder = engine.builder("/ingest/1")
    builder.put(b"k", b"v")
    await workers.run(builder.finish)
    await workers.run(engine.ingest, "/ingest/1")
    assert engine.get(b"k") == b"v"
    assert threads == {threading.get_ident()}
