"""``shardkv node`` and the process manager, with a stand-in for the server: signals, exits, the parent's pipe."""

import contextlib
import os
import resource
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from shardkv.cli.local_cluster import LocalCluster, NodeFailed, Process, cpu_seconds, free_ports
from shardkv.cli.node import _load
from shardkv.cli.root import shardkv
from tests.cli.processes import SECONDS, STANDIN


def start(directory: Path, name: str) -> Process:
    (directory / name).mkdir(exist_ok=True)
    arguments = ["--name", name, "--data", str(directory / name), "--listen", "127.0.0.1:7001", "--bootstrap"]
    return Process([*STANDIN, *arguments], directory / f"{name}.log", os.environ)


@pytest.fixture
def processes() -> Iterator[list[Process]]:
    started: list[Process] = []
    yield started
    for process in started:
        process.kill()


def test_a_node_prints_its_ready_line_and_a_first_sigterm_stops_it_cleanly(
    tmp_path: Path, processes: list[Process]
) -> None:
    """DESIGN 2.2: prints `ready NAME ADDRESS` on stdout once it serves; SIGTERM drains and stops cleanly."""
    process = start(tmp_path, "n1")
    processes.append(process)
    assert process.wait_for_line("ready ", SECONDS) == "ready n1 127.0.0.1:7001"
    assert process.terminate(SECONDS) == 0
    assert process.lines == ["ready n1 127.0.0.1:7001", "draining"]


@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="Linux's")
def test_a_node_takes_all_open_files_that_it_may_have(tmp_path: Path, processes: list[Process]) -> None:
    """With the usual 1,024, idle clients would keep other nodes out and the log from its next file."""
    low = ["sh", "-c", 'ulimit -S -n 256 && exec "$@"', "sh"]
    arguments = ["--name", "n1", "--data", str(tmp_path), "--listen", "127.0.0.1:7001", "--bootstrap"]
    process = Process([*low, *STANDIN, *arguments], tmp_path / "n1.log", os.environ)
    processes.append(process)
    assert process.wait_for_line("ready ", SECONDS)
    soft, hard = resource.prlimit(process.pid, resource.RLIMIT_NOFILE)
    assert soft == hard
    assert process.terminate(SECONDS) == 0


@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="Linux's")
@pytest.mark.parametrize(("clients", "told"), [("439", True), ("438", False)])
def test_a_node_with_few_open_files_says_at_its_start_how_many_clients_fit(
    tmp_path: Path, processes: list[Process], clients: str, told: bool
) -> None:
    low = ["sh", "-c", 'ulimit -n 1000 && exec "$@"', "sh"]
    arguments = ["--name", "n1", "--data", str(tmp_path), "--listen", "127.0.0.1:7001", "--bootstrap"]
    log = tmp_path / "n1.log"
    limit = ["--connections-max", clients]
    process = Process([*low, *STANDIN, *arguments, *limit], log, os.environ)
    processes.append(process)
    assert process.wait_for_line("ready ", SECONDS)
    assert process.terminate(SECONDS) == 0
    said = log.read_text()
    assert ("few open files" in said) is told, said
    assert ("enough for 438 clients of the 439" in said) is told


@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="Linux's")
def test_a_node_that_may_open_too_few_files_to_take_part_does_not_start(
    tmp_path: Path, processes: list[Process]
) -> None:
    """It started and refused the other nodes' connections, or its own, without a word."""
    low = ["sh", "-c", 'ulimit -n 64 && exec "$@"', "sh"]
    arguments = ["--name", "n1", "--data", str(tmp_path), "--listen", "127.0.0.1:7001", "--bootstrap"]
    process = Process([*low, *STANDIN, *arguments], tmp_path / "n1.log", os.environ)
    processes.append(process)
    assert process.wait(SECONDS) == 2
    assert "lets this process open 64 files, too few" in process.stderr_tail()
    assert len(process.stderr_tail().splitlines()) == 1


