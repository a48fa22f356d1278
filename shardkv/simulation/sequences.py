"""Faults that are several at once, in the order that hurts most: what single ones, drawn one by one, seldom make.

Lives here: sequences of faults and of what operators do, each by name. Does not live here: those that are a disk's
(``bad_disks``), single faults, and the plan that draws them (``faults``). The rule: a sequence makes no state that
single faults could not make; it only makes it more often. Where it wants to hit a leader, it looks at who leads, as an
attacker with luck would.
"""

from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Final

from shardkv.errors import Corruption
from shardkv.simulation import determinism
from shardkv.simulation.bad_disks import reborn, rot, slow_disk
from shardkv.simulation.crash_choosers import LoseAll
from shardkv.simulation.node import SimulatedNode
from shardkv.types import PLACEMENT_RANGE, RangeId

if TYPE_CHECKING:
    from shardkv.simulation.faults import Faults

SOON_CALLS_MAX: Final = 25
"""A crash at once comes within so many calls."""
INSTALLING_CALLS_MAX: Final = (2, 5, 50, 300)
NOTICING_SECONDS: Final = 0.005
"""Clients lose their connections this much later, at most, than another node has come to lead."""
INSTALLING_SECONDS: Final = 0.01
"""An install is between its first step and its last for about a millisecond."""
CATCHING_UP_SECONDS: Final = 1.5
LATE_SECONDS_MAX: Final = 4.0
"""Of what clients have sent; they give a connection up that is silent for 1.5 s."""
USURPING_SECONDS: Final = 2.5
SLEEPING_SECONDS_MAX: Final = 2.5
WAKING_SECONDS_MAX: Final = 0.6
"""After others have come to lead; clients give a node up that is silent for 1.5 s."""
TURNING_SECONDS: Final = 2.5
HANDING_OVER_SECONDS: Final = 0.05
ASKING_SECONDS: Final = 0.0002
"""A request for a vote is that much under way, or less."""


def _leaders(faults: "Faults") -> dict[RangeId, tuple[int, SimulatedNode]]:
    """Of each range of keys, the highest term in which a node leads it now, and that node."""
    found: dict[RangeId, tuple[int, SimulatedNode]] = {}
    for node in faults.cluster.nodes.values():
        if node.serving:
            for range_id, replica in node.inside.catalog.replicas.items():
                term = replica.raft.term
                if replica.leads and range_id != PLACEMENT_RANGE and found.get(range_id, (0,))[0] < term:
                    found[range_id] = (term, node)
    return found


def _leader(faults: "Faults", range_id: RangeId) -> tuple[int, SimulatedNode] | None:
    """The highest term in which a node leads a range now, and that node."""
    found: tuple[int, SimulatedNode] | None = None
    for node in faults.cluster.nodes.values():
        replica = node.inside.catalog.replicas.get(range_id) if node.serving else None
        if replica is not None and replica.leads and (found is None or found[0] < replica.raft.term):
            found = (replica.raft.term, node)
    return found


def _leads_after(faults: "Faults", range_id: RangeId, term: int) -> bool:
    """Whether a node leads a range in a later term than this."""
    found = _leader(faults, range_id)
    return found is not None and found[0] > term


def _leading(faults: "Faults") -> SimulatedNode | None:
    """A node that leads ranges of keys now: of one of them, drawn."""
    leaders = _leaders(faults)
    return faults.chance.choice(list(leaders.values()))[1] if leaders else None


def _others(faults: "Faults", node: SimulatedNode) -> list[str]:
    return [name for name in faults.cluster.nodes if name != node.name]


def _cut_off(faults: "Faults", node: SimulatedNode) -> None:
    """Nothing gets through between this node and the others. Clients reach all of them."""
    network = faults.cluster.network
    for name in _others(faults, node):
        network.block(node.name, name)
        network.block(name, node.name)


def _reconnect(faults: "Faults", node: SimulatedNode) -> None:
    network = faults.cluster.network
    for name in _others(faults, node):
        network.unblock(node.name, name)
        network.unblock(name, node.name)


