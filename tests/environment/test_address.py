"""``host:port`` in, the parts or an example out."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardkv.address import Address, parse_address, parse_addresses
from shardkv.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("127.0.0.1:7001", "127.0.0.1", 7001),
        ("localhost:65535", "localhost", 65535),
        ("[::1]:7001", "::1", 7001),
        (" db-1.example.com:1 ", "db-1.example.com", 1),
    ],
)
def test_an_address_is_taken_apart_and_put_together(text: str, host: str, port: int) -> None:
    address = parse_address(text)
    assert address == Address(host, port)
    assert str(address) == text.strip()


@pytest.mark.parametrize(
    "text",
    [
        *("", "host", ":7001", "host:", "host:0", "host:65536", "host:x", "host:٣", "host:-1", "::1:7001", "[host]:1"),
        *("[]:1", "a b:1", "http://h:1", "h:1:2", "user@h:1", "h" * 300 + ":1", "h:123456"),
    ],
)
def test_anything_else_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ConfigError, match=r"for example 127\.0\.0\.1:7001"):
        parse_address(text)


@pytest.mark.parametrize("text", ["::1:7001", "fe80::1", "h:1:2", "a:1 b:2", "a:1;b:2"])
def test_several_colons_are_told_where_they_may_stand(text: str) -> None:
    """A list without commas was told that its host is an IPv6 address."""
    with pytest.raises(ConfigError, match="an IPv6 host stands in brackets, and several addresses have commas between"):
        parse_address(text)


def test_port_zero_is_for_listeners() -> None:
    assert parse_address("h:0", port_zero=True) == Address("h", 0)


def test_a_list_keeps_its_order_and_drops_repetitions() -> None:
    assert parse_addresses("b:1, a:2,,b:1") == (Address("b", 1), Address("a", 2))
    with pytest.raises(ConfigError, match="no address given"):
        parse_addresses(" , ")


@given(st.text(max_size=40))
def test_no_text_raises_anything_but_a_config_error(text: str) -> None:
    try:
        address = parse_address(text)
    except ConfigError:
        return
    assert parse_address(str(address)) == address


@pytest.mark.parametrize("given", [["a:1", "b:2"], ("a", 1), b"a:1", None])
def test_addresses_that_are_no_string_are_refused_with_an_example(given: Any) -> None:
    with pytest.raises(ConfigError, match=r"one string, not .*127\.0\.0\.1:7001"):
        parse_addresses(given)
