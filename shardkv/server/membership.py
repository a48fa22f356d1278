"""How a data directory becomes that of a node of a cluster: by founding one, by joining one, or in an earlier start.

Does not live here: asking others to be let in (``internal_client``), and what a member tells the cluster of its start
(``introduction``). The rule: the directory is assigned last, after the addresses of the others are stored, for from
then on a start may do without --bootstrap and --join.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import trio

from shardkv.address import Address, parse_address
from shardkv.config import NodeConfig
from shardkv.environment import Environment
from shardkv.errors import ConfigError
from shardkv.server.internal_client import OwnAddresses, join_cluster, own_address
from shardkv.server.introduction import FIRST_NODE
from shardkv.server.known_nodes import KnownNodesFile
from shardkv.storage.directory import DataDirectory, Identity
from shardkv.types import NodeId


@dataclass(frozen=True, slots=True)
class Membership:
    """How this start came to be that of a member."""

    is_new: bool
    """The directory has become this node's in this start."""
    founded_ns: int | None = None
    """When this start made the cluster, if it did."""


def require_way_in(identity: Identity, config: NodeConfig) -> None:
    """Raises ConfigError where a node that is no member is told neither to found a cluster nor to join one."""
    if not identity.assigned and not config.bootstrap and not config.join:
        raise ConfigError(
            f"if this node ran before, its data directory is not mounted: {config.data} is a new one. To begin there, "
            "give --bootstrap to start a cluster, or --join HOST:PORT to join one"
        )


async def become_member(
    config: NodeConfig,
    environment: Environment,
    directory: DataDirectory,
    *,
    address: str,
    listens_at: str,
    known_nodes: KnownNodesFile,
    own: OwnAddresses,
    stop: trio.Event,
    log: Any,
) -> Membership | None:
    """Make sure that the directory belongs to a node of a cluster; None if told to stop before one lets it in.

    Whom the file ``known_nodes`` or the answer to a join names is in the address book then. ``address`` is where others
    reach this node, ``listens_at`` where it listens, and ``own`` is told of the connections that come in meanwhile.
    """
    identity, workers = directory.identity, environment.workers
    if identity.assigned:
        await known_nodes.load()
        return Membership(is_new=False)
    if config.bootstrap:
        cluster_id = environment.ids.random_bytes(16)
        founded_ns = environment.clock.monotonic_ns()
        await workers.run(directory.assign, cluster_id, FIRST_NODE, config.name)
        return Membership(is_new=True, founded_ns=founded_ns)
    labels = [[key, value] for key, value in config.label]
    joined = await join_cluster(
        environment,
        _others_to_join(config.join, {parse_address(address), parse_address(listens_at)}),
        [config.name, address, identity.token, labels],
        own=own,
        log=log,
        stop=stop,
    )
    if joined is None:
        log.info("told to stop before it had joined the cluster")
        return None
    cluster_id, node_id, nodes = joined
    known_nodes.address_book.joined(nodes)
    await known_nodes.store()
    await workers.run(directory.assign, cluster_id, NodeId(node_id), config.name)
    return Membership(is_new=True)


def _others_to_join(join: Collection[str], own: Collection[Address]) -> list[str]:
    """Who may let this node in: it cannot itself, though a list for all nodes may name it, too."""
    others = [address for address in join if parse_address(address) not in own]
    if not others:
        raise own_address(join)
    return others
