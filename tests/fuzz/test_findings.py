"""What the fuzzer has found, one test for each: input that once ended in an error which nobody expects."""

import io
import tracemalloc
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from shardkv import codec, errors
from shardkv.cli import records
from shardkv.cli.records import BadRecord
from shardkv.cli.root import shardkv
from shardkv.config_sources import load_node_config
from shardkv.errors import BatchError, ConfigError, Corruption, MalformedRequest, ProtocolError
from shardkv.machine import entries, rows
from shardkv.multiraft.snapshot_parts import decode_begin
from shardkv.wire import commands, handshake, raft_codec, requests
from tests.fuzz import samples

GIVEN = {"name": "n1", "data": "/d", "listen": "h:1"}


@pytest.mark.parametrize("details", [[], [3], [3, [b"a"]], ["x", None], [3, [1]]])
def test_a_batch_error_from_the_wire_is_an_error_whatever_its_details(details: list[Any]) -> None:
    fields = [BatchError.code, "stopped", details]
    found = errors.from_wire(fields)
    assert isinstance(found, BatchError)
    assert str(found) == "stopped"
    assert requests.decode_responses(codec.dumps([[1, BatchError.code, 0, fields]]))[0].error is not None
    assert handshake.decode_refused(handshake.MAGIC + codec.dumps(fields)).error is not None


def test_a_batch_error_goes_over_the_wire_with_what_it_says() -> None:
    found = errors.from_wire(codec.loads(codec.dumps(errors.to_wire(BatchError("x", consumed=3, failed=(b"a", b"b"))))))
    assert isinstance(found, BatchError)
    assert (found.consumed, found.failed) == (3, (b"a", b"b"))


@pytest.mark.parametrize(
    "end", [[], [1, 2], [3, b"f", 8, 9], [3, b"f", 8, [9]], [3, b"f", 8, [[]]], [3, b"f", 8, [[1]]]]
)
def test_a_split_entry_out_of_shape_is_corruption(end: list[Any]) -> None:
    entry = [entries.ENTRY_FORMAT, entries.EntryKind.SPLIT, 1 << 60, 9, *end]
    with pytest.raises(Corruption):
        entries.split_command(entry)


@pytest.mark.parametrize("added", [[1], [[]], [[1]], [["a", 2]], [[1, None]], [[1, 2, 3]], [[1, -2]], [[True, 2]]])
def test_the_context_of_a_membership_change_out_of_shape_is_corruption(added: list[Any]) -> None:
    with pytest.raises(Corruption):
        entries.decode_membership(codec.dumps([entries.ENTRY_FORMAT, added]))


@pytest.mark.parametrize("entry", [[-12, 0, b"x"], [True, 0, b"x"], [5, True, b"x"]])
def test_a_raft_entry_with_a_term_that_is_no_unsigned_integer_is_malformed(entry: list[Any]) -> None:
    """The log packs terms as unsigned 64-bit integers."""
    message = [7, 12, 11, 3, 5, 4, 10, 9, False, 0, 0, b"", 0, 0, [entry]]
    with pytest.raises(MalformedRequest):
        raft_codec.decode(codec.dumps([message]))


def test_raft_entries_that_would_pass_the_last_index_are_malformed() -> None:
    message = [7, 12, 11, 3, 5, 4, (1 << 63) - 1, 9, False, 0, 0, b"", 0, 0, [[5, 0, b"x"]]]
    with pytest.raises(MalformedRequest):
        raft_codec.decode(codec.dumps([message]))


@pytest.mark.parametrize("sender", [-7, 0, True, 1 << 63])
def test_a_snapshot_from_an_impossible_replica_is_refused(sender: int) -> None:
    begin = codec.loads(samples.BEGINS[0])
    assert decode_begin(begin)
    begin[4] = sender
    with pytest.raises((ProtocolError, MalformedRequest)):
        decode_begin(begin)


@pytest.mark.parametrize("range_id", [-7, True])
def test_a_snapshot_of_a_range_with_an_impossible_id_is_refused(range_id: int) -> None:
    begin = codec.loads(samples.BEGINS[0])
    begin[2] = begin[9][0] = range_id
    with pytest.raises((ProtocolError, MalformedRequest)):
        decode_begin(begin)


@pytest.mark.parametrize(
    "text",
    [
        b"k\r,v\rx\n",
        b"\rkey,value\n",
        b'"key,value\n' + b"x" * 200_000,
    ],
)
def test_a_csv_header_that_is_none_is_a_bad_record(text: bytes) -> None:
    with pytest.raises(BadRecord):
        list(records.read_records(io.BytesIO(text), "csv"))


@pytest.mark.parametrize("item", [b"\x80", b"\xa0", b"\x81\x80"])
def test_a_large_frame_of_tiny_items_is_refused_before_it_is_decoded(item: bytes) -> None:
    """A frame of 16 MiB of empty arrays would be a gigabyte of lists, and seconds of the loop's time."""
    count = 8 * 1024 * 1024 // len(item)
    payload = codec.array_head(1) + codec.array_head(5 + count) + b"\x01" * 5 + item * count
    for decode in (requests.decode_requests, commands.decode):
        tracemalloc.start()
        try:
            with pytest.raises(MalformedRequest, match="items"):
                decode(payload)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert peak < 100_000


