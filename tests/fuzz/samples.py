"""Valid inputs of every decoder, as its own encoder makes them: what mutation starts from."""

from typing import Any, Final
from zlib import crc32

from shardkv import codec, errors
from shardkv.cli import records
from shardkv.machine import entries, keys, rows
from shardkv.machine.rows import InstallMark
from shardkv.machine.split import SplitCommand
from shardkv.multiraft.snapshot_parts import encode_begin
from shardkv.raft.messages import ConfState, Entry, EntryType, HardState, Message, MessageType, SnapshotMetadata
from shardkv.storage import record
from shardkv.storage.directory import Identity, encode_identity
from shardkv.storage.record import CompactLog, CreateGroup, LogUpdate, ResetLog, Tombstone
from shardkv.types import Epoch, KeyRange, Member, NodeId, RangeDescriptor, RangeId, ReplicaId, ReplicaRole
from shardkv.wire import commands, handshake, raft_codec, requests
from shardkv.wire.commands import Op
from shardkv.wire.frames import HEAD_BYTES, FrameKind, compress_payload, encode_frame
from shardkv.wire.handshake import Hello, Role, Welcome
from shardkv.wire.requests import Method
from shardkv_placement import commands as placement_commands
from shardkv_placement import heartbeat

SESSION: Final = bytes(range(16))
DESCRIPTOR: Final = RangeDescriptor(
    RangeId(7),
    KeyRange(b"a", b"m"),
    Epoch(3, 9),
    (
        Member(NodeId(1), ReplicaId(11)),
        Member(NodeId(2), ReplicaId(12)),
        Member(NodeId(3), ReplicaId(13), ReplicaRole.LEARNER),
    ),
)
WHOLE: Final = RangeDescriptor(RangeId(1), KeyRange(b"", None), Epoch(1, 1), (Member(NodeId(1), ReplicaId(1)),))
CONF_STATE: Final = ConfState((11, 12), (13,))

VALUES: Final[tuple[Any, ...]] = (
    *(None, True, False, 0, 23, 24, -1, (1 << 64) - 1, -(1 << 63), 1.5, "text", b"bytes", [], {}, [[], [1, [2]]]),
    {"name": "n1", "list": [1, b"2", "3", None], "nested": {"a": {"b": []}}},
)

ERRORS: Final = (
    errors.VersionMismatch(current=9),
    errors.NotLeader(hint=2),
    errors.EpochMismatch(current=(DESCRIPTOR, WHOLE)),
    errors.Busy("full"),
    errors.OutcomeUnknown("lost"),
    errors.Corruption("damaged"),
    errors.BatchError("stopped", consumed=3, failed=(b"a", b"b")),
)

SEALED: Final = (
    commands.seal(Op.PUT, commands.pack_put(b"key", b"value" * 9), 7, 1_700_000_000_000, 3),
    commands.seal(Op.PUT, commands.pack_put(b"key", b"", 0), 8, 1_700_000_000_000, 3),
    commands.seal(Op.DELETE, commands.pack_delete(b"key", 99), 9, 1_700_000_000_001, 3),
    commands.seal(Op.INCREMENT, commands.pack_increment(b"n", -5), 10, 1_700_000_000_002, 4),
    commands.seal(Op.DELETE_RANGE, commands.pack_delete_range(b"", None), 11, 1_700_000_000_003, 4),
    commands.seal(Op.DELETE_RANGE, commands.pack_delete_range(b"a", b"b"), 12, 1_700_000_000_003, 4),
)
COMMANDS: Final = (commands.join(list(SEALED)), *(commands.join([each]) for each in SEALED))

REQUESTS: Final = (
    requests.join([requests.encode_request(1, Method.GET, 7, 9, 1 << 60, 0, [b"a", b"b"])]),
    requests.join(
        [
            requests.encode_request(2, Method.WRITE, 7, 9, 1 << 60, SESSION, COMMANDS[0]),
            requests.encode_request(3, Method.SCAN, 7, 9, 1 << 60, 0, b"a", None, 10, 1000, False, True),
            requests.encode_request(4, Method.STATUS, 0, 0, 0),
        ]
    ),
    requests.join([]),
)
RESPONSES: Final = (
    requests.join([requests.encode_response(1, 5, [[b"v", 9], None]), requests.encode_response(2, 6, True)]),
    *(requests.join([requests.encode_error(3, 7, each)]) for each in ERRORS),
)
MESSAGES: Final = (
    *(
        raft_codec.join([raft_codec.encode_message(7, each)])
        for each in (
            Message(MessageType.APP, 12, 11, 5, 4, 10, (Entry(5, 11, EntryType.NORMAL, b"x" * 30), Entry(5, 12)), 9),
            Message(MessageType.APP_RESP, 11, 12, 5, index=12, reject=True, reject_hint=9),
            Message(
                MessageType.HEARTBEAT, 12, 11, 5, commit=9, context=b"12345678", lease_stamp=1 << 50, lease_promise=9
            ),
            Message(MessageType.PRE_VOTE, 12, 11, 6, 5, 12),
        )
    ),
    raft_codec.join([raft_codec.encode_notice(7, raft_codec.ReplicaNotice.GONE, 12, 11)] * 3),
    raft_codec.join([]),
)
HELLOS: Final = tuple(
    handshake.encode_hello(each)[HEAD_BYTES:]
    for each in (
        Hello(Role.CLIENT),
        Hello(Role.PEER, SESSION, NodeId(1), NodeId(2), 3, "n1:7000", SESSION),
        Hello(Role.SNAPSHOT, SESSION, NodeId(1), NodeId(2), 3, None, b"", (SESSION, SESSION), 1, 9),
    )
)
WELCOMES: Final = (
    handshake.encode_welcome(Welcome(1, SESSION, NodeId(2), 3, 1 << 60, 4096, SESSION, (SESSION,)))[HEAD_BYTES:],
    handshake.encode_welcome(Welcome(1, None, None, 0, 0, 1))[HEAD_BYTES:],
)
REFUSALS: Final = tuple(handshake.encode_refused(each)[HEAD_BYTES:] for each in ERRORS)

