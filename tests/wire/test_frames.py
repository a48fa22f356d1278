"""The frame codec: any chunking gives the same frames, and no bytes do harm."""

import tracemalloc
from itertools import pairwise

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from shardkv.errors import ProtocolError
from shardkv.wire.frames import (
    COMPRESS_BYTES_MIN,
    COMPRESSED,
    COMPRESSION_RATIO_MAX,
    HEAD_BYTES,
    Frame,
    FrameDecoder,
    FrameKind,
    compress_payload,
    encode_frame,
)

KINDS = st.sampled_from(FrameKind)
FRAMES = st.lists(st.tuples(KINDS, st.binary(max_size=200) | st.binary(min_size=4000, max_size=9000)), max_size=8)


def test_the_bytes_of_a_frame_are_fixed() -> None:
    """Peers of every version must cut the stream alike."""
    assert encode_frame(FrameKind.RAFT, b"abc") == b"\0\0\0\x05\x06\0abc"
    assert encode_frame(FrameKind.PING) == b"\0\0\0\x02\x09\0"
    assert encode_frame(FrameKind.HELLO, b"a", b"", b"bc", flags=1) == b"\0\0\0\x05\x01\x01abc"
    assert [kind.value for kind in FrameKind] == list(range(1, 11))


@given(FRAMES, st.data())
def test_any_chunking_gives_the_same_frames(frames: list[tuple[FrameKind, bytes]], data: st.DataObject) -> None:
    stream = b"".join(encode_frame(kind, payload) for kind, payload in frames)
    cuts = data.draw(st.lists(st.integers(0, len(stream)), max_size=20).map(sorted))
    decoder = FrameDecoder(9000)
    decoded: list[Frame] = []
    for start, end in pairwise([0, *cuts, len(stream)]):
        decoded += decoder.feed(stream[start:end])
        decoder.check()
    assert decoded == frames
    assert all(type(frame.payload) is bytes and type(frame.kind) is FrameKind for frame in decoded)
    assert decoder.buffered == 0


@settings(max_examples=25)
@given(FRAMES)
def test_byte_by_byte_gives_the_same_frames(frames: list[tuple[FrameKind, bytes]]) -> None:
    stream = b"".join(encode_frame(kind, payload[:300]) for kind, payload in frames)
    decoder = FrameDecoder(300)
    decoded = [frame for byte in stream for frame in decoder.feed(bytes((byte,)))]
    assert decoded == [(kind, payload[:300]) for kind, payload in frames]


@settings(max_examples=300)
@given(st.lists(st.binary(max_size=64), max_size=20))
def test_garbage_ends_in_a_protocol_error_or_in_frames(chunks: list[bytes]) -> None:
    decoder = FrameDecoder(1 << 20)
    try:
        for chunk in chunks:
            for frame in decoder.feed(chunk):
                assert len(frame.payload) <= 1 << 20
            decoder.check()
    except ProtocolError:
        with pytest.raises(ProtocolError):
            decoder.feed(b"")


@settings(max_examples=300)
@given(st.data())
def test_a_damaged_stream_never_raises_anything_else(data: st.DataObject) -> None:
    payload = data.draw(st.binary(min_size=1, max_size=64)) * 40
    flags, packed = compress_payload(payload)
    stream = bytearray(encode_frame(FrameKind.RAFT, packed, flags=flags) * 2)
    for _ in range(data.draw(st.integers(1, 4))):
        stream[data.draw(st.integers(0, len(stream) - 1))] = data.draw(st.integers(0, 255))
    decoder = FrameDecoder(1 << 16)
    try:
        for frame in decoder.feed(bytes(stream)):
            assert len(frame.payload) <= 1 << 16
    except ProtocolError:
        pass


