"""Moves a range of some MiB between nodes on RocksDB in one process, and prints by how much its memory grew at most.

``python -m tests.multiraft.snapshot_memory DIRECTORY MIB VALUE_BYTES``. Sender, receiver and a third node share the
process, so the figure is the sum of all ends. Buffers and caches are small, so that what is seen is the snapshot's.
"""

import random
import resource
import sys
from pathlib import Path
from typing import Any

import trio
from trio.testing import MockClock

from shardkv.machine.keys import user_key
from shardkv.machine.snapshot import engine_spans
from shardkv.storage.engine import WriteBatch
from shardkv.storage.rocks import RocksEngine, RocksSettings
from tests.multiraft import world as world_module
from tests.multiraft.scenes import behind
from tests.multiraft.world import world

MIB = 1024 * 1024
SETTINGS = RocksSettings(write_buffer_bytes=MIB, write_buffers_max=4, block_cache_bytes=2 * MIB)


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def fill(engine: RocksEngine, mib: int, value_bytes: int) -> None:
    """The same rows on every node that is given them, which hardly compress."""
    blob = random.Random(1).randbytes(4 * MIB)
    batch = WriteBatch()
    for number in range(mib * MIB // value_bytes):
        start = number * 4099 % (len(blob) - value_bytes + 1)
        batch.put(user_key(b"row%08d" % number), blob[start : start + value_bytes])
        if batch.bytes > MIB:
            engine.write(batch)
            engine.flush()
            batch = WriteBatch()
    engine.write(batch)
    engine.flush()


async def measure(directory: Path, mib: int, value_bytes: int) -> tuple[int, int]:
    """By how much the memory grew, and how many chunks arrived."""
    engines: list[RocksEngine] = []

    def open_engine(*, crashable: bool) -> RocksEngine:
        engines.append(RocksEngine(str(directory / f"engine{len(engines)}"), SETTINGS))
        return engines[-1]

    world_module.MemoryEngine = open_engine  # type: ignore[assignment,attr-defined]
    async with world(3) as hosts:
        for host in hosts.values():
            host.snapshots.receiver._directory = str(directory)
        late = await behind(hosts)
        for host in (hosts[1], hosts[2]):
            engine: Any = host.engine
            await trio.to_thread.run_sync(fill, engine, mib, value_bytes)
        before = peak_bytes()
        hosts.heal()
        await hosts.until(lambda: late.replica().machine is not None and late.value(b"new4") == b"2", "it", 1e6)
        grown = peak_bytes() - before
        rows = [
            sum(
                1
                for start, end in engine_spans(host.machine().descriptor)
                for _ in host.engine.snapshot().scan(start, end)
            )
            for host in (hosts.leader(), late)
        ]
        assert rows[0] == rows[1], rows
        return grown, late.snapshots.statistics().chunks_received


if __name__ == "__main__":
    grown, chunks = trio.run(
        measure,
        Path(sys.argv[1]),
        int(sys.argv[2]),
        int(sys.argv[3]),
        clock=MockClock(autojump_threshold=0),
    )
    print(grown, chunks)
