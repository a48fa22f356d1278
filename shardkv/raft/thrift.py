"""Thrift: a leader sends an entry at once to no more followers than make a quorum with it.

An append costs the leader and the follower the same whatever is in it. So the others, the *spares*, get several entries
in one: when enough have collected, with the answer to the next heartbeat, or when those that are waited for take long
(``replication.hedge``). To the group this is a network that is slow towards the spares; no rule of safety knows of it.

Whoever is sent everything at once should be quick. That is found out by races: now and then all have been sent the
same, and when a spare's answer made the quorum before one's that was relied on, several times in a row, the two change
places. Which follower a leader relies on at first depends on its id, so that leaders rely on different ones.

Only the bookkeeping lives here; what is sent is decided in ``replication``. Off unless ``spare_entries_max`` is above
one, and while the configuration is joint or has fewer than three voters.
"""

from typing import TYPE_CHECKING, Final

from shardkv.raft.messages import NONE
from shardkv.raft.progress import Progress, ProgressState

if TYPE_CHECKING:
    from shardkv.raft.state import Raft

RACES_LOST_MAX: Final = 3
"""So many races in a row cost a follower its place."""
HELD_BYTES_MAX: Final = 256 * 1024
"""Payload that waits for company. More would not make an append much cheaper, and the spare's disk is idle."""
NO_RACE: Final = 0


def arrange(raft: "Raft") -> None:
    """The leader's term begins, or its followers are others now."""
    raft.race = NO_RACE
    raft.races_lost = 0
    for peer in raft.progress.values():
        peer.relied_on()
    voters, own = raft.configuration.voters, raft.id
    wanted = raft.settings.spare_entries_max > 1 and not raft.configuration.voters_outgoing
    raft.preferred = []
    if wanted and len(voters) > 2 and own in voters:
        raft.preferred = [id_ for id_ in voters if id_ > own] + [id_ for id_ in voters if id_ < own]


def needed(raft: "Raft") -> int:
    """How many others make a quorum with this leader."""
    return (len(raft.preferred) + 1) // 2


def holds(raft: "Raft", peer: Progress) -> bool:
    """Whether what a follower lacks waits for company."""
    return (
        peer.spare
        and peer.state == ProgressState.REPLICATE
        and raft.transferee == NONE
        and raft.log.last_index - peer.next + 1 < raft.settings.spare_entries_max
        and peer.held_bytes < HELD_BYTES_MAX
    )


def owe(peer: Progress) -> None:
    """What this follower lacks, or the next entry, is not to wait for company, should it be a spare.

    An append was due to it and did not bring it everything, or could not leave: the rest goes with its answer. Or a
    heartbeat's answer has met entries that wait for others: where few are written they never collect, so there would
    be no race.
    """
    if peer.spare:
        peer.held_bytes = HELD_BYTES_MAX


def decide(raft: "Raft") -> None:
    """The entry that everybody was sent is committed: whose answers did that."""
    index, raft.race = raft.race, NO_RACE
    progress, preferred = raft.progress, raft.preferred
    slow = [id_ for id_ in preferred if progress[id_].match < index and not progress[id_].spare]
    quick = [id_ for id_ in preferred if progress[id_].match >= index and progress[id_].spare]
    if not slow or not quick:
        raft.races_lost = 0
        return
    raft.races_lost += 1
    if raft.races_lost >= RACES_LOST_MAX:
        raft.races_lost = 0
        one, other = preferred.index(slow[0]), preferred.index(quick[0])
        preferred[one], preferred[other] = preferred[other], preferred[one]


def distrust(raft: "Raft", id_: int) -> None:
    """Something is wrong with a follower: rely on others first."""
    if id_ in raft.preferred:
        raft.preferred.remove(id_)
        raft.preferred.append(id_)


def check(raft: "Raft") -> None:
    """Walk every invariant."""
    preferred = raft.preferred
    others = [id_ for id_ in raft.configuration.voters if id_ != raft.id]
    assert not preferred or sorted(preferred) == others, f"{preferred} are preferred among {others}"
    assert raft.race <= raft.log.last_index, f"a race for {raft.race} of {raft.log.last_index} entries"
    relied_on = [id_ for id_ in preferred if not raft.progress[id_].spare]
    assert len(relied_on) >= needed(raft), f"only {relied_on} are relied on among {preferred}"
    for id_, peer in raft.progress.items():
        assert not peer.spare or id_ in preferred, f"{id_} is a spare, and not among {preferred}"
        assert peer.spare or not peer.held_bytes, f"{peer.held_bytes} bytes wait for {id_}, which is no spare"
