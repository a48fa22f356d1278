"""The probe of the loop's lateness."""

from typing import Any

import pytest
import structlog
import trio
import trio.testing
from structlog.testing import capture_logs

from shardkv.server.loop_health import BOUNDS_SECONDS, LATE_SECONDS, PROBE_SECONDS, WARN_SECONDS, LoopProbe


class SlowClock:
    """A clock whose sleeps take ``late`` seconds longer than asked, in their order; then they never end."""

    def __init__(self, *late: float) -> None:
        self.late = list(late)
        self.now_ns = 0

    def monotonic_ns(self) -> int:
        return self.now_ns

    async def sleep(self, seconds: float) -> None:
        if not self.late:
            await trio.sleep_forever()
        self.now_ns += round((seconds + self.late.pop(0)) * 1e9)
        await trio.lowlevel.checkpoint()


async def probed(clock: SlowClock, log: Any) -> LoopProbe:
    probe = LoopProbe(clock, log)  # type: ignore[arg-type]
    async with trio.open_nursery() as nursery:
        await nursery.start(probe.run)
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    probe.check()
    return probe


@pytest.fixture
def log() -> Any:
    return structlog.get_logger()


async def test_lateness_is_how_much_longer_a_sleep_took_than_asked(log: Any) -> None:
    """DESIGN 4.2: a probe measures the loop's lateness."""
    with capture_logs() as lines:
        probe = await probed(SlowClock(0.0, 0.0015, 0.003, 9.0, 0.15), log)
    statistics = probe.statistics()
    assert sum(statistics.counts) == 5
    counted = dict(zip((*BOUNDS_SECONDS, "more"), statistics.counts))
    assert (counted[0.001], counted[0.002], counted[0.005], counted[0.2], counted["more"]) == (1, 1, 1, 1, 1)
    assert statistics.late_seconds_sum == pytest.approx(9.1545)
    assert [line["late_ms"] for line in lines] == [9_000]


async def test_a_late_loop_is_warned_of_but_not_all_the_time(log: Any) -> None:
    """DESIGN 4.2: and warns."""
    often = round(WARN_SECONDS / (PROBE_SECONDS + 2 * LATE_SECONDS)) + 2
    with capture_logs() as lines:
        await probed(SlowClock(*[2 * LATE_SECONDS] * often), log)
    assert [line["log_level"] for line in lines] == ["warning", "warning"]


async def test_a_lateness_that_does_no_harm_is_not_warned_of(log: Any) -> None:
    with capture_logs() as lines:
        await probed(SlowClock(*[LATE_SECONDS] * 3), log)
    assert lines == []


async def test_a_clock_that_wakes_early_counts_as_on_time(log: Any) -> None:
    statistics = (await probed(SlowClock(-0.1), log)).statistics()
    assert statistics.counts[0] == 1
    assert statistics.late_seconds_sum == 0.0
