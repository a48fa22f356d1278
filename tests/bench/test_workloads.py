"""Distributions and workloads, after YCSB (Cooper et al. 2010) and Gray et al. 1994. Seeded; no timing."""

from collections import Counter
from itertools import islice, pairwise
from pathlib import Path
from random import Random

import pytest

from shardkv_bench.distributions import SCRAMBLED_ITEMS, Latest, Zipfian, scramble, scrambled_zipfian, uniform, zeta
from shardkv_bench.workloads import (
    KEY_PREFIX,
    PREPARED_MAX,
    SCAN_RECORDS_MAX,
    WORKLOADS,
    Kind,
    Operation,
    Plan,
    Workload,
    key_of,
    value_of,
)

DRAWS = 40_000


def drawn(plan: Plan, count: int) -> list[Operation]:
    return [plan.next() for _ in range(count)]


def test_zipfian_draws_the_first_items_in_proportion_to_the_power_law() -> None:
    """Gray et al.: item i has the probability 1/(i**theta * zeta(n))."""
    draw = Zipfian(1_000, Random(1))
    counts = Counter(draw() for _ in range(DRAWS))
    total = zeta(1_000, 0.99)
    assert set(counts) <= set(range(1_000))
    assert counts[0] / DRAWS == pytest.approx(1 / total, rel=0.05)
    assert counts[1] / DRAWS == pytest.approx(1 / (2**0.99 * total), rel=0.08)
    assert counts[0] > counts[1] > counts[10] > counts[200]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_zipfian_of_very_few_items_stays_inside_them(count: int) -> None:
    draw = Zipfian(count, Random(1))
    assert {draw() for _ in range(1_000)} == set(range(count))


def test_zipfian_that_grew_is_the_same_as_one_made_at_that_size() -> None:
    grown, made = Zipfian(10, Random(7)), Zipfian(500, Random(7))
    grown.grow(500)
    assert [grown() for _ in range(100)] == [made() for _ in range(100)]


def test_the_sum_for_the_scrambled_items_is_the_one_that_a_partial_sum_approaches() -> None:
    """The constant is not computed at start; the tail integral bounds it."""
    known = 1_000_000
    partial = zeta(known, 0.99)
    tail = (SCRAMBLED_ITEMS**0.01 - known**0.01) / 0.01
    from shardkv_bench.distributions import SCRAMBLED_ZETA

    assert partial + tail == pytest.approx(SCRAMBLED_ZETA, rel=1e-5)


