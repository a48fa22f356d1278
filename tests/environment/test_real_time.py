"""Clock, chance and ids."""

import time

import pytest

from shardkv.environment.real import real_environment


async def test_time_runs_forward_and_through_suspension(monkeypatch: pytest.MonkeyPatch) -> None:
    """A lease must not outlive its promise in a suspended machine (DESIGN 4.5)."""
    clock = real_environment().clock
    first = clock.monotonic_ns()
    await clock.sleep(0)
    assert clock.monotonic_ns() >= first
    assert abs(clock.wall_ms() - time.time() * 1000) < 60_000
    # On a machine that never slept the other clocks show the same.
    monkeypatch.setattr(time, "clock_gettime_ns", lambda which: {time.CLOCK_BOOTTIME: 7}[which])
    assert clock.monotonic_ns() == 7


async def test_a_deadline_cuts_a_wait_off() -> None:
    clock = real_environment().clock
    with clock.deadline(0) as scope:
        await clock.sleep(60)
    assert scope.cancelled_caught


def test_ids_and_chance_differ_from_node_to_node() -> None:
    one, other = real_environment(), real_environment()
    assert len(one.ids.random_bytes(16)) == 16
    assert one.ids.random_bytes(16) != other.ids.random_bytes(16)
    assert [one.random.randrange(1 << 30) for _ in range(4)] != [other.random.randrange(1 << 30) for _ in range(4)]
    assert 0 <= one.random.random() < 1
