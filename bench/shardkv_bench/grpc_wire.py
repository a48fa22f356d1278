"""Just enough HTTP/2 and gRPC to put unary calls on a connection and tell when they are answered. Sans-IO.

A load generator must not be slower than what it measures, and a general gRPC library costs more than an etcd put. So
requests are a few packed bytes, and of the answers only frame headers are looked at: a unary call that failed has no
DATA frame before its end, so nothing needs to decode HPACK, and what HPACK cannot express (a dynamic table) is refused
in the settings. One protobuf message in, one out; see RFC 9113, RFC 7541 and the gRPC over HTTP/2 protocol.
"""

from collections.abc import Iterator
from struct import Struct
from typing import Final

PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE = 0, 1, 3, 4, 6, 7, 8
END_STREAM, ACK, END_HEADERS = 0x1, 0x1, 0x4
DEFAULT_WINDOW: Final = 65_535
RECEIVE_WINDOW: Final = 1 << 30
FRAME_BYTES_MAX: Final = 16_384
STREAM_ID_MAX: Final = (1 << 31) - 1

_LENGTH_AND_TYPE: Final = Struct(">BHBBI")
_U32: Final = Struct(">I")
_GRPC: Final = Struct(">BI")  # not compressed, message length
_SETTING: Final = Struct(">HI")
_HEADER_TABLE_SIZE, _ENABLE_PUSH, _INITIAL_WINDOW_SIZE = 1, 2, 4


class CallsRefused(ConnectionError):
    """The server closed the connection or broke the protocol."""


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    length = len(payload)
    return _LENGTH_AND_TYPE.pack(length >> 16, length & 0xFFFF, kind, flags, stream) + payload


def _literal(index_bits: bytes, value: bytes) -> bytes:
    assert len(value) < 127, value
    return index_bits + bytes((len(value),)) + value


def header_block(path: str, authority: str) -> bytes:
    """The request headers of a gRPC call, without references to a dynamic table, so that every call's are equal."""
    return b"".join(
        (
            b"\x83\x86",  # :method POST, :scheme http
            _literal(b"\x04", path.encode()),  # :path
            _literal(b"\x01", authority.encode()),  # :authority
            _literal(b"\x0f\x10", b"application/grpc"),  # content-type
            _literal(_literal(b"\x00", b"te"), b"trailers"),
        )
    )


