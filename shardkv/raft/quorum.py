"""What a majority, or both majorities of a joint configuration, have agreed on.

Pure functions of numbers: who the voters are comes in, nothing is remembered. An empty half agrees with everything,
so that a configuration that is not joint needs no case of its own (thesis 4.3).
"""

from collections.abc import Iterable, Mapping
from enum import IntEnum
from typing import Final

EVERYTHING: Final = (1 << 64) - 1
"""The index that no voters at all have acknowledged: above every real one."""


class VoteResult(IntEnum):
    PENDING = 1
    LOST = 2
    WON = 3


def majority_value(values: list[int]) -> int:
    """The largest value that more than half of ``values`` reach. Sorts ``values`` in place; none give EVERYTHING."""
    if not values:
        return EVERYTHING
    values.sort()
    return values[(len(values) - 1) >> 1]


def committed_index(voters: Iterable[int], acknowledged: Mapping[int, int]) -> int:
    """The largest index that a majority has acknowledged; a voter that is missing has acknowledged nothing."""
    return majority_value([acknowledged.get(voter, 0) for voter in voters])


def joint_committed_index(incoming: Iterable[int], outgoing: Iterable[int], acknowledged: Mapping[int, int]) -> int:
    """The largest index that a majority of either half has acknowledged."""
    return min(committed_index(incoming, acknowledged), committed_index(outgoing, acknowledged))


def vote_result(voters: Iterable[int], votes: Mapping[int, bool]) -> VoteResult:
    """What an election among ``voters`` has come to, given the votes so far."""
    granted = missing = total = 0
    for voter in voters:
        total += 1
        vote = votes.get(voter)
        if vote is None:
            missing += 1
        elif vote:
            granted += 1
    if total == 0:
        return VoteResult.WON
    needed = total // 2 + 1
    if granted >= needed:
        return VoteResult.WON
    return VoteResult.PENDING if granted + missing >= needed else VoteResult.LOST


def joint_vote_result(incoming: Iterable[int], outgoing: Iterable[int], votes: Mapping[int, bool]) -> VoteResult:
    """Both halves must grant; one that refuses has lost the election for both."""
    first = vote_result(incoming, votes)
    second = vote_result(outgoing, votes)
    if first is second:
        return first
    if VoteResult.LOST in (first, second):
        return VoteResult.LOST
    return VoteResult.PENDING
