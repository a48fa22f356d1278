"""What each command does to the keys, and what it answers."""

from typing import Any

import pytest

from shardkv import errors
from shardkv.machine.entries import encode_write_entry
from shardkv.storage.engine import WriteBatch
from shardkv.types import Epoch, KeyRange, timestamp_at, timestamp_ms
from shardkv.wire import commands

from . import world
from .world import Client, World


def code(outcome: Any) -> int:
    """The error code of an outcome; 0 for a success."""
    return outcome[0] if type(outcome) is list else 0


def test_a_put_answers_its_version_and_a_read_finds_both() -> None:
    range_ = World()
    version = range_.do(Client(), Client().put(b"k", b"v"))
    assert range_.get(b"k") == [b"v", version]
    assert version == timestamp_at(world.NOW_MS)


def test_versions_rise_with_every_write_of_a_key_across_deletes() -> None:
    """DESIGN §2.3: a key's version grows across deletes too."""
    range_, client = World(), Client()
    first = range_.do(client, client.put(b"k", b"1"))
    assert range_.do(client, client.delete(b"k")) is True
    second = range_.do(client, client.put(b"k", b"2"))
    assert second > first


def test_versions_rise_although_the_leaders_clock_falls_back() -> None:
    """DESIGN §4.4: a stamp is raised above everything the range has seen."""
    range_, client = World(), Client()
    first = range_.do(client, client.put(b"k", b"1"))
    range_.now_ms -= 400
    second = range_.do(client, client.put(b"k", b"2"))
    assert second > first
    assert range_.machine.last_timestamp >= second


def test_each_command_of_an_entry_has_a_version_of_its_own_across_groups() -> None:
    range_, alice, bob = World(), Client(b"alice"), Client(b"bob")
    outcomes = range_.write(
        (alice, [alice.put(b"a", b""), alice.put(b"b", b"")]),
        (bob, [bob.put(b"a", b""), bob.increment(b"n"), bob.put(b"c", b"")]),
    )
    versions = [*outcomes[0], outcomes[1][0], outcomes[1][2]]
    assert versions == sorted(set(versions))
    assert range_.get(b"a") == [b"", outcomes[1][0]]
    assert range_.machine.last_timestamp == outcomes[1][2]


def test_two_clients_single_puts_in_one_entry_have_versions_of_their_own() -> None:
    """A conditional write by the first one's version must not match what the second has written."""
    range_, alice, bob = World(), Client(b"alice"), Client(b"bob")
    [[first], [second]] = range_.write((alice, [alice.put(b"k", b"1")]), (bob, [bob.put(b"k", b"2")]))
    assert first < second
    assert range_.get(b"k") == [b"2", second]
    assert range_.machine.last_timestamp == second
    assert range_.do(alice, alice.put(b"l", b"")) > second


def test_the_last_put_of_a_key_in_a_group_wins() -> None:
    range_, client = World(), Client()
    versions = range_.do(client, client.put(b"k", b"1"), client.put(b"k", b"2"))
    assert range_.get(b"k") == [b"2", versions[1]]


def test_a_conditional_put_moves_only_the_version_it_names() -> None:
    range_, client = World(), Client()
    version = range_.do(client, client.put(b"k", b"1", if_version=0))
    assert version == timestamp_at(world.NOW_MS)
    failed = range_.do(client, client.put(b"k", b"2", if_version=0))
    assert failed == errors.to_wire(errors.VersionMismatch(current=version))
    assert range_.value(b"k") == b"1"
    assert range_.do(client, client.put(b"k", b"3", if_version=version)) > version
    assert range_.value(b"k") == b"3"


def test_a_delete_answers_whether_the_key_was_there() -> None:
    range_, client = World(), Client()
    version = range_.do(client, client.put(b"k", b"1"))
    assert code(range_.do(client, client.delete(b"k", if_version=version + 1))) == errors.VersionMismatch.code
    assert range_.value(b"k") == b"1"
    assert range_.do(client, client.delete(b"k", if_version=version)) is True
    assert range_.get(b"k") is None
    assert range_.do(client, client.delete(b"k")) is False
    assert range_.do(client, client.delete(b"k", if_version=0)) is False