class Calls:
    """One connection's unary calls. Feed it what arrives; send what it gives."""

    def __init__(self, authority: str) -> None:
        self._authority = authority
        self._blocks: dict[str, bytes] = {}
        self._next_stream = 1
        self._buffer = b""
        self._answered: dict[int, bytes] = {}
        self._received = 0
        self.window = DEFAULT_WINDOW
        """Bytes of DATA that the server still takes on this connection."""
        self._stream_window = DEFAULT_WINDOW
        self.outgoing = bytearray(
            PREFACE
            + frame(
                SETTINGS,
                0,
                0,
                _SETTING.pack(_HEADER_TABLE_SIZE, 0)
                + _SETTING.pack(_ENABLE_PUSH, 0)
                + _SETTING.pack(_INITIAL_WINDOW_SIZE, RECEIVE_WINDOW),
            )
            + frame(WINDOW_UPDATE, 0, 0, _U32.pack(RECEIVE_WINDOW - DEFAULT_WINDOW))
        )
        """What is to be sent; the caller takes bytes off its front."""

    def fits(self, message: bytes) -> bool:
        """Whether the connection's window takes a call with ``message`` now; if not, it will when answers have come."""
        return len(message) + 5 <= self.window

    def call(self, path: str, message: bytes) -> int:
        """Queue one call; the stream number that :meth:`feed` will name. Raises CallsRefused past the windows."""
        size = len(message) + 5
        if size > min(self.window, self._stream_window, FRAME_BYTES_MAX):
            raise CallsRefused(f"a message of {size} bytes does not fit the window of {self.window}")
        block = self._blocks.get(path)
        if block is None:
            block = self._blocks[path] = header_block(path, self._authority)
        stream = self._next_stream
        if stream > STREAM_ID_MAX:
            raise CallsRefused("the connection has no stream numbers left")
        self._next_stream = stream + 2
        self.window -= size
        length = len(block)
        self.outgoing += b"".join(
            (
                _LENGTH_AND_TYPE.pack(0, length, HEADERS, END_HEADERS, stream),
                block,
                _LENGTH_AND_TYPE.pack(size >> 16, size & 0xFFFF, DATA, END_STREAM, stream),
                _GRPC.pack(0, size - 5),
                message,
            )
        )
        return stream

    def feed(self, data: bytes) -> Iterator[tuple[int, bytes | None]]:
        """Take bytes that arrived; yields ``(stream, message)`` of each call that ended, None for one that failed."""
        buffer = self._buffer + data if self._buffer else data
        position, end = 0, len(buffer)
        while end - position >= 9:
            high, low, kind, flags, stream = _LENGTH_AND_TYPE.unpack_from(buffer, position)
            length = (high << 16) | low
            after = position + 9 + length
            if after > end:
                break
            if kind == DATA:
                self._received += length
                if length:
                    self._answered[stream] = self._answered.get(stream, b"") + buffer[position + 9 : after]
                if flags & END_STREAM:
                    yield stream, self._message(stream)
            elif kind == HEADERS:
                if flags & END_STREAM:
                    yield stream, self._message(stream)
            elif kind == RST_STREAM:
                self._answered.pop(stream, None)
                yield stream, None
            else:
                self._control(kind, flags, stream, buffer[position + 9 : after])
            position = after
        self._buffer = buffer[position:]
        if self._received >= RECEIVE_WINDOW // 2:
            self.outgoing += frame(WINDOW_UPDATE, 0, 0, _U32.pack(self._received))
            self._received = 0

    def _message(self, stream: int) -> bytes | None:
        data = self._answered.pop(stream, None)
        return None if data is None else data[5:]

    def _control(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        if kind == SETTINGS and not flags & ACK:
            for position in range(0, len(payload) - 5, 6):
                name, value = _SETTING.unpack_from(payload, position)
                if name == _INITIAL_WINDOW_SIZE:
                    self._stream_window = value
            self.outgoing += frame(SETTINGS, ACK, 0)
        elif kind == PING and not flags & ACK:
            self.outgoing += frame(PING, ACK, 0, payload)
        elif kind == WINDOW_UPDATE and stream == 0:
            self.window += _U32.unpack(payload)[0] & 0x7FFF_FFFF
        elif kind == GOAWAY:
            raise CallsRefused(f"the server ends the connection: {payload[8:]!r}")


# Protobuf, as far as etcd's requests need it. Field numbers are those of etcd's published rpc.proto.


def varint(value: int) -> bytes:
    parts = bytearray()
    while value > 0x7F:
        parts.append(value & 0x7F | 0x80)
        value >>= 7
    parts.append(value)
    return bytes(parts)


def _bytes_field(number: int, value: bytes) -> bytes:
    return bytes(((number << 3) | 2,)) + varint(len(value)) + value


RANGE_PATH: Final = "/etcdserverpb.KV/Range"
PUT_PATH: Final = "/etcdserverpb.KV/Put"
TXN_PATH: Final = "/etcdserverpb.KV/Txn"
STATUS_PATH: Final = "/etcdserverpb.Maintenance/Status"


def range_request(key: bytes) -> bytes:
    """A linearizable get of one key."""
    return _bytes_field(1, key)


def found(answer: bytes) -> bool:
    """Whether a RangeResponse holds a key (field 2, after the header, whose length takes one byte)."""
    return len(answer) > 1 and answer[2 + answer[1] : 3 + answer[1]] == b"\x12"


def put_request(key: bytes, value: bytes) -> bytes:
    return _bytes_field(1, key) + _bytes_field(2, value)


def put_transaction(pairs: list[tuple[bytes, bytes]]) -> bytes:
    """A transaction that puts every pair, unconditionally."""
    return b"".join(_bytes_field(2, _bytes_field(2, put_request(key, value))) for key, value in pairs)


def fields_of(message: bytes) -> dict[int, int | bytes]:
    """The last value of each field of a protobuf message: varints as int, the rest as bytes. Raises ValueError."""
    found: dict[int, int | bytes] = {}
    position = 0
    while position < len(message):
        tag, position = _read_varint(message, position)
        match tag & 7:
            case 0:
                found[tag >> 3], position = _read_varint(message, position)
            case 1:
                found[tag >> 3] = message[position : position + 8]
                position += 8
            case 2:
                length, position = _read_varint(message, position)
                found[tag >> 3] = message[position : position + length]
                position += length
            case 5:
                found[tag >> 3] = message[position : position + 4]
                position += 4
            case other:
                raise ValueError(f"wire type {other}")
    return found


def _read_varint(data: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if position >= len(data):
            raise ValueError("a number is cut off")
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7


def leads(status: bytes) -> bool:
    """Whether the member that sent this StatusResponse leads: its id (header, field 2) is the leader's (field 4)."""
    fields = fields_of(status)
    header = fields.get(1)
    member = fields_of(header).get(2) if isinstance(header, bytes) else None
    return member is not None and member == fields.get(4)