def _rivalled(faults: "Faults", node: SimulatedNode) -> Callable[[], bool]:
    """Whether by then another node leads, too, what this one leads now."""
    mine = {range_id for range_id, (_, leader) in _leaders(faults).items() if leader is node}
    return lambda: any((_leader(faults, each) or (0, node))[1] is not node for each in mine)


def _send_clients_away(faults: "Faults", node: SimulatedNode) -> None:
    """Some of a node's clients, drawn, lose their connections."""
    network = faults.cluster.network
    ends = [each for each in network.streams.values() if each.incoming.source == node.name]
    for name in dict.fromkeys(each.incoming.target for each in ends):
        if name.startswith("client") and faults.chance.random() < 0.5:
            network.drop(node.name, name)


async def _divide_clients(faults: "Faults", node: SimulatedNode, seconds: float) -> None:
    """Once another node leads, too, some clients of this one lose their connections and find the other; the rest
    stay: what is written there and read here shows who answers without a right to. Takes ``seconds`` in all."""
    end = determinism.now() + seconds
    await determinism.until(_rivalled(faults, node), end, NOTICING_SECONDS)
    _send_clients_away(faults, node)
    await determinism.sleep(end - determinism.now())


async def _isolate(faults: "Faults", node: SimulatedNode, seconds: float) -> None:
    """Between this node and the others nothing gets through for a while."""
    if faults.chance.random() < 0.4:
        for name in _others(faults, node):
            faults.cluster.network.drop(node.name, name)
        await determinism.sleep(0.002)
    if not faults.healing:
        _cut_off(faults, node)
        await _divide_clients(faults, node, seconds)
        _reconnect(faults, node)


def _power_off_now(faults: "Faults", node: SimulatedNode, calls_max: int) -> None:
    """Within a few of the node's calls its power goes, and with it everything that is not synced."""
    if not node.alive:
        return
    number = node.environment.calls.count + faults.chance.randint(1, calls_max)
    starts = node.starts
    node.crash_at_call(number, power=True, chooser=LoseAll())
    faults.soon(faults.restart_once_crashed, node, starts, 0.02)


async def _sudden(faults: "Faults", one: SimulatedNode, two: SimulatedNode) -> None:
    """The power goes within the next few calls: often right behind a message, before the sync that it needed."""
    _power_off_now(faults, one, SOON_CALLS_MAX)


async def _blackout(faults: "Faults", one: SimulatedNode, two: SimulatedNode) -> None:
    """All power goes at one moment, perhaps while all disks stall, and only what was synced is left."""
    if faults.chance.random() < 0.6:
        return
    nodes = list(faults.cluster.nodes.values())
    if faults.chance.random() < 0.5:
        for each in nodes:
            each.environment.disk.stall()
        await determinism.sleep(faults.chance.uniform(0.01, 0.5))
    for each in nodes:
        if each.alive:
            await each.power_off(chooser=LoseAll())
    for each in nodes:
        await each.buried()
        each.start_soon()


async def _blink(faults: "Faults", one: SimulatedNode, two: SimulatedNode) -> None:
    """A process dies and is there again at once, as whoever watches over it sees to."""
    if one.alive:
        await one.kill(kept_batches=faults.kept)
        one.start_soon()


async def _depose(faults: "Faults", one: SimulatedNode, two: SimulatedNode) -> None:
    """A leader is cut off from the other nodes, or dies, for about as long as it takes to replace it."""
    node = _leading(faults)
    if node is not None:
        if faults.chance.random() < 0.3:
            _power_off_now(faults, node, SOON_CALLS_MAX)
        await _isolate(faults, node, faults.chance.uniform(0.3, 3))


