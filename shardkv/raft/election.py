"""Who leads: campaigns, votes, and handing leadership over (paper 5.2 and 5.4.1; thesis 3.10, 4.2.3 and 9.6)."""

from enum import Enum
from typing import Final

from shardkv.raft import lease, reconfiguration, replication
from shardkv.raft.membership import all_voters
from shardkv.raft.messages import NONE, EntryType, Message, MessageType
from shardkv.raft.proposals import forward
from shardkv.raft.quorum import VoteResult, joint_vote_result
from shardkv.raft.settings import ReadOnly
from shardkv.raft.state import NOT_EAGER, Raft, Role

CAMPAIGN_TRANSFER: Final = b"CampaignTransfer"
"""The context of a vote request that comes of a transfer: nobody is protected from it."""
STAGGER_TICKS: Final = 2
"""How far apart replicas begin that all want an election at the same moment."""

RELUCTANCE: Final = 4
"""How many election timeouts a reluctant replica waits: long enough for anybody else to be elected before it."""
PATIENCE: Final = 4
"""How many election timeouts, at most, a replica goes on waiting whose vote has taken long to get to the disk."""


DOUBLINGS_MAX: Final = 5
"""How often a candidate's wait is doubled, from one campaign to the next."""


class Campaign(Enum):
    PRE_ELECTION = 1
    ELECTION = 2
    TRANSFER = 3


def hup(raft: Raft, message: Message) -> None:
    if is_reluctant(raft):
        return
    start(raft, Campaign.PRE_ELECTION if raft.settings.pre_vote else Campaign.ELECTION)


def start(raft: Raft, campaign: Campaign) -> None:
    """Begin an election, if this replica may. One that is promised away begins when the promise has run out."""
    if raft.role == Role.LEADER or not raft.promotable or _has_unapplied_conf_change(raft):
        return
    if campaign is not Campaign.TRANSFER:
        if raft.voting:
            return
        if lease.refuses(raft):
            raft.eager_ticks = stagger_ticks(raft)
            return
    run(raft, campaign)


def is_reluctant(raft: Raft) -> bool:
    """Whether somebody else should lead. A replica that is alone has nobody to leave that to."""
    return raft.settings.reluctant() and not raft.is_singleton


def stagger_ticks(raft: Raft) -> int:
    """How long to wait so that no two replicas of a group begin at once.

    Every replica gets a place of its own among those that may be left, another one in each term so that over many
    groups leadership does not gather on one node. A random wait would let two of three collide too often.
    """
    voters = [id_ for id_ in all_voters(raft.configuration) if id_ != raft.leader]
    if raft.id not in voters:
        return 0
    return (voters.index(raft.id) + raft.term) % len(voters) * STAGGER_TICKS


def _has_unapplied_conf_change(raft: Raft) -> bool:
    """Whether a change is committed but not applied here: this replica does not know who votes (trap 9)."""
    log = raft.log
    # By the types alone: where applying is far behind, the data are on disk, and this is asked in each campaign.
    return any(log.type(index) != EntryType.NORMAL for index in range(log.applied + 1, log.committed + 1))


def run(raft: Raft, campaign: Campaign) -> None:
    if campaign is Campaign.PRE_ELECTION:
        raft.become_pre_candidate()
        term, request, answer = raft.term + 1, MessageType.PRE_VOTE, MessageType.PRE_VOTE_RESP
    else:
        raft.become_candidate()
        raft.fruitless_campaigns += 1
        term, request, answer = raft.term, MessageType.VOTE, MessageType.VOTE_RESP
    context = CAMPAIGN_TRANSFER if campaign is Campaign.TRANSFER else b""
    log = raft.log
    for id_ in all_voters(raft.configuration):
        if id_ != raft.id:
            raft.send(Message(request, id_, term=term, log_term=log.last_term, index=log.last_index, context=context))
    own = Message(answer, raft.id, raft.id, term)
    if campaign is Campaign.PRE_ELECTION and raft.settings.patient_elections:
        candidate_vote_response(raft, own)
    else:
        # Its own vote counts when it is on disk, as anybody's does; and by default nobody is asked for theirs before.
        raft.send(own)
        raft.voting = raft.settings.patient_elections


