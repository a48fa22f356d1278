"""Whose data directory it is: made once, counted at each start, refused when in doubt, and never changed then."""

import itertools
from struct import pack
from zlib import crc32

import pytest

from shardkv.errors import Corruption, DataDirectoryError, OutOfSpace
from shardkv.storage.directory import (
    FORMAT,
    DataDirectory,
    Identity,
    decode_identity,
    encode_identity,
    open_directory,
)
from shardkv.types import LINEAGE_MAX, TOKEN_BYTES, NodeId

from .support import MemoryDisk, Node

PATH = "/data"
CLUSTER, OTHER = b"C" * 16, b"D" * 16
NODE = NodeId(4)


class CountingIds:
    def __init__(self) -> None:
        self.counter = itertools.count(1)

    def random_bytes(self, count: int) -> bytes:
        return next(self.counter).to_bytes(count, "big")


def start(disk: MemoryDisk, ids: CountingIds | None = None) -> DataDirectory:
    return open_directory(disk, ids or CountingIds(), PATH)


def restarted(disk: MemoryDisk) -> DataDirectory:
    """A start after a crash: what was not durable is gone, and so are the dead process's locks."""
    return start(disk.lost())


def flipped(data: bytes, position: int, bit: int) -> bytes:
    return data[:position] + bytes((data[position] ^ 1 << bit,)) + data[position + 1 :]


def test_a_new_directory_gets_a_token_and_counts_its_starts() -> None:
    disk = MemoryDisk()
    first = start(disk)
    assert first.identity == Identity((1).to_bytes(16, "big"), 1, ((2).to_bytes(16, "big"),))
    assert not first.identity.assigned
    first.close()
    second = start(disk, CountingIds())
    assert second.identity == Identity(first.identity.token, 2, (second.identity.starts[0], *first.identity.starts))
    assert {name for name in disk.directories if name.startswith("/data/")} == {
        "/data/wal",
        "/data/engine",
        "/data/ingest",
    }


def test_the_boot_counter_survives_a_crash_right_after_the_start() -> None:
    """TRAPS 24: peers refuse a lower one, so it must never be given twice."""
    disk = MemoryDisk()
    for boot in range(1, 5):
        directory = start(disk)
        assert directory.identity.boot == boot
        disk = disk.lost()


def test_an_assignment_stays() -> None:
    disk = MemoryDisk()
    directory = start(disk)
    directory.assign(CLUSTER, NODE, "anna")
    directory.assign(CLUSTER, NODE, "anna")
    again = restarted(disk)
    starts = (again.identity.starts[0], *directory.identity.starts)
    assert again.identity == Identity(directory.identity.token, 2, starts, CLUSTER, NODE, "anna")
    assert again.identity.assigned
    again.assign(CLUSTER, NODE, "anna")


@pytest.mark.parametrize(
    "cluster_id, node_id, name, match",
    [
        (OTHER, NODE, "anna", "belongs to cluster 4343"),
        (CLUSTER, NodeId(5), "anna", "the node named 'anna'"),
        (CLUSTER, NODE, "bert", "under its own name"),
    ],
)
def test_a_directory_of_another_cluster_or_node_is_refused(
    cluster_id: bytes, node_id: NodeId, name: str, match: str
) -> None:
    disk = MemoryDisk()
    directory = start(disk)
    directory.require(cluster_id=cluster_id, node_id=node_id, name=name)
    directory.assign(CLUSTER, NODE, "anna")
    before = disk.read("/data/identity")
    with pytest.raises(DataDirectoryError, match=match):
        directory.assign(cluster_id, node_id, name)
    with pytest.raises(DataDirectoryError, match=match):
        directory.require(cluster_id=cluster_id, node_id=node_id, name=name)
    assert disk.read("/data/identity") == before


def test_a_directory_in_use_is_refused_and_not_counted() -> None:
    disk = MemoryDisk()
    first = start(disk)
    with pytest.raises(DataDirectoryError, match="held by another"):
        start(disk)
    first.close()
    assert start(disk).identity.boot == 2


def test_a_condemned_directory_is_refused_for_good_and_not_counted() -> None:
    """Trap 24: counted, an old copy would pass for the newest after enough starts."""
    disk = MemoryDisk()
    first = start(disk)
    first.condemn("started 7 times elsewhere")
    first.close()
    before = disk.read(f"{PATH}/identity")
    for _ in range(2):
        with pytest.raises(DataDirectoryError, match="started 7 times elsewhere"):
            start(disk)
    assert disk.read(f"{PATH}/identity") == before
    assert not disk.locks


@pytest.mark.parametrize("name, match", [("photo.jpg", "not empty"), ("wal", "lost"), ("engine", "lost")])
def test_a_foreign_directory_is_refused_and_left_as_it_is(name: str, match: str) -> None:
    disk = MemoryDisk()
    disk.make_directory(PATH)
    disk.names[f"{PATH}/{name}"] = Node(bytearray(b"mine"), bytearray(b"mine"))
    with pytest.raises(DataDirectoryError, match=match):
        start(disk)
    assert disk.list(PATH) == [name]
    assert not disk.locks


def test_an_empty_directory_and_the_remains_of_a_dead_first_start_are_taken() -> None:
    disk = MemoryDisk()
    disk.make_directory(PATH)
    for name in ("LOCK", "identity.temporary"):
        disk.names[f"{PATH}/{name}"] = Node()
    assert start(disk).identity.boot == 1


