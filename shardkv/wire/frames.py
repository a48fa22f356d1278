"""Frames: how messages follow one another on a byte stream. Bytes in, frames out; no I/O, nothing of what they hold.

A frame is a 32-bit length (of all that follows it), a kind, flags, and a payload; integers are big-endian. The rule
that keeps it safe: nothing is allocated because a stranger says so. A length is checked before a byte is collected,
and a compressed payload before it is expanded.
"""

from enum import IntEnum
from struct import Struct
from typing import Final, NamedTuple

import zstandard

from shardkv.errors import ProtocolError

FRAME_BYTES_MAX: Final = 16 * 1024 * 1024
"""The default bound on a payload: a transaction of 8 MiB with its keys, twice over."""
HEAD_BYTES: Final = 6

COMPRESSED: Final = 1
"""The flag of a payload that is one zstd frame."""
COMPRESS_BYTES_MIN: Final = 1024
"""Below this the head of a zstd frame and the calls cost more than they save."""
COMPRESS_IN_THREAD_BYTES: Final = 64 * 1024
"""Above this (108 µs) callers compress in a worker thread."""
COMPRESSION_RATIO_MAX: Final = 100
"""A payload that would shrink further is sent as it is, so that one read can expand to no more than this many times its
size: without it a few kilobytes of frames that are each within the bound would fill the memory together."""

_HEAD: Final = Struct(">IBB")
_SMALL_PIECE_BYTES: Final = 4096
_WINDOW_BYTES_MAX: Final = 8 * 1024 * 1024


class FrameKind(IntEnum):
    HELLO = 1
    WELCOME = 2
    REFUSED = 3
    REQUEST = 4
    RESPONSE = 5
    RAFT = 6
    GOODBYE = 7
    SNAPSHOT = 8
    PING = 9
    PONG = 10


class Frame(NamedTuple):
    """One message; the payload is expanded already."""

    kind: FrameKind
    payload: bytes


_KINDS: Final = tuple({kind.value: kind for kind in FrameKind}.get(number) for number in range(256))


def encode_frame(kind: FrameKind, *parts: bytes | bytearray | memoryview, flags: int = 0) -> bytes:
    """One frame whose payload is ``parts`` joined; ``flags`` as :func:`compress_payload` gave them."""
    if len(parts) == 1:
        payload = parts[0]
        return b"".join((_HEAD.pack(len(payload) + 2, kind, flags), payload))
    return b"".join((_HEAD.pack(sum(map(len, parts)) + 2, kind, flags), *parts))


def compress_payload(payload: bytes) -> tuple[int, bytes]:
    """``(flags, payload)`` for :func:`encode_frame`, compressed where that pays. May be called from any thread."""
    size = len(payload)
    if size < COMPRESS_BYTES_MIN:
        return 0, payload
    compressed = zstandard.ZstdCompressor(level=1, write_content_size=True).compress(payload)
    if len(compressed) >= size - (size >> 3) or len(compressed) * COMPRESSION_RATIO_MAX < size:
        return 0, payload
    return COMPRESSED, compressed


