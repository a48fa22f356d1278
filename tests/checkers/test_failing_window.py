"""The smallest failing window: small, still a contradiction, and readable."""

import random

import pytest

from shardkv.simulation.checkers.failing_window import explain, explain_result, smallest_window
from shardkv.simulation.checkers.linearizability import (
    REGISTER,
    UNKNOWN,
    Finding,
    Operation,
    Outcome,
    Verdict,
    check,
    search,
)


def put(value: bytes, version: int | None, called: float, returned: float, client: int = 1) -> Operation:
    outcome = None if version is None else Outcome(version)
    returned = returned if outcome is not UNKNOWN else float("inf")
    return Operation("put", value, None, called, returned, outcome, b"k", client)


def get(found: tuple[bytes, int] | None, called: float, returned: float, client: int = 2) -> Operation:
    return Operation("get", None, None, called, returned, Outcome(found), b"k", client)


def failing(history: list[Operation]) -> Finding:
    (finding,) = check(history).findings
    assert finding.verdict is Verdict.NOT_LINEARIZABLE
    return finding


def noise(start: float, version: int, count: int) -> list[Operation]:
    """Sound operations, one after the other."""
    found = []
    for number in range(count):
        at, value = start + 4 * number, b"noise %d" % number
        found += [put(value, version + number, at, at + 1, 7), get((value, version + number), at + 2, at + 3, 8)]
    return found


def test_a_stale_read_is_shown_with_the_write_that_it_missed() -> None:
    history = [*noise(0, 1, 20), put(b"new", 50, 100, 101), get((b"noise 19", 20), 102, 103), *noise(110, 60, 20)]
    window = smallest_window(failing(history), REGISTER)
    assert window.operations == (history[40], history[41])
    assert window.left_out == len(history) - 2


def test_a_picture_of_a_stale_read_reads_like_this() -> None:
    history = [put(b"a", 1, 0, 1), put(b"b", 2, 2, 4, 1), get((b"a", 1), 5, 6.5), put(b"c", 3, 8, 9, 3)]
    assert explain(failing(history), REGISTER) == "\n".join(
        [
            "key b'k': 2 of 4 operations cannot have happened one after the other, whatever the other 2 did",
            "  before them: absent; or b'a' version 1",
            "  client 1  2 to   4  |============|                            put b'b' -> version 2",
            "  client 2  5 to 6.5                            |============|  get -> b'a' version 1",
            "  the longest order that explains its answers: put b'b' -> version 2",
            "  which leaves unexplained: get -> b'a' version 1",
        ]
    )


def test_a_write_of_unknown_outcome_is_shown_where_an_answer_needs_it() -> None:
    history = [*noise(0, 1, 5), put(b"late", None, 50, 60, 4), get((b"late", 9), 70, 71), get((b"noise 4", 5), 72, 73)]
    window = smallest_window(failing(history), REGISTER)
    assert window.operations == tuple(history[-3:]) or window.operations == tuple(history[-2:])
    assert "client 2" in explain(failing(history), REGISTER)


def test_overlapping_operations_are_drawn_side_by_side() -> None:
    history = [put(b"a", 1, 0, 10, 1), get((b"a", 1), 1, 4, 2), get((b"a", 2), 3, 5, 3)]
    first, second = explain(failing(history), REGISTER).splitlines()[2:4]
    assert first.startswith("  client 2  1 to 4  |")
    assert second.startswith("  client 3  3 to 5  ")
    assert second.index("|") < first.rindex("|")


def test_a_double_increment_is_found_among_many() -> None:
    history = [
        Operation("increment", 1, None, 2 * each, 2 * each + 1, Outcome(each + 1), b"k", 1) for each in range(30)
    ]
    history[20:] = [
        Operation("increment", 1, None, 2 * each, 2 * each + 1, Outcome(each + 2), b"k", 1) for each in range(20, 30)
    ]
    window = smallest_window(failing(history), REGISTER)
    assert len(window.operations) <= 21
    assert history[20] in window.operations


def test_a_wrong_answer_by_itself_is_a_window_of_one() -> None:
    history = [*noise(0, 1, 5), get((b"never written", 999), 50, 51)]
    window = smallest_window(failing(history), REGISTER)
    assert window.operations == (history[-1],)
    assert "1 of 11 operations cannot have happened, whatever" in explain(failing(history), REGISTER)


@pytest.mark.parametrize("seed", range(30))
def test_a_window_is_a_contradiction_by_itself_and_every_operation_in_it_counts(seed: int) -> None:
    """Random histories of a real register with one read made stale: what is shown fails with no help from the rest."""
    chance = random.Random(seed)
    history: list[Operation] = []
    writes: list[tuple[bytes | None, int]] = [(None, 0)]
    now, version = 0.0, 0
    for _ in range(60):
        now += 1
        called, returned = now - chance.random() * 2, now + chance.random() * 2
        if chance.random() < 0.5:
            value, seen = writes[-1]
            history.append(get(None if value is None else (value, seen), called, returned, chance.randrange(4)))
        else:
            version += 1
            value = b"%d" % version
            writes.append((value, version))
            known = version if chance.random() < 0.8 else None
            history.append(put(value, known, called, returned, chance.randrange(4)))
    reads = [each for each in history[40:] if each.kind == "get"]
    chance.choice(reads).outcome = Outcome(writes[2])
    finding = check(history).findings[0]
    if finding.verdict is not Verdict.NOT_LINEARIZABLE:
        return
    window = smallest_window(finding, REGISTER)
    assert len(window.operations) < 15, explain(finding, REGISTER)
    found = search(window.operations, REGISTER, window.before)
    assert found.verdict is Verdict.NOT_LINEARIZABLE
    assert {id(each) for each in window.operations} <= {id(each) for each in finding.history}


def test_the_text_of_a_result_names_every_key_that_fails_and_every_one_undecided() -> None:
    bad = [put(b"a", 2, 0, 1), put(b"b", 1, 2, 3)]
    hard = [Operation("increment", 1 << each, key=b"hard") for each in range(14)] + [get((b"0", 1), 2, 3)]
    hard[-1].key = b"hard"
    result = check(bad + hard, steps_max=1000)
    assert result.verdict is Verdict.NOT_LINEARIZABLE
    text = explain_result(result, REGISTER)
    assert "key b'k': 2 of 2 operations" in text
    assert "key b'hard': undecided after" in text
