"""A machine's worth of network for each node and client, made of network namespaces, and links that can be cut.

Lives here: a hub namespace with a bridge, one namespace for each place, and the cutting of single directions. Nothing
is made in the namespace that this process lives in, and nothing has a name outside: every namespace lives in a process
of ours that ends when this process does, however it does, and the kernel takes namespaces, links and rules with it.
Needs Linux, root, ``unshare``, ``nsenter`` and ``ip``; :func:`obstacle` says what is missing.

One direction is cut where packets come in, by a rule on their source before any other: they arrive, and nobody hears.
"""

import ctypes
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from shardkv_bench.local_cluster import LocalCluster, Process
from shardkv_client.environment import RealEnvironment, SocketStream, Stream, _connect

_CLONE_NEWNET: Final = 0x40000000
_PORT: Final = 7000
_HOLDER: Final = "import sys; sys.stdin.read()"
"""What a namespace's own process does: it waits for the end of this one."""


def obstacle() -> str | None:
    """Why there can be no namespaces here; None when there can."""
    if not sys.platform.startswith("linux"):
        return "network namespaces are Linux's"
    missing = [tool for tool in ("unshare", "nsenter", "ip") if shutil.which(tool) is None]
    if missing:
        return f"{' and '.join(missing)} missing"
    if os.geteuid() != 0:
        return "making network namespaces needs root"
    script = " && ".join(
        (
            "ip link add one type veth peer name two",
            "ip link add bridge type bridge",
            "ip rule add pref 5 from 10.0.0.1 blackhole",
        )
    )
    tried = subprocess.run(["unshare", "--net", "--", "sh", "-c", script], capture_output=True, text=True, check=False)
    return None if tried.returncode == 0 else f"this machine refuses: {tried.stderr.strip() or tried.returncode}"


class Place:
    """One namespace: a process that holds it, and an address on the bridge."""

    def __init__(self, name: str, number: int) -> None:
        self.name = name
        self.address = f"10.77.0.{number}"
        self.hardware = f"02:77:00:00:00:{number:02x}"
        self._holder = subprocess.Popen(
            ["unshare", "--net", "--", sys.executable, "-S", "-c", _HOLDER], stdin=subprocess.PIPE
        )
        self.path = f"/proc/{self._holder.pid}/ns/net"
        own = os.readlink("/proc/self/ns/net")
        while os.readlink(self.path) == own:  # until unshare has done its work
            assert self._holder.poll() is None, f"the holder of {name} ended with {self._holder.returncode}"

    @property
    def pid(self) -> int:
        return self._holder.pid

    def run(self, *commands: str) -> None:
        """Run ``ip`` inside, once for each line of arguments. Raises CalledProcessError."""
        subprocess.run(
            ["nsenter", f"--net={self.path}", "ip", "-batch", "-"],
            input="\n".join(commands),
            text=True,
            check=True,
            capture_output=True,
        )

    def set(self, key: str, value: str) -> None:
        """A sysctl of this namespace."""
        command = ["nsenter", f"--net={self.path}", "sh", "-c", f"echo {value} > /proc/sys/net/{key}"]
        subprocess.run(command, check=True, capture_output=True)

    def socket(self) -> socket.socket:
        """A TCP socket that lives here, whatever namespace this process lives in."""
        with open("/proc/thread-self/ns/net") as own, open(self.path) as inside:
            _setns(inside.fileno())
            try:
                return socket.socket(socket.AF_INET, socket.SOCK_STREAM)
            finally:
                _setns(own.fileno())

    def close(self) -> None:
        assert self._holder.stdin is not None, "a holder has a pipe"
        self._holder.stdin.close()
        self._holder.wait()


def _setns(descriptor: int) -> None:
    library = ctypes.CDLL(None, use_errno=True)
    if library.setns(descriptor, _CLONE_NEWNET) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