def test_a_file_in_the_place_of_the_directory_is_refused() -> None:
    disk = MemoryDisk()
    disk.names[PATH] = Node()
    with pytest.raises(DataDirectoryError, match="not a directory"):
        start(disk)
    disk = MemoryDisk()
    disk.names["/data"] = Node()
    with pytest.raises(DataDirectoryError, match="cannot be made"):
        open_directory(disk, CountingIds(), "/data/node")


def test_a_newer_format_is_refused_whatever_follows_it() -> None:
    disk = MemoryDisk()
    start(disk).close()
    content = disk.names["/data/identity"].current
    content[8] = FORMAT + 1
    before = bytes(content)
    with pytest.raises(DataDirectoryError, match="newer version"):
        start(disk)
    assert disk.read("/data/identity") == before
    assert not disk.locks


def test_every_flipped_bit_and_every_cut_of_an_identity_is_noticed() -> None:
    identity = Identity(b"T" * 16, 7, (b"s" * 16, b"r" * 16), CLUSTER, NODE, "anna")
    data = encode_identity(identity)
    assert decode_identity(data, "identity") == identity
    for position in range(len(data)):
        for bit in range(8):
            with pytest.raises((Corruption, DataDirectoryError)):
                decode_identity(flipped(data, position, bit), "identity")
        with pytest.raises(Corruption, match="empty data directory"):
            decode_identity(data[:position], "identity")


def test_a_directory_knows_its_last_starts_and_no_more() -> None:
    disk, ids = MemoryDisk(), CountingIds()
    tokens: list[bytes] = []
    for _ in range(LINEAGE_MAX + 3):
        directory = start(disk, ids)
        directory.close()
        tokens.insert(0, directory.identity.starts[0])
        assert directory.identity.starts == tuple(tokens[:LINEAGE_MAX])
    assert len(set(tokens)) == len(tokens)


def test_an_identity_of_the_first_format_is_taken_on() -> None:
    """It has no tokens of starts."""
    name = b"anna"
    body = pack("<16sQ16sQH", b"T" * 16, 7, CLUSTER, NODE, len(name)) + name
    data = pack("<8sII", b"shardkv\n", 1, crc32(body)) + body
    assert decode_identity(data, "identity") == Identity(b"T" * 16, 7, (), CLUSTER, NODE, "anna")
    longer = body + bytes(TOKEN_BYTES)
    with pytest.raises(Corruption, match="format 1"):
        decode_identity(pack("<8sII", b"shardkv\n", 1, crc32(longer)) + longer, "identity")


def test_a_damaged_identity_gives_the_lock_back() -> None:
    disk = MemoryDisk()
    start(disk).close()
    disk.names["/data/identity"].current[20] ^= 1
    with pytest.raises(Corruption, match="checksum"):
        start(disk)
    assert not disk.locks


def test_a_start_on_a_full_disk_is_counted_in_the_room_of_the_logs_next_segment() -> None:
    """TRAPS 24: a boot counter that is given twice passes for a restored disk."""
    disk = MemoryDisk()
    start(disk).close()

    def full(operation: str, path: str) -> None:
        if operation == "write_atomically" and "/data/wal/spare-1" in disk.names:
            raise OutOfSpace("no space left")

    disk.names["/data/wal/spare-1"] = Node()
    disk.observe = full
    assert start(disk).identity.boot == 2
    assert disk.list("/data/wal") == []
    disk = disk.lost()
    assert start(disk).identity.boot == 3


@pytest.mark.parametrize("name", ["wal", None])
def test_a_start_on_a_full_disk_without_anything_to_give_up_says_so_and_gives_the_lock_back(name: str | None) -> None:
    disk = MemoryDisk()
    disk.make_directory(PATH if name is None else f"{PATH}/{name}")
    data = encode_identity(Identity(b"T" * 16, 7, ()))
    disk.names["/data/identity"] = Node(bytearray(data), bytearray(data))

    def full(operation: str, path: str) -> None:
        if operation == "write_atomically":
            raise OutOfSpace("no space left")

    disk.observe = full
    with pytest.raises(OutOfSpace, match="no space left"):
        start(disk)
    assert not disk.locks
    assert decode_identity(disk.read("/data/identity"), "identity").boot == 7


def test_how_far_the_log_was_on_disk_is_noted_durably() -> None:
    disk = MemoryDisk()
    directory = start(disk)
    assert directory.log_mark.read() == 0
    for sequence in (7, 9):
        directory.log_mark.write(sequence)
    disk = disk.lost()
    assert start(disk).log_mark.read() == 9


def test_every_flipped_bit_and_every_cut_of_a_log_mark_is_noticed_and_so_is_another_directorys() -> None:
    disk = MemoryDisk()
    directory = start(disk)
    directory.log_mark.write(7)
    mark = disk.names["/data/log-mark"].current
    data = bytes(mark)
    broken = [data[:size] for size in range(len(data))]
    broken += [flipped(data, position, bit) for position in range(len(data)) for bit in range(8)]
    ids = CountingIds()
    ids.random_bytes(1)
    other = MemoryDisk()
    start(other, ids).log_mark.write(7)
    broken.append(bytes(other.names["/data/log-mark"].current))
    for content in broken:
        mark[:] = content
        with pytest.raises(Corruption, match="remove /data/log-mark only if"):
            directory.log_mark.read()
    mark[:] = data
    assert directory.log_mark.read() == 7
