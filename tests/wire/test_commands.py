"""Commands and requests on the wire, and the CBOR that carries them: what goes in comes out, enemies get nowhere."""

import copy
import inspect
import pickle
from typing import Any

import cbor2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardkv import codec, errors
from shardkv.types import KEY_BYTES_MAX, VALUE_BYTES_MAX, Epoch, KeyRange, RangeDescriptor, RangeId
from shardkv.wire import commands, requests
from shardkv.wire.commands import Op

U64 = (1 << 64) - 1
KEYS = st.binary(min_size=1, max_size=40)
NUMBERS = st.integers(0, U64)
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 64), U64) | st.binary(max_size=20) | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=12,
)


def problem(command: Any) -> str | None:
    return commands.validate(command, KEY_BYTES_MAX, VALUE_BYTES_MAX)


def put(**changes: Any) -> list[Any]:
    """A sound PUT, with some fields replaced by position name."""
    names = ("op", "sequence", "issued_at", "below", "digest", "key", "value", "condition")
    return list((dict(zip(names, (0, 1, 2, 1, 3, b"k", b"v", None))) | changes).values())


# Commands


@given(
    st.lists(
        st.tuples(st.just(Op.PUT), KEYS, st.binary(max_size=300), st.none() | NUMBERS)
        | st.tuples(st.just(Op.DELETE), KEYS, st.none() | NUMBERS)
        | st.tuples(st.just(Op.INCREMENT), KEYS, st.integers(-(1 << 63), (1 << 63) - 1))
        | st.tuples(st.just(Op.DELETE_RANGE), st.binary(max_size=40), st.none()),
        max_size=30,
    ),
    NUMBERS,
)
def test_commands_come_out_as_they_were_sealed(packed: list[Any], number: int) -> None:
    pack = {
        Op.PUT: commands.pack_put,
        Op.DELETE: commands.pack_delete,
        Op.INCREMENT: commands.pack_increment,
        Op.DELETE_RANGE: commands.pack_delete_range,
    }
    sealed = [commands.seal(op, pack[op](*arguments), number, 5, 1) for op, *arguments in packed]
    decoded = commands.decode(commands.join(sealed))
    assert [[command[0], *command[commands.KEY :]] for command in decoded] == [list(fields) for fields in packed]
    assert all(command[1:4] == [number, 5, 1] for command in decoded)
    assert [problem(command) for command in decoded] == [None] * len(decoded)


def test_the_bytes_of_a_command_are_fixed() -> None:
    """A retry of an old client must be the same bytes for ever."""
    sealed = commands.seal(Op.PUT, commands.pack_put(b"k", b"v", 7), 1, 2, 3)
    assert sealed.hex() == (
        "88" "00" "1b0000000000000001" "1b0000000000000002" "1b0000000000000003" "1add8314dd"
        "5900016b" "5a0000000176" "1b0000000000000007"
    )  # fmt: skip
    assert sealed == commands.seal(Op.PUT, commands.pack_put(b"k", b"v", 7), 1, 2, 3)
    assert sealed in commands.join([sealed])


def test_the_digest_covers_the_operation_and_the_body() -> None:
    """By it a sequence that comes again with other content is found out."""
    bodies = [
        (Op.PUT, commands.pack_put(b"k", b"v")),
        (Op.PUT, commands.pack_put(b"k", b"w")),
        (Op.PUT, commands.pack_put(b"l", b"v")),
        (Op.PUT, commands.pack_put(b"k", b"v", 0)),
        (Op.DELETE, commands.pack_delete(b"k")),
        (Op.DELETE, commands.pack_delete(b"k", 0)),
        (Op.INCREMENT, commands.pack_increment(b"k", 1)),
        (Op.INCREMENT, commands.pack_increment(b"k", -2)),
        (Op.DELETE_RANGE, commands.pack_delete_range(b"k", None)),
    ]
    [decoded] = [commands.decode(commands.join([commands.seal(op, body, 1, 1, 1) for op, body in bodies]))]
    assert len({command[commands.DIGEST] for command in decoded}) == len(bodies)


