"""The state machine against a plain dict, under retries, restarts, crashes and splits.

The model knows only what users were promised: a command takes effect once, in the order of the log, and every attempt
of it that is answered is answered the same.
"""

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, rule

from shardkv import errors
from shardkv.machine import RangeMachine
from shardkv.machine.entries import decode
from shardkv.machine.reads import scan_page
from shardkv.storage.engine import WriteBatch
from shardkv.storage.memory import MemoryEngine
from shardkv.types import SESSION_AGE_MS_MAX, RangeId

from . import world
from .world import Client, World, dump

KEYS = st.sampled_from([b"a", b"b", b"m", b"n", b"z"])
VALUES = st.sampled_from([b"", b"1", b"-5", b"x"])
UNEXECUTED = (errors.TooOld.code, errors.EpochMismatch.code, errors.SequenceReused.code, errors.MalformedRequest.code)


UNKNOWN = -1
"""The version of a key that an increment has set, until a read tells it."""


class Command:
    """A sealed command, what it means to the model, and its outcome once it has one."""

    def __init__(self, client: Client, name: str, *arguments: Any) -> None:
        self.client, self.name, self.arguments = client, name, arguments
        self.sealed: bytes = getattr(client, name)(*arguments)
        self.sequence, self.issued_at = client.sequence, client.now_ms
        self.outcome: Any = None


def on_model(model: dict[bytes, tuple[bytes, int]], command: Command, answered: Any) -> Any:
    """Carry out a command on the model; what it must be answered. A put's version is taken from the answer."""
    name, arguments = command.name, command.arguments
    key = arguments[0]
    version = model.get(key, (b"", 0))[1]
    if name == "delete_range":
        for gone in [held for held in model if key <= held and (arguments[1] is None or held < arguments[1])]:
            del model[gone]
        return True
    if name == "increment":
        try:
            number = int(model.get(key, (b"0", 0))[0]) + arguments[1]
        except ValueError:
            return "not an integer"
        model[key] = (b"%d" % number, UNKNOWN)
        return number
    condition = arguments[-1]
    if condition is not None and version == UNKNOWN:
        # Set by an increment of the same entry, and so unlike any version that a client could have named.
        assert answered[0] == errors.VersionMismatch.code, f"{name}{arguments} was answered {answered}"
        model[key] = (model[key][0], answered[2][0])
        return answered
    if condition is not None and condition != version:
        return errors.to_wire(errors.VersionMismatch(current=version))
    if name == "delete":
        return model.pop(key, None) is not None
    assert type(answered) is int, f"a put was answered {answered!r}"
    model[key] = (arguments[1], answered)
    return answered