def ignores_request(raft: Raft, request: Message) -> bool:
    """Whether a request for a vote is to be left unanswered, its term included, for there is a leader.

    Two rules say so: check-quorum's, by ticks (thesis 4.2.3), and the lease's, by promise. A transfer overrides both.
    """
    if request.context == CAMPAIGN_TRANSFER:
        return False
    return lease.refuses(raft) or (
        raft.settings.check_quorum
        and raft.leader != NONE
        and raft.election_elapsed < raft.settings.election_ticks
        and not raft.doubted
    )


def handle_vote_request(raft: Raft, message: Message) -> None:
    """Answer a (pre-)vote request of this term, or a pre-vote request of a later one.

    A learner answers too: it may have been made a voter and not know it yet (trap 9).
    """
    kind, candidate = message.type, message.from_
    if lease.refuses(raft) and message.context != CAMPAIGN_TRANSFER:
        return
    free = (
        raft.vote == candidate
        or (raft.vote == NONE and raft.leader == NONE)
        or (kind == MessageType.PRE_VOTE and message.term > raft.term)
    )
    answer = MessageType.VOTE_RESP if kind == MessageType.VOTE else MessageType.PRE_VOTE_RESP
    behind = not raft.log.is_up_to_date(message.index, message.log_term)
    if not free or behind:
        raft.send(Message(answer, candidate, term=raft.term, reject=True))
        if behind and raft.eager_ticks > 0:
            # Whoever had its turn before this replica cannot win. Others may be told so, too, and keep their distance.
            raft.eager_ticks = max(raft.eager_ticks - STAGGER_TICKS, 0)
            if not raft.eager_ticks:
                _tick_eager(raft)
        return
    # The answer has the term of the request: a pre-candidate would take an answer of an older term for a late one.
    raft.send(Message(answer, candidate, term=message.term))
    if kind == MessageType.VOTE:
        if raft.role == Role.PRE_CANDIDATE and raft.settings.patient_elections:
            raft.become_follower(raft.term, NONE)  # it wants somebody else to lead now
        raft.election_elapsed = 0
        raft.vote = candidate
        if raft.settings.patient_elections and raft.id in raft.progress:
            raft.voting = True
            raft.send(Message(answer, raft.id, term=raft.term))


def follower_vote_response(raft: Raft, message: Message) -> None:
    """Its own, that is: the vote that was given is on disk."""
    if message.from_ == raft.id:
        raft.voting = False


def candidate_vote_response(raft: Raft, message: Message) -> None:
    wanted = MessageType.PRE_VOTE_RESP if raft.role == Role.PRE_CANDIDATE else MessageType.VOTE_RESP
    if message.type != wanted:
        return  # an answer to the other half of this campaign
    if message.from_ == raft.id:
        raft.voting = False
    raft.votes.setdefault(message.from_, not message.reject)
    configuration = raft.configuration
    result = joint_vote_result(configuration.voters, configuration.voters_outgoing, raft.votes)
    if result is VoteResult.WON:
        if raft.role == Role.PRE_CANDIDATE:
            run(raft, Campaign.ELECTION)
        else:
            raft.become_leader()
            lease.recompute(raft)
            replication.broadcast_append(raft)
    elif result is VoteResult.LOST:
        # The answers to a pre-vote carry the term that was asked about; ours has not changed.
        raft.become_follower(raft.term, NONE)


# Time passes.


def tick_election(raft: Raft) -> None:
    """A tick on any role but leader."""
    if raft.voting:
        # The other votes may take as long. To ask anew would only queue behind them.
        raft.election_elapsed = max(raft.election_elapsed - 1, -PATIENCE * raft.settings.election_ticks)
        return
    raft.election_elapsed += 1
    if raft.eager_ticks >= 0:
        _tick_eager(raft)
    elif raft.election_elapsed >= raft.randomized_election_timeout and raft.promotable:
        if raft.election_elapsed < _candidates_wait(raft):
            return
        if raft.election_elapsed < RELUCTANCE * raft.randomized_election_timeout and is_reluctant(raft):
            return
        raft.election_elapsed = 0
        start(raft, Campaign.PRE_ELECTION if raft.settings.pre_vote else Campaign.ELECTION)


def _candidates_wait(raft: Raft) -> int:
    """How many ticks a candidate waits for votes, longer with each campaign that has come to nothing.

    Another one's disk may take longer for a vote than an election timeout. In a new term the vote on its way there
    would be worth nothing, and the next come as late.
    """
    if raft.role != Role.CANDIDATE or not raft.settings.patient_elections:
        return 0
    return raft.randomized_election_timeout << min(raft.fruitless_campaigns - 1, DOUBLINGS_MAX)


