"""Installs a snapshot into RocksDB with the service's own steps, and ends the process at one of them.

``python -m tests.multiraft.rocks_install DIRECTORY STEP``: even steps end it after a call, odd ones before it. The
engine holds an old state in part flushed and in part not; other ranges' rows stand on both sides of the range's span.
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import trio

from shardkv.machine import keys
from shardkv.machine.clock import HybridClock
from shardkv.machine.machine import RangeMachine, conf_state_of
from shardkv.machine.rows import AppliedState, pack_applied, pack_conf_state, read_applied
from shardkv.machine.snapshot import engine_spans
from shardkv.multiraft.snapshot_install import Arrived, Installer
from shardkv.multiraft.snapshot_parts import Incoming, Outgoing
from shardkv.multiraft.space import Space
from shardkv.raft.messages import SnapshotMetadata
from shardkv.simulation import SimulationClock
from shardkv.storage import rocks
from shardkv.storage.engine import Engine, WriteBatch
from shardkv.storage.memory import MemoryEngine
from shardkv.storage.rocks import RocksEngine
from shardkv.types import RangeId
from tests.multiraft.world import RANGE, descriptor_on

KILLED = 9
CALLS = ("builder", "put", "finish", "write", "flush", "ingest")
STEPS = 2 * len(CALLS)
DESCRIPTOR = descriptor_on(3)
INDEX_OLD, INDEX_NEW = 20, 400
ROWS_NEW = 300


def _rows(index: int, user: dict[bytes, bytes]) -> dict[bytes, bytes]:
    """A range's rows at an index."""
    engine = MemoryEngine()
    batch = WriteBatch()
    RangeMachine.create(DESCRIPTOR).write(batch)
    conf_state = conf_state_of(DESCRIPTOR)
    batch.put(keys.applied_key(DESCRIPTOR.range_id), pack_applied(index, 7, 1, pack_conf_state(conf_state)))
    for key, value in user.items():
        batch.put(keys.USER_PREFIX + key, value)
    engine.write(batch)
    return {key: value for start, end in engine_spans(DESCRIPTOR) for key, value in engine.scan(start, end)}


def old_rows() -> dict[bytes, bytes]:
    return _rows(
        INDEX_OLD, {b"both%03d" % n: b"old" * 20 for n in range(50)} | {b"old%03d" % n: b"o" for n in range(50)}
    )


def new_rows() -> dict[bytes, bytes]:
    return _rows(INDEX_NEW, {b"both%03d" % n: b"new" * 50 for n in range(ROWS_NEW)})


def expected(step: int) -> str:
    """What is left after dying at a step."""
    call, done = CALLS[min((step - 1) // 2, len(CALLS) - 1)], step % 2 == 0
    if call == "ingest":
        return "new" if done or step > STEPS else "mark"
    return "mark" if call == "flush" and done else "old"


def _fill(engine: Engine) -> None:
    """The old state: flushed, but for a batch that changes nothing of the range's and may be lost."""
    batch = WriteBatch()
    for key, value in old_rows().items():
        batch.put(key, value)
    engine.write(batch)
    engine.flush()
    other = WriteBatch()
    other.put(keys.applied_key(RangeId(RANGE + 1)), b"another range's")
    engine.write(other)


def _source() -> tuple[MemoryEngine, SnapshotMetadata]:
    source = MemoryEngine()
    batch = WriteBatch()
    for key, value in new_rows().items():
        batch.put(key, value)
    source.write(batch)
    state = read_applied(source, DESCRIPTOR.range_id)
    assert isinstance(state, AppliedState)
    return source, SnapshotMetadata(state.index, state.term, state.conf_state)


class _Inline:
    async def run(self, function: Callable[..., Any], *args: Any) -> Any:
        return function(*args)


def install(engine: Engine, path: str) -> None:
    """What the service does with a stream, from its first row to the state in the engine."""
    source, metadata = _source()
    incoming = Incoming(b"i" * 16, DESCRIPTOR, metadata, path, engine.builder(path))
    outgoing = Outgoing(source.snapshot(), DESCRIPTOR)
    while (chunk := outgoing.next_chunk()) is not None:
        incoming.absorb(*chunk)
        outgoing.acknowledge(chunk.number)
    incoming.require_whole(outgoing.end.chunks, outgoing.end.rows, outgoing.end.checksum)
    incoming.builder.finish()
    files = -(-incoming.builder.written_bytes // rocks.INGEST_FILE_BYTES)
    assert files - 1 <= len(incoming.builder.paths) <= files, incoming.builder.paths
    catalog = SimpleNamespace(extension=lambda range_id: None, installed=lambda replica: None)
    clock = SimulationClock()
    driver = SimpleNamespace(catalog=catalog, engine=engine, space=Space())
    environment = SimpleNamespace(workers=_Inline(), clock=clock)
    replica = SimpleNamespace(machine=RangeMachine.load(DESCRIPTOR.range_id, engine), range_id=DESCRIPTOR.range_id)
    arrived = Arrived(path, DESCRIPTOR, metadata.index, metadata.term)

    async def replace() -> None:
        driver.hybrid_clock = HybridClock(clock)
        installer = Installer(cast(Any, driver), cast(Any, environment), log=None)
        await installer.replace_data(cast(Any, replica), arrived)

    trio.run(replace)


class _Dying:
    """An engine, or its builder, that ends the process at a step."""

    def __init__(self, target: Any, call: str, after: bool) -> None:
        self._target, self._call, self._after = target, call, after

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self._target, name)
        if name not in CALLS:
            return attribute

        def watched(*args: Any) -> Any:
            if name == self._call and not self._after:
                os._exit(KILLED)
            result = attribute(*args)
            if name == self._call:
                os._exit(KILLED)
            return _Dying(result, self._call, self._after) if name == "builder" else result

        return watched


def main(directory: str, step: int) -> None:
    setattr(rocks, "INGEST_FILE_BYTES", 4096)  # noqa: B010  # several files, which must come as one
    engine = RocksEngine(str(Path(directory) / "engine"))
    _fill(engine)
    call = CALLS[(step - 1) // 2] if step <= STEPS else ""
    install(cast(Engine, _Dying(engine, call, step % 2 == 0)), str(Path(directory) / "incoming"))
    os._exit(0)  # as a crash would end it: closing would flush


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