async def _usurp(faults: "Faults", one: SimulatedNode, two: SimulatedNode) -> None:
    """A follower that does not hear the leader wants to lead, and the others blink: who remembers a promise?"""
    leader = _leading(faults)
    others = [node for node in faults.cluster.nodes.values() if node is not leader and node.serving]
    if leader is None or len(others) < 2:
        return
    rival = faults.chance.choice(others)
    network = faults.cluster.network
    network.drop(leader.name, rival.name)
    await determinism.sleep(0.002)
    network.block(leader.name, rival.name)
    network.block(rival.name, leader.name)
    await determinism.sleep(faults.chance.uniform(0.4, 1.2))  # it doubts its leader, and asks for votes again and again
    _cut_off(faults, leader)
    for node in others:
        if node is not rival and node.alive:
            await node.kill(kept_batches=faults.kept)
            node.start_soon()
    await _divide_clients(faults, leader, faults.chance.uniform(0.2, 0.8))
    _reconnect(faults, leader)


async def _sleeper(faults: "Faults", one: SimulatedNode, two: SimulatedNode) -> None:
    """A leader sleeps until others lead, and wakes amid the requests of clients that have not heard of them; perhaps
    they are all that it hears at first, and nothing of those who lead now."""
    leader = _leading(faults)
    if leader is None or leader.paused:
        return
    starts, rivalled = leader.starts, _rivalled(faults, leader)
    leader.pause()
    deaf = faults.chance.random() < 0.5 and not faults.healing
    if deaf:
        _cut_off(faults, leader)
    await determinism.until(rivalled, determinism.now() + SLEEPING_SECONDS_MAX, NOTICING_SECONDS)
    _send_clients_away(faults, leader)
    await determinism.sleep(faults.chance.uniform(0, WAKING_SECONDS_MAX))
    if leader.starts == starts:
        leader.resume()
    if deaf:
        await determinism.sleep(faults.chance.uniform(0, WAKING_SECONDS_MAX))
        _reconnect(faults, leader)


async def _relay(faults: "Faults", one: SimulatedNode, two: SimulatedNode) -> None:
    """Whoever comes to lead a range is cut off soon, often before anybody heard of it, and who was before comes back:
    entries of many terms lie about, each on one node (Raft paper, figure 8)."""
    leaders = _leaders(faults)
    if not leaders:
        return
    range_id = faults.chance.choice(list(leaders))
    term, away = leaders[range_id]
    _cut_off(faults, away)
    try:
        for _ in range(faults.chance.randint(2, 5)):
            end = determinism.now() + USURPING_SECONDS
            await determinism.until(partial(_leads_after, faults, range_id, term), end)
            leader = _leader(faults, range_id)
            if leader is None or leader[0] <= term:
                return
            term, last = leader[0], away
            await determinism.sleep(faults.chance.choice([0.0, 0.0, faults.chance.uniform(0, 0.02), 0.2]))
            away = leader[1]
            if away is not last:
                _reconnect(faults, last)
                _cut_off(faults, away)
    finally:
        _reconnect(faults, away)


async def _turncoat(faults: "Faults", one: SimulatedNode, two: SimulatedNode) -> None:
    """A voter dies as soon as somebody leads by its vote, and comes back to one who wants its vote in the same term."""
    leaders = _leaders(faults)
    if not leaders:
        return
    range_id = faults.chance.choice(list(leaders))
    term, old = leaders[range_id]
    others = [node for node in faults.cluster.nodes.values() if node is not old and node.serving]
    voter = faults.chance.choice([*others, old])
    if voter is old or len(others) < 2:
        return
    if faults.chance.random() < 0.5:
        voter.environment.disk.stall()
    _cut_off(faults, old)
    await determinism.until(partial(_leads_after, faults, range_id, term), determinism.now() + TURNING_SECONDS)
    leader = (_leader(faults, range_id) or (term, old))[1]
    if leader in (old, voter):
        voter.environment.disk.resume()
        _reconnect(faults, old)
        return
    _cut_off(faults, leader)
    if voter.alive:
        await voter.power_off(chooser=LoseAll())
    await voter.buried()
    voter.start_soon()
    _reconnect(faults, old)
    for name in _others(faults, leader):
        faults.cluster.network.block(leader.name, name)
        faults.cluster.network.block(name, leader.name)
    await determinism.sleep(TURNING_SECONDS)
    _reconnect(faults, leader)