@pytest.mark.parametrize(
    "command",
    [
        None,
        {},
        [],
        put()[:6],
        (*put(),),
        *(put(**{name: value}) for name in ("sequence", "issued_at", "below", "digest") for value in (
            -1, 1 << 64, None, True, 1.0, b"1", "1", [1]
        )),
        put(digest=1 << 32),
        *(put(op=value) for value in (4, -1, 1, True, None, b"\0", 1 << 64, [0], {})),
        *(put(key=value) for value in (b"", b"k" * (KEY_BYTES_MAX + 1), "k", None, 1, [b"k"])),
        *(put(value=value) for value in (b"v" * (VALUE_BYTES_MAX + 1), "v", None, 1, [b"v"])),
        *(put(condition=value) for value in (-1, 1 << 64, True, b"1", 1.0)),
        [*put(), None],
        put()[:7],
        [1, 1, 2, 1, 3, b"k", -1],
        [1, 1, 2, 1, 3, b"k", True],
        [1, 1, 2, 1, 3, b"k", None, None],
        [1, 1, 2, 1, 3, b"", None],
        *([2, 1, 2, 1, 3, b"k", delta] for delta in (1 << 63, -(1 << 63) - 1, None, True, 1.0, b"1")),
        [2, 1, 2, 1, 3, b"", 1],
        *([3, 1, 2, 1, 3, b"k", end] for end in (b"k", b"a", b"", "z", 1, b"z" * (KEY_BYTES_MAX + 2))),
        [3, 1, 2, 1, 3, b"k" * (KEY_BYTES_MAX + 1), None],
        [3, 1, 2, 1, 3, None, None],
    ],
    ids=lambda command: repr(command)[:60],
)  # fmt: skip
def test_a_command_of_any_other_shape_is_refused(command: Any) -> None:
    """Commands come from anybody, and what passes here is copied into the log and trusted ever after."""
    assert problem(command) is not None


@pytest.mark.parametrize(
    "command",
    [
        put(),
        put(key=b"k" * KEY_BYTES_MAX, value=b"v" * VALUE_BYTES_MAX, condition=U64),
        put(sequence=U64, issued_at=U64, below=U64, digest=(1 << 32) - 1),
        put(value=b"", condition=0),
        [1, 1, 2, 1, 3, b"k", U64],
        [2, 1, 2, 1, 3, b"k", -(1 << 63)],
        [2, 1, 2, 1, 3, b"k", (1 << 63) - 1],
        [3, 1, 2, 1, 3, b"", None],
        [3, 1, 2, 1, 3, b"", b"\0"],
        [3, 1, 2, 1, 3, b"k" * KEY_BYTES_MAX, b"k" * KEY_BYTES_MAX + b"\0"],
    ],
    ids=lambda command: repr(command)[:60],
)
def test_commands_at_the_limits_pass(command: Any) -> None:
    assert problem(command) is None


@given(st.lists(PLAIN, max_size=9))
def test_validate_never_raises_whatever_the_decoder_made(command: list[Any]) -> None:
    assert problem(command) is None or isinstance(problem(command), str)


@pytest.mark.parametrize("data", [b"", b"\xa0", b"\x01", b"\x81", b"\x80\x80", b"\x9f\xff"])
def test_a_command_array_of_another_shape_is_malformed(data: bytes) -> None:
    with pytest.raises(errors.MalformedRequest):
        commands.decode(data)


# Requests


def test_requests_and_responses_come_out_as_they_went_in() -> None:
    payload = requests.join(
        [
            requests.encode_request(1, requests.Method.WRITE, 2, 3, 4, b"s" * 16, b"\x80"),
            requests.encode_request(9, requests.Method.NODES, 0, 0, 0),
        ]
    )
    assert requests.decode_requests(payload) == [
        requests.Request(1, requests.Method.WRITE, 2, 3, 4, [b"s" * 16, b"\x80"]),
        requests.Request(9, requests.Method.NODES, 0, 0, 0, []),
    ]
    descriptor = RangeDescriptor(RangeId(1), KeyRange(b"", None), Epoch(1, 1), ())
    refusal = errors.EpochMismatch(current=(descriptor,))
    answers = requests.decode_responses(
        requests.join([requests.encode_response(1, 5, [True]), requests.encode_error(9, 6, refusal)])
    )
    assert answers[0] == requests.Response(1, 5, [True], None)
    assert (answers[1].id, answers[1].timestamp, answers[1].result) == (9, 6, None)
    assert isinstance(answers[1].error, errors.EpochMismatch)
    assert answers[1].error.current == (descriptor,)


@pytest.mark.parametrize("request_id", [0, 23, (1 << 64) - 1, -1, -(1 << 64)])
def test_an_answer_goes_to_a_request_of_any_number(request_id: int) -> None:
    """Usual ones are packed at once, others encoded one by one; both are the same CBOR to a reader."""
    (answer,) = requests.decode_responses(requests.join([requests.encode_response(request_id, 1 << 60, [7, None])]))
    assert answer == requests.Response(request_id, 1 << 60, [7, None], None)


@pytest.mark.parametrize(
    "value",
    [1, {}, [1], [[1, 2, 3, 4]], [["1", 1, 1, 1, 1]], [[1, 1, 1, 1, None]], [[]]],
)
def test_a_request_frame_of_another_shape_is_malformed(value: object) -> None:
    with pytest.raises(errors.MalformedRequest):
        requests.decode_requests(codec.dumps(value))


@pytest.mark.parametrize(
    "value", [1, [1], [[1, 0, 1]], [[1, 5, 1, "text"]], [[1, 5, 1, [1, 2, 3]]], [[1, "0", 1, None]], [[1, 5, 1, []]]]
)
def test_a_response_frame_of_another_shape_is_malformed(value: object) -> None:
    with pytest.raises(errors.MalformedRequest):
        requests.decode_responses(codec.dumps(value))


