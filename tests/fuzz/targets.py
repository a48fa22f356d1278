"""Every decoder of bytes that come from outside, as one call: bytes in, what became of them out.

A target returns the name of the outcome: ``valid``, or that of a *clean* error, one that the callers of the decoder
expect. Whatever else is raised is a bug. What a decoder let through is looked at as its callers will: it has the types
that it should have, and it comes out of the encoder as it went in.
"""

import io
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final
from zlib import crc32

import cbor2

from shardkv import address, codec
from shardkv.cli import records, shell_language, text
from shardkv.config import SETTINGS
from shardkv.config_sources import load_node_config
from shardkv.errors import (
    ConfigError,
    Corruption,
    DataDirectoryError,
    MalformedRequest,
    ProtocolError,
    ShardKVError,
    from_wire,
    to_wire,
)
from shardkv.json_rules import to_json
from shardkv.machine import entries, envelope, rows
from shardkv.multiraft.snapshot_parts import Incoming, decode_begin
from shardkv.raft.messages import SnapshotMetadata
from shardkv.storage import record
from shardkv.storage.directory import decode_identity
from shardkv.storage.record import Malformed
from shardkv.types import KEY_BYTES_MAX, VALUE_BYTES_MAX
from shardkv.wire import commands, handshake, raft_codec, requests
from shardkv.wire.frames import Frame, FrameDecoder, FrameKind, encode_frame
from shardkv_placement import commands as placement_commands
from shardkv_placement import heartbeat
from tests.fuzz import command_line, samples

FRAME_BYTES_MAX: Final = 1 << 20
UINT64_END: Final = 1 << 64


@dataclass(frozen=True)
class Target:
    """``run`` is handed the input and a random source (for how it is cut, say)."""

    name: str
    corpus: Sequence[bytes]
    run: Callable[[bytes, random.Random], None]
    clean: tuple[type[Exception], ...]
    weight: int = 1

    def outcome(self, data: bytes, chance: random.Random) -> str:
        try:
            self.run(data, chance)
        except self.clean as error:
            return type(error).__name__
        return "valid"


# Frames


def _frames(data: bytes, chance: random.Random) -> None:
    """The stream cut anywhere; the same frames as in one piece; then each frame's payload."""
    decoder, frames, position = FrameDecoder(FRAME_BYTES_MAX), [], 0
    error: ProtocolError | None = None
    try:
        while position < len(data):
            end = position + chance.choice((1, 2, 5, 6, 7, 50, 1000, len(data)))
            frames += decoder.feed(data[position:end])
            decoder.check()
            assert decoder.buffered <= len(data), f"{decoder.buffered} bytes are kept of {len(data)}"
            position = end
    except ProtocolError as problem:
        error = problem
        _lost(decoder)
    try:
        in_one: list[Frame] | None = FrameDecoder(FRAME_BYTES_MAX).feed(data)
    except ProtocolError:
        in_one = None
    assert in_one == (frames if error is None else None), "the frames depend on how the stream was cut"
    for frame in frames:
        _payload(frame.kind, frame.payload)
    if error is not None:
        raise error


def _lost(decoder: FrameDecoder) -> None:
    decoder.check()
    assert not decoder.buffered, "a broken stream keeps bytes"
    try:
        decoder.feed(b"")
    except ProtocolError:
        return
    raise AssertionError("a broken stream went on")


def _payload(kind: FrameKind, payload: bytes) -> None:
    match kind:
        case FrameKind.HELLO:
            hello = handshake.decode_hello(payload)
            again = encode_frame(FrameKind.HELLO, handshake.encode_hello(hello)[6:])
            assert handshake.decode_hello(again[6:]) == hello, hello
        case FrameKind.WELCOME:
            welcome = handshake.decode_welcome(payload)
            assert handshake.decode_welcome(handshake.encode_welcome(welcome)[6:]) == welcome, welcome
        case FrameKind.REFUSED:
            _error(handshake.decode_refused(payload).error)
        case FrameKind.REQUEST:
            _requests(payload)
        case FrameKind.RESPONSE:
            _responses(payload)
        case FrameKind.RAFT:
            _raft(payload)
        case FrameKind.SNAPSHOT:
            _snapshot_part(codec.loads(payload))
        case _:
            pass


