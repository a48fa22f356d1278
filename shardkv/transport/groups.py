"""One error out of several: what a nursery's exception group means to whoever is not interested in its tasks."""

import trio

from shardkv.errors import ShardKVError


def main_error(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The error that matters of a group's: our own bugs before all, then ours before others', cancellation last."""
    leaves: list[BaseException] = []
    waiting: list[BaseException] = [group]
    while waiting:
        error = waiting.pop(0)
        if isinstance(error, BaseExceptionGroup):
            waiting.extend(error.exceptions)
        else:
            leaves.append(error)
    return min(leaves, key=_rank)


def _rank(error: BaseException) -> int:
    if isinstance(error, ShardKVError):
        return 1
    if isinstance(error, (trio.BrokenResourceError, trio.ClosedResourceError, OSError)):
        return 2
    return 3 if isinstance(error, trio.Cancelled) else 0
