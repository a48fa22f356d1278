"""Runs the quorum and membership tables of etcd-io/raft against ``shardkv.raft.quorum`` and ``.membership``."""

from shardkv.raft import InvalidConfChange, PeerStatus
from shardkv.raft.membership import Changer
from shardkv.raft.quorum import (
    EVERYTHING,
    VoteResult,
    committed_index,
    joint_committed_index,
    joint_vote_result,
    vote_result,
)
from tests.conformance import rendering
from tests.conformance.datadriven import Case

_VOTES = {"y": 2, "n": 1, "_": 0}
_RESULTS = {VoteResult.PENDING: "VotePending", VoteResult.LOST: "VoteLost", VoteResult.WON: "VoteWon"}


def _index(value: int) -> str:
    return "∞" if value == EVERYTHING else str(value)


def _describe(ids: set[int], acknowledged: dict[int, int]) -> str:
    """A bar for each voter: the longer, the more voters it is ahead of."""
    if not ids:
        return "<empty majority quorum>"
    count = len(ids)
    ordered = sorted((acknowledged.get(id_, 0), id_) for id_ in ids)
    bars = {id_: next(at for at, (value, _) in enumerate(ordered) if value == index) for index, id_ in ordered}
    text = " " * count + "    idx\n"
    for id_ in sorted(ids):
        bar = bars[id_]
        drawn = "x" * bar + ">" + " " * (count - bar) if id_ in acknowledged else "?" + " " * count
        text += f"{drawn} {acknowledged.get(id_, 0):5d}    (id={id_:x})\n"
    return text


class QuorumTable:
    """One file of quorum cases. Beside each answer it checks what must not change it, as the original does."""

    def handle(self, case: Case) -> str:
        incoming: list[int] = []
        outgoing: list[int] = []
        joint = False
        values: list[int] = []
        for argument in case.arguments:
            if argument.key == "cfg":
                incoming = [int(value) for value in argument.values]
            elif argument.key == "cfgj":
                joint = True
                outgoing = [int(value) for value in argument.values if value != "zero"]
            elif argument.key == "idx":
                values = [0 if value == "_" else int(value) for value in argument.values]
            elif argument.key == "votes":
                values = [_VOTES[value] for value in argument.values]
            else:
                raise ValueError(f"unknown argument {argument.key}")
        voters = list(dict.fromkeys(incoming + outgoing))
        if len(voters) != len(values):
            shown = "map[" + " ".join(f"{id_}:{{}}" for id_ in sorted(voters)) + "]"
            given = "[" + " ".join(str(value) for value in values) + "]"
            return f"error: mismatched input (explicit or _) for voters {shown}: {given}"
        given_values = {id_: value for id_, value in zip(voters, values) if value}
        if case.command == "committed":
            return self._committed(incoming, outgoing, joint, given_values)
        if case.command == "vote":
            return self._vote(incoming, outgoing, joint, {id_: value == 2 for id_, value in given_values.items()})
        raise ValueError(f"unknown command {case.command}")

    def _committed(self, incoming: list[int], outgoing: list[int], joint: bool, acknowledged: dict[int, int]) -> str:
        text = _describe({*incoming, *outgoing}, acknowledged)
        if joint:
            index = joint_committed_index(incoming, outgoing, acknowledged)
            other = joint_committed_index(outgoing, incoming, acknowledged)
            if other != index:
                text += f"{_index(other)} <-- via symmetry\n"
            return text + f"{_index(index)}\n"
        index = committed_index(incoming, acknowledged)
        others = {
            "alternative computation": _slow_committed(incoming, acknowledged),
            "zero-joint quorum": joint_committed_index(incoming, [], acknowledged),
            "self-joint quorum": joint_committed_index(incoming, incoming, acknowledged),
        }
        for name, other in others.items():
            if other != index:
                text += f"{_index(other)} <-- via {name}\n"
        for id_, value in acknowledged.items():
            # What lies above the committed index may fall without moving it.
            for lower in (value - 1, 0):
                if index > value and committed_index(incoming, acknowledged | {id_: lower}) != index:
                    text += f"changed <-- overlaying {id_}->{lower}"
        return text + f"{_index(index)}\n"

    def _vote(self, incoming: list[int], outgoing: list[int], joint: bool, votes: dict[int, bool]) -> str:
        if not joint:
            return f"{_RESULTS[vote_result(incoming, votes)]}\n"
        result = joint_vote_result(incoming, outgoing, votes)
        other = joint_vote_result(outgoing, incoming, votes)
        symmetric = "" if other is result else f"{_RESULTS[other]} <-- via symmetry\n"
        return f"{symmetric}{_RESULTS[result]}\n"


def _slow_committed(voters: list[int], acknowledged: dict[int, int]) -> int:
    """The same answer found by trying: the largest index that enough voters have."""
    if not voters:
        return EVERYTHING
    candidates = {0, *acknowledged.values()}
    return max(
        index
        for index in candidates
        if index == 0 or sum(acknowledged.get(voter, 0) >= index for voter in voters) > len(voters) // 2
    )


class MembershipTable:
    """One file of membership changes, each made on top of the ones before it."""

    def __init__(self) -> None:
        self._changer = Changer(last_index=0, inflight_limits=(10, 1 << 62))

    def handle(self, case: Case) -> str:
        changer = self._changer
        try:
            changes = rendering.parse_conf_changes(case.input)
            if case.command == "simple":
                changer.simple(changes)
            elif case.command == "enter-joint":
                changer.enter_joint(changes, auto_leave=case.value("autoleave") == "true")
            elif case.command == "leave-joint":
                if changes:
                    return "this command takes no input\n"
                changer.leave_joint()
            else:
                return "unknown command"
        except (ValueError, InvalidConfChange) as error:
            return f"{error}\n"
        finally:
            changer.last_index += 1
        text = rendering.configuration(changer.configuration) + "\n"
        for id_, peer in changer.progress.items():
            status = PeerStatus(
                peer.match,
                peer.next,
                peer.state,
                peer.paused,
                peer.pending_snapshot,
                peer.recent_active,
                len(peer.inflights),
                peer.inflights.bytes,
                peer.inflights.full,
                peer.is_learner,
            )
            text += f"{id_}: {rendering.peer(status)}\n"
        return text
