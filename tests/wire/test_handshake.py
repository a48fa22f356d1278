"""The greetings: every value survives, every other byte string is refused."""

from collections.abc import Callable
from dataclasses import replace

import cbor2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardkv.errors import NotLeader, ProtocolError, VersionUnsupported, WrongCluster
from shardkv.types import LINEAGE_MAX, NodeId
from shardkv.wire.frames import FrameDecoder, FrameKind
from shardkv.wire.handshake import (
    GREETING_BYTES_MAX,
    MAGIC,
    PROTOCOL_VERSION_MAX,
    Hello,
    Refused,
    Role,
    Welcome,
    decode_hello,
    decode_refused,
    decode_welcome,
    encode_hello,
    encode_refused,
    encode_welcome,
    negotiate,
)

CLUSTER = bytes(range(16))
TOKEN = bytes(range(16, 32))
PEER = Hello(Role.PEER, CLUSTER, NodeId(1), NodeId(2), 7, "n1:7001", TOKEN)
UINT64 = st.integers(0, (1 << 64) - 1)
NODE = UINT64.map(NodeId)
CLUSTERS = st.binary(min_size=16, max_size=16)
TOKENS = st.just(b"") | st.binary(min_size=16, max_size=16)


def payload(frame: bytes, kind: FrameKind) -> bytes:
    [decoded] = FrameDecoder(GREETING_BYTES_MAX).feed(frame)
    assert decoded.kind is kind
    return decoded.payload


@given(
    st.builds(Hello, st.just(Role.CLIENT), st.none() | CLUSTERS, st.none() | NODE, st.none() | NODE, UINT64)
    | st.builds(Hello, st.sampled_from(Role), CLUSTERS, NODE, NODE, UINT64, st.none() | st.text(min_size=1), TOKENS)
)
def test_a_hello_survives(hello: Hello) -> None:
    assert decode_hello(payload(encode_hello(hello), FrameKind.HELLO)) == hello


@given(
    st.builds(
        Welcome, st.just(1), st.none() | CLUSTERS, st.none() | NODE, UINT64, UINT64, st.integers(1, 1 << 32), TOKENS
    )
)
def test_a_welcome_survives(welcome: Welcome) -> None:
    assert decode_welcome(payload(encode_welcome(welcome), FrameKind.WELCOME)) == welcome


def test_a_refusal_carries_its_error() -> None:
    refused = decode_refused(payload(encode_refused(WrongCluster("you are of cluster 12")), FrameKind.REFUSED))
    assert type(refused.error) is WrongCluster
    assert str(refused.error) == "you are of cluster 12"
    assert not refused.error.old_copy
    old = decode_refused(payload(encode_refused(WrongCluster("an old copy", old_copy=True)), FrameKind.REFUSED)).error
    assert isinstance(old, WrongCluster)
    assert old.old_copy
    hint = decode_refused(payload(encode_refused(NotLeader("elsewhere", hint=3)), FrameKind.REFUSED)).error
    assert isinstance(hint, NotLeader)
    assert hint.hint == 3


def test_fields_of_a_later_version_are_ignored() -> None:
    """A greeting is read before a version is agreed, so an older program must understand a newer one's."""
    body = cbor2.dumps([1, 9, 1, CLUSTER, 1, 2, 7, "n1:7001", TOKEN, [], {"field": 1}])
    assert decode_hello(MAGIC + body) == replace(PEER, protocol_version_max=9)


def test_a_greeting_of_an_earlier_version_has_no_address_and_no_token() -> None:
    assert decode_hello(MAGIC + cbor2.dumps([1, 1, 1, CLUSTER, 1, 2, 7])) == replace(
        PEER, address=None, start_token=b""
    )


@pytest.mark.parametrize("tokens", ["text", [b"short"], [5], [TOKEN] * LINEAGE_MAX, None])
def test_tokens_of_earlier_starts_that_cannot_be_some_are_refused(tokens: object) -> None:
    with pytest.raises(ProtocolError, match="token"):
        decode_hello(MAGIC + cbor2.dumps([1, 1, 1, CLUSTER, 1, 2, 7, "n1:7001", TOKEN, tokens]))
    with pytest.raises(ProtocolError, match="token"):
        decode_welcome(MAGIC + cbor2.dumps([1, CLUSTER, 1, 7, 0, 100, TOKEN, tokens]))