def _error(error: ShardKVError) -> None:
    """It can be passed on."""
    assert isinstance(error, ShardKVError), error
    assert type(from_wire(codec.loads(codec.dumps(to_wire(error))))) is type(error), error


def _requests(payload: bytes) -> None:
    for request in requests.decode_requests(payload):
        for number in request[:5]:
            assert -UINT64_END <= number < UINT64_END, request
        again = requests.join([requests.encode_request(*request[:5], *request.arguments)])
        assert _same(requests.decode_requests(again), [request]), request
        match request.arguments:
            case [bytes(), bytes(data)]:
                _commands(data)


def _commands(data: bytes) -> None:
    for command in commands.decode(data):
        problem = commands.validate(command, KEY_BYTES_MAX, VALUE_BYTES_MAX)
        if problem is None:
            head = command[:5]
            assert all(type(number) is int and 0 <= number < UINT64_END for number in head), command
            assert type(command[commands.KEY]) is bytes, command
        else:
            assert isinstance(problem, str), problem


def _responses(payload: bytes) -> None:
    for response in requests.decode_responses(payload):
        if response.error is not None:
            _error(response.error)


def _raft(payload: bytes) -> None:
    for range_id, message, notice in raft_codec.decode(payload):
        for number in (message.to, message.from_, message.term, message.log_term, message.index, message.commit):
            assert 0 <= number < UINT64_END, message
        for entry in message.entries:
            assert 0 <= entry.term < UINT64_END, entry
            assert type(entry.term) is int, entry
            assert type(entry.data) is bytes, entry
        if notice is None:
            again = raft_codec.join([raft_codec.encode_message(range_id, message)])
            assert _same(raft_codec.decode(again), [(range_id, message, None)]), message


def _same(one: Any, other: Any) -> bool:
    """Equal, where not-a-number equals itself."""
    return repr(one) == repr([type(each)(*each) if isinstance(each, tuple) else each for each in one]) and repr(
        list(map(tuple, one))
    ) == repr(list(map(tuple, other)))


# Snapshots


class _NoFile:
    paths: Sequence[str] = ()

    def put(self, key: bytes, value: bytes) -> None:
        assert type(key) is bytes, key
        assert type(value) is bytes, value


def _snapshot_part(part: Any) -> None:
    if not isinstance(part, list):
        raise ProtocolError("a part of a snapshot must be an array")
    match part:
        case ["rows", int(number), bytes(data), int(checksum)]:
            _incoming().absorb(number, data, checksum)
        case ["end", int(chunks), int(count), int(checksum), int()]:
            _incoming().require_whole(chunks, count, checksum)
        case _:
            begin = decode_begin(part)
            incoming = Incoming(begin.id, begin.descriptor, begin.metadata, "path", _NoFile())  # type: ignore[arg-type]
            assert incoming.is_resumed_by(begin.id, begin.descriptor, begin.metadata)


def _incoming() -> Incoming:
    metadata = SnapshotMetadata(100, 5, samples.CONF_STATE)
    return Incoming(samples.SESSION, samples.DESCRIPTOR, metadata, "path", _NoFile())  # type: ignore[arg-type]


def _snapshot(data: bytes, chance: random.Random) -> None:
    _snapshot_part(codec.loads(data))


def _snapshot_rows(data: bytes, chance: random.Random) -> None:
    incoming = _incoming()
    incoming.absorb(1, data, crc32(data))
    incoming.require_whole(1, incoming.rows, incoming.checksum)


# CBOR


def _codec(data: bytes, chance: random.Random) -> None:
    value = codec.loads(data)
    count = _plain(value, 0)
    assert count <= max(1, len(data)), f"{count} items out of {len(data)} bytes"
    assert repr(codec.loads(codec.dumps(value))) == repr(value), value


def _plain(value: Any, depth: int) -> int:
    """Only what this protocol allows, or what matches no shape in it. Returns how many items."""
    assert depth <= codec.DEPTH_MAX, f"nested {depth} deep"
    if value is None or value is cbor2.undefined or type(value) in (bool, float, str, bytes, cbor2.CBORSimpleValue):
        return 1
    if type(value) is int:
        assert -UINT64_END <= value < UINT64_END, value
        return 1
    if type(value) is list:
        return 1 + sum(_plain(each, depth + 1) for each in value)
    assert type(value) is dict, f"{type(value)} is no plain value"
    for key in value:
        assert type(key) in (str, bytes), f"a map's key is {key!r}"
    return 1 + sum(_plain(each, depth + 1) for each in value.values())


