"""All Raft groups of one node, run together.

``replica`` is one group's state on this node, ``turn`` (pure) gathers what all groups want done, ``driver`` (trio) has
it done for all groups of a turn: one entry per group by ``proposer``, one log record and one sync by ``log_writer``,
one frame per peer by ``outgoing``, one engine batch by ``applier``; ``hedger`` sees to entries that take long.
``catalog`` holds the replicas and decides how they come to be. ``snapshots`` streams a range to a replica that fell
behind: ``snapshot_sender`` and ``snapshot_receiver`` are its ends, ``snapshot_stream`` is the connection between them
and ``snapshot_parts`` what it carries, without I/O; ``snapshot_install`` puts the rows in place. ``maintenance``
flushes the engine and lets go of old log; ``space`` (pure) says what is taken on while the disk is full. Requests,
connections and placement live above.
"""
