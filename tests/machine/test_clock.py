"""The hybrid logical clock: stamps rise, follow wall time, and refuse what lies too far ahead."""

from dataclasses import dataclass
from typing import Any

from shardkv.machine.clock import HybridClock
from shardkv.types import TIMESTAMP_MAX, timestamp_at, timestamp_ms


@dataclass
class Wall:
    """A wall clock that stands where the test puts it."""

    ms: int

    def wall_ms(self) -> int:
        return self.ms


def clock_at(ms: int) -> tuple[HybridClock, Wall]:
    wall: Any = Wall(ms)
    return HybridClock(wall), wall


def test_stamps_rise_while_the_wall_clock_stands_still_or_jumps_back() -> None:
    clock, wall = clock_at(1_000)
    stamps = [clock.now(), clock.now()]
    wall.ms = 10
    stamps += [clock.now(), clock.now()]
    wall.ms = 2_000
    stamps.append(clock.now())
    assert stamps == sorted(set(stamps))
    assert stamps[0] == timestamp_at(1_000)
    assert stamps[-1] == timestamp_at(2_000)


def test_a_stamp_from_another_node_is_absorbed_so_that_later_stamps_lie_above_it() -> None:
    clock, _ = clock_at(1_000)
    seen = timestamp_at(1_500, 7)
    assert clock.observe(seen)
    assert clock.now() > seen


def test_an_old_stamp_changes_nothing() -> None:
    clock, _ = clock_at(1_000)
    first = clock.now()
    assert clock.observe(timestamp_at(5))
    assert clock.last == first


def test_trap_23_a_stamp_beyond_the_offset_bound_is_refused_and_never_absorbed() -> None:
    """TRAPS 23: one token of 2^64 - 1, or one node 70 s ahead, must not carry this clock into the future."""
    clock, wall = clock_at(1_000)
    for poisoned in (TIMESTAMP_MAX, timestamp_at(1_000 + 70_000), timestamp_at(1_501)):
        assert not clock.observe(poisoned)
        assert not clock.believable(poisoned)
        assert timestamp_ms(clock.now()) == 1_000
    assert clock.observe(timestamp_at(1_500, 5)), "the bound itself is allowed"
    wall.ms = 1_001
    assert clock.observe(timestamp_at(1_501))
    clock.check()
