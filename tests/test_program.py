"""How programs end: every way out is an exit code and at most a line, in a process of its own."""

import subprocess
import sys

import click
import pytest
from click.testing import CliRunner

from shardkv.program import Finite, leaf

SECONDS = 180
START = "import os, signal, sys\nimport click, trio\nfrom shardkv.program import run_program\n"


def ended(program: str, **streams: object) -> "subprocess.CompletedProcess[str]":
    """With the signals that a terminal's programs begin with; whatever started the tests may ignore some."""
    defaults = (
        "signal.signal(signal.SIGINT, signal.default_int_handler)\nsignal.signal(signal.SIGHUP, signal.SIG_DFL)\n"
    )
    given = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **streams}
    command = [sys.executable, "-c", START + defaults + program]
    return subprocess.run(command, text=True, timeout=SECONDS, check=False, **given)  # type: ignore[call-overload,no-any-return]


@pytest.mark.parametrize(("returned", "code"), [("None", 0), ("0", 0), ("1", 1), ("sys.exit(2)", 2)])
def test_what_the_body_returns_is_the_exit_code(returned: str, code: int) -> None:
    done = ended(f"run_program(lambda: {returned})")
    assert (done.returncode, done.stdout, done.stderr) == (code, "", "")


@pytest.mark.parametrize(("signal_name", "code"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)])
def test_an_interrupt_is_one_line_and_its_code(signal_name: str, code: int) -> None:
    done = ended(f"run_program(lambda: signal.raise_signal(signal.{signal_name}))")
    assert (done.returncode, done.stderr) == (code, "interrupted\n")


def test_an_interrupt_may_say_how_to_go_on_and_click_does_not_hide_it() -> None:
    done = ended(
        """
@click.command()
def command():
    raise KeyboardInterrupt("the same again goes on")

run_program(lambda: command.main([], standalone_mode=False))
"""
    )
    assert done.returncode == 130
    assert done.stderr.strip() == "interrupted: the same again goes on"


@pytest.mark.parametrize("signal_name", ["SIGINT", "SIGTERM"])
def test_a_signal_to_an_event_loop_lets_it_clear_away_what_it_has_started(signal_name: str) -> None:
    done = ended(
        f"""
async def work():
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.sleep_forever)
        try:
            signal.raise_signal(signal.{signal_name})
            await trio.sleep_forever()
        finally:
            print("cleared away")

run_program(lambda: trio.run(work))
"""
    )
    assert done.returncode == {"SIGINT": 130, "SIGTERM": 143}[signal_name]
    assert (done.stdout, done.stderr) == ("cleared away\n", "interrupted\n")


def test_where_interrupts_are_ignored_sigterm_still_ends_the_program() -> None:
    """As for a program that a script has put into the background."""
    done = ended(
        "signal.signal(signal.SIGINT, signal.SIG_IGN)\nrun_program(lambda: signal.raise_signal(signal.SIGTERM))"
    )
    assert done.returncode == -15


@pytest.mark.parametrize("module", ["shardkv.simulation", "shardkv_bench", "shardkv_bench compare"])
def test_help_that_cannot_be_written_is_one_line(module: str) -> None:
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [sys.executable, "-m", *module.split(), "--help"], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert (done.returncode, done.stderr) == (1, "Error: [Errno 28] No space left on device\n")


def test_output_that_fails_amid_a_group_of_errors_is_one_line_and_a_closed_pipe_is_none() -> None:
    program = """
async def work():
    async with trio.open_nursery() as nursery:
        nursery.start_soon(tell)

async def tell():
    print("x", flush=True)

run_program(lambda: trio.run(work))
"""
    with open("/dev/full", "wb") as full:
        done = ended(program, stdout=full)
    assert (done.returncode, done.stderr) == (1, "Error: [Errno 28] No space left on device\n")
    done = ended("reading, writing = os.pipe(); os.close(reading); os.dup2(writing, 1)\n" + program)
    assert (done.returncode, done.stderr) == (1, "")


def test_a_bug_shows_its_traceback() -> None:
    done = ended("run_program(lambda: 1 / 0)")
    assert done.returncode == 1
    assert done.stderr.endswith("ZeroDivisionError: division by zero\n")


def test_the_error_that_matters_in_a_group_is_an_interrupt_else_the_first() -> None:
    interrupt = KeyboardInterrupt()
    assert leaf(BaseExceptionGroup("", [ValueError(), BaseExceptionGroup("", [interrupt])])) is interrupt
    assert isinstance(leaf(ExceptionGroup("", [ExceptionGroup("", [ValueError()]), OSError()])), ValueError)


@pytest.mark.parametrize("typed", ["nan", "inf", "-inf", "1e999"])
def test_a_finite_number_is_asked_for(typed: str) -> None:
    @click.command()
    @click.option("--seconds", type=Finite())
    def command(seconds: float) -> None: ...

    found = CliRunner().invoke(command, ["--seconds", typed])
    assert found.exit_code == 2
    assert "is no finite number" in found.output