async def _amnesia(faults: "Faults", one: SimulatedNode, two: SimulatedNode) -> None:
    """Whoever is to lead next asks for votes while its disk stalls, dies before anybody has heard that it leads, and
    comes back to those who gave it their vote: does it know that it has had them?"""
    leaders = _leaders(faults)
    serving = [node for node in faults.cluster.nodes.values() if node.serving]
    if not leaders or len(serving) < 3:
        return
    range_id = faults.chance.choice(list(leaders))
    term, old = leaders[range_id]
    next_ = faults.chance.choice([node for node in serving if node is not old])
    replicas = {node: node.inside.catalog.replicas.get(range_id) for node in serving}
    target, leading = replicas.pop(next_), replicas[old]
    if target is None or leading is None:
        return

    def voted() -> bool:
        rafts = [each.raft for each in replicas.values() if each is not None]
        return all(raft.term > term and raft.vote == target.replica_id for raft in rafts)

    next_.environment.disk.stall()
    with suppress(Corruption):
        leading.raft.transfer_leader(target.replica_id)
    old.inside.driver.touch(leading)
    await determinism.until(voted, determinism.now() + HANDING_OVER_SECONDS, ASKING_SECONDS)
    network = faults.cluster.network
    for name in _others(faults, next_):
        network.block(next_.name, name)
    await determinism.until(lambda: target.leads, determinism.now() + HANDING_OVER_SECONDS, ASKING_SECONDS)
    if next_.alive:
        await next_.power_off(chooser=LoseAll())
    await next_.buried()
    next_.start_soon()
    _reconnect(faults, next_)
    apart = _others(faults, next_)
    for name in apart:
        for other in apart:
            network.block(name, other)  # they elect nobody meanwhile
    end = determinism.now() + USURPING_SECONDS
    await determinism.until(partial(_may_campaign, next_, range_id), end, ASKING_SECONDS)
    if _may_campaign(next_, range_id):
        again = next_.inside.catalog.replicas[range_id]
        again.raft.campaign(next_.environment.clock.monotonic_ns())
        next_.inside.driver.touch(again)
    await determinism.sleep(NOTICING_SECONDS)
    for name in apart:
        for other in apart:
            network.unblock(name, other)


def _may_campaign(node: SimulatedNode, range_id: RangeId) -> bool:
    """Whether a node that was started again is bound no more by what it may have promised before."""
    replica = node.inside.catalog.replicas.get(range_id) if node.serving else None
    return replica is not None and replica.raft.raft.refuse_until <= node.environment.clock.monotonic_ns()


async def _handover(faults: "Faults", one: SimulatedNode, two: SimulatedNode) -> None:
    """A leadership is handed over, and the old leader does not hear how that went."""
    node = _leading(faults)
    if node is None:
        return
    for range_id, replica in list(node.inside.catalog.replicas.items()):
        if range_id != PLACEMENT_RANGE and replica.leads and replica.machine is not None:
            members = [member.replica_id for member in replica.machine.descriptor.replicas]
            targets = [each for each in members if each != replica.replica_id]
            if targets:
                with suppress(Corruption):  # read from a disk that lies, to be sent along; the node hears of it
                    replica.raft.transfer_leader(faults.chance.choice(targets))
                node.inside.driver.touch(replica)

    async def deaf() -> None:
        await determinism.sleep(faults.chance.choice([0.0, 0.0003, 0.001, 0.003]))
        if faults.healing:
            return
        network = faults.cluster.network
        for name in _others(faults, node):
            network.block(name, node.name)
        await _divide_clients(faults, node, faults.chance.uniform(0.2, 1.5))
        _reconnect(faults, node)

    faults.soon(deaf)