LIMITED = """
import os, resource, sys
_, which, mebibytes, *command = sys.argv
resource.setrlimit(getattr(resource, "RLIMIT_" + which), (int(mebibytes) << 20,) * 2)
os.execv(command[0], command)
"""


@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="Linux's")
@pytest.mark.parametrize(
    ("limit", "options", "said"),
    [
        ("FSIZE 20", (), "one of the log takes 67,108,864: raise the limit (ulimit -f,"),
        ("FSIZE 20", (), ", or lower --segment-bytes"),
        ("FSIZE 20", ("--segment-bytes", "20MiB"), ""),
        ("FSIZE 4", ("--segment-bytes", "1MiB"), "one of the log takes 8,388,608: raise the limit (ulimit -f,"),
        ("AS 600", (), "have 629,145,600 bytes of addresses, and a node takes up to 1,107,296,256, most of them"),
        ("AS 1056", (), ""),
        ("AS 1056", ("--cache-bytes", "1GiB"), "lift the limit (ulimit -v,"),
        ("AS 1056", ("--cache-bytes", "1GiB", "--engine", "memory"), ""),
    ],
)
def test_a_node_that_the_systems_limits_would_end_does_not_start(
    tmp_path: Path, processes: list[Process], limit: str, options: tuple[str, ...], said: str
) -> None:
    """It said that it was ready, and ended at once where it made the log's next file; or it was aborted."""
    low = [sys.executable, "-c", LIMITED, *limit.split()]
    arguments = ["--name", "n1", "--data", str(tmp_path), "--listen", "127.0.0.1:7001", "--bootstrap"]
    process = Process([*low, *STANDIN, *arguments, *options], tmp_path / "n1.log", os.environ)
    processes.append(process)
    if said:
        assert process.wait(SECONDS) == 2
        assert said in process.stderr_tail()
        assert len(process.stderr_tail().splitlines()) == 1
    else:
        assert process.wait_for_line("ready ", SECONDS), process.stderr_tail()
        assert process.terminate(SECONDS) == 0


SPEAKING = """
import structlog, sys
from shardkv.cli.node import _log_to_stderr, _print_ready
from shardkv.cli.standard_files import open_standard_files
open_standard_files()
heard = sys.stderr if sys.argv[1] == "stdout" else sys.stdout
with _log_to_stderr("info"):
    log = structlog.get_logger().bind(node="n1")
    _print_ready("n1", "127.0.0.1:7001")
    for _ in range(1_000):
        log.warning("the disk is nearly full")
if sys.stdout is not None:
    sys.stdout.flush()
print("on it goes", file=heard)
"""


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
@pytest.mark.parametrize("log", ["full", "closed", "missing"])
def test_a_node_whose_log_or_ready_line_cannot_be_written_goes_on(stream: str, log: str) -> None:
    """Of all moments when the disk is full, on which the log lies, too; or when its reader has ended. Both often go to
    the same file, and a node that is started again on a full disk has to serve what it has."""
    if log == "full":
        writer = os.open("/dev/full", os.O_WRONLY)
    else:
        reader, writer = os.pipe()
        os.close(reader)
    without = {"stdout": "1>&-", "stderr": "2>&-"}[stream] if log == "missing" else ""
    command = ["sh", "-c", f'exec "$@" {without}', "sh", sys.executable, "-c", SPEAKING, stream]
    streams: dict[str, int] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, stream: writer}
    try:
        done = subprocess.run(command, timeout=SECONDS, **streams)  # type: ignore[call-overload]
    finally:
        os.close(writer)
    heard = done.stderr if stream == "stdout" else done.stdout
    assert (done.returncode, heard.splitlines()[-1:]) == (0, [b"on it goes"])


LOGGING = """
import structlog
from shardkv.cli.node import _log_to_stderr
with _log_to_stderr("info"):
    log = structlog.get_logger().bind(node="n1")
    for number in range(20_000):
        log.warning("the disk is nearly full", number=number)
    log.error("the disk is full")
    print("on it goes", flush=True)
"""