class RangeModel(RuleBasedStateMachine):
    """Clients send commands, again and again; the range restarts and time passes."""

    commands: Bundle[Command] = Bundle("commands")

    def __init__(self) -> None:
        super().__init__()
        self.range = World()
        self.clients = [Client(b"alice"), Client(b"bob")]
        self.model: dict[bytes, tuple[bytes, int]] = {}
        self.versions = 0

    @initialize()
    def begin(self) -> None:
        self.range.do(self.clients[0], self.clients[0].put(b"m", b"7"))
        entry = self.range.get(b"m")
        assert entry is not None
        self.model[b"m"] = (entry[0], entry[1])

    def _make(self, who: int, name: str, *arguments: Any) -> Command:
        client = self.clients[who]
        client.now_ms = max(client.now_ms, self.range.now_ms)
        return Command(client, name, *arguments)

    def _version(self, key: bytes, right: bool | None) -> int | None:
        if right is None:
            return None
        entry = self.range.get(key)
        return (entry[1] if entry else 0) if right else 12345

    @rule(target=commands, who=st.integers(0, 1), key=KEYS, value=VALUES, right=st.none() | st.booleans())
    def make_put(self, who: int, key: bytes, value: bytes, right: bool | None) -> Command:
        return self._make(who, "put", key, value, self._version(key, right))

    @rule(target=commands, who=st.integers(0, 1), key=KEYS, right=st.none() | st.booleans())
    def make_delete(self, who: int, key: bytes, right: bool | None) -> Command:
        return self._make(who, "delete", key, self._version(key, right))

    @rule(target=commands, who=st.integers(0, 1), key=KEYS, delta=st.integers(-3, 3))
    def make_increment(self, who: int, key: bytes, delta: int) -> Command:
        return self._make(who, "increment", key, delta)

    @rule(target=commands, who=st.integers(0, 1), key=KEYS, end=st.none() | KEYS)
    def make_delete_range(self, who: int, key: bytes, end: bytes | None) -> Command:
        return self._make(who, "delete_range", key, end if end is not None and end > key else None)

    @rule(sent=st.lists(commands, min_size=1, max_size=6), old_route=st.sampled_from([False, False, False, True]))
    def send(self, sent: list[Command], old_route: bool) -> None:
        """One entry with a group for each command, retries and reorderings among them."""
        generation = self.range.machine.descriptor.epoch.span - int(old_route)
        outcomes = self.range.write(*((command.client, [command.sealed]) for command in sent), generation=generation)
        self._answered(sent, [outcome for [outcome] in outcomes])
        self._learn_versions()

    @rule(sent=st.lists(commands, min_size=1, max_size=6))
    def send_grouped(self, sent: list[Command]) -> None:
        """The same with one group for each client, so that the fast path is taken where it can be."""
        by_client = [[command for command in sent if command.client is client] for client in self.clients]
        groups = [(client, own) for client, own in zip(self.clients, by_client) if own]
        outcomes = self.range.write(*((client, [command.sealed for command in own]) for client, own in groups))
        for (_, own), answers in zip(groups, outcomes):
            self._answered(own, answers)
        self._learn_versions()

    def _answered(self, sent: list[Command], outcomes: list[Any]) -> None:
        for command, outcome in zip(sent, outcomes, strict=True):
            refused = type(outcome) is list and outcome[0] in UNEXECUTED
            if refused:
                continue
            if command.outcome is not None:
                assert outcome == command.outcome, f"{command.name} was answered {command.outcome}, then {outcome}"
                continue
            command.outcome = outcome
            expected = on_model(self.model, command, outcome)
            if expected == "not an integer":
                assert outcome[0] == errors.NotAnInteger.code
            else:
                assert outcome == expected, f"{command.name}{command.arguments}: {outcome}, not {expected}"
            if command.name == "put" and type(outcome) is int:
                assert outcome > self.versions, f"version {outcome} after {self.versions}"
                self.versions = outcome

    def _learn_versions(self) -> None:
        for key, (value, version) in list(self.model.items()):
            entry = self.range.get(key)
            if version == UNKNOWN and entry is not None:
                self.model[key] = (value, entry[1])

    @rule(who=st.integers(0, 1))
    def settle(self, who: int) -> None:
        """A client gives up every command it has made so far."""
        self.clients[who].below = self.clients[who].sequence + 1

    @rule(milliseconds=st.sampled_from([1, 400, SESSION_AGE_MS_MAX // 2, SESSION_AGE_MS_MAX + 1]))
    def pass_time(self, milliseconds: int) -> None:
        self.range.now_ms += milliseconds

    @rule()
    def restart(self) -> None:
        self.range.reload()

    @invariant()
    def the_keys_are_the_models(self) -> None:
        found, more = scan_page(self.range.machine, self.range.engine, b"", None, 1_000, 1 << 20)
        assert not more
        assert dict(zip(found[0::3], zip(found[1::3], found[2::3]))) == self.model

    @invariant()
    def the_machine_is_sound(self) -> None:
        self.range.machine.check()

    def teardown(self) -> None:
        """The same log on a second replica, which restarts after every other batch, leaves the same rows."""
        twin = World()
        for position, (index, term, data) in enumerate(self.range.log):
            if position % 2:
                twin.reload()
            batch = WriteBatch()
            twin.machine.apply(index, term, data, batch, twin.engine, decode(data))
            twin.machine.finish(batch)
            twin.engine.write(batch)
        assert twin.rows() == self.range.rows()


TestRangeModel = RangeModel.TestCase
TestRangeModel.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def busy_log(seed_keys: list[bytes], batches: int) -> World:
    """A range that has seen puts, conditions, retries, an expiry and a split."""
    range_, clients = World(), [Client(b"%d" % number) for number in range(3)]
    for turn in range(batches):
        client = clients[turn % 3]
        client.now_ms = range_.now_ms
        key = seed_keys[turn % len(seed_keys)]
        retry = client.increment(b"c")
        range_.write(
            (client, [client.put(key, b"%d" % turn), retry, client.put(b"q", b"", if_version=0)]), (client, [retry])
        )
        if turn % 4 == 3:
            client.below = client.sequence
        if turn == batches // 2:
            range_.split(b"m")
        range_.now_ms += 9_000
    return range_


@settings(max_examples=25, deadline=None)
@given(seed_keys=st.lists(KEYS, min_size=1, max_size=4), crash_at=st.integers(0, 13), turn_entries=st.integers(1, 4))
def test_replay_from_any_prefix_of_batches_comes_to_the_same_rows(
    seed_keys: list[bytes], crash_at: int, turn_entries: int
) -> None:
    """DESIGN §4.3: a crash leaves a prefix of the atomic batches; the rest is applied again from the log. Batches of
    several entries each, as a turn writes them."""
    original = busy_log(seed_keys, 12)
    replica = World()
    position = 0
    batches = 0
    log = original.log
    while position < len(log):
        if batches == crash_at:
            replica.reload()
            assert replica.machine.applied_index == log[position][0] - 1
        batch = WriteBatch()
        for index, term, data in log[position : position + turn_entries]:
            applied = replica.machine.apply(index, term, data, batch, replica.engine)
            if applied.split is not None:
                applied.split.keep(batch)
        replica.machine.finish(batch)
        replica.engine.write(batch)
        position += turn_entries
        batches += 1
    assert dump(replica.engine) == dump(original.engine)
    assert RangeMachine.load(RangeId(2), replica.engine) is not None


def test_a_lost_batch_is_applied_again_exactly_once() -> None:
    """The batch of an increment is lost with the crash; replay and the client's retry must not count twice."""
    range_, client = World(), Client()
    engine = MemoryEngine(crashable=True)
    start = WriteBatch()
    range_.machine.write(start)
    engine.write(start)
    engine.flush()
    attempt = client.increment(b"n")
    assert range_.do(client, attempt) == 1
    [(index, term, data)] = range_.log
    lost = RangeMachine.load(RangeId(1), engine)
    assert lost is not None
    replica = World(machine=lost)
    replica.engine = engine
    for _ in range(2):  # the second time as a replay after the first batch was lost
        machine = RangeMachine.load(RangeId(1), engine)
        assert machine is not None
        replica.machine = machine
        batch = WriteBatch()
        assert machine.apply(index, term, data, batch, engine).outcomes == [[1]]
        machine.finish(batch)
    engine.write(batch)
    assert replica.do(client, attempt) == 1
    assert replica.value(b"n") == b"1"
    assert term == world.TERM
