"""Every decoder against a fixed choice of damaged input, and the fuzzer itself: it must see what is wrong."""

import random
import sys
import tracemalloc

import pytest

from shardkv import codec
from shardkv.config_sources import load_node_config
from shardkv.errors import MalformedRequest, ProtocolError
from tests.fuzz import samples
from tests.fuzz.__main__ import Interrupts, main
from tests.fuzz.mutation import mutated
from tests.fuzz.run import fuzz
from tests.fuzz.targets import TARGETS, Target

INPUTS = 2_500
SLOW = {"command-line": 300, "config": 1_000}
"""Decoders that take a millisecond and more for an input."""


@pytest.mark.parametrize("target", TARGETS, ids=[each.name for each in TARGETS])
def test_damaged_input_ends_in_a_clean_error_or_a_valid_message(target: Target) -> None:
    """Issue: a million random and mutated frames (``python -m tests.fuzz``); here a few thousand for each decoder."""
    report = fuzz(SLOW.get(target.name, INPUTS), target.name, [target])
    assert not report.failures, "\n".join(each.describe() for each in report.failures.values())
    assert report.outcomes[target.name, "valid"], "no input came through: the mutations are too wild to find anything"


_READ_ALONE = [each for each in TARGETS if each.name != "config"]


@pytest.mark.parametrize("text", samples.CONFIG_FILES[:3])
def test_every_sample_of_a_configuration_file_is_valid_without_flags_and_variables(text: bytes) -> None:
    assert load_node_config({}, {}, text.decode(), "file.toml").data == "/d"


@pytest.mark.parametrize("target", _READ_ALONE, ids=[each.name for each in _READ_ALONE])
def test_every_sample_is_valid_before_it_is_damaged(target: Target) -> None:
    found = [target.outcome(data, random.Random(1)) for data in target.corpus]
    assert "valid" in found
    if target.name not in ("snapshot", "snapshot-rows", "frames", "key", "command-line"):
        assert set(found) == {"valid"}


def test_a_run_repeats_itself() -> None:
    assert fuzz(1_500, 5).digest == fuzz(1_500, 5).digest
    assert fuzz(1_500, 5).digest != fuzz(1_500, 6).digest


def test_an_interrupt_ends_a_run_between_two_inputs_and_at_once_when_it_is_repeated() -> None:
    """A command line that is tried made an exit code of it, and the run went on."""
    interrupts, tried = Interrupts(), []

    def parse(data: bytes, chance: random.Random) -> None:
        tried.append(data)
        interrupts(2, None)

    with pytest.raises(KeyboardInterrupt):
        fuzz(5, 1, [Target("one", (b"a",), parse, ())], stopped=lambda: interrupts.received)
    assert len(tried) == 1
    with pytest.raises(KeyboardInterrupt):
        interrupts(2, None)


@pytest.mark.parametrize("typed", ["0", "-5", "x", ""])
def test_a_run_without_inputs_is_refused(typed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its memory was said to have grown."""
    monkeypatch.setattr(sys, "argv", ["fuzz", "--frames", typed])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2


def test_an_error_that_nobody_expects_is_a_failure_that_shows_its_input() -> None:
    def run(data: bytes, chance: random.Random) -> None:
        if b"!" in data:
            raise KeyError("a bug")
        raise ProtocolError("clean")

    report = fuzz(5_000, 1, [Target("broken", (b"a!b",), run, (ProtocolError,))])
    assert report.failed
    (failure,) = report.failures.values()
    assert "KeyError" in failure.describe()
    assert failure.data.hex() in failure.describe()


@pytest.mark.parametrize("head", ["5b", "7b", "9b", "bb", "5a", "9a", "ba"])
def test_an_announced_length_allocates_nothing(head: str) -> None:
    """A string, an array or a map of up to 2^64 - 1 items in nine bytes."""
    width = 8 if head.endswith("b") else 4
    for number in ((1 << 8 * width) - 1, (1 << 8 * width - 1) - 1, 1 << 30, 1 << 26):
        data = bytes.fromhex(head) + number.to_bytes(width)
        tracemalloc.start()
        try:
            with pytest.raises(MalformedRequest):
                codec.loads(data)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert peak < 100_000, f"{peak} bytes for {data.hex()}"


def test_mutations_are_of_every_kind_and_bounded() -> None:
    chance = random.Random(1)
    data = bytes(range(100))
    found = [mutated(chance, data, [data, b"other"]) for _ in range(5_000)]
    assert data in found
    assert max(map(len, found)) < 200_000
    assert any(len(each) < 50 for each in found)
    assert any(len(each) == len(data) and each != data for each in found)