@pytest.mark.parametrize(
    ("stream", "reason"),
    [
        (b"\0\0\0\0\x06\0", "a frame of 0 bytes"),
        (b"\0\0\0\1\x06\0", "a frame of 1 bytes"),
        (b"\0\0\3\xeb\x06\0", "a frame of 1003 bytes; from 2 to 1002"),
        (b"\xff\xff\xff\xff\x06\0", "a frame of 4294967295 bytes"),
        (b"\0\0\0\2\0\0", "unknown kind 0"),
        (b"\0\0\0\2\x0b\0", "unknown kind 11"),
        (b"\0\0\0\2\x06\x02", "unknown flags 0x02"),
        (b"\0\0\0\2\x06\xff", "unknown flags 0xff"),
        (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", r"not a shardkv connection: it begins with the text 'GET / HTTP/1\.1"),
        (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", r"HTTP goes to --admin"),
        (b"HTTP/1.1 400 \r\n\r\n", r"an HTTP server answers here: .* --listen, not its --admin"),
        (b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03", "TLS handshake"),
        (b"*1\r\n$4\r\nPING\r\n", "a frame of"),
    ],
)
def test_what_is_no_frame_is_refused_with_its_reason(stream: bytes, reason: str) -> None:
    decoder = FrameDecoder(1000)
    with pytest.raises(ProtocolError, match=reason):
        decoder.feed(stream)
    with pytest.raises(ProtocolError, match=reason):
        decoder.feed(encode_frame(FrameKind.PING))
    assert decoder.buffered == 0


def test_a_payload_at_the_bound_is_taken() -> None:
    assert FrameDecoder(1000).feed(encode_frame(FrameKind.RAFT, bytes(1000))) == [(FrameKind.RAFT, bytes(1000))]


def test_the_frames_before_a_bad_one_in_the_same_read_do_not_hide_it() -> None:
    with pytest.raises(ProtocolError):
        FrameDecoder().feed(encode_frame(FrameKind.PING) + b"\0\0\0\2\0\0")


def test_a_sender_of_tiny_pieces_does_not_make_us_keep_an_object_for_each() -> None:
    """Memory is bounded by the frame, whatever the pieces: two bytes as an object of their own take 35."""
    size = 1 << 17
    decoder = FrameDecoder(size)
    decoder.feed(encode_frame(FrameKind.RAFT, bytes(size))[:HEAD_BYTES])
    tracemalloc.start()
    try:
        for number in range(size // 8):
            decoder.feed(number.to_bytes(4) + b"abc")
        used, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert decoder.buffered == size // 8 * 7
    assert used < 2 * size
    assert decoder.feed(bytes(size - size // 8 * 7))[0].payload[:7] == b"\0\0\0\0abc"


def test_nothing_is_allocated_for_an_announced_payload() -> None:
    decoder = FrameDecoder(1 << 30)
    tracemalloc.start()
    try:
        decoder.feed((1 << 30).to_bytes(4) + b"\x06\0")
        used, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert used < 10_000


@pytest.mark.parametrize("pieces", [1, 3, 100])
def test_a_compressed_payload_comes_out_as_it_went_in(pieces: int) -> None:
    payload = b"".join(b"%08d" % (number * number % 1_000_003) for number in range(20_000))
    flags, packed = compress_payload(payload)
    assert flags == COMPRESSED
    assert len(packed) < len(payload) * 3 // 4
    stream = encode_frame(FrameKind.SNAPSHOT, packed, flags=flags)
    decoder = FrameDecoder()
    step = len(stream) // pieces + 1
    frames = [frame for start in range(0, len(stream), step) for frame in decoder.feed(stream[start : start + step])]
    assert frames == [(FrameKind.SNAPSHOT, payload)]


def test_what_does_not_pay_is_not_compressed() -> None:
    short = bytes(COMPRESS_BYTES_MIN - 1)
    random = zstandard.ZstdCompressor().compress(b"".join(str(n * n).encode() for n in range(5000)))
    assert compress_payload(short) == (0, short)
    assert compress_payload(random) == (0, random)


def test_what_a_decoder_would_take_for_a_bomb_is_sent_as_it_is() -> None:
    """A megabyte of zeros is a fair value; it must arrive."""
    zeros = bytes(1 << 20)
    flags, packed = compress_payload(zeros)
    assert (flags, packed) == (0, zeros)
    assert FrameDecoder().feed(encode_frame(FrameKind.RAFT, packed, flags=flags)) == [(FrameKind.RAFT, zeros)]


def bomb(size: int, *, declared: bool = True) -> bytes:
    return zstandard.ZstdCompressor(write_content_size=declared).compress(bytes(size))


@pytest.mark.parametrize(
    ("packed", "reason"),
    [
        (bomb(1 << 20), "would expand to 1048576"),
        (bomb(COMPRESSION_RATIO_MAX * 16 * 100), "would expand"),
        (bomb(2000, declared=False), "does not say how large"),
        (bomb(0), "empty"),
        (bomb(1200) + bytes(60), "cannot be expanded"),
        (bomb(1200)[:-3], "cannot be expanded"),
        (b"not zstd at all", "cannot be expanded"),
        (b"", "cannot be expanded|does not say"),
    ],
)
def test_a_compressed_payload_that_is_no_fair_one_is_refused(packed: bytes, reason: str) -> None:
    """Memory is bounded before it is allocated: the declared size is checked, not the outcome."""
    tracemalloc.start()
    try:
        with pytest.raises(ProtocolError, match=reason):
            FrameDecoder(1 << 18).feed(encode_frame(FrameKind.RAFT, packed, flags=COMPRESSED))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1 << 17


def test_a_fair_ratio_does_not_lift_the_bound() -> None:
    payload = b"".join(b"%08d" % (number * number % 1_000_003) for number in range(20_000))
    flags, packed = compress_payload(payload)
    stream = encode_frame(FrameKind.RAFT, packed, flags=flags)
    assert FrameDecoder(len(payload)).feed(stream) == [(FrameKind.RAFT, payload)]
    with pytest.raises(ProtocolError, match="would expand to 160000; at most 159999"):
        FrameDecoder(len(payload) - 1).feed(stream)


def test_a_frame_that_lies_about_its_size_is_refused() -> None:
    packed = bytearray(bomb(1200))
    descriptor = packed[4]
    assert descriptor >> 6 == 1, "a two-byte content size follows"
    packed[5] ^= 1
    with pytest.raises(ProtocolError, match="cannot be expanded"):
        FrameDecoder().feed(encode_frame(FrameKind.RAFT, bytes(packed), flags=COMPRESSED))
