"""Real node processes on this machine: started, killed, restarted and stopped, each by its own process id.

The demo, the load generator and the cluster tests all use this one manager. It only ever signals processes that it
started itself. A node watches a pipe whose other end only this process holds, so nodes end when this process dies,
however it dies. Each node's stderr is collected in a file beside its data.

It lives with the load generator because ``shardkv.cli`` stands above ``shardkv_bench``; ``shardkv.cli.local_cluster``
shows the same names to the command line.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Final

READY_SECONDS_MAX: Final = 30.0
STOP_SECONDS_MAX: Final = 10.0
STDERR_TAIL_BYTES: Final = 4_000
NODE_COMMAND: Final = (sys.executable, "-m", "shardkv.cli", "node")
_PORT_LOW, _PORT_HIGH = 10_000, 32_000
"""Below the kernel's usual ephemeral ports (32768 on): an outgoing connection must never take a node's port while the
node is down, least of all a peer's that dials that very port and so connects to itself."""


class NodeFailed(Exception):
    """A node process ended, or did not serve in time. The message ends with the last lines of its stderr.

    ``exit_code`` is what a node of shardkv ended with; None when it still ran.
    """

    def __init__(self, message: str, exit_code: int | None = None) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def free_ports(count: int) -> list[int]:
    """``count`` different loopback TCP ports that nobody listens on now."""
    ports: list[int] = []
    candidate = _PORT_LOW + (os.getpid() * 37 + time.monotonic_ns() // 1_000) % (_PORT_HIGH - _PORT_LOW)
    for _ in range(_PORT_HIGH - _PORT_LOW):
        if len(ports) == count:
            break
        candidate = _PORT_LOW + (candidate + 1 - _PORT_LOW) % (_PORT_HIGH - _PORT_LOW)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", candidate))
            except OSError:
                continue
        ports.append(candidate)
    if len(ports) < count:
        raise OSError(f"only {len(ports)} of {count} free ports found")
    return ports


class Process:
    """One child process in its own process group, its stderr in a file, its stdout read line by line."""

    def __init__(self, command: Sequence[str], log: Path, environment: Mapping[str, str]) -> None:
        self.command = list(command)
        self.log = log
        self.lines: list[str] = []
        """What it printed on stdout so far; a node prints one line."""
        self._printed = threading.Condition()
        self._closed = False
        with log.open("ab") as stderr:
            watched, self._held = os.pipe()
            try:
                self._child = subprocess.Popen(
                    [part.replace("{parent_pipe}", str(watched)) for part in self.command],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=stderr,
                    env=dict(environment),
                    pass_fds=(watched,),
                    process_group=0,
                )
            except BaseException:
                os.close(self._held)
                raise
            finally:
                os.close(watched)
        self._reader = threading.Thread(target=self._read, name=f"stdout-{self.pid}", daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        return self._child.pid

    @property
    def running(self) -> bool:
        return self._child.poll() is None

    @property
    def exit_code(self) -> int | None:
        """None while it runs; negative for the signal that ended it."""
        return self._child.poll()

    def _read(self) -> None:
        stdout = self._child.stdout
        assert stdout is not None
        for line in stdout:
            with self._printed:
                self.lines.append(line.decode(errors="replace").rstrip("\n"))
                self._printed.notify_all()
        with self._printed:
            self._closed = True
            self._printed.notify_all()

    def wait_for_line(self, start: str, seconds: float) -> str | None:
        """The first stdout line that begins with ``start``; None when it ended or the time is over."""
        deadline = time.monotonic() + seconds
        with self._printed:
            while True:
                found = next((line for line in self.lines if line.startswith(start)), None)
                remaining = deadline - time.monotonic()
                if found is not None or self._closed or remaining <= 0:
                    return found
                self._printed.wait(remaining)

    def signal(self, number: int) -> None:
        """Send a signal, if it still runs."""
        self._child.send_signal(number)

    def wait(self, seconds: float | None = None) -> int | None:
        """Its exit code, or None when it still runs after ``seconds``."""
        try:
            code = self._child.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        self._reader.join(STOP_SECONDS_MAX)
        if self._child.stdout is not None:
            self._child.stdout.close()
        if self._held >= 0:
            os.close(self._held)
            self._held = -1
        return code

    def kill(self) -> None:
        """End it with SIGKILL, as a crash would, and wait until it is gone."""
        self.signal(signal.SIGKILL)
        self.wait()

    def terminate(self, seconds: float = STOP_SECONDS_MAX) -> int:
        """Ask it to stop cleanly; kill it when it has not within ``seconds``. Its exit code."""
        self.signal(signal.SIGTERM)
        code = self.wait(seconds)
        if code is None:
            self.kill()
            code = self.exit_code
        assert code is not None
        return code

    def cpu_seconds(self) -> float:
        """User and system time of all its threads so far; 0.0 once it is gone."""
        return cpu_seconds(self.pid)

    def stderr_tail(self) -> str:
        data = self.log.read_bytes() if self.log.exists() else b""
        return data[-STDERR_TAIL_BYTES:].decode(errors="replace")


def check_running(processes: Mapping[str, Process]) -> None:
    """Raise NodeFailed for a node that has ended."""
    for name, process in processes.items():
        code = process.exit_code
        if code is not None:
            raise NodeFailed(f"node {name} ended with {code}\n{process.stderr_tail()}", code)


def cpu_seconds(pid: int) -> float:
    """User and system time of all threads of a process so far, also of those that ended; 0.0 for one that is gone.

    From Linux's clock of the process, numbered as clock_getcpuclockid(3) does. /proc counts in ticks of 10 ms.
    """
    try:
        return time.clock_gettime(~pid << 3 | 2)
    except OSError:
        return 0.0


class LocalCluster:
    """A cluster of node processes on loopback. A context manager: leaving it stops every node.

    Args:
        directory: Holds one data directory and one log file for each node, and is kept; the caller removes it.
        nodes: How many. They are called ``n1``, ``n2``, ...; the first bootstraps, the others join it.
        base_port: Node *i* (from 1) listens on ``base_port + i - 1``; free ports are taken without it.
        options: More flags for every node, such as ``["--split-bytes", "1MiB"]``.
        variables: More environment variables for every node.
        node_command: What is ``shardkv node`` here; tests put a stand-in there.

    Not thread-safe, except that ``kill`` may be called while another thread waits for a node.
    """

    def __init__(
        self,
        directory: Path,
        *,
        nodes: int = 3,
        base_port: int | None = None,
        options: Iterable[str] = (),
        variables: Mapping[str, str] | None = None,
        node_command: Sequence[str] = NODE_COMMAND,
    ) -> None:
        assert nodes >= 1, nodes
        self.node_command = list(node_command)
        self.directory = directory
        self.options = list(options)
        self.variables = dict(variables or {})
        self.names = [f"n{number}" for number in range(1, nodes + 1)]
        ports = free_ports(nodes) if base_port is None else [base_port + index for index in range(nodes)]
        self.addresses = {name: f"127.0.0.1:{port}" for name, port in zip(self.names, ports)}
        self.processes: dict[str, Process] = {}
        """The newest process of each node that was ever started."""

    def __enter__(self) -> "LocalCluster":
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    @property
    def connect(self) -> str:
        """Every address, as ``--connect`` and ``shardkv_client.connect`` take it."""
        return ",".join(self.addresses.values())

    @property
    def running(self) -> list[str]:
        return [name for name, process in self.processes.items() if process.running]

    def start(self, seconds: float = READY_SECONDS_MAX) -> None:
        """Start every node and wait until all serve. Raises NodeFailed, after stopping all."""
        for name in self.names:
            self.start_node(name)
        try:
            self.wait_ready(self.names, seconds)
        except BaseException:
            self.stop(seconds=2.0)
            raise

    def start_node(self, name: str) -> Process:
        """Start one node that does not run, and return at once."""
        assert name not in self.running, f"{name} runs already"
        if name in self.processes:
            self.processes[name].wait(0.0)  # one that ended by itself still holds its pipes
        data = self.directory / name
        data.mkdir(parents=True, exist_ok=True)
        first = name == self.names[0]
        others = [address for other, address in self.addresses.items() if other != name]
        command = [
            *self.node_command,
            *("--name", name, "--data", str(data), "--listen", self.addresses[name]),
            *(["--bootstrap"] if first else ["--join", ",".join(others)]),
            *("--parent-pipe", "{parent_pipe}"),
            *self.options,
        ]
        inherited = {key: value for key, value in os.environ.items() if not key.startswith("SHARDKV_")}
        process = Process(command, self.directory / f"{name}.log", {**inherited, **self.variables})
        self.processes[name] = process
        return process

    def wait_ready(self, names: Iterable[str], seconds: float = READY_SECONDS_MAX) -> None:
        """Wait until each of ``names`` has printed its ``ready`` line. Raises NodeFailed."""
        deadline = time.monotonic() + seconds
        for name in names:
            process = self.processes[name]
            if process.wait_for_line("ready ", max(0.0, deadline - time.monotonic())) is None:
                # Its output ends a moment before it does.
                code = process.wait(max(1.0, deadline - time.monotonic()))
                what = f"does not serve after {seconds:g} s" if code is None else f"ended with {code}"
                raise NodeFailed(f"node {name} {what}\n{process.stderr_tail()}", code)

    def kill(self, name: str) -> None:
        """End a node with SIGKILL, as a crash would."""
        self.processes[name].kill()

    def terminate(self, name: str, seconds: float = STOP_SECONDS_MAX) -> int:
        """Stop a node cleanly, or kill it after ``seconds``. Its exit code; 0 means clean."""
        return self.processes[name].terminate(seconds)

    def restart(self, name: str, seconds: float = READY_SECONDS_MAX) -> None:
        """Start a node that has ended again on its data and address, and wait until it serves."""
        self.start_node(name)
        self.wait_ready([name], seconds)

    def pause(self, name: str) -> None:
        """Freeze a node with SIGSTOP: alive to the kernel, silent to its peers. Returns once it stands still."""
        process = self.processes[name]
        process.signal(signal.SIGSTOP)
        with contextlib.suppress(ChildProcessError):
            os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)

    def resume(self, name: str) -> None:
        self.processes[name].signal(signal.SIGCONT)

    def stop(self, seconds: float = STOP_SECONDS_MAX) -> dict[str, int]:
        """Stop every running node cleanly, all at once, and kill what remains after ``seconds``. The exit codes."""
        running = {name: self.processes[name] for name in self.running}
        for process in running.values():
            with contextlib.suppress(ProcessLookupError):
                process.signal(signal.SIGCONT)
                process.signal(signal.SIGTERM)
        deadline = time.monotonic() + seconds
        codes: dict[str, int] = {}
        for name, process in running.items():
            code = process.wait(max(0.0, deadline - time.monotonic()))
            if code is None:
                process.kill()
                code = process.exit_code
            assert code is not None
            codes[name] = code
        for process in self.processes.values():
            process.wait(0.0)  # those that ended by themselves still hold their pipes
        return codes

    def cpu_seconds(self) -> float:
        """User and system time of all running nodes so far, summed."""
        return sum(process.cpu_seconds() for process in self.processes.values() if process.running)