def test_the_largest_requests_that_clients_send_are_below_the_bound_on_items() -> None:
    keys = [b"key%08d" % number * 8 for number in range(requests.GET_KEYS_MAX)]
    payload = requests.join([requests.encode_request(number, 1, 7, 9, 5, 0, keys) for number in range(10)])
    assert len(payload) > codec.UNCOUNTED_BYTES_MAX
    assert len(requests.decode_requests(payload)) == 10
    sealed = [commands.seal(0, commands.pack_put(b"k%d" % each, bytes(1000)), each, 5, 0) for each in range(1024)]
    assert len(commands.decode(commands.join(sealed))) == 1024


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers(-(1 << 64), (1 << 64) - 1)
        | st.floats()
        | st.binary(max_size=300)
        | st.text(max_size=300),
        lambda inner: st.lists(inner, max_size=30) | st.dictionaries(st.text(), inner, max_size=5),
        max_leaves=100,
    )
)
def test_items_are_counted_as_they_are_encoded(value: Any) -> None:
    def count(value: Any) -> int:
        if isinstance(value, list):
            return 1 + sum(map(count, value))
        return 1 + sum(1 + count(each) for each in value.values()) if isinstance(value, dict) else 1

    assert codec.count_items(codec.dumps(value), 1 << 30) == count(value)


@pytest.mark.parametrize("data", ["", "18", "5b7fffffffffffffff", "9f00ff", "81", "ff", "1c", "5f"])
def test_counting_items_ends_with_whatever_is_there(data: str) -> None:
    assert codec.count_items(bytes.fromhex(data), 100) <= len(data)


def test_a_column_of_a_csv_header_may_be_as_long_as_a_field() -> None:
    """The bound on fields is raised before the first line is read, not behind it."""
    assert not list(records.read_records(io.BytesIO(b"key,value," + b"v" * 200_000 + b"\n"), "csv"))


@pytest.mark.parametrize(
    "conf_state", [[[1], ["a"], [], [], False], [[-1], [], [], [], False], [[True], [], [], [], 0]]
)
def test_an_applied_row_whose_replicas_are_no_ids_is_corruption(conf_state: list[Any]) -> None:
    row = rows.pack_applied(100, 5, 1 << 60, codec.dumps(conf_state))
    with pytest.raises(Corruption):
        rows.unpack_applied(row)


@pytest.mark.parametrize("text", [b"[" * 100_000, b'{"a":' * 100_000, b'{"key": "a", "value": ' + b"9" * 5000 + b"}"])
def test_json_nested_without_an_end_is_a_bad_record(text: bytes) -> None:
    with pytest.raises(BadRecord):
        list(records.read_records(io.BytesIO(text + b"\n"), "jsonl"))


@pytest.mark.parametrize(
    "text",
    [
        "x = " + "9" * 5000,
        "[raft]\ntick_ms = 0x" + "f" * 5000,
        "[raft]\ntick_ms = 0b" + "1" * 20_000,
        "x = " + "[" * 100_000,
        "x = " + "{a=" * 100_000,
        "[" + "a." * 5_000 + "b]\n",
        "log_level = 0x" + "f" * 5000,
        "join = [0x" + "f" * 5000 + "]",
        "bootstrap = 0x" + "f" * 5000,
        "label = {a = 0x" + "f" * 5000 + "}",
        "[storage]\nsegment_bytes = 0x" + "f" * 5000,
        "[storage]\nsegment_bytes = '" + "9" * 5000 + "'",
        "log_level = " + "[" * 50 + "0x" + "f" * 5000 + "]" * 50,
    ],
)
def test_a_configuration_file_with_the_largest_number_or_the_deepest_nesting_is_a_config_error(text: str) -> None:
    with pytest.raises(ConfigError):
        load_node_config(GIVEN, {}, text, "file.toml")


@pytest.mark.parametrize("value", ["9" * 5000, "9" * 5000 + "MiB", "-1", "1_"])
def test_a_number_too_large_for_a_setting_is_a_config_error_from_a_flag_and_the_environment(value: str) -> None:
    for name in ("tick_ms", "segment_bytes"):
        with pytest.raises(ConfigError):
            load_node_config({**GIVEN, name: value}, {})
        with pytest.raises(ConfigError):
            load_node_config(GIVEN, {f"SHARDKV_{name.upper()}": value})


@pytest.mark.parametrize("name", ["a\0b", "\0", "\ud800"])
@pytest.mark.parametrize("command", ["import", "export"])
def test_a_file_name_that_no_system_takes_is_wrong_usage(command: str, name: str) -> None:
    """Exit code 2; the shell takes any word."""
    result = CliRunner(env={"SHARDKV_CONNECT": "127.0.0.1:1"}).invoke(shardkv, [command, name])
    assert result.exit_code == 2, result.exception
    assert "cannot be a file's name" in result.output
