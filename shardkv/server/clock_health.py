"""Whether this node's wall clock can be believed, and which time the node goes by when it cannot (trap 23).

A range's time never goes back. One leader whose wall clock is an hour ahead for a moment would make every command that
is issued by the right time too old for its ranges, for an hour. So the nodes ask each other for the time, and a wall
clock that has left the middle of it is not followed. Lives here: the asking, the judgement, and the setting of the
node's clock. Does not live here: stamps (``machine.clock``). The rules, on which nobody's safety rests:

- Time that is behind catches up; time that was given out cannot be taken back. Among nodes that give out theirs the
  later one counts, where they are of an even number: one of two that stood still for a while does not set the other
  back, by whose time commands are issued.
- What a node that has just started takes for the time counts among such nodes only, and of few the later is doubted.
- While no wall clock is followed a node's time goes on as it is, if it is within the bound of the others': how long
  answers are under way is known by halves only, and nodes that took over each other's errors would run slow or fast.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import trio

from shardkv.environment import Clock
from shardkv.machine.clock import HybridClock
from shardkv.types import TIMESTAMP_MAX, NodeId, timestamp_ms
from shardkv.wire.clock_reading import decode_answer, encode_answer, encode_question

ASK_SECONDS: Final = 1.0
FRESH_SECONDS: Final = 3.0
"""For how long an answer counts."""
COMPARE_SECONDS: Final = 1.0
"""How long clients wait at a start until a node that goes by it has said what time it is, or all have said what they
guess. A node that goes on without tells them no time that its ranges, and other clients, have not seen."""
_NS_PER_MS: Final = 1_000_000


@dataclass(frozen=True, slots=True)
class ClockStatistics:
    """A frozen picture of the clock's health."""

    wall_ahead_seconds: float
    """How far the wall clock is ahead of the time that the node goes by; negative when it is behind."""
    peers: int
    """How many other nodes have said lately what time it is."""


