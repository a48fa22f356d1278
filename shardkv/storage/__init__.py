"""A node's durable state: the shared Raft log and the ordered engine, behind two small protocols.

``engine`` defines the ordered store, ``memory`` and ``rocks`` implement it; ``wal`` is the shared log of all groups;
``directory`` is the identity of a data directory. Of Raft only its messages are known here.
"""