class FrameDecoder:
    """Cuts a byte stream into frames. After a :class:`ProtocolError` the stream is lost and every later call fails.

    It keeps at most one unfinished frame, so ``frame_bytes_max`` plus the last read.
    """

    __slots__ = ("_broken", "_decompressor", "_flags", "_head", "_kind", "_missing", "_pieces", "frame_bytes_max")

    def __init__(self, frame_bytes_max: int = FRAME_BYTES_MAX) -> None:
        self.frame_bytes_max: int = frame_bytes_max
        self._head = b""
        """The first bytes of a frame whose head is not complete; empty while a payload is collected."""
        self._pieces: list[bytes | bytearray] = []
        """What there is of a payload whose end is still missing."""
        self._missing = 0
        """How many bytes of it are missing; 0 when no payload is being collected."""
        self._kind = FrameKind.HELLO
        self._flags = 0
        self._broken: str | None = None
        self._decompressor: zstandard.ZstdDecompressor | None = None

    @property
    def buffered(self) -> int:
        """Bytes kept of an unfinished frame."""
        return len(self._head) + sum(map(len, self._pieces))

    @property
    def unfinished_bytes(self) -> int:
        """How large the frame that is being collected will be; 0 between two frames."""
        return self.buffered + self._missing if self._missing else 0

    def check(self) -> None:
        """Walk every invariant."""
        assert len(self._head) < HEAD_BYTES, f"a whole head of {len(self._head)} bytes was left undecoded"
        assert not (self._head and self._missing), "a head and a payload are collected at once"
        assert self._missing > 0 or not self._pieces, f"{len(self._pieces)} pieces are kept of a finished payload"
        assert self.buffered + self._missing <= self.frame_bytes_max + HEAD_BYTES, "the frame is over its bound"

    def feed(self, data: bytes) -> list[Frame]:
        """The frames that ``data`` completes, in order.

        Raises:
            ProtocolError: the bytes are no frames; the connection must be closed.
        """
        if self._broken is not None:
            raise ProtocolError(self._broken)
        try:
            return self._feed(data)
        except ProtocolError as error:
            self._broken = str(error)
            self._pieces.clear()
            self._head = b""
            self._missing = 0
            raise

    def _feed(self, data: bytes) -> list[Frame]:
        frames: list[Frame] = []
        position = 0
        if self._missing:
            position = self._collect(data, frames)
        elif self._head:
            data = self._head + data
            self._head = b""
        size = len(data)
        unpack = _HEAD.unpack_from
        kinds = _KINDS
        length_max = self.frame_bytes_max + 2
        new = tuple.__new__
        while size - position >= HEAD_BYTES:
            length, kind_number, flags = unpack(data, position)
            kind = kinds[kind_number]
            if not 2 <= length <= length_max or kind is None or flags > COMPRESSED:
                raise self._refusal(data, position)
            start = position + HEAD_BYTES
            end = position + 4 + length
            if end > size:
                self._pieces.append(data[start:])
                self._missing = end - size
                self._kind = kind
                self._flags = flags
                return frames
            payload = data[start:end]
            if flags:
                payload = self._expand(payload)
            frames.append(new(Frame, (kind, payload)))
            position = end
        if position < size:
            self._head = data[position:]
        return frames

    def _collect(self, data: bytes, frames: list[Frame]) -> int:
        """Go on with an unfinished payload; where in ``data`` the next frame starts."""
        missing = self._missing
        pieces = self._pieces
        size = len(data)
        if size < missing:
            # A sender of tiny pieces must not make us keep an object for each: those are gathered.
            if size >= _SMALL_PIECE_BYTES:
                pieces.append(data)
            elif isinstance(last := pieces[-1], bytearray):
                last += data
            else:
                pieces.append(bytearray(data))
            self._missing = missing - size
            return size
        pieces.append(data if size == missing else data[:missing])
        payload = b"".join(pieces)
        pieces.clear()
        self._missing = 0
        if self._flags:
            payload = self._expand(payload)
        frames.append(Frame(self._kind, payload))
        return missing

    def _expand(self, payload: bytes) -> bytes:
        """The content of a compressed payload. Its declared size is checked before anything is allocated for it."""
        try:
            size = zstandard.frame_content_size(payload)
            if size < 0:
                raise ProtocolError("a compressed frame does not say how large its content is")
            if size > self.frame_bytes_max or size > len(payload) * COMPRESSION_RATIO_MAX:
                raise ProtocolError(
                    f"a compressed frame of {len(payload)} bytes would expand to {size}; "
                    f"at most {self.frame_bytes_max} and {COMPRESSION_RATIO_MAX} times its size are allowed"
                )
            if size == 0:
                raise ProtocolError("a compressed frame is empty")
            decompressor = self._decompressor
            if decompressor is None:
                decompressor = zstandard.ZstdDecompressor(max_window_size=_WINDOW_BYTES_MAX)
                self._decompressor = decompressor
            return decompressor.decompress(payload, max_output_size=size, allow_extra_data=False)
        except zstandard.ZstdError as error:
            raise ProtocolError(f"a compressed frame cannot be expanded: {error}") from error

    def _refusal(self, data: bytes, position: int) -> ProtocolError:
        """Why the head at ``position`` is refused, in words that help whoever connected the wrong thing."""
        head = data[position : position + HEAD_BYTES]
        length, kind, flags = _HEAD.unpack(head)
        if not 2 <= length <= self.frame_bytes_max + 2:
            if head[:4].isascii() and head[:4].decode("ascii").isprintable():
                text = data[position : position + 16].decode("ascii", "backslashreplace")
                if text.startswith("HTTP/"):
                    return ProtocolError("an HTTP server answers here: of a node give its --listen, not its --admin")
                return ProtocolError(
                    f"not a shardkv connection: it begins with the text {text!r} (HTTP goes to --admin)"
                )
            if head[:2] == b"\x16\x03":
                return ProtocolError("not a shardkv connection: it begins with a TLS handshake")
            return ProtocolError(f"a frame of {length} bytes; from 2 to {self.frame_bytes_max + 2} are allowed")
        if _KINDS[kind] is None:
            return ProtocolError(f"a frame of unknown kind {kind}")
        return ProtocolError(f"a frame with unknown flags {flags:#04x}")
