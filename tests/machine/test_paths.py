"""The short paths of plain puts against the general one: whatever they take must come to the same.

Each odd command is sent alone, before and after a sound one, to a range with the short paths and to one without.
"""

from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardkv import errors
from shardkv.machine import execution, keys
from shardkv.machine.entries import encode_write_entry
from shardkv.machine.execution import ISSUED_AHEAD_MS_MAX
from shardkv.storage.engine import WriteBatch
from shardkv.types import SESSION_AGE_MS_MAX, SESSION_WINDOW_MAX, KeyRange, timestamp_at
from shardkv.wire import commands

from . import world
from .world import Client, World

SPAN = KeyRange(b"b", b"m")


class Put(NamedTuple):
    """A put with any fields; the defaults are sound after :func:`used`."""

    sequence: int = 20
    below: int = 8
    issued: int = 0
    key: bytes = b"c"
    condition: int | None = None

    def sealed(self, now_ms: int) -> bytes:
        body = commands.pack_put(self.key, b"v", self.condition)
        return commands.seal(commands.Op.PUT, body, self.sequence, now_ms + self.issued, self.below)


def used() -> World:
    """A range whose session has used sequences 9 and 10 and has settled all below 8."""
    range_ = World(world.descriptor(SPAN))
    for sequence in (9, 10):
        range_.do(Client(), Put(sequence).sealed(range_.now_ms))
    return range_


def seen(range_: World) -> Any:
    """All that a path leaves behind, however its rows are packed."""
    table = range_.machine.sessions(range_.engine)
    sessions = {
        name: (session.acknowledged_below, session.highest, session.last_row, session.records())
        for name, session in table.sessions.items()
    }
    user = list(range_.engine.scan(*keys.user_span(SPAN)))
    return user, sessions, table.rows, range_.machine.last_timestamp, len(range_.rows())


def check_both_paths(monkeypatch: pytest.MonkeyPatch, entries: list[list[bytes]], *, reload: bool = False) -> list[Any]:
    """The outcomes of these groups, one entry each, after checking that both paths agree on everything."""
    results = []
    for short in (True, False):
        with monkeypatch.context() as patch:
            if not short:
                patch.setattr(execution, "_run_plain_put", lambda *_: None)
                patch.setattr(execution, "_run_plain_puts", lambda *_: None)
            range_, outcomes = used(), []
            for group in entries:
                [answers] = range_.write((Client(), group))
                outcomes.append(answers)
                if reload:
                    range_.reload()
                range_.machine.check()
            results.append((outcomes, seen(range_)))
    assert results[0] == results[1]
    found: list[Any] = results[0][0]
    return found


ODD = {
    "settled": (Put(5, 5), errors.SequenceReused),
    "used": (Put(10, key=b"d"), errors.SequenceReused),
    "below its own acknowledged_below": (Put(20, 21), errors.MalformedRequest),
    "beyond the window": (Put(8 + SESSION_WINDOW_MAX + 1), errors.MalformedRequest),
    "too old": (Put(issued=-SESSION_AGE_MS_MAX - 1), errors.TooOld),
    "ahead": (Put(issued=ISSUED_AHEAD_MS_MAX + 1), errors.TooOld),
    "before the span": (Put(key=b"a"), errors.EpochMismatch),
    "after the span": (Put(key=b"m"), errors.EpochMismatch),
    "another version": (Put(condition=5), errors.VersionMismatch),
}


