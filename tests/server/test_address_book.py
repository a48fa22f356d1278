"""Where the nodes are: the newest word wins, whoever says it, and the cluster needs no table to find a node again."""

from dataclasses import replace

import pytest
import trio
from structlog.testing import capture_logs
from trio.testing import MockClock

from shardkv import codec
from shardkv.errors import Corruption
from shardkv.server.address_book import AddressBook, KnownNode
from shardkv.server.known_nodes import FILE_NAME
from shardkv.types import PLACEMENT_RANGE, NodeId
from shardkv_placement.heartbeat import NodeEntry
from shardkv_placement.records import NodeRecord
from tests.server.world import PORT, world

N1, N2 = NodeId(1), NodeId(2)


def token(boot: int) -> bytes:
    return b"%016d" % boot


def entry(node_id: NodeId, address: str, boot: int, *, decommissioned: bool = False) -> NodeEntry:
    return NodeEntry(node_id, f"n{node_id}", address, boot, decommissioned, token(boot))


def anything(node_id: NodeId, boot: int, start_token: bytes) -> bool:
    """A greeting's start is the newest."""
    return True


def book(*entries: NodeEntry) -> AddressBook:
    made = AddressBook()
    made.table(entries, anything)
    return made


def test_a_greeting_replaces_an_older_address_at_once() -> None:
    nodes = book(entry(N2, "old:1", 1))
    assert nodes.greeted(N2, "new:1", 2, token(2))
    assert nodes.address_of(N2) == "new:1"
    assert not nodes.greeted(N2, "new:1", 2, token(2)), "nothing new"


def test_a_table_that_is_behind_does_not_bring_an_old_address_back() -> None:
    nodes = book(entry(N2, "old:1", 1))
    nodes.greeted(N2, "new:1", 2, token(2))
    nodes.table([entry(N2, "old:1", 1)], anything)
    assert nodes.address_of(N2) == "new:1"
    nodes.table([entry(N2, "newer:1", 3)], anything)
    assert nodes.address_of(N2) == "newer:1"


def test_a_greeting_from_a_copy_gives_way_to_the_table_though_it_counted_further() -> None:
    nodes = book(entry(N2, "old:1", 1))
    nodes.greeted(N2, "copy:1", 5, token(5))
    assert dict(nodes)[N2].agreed == (1, token(1))
    nodes.table([entry(N2, "old:1", 2)], lambda node_id, boot, start_token: (boot, start_token) != (5, token(5)))
    assert dict(nodes)[N2] == KnownNode("n2", "old:1", 2, token(2), agreed=(2, token(2)))


def test_the_token_of_the_newest_start_stays_whoever_told_of_it() -> None:
    nodes = book(entry(N2, "a:1", 1))
    assert dict(nodes)[N2].start_token == token(1)
    nodes.greeted(N2, "a:1", 2, token(2))
    nodes.table([entry(N2, "a:1", 1)], anything)
    assert dict(nodes)[N2].start_token == token(2)
    nodes.table([entry(N2, "a:1", 3)], anything)
    assert dict(nodes)[N2].start_token == token(3)


def test_a_greeting_of_an_earlier_start_changes_nothing() -> None:
    nodes = book(entry(N2, "new:1", 2))
    assert not nodes.greeted(N2, "old:1", 1, token(1))
    assert nodes.address_of(N2) == "new:1"


def test_a_strangers_greeting_is_not_believed() -> None:
    nodes = book(entry(N1, "a:1", 1))
    assert not nodes.greeted(N2, "b:1", 9, token(9))
    assert nodes.address_of(N2) is None


def test_who_left_the_table_or_was_decommissioned_is_no_member() -> None:
    nodes = book(entry(N1, "a:1", 1), entry(N2, "b:1", 1))
    nodes.table([entry(N1, "a:1", 1), entry(N2, "b:1", 1, decommissioned=True)], anything)
    assert [node_id for node_id, _ in nodes] == [N1]