def test_increments_count_from_zero_in_decimal_text() -> None:
    range_, client = World(), Client()
    assert range_.do(client, client.increment(b"n", 5)) == 5
    assert range_.do(client, client.increment(b"n", -8)) == -3
    assert range_.value(b"n") == b"-3"


@pytest.mark.parametrize("text", [b"", b"x", b" 1", b"1\n", b"1_0", b"+1", b"9" * 20, b"9223372036854775808", b"--1"])
def test_an_increment_refuses_what_is_no_signed_64_bit_decimal(text: bytes) -> None:
    range_, client = World(), Client()
    outcomes = range_.do(client, client.put(b"n", text), client.increment(b"n"))
    assert code(outcomes[1]) == errors.NotAnInteger.code
    assert range_.value(b"n") == text


def test_an_increment_refuses_a_number_beyond_64_bits_although_the_sum_would_fit() -> None:
    range_, client = World(), Client()
    outcomes = range_.do(client, client.put(b"n", b"9223372036854775808"), client.increment(b"n", -1))
    assert code(outcomes[1]) == errors.NotAnInteger.code


def test_a_delete_of_an_absent_key_writes_nothing() -> None:
    range_, client = World(), Client()
    data = encode_write_entry([(client.session, commands.join([client.delete(b"k")]))], range_.now_ms << 18, 1)
    batch = WriteBatch()
    assert range_.machine.apply(11, world.TERM, data, batch, range_.engine).outcomes == [[False]]
    assert b"\x10k" not in batch.changes


@pytest.mark.parametrize("start, delta", [((1 << 63) - 1, 1), (-(1 << 63), -1)])
def test_an_increment_that_would_leave_64_bits_changes_nothing(start: int, delta: int) -> None:
    range_, client = World(), Client()
    assert range_.do(client, client.put(b"n", b"%d" % start), client.increment(b"n", 0))[1] == start
    assert code(range_.do(client, client.increment(b"n", delta))) == errors.NotAnInteger.code
    assert range_.value(b"n") == b"%d" % start


def test_a_delete_range_removes_its_span_and_nothing_else() -> None:
    range_, client = World(), Client()
    range_.do(client, *(client.put(key, b"") for key in (b"a", b"b", b"c", b"d")))
    assert range_.do(client, client.delete_range(b"b", b"d")) is True
    assert [range_.get(key) is not None for key in (b"a", b"b", b"c", b"d")] == [True, False, False, True]


@pytest.mark.parametrize("span", [(b"b", b"m"), (b"c", b"m"), (b"b", b"d"), (b"c", b"d")])
def test_a_delete_range_within_a_range_that_ends_is_carried_out_to_its_very_end(span: tuple[bytes, bytes]) -> None:
    """A client cuts its pieces at the ranges' ends."""
    range_, client = World(world.descriptor(KeyRange(b"b", b"m"))), Client()
    kept = (b"b", b"c", b"lz")
    range_.do(client, *(client.put(key, b"") for key in kept))
    assert range_.do(client, client.delete_range(*span)) is True
    assert [key for key in kept if range_.get(key) is not None] == [key for key in kept if not span[0] <= key < span[1]]


def test_an_unbounded_delete_range_is_carried_out_by_a_range_without_an_end_only() -> None:
    """Its client would take the answer of a range that ends for the deletion of everything behind it, too."""
    left, client = World(world.descriptor(KeyRange(b"", b"m"))), Client()
    left.do(client, client.put(b"a", b""))
    outcome = left.do(client, client.delete_range(b"", None))
    assert code(outcome) == errors.EpochMismatch.code
    assert left.value(b"a") == b""
    last = World(world.descriptor(KeyRange(b"m", None)))
    last.do(client, client.put(b"n", b""))
    assert last.do(client, client.delete_range(b"m", None)) is True
    assert last.get(b"n") is None


def test_later_commands_of_an_entry_see_the_earlier_ones() -> None:
    """Order in the entry is order of execution, through the batch before the engine."""
    range_, alice, bob = World(), Client(b"alice"), Client(b"bob")
    outcomes = range_.write(
        (alice, [alice.put(b"n", b"41"), alice.increment(b"n"), alice.put(b"x", b"1", if_version=0)]),
        (bob, [bob.put(b"x", b"2", if_version=0), bob.delete_range(b"n", b"o"), bob.delete(b"n"), bob.increment(b"n")]),
    )
    assert outcomes[0][1] == 42
    assert code(outcomes[1][0]) == errors.VersionMismatch.code
    assert outcomes[1][1:] == [True, False, 1]


