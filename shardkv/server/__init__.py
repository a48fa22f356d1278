"""A node, composed of everything below.

``node`` is its life from start to ``stop``, which knows why it must: ``stores`` opens log and engine, ``membership``
makes it one of a cluster, and ``parts`` puts together the rest, which is:

* Clients: ``listener`` takes connections, ``client_connection`` reads requests and gathers answers, within ``intake``
  (large requests on their way) and ``answer_budget`` (answers that nobody takes). ``requests`` serves reads and writes;
  ``operations`` is what takes several steps, each with a ``reply`` to wait for.
* Other nodes: ``other_nodes`` is what becomes of their news, ``address_book`` knows where they are and ``known_nodes``
  writes that down, ``peers`` connects driver and transport, ``internal_client`` asks them as a client would,
  ``draining`` leaves them the leaderships at a stop.
* Placement: ``placement_service`` is this node's part in it, ``placement_group`` the way to the group that decides,
  ``reporting`` what that is told of this node, ``introduction`` how it learns of a start, ``placement_leader`` what its
  leader does, and ``overview`` what people are told; ``splitter`` splits what has grown.
* Health: ``disk_health``, ``clock_health``, ``loop_health``; ``garbage`` chooses when the process collects. The log is
  told of ``missing_leaders``, ``missing_data`` and ``shared_addresses``. ``admin`` shows the node over HTTP.

The world is handed in, so that the same code runs in virtual time.
"""

from shardkv.server.node import run_node

__all__ = ["run_node"]