BEGINS: Final = tuple(
    codec.dumps(encode_begin(SESSION, 12, 11, 5, SnapshotMetadata(100, 5, conf_state), descriptor))
    for conf_state, descriptor in ((CONF_STATE, DESCRIPTOR), (ConfState((12,), (), (11,), (13,), True), DESCRIPTOR))
)
ROWS: Final = tuple(
    codec.dumps([keys.user_key(b"b%d" % number) if part == 0 else b"v" for number in range(count) for part in (0, 1)])
    for count in (1, 4)
)
STATE_ROWS: Final = codec.dumps(
    [
        *(keys.applied_key(7), rows.pack_applied(100, 5, 1 << 60, rows.pack_conf_state(CONF_STATE))),
        *(keys.descriptor_key(7), rows.pack_descriptor(DESCRIPTOR)),
        *(keys.user_key(b"b"), b"v"),
    ]
)
PARTS: Final = (
    *BEGINS,
    *(codec.dumps(["rows", 1, each, crc32(each)]) for each in ROWS),
    codec.dumps(["have", 1]),
    codec.dumps(["end", 1, 4, 99, 5]),
    codec.dumps(["refused", "busy"]),
)

ENTRIES: Final = (
    entries.encode_write_entry([(SESSION, COMMANDS[0]), (SESSION, COMMANDS[1])], 1 << 60, 9),
    entries.encode_split_entry(
        SplitCommand(Epoch(3, 9), b"f", RangeId(8), ((NodeId(1), ReplicaId(21)), (NodeId(2), ReplicaId(22)))), 1 << 60
    ),
    entries.encode_extension_entry([2, "n1", "h:1", SESSION, []], 1 << 60),
)
MEMBERSHIPS: Final = (entries.encode_membership([(1, 11), (2, 12)]), entries.encode_membership([]))

APPLIED_ROWS: Final = (
    rows.pack_applied(100, 5, 1 << 60, rows.pack_conf_state(CONF_STATE)),
    rows.pack_mark(InstallMark(DESCRIPTOR, 100, 5)),
)
DESCRIPTOR_ROWS: Final = (rows.pack_descriptor(DESCRIPTOR), rows.pack_descriptor(WHOLE))

WAL_SEED: Final = record.seed_of(SESSION)
WAL_SEGMENT: Final = 3


def _wal_record(meta: bytes, data: bytes) -> bytes:
    return record.pack_header(WAL_SEED, meta, len(data), WAL_SEGMENT, 17, 15) + meta + data


def _wal_turn(*updates: LogUpdate) -> bytes:
    meta, pieces, _, _ = record.encode_turn(list(updates))
    return _wal_record(meta, b"".join(pieces))


def _meta(data: bytes) -> bytes:
    header = record.unpack_header(data, WAL_SEGMENT)
    assert header is not None, data
    return data[record.HEADER_BYTES : record.HEADER_BYTES + header.meta_bytes]


WAL_RECORDS: Final = (
    _wal_turn(LogUpdate(RangeId(7), HardState(5, 11, 9), [Entry(5, 11, EntryType.NORMAL, b"data")])),
    _wal_turn(
        LogUpdate(
            RangeId(7),
            HardState(1, 0, 0),
            [Entry(5, 11), Entry(5, 12, EntryType.CONF_CHANGE_V2, b"change")],
            create=CreateGroup(ReplicaId(11), 10, 5, CONF_STATE, b"owner"),
            reset=ResetLog(10, 5, CONF_STATE),
            compact=CompactLog(11, 5),
        ),
        LogUpdate(RangeId(8), tombstone=Tombstone(ReplicaId(12), b"gone"), release=True),
    ),
    _wal_record(
        record.encode_checkpoint(
            [
                record.pack_group(
                    (7, 11, 5, 11, 9, 8, 5, 12), False, 5, record.pack_group_tail(CONF_STATE, b"owner", None)
                )
            ],
            {RangeId(9): ReplicaId(4)},
        ),
        b"",
    ),
)
WAL_METAS: Final = tuple(map(_meta, WAL_RECORDS))
IDENTITIES: Final = (encode_identity(Identity(SESSION, 3, (SESSION, SESSION))),)