def logging_to_a_pipe(close_seconds: float) -> "subprocess.Popen[bytes]":
    script = f"import shardkv.cli.log_output as w; w.LogOutput.close.__defaults__ = ({close_seconds},)\n{LOGGING}"
    return subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def assert_goes_on(child: "subprocess.Popen[bytes]") -> None:
    assert child.stdout is not None
    assert select.select([child.stdout], [], [], SECONDS)[0], "it waits for the reader of its log"
    assert child.stdout.readline() == b"on it goes\n"


def test_a_node_whose_log_is_held_up_goes_on_and_ends() -> None:
    """Ctrl-S in its terminal, or a pipe to a program that is stuck: to wait for that would lose its leaderships."""
    with logging_to_a_pipe(0.01) as child:
        assert_goes_on(child)
        assert child.wait(SECONDS) == 0


def test_a_log_that_was_held_up_ends_with_the_newest_lines_and_says_how_many_are_lost() -> None:
    """Why a node ended is the last thing that it said, and must be there."""
    with logging_to_a_pipe(SECONDS) as child:
        assert_goes_on(child)
        assert child.stderr is not None
        lines = child.stderr.read().decode().splitlines()
        assert child.wait(SECONDS) == 0
    assert lines[-1].endswith('level=error event="the disk is full" node=n1')
    told = [int(line.rpartition("lines_lost=")[2]) for line in lines if "lines_lost=" in line]
    assert told
    assert len(lines) - len(told) + sum(told) == 20_001


FAILING = """
import shardkv.cli.log_output as w
import shardkv.server
from shardkv import errors
w.LogOutput.close.__defaults__ = ({close_seconds},)
async def run_node(*_, **__):
    raise {error}("the log cannot be written")
shardkv.server.run_node = run_node
from shardkv.cli.root import main
main(["node", "--name", "n1", "--data", "n1", "--listen", "127.0.0.1:7001", "--bootstrap"])
"""
FAILURES = [("errors.StorageError", 1), ("errors.ConfigError", 2), ("KeyboardInterrupt", 130), ("ZeroDivisionError", 1)]


@contextlib.contextmanager
def unread() -> Iterator[int]:
    """A pipe that takes nothing: it is full, and whoever should read it is stuck."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writer, bytes(4_096))
    os.set_blocking(writer, True)
    yield writer
    os.close(reader)
    os.close(writer)


@pytest.mark.parametrize("error, code", FAILURES)
def test_a_node_that_fails_while_nobody_reads_its_log_ends_with_its_code(error: str, code: int) -> None:
    """Else it serves no more, and whoever would start it again still sees it run."""
    child = [sys.executable, "-c", FAILING.format(error=error, close_seconds=0.01)]
    with unread() as writer:
        done = subprocess.run(child, timeout=SECONDS, stderr=writer)
    assert done.returncode == code


@pytest.mark.parametrize("error, code", FAILURES)
def test_a_node_that_fails_says_why_in_one_line_and_a_bug_shows_its_traceback(error: str, code: int) -> None:
    child = [sys.executable, "-c", FAILING.format(error=error, close_seconds=SECONDS)]
    done = subprocess.run(child, timeout=SECONDS, stderr=subprocess.PIPE, text=True)
    assert done.returncode == code
    if error == "ZeroDivisionError":
        assert done.stderr.startswith("Traceback (most recent call last):\n")
        assert done.stderr.endswith("ZeroDivisionError: the log cannot be written\n")
    elif error == "KeyboardInterrupt":
        assert done.stderr == "interrupted\n"
    else:
        assert done.stderr == f"Error: the log cannot be written ({error.removeprefix('errors.')})\n"


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_node_without_standard_files_serves_and_opens_none_of_its_own_in_their_place(
    tmp_path: Path, closed: str
) -> None:
    """What a library tells on stderr must not be written into the log of Raft, if that is what got its number."""
    arguments = ["--name", "brief", "--data", str(tmp_path), "--listen", "127.0.0.1:7001", "--bootstrap"]
    subprocess.run(["sh", "-c", f'exec "$@" {closed}', "sh", *STANDIN, *arguments], timeout=SECONDS, check=True)
    assert int((tmp_path / "descriptor").read_text()) > 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_a_node_that_does_not_stop(
    tmp_path: Path, processes: list[Process], number: signal.Signals
) -> None:
    """DESIGN 2.2: a second one ends it at once."""
    process = start(tmp_path, "stubborn")
    processes.append(process)
    assert process.wait_for_line("ready ", SECONDS)
    process.signal(number)
    assert process.wait_for_line("draining", SECONDS)
    assert process.running
    process.signal(number)
    assert process.wait(SECONDS) == 128 + number


def test_a_stop_that_takes_too_long_is_cut_short(tmp_path: Path, processes: list[Process]) -> None:
    """Exit 0 within 10 s: what a slow disk keeps a node from flushing is in its log."""
    process = start(tmp_path, "late")
    processes.append(process)
    assert process.wait_for_line("ready ", SECONDS)
    assert process.terminate(SECONDS) == 0
    assert "is made up for at the next start" in (tmp_path / "late.log").read_text()


SIGNALLED = """
import ctypes, os, signal, sys, trio
from shardkv.cli import node
node.STOP_SECONDS_MAX, node.LAST_WORDS_SECONDS = {stop_seconds}, {last_words_seconds}