async def _lag(faults: "Faults", one: SimulatedNode, two: SimulatedNode) -> None:
    """A node is away while the others, or one of them, let go of their logs; it may die while it catches up, and find
    another leader when it is back: one that still has the log which the first had let go of, and appends to its own."""
    _cut_off(faults, one)
    await determinism.sleep(faults.chance.uniform(0.5, 2))
    others = [node for node in faults.cluster.nodes.values() if node is not one and node.serving]
    if others and faults.chance.random() < 0.5:
        others = [faults.chance.choice(others)]
    for node in others:
        await _flushed(node)
    _reconnect(faults, one)
    end = determinism.now() + CATCHING_UP_SECONDS
    if faults.chance.random() < 0.8 and await determinism.until(partial(_installs, one), end):
        if faults.chance.random() < 0.4:
            _power_off_now(faults, one, faults.chance.choice(INSTALLING_CALLS_MAX))
        else:
            if faults.chance.random() < 0.7:
                await determinism.until(partial(_emptied, one), determinism.now() + INSTALLING_SECONDS)
            if one.alive:
                await one.power_off(chooser=LoseAll())
                faults.soon(faults.restart_later, one)
        if len(others) == 1 and faults.chance.random() < 0.7:
            await _isolate(faults, others[0], faults.chance.uniform(1, 4))


def _installs(node: SimulatedNode) -> bool:
    """Whether the old rows of a range are going and the new ones are not all there."""
    replicas = node.inside.catalog.replicas.values() if node.serving else ()
    return any(replica.installing and replica.machine is None for replica in replicas)


def _emptied(node: SimulatedNode) -> bool:
    """Whether that is so, and the old rows are gone for good."""
    return _installs(node) and not node.engine.unflushed_bytes


async def _flushed(node: SimulatedNode) -> None:
    # Here, for `faults` imports this module.
    from shardkv.simulation.faults import flush_one

    await flush_one(node)


# Clients


async def _lost_answers(faults: "Faults", one: SimulatedNode, two: SimulatedNode) -> None:
    """Connections of clients to a node are reset while answers are on their way: the clients ask again."""
    network = faults.cluster.network
    name = (_leading(faults) or one).name

    async def lose() -> None:
        for _ in range(faults.chance.randint(1, 5)):
            ends = [each for each in network.streams.values() if each.incoming.source == name]
            for stream in ends:
                if stream.incoming.target.startswith("client") and faults.chance.random() < 0.7:
                    network.reset(stream)
            await determinism.sleep(faults.chance.uniform(0.001, 0.1))

    faults.soon(lose)


async def _late_requests(faults: "Faults", one: SimulatedNode, two: SimulatedNode) -> None:
    """What clients have sent to a node comes late: by then they have given those connections up, and asked again
    through others, and gone on."""
    name = (_leading(faults) or one).name
    to_node = [each.incoming for each in faults.cluster.network.streams.values() if each.incoming.target == name]
    held = [each for each in to_node if each.source.startswith("client") and faults.chance.random() < 0.7]
    for pipe in held:
        pipe.block()

    async def release() -> None:
        await determinism.sleep(faults.chance.uniform(1, LATE_SECONDS_MAX))
        for pipe in held:
            pipe.unblock()

    faults.soon(release)


async def _split_retry(faults: "Faults", one: SimulatedNode, two: SimulatedNode) -> None:
    """A range is split while its clients lose their answers: what they ask again belongs to the other half."""
    from shardkv.simulation.faults import KINDS

    await KINDS["split"](faults, one, two)

    async def lose() -> None:
        for _ in range(3):
            await determinism.sleep(faults.chance.uniform(0, 0.004))
            await _lost_answers(faults, one, two)

    faults.soon(lose)


SEQUENCES: Final[dict[str, Callable[["Faults", SimulatedNode, SimulatedNode], Awaitable[None]]]] = {
    "sudden": _sudden,
    "blackout": _blackout,
    "blink": _blink,
    "depose": _depose,
    "usurp": _usurp,
    "sleeper": _sleeper,
    "relay": _relay,
    "turncoat": _turncoat,
    "amnesia": _amnesia,
    "handover": _handover,
    "lag": _lag,
    "lost-answers": _lost_answers,
    "late-requests": _late_requests,
    "split-retry": _split_retry,
    "slow-disk": slow_disk,
    "rot": rot,
    "reborn": reborn,
}
"""By the name that ``--faults`` takes."""
