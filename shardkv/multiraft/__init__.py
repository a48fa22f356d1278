"""All Raft groups of one node, run together.

``replica`` is one group's state on this node, ``turn`` (pure) gathers what all groups want done, ``driver`` (trio)
does it: one log record, one fsync, one frame per peer, one engine batch for all groups of a turn. ``catalog`` holds the
replicas and decides how they come to be and end; ``snapshots`` streams a range to a replica that fell behind;
``maintenance`` flushes the engine and lets go of old log. Requests, connections and placement live above.
"""
