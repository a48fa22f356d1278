"""The probe of a disk's health, when the loop itself was held up: by the disk, or by something else."""

from functools import partial
from types import SimpleNamespace

import pytest
import structlog
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from shardkv.server.disk_health import IDLE_PROBE_SECONDS, PROBE_SECONDS, DiskHealth
from shardkv.simulation import SimulationClock


class StandIn:
    """What the judgement asks of the driver: one sync of 3 s, in the loop or in the log's thread."""

    def __init__(self, *, in_loop: bool) -> None:
        self.catalog = SimpleNamespace(replicas={})
        self.log_writer = self
        self._held_ns = 3_000_000_000 if in_loop else 0

    def slowest_ns(self, now_ns: int) -> int:
        return 3_000_000_000

    def loop_ns(self) -> int:
        return self._held_ns


@pytest.mark.parametrize("in_loop", [True, False])
async def test_a_sync_that_held_up_the_loop_is_the_disks_fault_and_no_suspension(
    mock_clock: MockClock, in_loop: bool
) -> None:
    """A process that was suspended during a sync of its thread must not blame its disk; this one must."""
    health = DiskHealth(SimulationClock(), 1.0, structlog.get_logger())
    async with trio.open_nursery() as nursery:
        await nursery.start(partial(health.run, StandIn(in_loop=in_loop), lambda: None))  # type: ignore[arg-type]
        await wait_all_tasks_blocked()
        mock_clock.jump(3.1)  # the loop sees nothing of this time
        await wait_all_tasks_blocked()
        assert health.slow is in_loop
        nursery.cancel_scope.cancel()


class Disk:
    """A driver whose one sync begins when told, and does not end."""

    def __init__(self) -> None:
        self.began: float | None = None
        self.probes = 0
        self.catalog = SimpleNamespace(replicas={})
        self.log_writer = self

    def slowest_ns(self, now_ns: int) -> int:
        self.probes += 1
        return 0 if self.began is None else round((trio.current_time() - self.began) * 1e9)

    def loop_ns(self) -> int:
        return 0


@pytest.mark.parametrize("bound", [0.3, 1.0])
async def test_an_idle_disk_is_looked_at_less_often_and_a_stall_found_no_later(
    autojump_clock: MockClock, bound: float
) -> None:
    """It stalls right after a look: the look that is late finds it before the bound, and from then on it is watched."""
    health = DiskHealth(SimulationClock(), bound, structlog.get_logger())
    disk = Disk()
    async with trio.open_nursery() as nursery:
        await nursery.start(partial(health.run, disk, lambda: None))  # type: ignore[arg-type]
        await trio.sleep(10)
        assert disk.probes <= 10 / min(IDLE_PROBE_SECONDS, bound / 2) + 1
        probes = disk.probes
        while disk.probes == probes:  # noqa: ASYNC110
            await trio.sleep(0.001)
        disk.began = trio.current_time()
        await trio.sleep(bound - 0.01)
        assert not health.slow
        await trio.sleep(PROBE_SECONDS + 0.02)
        assert health.slow
        nursery.cancel_scope.cancel()
