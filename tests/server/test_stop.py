"""Why a node must not go on, when several say so."""

import trio

from shardkv.errors import WrongCluster
from shardkv.server.stop import Stop


def test_the_first_reason_counts_unless_a_later_one_is_that_the_node_is_an_old_copy() -> None:
    """An old copy votes and acknowledges for as long as it runs, so that must not be passed over."""
    first, old, last = WrongCluster("decommissioned"), WrongCluster("a copy", old_copy=True), WrongCluster("another")
    stop = Stop(trio.Event())
    assert stop.reason is None
    assert not stop.as_old_copy
    for reason, counts in ((first, first), (last, first), (old, old), (last, old)):
        stop.for_good(reason)
        assert stop.asked.is_set()
        assert stop.reason is counts
        assert stop.as_old_copy == (counts is old)