@pytest.mark.parametrize("name", ODD)
def test_an_odd_put_is_refused_alone_and_in_company(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No short path takes what the general path would refuse."""
    put, error = ODD[name]
    odd = put.sealed(world.NOW_MS)
    before, after = Put(15, key=b"e").sealed(world.NOW_MS), Put(1_000, key=b"f").sealed(world.NOW_MS)
    for group, position in (([odd], 0), ([before, odd], 1), ([odd, after], 0), ([before, odd, after], 1)):
        [outcomes] = check_both_paths(monkeypatch, [group])
        assert outcomes[position][0] == error.code
        sound = [outcome for place, outcome in enumerate(outcomes) if place != position]
        assert all(type(outcome) is int for outcome in sound)


@pytest.mark.parametrize("sequences", [[20, 20], [21, 20], [20, 22, 21], [20, 22, 21, 22, 23], [10, 20], [20, 9]])
def test_a_group_whose_sequences_do_not_rise_applies_each_once(
    sequences: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    group = [Put(sequence).sealed(world.NOW_MS) for sequence in sequences]
    first, again = check_both_paths(monkeypatch, [group, group])
    assert first == again
    assert len(set(first)) == len(set(sequences))


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("short", [True, False])
def test_each_path_counts_what_it_writes(short: bool, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches are cut, and the engine flushed, by it."""
    if not short:
        monkeypatch.setattr(execution, "_run_plain_put", lambda *_: None)
        monkeypatch.setattr(execution, "_run_plain_puts", lambda *_: None)
    range_ = World(world.descriptor(SPAN))
    puts = commands.join([Put(20 + each, key=b"c%d" % each).sealed(world.NOW_MS) for each in range(count)])
    data = encode_write_entry([(Client().session, puts)], timestamp_at(world.NOW_MS), 1)
    batch = WriteBatch()
    range_.machine.apply(11, world.TERM, data, batch, range_.engine)
    assert len(batch.changes) == count + 1
    assert batch.bytes == sum(len(key) + len(value or b"") for key, value in batch.changes.items())


@pytest.mark.parametrize(("count", "condition"), [(1, None), (2, None), (1, 0)])
def test_what_a_session_has_settled_stays_settled_although_the_row_that_said_so_expires(
    count: int, condition: int | None
) -> None:
    """Each row keeps acknowledged_below as it stands after it, not as its own commands say."""
    for reload in (False, True):
        range_ = used()
        late = [Put(30 + number, 2, condition=condition).sealed(range_.now_ms + 20_000) for number in range(count)]
        range_.now_ms += 20_000
        range_.do(Client(), *late)
        range_.now_ms += SESSION_AGE_MS_MAX - 10_000
        range_.write()
        assert len(range_.machine.sessions(range_.engine).rows) == 1
        if reload:
            range_.reload()
        assert range_.do(Client(), Put(5, 2).sealed(range_.now_ms))[0] == errors.SequenceReused.code


@pytest.mark.parametrize("company", [False, True])
def test_a_short_path_takes_no_operation_it_does_not_know(company: bool) -> None:
    """One with as many fields as a put."""
    strange = Put().sealed(world.NOW_MS)
    strange = strange[:1] + b"\x09" + strange[2:]
    group = [strange, Put(21).sealed(world.NOW_MS)] if company else [strange]
    with pytest.raises(errors.Corruption):
        used().write((Client(), group))


PUTS = st.builds(
    Put,
    sequence=st.integers(1, 30) | st.integers(SESSION_WINDOW_MAX, SESSION_WINDOW_MAX + 12),
    below=st.integers(1, 12),
    issued=st.sampled_from([0, 0, 0, -1, -SESSION_AGE_MS_MAX, -SESSION_AGE_MS_MAX - 1, ISSUED_AHEAD_MS_MAX, 501]),
    key=st.sampled_from([b"a", b"b", b"c", b"c", b"d", b"lz", b"m"]),
    condition=st.sampled_from([None, None, None, None, 0]),
)


@settings(max_examples=150, deadline=None)
@given(groups=st.lists(st.lists(PUTS, min_size=1, max_size=5), min_size=1, max_size=5), reload=st.booleans())
def test_any_groups_of_puts_come_to_the_same_on_every_path(groups: list[list[Put]], reload: bool) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        check_both_paths(monkeypatch, [[put.sealed(world.NOW_MS) for put in group] for group in groups], reload=reload)