def stuck():
    lock = ctypes.create_string_buffer(64)
    system = ctypes.CDLL(None)  # its calls let the interpreter's lock go, and a signal does not end them
    system.pthread_mutex_init(lock, None)
    system.pthread_mutex_lock(lock)
    print("ready", flush=True)
    system.pthread_mutex_lock(lock)

async def idle():
    print("ready", flush=True)
    await trio.sleep_forever()

async def main():
    stop = trio.Event()
    with node._signals(stop):
        {body}

trio.run(main)
"""
STUCK, IDLE = "stuck()", "await idle()"


@contextlib.contextmanager
def signalled(
    body: str, stop_seconds: float, last_words_seconds: float = SECONDS, stderr: int | None = None
) -> "Iterator[subprocess.Popen[bytes]]":
    """A process that takes signals as a node does, and never stops by itself."""
    script = SIGNALLED.format(body=body, stop_seconds=stop_seconds, last_words_seconds=last_words_seconds)
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=stderr) as child:
        try:
            assert child.stdout is not None
            assert child.stdout.readline() == b"ready\n"
            yield child
        finally:
            child.kill()


def test_a_second_signal_ends_a_node_whose_loop_is_stuck_in_a_call_to_the_system() -> None:
    """As in fdatasync on a disk that hangs: the thread of the loop runs no handler then."""
    with signalled(STUCK, stop_seconds=3_600) as child:
        for _ in range(round(SECONDS / 0.1)):
            child.send_signal(signal.SIGTERM)  # two that are still on their way are one
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(0.1)
                break
        assert child.poll() == 128 + signal.SIGTERM


def test_a_stop_is_cut_short_though_the_loop_is_stuck_in_a_call_to_the_system() -> None:
    with signalled(STUCK, stop_seconds=0.2, stderr=subprocess.PIPE) as child:
        child.send_signal(signal.SIGTERM)
        assert child.wait(SECONDS) == 0
        assert child.stderr is not None
        assert b"is made up for at the next start" in child.stderr.read()


def test_a_stop_is_cut_short_though_nobody_reads_the_log() -> None:
    with unread() as writer, signalled(IDLE, 0.2, last_words_seconds=0.01, stderr=writer) as child:
        child.send_signal(signal.SIGTERM)
        assert child.wait(SECONDS) == 0


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, -signal.SIGTERM), (signal.SIGINT, 130)])
def test_a_signal_before_the_node_runs_ends_it_at_once(
    tmp_path: Path, processes: list[Process], number: signal.Signals, code: int
) -> None:
    """Nothing is begun yet that would have to be stopped."""
    os.mkfifo(tmp_path / "node.toml")
    arguments = ["--config", str(tmp_path / "node.toml"), "--parent-pipe", "{parent_pipe}"]
    processes.append(Process([*STANDIN, *arguments], tmp_path / "n1.log", os.environ))
    with open(tmp_path / "node.toml", "wb"):  # it is open when the node reads from it
        processes[0].signal(number)
        assert processes[0].wait(SECONDS) == code


def test_a_node_in_the_background_of_a_script_obeys_an_interrupt(tmp_path: Path, processes: list[Process]) -> None:
    """There SIGINT is ignored unless the program sees to it."""
    arguments = ["--name", "n1", "--data", str(tmp_path), "--listen", "127.0.0.1:7001", "--bootstrap"]
    process = Process(
        ["sh", "-c", "trap '' INT && exec \"$@\"", "sh", *STANDIN, *arguments], tmp_path / "n1.log", os.environ
    )
    processes.append(process)
    assert process.wait_for_line("ready ", SECONDS)
    process.signal(signal.SIGINT)
    assert process.wait(SECONDS) == 0


def test_a_node_whose_terminal_is_closed_stops_cleanly(tmp_path: Path, processes: list[Process]) -> None:
    """It ended as in a crash, and kept its clients waiting until others led what it had led."""
    process = start(tmp_path, "n1")
    processes.append(process)
    assert process.wait_for_line("ready ", SECONDS)
    process.signal(signal.SIGHUP)
    assert process.wait(SECONDS) == 0
    assert process.lines[-1] == "draining"


def test_a_hangup_is_no_second_signal(tmp_path: Path, processes: list[Process]) -> None:
    """The system and the shell both send one when a terminal is closed."""
    process = start(tmp_path, "stubborn")
    processes.append(process)
    assert process.wait_for_line("ready ", SECONDS)
    process.signal(signal.SIGHUP)
    assert process.wait_for_line("draining", SECONDS)
    process.signal(signal.SIGHUP)
    process.signal(signal.SIGINT)
    process.signal(signal.SIGTERM)
    assert process.wait(SECONDS) in (128 + signal.SIGINT, 128 + signal.SIGTERM)


def test_a_hangup_and_a_sigterm_together_stop_a_node_cleanly(tmp_path: Path, processes: list[Process]) -> None:
    """The end of a session sends both (SendSIGHUP= of systemd), and of two that wait the system hands out the hangup
    first."""
    process = start(tmp_path, "n1")
    processes.append(process)
    assert process.wait_for_line("ready ", SECONDS)
    for number in (signal.SIGSTOP, signal.SIGTERM, signal.SIGHUP, signal.SIGCONT):
        process.signal(number)
    assert process.wait(SECONDS) == 0
    assert process.lines[-1] == "draining"


def test_a_hangup_during_the_stop_leaves_it_clean() -> None:
    """Nobody waits for it then, so it waited for the stop's end, and ended the process as in a crash."""
    hung_up = "print('ready', flush=True); await stop.wait()"
    hung_up += "; os.kill(os.getpid(), signal.SIGHUP); assert signal.SIGHUP in signal.sigpending()"
    with signalled(hung_up, SECONDS) as child:
        child.send_signal(signal.SIGHUP)
        assert child.wait(SECONDS) == 0