def _tick_eager(raft: Raft) -> None:
    """An election is wanted as soon as the promises have run out."""
    if lease.refuses(raft):
        return
    if raft.eager_ticks:
        raft.eager_ticks -= 1
        return
    if is_reluctant(raft):
        raft.eager_ticks = NOT_EAGER
        return
    # Others may still be bound to their promise and not answer, so ask again when everybody has had a turn.
    raft.eager_ticks = STAGGER_TICKS * len(all_voters(raft.configuration))
    raft.election_elapsed = 0
    start(raft, Campaign.PRE_ELECTION if raft.settings.pre_vote else Campaign.ELECTION)


def doubt(raft: Raft) -> None:
    """The connection to the leader's node broke. Campaign as soon as the promise to it allows, and let others."""
    if raft.role != Role.FOLLOWER or raft.leader in (NONE, raft.id) or raft.doubted:
        return
    if raft.settings.read_only is ReadOnly.LEASE_BASED:
        return  # there the ticks are what a lease rests on
    raft.doubted = True
    raft.eager_ticks = stagger_ticks(raft)
    if raft.eager_ticks == 0:
        _tick_eager(raft)


def tick_leader(raft: Raft) -> None:
    raft.heartbeat_elapsed += 1
    raft.election_elapsed += 1
    if raft.election_elapsed >= raft.settings.election_ticks:
        raft.election_elapsed = 0
        if raft.settings.check_quorum:
            leader_check_quorum(raft)
        # A transfer that takes longer than an election has failed; go on leading.
        if raft.role == Role.LEADER:
            raft.transferee = NONE
    if raft.configuration.auto_leave:
        reconfiguration.leave_joint(raft)
    if raft.role == Role.LEADER and raft.heartbeat_elapsed >= raft.settings.heartbeat_ticks:
        raft.heartbeat_elapsed = 0
        replication.broadcast_heartbeat(raft)


def leader_check_quorum(raft: Raft, message: Message | None = None) -> None:
    """Stop leading when no quorum was heard of for an election timeout (thesis 6.2)."""
    active = {id_: peer.recent_active for id_, peer in raft.progress.items() if not peer.is_learner}
    configuration = raft.configuration
    if joint_vote_result(configuration.voters, configuration.voters_outgoing, active) is not VoteResult.WON:
        raft.become_follower(raft.term, NONE)
    for id_, peer in raft.progress.items():
        if id_ != raft.id:
            peer.recent_active = False


# Leadership is handed over.


def leader_transfer(raft: Raft, message: Message) -> None:
    """The host wants that replica to lead. Proposals stop until it does, or until an election timeout has passed."""
    target = message.from_
    if message.reject:
        # The target does not want it. Go on leading at once, without a lease for the rest of the term as after any
        # transfer: an earlier TimeoutNow may still be on its way to it.
        if target == raft.transferee:
            raft.transferee = NONE
        return
    peer = raft.progress.get(target)
    if peer is None or peer.is_learner or target == raft.transferee:
        return
    raft.transferee = NONE  # whoever was to lead before
    if target == raft.id:
        return
    raft.election_elapsed = 0
    raft.transferee = target
    if peer.match == raft.log.last_index:
        lease.send_timeout_now(raft, target)
    else:
        replication.send_append(raft, target, peer)


def follower_transfer(raft: Raft, message: Message) -> None:
    if raft.leader != NONE and not message.reject:
        forward(raft, message)


def follower_timeout_now(raft: Raft, message: Message) -> None:
    """The leader asks this replica to take over. No pre-vote: this is no partition healing."""
    if is_reluctant(raft):
        raft.send(Message(MessageType.TRANSFER_LEADER, message.from_, reject=True))
        return
    start(raft, Campaign.TRANSFER)


def follower_forget_leader(raft: Raft, message: Message) -> None:
    """Grant (pre-)votes again without waiting for an election timeout; there is no campaign of our own."""
    if raft.settings.read_only is not ReadOnly.LEASE_BASED:
        raft.leader = NONE


def follower_read_index(raft: Raft, message: Message) -> None:
    if raft.leader == NONE or (message.from_ != raft.id and raft.settings.disable_proposal_forwarding):
        return  # another replica asks whom it takes for the leader: it will hear of the new one, and ask again
    forward(raft, message)