# The log and the engine


def _entry(data: bytes, chance: random.Random) -> None:
    entry = entries.decode(data)
    if entry[entries.KIND] == entries.EntryKind.SPLIT:
        entries.split_command(entry)


def _membership(data: bytes, chance: random.Random) -> None:
    for node_id, replica_id in entries.decode_membership(data):
        assert type(node_id) is int, node_id
        assert type(replica_id) is int, replica_id


def _applied(data: bytes, chance: random.Random) -> None:
    state = rows.unpack_applied(data)
    if isinstance(state, rows.AppliedState):
        assert all(type(each) is int for part in state.conf_state[:4] for each in part), state


def _descriptor(data: bytes, chance: random.Random) -> None:
    descriptor = rows.unpack_descriptor(data)
    assert rows.unpack_descriptor(rows.pack_descriptor(descriptor)) == descriptor


def _envelope(data: bytes, chance: random.Random) -> None:
    version, value = envelope.unpack(data)
    assert envelope.pack(version, value) == data


def _wal(data: bytes, chance: random.Random) -> None:
    """As recovery does, but that a wrong checksum ends it only half of the times: what is behind it must hold too."""
    header = record.unpack_header(data, samples.WAL_SEGMENT)
    if header is None:
        raise Malformed("no header")
    meta = data[record.HEADER_BYTES : record.HEADER_BYTES + header.meta_bytes]
    if not record.header_sums_up(samples.WAL_SEED, data, meta, header.crc) and chance.random() < 0.5:
        raise Malformed("the checksum")
    if len(meta) >= 2:
        record.decode_meta(meta)


def _wal_meta(data: bytes, chance: random.Random) -> None:
    """Recovery asks for at least two bytes."""
    if len(data) >= 2:
        record.decode_meta(data)


def _identity(data: bytes, chance: random.Random) -> None:
    decode_identity(data, "path")


# Placement


def _placement(data: bytes, chance: random.Random) -> None:
    value = codec.loads(data)
    problem = placement_commands.validate(value)
    if problem is not None:
        raise MalformedRequest(problem)
    command = placement_commands.decode(value)
    again = codec.loads(codec.dumps(placement_commands.encode(command)))
    assert placement_commands.decode(again) == command, command


def _heartbeat(data: bytes, chance: random.Random) -> None:
    beat = heartbeat.decode(codec.loads(data))
    assert heartbeat.decode(codec.loads(codec.dumps(heartbeat.encode(beat)))) == beat, beat


def _reply(data: bytes, chance: random.Random) -> None:
    reply = heartbeat.decode_reply(codec.loads(data))
    assert heartbeat.decode_reply(codec.loads(codec.dumps(heartbeat.encode_reply(reply)))) == reply, reply


# What people type and write


def _config(data: bytes, chance: random.Random) -> None:
    flags: dict[str, object] = {}
    variables: dict[str, str] = {}
    for name, setting in SETTINGS.items():
        if chance.random() < 0.02:
            value = chance.choice(samples.CONFIG_VALUES)
            flags[name] = chance.choice((value, (value, value), True, None, ()))
        if chance.random() < 0.02:
            variables[setting.variable] = chance.choice(samples.CONFIG_VALUES)
    if chance.random() < 0.05:
        flags[chance.choice(samples.CONFIG_VALUES)] = "x"
    content = None if chance.random() < 0.05 else data.decode("utf-8", "surrogateescape")
    config = load_node_config(flags, variables, content, "file.toml")
    for name in ("name", "data", "listen"):
        given = flags.get(name)
        assert not isinstance(given, str) or not given or getattr(config, name) == given, f"a flag did not win: {name}"


def _line(data: bytes, chance: random.Random) -> None:
    line = data.decode("utf-8", "surrogateescape" if chance.random() < 0.5 else "surrogatepass")
    for command in shell_language.parse(line):
        assert command, "an empty command"
        for word in command:
            shell_language.quoted(word)
            key = text.unescape(word)
            assert text.unescape(text.escape(key)) == key, key