def test_a_node_under_nohup_stays_when_its_terminal_is_closed(tmp_path: Path, processes: list[Process]) -> None:
    arguments = ["--name", "stubborn", "--data", str(tmp_path), "--listen", "127.0.0.1:7001", "--bootstrap"]
    process = Process(
        ["sh", "-c", "trap '' HUP && exec \"$@\"", "sh", *STANDIN, *arguments], tmp_path / "n1.log", os.environ
    )
    processes.append(process)
    assert process.wait_for_line("ready ", SECONDS)
    process.signal(signal.SIGHUP)
    process.signal(signal.SIGINT)
    assert process.wait_for_line("draining", SECONDS)
    process.signal(signal.SIGTERM)
    assert process.wait(SECONDS) == 128 + signal.SIGTERM


@pytest.mark.cluster
def test_all_threads_of_a_node_but_the_one_that_waits_for_them_block_the_signals_that_stop_it(tmp_path: Path) -> None:
    """The system gives a signal to any thread that has not blocked it; there it would end the process."""
    with LocalCluster(tmp_path, nodes=1) as world:
        world.start(SECONDS)
        blocked = []
        for thread in Path(f"/proc/{world.processes['n1'].pid}/task").iterdir():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has ended
                lines = (thread / "status").read_text().splitlines()
                blocked += [int(line.split()[1], 16) for line in lines if line.startswith("SigBlk:")]
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            assert len([mask for mask in blocked if not mask >> (number - 1) & 1]) <= 1
        assert world.terminate("n1", SECONDS) == 0