@pytest.mark.parametrize("token", ["text", b"short", b"l" * 17, None, 5])
def test_a_token_that_cannot_be_one_is_refused(token: object) -> None:
    with pytest.raises(ProtocolError, match="token"):
        decode_hello(MAGIC + cbor2.dumps([1, 1, 1, CLUSTER, 1, 2, 7, "n1:7001", token]))
    with pytest.raises(ProtocolError, match="token"):
        decode_welcome(MAGIC + cbor2.dumps([1, CLUSTER, 1, 7, 0, 100, token]))


def test_the_highest_common_version_is_chosen() -> None:
    assert negotiate(replace(PEER, protocol_version_max=9)) == PROTOCOL_VERSION_MAX
    with pytest.raises(VersionUnsupported, match="upgrade the older one"):
        negotiate(replace(PEER, protocol_version_min=2, protocol_version_max=9))


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ([1, 1, 1, CLUSTER, 1, 2], "another shape"),
        ({"a": 1}, "another shape"),
        ([2, 1, 1, CLUSTER, 1, 2, 0], "versions from 2 to 1"),
        ([1, 1, 9, CLUSTER, 1, 2, 0], "unknown role 9"),
        ([1, 1, 1, b"short", 1, 2, 0], "cluster id of 5 bytes"),
        ([1, 1, 1, CLUSTER, -1, 2, 0], "node id out of bounds"),
        ([1, 1, 1, CLUSTER, True, 2, 0], "node id out of bounds"),
        ([1, 1, 1, CLUSTER, "1", 2, 0], "no number"),
        ([1, 1, 1, CLUSTER, 1, 2, -5], "boot counter out of bounds"),
        ([1, 1, 1, CLUSTER, 1, 2, 0, 7], "address that cannot be one"),
        ([1, 1, 1, CLUSTER, 1, 2, 0, "a" * 513], "address that cannot be one"),
        ([1, 1, 1, None, 1, 2, 0], "must name its cluster and both nodes"),
        ([1, 1, 2, CLUSTER, None, 2, 0], "must name its cluster and both nodes"),
        ([1, 1, 3, CLUSTER, 1, None, 0], "must name its cluster and both nodes"),
    ],
)
def test_a_hello_of_another_shape_is_refused(fields: object, reason: str) -> None:
    with pytest.raises(ProtocolError, match=reason):
        decode_hello(MAGIC + cbor2.dumps(fields))


def test_a_stranger_is_told_that_this_is_not_its_port() -> None:
    with pytest.raises(ProtocolError, match="not shardkv"):
        decode_hello(b"SSH-2.0-OpenSSH_9.2")


def test_a_greeting_is_small() -> None:
    with pytest.raises(ProtocolError, match="at most"):
        decode_hello(MAGIC + bytes(GREETING_BYTES_MAX))


def test_a_version_that_was_not_offered_is_refused() -> None:
    with pytest.raises(VersionUnsupported):
        decode_welcome(MAGIC + cbor2.dumps([2, CLUSTER, 1, 0, 0, 1]))


DECODERS: dict[Callable[[bytes], object], type] = {
    decode_hello: Hello,
    decode_welcome: Welcome,
    decode_refused: Refused,
}


def check_decoded(decode: Callable[[bytes], object], data: bytes) -> None:
    """What comes out is a sound greeting, or the error of one that is not; nothing else escapes."""
    try:
        greeting = decode(data)
    except ProtocolError:
        return
    assert type(greeting) is DECODERS[decode]
    assert data.startswith(MAGIC)


@pytest.mark.parametrize("decode", DECODERS)
@given(body=st.binary(max_size=80))
def test_garbage_is_a_protocol_error(decode: Callable[[bytes], object], body: bytes) -> None:
    for data in (body, MAGIC + body):
        check_decoded(decode, data)


@pytest.mark.parametrize("decode", DECODERS)
@given(
    body=st.recursive(
        st.none() | st.booleans() | st.integers() | st.binary(max_size=20) | st.text(max_size=5), st.lists
    )
)
def test_any_value_of_another_shape_is_a_protocol_error(decode: Callable[[bytes], object], body: object) -> None:
    check_decoded(decode, MAGIC + cbor2.dumps(body))
