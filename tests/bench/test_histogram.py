"""Latency histograms: bounded error, exact maximum, sums."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardkv_bench.histogram import SUB_BITS, Histogram, bucket_of, highest_in, merged

VALUES = st.integers(0, (1 << 63) - 1)


@given(VALUES)
def test_a_bucket_holds_its_value_and_errs_by_at_most_one_in_64(value: int) -> None:
    bucket = bucket_of(value)
    highest = highest_in(bucket)
    assert highest >= value
    assert bucket_of(highest) == bucket
    assert bucket_of(highest + 1) == bucket + 1
    assert highest - value <= value >> SUB_BITS


@given(st.lists(VALUES, min_size=1), st.floats(0, 1))
def test_a_quantile_is_never_below_the_true_one_and_close_above_it(values: list[int], fraction: float) -> None:
    histogram = Histogram()
    for value in values:
        histogram.record(value)
    histogram.check()
    true = sorted(values)[max(0, -int(-len(values) * fraction // 1) - 1)]
    assert true <= histogram.quantile(fraction) <= true + (true >> SUB_BITS)
    assert histogram.quantile(1.0) == histogram.maximum == max(values)


@given(st.lists(VALUES), st.lists(VALUES))
def test_the_sum_of_two_histograms_is_the_histogram_of_both(one: list[int], other: list[int]) -> None:
    histograms = []
    for values in (one, other, one + other):
        histogram = Histogram()
        for value in values:
            histogram.record(value)
        histograms.append(histogram)
    total = merged(histograms[:2])
    total.check()
    assert total.to_json() == histograms[2].to_json()


def test_a_histogram_without_values_has_quantiles_of_zero() -> None:
    assert Histogram().quantile(0.5) == 0


@given(st.lists(VALUES))
def test_a_histogram_survives_a_trip_through_json(values: list[int]) -> None:
    histogram = Histogram()
    for value in values:
        histogram.record(value, times=2)
    back = Histogram.from_json(json.loads(json.dumps(histogram.to_json())))
    back.check()
    assert back.to_json() == histogram.to_json()
    assert back.count == 2 * len(values)


def test_what_is_no_histogram_is_refused() -> None:
    with pytest.raises(ValueError, match="not a histogram"):
        Histogram.from_json({"maximum": "1"})


def test_the_check_finds_a_total_that_disagrees() -> None:
    histogram = Histogram()
    histogram.record(1)
    histogram.count = 2
    with pytest.raises(AssertionError):
        histogram.check()