def test_a_failed_start_says_why_and_exits_with_one(tmp_path: Path, processes: list[Process]) -> None:
    process = start(tmp_path, "broken")
    processes.append(process)
    assert process.wait_for_line("ready ", SECONDS) is None
    assert process.wait(SECONDS) == 1
    assert "belongs to another cluster (DataDirectoryError)" in process.stderr_tail()


def test_a_node_ends_when_the_process_that_started_it_is_killed(tmp_path: Path) -> None:
    """DESIGN 2.2, demo: its nodes end when it dies, however it dies."""
    script = f"""
import sys
import time
from pathlib import Path
from shardkv_bench.local_cluster import LocalCluster
world = LocalCluster(Path({str(tmp_path)!r}), nodes=2, node_command={STANDIN!r})
world.start({SECONDS})
print(*(process.pid for process in world.processes.values()), flush=True)
sys.stdin.read()
"""
    with subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(pids) == 2
        watched = [os.pidfd_open(pid) for pid in pids]
        parent.kill()
    for descriptor in watched:
        assert_ends(descriptor)


def assert_ends(descriptor: int) -> None:
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    assert poll.poll(SECONDS * 1_000), "the node outlived its parent"
    os.close(descriptor)


def test_a_cluster_starts_kills_restarts_and_stops_its_own_processes_only(tmp_path: Path) -> None:
    with LocalCluster(tmp_path, nodes=3, node_command=STANDIN) as world:
        world.start(SECONDS)
        assert world.running == ["n1", "n2", "n3"]
        assert world.connect == ",".join(world.addresses.values())
        first = world.processes["n1"].pid
        world.kill("n1")
        assert world.processes["n1"].exit_code == -signal.SIGKILL
        assert world.running == ["n2", "n3"]
        world.restart("n1", SECONDS)
        assert world.processes["n1"].pid != first
        assert world.terminate("n2", SECONDS) == 0
        assert world.cpu_seconds() >= 0.0
        world.pause("n3")
        threads = Path(f"/proc/{world.processes['n3'].pid}/task").iterdir()
        assert {(thread / "stat").read_text().rpartition(")")[2][1] for thread in threads} == {"T"}
        assert world.stop(SECONDS) == {"n1": 0, "n3": 0}
        assert world.running == []
    assert "--bootstrap" in world.processes["n1"].command
    assert "--join" in world.processes["n2"].command


def test_a_node_that_fails_to_start_is_reported_with_its_log_and_the_others_are_stopped(tmp_path: Path) -> None:
    world = LocalCluster(tmp_path, nodes=3, node_command=STANDIN)
    world.names[2] = "broken"
    world.addresses["broken"] = world.addresses.pop("n3")
    with pytest.raises(NodeFailed, match="belongs to another cluster"):
        world.start(SECONDS)
    assert world.running == []