class Net:
    """The places and what is cut between them."""

    def __init__(self, names: Iterable[str]) -> None:
        self.places: dict[str, Place] = {}
        self._cut: set[tuple[str, str]] = set()
        self._refused: set[tuple[str, str]] = set()
        self._hub = Place("hub", 254)
        try:
            for number, name in enumerate(names, 1):
                self.places[name] = Place(name, number)
            self._link()
        except BaseException:
            self.close()
            raise

    def _link(self) -> None:
        self._hub.run("link add bridge type bridge", "link set bridge up")
        for number, place in enumerate(self.places.values()):
            self._hub.run(
                f"link add port{number} type veth peer name eth0 address {place.hardware} netns {place.pid}",
                f"link set port{number} master bridge",
                f"link set port{number} up",
            )
            # Cuts come first; the kernel must then look at every packet, also one of a connection that it knows.
            place.set("ipv4/ip_early_demux", "0")
            place.run(
                "link set lo up",
                f"addr add {place.address}/24 dev eth0",
                "link set eth0 up",
                "rule add pref 10 lookup local",
                "rule del pref 0",
                # Who is where is no part of what is cut.
                *(
                    f"neigh replace {other.address} lladdr {other.hardware} dev eth0 nud permanent"
                    for other in self.places.values()
                    if other is not place
                ),
            )

    def cut(self, source: str, target: str) -> None:
        """Nothing that ``source`` sends is heard by ``target`` any more."""
        if (source, target) not in self._cut:
            self._cut.add((source, target))
            self.places[target].run(f"rule add pref 5 from {self.places[source].address} blackhole")

    def refuse(self, source: str, target: str) -> None:
        """``source`` is told at once that there is no way to ``target``, where a cut would leave it waiting."""
        if (source, target) not in self._refused:
            self._refused.add((source, target))
            self.places[source].run(f"rule add pref 6 to {self.places[target].address} unreachable")

    def isolate(self, inside: Iterable[str]) -> None:
        """Cut these places off from all others, both ways; not from each other."""
        inside = set(inside)
        for one in sorted(inside):
            for other in sorted(self.places.keys() - inside):
                self.cut(one, other)
                self.cut(other, one)

    def unplug(self, name: str) -> None:
        """Take a place's cable out, until :meth:`heal`."""
        self._hub.run(f"link set port{list(self.places).index(name)} down")

    def heal(self) -> None:
        for source, target in sorted(self._cut):
            self.places[target].run(f"rule del pref 5 from {self.places[source].address} blackhole")
        self._cut.clear()
        for source, target in sorted(self._refused):
            self.places[source].run(f"rule del pref 6 to {self.places[target].address} unreachable")
        self._refused.clear()
        for number in range(len(self.places)):
            self._hub.run(f"link set port{number} up")

    def close(self) -> None:
        for place in (*self.places.values(), self._hub):
            place.close()


@contextmanager
def net(*names: str) -> Iterator[Net]:
    made = Net(names)
    try:
        yield made
    finally:
        made.close()


class NamespacedCluster(LocalCluster):
    """A cluster whose nodes each live in the place of their name."""

    def __init__(self, directory: Path, net: Net, *, nodes: int = 3, options: Iterable[str] = ()) -> None:
        super().__init__(directory, nodes=nodes, options=options)
        self._net = net
        self._command = self.node_command
        self.addresses = {name: f"{net.places[name].address}:{_PORT}" for name in self.names}

    def start_node(self, name: str) -> Process:
        self.node_command = ["nsenter", f"--net={self._net.places[name].path}", *self._command]
        return super().start_node(name)


class InPlace(RealEnvironment):
    """The environment of a client that lives in a place."""

    def __init__(self, place: Place) -> None:
        super().__init__()
        self._place = place

    async def dial(self, address: str) -> Stream:
        host, _, port = address.rpartition(":")
        return SocketStream(await _connect(self._place.socket(), (host, int(port))))
