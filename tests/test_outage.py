"""What is wrong for a while is told once, and once that it is over."""

from shardkv.outage import Outage


def test_what_lasts_is_told_once_and_its_end_is() -> None:
    outage = Outage(2.0)
    assert [outage.lasts(now) for now in (10.0, 11.9, 12.0, 13.0, 500.0)] == [False, False, True, False, False]
    assert [outage.end(), outage.end()] == [True, False]


def test_what_is_over_soon_is_not_told() -> None:
    outage = Outage(2.0)
    outage.begin(10.0)
    assert not outage.lasts(11.0)
    assert not outage.end()
    assert not outage.lasts(13.0), "another one"


def test_what_comes_and_goes_is_told_once_in_a_while() -> None:
    outage = Outage(2.0, apart_seconds=30.0)
    told = []
    for now in range(100):
        if now % 5 == 4:
            outage.end()
        elif outage.lasts(now):
            told.append(now)
    assert told == [2, 32, 62, 92]


def test_what_begins_again_too_soon_and_lasts_is_told_later() -> None:
    outage = Outage(2.0, apart_seconds=30.0)
    assert [outage.lasts(now) for now in (0, 2)] == [False, True]
    outage.end()
    assert [outage.lasts(now) for now in (3, 10, 31, 32, 33)] == [False, False, False, True, False]