def test_free_ports_are_different_and_below_the_ports_of_outgoing_connections() -> None:
    """A peer that dials a dead node's port must not be given that very port for its own end."""
    ports = free_ports(20)
    assert len(set(ports)) == 20
    low = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    assert all(port < max(low, 32_768) for port in ports)


def test_processor_time_of_a_process_that_is_gone_is_zero() -> None:
    child = subprocess.Popen(["true"])
    child.wait()
    assert cpu_seconds(child.pid) == 0.0
    assert cpu_seconds(os.getpid()) > 0.0


def test_processor_time_is_told_more_finely_than_in_ticks() -> None:
    """Of 10 ms each: for three nodes in a round of a second that was several hundredths."""
    for _ in range(10):
        before = time.process_time()
        assert before <= cpu_seconds(os.getpid()) <= time.process_time()


def run(*arguments: str, env: dict[str, str] | None = None) -> tuple[int, str]:
    result = CliRunner().invoke(shardkv, ["node", *arguments], env=env)
    return result.exit_code, result.output


def test_a_missing_setting_is_wrong_usage() -> None:
    code, output = run()
    assert code == 2
    assert "name is missing" in output


def test_a_broken_file_is_wrong_usage_and_is_named(tmp_path: Path) -> None:
    """Work order: broken file, unknown option or key, bad address: exit 2."""
    path = tmp_path / "node.toml"
    for text, words in [("x = ", "not a TOML file"), ("colour = 1", "unknown setting colour")]:
        path.write_text(text)
        code, output = run("--config", str(path))
        assert code == 2
        assert words in output
        assert str(path) in output
    path.write_bytes(b"\xff")
    assert run("--config", str(path))[0] == 2
    assert run("--config", str(tmp_path / "absent.toml"))[0] == 2
    assert run(env={"SHARDKV_CONFIG": str(tmp_path / "absent.toml")})[0] == 2


def test_an_unknown_option_and_a_bad_address_are_wrong_usage(tmp_path: Path) -> None:
    assert run("--colour", "blue")[0] == 2
    code, output = run("--name", "n", "--data", str(tmp_path), "--listen", "somewhere")
    assert code == 2
    assert "listen must be an address: 'somewhere' has no port; write it as HOST:PORT" in output


def test_a_relative_data_directory_lies_where_the_command_was_typed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    flags = {"name": "n1", "data": "./n1", "listen": "127.0.0.1:7001", "bootstrap": True}
    assert _load(flags, None).data == str(tmp_path / "n1")


@pytest.mark.parametrize("data, found", [("~/cdata", "cdata"), ("~", ""), ("./~/cdata", "here/~/cdata")])
def test_a_data_directory_that_begins_with_a_tilde_lies_in_the_home_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: str, found: str
) -> None:
    """No shell replaces it in a TOML file, nor behind --data=; it became a directory called ~."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "node.toml").write_text(f'name = "n1"\ndata = "{data}"\nlisten = "h:1"\nbootstrap = true\n')
    assert Path(_load({}, str(tmp_path / "node.toml")).data) == tmp_path / found


def test_a_home_directory_that_nobody_has_is_wrong_usage() -> None:
    code, output = run("--name", "n1", "--data", "~nobody-at-all/d", "--listen", "h:1", "--bootstrap")
    assert code == 2
    assert "data is '~nobody-at-all/d', but no such home directory is known; give the whole path" in output


def test_a_file_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    """As editors on Windows write it; it was no TOML file then."""
    path = tmp_path / "node.toml"
    path.write_text('\ufeffname = "n1"\ndata = "/d"\nlisten = "h:1"\nbootstrap = true\n', encoding="utf-8")
    assert _load({}, str(path)).name == "n1"
