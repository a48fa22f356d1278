"""Which nodes the cluster has, and where each can be reached: the newest word wins.

Two sources say so: the placement group's node table, and the nodes themselves when they greet. A node that comes back
at another address cannot wait until the table says so everywhere, for the group may need that very node's vote to
change the table; so its greeting counts at once. The rule: a boot counter dates every address, and an older one never
replaces a newer one.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any
from zlib import crc32

from shardkv import codec
from shardkv.errors import Corruption, MalformedRequest
from shardkv.types import NodeId
from shardkv_placement.heartbeat import NodeEntry
from shardkv_placement.records import NodeRecord


@dataclass(frozen=True, slots=True)
class KnownNode:
    name: str
    address: str
    boot: int = 0
    """Of the start at which the node had this address; 0 if that is not known."""
    start_token: bytes = b""
    """That start's own, random; empty if that is not known."""
    earlier_tokens: tuple[bytes, ...] = ()
    """Of the starts right before it, newest first, as far as they are known."""
    agreed: tuple[int, bytes] = (0, b"")
    """Boot counter and token of the newest start that the placement group has agreed on. What the node has said since
    may be a copy's word, and is judged by it."""

    @classmethod
    def of(cls, row: NodeEntry | NodeRecord) -> "KnownNode":
        """As the group has it."""
        start = (row.boot, row.start_token)
        return cls(row.name, row.address, *start, agreed=start)


class AddressBook:
    """See the module. Iterates over ``(node id, KnownNode)``."""

    __slots__ = ("_nodes",)

    def __init__(self) -> None:
        self._nodes: dict[NodeId, KnownNode] = {}

    def __iter__(self) -> Iterator[tuple[NodeId, KnownNode]]:
        return iter(self._nodes.items())

    def __len__(self) -> int:
        return len(self._nodes)

    def address_of(self, node_id: NodeId) -> str | None:
        known = self._nodes.get(node_id)
        return None if known is None else known.address

    def start_of(self, node_id: NodeId) -> tuple[int, bytes] | None:
        """The boot counter and the token of the start that is known. A node's own come from the table alone."""
        known = self._nodes.get(node_id)
        return None if known is None else (known.boot, known.start_token)

    def joined(self, rows: Iterable[Iterable[Any]]) -> None:
        """The answer to a join: ``[[node id, name, address], ...]``."""
        for node_id, name, address, *_ in rows:
            self._nodes[NodeId(int(node_id))] = KnownNode(str(name), str(address))

    def recovered(self, record: NodeRecord) -> None:
        """What this node's own replica of the placement group says: perhaps old, and never older than nothing.

        Of two starts of one count it is right, as the table is: the group has agreed on one.
        """
        known = self._nodes.get(record.node_id)
        if known is None or known.boot < record.boot or (known.boot == record.boot and record.start_token):
            self._nodes[record.node_id] = KnownNode.of(record)
        elif known.agreed[0] <= record.boot:
            self._nodes[record.node_id] = replace(known, agreed=(record.boot, record.start_token))

    def table(self, entries: Iterable[NodeEntry], is_newest: Callable[[NodeId, int, bytes], bool]) -> None:
        """The placement group's node table; who is not in it, or was decommissioned, is no member any more.

        A greeting that is newer than the table counts on, if its start ``is_newest``.
        """
        before, self._nodes = self._nodes, {}
        for entry in entries:
            if not entry.decommissioned:
                told = KnownNode.of(entry)
                greeted = before.get(entry.node_id)
                if (
                    greeted is not None
                    and greeted.boot > entry.boot
                    and is_newest(entry.node_id, greeted.boot, greeted.start_token)
                ):
                    told = replace(greeted, name=entry.name, agreed=told.agreed)
                self._nodes[entry.node_id] = told

    def greeted(
        self, node_id: NodeId, address: str, boot: int, start_token: bytes, earlier_tokens: tuple[bytes, ...] = ()
    ) -> bool:
        """A member has said where it listens; whether that is news. A stranger's word waits for the table."""
        known = self._nodes.get(node_id)
        if known is None or boot < known.boot:
            return False
        self._nodes[node_id] = replace(
            known, address=address, boot=boot, start_token=start_token, earlier_tokens=earlier_tokens
        )
        return self._nodes[node_id] != known

    def encode(self) -> bytes:
        """For the file in the data directory."""
        rows = codec.dumps(
            [
                [node_id, it.name, it.address, it.boot, it.start_token, list(it.earlier_tokens), *it.agreed]
                for node_id, it in sorted(self._nodes.items())
            ]
        )
        return codec.dumps([crc32(rows), rows])

    def decode(self, data: bytes) -> None:
        """Replace everything by what :meth:`encode` gave. Fields that are not known are passed over.

        Raises Corruption: a node that took a damaged address for true would look for its peers where they are not.
        """
        try:
            found = codec.loads(data)
            # A file without a checksum is from before there was one.
            rows = codec.loads(_checked(found)) if found and isinstance(found[0], int) else found
            self._nodes = {
                NodeId(node_id): KnownNode(name, address, *rest[:2], *_more(*rest[2:5]))
                for node_id, name, address, *rest in rows
            }
        except (MalformedRequest, TypeError, ValueError) as error:
            raise Corruption(
                "the file of known nodes is damaged; remove it, and start the node with --join HOST:PORT of another"
            ) from error


def _checked(found: Any) -> bytes:
    checksum, rows = found
    if crc32(rows) != checksum:
        raise ValueError(f"the checksum is {crc32(rows)}, not {checksum}")
    return bytes(rows)


def _more(earlier_tokens: list[bytes] | None = None, boot: int = 0, token: bytes = b"") -> Iterator[Any]:
    """What a file has had since starts have tokens of those before them."""
    yield tuple(earlier_tokens or ())
    yield (boot, token)