def test_a_frame_holds_a_bounded_number_of_requests() -> None:
    one = requests.encode_request(1, 2, 3, 4, 5)
    assert len(requests.decode_requests(requests.join([one] * requests.REQUESTS_PER_FRAME_MAX))) == 4_096
    with pytest.raises(errors.MalformedRequest):
        requests.decode_requests(requests.join([one] * (requests.REQUESTS_PER_FRAME_MAX + 1)))


# Errors on the wire


def every_error() -> list[type[errors.ShardKVError]]:
    return [cls for _, cls in inspect.getmembers(errors, inspect.isclass) if issubclass(cls, errors.ShardKVError)]


@pytest.mark.parametrize("cls", every_error(), ids=lambda cls: cls.__name__)
def test_every_error_travels_as_itself(cls: type[errors.ShardKVError]) -> None:
    error = cls("why")
    back = errors.from_wire(codec.loads(codec.dumps(errors.to_wire(error))))
    assert type(back) is cls
    assert str(back) == "why"


@pytest.mark.parametrize("cls", every_error(), ids=lambda cls: cls.__name__)
def test_every_error_is_pickled_and_copied_as_itself(cls: type[errors.ShardKVError]) -> None:
    """A pool of processes waits for ever for an error that it cannot read."""
    error = cls("why")
    if isinstance(error, errors.BatchError):
        error = errors.BatchError("why", consumed=3, failed=(b"a", b"b"))
    for back in (pickle.loads(pickle.dumps(error)), copy.copy(error), copy.deepcopy(error)):
        assert type(back) is cls
        assert str(back) == "why"
        assert vars(back) == vars(error)


def test_what_an_error_knows_travels_with_it() -> None:
    for error, attribute in (
        (errors.VersionMismatch(current=U64), "current"),
        (errors.NotLeader(hint=3), "hint"),
        (errors.NotLeader(), "hint"),
    ):
        back = errors.from_wire(codec.loads(codec.dumps(errors.to_wire(error))))
        assert getattr(back, attribute) == getattr(error, attribute)


def test_an_unknown_error_code_becomes_the_base_and_another_shape_is_refused() -> None:
    assert type(errors.from_wire([9_999, "new", [1]])) is errors.ShardKVError
    for shape in (None, [1], [1, 2, []], [1, "x", None], ["1", "x", []]):
        with pytest.raises(ValueError):
            errors.from_wire(shape)


# CBOR


@given(PLAIN)
def test_plain_values_survive_the_codec(value: object) -> None:
    data = codec.dumps(value)
    assert codec.loads(data) == value
    assert codec.loads_own(data) == value


def is_plain(value: object) -> bool:
    if isinstance(value, dict):
        return all(type(key) in (str, bytes) and is_plain(inner) for key, inner in value.items())
    if isinstance(value, list):
        return all(map(is_plain, value))
    return value is None or type(value) in (bool, int, float, bytes, str, cbor2.CBORSimpleValue, type(cbor2.undefined))


@given(st.binary(max_size=60))
def test_any_bytes_are_a_plain_value_or_malformed(data: bytes) -> None:
    try:
        value = codec.loads(data)
    except errors.MalformedRequest:
        return
    assert is_plain(value)


@pytest.mark.parametrize("tag", [0, 1, 2, 4, 25, 28, 29, 35, 36, 37, 256, 258, 1004, 43_000, 55_799, 70_000])
def test_tags_build_nothing(tag: int) -> None:
    """A tag would make objects of the sender's choice: dates, patterns, shared and cyclic values."""
    for inner in (b"\x00", b"\x40", b"\x60", b"\x80", b"\x82\x01\x02"):
        with pytest.raises(errors.MalformedRequest):
            codec.loads(b"\xda" + tag.to_bytes(4, "big") + inner)


@pytest.mark.parametrize(
    "data",
    [
        b"\x01\x01",
        b"\x9f\x01\xff",
        b"\x5f\x41a\xff",
        b"\x81" * (codec.DEPTH_MAX + 2) + b"\x01",
        b"\x9b" + b"\xff" * 8,
        b"\x5b\x00\x00\x00\x7f\xff\xff\xff\xff",
        b"\xbb" + b"\xff" * 8,
        b"\xa1\x80\x01",
        b"\x61\xff",
    ],
)
def test_trailing_bytes_indefinite_lengths_depth_and_false_lengths_are_malformed(data: bytes) -> None:
    with pytest.raises(errors.MalformedRequest):
        codec.loads(data)


@given(st.integers(0, U64))
def test_heads_are_what_cbor_says(number: int) -> None:
    assert cbor2.loads(codec.unsigned(number)) == number
    assert codec.unsigned(number) == cbor2.dumps(number)
    if number < 70_000:
        assert codec.bytes_head(number) == cbor2.dumps(b"x" * number)[: -number or None]
        assert codec.array_head(number) == cbor2.dumps([0] * number)[: -number or None]