def test_scrambled_zipfian_scatters_the_popular_records() -> None:
    draw = scrambled_zipfian(100_000, Random(3))
    counts = Counter(draw() for _ in range(DRAWS))
    popular = [record for record, _ in counts.most_common(10)]
    assert counts[popular[0]] / DRAWS == pytest.approx(1 / 26.469, rel=0.1)
    assert popular[0] == scramble(0) % 100_000
    assert len({record // 10_000 for record in popular}) > 4


def test_latest_prefers_the_newest_record_and_follows_inserts() -> None:
    newest = 1_000
    draw = Latest(newest, Random(5), lambda: newest)
    before = Counter(draw() for _ in range(DRAWS))
    assert before.most_common(1)[0][0] == 999
    newest = 1_100
    after = Counter(draw() for _ in range(DRAWS))
    assert after.most_common(1)[0][0] == 1_099
    assert max(before) == 999
    assert min(after) >= 0


def test_uniform_draws_every_record_about_alike() -> None:
    draw = uniform(10, Random(5))
    counts = Counter(draw() for _ in range(DRAWS))
    assert set(counts) == set(range(10))
    assert max(counts.values()) < 1.1 * min(counts.values())


@pytest.mark.parametrize("name", sorted(WORKLOADS))
def test_a_workload_draws_its_kinds_in_their_shares(name: str) -> None:
    """YCSB core: A 50/50, B 95/5, C 100, D 95/5 latest, E 95/5 scans, F 50/50 read-modify-write."""
    workload = WORKLOADS[name]
    counts = Counter(operation.kind for operation in drawn(Plan(workload, 1_000, seed=1), 20_000))
    for kind, share in workload.mix:
        assert counts[kind] / 20_000 == pytest.approx(share, abs=0.02)
    assert set(counts) == {kind for kind, _ in workload.mix}


def test_the_core_workloads_are_those_of_ycsb() -> None:
    mixes = {name: dict(workload.mix) for name, workload in WORKLOADS.items()}
    assert mixes["a"] == {Kind.READ: 0.5, Kind.UPDATE: 0.5}
    assert mixes["b"] == {Kind.READ: 0.95, Kind.UPDATE: 0.05}
    assert mixes["c"] == {Kind.READ: 1.0}
    assert mixes["d"] == {Kind.READ: 0.95, Kind.INSERT: 0.05}
    assert mixes["e"] == {Kind.SCAN: 0.95, Kind.INSERT: 0.05}
    assert mixes["f"] == {Kind.READ: 0.5, Kind.READ_MODIFY_WRITE: 0.5}
    assert [WORKLOADS[name].distribution for name in "abcdef"] == [*["zipfian"] * 3, "latest", *["zipfian"] * 2]


def test_equal_seeds_make_equal_plans_and_processes_differ() -> None:
    def first(seed: int, process: int = 0) -> list[Operation]:
        return drawn(Plan(WORKLOADS["a"], 1_000, seed, process, 2), 200)

    assert first(1) == first(1)
    assert first(1) != first(2)
    assert first(1, 0) != first(1, 1)


def test_prepared_operations_repeat_rather_than_end() -> None:
    plan = Plan(WORKLOADS["write"], 10, seed=1)
    once = drawn(plan, PREPARED_MAX)
    assert drawn(plan, 3) == once[:3]


@pytest.mark.parametrize("name", ["read", "c"])
def test_operations_on_many_records_do_not_repeat(name: str) -> None:
    """Those of 10,000,000 records went to the same 65,536 over and over, and the rest was never read."""
    plan = Plan(WORKLOADS[name], 100 * PREPARED_MAX, seed=1)
    once = drawn(plan, PREPARED_MAX)
    again = drawn(plan, PREPARED_MAX)
    assert once != again
    assert len(set(once + again)) > 1.5 * len(set(once))


def test_inserts_of_one_process_are_numbered_without_holes() -> None:
    plan = Plan(WORKLOADS["d"], 100, seed=1)
    inserted = []
    for operation in islice(iter(plan.next, None), 2_000):
        if operation.kind is Kind.INSERT:
            inserted.append(operation.record)
            plan.inserted(operation.record)
        else:
            assert operation.record < 100 + len(inserted)
    assert inserted == list(range(100, 100 + len(inserted)))


def test_inserts_that_are_not_acknowledged_yet_have_numbers_of_their_own() -> None:
    plan = Plan(WORKLOADS["d"], 100, seed=1)
    records = [operation.record for operation in drawn(plan, 500) if operation.kind is Kind.INSERT]
    assert all(later == earlier + 1 for earlier, later in pairwise(records))


def test_the_records_there_are_end_before_the_first_that_was_not_inserted_yet() -> None:
    plan = Plan(WORKLOADS["d"], 100, seed=1)
    first, second, third = [each.record for each in drawn(plan, 500) if each.kind is Kind.INSERT][:3]
    plan.inserted(second)
    assert plan.records == 100
    plan.inserted(first)
    assert plan.records == 102
    plan.not_inserted(third)
    assert next(each.record for each in iter(plan.next, None) if each.kind is Kind.INSERT) == third
    plan.inserted(third)
    assert plan.records == 103


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_each_of_several_processes_reads_most_what_it_has_inserted_last(processes: int) -> None:
    """YCSB D. With more than one process nobody read what anybody had inserted, however long the run."""
    for process in range(processes):
        plan = Plan(WORKLOADS["d"], 100, seed=1, process=process, processes=processes)
        inserted: list[int] = []
        while len(inserted) < 50:
            operation = plan.next()
            if operation.kind is Kind.INSERT:
                inserted.append(operation.record)
                plan.inserted(operation.record)
        read: Counter[int] = Counter()
        while read.total() < DRAWS:
            operation = plan.next()
            if operation.kind is Kind.INSERT:
                plan.not_inserted(operation.record)
            else:
                read[operation.record] += 1
        assert set(read) <= {*range(100), *inserted}
        assert [record for record, _ in read.most_common(3)] == inserted[:-4:-1]
        assert read[99] > read[0], "of what was loaded, too, the newest is read most"


def test_processes_insert_different_records() -> None:
    inserted = [
        {
            operation.record
            for operation in drawn(Plan(WORKLOADS["e"], 100, 1, process, 3), 2_000)
            if operation.kind is Kind.INSERT
        }
        for process in range(3)
    ]
    assert all(inserted)
    assert not inserted[0] & inserted[1]
    assert not inserted[1] & inserted[2]


def test_scans_ask_for_one_to_a_hundred_records() -> None:
    counts = {
        operation.scan_records
        for operation in drawn(Plan(WORKLOADS["e"], 1_000, 1), 20_000)
        if operation.kind is Kind.SCAN
    }
    assert counts == set(range(1, SCAN_RECORDS_MAX + 1))


def test_keys_have_sixteen_bytes_and_values_the_size_asked() -> None:
    """Work order: 16-byte keys, 100-byte values."""
    assert {len(key_of(record)) for record in (0, 99_999, 9_999_999_999)} == {16}
    assert len(value_of(1, 100)) == 100
    assert value_of(1, 100) == value_of(1, 100) != value_of(2, 100)


def test_the_keys_have_a_prefix_of_their_own_and_the_help_says_how_to_remove_them() -> None:
    """They were called user..., stayed in the cluster, and nothing said so."""
    assert key_of(7).startswith(KEY_PREFIX)
    for name in ("docs/reference/commands.md", "docs/quickstart.md"):
        page = (Path(__file__).parents[2] / name).read_text()
        assert f"shardkv delete-range --prefix {KEY_PREFIX.decode()}" in " ".join(page.split()), name


def test_a_mix_that_does_not_add_up_is_our_own_bug() -> None:
    with pytest.raises(AssertionError):
        Workload("x", "", ((Kind.READ, 0.5),), "uniform")
