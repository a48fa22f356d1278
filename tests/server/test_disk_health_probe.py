"""The probe of a disk's health, when the loop itself was held up: by the disk, or by something else."""

from functools import partial
from types import SimpleNamespace

import pytest
import structlog
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from shardkv.server.disk_health import DiskHealth
from shardkv.simulation import SimulationClock


class StandIn:
    """What the judgement asks of the driver: one sync of 3 s, in the loop or in the log's thread."""

    def __init__(self, *, in_loop: bool) -> None:
        self.catalog = SimpleNamespace(replicas={})
        self._held_ns = 3_000_000_000 if in_loop else 0

    def slowest_sync_ns(self, now_ns: int) -> int:
        return 3_000_000_000

    def loop_sync_ns(self) -> int:
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