class ClockHealth:
    """Keeps ``hybrid_clock`` with the wall clock, as far as that is within ``offset_ms_max`` of the other nodes' time.

    ``ask(node_id, question)`` sends a question to a node, or drops it. A service once :meth:`run`.
    """

    def __init__(
        self,
        clock: Clock,
        hybrid_clock: HybridClock,
        offset_ms_max: int,
        ask: Callable[[NodeId, bytes], object],
        log: Any,
    ) -> None:
        self._clock = clock
        self._hybrid_clock = hybrid_clock
        self._offset_ms_max = offset_ms_max
        self._ask = ask
        self._log = log
        self._answers: dict[NodeId, tuple[int, int, bool]] = {}
        """Of each node: when it answered, and how far its time was ahead of our monotonic clock, both in ms of that;
        whether it was guessed."""
        self._asked_first: list[NodeId] = []
        """The nodes that there were at the start."""
        self._believed = True
        self._compared = trio.Event()
        """With another node's clock, unless there is none."""
        self._settled = trio.Event()

    async def settled(self) -> None:
        """Wait until it is settled by which time this node goes after its start."""
        await self._settled.wait()

    def begin(self, peers: list[NodeId]) -> None:
        """This node has started; these others are known."""
        self._asked_first = peers
        if peers:
            self._hybrid_clock.hold()
        else:
            self._compared.set()

    def answer(self, question: bytes) -> bytes:
        """What to say to a node that asks for the time. Raises ProtocolError."""
        return encode_answer(question, self._hybrid_clock.guess_ms(), guessed=self._hybrid_clock.held)

    def ask(self, node_id: NodeId) -> None:
        self._ask(node_id, encode_question(self._clock.monotonic_ns()))

    def answered(self, node_id: NodeId, answer: bytes) -> None:
        """A node has said what time it is. Raises ProtocolError."""
        asked_ns, ms, guessed = decode_answer(answer)
        now_ns = self._clock.monotonic_ns()
        travelled_ms = (now_ns - asked_ns) // _NS_PER_MS
        if not 0 <= travelled_ms <= self._offset_ms_max or not 0 <= ms <= timestamp_ms(TIMESTAMP_MAX):
            return  # It says too little: its moment lies anywhere in between. Or no stamp can hold it.
        now_ms = now_ns // _NS_PER_MS
        self._answers[node_id] = (now_ms, ms + travelled_ms // 2 - now_ms, guessed)
        if not self._compared.is_set() and (not guessed or len(self._answers) >= len(self._asked_first)):
            self._compare()

    def _compare(self) -> None:
        """With what is known by now, if anything is."""
        if self._answers:
            self.judge()
            self._compared.set()

    def judge(self) -> None:
        """Set the node's time by its wall clock, or by the other nodes' where the wall clock is far from theirs."""
        own_ms = self._hybrid_clock.guess_ms()
        middle_ms = self._middle(own_ms)
        wall_ms = self._clock.wall_ms()
        # What is at the bound must not step to and fro, and a line be logged each time.
        bound_ms = self._offset_ms_max if self._believed else self._offset_ms_max // 2
        believed = abs(wall_ms - middle_ms) <= bound_ms
        if believed:
            self._hybrid_clock.follow(wall_ms)
        elif self._hybrid_clock.held or abs(own_ms - middle_ms) > self._offset_ms_max:
            self._hybrid_clock.follow(middle_ms)
        if believed != self._believed:
            self._believed = believed
            self._tell(wall_ms - middle_ms)

    def _middle(self, own_ms: int) -> int:
        """Of the times that nodes go by, this one's among them; of what they guess where none does yet."""
        now_ms = self._clock.monotonic_ns() // _NS_PER_MS
        self._forget(now_ms)
        given: list[int] = []
        guesses: list[int] = []
        for _, ahead_ms, guessed in self._answers.values():
            (guesses if guessed else given).append(now_ms + ahead_ms)
        (guesses if self._hybrid_clock.held else given).append(own_ms)
        if given:
            return sorted(given)[len(given) // 2]
        return sorted(guesses)[(len(guesses) - 1) // 2]

    def _forget(self, now_ms: int) -> None:
        """What was said too long ago."""
        fresh_ms = now_ms - int(FRESH_SECONDS * 1000)
        for node_id, (answered_ms, _, _) in list(self._answers.items()):
            if answered_ms < fresh_ms:
                del self._answers[node_id]

    def _tell(self, wall_ahead_ms: int) -> None:
        if self._believed:
            self._log.info("the wall clock is followed again", ahead_ms=wall_ahead_ms)
            return
        self._log.warning(
            "the wall clock is off and is not followed: "
            + ("the other nodes' time is" if self._answers else "time goes on from where it was"),
            ahead_ms=wall_ahead_ms,
            advice="see why this machine's clock jumps or differs from the other nodes' (NTP)",
        )

    async def run(
        self, peers: Callable[[], list[NodeId]], *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Ask ``peers()`` and judge, again and again."""
        self.begin(peers())
        task_status.started()
        with self._clock.deadline(COMPARE_SECONDS):
            await self._compared.wait()
        if not self._compared.is_set():
            self._compare()
        self._settled.set()
        while True:
            others = peers()
            for node_id in others:
                self.ask(node_id)
            await self._clock.sleep(ASK_SECONDS)
            if not others:
                self._compared.set()  # they have all left the cluster
            if self._compared.is_set():
                self.judge()
            else:
                self._compare()

    def statistics(self) -> ClockStatistics:
        wall_ahead_ms = self._clock.wall_ms() - self._hybrid_clock.ms()
        return ClockStatistics(wall_ahead_ms / 1000, len(self._answers))

    def check(self) -> None:
        self._hybrid_clock.check()
        for node_id, (answered_ms, _, _) in self._answers.items():
            assert answered_ms * _NS_PER_MS <= self._clock.monotonic_ns(), f"node {node_id} answered in the future"
