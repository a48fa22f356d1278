"""Live nodes with one address: said once by the placement leader, and once that it is over.

Nothing refuses such an address. A node may take over that of one that is lost for good, and two that are started anew
may swap theirs, one after the other; which of the two the group hears of first says nothing. The rule: it is wrong
where both go on living. Does not live here: how a node finds out that its own address is another's (``other_nodes``).
"""

from typing import Any, Final

from shardkv.outage import Outage
from shardkv_placement.view import ClusterView

SHARED_SECONDS: Final = 10.0
"""A node that has moved is known by its new address long before."""
NAMED_MAX: Final = 10
"""Nodes in one line of the log."""


class SharedAddresses:
    """A placement leader's."""

    def __init__(self, log: Any) -> None:
        self._log = log
        self._outage = Outage(SHARED_SECONDS)

    def look(self, view: ClusterView) -> None:
        """At the live nodes as they are now."""
        live = view.live_nodes
        if len({node.address for node in live}) == len(live):
            if self._outage.end():
                self._log.info("no two live nodes have the same address any more")
        elif self._outage.lasts(view.now):
            addresses = [node.address for node in live]
            several = [node for node in live if addresses.count(node.address) > 1]
            self._log.error(
                "live nodes have the same address, so one of them cannot be reached: correct its --advertise",
                nodes=[int(node.node_id) for node in several[:NAMED_MAX]],
                addresses=sorted({node.address for node in several[:NAMED_MAX]}),
            )
