"""shardkv: a multi-Raft, range-sharded, strictly serializable key-value database.

This package holds the node. Programs use :mod:`shardkv_client`; people use the ``shardkv`` command.
Nothing is imported here, so that the client, which needs only errors, types, codec and wire, stays light.
"""

__version__ = "0.1.0"
