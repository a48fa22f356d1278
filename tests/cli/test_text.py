"""Escapes, base64 and the JSON rules of DESIGN 2.2."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardkv.cli import text
from shardkv.cli.shell_language import SyntaxProblem, parse, quoted
from shardkv.json_rules import to_json


@given(st.binary())
def test_what_is_shown_can_be_typed_back(data: bytes) -> None:
    r"""DESIGN 2.2: keys and values on the command line are UTF-8 with \xNN and \\ escapes, or --base64."""
    assert text.unescape(text.escape(data)) == data
    assert text.escape(data).isprintable()
    assert text.read(text.show(data, True), True) == data


@given(st.binary(min_size=1))
def test_what_is_shown_and_quoted_is_one_word_of_the_shell(data: bytes) -> None:
    [[word]] = parse(quoted(text.escape(data)))
    assert text.unescape(word) == data


@pytest.mark.parametrize(
    "typed, data",
    [
        ("plain", b"plain"),
        ("é", "é".encode()),
        (r"a\x00\xff\\", b"a\x00\xff\\"),
        (r"\\x41", rb"\x41"),
        ("\udcff", b"\xff"),
    ],
)
def test_escapes_stand_for_bytes(typed: str, data: bytes) -> None:
    assert text.unescape(typed) == data


@pytest.mark.parametrize("typed", ["\\", "a\\n", r"\x4", r"\xgg", r"\X41", "\\é"])
def test_another_escape_is_refused_rather_than_guessed(typed: str) -> None:
    """The message shows it as it was typed: it doubled the backslash, which is what it asks for."""
    with pytest.raises(ValueError) as refused:
        text.unescape(typed)
    shown, _, rest = str(refused.value).partition(" ")
    assert shown in typed
    assert rest == r"is no escape; write \xNN for a byte and \\ for a backslash"


def test_one_is_no_plural() -> None:
    """`imported 1 keys`."""
    assert [text.counted(count, "key") for count in (0, 1, 2_000)] == ["0 keys", "1 key", "2,000 keys"]


@pytest.mark.parametrize("typed", ["a", "é", "YQ=", "YQ==\n", "Y Q=="])
def test_what_is_not_base64_is_refused(typed: str) -> None:
    with pytest.raises(ValueError, match="base64"):
        text.read(typed, True)


def test_json_renames_what_is_not_utf8_and_writes_versions_as_text() -> None:
    """DESIGN 2.2: versions are decimal strings, a field that is not UTF-8 is renamed with _base64."""
    document = to_json({"key": b"\xff", "value": "é".encode(), "version": 2**60, "bytes": 3, "end": None})
    assert json.loads(document) == {
        "key_base64": "/w==",
        "value": "é",
        "version": str(2**60),
        "bytes": 3,
        "end": None,
    }


@given(st.binary())
def test_a_json_field_reads_back_as_the_same_bytes(data: bytes) -> None:
    fields = json.loads(to_json({"key": data}))
    assert text.bytes_from_json(fields, "key") == data


@pytest.mark.parametrize(
    "fields", [{"key": 3}, {"key": ["a"]}, {"key_base64": "?"}, {"key_base64": 1}, {"key": "\ud800"}]
)
def test_a_json_field_of_another_shape_is_refused(fields: dict[str, object]) -> None:
    with pytest.raises(ValueError):
        text.bytes_from_json(fields, "key")


@pytest.mark.parametrize(
    "line, commands",
    [
        ("", []),
        ("  ;; ", []),
        ("put a 1; get a", [["put", "a", "1"], ["get", "a"]]),
        ("put 'a b' \"c;d\"", [["put", "a b", "c;d"]]),
        ("put a ''", [["put", "a", ""]]),
        (r"get a\x20\\", [["get", r"a\x20\\"]]),
        ("get a # the rest", [["get", "a"]]),
        ("get a#b", [["get", "a#b"]]),
        ("get a'b c'd", [["get", "ab cd"]]),
        ("# first\nput a 1 # one; two\r\n\nget a\n", [["put", "a", "1"], ["get", "a"]]),
        ("put a 'b\nc # d'", [["put", "a", "b\nc # d"]]),
    ],
)
def test_a_line_of_the_shell_is_words_and_commands(line: str, commands: list[list[str]]) -> None:
    assert parse(line) == commands


@pytest.mark.parametrize("line", ["get 'a", 'get "', "put a 'b; get a"])
def test_a_quote_without_its_end_is_refused(line: str) -> None:
    with pytest.raises(SyntaxProblem, match="no end"):
        parse(line)
