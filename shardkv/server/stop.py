"""Whether a node is to stop, and why it must: the one place that all who find a reason turn to."""

import trio

from shardkv.errors import ShardKVError, WrongCluster


class Stop:
    """``asked`` is set when the node is to stop, whoever wants that."""

    def __init__(self, asked: trio.Event) -> None:
        self.asked = asked
        self.reason: ShardKVError | None = None
        """Why this node must not go on: it was decommissioned, or runs on an old copy of its data. None: it may be
        started again."""

    @property
    def as_old_copy(self) -> bool:
        """Whether this node has been refused as one whose log has forgotten something: it must stop at once. It neither
        hands over what it may lead, nor waits for anything, for as long as it runs it votes and acknowledges."""
        return _of_old_copy(self.reason)

    def for_good(self, reason: ShardKVError) -> None:
        """The first reason counts, unless a later one is that this is an old copy."""
        if self.reason is None or (_of_old_copy(reason) and not self.as_old_copy):
            self.reason = reason
        self.asked.set()


def _of_old_copy(reason: ShardKVError | None) -> bool:
    return isinstance(reason, WrongCluster) and reason.old_copy