def _key(data: bytes, chance: random.Random) -> None:
    typed = data.decode("utf-8", "surrogateescape")
    assert text.unescape(text.escape(data)) == data, data
    to_json({"key": data, "version": len(data)})
    found = text.read(typed, base64_text=chance.random() < 0.3)
    assert isinstance(found, bytes), found


def _addresses(data: bytes, chance: random.Random) -> None:
    for each in address.parse_addresses(data.decode("utf-8", "surrogateescape")):
        assert address.parse_address(str(each)) == each, each


def _json_lines(data: bytes, chance: random.Random) -> None:
    _records(data, "jsonl")


def _csv(data: bytes, chance: random.Random) -> None:
    _records(data, "csv")


def _records(data: bytes, file_format: str) -> None:
    for each in records.read_records(io.BytesIO(data), file_format):
        assert each.key, each
        assert each.offset_after <= len(data), each


_WIRE: Final = (ProtocolError, MalformedRequest)
_CLEAN_STATE: Final = (Corruption, MalformedRequest)

TARGETS: Final = (
    Target("frames", samples.FRAMES, _frames, _WIRE, weight=30),
    Target("codec", tuple(map(codec.dumps, samples.VALUES)), _codec, _WIRE, weight=6),
    Target("hello", samples.HELLOS, lambda data, _: _payload(FrameKind.HELLO, data), _WIRE, weight=3),
    Target("welcome", samples.WELCOMES, lambda data, _: _payload(FrameKind.WELCOME, data), _WIRE, weight=2),
    Target("refusal", samples.REFUSALS, lambda data, _: _payload(FrameKind.REFUSED, data), _WIRE, weight=2),
    Target("requests", samples.REQUESTS, lambda data, _: _requests(data), _WIRE, weight=6),
    Target("commands", samples.COMMANDS, lambda data, _: _commands(data), _WIRE, weight=4),
    Target("responses", samples.RESPONSES, lambda data, _: _responses(data), _WIRE, weight=5),
    Target("raft", samples.MESSAGES, lambda data, _: _raft(data), _WIRE, weight=6),
    Target("snapshot", samples.PARTS, _snapshot, _WIRE, weight=4),
    Target("snapshot-rows", (*samples.ROWS, samples.STATE_ROWS), _snapshot_rows, _WIRE, weight=2),
    Target("entry", samples.ENTRIES, _entry, _CLEAN_STATE, weight=4),
    Target("membership", samples.MEMBERSHIPS, _membership, _CLEAN_STATE, weight=1),
    Target("applied-row", samples.APPLIED_ROWS, _applied, _CLEAN_STATE, weight=2),
    Target("descriptor-row", samples.DESCRIPTOR_ROWS, _descriptor, _CLEAN_STATE, weight=2),
    Target("envelope", (envelope.pack(9, b"value"), envelope.pack(0, b"")), _envelope, _CLEAN_STATE),
    Target("wal", samples.WAL_RECORDS, _wal, (Malformed,), weight=3),
    Target("wal-meta", samples.WAL_METAS, _wal_meta, (Malformed,), 3),
    Target("identity", samples.IDENTITIES, _identity, (Corruption, DataDirectoryError)),
    Target("placement", samples.PLACEMENT_COMMANDS, _placement, _WIRE, weight=4),
    Target("heartbeat", samples.HEARTBEATS, _heartbeat, _WIRE, weight=2),
    Target("heartbeat-reply", samples.REPLIES, _reply, _WIRE, weight=2),
    Target("config", samples.CONFIG_FILES, _config, (ConfigError,), weight=2),
    Target("shell", samples.LINES, _line, (ValueError,), weight=2),
    Target("key", (b"key", rb"\x00\\", b"AAE=", "ключ".encode()), _key, (ValueError,), weight=1),
    Target("addresses", (b"h1:7001,h2:7002", b"[::1]:1", b"a:1, a:1"), _addresses, (ConfigError,)),
    Target("json-lines", samples.JSON_LINES, _json_lines, (records.BadRecord,), weight=2),
    Target("csv", samples.CSV, _csv, (records.BadRecord,), weight=2),
    Target("command-line", command_line.LINES, command_line.run, (command_line.Ended,)),
)