def test_a_damaged_file_is_refused_whichever_bit_it_is() -> None:
    """Found by a simulation whose disk flips bits on read: a node looked for its peers at an address that never was."""
    data = book(entry(N1, "a:1", 1), entry(N2, "b:1", 1)).encode()
    for position in range(8 * len(data)):
        damaged = bytearray(data)
        damaged[position // 8] ^= 1 << position % 8
        with pytest.raises(Corruption):
            AddressBook().decode(bytes(damaged))
    with pytest.raises(Corruption):
        AddressBook().decode(data[:-1])


def test_a_file_from_before_there_was_a_checksum_is_read() -> None:
    nodes = AddressBook()
    nodes.decode(codec.dumps([[1, "n1", "a:1", 3]]))
    assert nodes.address_of(N1) == "a:1"


def test_the_file_brings_back_what_was_known() -> None:
    nodes = book(entry(N1, "a:1", 1), entry(N2, "b:1", 4))
    again = AddressBook()
    again.decode(nodes.encode())
    assert list(again) == list(nodes)


def test_a_join_gives_addresses_that_any_greeting_may_replace() -> None:
    nodes = AddressBook()
    nodes.joined([[1, "n1", "a:1"]])
    assert list(nodes) == [(N1, KnownNode("n1", "a:1"))]
    assert nodes.greeted(N1, "b:1", 1, token(1))


async def test_a_node_that_has_moved_is_found_though_the_table_needs_its_vote(autojump_clock: MockClock) -> None:
    """DESIGN 4.10: identity is an id, not an address. Of three nodes one is dead: the one that has moved completes the
    majority, and until it is heard nobody can change the table that would say where it is."""
    async with world(3) as cluster, cluster.client() as kv:
        await kv.put(b"kept", b"1")
        moved = cluster.nodes["n2"]
        await cluster.nodes["n3"].kill()
        await moved.kill()
        moved.config = replace(moved.config, listen=f"elsewhere:{PORT}")
        await moved.start()
        with trio.fail_after(30):
            async with cluster.client("n1") as again:
                assert await again.put(b"written", b"2", timeout=25) > 0
                found = await again.get(b"kept")
                assert found is not None
                assert found.value == b"1"
                await cluster.until(
                    again,
                    lambda status, ranges: (
                        {each["name"]: each["address"] for each in status["node_table"]}["n2"] == moved.address
                    ),
                )


async def test_a_node_whose_file_of_known_nodes_is_damaged_names_it(autojump_clock: MockClock) -> None:
    async with world(1) as cluster:
        node = cluster.nodes["n1"]
        await node.kill()
        path = f"{node.config.data}/{FILE_NAME}"
        node.environment.disk.write_atomically(path, b"damaged")
        with pytest.raises(Corruption, match=f"^{path}: .* is damaged; remove it"):
            await node.run_to_its_end()


async def test_a_node_whose_file_of_known_nodes_is_gone_says_what_to_do(autojump_clock: MockClock) -> None:
    """It knows nobody to answer, and only its debug log told. Those with the placement group's table look there."""
    with capture_logs() as lines:
        async with world(4) as cluster:
            told = []
            for node in cluster.nodes.values():
                lost = PLACEMENT_RANGE not in node.inside.catalog.replicas
                peers = f"{node.config.data}/{FILE_NAME}"
                others = [each.address for each in cluster.nodes.values() if each is not node]
                await node.kill()
                node.environment.disk.unlink(peers)
                node.config = replace(node.config, join=())
                await node.start()
                await cluster.sleep(10)
                told += [node.name for line in lines if line.get("missing") == peers]
                assert (node.name in told) == lost
                assert node.environment.disk.exists(peers) != lost
                lines.clear()
                if lost:
                    await node.kill()
                    node.config = replace(node.config, join=tuple(others), bootstrap=False)
                    await node.start()
                    await cluster.sleep(10)
                    assert node.environment.disk.exists(peers)
            assert len(told) == 1
    assert not any("missing" in line for line in lines)


async def test_nodes_whose_files_of_known_nodes_are_all_gone_look_into_the_table_that_they_hold(
    autojump_clock: MockClock,
) -> None:
    """Each has a replica of the placement group, whose log tells where the others are; no majority has to say so."""
    async with world(3) as cluster:
        for node in cluster.nodes.values():
            await node.kill()
            node.environment.disk.unlink(f"{node.config.data}/{FILE_NAME}")
            node.config = replace(node.config, join=(), bootstrap=False)
        for node in cluster.nodes.values():
            await node.start()
        async with cluster.client() as kv:
            await kv.put(b"k", b"v", timeout=30)
            assert {node.id for node in await kv.nodes()} == {1, 2, 3}


def test_of_two_starts_of_one_count_the_one_that_the_own_replica_has_agreed_on_counts() -> None:
    """The other, which greeted this node, was a copy's: whoever believes it refuses the node itself."""
    book = AddressBook()
    book.joined([[3, "n3", "h:1"]])
    assert book.greeted(NodeId(3), "copy:1", 7, b"c" * 16)
    book.recovered(NodeRecord(NodeId(3), "n3", "h:1", b"d" * 16, (), boot=7, start_token=b"n" * 16))
    assert book.start_of(NodeId(3)) == (7, b"n" * 16)
    assert book.address_of(NodeId(3)) == "h:1"
