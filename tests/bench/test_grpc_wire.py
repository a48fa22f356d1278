"""The small gRPC client: RFC 9113 frames, RFC 7541 literals, protobuf fields as etcd's rpc.proto numbers them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardkv_bench import grpc_wire as wire
from shardkv_bench.etcd import EtcdConnection
from shardkv_bench.etcd_driver import _Connection, _Loop
from shardkv_bench.worker import Measurement
from tests.bench.grpc_server import serving


def ended(calls: wire.Calls, data: bytes) -> list[tuple[int, bytes | None]]:
    return list(calls.feed(data))


def answer(stream: int, message: bytes) -> bytes:
    return (
        wire.frame(wire.HEADERS, wire.END_HEADERS, stream, b"\x88")
        + wire.frame(wire.DATA, 0, stream, b"\0" + len(message).to_bytes(4, "big") + message)
        + wire.frame(wire.HEADERS, wire.END_HEADERS | wire.END_STREAM, stream, b"")
    )


def test_a_call_is_a_headers_and_a_data_frame_that_ends_its_stream() -> None:
    calls = wire.Calls("h:1")
    calls.outgoing.clear()
    assert calls.call("/p", b"message") == 1
    block = wire.header_block("/p", "h:1")
    assert bytes(calls.outgoing) == wire.frame(wire.HEADERS, wire.END_HEADERS, 1, block) + wire.frame(
        wire.DATA, wire.END_STREAM, 1, b"\0\0\0\0\x07message"
    )
    assert calls.call("/p", b"") == 3


def test_the_headers_are_literals_that_need_no_dynamic_table() -> None:
    """RFC 7541 6.2.2: literal without indexing; 0x83 and 0x86 stand in the static table."""
    assert wire.header_block("/p", "h:1") == (
        b"\x83\x86\x04\x02/p\x01\x03h:1\x0f\x10\x10application/grpc\x00\x02te\x08trailers"
    )


@given(st.integers(1, 40))
def test_answers_are_found_however_the_bytes_are_cut(size: int) -> None:
    calls = wire.Calls("h:1")
    first, second = calls.call("/p", b"a"), calls.call("/p", b"b")
    data = wire.frame(wire.SETTINGS, 0, 0) + answer(second, b"two") + answer(first, b"one")
    found = []
    for position in range(0, len(data), size):
        found += ended(calls, data[position : position + size])
    assert found == [(second, b"two"), (first, b"one")]


def test_a_call_that_ends_without_a_message_has_failed() -> None:
    """gRPC over HTTP/2: a unary call that fails has no DATA frame ("Trailers-Only")."""
    calls = wire.Calls("h:1")
    one, two = calls.call("/p", b""), calls.call("/p", b"")
    assert ended(calls, wire.frame(wire.HEADERS, wire.END_HEADERS | wire.END_STREAM, one, b"x")) == [(one, None)]
    assert ended(calls, wire.frame(wire.RST_STREAM, 0, two, b"\0\0\0\x08")) == [(two, None)]


def test_settings_and_pings_are_acknowledged_and_goaway_ends_the_connection() -> None:
    calls = wire.Calls("h:1")
    calls.outgoing.clear()
    assert ended(calls, wire.frame(wire.SETTINGS, 0, 0) + wire.frame(wire.PING, 0, 0, b"12345678")) == []
    assert bytes(calls.outgoing) == wire.frame(wire.SETTINGS, wire.ACK, 0) + wire.frame(
        wire.PING, wire.ACK, 0, b"12345678"
    )
    calls.outgoing.clear()
    assert ended(calls, wire.frame(wire.SETTINGS, wire.ACK, 0) + wire.frame(wire.PING, wire.ACK, 0, b"12345678")) == []
    assert not calls.outgoing
    with pytest.raises(wire.CallsRefused):
        ended(calls, wire.frame(wire.GOAWAY, 0, 0, b"\0" * 8 + b"bye"))


def test_no_more_is_sent_than_the_window_takes() -> None:
    """RFC 9113 5.2: DATA counts against the connection's window."""
    calls = wire.Calls("h:1")
    while calls.window >= 10_005:
        calls.call("/p", b"x" * 10_000)
    with pytest.raises(wire.CallsRefused, match="window"):
        calls.call("/p", b"x" * 10_000)
    ended(calls, wire.frame(wire.WINDOW_UPDATE, 0, 0, (20_000).to_bytes(4, "big")))
    calls.call("/p", b"x" * 10_000)


def test_the_receive_window_is_opened_again_before_it_is_used_up() -> None:
    calls = wire.Calls("h:1")
    calls.outgoing.clear()
    calls._received = wire.RECEIVE_WINDOW // 2 - 1
    stream = calls.call("/p", b"")
    calls.outgoing.clear()
    ended(calls, answer(stream, b"abc"))
    assert bytes(calls.outgoing[:9]) == wire.frame(wire.WINDOW_UPDATE, 0, 0, b"\0\0\0\0")[:9]


@given(st.integers(0, (1 << 64) - 1))
def test_varints_read_back(value: int) -> None:
    assert wire.fields_of(b"\x08" + wire.varint(value)) == {1: value}


def test_requests_have_the_fields_of_the_published_protocol() -> None:
    assert wire.range_request(b"k") == b"\x0a\x01k"
    assert wire.put_request(b"k", b"v" * 200) == b"\x0a\x01k\x12\xc8\x01" + b"v" * 200
    assert wire.put_transaction([(b"a", b"1"), (b"b", b"2")]) == (
        b"\x12\x08\x12\x06\x0a\x01a\x12\x011" + b"\x12\x08\x12\x06\x0a\x01b\x12\x012"
    )


def test_a_member_leads_when_the_leader_is_itself() -> None:
    header = b"\x08\x05\x10\x07"
    assert wire.leads(b"\x0a\x04" + header + b"\x20\x07")
    assert not wire.leads(b"\x0a\x04" + header + b"\x20\x08")
    assert not wire.leads(b"\x20\x07")


@pytest.mark.parametrize("message", [b"\x08", b"\x08\xff", b"\x0b"])
def test_a_message_that_is_cut_off_or_of_an_unknown_wire_type_is_refused(message: bytes) -> None:
    with pytest.raises(ValueError):
        wire.fields_of(message)


def test_a_connection_makes_single_calls() -> None:
    with serving(b"\x08\x01") as server, EtcdConnection(server.address) as connection:
        assert connection.request("/p", b"m", 10.0) == b"\x08\x01"
        assert connection.request("/p", b"m", 10.0) == b"\x08\x01"
        server.answer = None
        assert connection.request("/p", b"m", 10.0) is None


def test_calls_that_the_window_does_not_take_are_started_when_it_does() -> None:
    """A server opens its window when it likes; until then a load of large transactions waits, and goes on by itself."""
    left = [("/p", b"x" * 16_000, 1)] * 9

    def source() -> tuple[str, bytes, int] | None:
        return left.pop() if left else None

    with serving() as server:
        connection = _Connection(server.address)
        measurement = Measurement()
        measurement.begin()
        loop = _Loop([connection], source, measurement)
        loop.fill(7)
        assert (len(connection.under_way), connection.owed) == (4, 3), "of 65,535 bytes"
        loop.run(None)
        loop.close()
        assert (server.calls, connection.owed, connection.under_way) == (9, 0, {})
        assert not measurement.errors
