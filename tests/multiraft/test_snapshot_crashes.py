"""A node dies at every step of receiving and installing a snapshot: each call of its engine and of its disk is one.

What a crash leaves: the log as the disk model has it; of the engine a prefix of its batches, no older than the last
flush, and every ingested file (trap 19). After it the range must be the old state, the new state, or marked: never a
mixture of them. The same sweep runs over RocksDB in a process of its own that is killed at each step.
"""

import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from shardkv.machine.rows import AppliedState, InstallMark, read_applied
from shardkv.machine.snapshot import engine_spans
from shardkv.simulation.disk import Call
from shardkv.storage import rocks
from shardkv.storage.engine import Engine
from shardkv.storage.rocks import RocksEngine
from shardkv.types import RangeId
from tests.multiraft import rocks_install
from tests.multiraft.scenes import Stream, behind, spelled
from tests.multiraft.world import RANGE, Host, descriptor_on, world

DISK_STEPS = frozenset({"pwrite", "allocate", "truncate", "sync", "rename", "unlink", "sync_directory"})
ENGINE_STEPS = ("builder", "write", "flush", "ingest")
BUILDER_STEPS = ("put", "finish")


class Dead(trio.ClosedResourceError):
    """What every call of a node that has died raises."""


class Steps:
    """Counts a node's calls of engine and disk from now on, and lets it die before or after one of them."""

    def __init__(self, host: Host, die_at: int, *, after: bool) -> None:
        self.names: list[str] = []
        self.died = trio.Event()
        self._die_at, self._after = die_at, after
        for name in ENGINE_STEPS:
            self._watch(host.engine, name)
        host.disk.on_call = self._disk_call

    def _enter(self, name: str) -> bool:
        """Whether the node dies after this call. Raises if it dies before it, or is dead."""
        if self.died.is_set():
            raise Dead(name)
        self.names.append(name)
        if len(self.names) == self._die_at and not self._after:
            self.died.set()
            raise Dead(name)
        return len(self.names) == self._die_at

    def _watch(self, target: Any, name: str) -> None:
        original: Callable[..., Any] = getattr(target, name)

        def watched(*args: Any) -> Any:
            dies = self._enter(name)
            result = original(*args)
            if name == "builder":
                for each in BUILDER_STEPS:
                    self._watch(result, each)
            if dies:
                self.died.set()
                raise Dead(name)
            return result

        setattr(target, name, watched)

    def _disk_call(self, call: Call) -> None:
        # The disk shows a call before it is done; that it dies after one is that it dies before the next.
        if call.operation in DISK_STEPS and self._enter(f"disk {call.operation}"):
            self.died.set()
            raise Dead(call.operation)
        if self.died.is_set():
            raise Dead(call.operation)


def rows_of(engine: Engine, range_id: int = RANGE) -> dict[bytes, bytes]:
    spans = engine_spans(descriptor_on(3, range_id=range_id))
    return {key: value for start, end in spans for key, value in engine.scan(start, end)}


def outcome(engine: Engine, old: dict[bytes, bytes], new: dict[bytes, bytes]) -> str:
    """Which of the three states an engine is in; anything else fails."""
    state = read_applied(engine, RangeId(RANGE))
    if isinstance(state, InstallMark):
        return "mark"
    assert isinstance(state, AppliedState), "the range has neither state nor mark"
    rows = rows_of(engine)
    if rows == old:
        return "old"
    assert rows == new, f"a mixture at index {state.index}"
    return "new"


async def die(number: int, *, after: bool, power: bool, kept: Callable[[int], int]) -> tuple[str, str] | None:
    """Receive and install, and die at that step: the step's name and what was left; None if there are fewer steps."""
    async with world(3) as hosts:
        late = await behind(hosts)
        leader = hosts.leader()
        await late.driver.all_logged(late.replica())
        late.engine.flush()
        old, new = rows_of(late.engine), rows_of(leader.engine)
        assert old != new
        hosts.tolerant = True
        steps = Steps(late, number, after=after)
        parts = spelled(leader, 3)
        scope = trio.CancelScope()

        async def receive() -> None:
            with scope:
                try:
                    await late.snapshots.receive(Stream(*parts), leader.node_id)
                except trio.ClosedResourceError:
                    pass

        hosts.nursery.start_soon(receive)
        with trio.move_on_after(1):
            await steps.died.wait()
        died = steps.died.is_set()
        await late.crash(power=power, kept_batches=kept)
        scope.cancel()
        left = outcome(late.engine, old, new)
        await late.start()
        hosts.check()
        assert late.replica().needs_snapshot == (left == "mark")
        hosts.heal()
        await hosts.write(b"after", b"3")
        await hosts.agreed()
        assert rows_of(late.engine) == rows_of(hosts.leader().engine)
        if not died:
            assert left == "new"
            return None
        return steps.names[number - 1], left


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize(
    "power, kept",
    [(False, lambda count: 0), (False, lambda count: count), (True, lambda count: 0), (True, lambda count: count // 2)],
    ids=["kill-none", "kill-all", "power-none", "power-half"],
)
async def test_trap_19_a_crash_at_every_step_leaves_the_old_state_the_new_one_or_the_mark(
    autojump_clock: MockClock, power: bool, kept: Callable[[int], int], after: bool
) -> None:
    """TRAPS 19, DESIGN 4.3: numbered steps of engine and disk, from the first row that arrives to the log's record."""
    left: list[tuple[str, str]] = []
    while (found := await die(len(left) + 1, after=after, power=power, kept=kept)) is not None:
        left.append(found)
    names = Counter(name for name, _ in left)
    assert set(names) >= {"builder", "put", "finish", "write", "flush", "ingest", "disk pwrite", "disk sync"}, names
    assert {state for _, state in left} == {"old", "mark", "new"}, left
    order = [state for _, state in left]
    assert order == sorted(order, key=["old", "mark", "new"].index), f"it went back: {left}"


def test_a_snapshot_over_no_old_data_stands_where_it_needs_no_compaction(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A deletion over an empty span would keep its files in level 0, where many of them hold back all writes."""
    monkeypatch.setattr(rocks, "INGEST_FILE_BYTES", 4096)
    engine = RocksEngine(str(tmp_path / "engine"))
    rocks_install.install(engine, str(tmp_path / "incoming"))
    files = [int(engine._db.property_int_value(f"rocksdb.num-files-at-level{level}")) for level in range(7)]
    assert files[0] <= 2, files  # the mark's, and the one that overwrites the mark
    assert files[6] >= 5, files
    engine.close()


def _rocks_steps() -> Iterable[int]:
    return range(1, rocks_install.STEPS + 2)


@pytest.mark.parametrize("step", _rocks_steps())
def test_trap_19_rocksdb_killed_at_every_step_of_an_install_leaves_one_of_the_three(tmp_path: Path, step: int) -> None:
    """The model is not kinder than what it stands for: the same order of steps, in a process that ends at each."""
    ran = subprocess.run(
        [sys.executable, "-m", "tests.multiraft.rocks_install", str(tmp_path), str(step)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    died = step <= rocks_install.STEPS
    assert ran.returncode == (rocks_install.KILLED if died else 0), ran.stdout + ran.stderr
    engine = RocksEngine(str(tmp_path / "engine"))
    old, new = rocks_install.old_rows(), rocks_install.new_rows()
    found = outcome(engine, old, new)
    assert found == rocks_install.expected(step), (found, ran.stdout)
    # Whatever was left, the snapshot can be installed over it.
    rocks_install.install(engine, str(tmp_path / "again"))
    assert outcome(engine, old, new) == "new"
    engine.close()
