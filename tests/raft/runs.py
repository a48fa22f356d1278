"""Random runs of a whole group, with crashes, partitions, lost and reordered messages, and clocks that drift.

Each run draws everything from its seed. The checkers hold at every step: one leader a term, logs that match, nothing
committed is lost, nothing is applied differently, reads see what was committed before them, and a leader with a lease
is alone, a replica is no older than it says. At the end the network heals and the group must make progress.
"""

import bisect
import random
from typing import Any

from shardkv.raft import LeaseSettings, ProposalDropped, Role
from shardkv.raft.messages import (
    APPEND_THREAD,
    ConfChange,
    ConfChangeTransition,
    ConfState,
    Entry,
    HardState,
    Snapshot,
    SnapshotMetadata,
)
from tests.raft.cluster import TICK_NS, Cluster, change

DRIFT = 0.1
CLOCK_STEP_NS = 2
"""Clocks count whole nanoseconds."""
LEASE = LeaseSettings(promise_ns=8 * TICK_NS, drift=DRIFT)


class Checkers:
    """What must hold of a group, whatever happens to it. They see everything and change nothing."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.leader_of_term: dict[int, tuple[int, int]] = {}
        """By term who leads it, and how often it had been started by then."""
        self.committed: dict[int, tuple[Entry, int]] = {}
        """By index the entry, and the term of the replica that was first seen to have committed it."""
        self.reads: dict[bytes, int] = {}
        self.reads_seen = 0
        self.leases_seen = 0
        self.commits: list[tuple[int, int]] = []
        """How far anybody was seen to have committed, by the time at which it was seen first."""
        self.ages_seen = 0

    def check(self) -> None:
        newest = max(host.node.committed for host in self.cluster.hosts.values())
        if not self.commits or newest > self.commits[-1][1]:
            self.commits.append((self.cluster.now, newest))
        for id_, host in self.cluster.hosts.items():
            if not host.up:
                continue
            host.node.check()
            self._one_leader(id_)
            self._committed_entries(id_)
            self._lease(id_)
            self._age(id_)
            for state in host.read_states:
                wanted = self.reads[state.context]
                assert state.index >= wanted, f"a read at {state.index}, though {wanted} was committed before it"
                self.reads_seen += 1
            host.read_states.clear()

    def _one_leader(self, id_: int) -> None:
        """Paper figure 3: election safety."""
        node = self.cluster[id_]
        if node.role is Role.LEADER:
            leader = (id_, self.cluster.hosts[id_].starts)
            other = self.leader_of_term.setdefault(node.term, leader)
            assert other == leader, f"{other} and {leader} both lead term {node.term}"

    def _committed_entries(self, id_: int) -> None:
        """Paper figure 3: log matching, leader completeness and state machine safety."""
        node = self.cluster[id_]
        log = node.raft.log
        for index in range(log.first_index, log.committed + 1):
            (entry,) = log.slice(index, index + 1, 1 << 60)
            known, _ = self.committed.setdefault(index, (entry, node.term))
            assert known == entry, f"{id_} has committed {entry}, others {known}"
        if node.role is Role.LEADER:
            for index, (entry, term) in self.committed.items():
                # A leader that was deposed does not know what came after it.
                if index >= log.first_index and node.term > term:
                    assert log.matches(index, entry.term), f"leader {id_} lacks committed {entry}"

    def _lease(self, id_: int) -> None:
        """DESIGN 4.5: whoever has a lease is the only leader, by real time."""
        node = self.cluster[id_]
        if node.lease_valid(self.cluster.clock(id_)):
            self.leases_seen += 1
            for other, host in self.cluster.hosts.items():
                newer = host.up and host.node.role is Role.LEADER and host.node.term > node.term
                assert not newer, f"{id_} has a lease in term {node.term}, {other} leads term {host.node.term}"

    def _age(self, id_: int) -> None:
        """DESIGN 2.3: what a replica has applied holds all that had been committed its age ago, by real time."""
        node = self.cluster[id_]
        age = node.age_ns(node.applied, self.cluster.clock(id_))
        if age is not None:
            self.ages_seen += 1
            known = bisect.bisect_left(self.commits, (self.cluster.now - age - CLOCK_STEP_NS, 0))
            wanted = self.commits[known - 1][1] if known else 0
            assert node.applied >= wanted, f"{id_} has applied {node.applied}, {wanted} was committed {age} ns ago"

    def newest_commit(self) -> int:
        return max(host.node.committed for host in self.cluster.hosts.values() if host.up)


class Run:
    """One group and one seed. A step is small: a message, a write, a tick of one replica."""

    STEPS = 2_000

    def __init__(self, seed: int, **settings: Any) -> None:
        self.random = random.Random(seed)
        self.membership = settings.pop("membership", False)
        self.cluster = Cluster(self.random.choice([3, 3, 5]), randrange=self.random.randrange, **settings)
        if self.membership:
            for _ in range(2):
                self.cluster.add(len(self.cluster.hosts) + 1)
        for id_ in self.cluster.hosts:
            # Each clock has its own rate, and no two differ by more than the drift bound.
            rate = 1 + self.random.uniform(-DRIFT, DRIFT) / 2.2
            self.cluster.clocks[id_] = lambda now, rate=rate: int(now * rate)
            host = self.cluster.hosts[id_]
            host.restart()
            host.hold_writes = True
        if settings.get("lease"):
            self.cluster.settings["vote_refusal_ns"] = int(LEASE.promise_ns)
        self.checkers = Checkers(self.cluster)
        self.proposed = 0

    def ids(self) -> list[int]:
        return list(self.cluster.hosts)

    def step(self) -> None:
        cluster, draw = self.cluster, self.random.random()
        host = cluster.hosts[self.random.choice(self.ids())]
        if draw < 0.36:
            for _ in range(self.random.choice([1, 2, 8])):
                self._deliver()
        elif draw < 0.60:
            cluster.process_all() if self.random.random() < 0.3 else self._process(host)
        elif draw < 0.76:
            if host.up:
                host.write(self.random.choice([1, 2, None]))
        elif draw < 0.90:
            cluster.now += int(TICK_NS * self.random.uniform(0.1, 0.6))
            if host.up:
                host.node.tick(cluster.clock(host.id))
        elif draw < 0.99:
            self._request(host)
        elif draw < 0.996:
            self._disturb(host)
        elif host.up:
            self._restart(host)
        else:
            host.restart()
        self.checkers.check()

    def _process(self, host: Any) -> None:
        if host.up and host.node.has_ready():
            host.process()

    def _deliver(self) -> None:
        messages = self.cluster.messages
        if not messages:
            return
        # Mostly in order, sometimes not; sometimes lost, sometimes twice.
        at = 0 if self.random.random() < 0.7 else self.random.randrange(len(messages))
        message = messages[at]
        if self.random.random() < 0.97:
            del messages[at]
        if self.random.random() < 0.95:
            self.cluster.deliver(message)

    def _request(self, host: Any) -> None:
        if not host.up:
            return
        node = host.node
        draw = self.random.random()
        try:
            if draw < 0.55:
                self.proposed += 1
                node.propose(b"%d" % self.proposed)
            elif draw < 0.85:
                name = b"read %d" % len(self.checkers.reads)
                self.checkers.reads[name] = self.checkers.newest_commit()
                node.read_index(name)
            elif self.membership and node.role is Role.LEADER:
                self._change_members(node)
        except ProposalDropped:
            return

    def _change_members(self, node: Any) -> None:
        if node.configuration.voters_outgoing:
            node.propose_conf_change(ConfChange())
            return
        target = self.random.choice(self.ids())
        kind = self.random.choice("vvvlr")
        # Never through two voters (DESIGN 4.10): there a leader that steps down on its removal can leave the other one
        # unable to win, for want of the vote of a longer log that nobody replicates any more.
        if kind in "lr" and target in node.configuration.voters and len(node.configuration.voters) <= 3:
            return
        transition = self.random.choice(list(ConfChangeTransition))
        node.propose_conf_change(change(f"{kind}{target}", transition))

    def _disturb(self, host: Any) -> None:
        cluster, draw = self.cluster, self.random.random()
        if draw < 0.3:
            cluster.isolate(*self.random.sample(self.ids(), self.random.randrange(1, len(self.ids()))))
        elif draw < 0.6:
            cluster.heal()
        elif not host.up:
            return
        elif draw < 0.7:
            host.node.transfer_leader(self.random.choice(self.ids()))
        elif draw < 0.8:
            host.node.doubt(cluster.clock(host.id))
        elif draw < 0.9:
            host.node.report_unreachable(self.random.choice(self.ids()))
        elif draw < 0.93:
            host.node.hedge()
        elif draw < 0.95:
            host.node.distrust(self.random.choice(self.ids()))
        elif host.applied_index > host.storage.written_snapshot().metadata.index and not host.work:
            host.compact()

    def _restart(self, host: Any) -> None:
        host.crash()
        if self.random.random() < 0.7:
            host.restart()

    def recover(self) -> None:
        """Stop disturbing: the group must elect a leader, agree, and answer."""
        cluster = self.cluster
        cluster.heal()
        for host in cluster.hosts.values():
            host.hold_writes = False
            if not host.up:
                host.restart()
            host.write()
        leader = self._settled_leader()
        for id_ in self.ids():
            leader.report_snapshot(id_, ok=False)  # what was on its way when the run ended is lost
        leader.propose(b"the last")
        self.checkers.reads[b"the last read"] = self.checkers.newest_commit()
        leader.read_index(b"the last read")
        cluster.tick(count=30)
        self.checkers.check()
        configuration = leader.configuration
        members = {*configuration.voters, *configuration.learners, *configuration.voters_outgoing}
        applied = [cluster.hosts[id_].applied for id_ in sorted(members)]
        assert applied[0][-1] == b"the last"
        assert applied == [applied[0]] * len(applied)

    def _settled_leader(self) -> Any:
        """Tick until one member has led for several election timeouts, so that nobody is about to depose it.

        Who was removed is taken away as its host would do: it cannot know of its removal, and would campaign for ever.
        """
        cluster, before, since = self.cluster, 0, 0
        for tick in range(800):
            cluster.tick()
            self.checkers.check()
            _, configuration = max((host.node.applied, host.node.configuration) for host in cluster.hosts.values())
            members = {*configuration.voters, *configuration.learners, *configuration.voters_outgoing}
            for id_, host in cluster.hosts.items():
                if id_ not in members:
                    host.crash()
                elif not host.up:
                    host.restart()
            leaders = cluster.leaders()
            term = max(cluster[id_].term for id_ in members)
            if len(leaders) != 1 or cluster[leaders[0]].term != term or term != before:
                before, since = term, tick
            elif tick - since > 50:
                return cluster[leaders[0]]
        raise AssertionError(f"no leader: {[cluster[id_].status() for id_ in self.ids()]}")


class Rounds(Run):
    """One group and one seed. A step is a round: an election, a request or a tick, and what follows from it, or some.

    In a round some disks write nothing and some links are cut, and after it somebody may die, a leader above all: with
    what it has not written, while others act on what it has said. Small steps seldom get there.
    """

    STEPS = 300
    MESSAGES_MAX = 200

    def __init__(self, seed: int, **settings: Any) -> None:
        super().__init__(seed, **settings)
        self.crashed = self.cluster.hosts[1]
        """Who crashed last."""

    def step(self) -> None:
        self._disconnect()
        for host in self.cluster.hosts.values():
            host.hold_writes = self.random.random() < 0.3
        self._begin()
        for _ in range(self.random.choice([0, 1, 2, 3, 4, 6, 10])):
            self._go_on()
            self.checkers.check()
        del self.cluster.messages[: -self.MESSAGES_MAX]
        self._end()
        self.checkers.check()

    def _disconnect(self) -> None:
        cluster = self.cluster
        if self.random.random() < 0.5:
            cluster.heal()
            cluster.cut |= {(one, two) for one in self.ids() for two in self.ids() if self.random.random() < 0.15}
            if self.random.random() < 0.3:
                cluster.isolate(self.random.choice(self.ids()))

    def _begin(self) -> None:
        cluster, draw = self.cluster, self.random.random()
        host = cluster.hosts[self.random.choice(self.ids())]
        if draw < 0.35:
            first = self.crashed if self.random.random() < 0.4 else host
            for each in (first, host) if self.random.random() < 0.35 else (first,):
                if each.up:
                    each.node.campaign(cluster.clock(each.id))
        elif draw < 0.65:
            for leader in cluster.leaders():
                for _ in range(self.random.choice([1, 1, 3])):
                    self._request(cluster.hosts[leader])
        elif draw < 0.75:
            for leader in cluster.leaders():
                cluster[leader].transfer_leader(self.random.choice(self.ids()))
        elif draw < 0.95:
            cluster.now += int(TICK_NS * self.random.uniform(0.5, 6))
            for each in cluster.hosts.values():
                if each.up:
                    each.node.tick(cluster.clock(each.id))
        else:
            self._disturb(host)

    def _go_on(self) -> None:
        """Everybody works, and every message arrives; but for a few, which are late, lost, or come twice."""
        cluster = self.cluster
        cluster.process_all()
        for host in cluster.hosts.values():
            if host.up and not host.hold_writes:
                self._write(host)
        messages, cluster.messages = cluster.messages, []
        for message in messages:
            draw = self.random.random()
            if draw < 0.03:
                cluster.messages.append(message)
            if not 0.01 < draw < 0.04:
                cluster.deliver(message)

    def _write(self, host: Any) -> None:
        host.write()

    def _end(self) -> None:
        if self.random.random() < 0.3:
            leaders = self.cluster.leaders()
            among = leaders if leaders and self.random.random() < 0.5 else self.ids()
            host = self.crashed = self.cluster.hosts[self.random.choice(among)]
            if host.up:
                host.write(self.random.choice([0, 0, 1, 2]))
                self._restart(host)
        for host in self.cluster.hosts.values():
            if not host.up and self.random.random() < 0.3:
                host.restart()


class Moving(Rounds):
    """One group and one seed. The voters move from one set to another, often through long joint configurations.

    Partitions run between the old voters and the new, and some replicas apply nothing for a while: whoever still goes
    by a configuration that others have left, or already by one that is not agreed on, comes to decide alone.
    """

    STEPS = 600

    def __init__(self, seed: int, **settings: Any) -> None:
        super().__init__(seed, membership=True, step_down_on_removal=True, **settings)
        cluster = self.cluster
        founders = self.random.choice([ConfState((1,)), ConfState((1, 2, 3))])
        members = self.ids()[: self.random.choice([4, 5, 6])]
        cluster.hosts.clear()
        for id_ in members:
            founds = id_ in founders.voters
            host = cluster.add(id_, founders if founds else ConfState())
            if founds:
                # As a range begins: whoever joins gets a snapshot, never the log from its first entry.
                host.storage.apply_snapshot(Snapshot(SnapshotMetadata(10, 5, founders)))
                host.storage.set_hard_state(HardState(5, 0, 10))
                host.restart()
        self.lagging: set[int] = set()
        """Who applies nothing for now, and logs all the same."""
        self.crashes = self.random.choice([0, 0.05, 0.2])

    def step(self) -> None:
        cluster, draw = self.cluster, self.random.random()
        if draw < 0.25:
            self._divide()
        elif draw < 0.35:
            share = self.random.choice([0, 0.3, 0.7])
            self.lagging = {id_ for id_ in self.ids() if self.random.random() < share}
            for host in cluster.hosts.values():
                host.hold_writes = self.random.random() < 0.15
        elif draw < 0.55:
            self._pass_time(self.random.choice([1, 2, 8, 25, 25]))
        elif draw < 0.75:
            for leader in cluster.leaders():
                self._move(cluster[leader])
        elif draw < 0.85:
            for leader in cluster.leaders():
                self._request(cluster.hosts[leader])
        elif draw < 0.92:
            self._disturb(cluster.hosts[self.random.choice(self.ids())])
        for _ in range(self.random.choice([0, 1, 2, 4, 8])):
            self._go_on()
            self.checkers.check()
        del cluster.messages[: -self.MESSAGES_MAX]
        for host in cluster.hosts.values():
            if not host.up and self.random.random() < 0.3:
                host.restart()
            elif self.random.random() < self.crashes / len(cluster.hosts):
                host.crash()
        self.checkers.check()

    def recover(self) -> None:
        self.lagging.clear()
        super().recover()

    def _write(self, host: Any) -> None:
        if host.id not in self.lagging:
            host.write()
            return
        applies = [message for message in host.work if message.to != APPEND_THREAD]
        host.work = [message for message in host.work if message.to == APPEND_THREAD]
        host.write()
        host.work = applies + host.work

    def _divide(self) -> None:
        """Cut one half of somebody's configuration off, or what is only in one of them; with others, sometimes."""
        cluster = self.cluster
        cluster.heal()
        if self.random.random() < 0.4:
            return
        configuration = cluster[self.random.choice(self.ids())].configuration
        incoming, outgoing = set(configuration.voters), set(configuration.voters_outgoing)
        side = self.random.choice([incoming, outgoing or incoming, incoming - outgoing])
        if self.random.random() < 0.5:
            side = {*side, self.random.choice(self.ids())}
        cluster.isolate(*sorted(side & set(self.ids())))

    def _pass_time(self, ticks: int) -> None:
        cluster = self.cluster
        for _ in range(ticks):
            cluster.now += TICK_NS
            for host in cluster.hosts.values():
                if host.up:
                    host.node.tick(cluster.clock(host.id))
            if self.random.random() < 0.7:
                self._go_on()
                self.checkers.check()

    def _move(self, node: Any) -> None:
        """Propose other voters: three, or five; one more; or a learner. Or leave a joint configuration, sometimes."""
        voters, ids = set(node.configuration.voters), set(self.ids())
        joint = [ConfChangeTransition.JOINT_EXPLICIT, ConfChangeTransition.JOINT_EXPLICIT]
        wanted, transition = "", ConfChangeTransition.AUTO
        if node.configuration.voters_outgoing:
            if node.configuration.auto_leave or self.random.random() < 0.6:
                return
        elif len(voters) == 1 or self.random.random() < 0.7:
            # One that leads alone stays: without its vote nobody could be elected to tell that the change is through.
            target = voters if len(voters) == 1 else set()
            count = self.random.choice([3, 3, min(5, len(ids))]) - len(target)
            target = target | set(self.random.sample(sorted(ids - target), count))
            leave = self.random.choice("rl")
            wanted = " ".join(f"{leave if id_ in voters else 'v'}{id_}" for id_ in sorted(target ^ voters))
            transition = self.random.choice([*joint, ConfChangeTransition.JOINT_IMPLICIT])
        elif ids - voters:
            wanted = self.random.choice("vl") + str(self.random.choice(sorted(ids - voters)))
        if wanted or node.configuration.voters_outgoing:
            try:
                node.propose_conf_change(change(wanted, transition))
            except ProposalDropped:
                return