def test_a_plain_put_never_reads() -> None:
    """A put costs no read of the engine; conditions and increments do."""

    class NoReads:
        def __getattr__(self, name: str) -> Any:
            raise AssertionError(f"a put called {name}")

    range_, client = World(), Client()
    data = encode_write_entry([(client.session, commands.join([client.put(b"k", b"v")]))], range_.now_ms << 18, 1)
    reader: Any = NoReads()
    applied = range_.machine.apply(11, world.TERM, data, WriteBatch(), reader)
    assert code(applied.outcomes[0][0]) == 0


def test_keys_outside_the_span_are_refused_unrecorded_and_unwritten() -> None:
    """Defence in depth: whatever the leader let through, a range never writes outside itself."""
    range_, client = World(world.descriptor(KeyRange(b"b", b"m"))), Client()
    for make in (
        lambda: client.put(b"a", b""),
        lambda: client.put(b"m", b""),
        lambda: client.put(b"a", b"", if_version=0),
        lambda: client.delete(b"z"),
        lambda: client.increment(b"a"),
        lambda: client.delete_range(b"a", b"c"),
        lambda: client.delete_range(b"c", b"n"),
        lambda: client.delete_range(b"x", b"y"),
        lambda: client.delete_range(b"m", None),
        lambda: client.delete_range(b"", None),
    ):
        before = range_.rows()
        outcome = range_.do(client, make())
        assert code(outcome) == errors.EpochMismatch.code
        assert outcome[2] == [[range_.machine.descriptor.to_wire()]]
        assert [row for row in range_.rows() if row not in before] == [range_.rows()[0]], "only the applied row moved"
        assert range_.machine.sessions(range_.engine).sessions == {}


def test_a_group_with_one_foreign_key_still_writes_the_others() -> None:
    range_, client = World(world.descriptor(KeyRange(b"b", b"m"))), Client()
    outcomes = range_.do(client, client.put(b"c", b"1"), client.put(b"z", b"1"), client.put(b"d", b"1"))
    assert [code(outcome) for outcome in outcomes] == [0, errors.EpochMismatch.code, 0]
    assert range_.value(b"c") == range_.value(b"d") == b"1"


def test_trap_04_an_entry_made_at_another_span_generation_is_refused_when_applied() -> None:
    """TRAPS 4: the epoch is checked when proposed and again when applied, equal and not merely newer."""
    range_, client = World(world.descriptor(epoch=Epoch(3, 5))), Client()
    for generation in (4, 6):
        outcomes = range_.do(client, client.put(b"a", b""), client.increment(b"n"), generation=generation)
        assert [code(outcome) for outcome in outcomes] == [errors.EpochMismatch.code] * 2
    assert range_.get(b"a") is None
    assert range_.machine.sessions(range_.engine).sessions == {}
    assert code(range_.do(client, client.put(b"a", b""), generation=5)) == 0


def test_replicated_time_includes_this_entrys_stamp_and_never_falls() -> None:
    range_, client = World(), Client()
    range_.do(client, client.put(b"k", b""))
    assert timestamp_ms(range_.machine.last_timestamp) == world.NOW_MS
    range_.now_ms += 1_000
    range_.write()
    assert range_.machine.last_timestamp == timestamp_at(world.NOW_MS + 1_000)
    range_.now_ms -= 900
    range_.write()
    assert range_.machine.last_timestamp == timestamp_at(world.NOW_MS + 1_000) + 1


def test_an_unknown_operation_or_kind_stops_the_node_instead_of_diverging() -> None:
    range_, client = World(), Client()
    client.sequence += 1
    strange = commands.seal(commands.Op.DELETE, commands.pack_delete(b"k"), 1, world.NOW_MS, 1)
    strange = strange[:1] + b"\x09" + strange[2:]
    with pytest.raises(errors.Corruption):
        range_.do(client, strange)


def test_a_leaders_first_entry_is_empty_and_moves_only_the_applied_row() -> None:
    range_ = World()
    before = range_.rows()
    applied = range_.apply(b"")
    assert applied.outcomes == ()
    assert range_.machine.applied_index == 11
    assert len([row for row in range_.rows() if row not in before]) == 1