PLACEMENT_COMMANDS: Final = tuple(
    codec.dumps(each)
    for each in (
        [1, SESSION, "n1", "h:1", SESSION, [["zone", "a"]], [DESCRIPTOR.to_wire(), WHOLE.to_wire()], [["a_bound", 5]]],
        [2, "n2", "h:7002", SESSION, []],
        [3, 2, 1, SESSION, "h:7002", [["zone", "b"], ["rack", "1"]]],
        [3, 2, 2, SESSION, "h:7002", [], [SESSION, SESSION]],
        [4, 2],
        [5, [DESCRIPTOR.to_wire()]],
        [6, 10, 30],
        [7, "replicas", 3],
        [9, 4, 1],
        [10, 4, "done", "it is done"],
        placement_commands.encode(placement_commands.Allocate(1, 3)),
    )
)
HEARTBEATS: Final = (
    codec.dumps([1, 2, 3, 4, 3, "h:1", True, False, 9, [[7, 3, 9, True, 5, 1000, [[11, 0, True]]]], [8, 9], [9, 5, 1]]),
    codec.dumps([1, 2, 3, 4, 3, "h:1", False, True, 9, [], [], [0, 0, 0], True]),
)
REPLIES: Final = (
    codec.dumps(
        [
            1,
            True,
            9,
            [[1, "n1", "h:1", 3, False, SESSION], [2, "n2", "h:2", 0, False, b""]],
            [["heartbeat_ms", 500]],
            [7, 8],
        ]
    ),
    codec.dumps(heartbeat.encode_reply(heartbeat.HeartbeatReply(False, 3, None, {}, ()))),
)


def _frames() -> list[bytes]:
    """Single frames of every kind, some compressed, and streams of several."""
    payloads = {
        FrameKind.HELLO: HELLOS,
        FrameKind.WELCOME: WELCOMES,
        FrameKind.REFUSED: REFUSALS,
        FrameKind.REQUEST: REQUESTS,
        FrameKind.RESPONSE: RESPONSES,
        FrameKind.RAFT: MESSAGES,
        FrameKind.SNAPSHOT: PARTS,
        FrameKind.GOODBYE: (b"",),
        FrameKind.PING: (b"", b"token"),
        FrameKind.PONG: (b"token",),
    }
    singles = [encode_frame(kind, payload) for kind, each in payloads.items() for payload in each]
    large = codec.dumps([b"%08d" % (number * number % 1_000_003) for number in range(400)])
    flags, packed = compress_payload(large)
    assert flags, "the large payload is worth compressing"
    singles.append(encode_frame(FrameKind.SNAPSHOT, packed, flags=flags))
    streams = [singles[0] + singles[6] + singles[7], b"".join(singles[::5]), singles[-1] * 2 + singles[3]]
    return singles + streams


FRAMES: Final = tuple(_frames())

CONFIG_FILES: Final = (
    b'name = "n1"\ndata = "/d"\nlisten = "h:1"\nbootstrap = true\n[raft]\ntick_ms = 50\n[storage]\nengine = "memory"\n',
    b'name = "n1"\ndata = "/d"\nlisten = "[::1]:0"\njoin = ["a:1", "b:2"]\nlog_level = "debug"\n[label]\nzone = "a"\n',
    b'name = "n1"\ndata = "/d"\nlisten = "h:1"\n[limits]\nconnections_max = 0x10\n[storage]\ncache_bytes = "64MiB"\n',
    b"[ranges]\nsplit_bytes = 67_108_864\nreplicas = 3\n",
)
CONFIG_VALUES: Final = (
    *("n1", "/d", "h:7001", "a:1,b:2", "zone=a", "true", "no", "50", "64MiB", "memory", "0", "-1", "9" * 30, "[::]:1"),
    *("", " ", "=", "a=b=c", "1e9", "0x10", "h:99999", "\0", "\udcff", "١٢"),
)
LINES: Final = (
    rb"put a 1; get a",
    b"put 'a b' \"c;d\" # comment",
    rb"scan --prefix \x00\xff --limit 10 ; del \\x ",
    "put ключ 'значение'; cas k 7 v".encode(),
    rb"split \x41; ranges; help; exit",
)
JSON_LINES: Final = (
    records.write_record("jsonl", b"a", b"1", 7) + records.write_record("jsonl", b"\xff\x00", b"\xfe", 8),
    b'{"key": "a", "value": "b"}\n\n  \n{"key_base64": "AAE=", "value_base64": ""}\n',
)
CSV: Final = (
    records.write_header("csv") + records.write_record("csv", b"a", b'x"\r\n,y', 7),
    b'\xef\xbb\xbfkey,value\r\na,1\r\n"b,""c",2\r\n',
    b"key_base64,value\nAAE=,v\n",
)
