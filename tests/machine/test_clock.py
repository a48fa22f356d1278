"""The hybrid logical clock: stamps rise, follow the time that it is told, and refuse what lies too far ahead."""

from dataclasses import dataclass
from typing import Any

from shardkv.machine.clock import HybridClock
from shardkv.types import TIMESTAMP_COUNTER_BITS, TIMESTAMP_MAX, timestamp_at, timestamp_ms


@dataclass
class Hands:
    """A clock that stands where the test puts it; its monotonic side began at another moment than its wall side."""

    ms: int
    running_ms: int = 77

    def wall_ms(self) -> int:
        return self.ms

    def monotonic_ns(self) -> int:
        return self.running_ms * 1_000_000

    def go_on(self, ms: int) -> None:
        self.ms += ms
        self.running_ms += ms


def clock_at(ms: int) -> tuple[HybridClock, Hands]:
    hands: Any = Hands(ms)
    return HybridClock(hands), hands


def test_stamps_rise_while_time_stands_still_or_is_set_back() -> None:
    clock, hands = clock_at(1_000)
    stamps = [clock.now(), clock.now()]
    assert clock.follow(10)
    stamps += [clock.now(), clock.now()]
    hands.go_on(1_990)
    stamps.append(clock.now())
    assert stamps == sorted(set(stamps))
    assert stamps[0] == timestamp_at(1_000)
    assert stamps[-1] == timestamp_at(2_000)
    clock.check()


def test_trap_23_a_wall_clock_that_jumps_takes_no_stamp_with_it() -> None:
    """TRAPS 23. A range's time never goes back, so a jump of an hour would last an hour."""
    clock, hands = clock_at(1_000)
    hands.ms += 3_600_000
    hands.go_on(5)
    assert clock.now() == timestamp_at(1_005)
    assert clock.ms() == 1_005


def test_a_stamp_from_another_node_is_absorbed_so_that_later_stamps_lie_above_it() -> None:
    clock, _ = clock_at(1_000)
    seen = timestamp_at(1_500, 7)
    assert clock.observe(seen)
    assert clock.now() > seen


def test_an_old_stamp_changes_nothing() -> None:
    clock, _ = clock_at(1_000)
    first = clock.now()
    assert clock.observe(timestamp_at(5))
    clock.absorb(timestamp_at(5))
    assert clock.last == first
    assert clock.ms() == 1_000


def test_trap_23_a_stamp_beyond_the_offset_bound_is_refused_and_never_absorbed() -> None:
    """TRAPS 23: one token of 2^64 - 1, or one node 70 s ahead, must not carry this clock into the future."""
    clock, hands = clock_at(1_000)
    for poisoned in (TIMESTAMP_MAX, timestamp_at(1_000 + 70_000), timestamp_at(1_501)):
        assert not clock.observe(poisoned)
        assert not clock.believable(poisoned)
        assert timestamp_ms(clock.now()) == 1_000
    assert clock.observe(timestamp_at(1_500, 5)), "the bound itself is allowed"
    hands.go_on(1)
    assert clock.observe(timestamp_at(1_501))
    clock.check()


class FineHands(Hands):
    """Its monotonic side is read between two milliseconds, too."""

    def __init__(self, ms: int, running_us: int) -> None:
        super().__init__(ms, running_us // 1_000)
        self.running_us = running_us

    def monotonic_ns(self) -> int:
        return self.running_us * 1_000


def test_trap_23_a_client_that_is_always_as_far_ahead_as_it_may_be_carries_no_clock_with_it() -> None:
    """TRAPS 23. What a leader gives out after it is the stamp counted on, which may be the next millisecond's, and by
    another node's clock that has only begun: a step with each write would be a time that runs as fast as clients write.
    """
    hands: Any = [FineHands(1_000, 77_000), FineHands(1_000, 77_950)]
    clocks = [HybridClock(each) for each in hands]
    for _ in range(500):
        for leader in clocks:
            assert leader.observe(timestamp_at(leader.ms() + 500, (1 << TIMESTAMP_COUNTER_BITS) - 1))
            stamp = leader.now()
            for each in hands:
                each.running_us += 100
            for clock in clocks:
                clock.absorb(stamp)
                clock.check()
    assert [clock.ms() for clock in clocks] == [1_100, 1_100]


def test_what_a_range_has_applied_takes_the_time_with_it_as_far_as_the_bound() -> None:
    """It cannot be refused; and a node whose time is further behind would make every command of its clients too old."""
    clock, hands = clock_at(1_000)
    clock.absorb(timestamp_at(1_400))
    assert (clock.last, clock.ms()) == (timestamp_at(1_400), 1_000), "clocks differ by so much"
    clock.absorb(timestamp_at(61_000, 3))
    assert (clock.last, clock.ms()) == (timestamp_at(61_000, 3), 60_498)
    clock.check()
    hands.go_on(1_000)
    hands.go_on(2)
    assert clock.now() == timestamp_at(61_500), "and goes on from there: a time that stands still ages no session"


def test_the_time_is_not_set_back_behind_what_a_range_has_applied() -> None:
    """Its own stamps among it: a leader's, which it gave before it applied them."""
    clock, hands = clock_at(61_000)
    clock.absorb(clock.now())
    hands.go_on(10)
    assert not clock.follow(60_499)
    assert clock.ms() == 61_010
    assert clock.follow(60_500)
    assert clock.ms() == 60_500
    clock.check()


def test_stamps_that_are_held_back_go_by_what_was_applied_until_the_time_is_confirmed() -> None:
    """TRAPS 23: a node that starts alone with a wrong date must not hand it to clients, who carry it on."""
    clock, hands = clock_at(3_600_000)
    clock.absorb(timestamp_at(61_000, 3))
    clock.hold()
    hands.go_on(10)
    assert clock.now() == timestamp_at(61_010)
    assert clock.guess_ms() == 3_600_010
    assert clock.believable(timestamp_at(3_600_510)), "the guess may be right"
    assert not clock.believable(timestamp_at(3_600_511))
    assert clock.follow(70_000)
    assert clock.ms() == clock.guess_ms() == 70_000
    assert not clock.believable(timestamp_at(3_600_510))
    clock.check()


def test_stamps_that_are_held_back_go_on_from_what_a_client_was_told_before() -> None:
    """A time that stands still makes whatever that client issues too old, for it counts on from what it was told."""
    clock, hands = clock_at(3_600_000)
    clock.absorb(timestamp_at(61_000))
    clock.hold()
    assert clock.observe(timestamp_at(1_800_000))
    assert clock.observe(timestamp_at(70_000)), "another, that was told less, changes nothing"
    hands.go_on(10_000)
    assert timestamp_ms(clock.now()) == 1_810_000
    clock.check()


def test_stamps_that_are_held_back_do_not_fall_behind_for_what_a_client_was_told_before() -> None:
    """Nor is the time guessed to be earlier than what was applied, however late the wall clock is."""
    clock, hands = clock_at(1_000)
    clock.absorb(timestamp_at(61_000))
    clock.hold()
    assert clock.guess_ms() == 61_000
    hands.go_on(10_000)
    assert clock.observe(timestamp_at(65_000)), "above all stamps seen, and below the time"
    assert clock.ms() == clock.guess_ms() == 71_000
    clock.check()
