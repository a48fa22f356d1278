"""A real node on a real file system without room: it refuses writes, serves reads, lives, and recovers by itself.

The file system is a tmpfs of a few MiB in a mount namespace of the test's own, which a holder process keeps; the node
runs inside, the test reaches it through ``/proc``. Where the machine allows no such namespace the tests are skipped.
"""

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from shardkv.errors import OutcomeUnknown, OutOfSpace, ShardKVError, Unavailable
from shardkv_bench.local_cluster import NODE_COMMAND
from shardkv_client import Client
from tests.cluster.harness import SECONDS_MAX, LocalCluster, client, eventually, kill, restart, settled

pytestmark = pytest.mark.cluster

DISK_MIB = 384
VALUE = os.urandom(100_000)
OPTIONS = ("--segment-bytes", "4MiB", "--free-bytes-min", "128MiB", "--cache-bytes", "4MiB")


class SmallDisk:
    """A tmpfs that processes started by :meth:`run` see at ``path``."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.path.mkdir()
        # Without being root, a user namespace gives the right to mount.
        self._user = [] if os.geteuid() == 0 else ["--map-root-user"]
        script = 'mount -t tmpfs -o size="$2"m none "$1" && echo mounted && exec cat'
        self._holder = subprocess.Popen(
            ["unshare", *self._user, "--mount", "sh", "-c", script, "sh", str(path), str(DISK_MIB)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self._holder.stdout is not None
        self.mounted = self._holder.stdout.readline() == "mounted\n"
        self.outside = Path(f"/proc/{self._holder.pid}/root{path}")
        """The same directory, as the test sees it."""

    def command(self, *command: str) -> list[str]:
        user = ["--user", "--preserve-credentials"] if self._user else []
        return ["nsenter", "--target", str(self._holder.pid), *user, "--mount", *command]

    def fill(self) -> None:
        """Take every byte that is left."""
        with (self.outside / "filler").open("ab", buffering=0) as file:
            for size in (1 << 20, 4096):
                try:
                    while True:
                        file.write(bytes(size))
                except OSError:
                    continue

    def make_room(self) -> None:
        (self.outside / "filler").unlink(missing_ok=True)

    def enlarge(self) -> None:
        size = f"remount,size={2 * DISK_MIB}m"
        # Without a source, libmount adds the options in force, some of which only root may set.
        subprocess.run(self.command("mount", "-o", size, "none", str(self.path)), check=True)

    @property
    def free_bytes(self) -> int:
        statistics = os.statvfs(self.outside)
        return statistics.f_bavail * statistics.f_frsize

    def close(self) -> str:
        assert self._holder.stdin is not None
        self._holder.stdin.close()
        self._holder.wait()
        assert self._holder.stdout is not None
        assert self._holder.stderr is not None
        self._holder.stdout.close()
        with self._holder.stderr as stderr:
            return stderr.read()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    if not shutil.which("unshare") or not shutil.which("nsenter"):
        pytest.skip("needs unshare and nsenter")
    small = SmallDisk(tmp_path / "disk")
    if not small.mounted:
        pytest.skip(f"this machine mounts no tmpfs for us: {small.close()}")
    yield small
    small.close()


@pytest.fixture(params=[1, 3], ids=["one node", "three nodes on one disk"])
def world(disk: SmallDisk, request: pytest.FixtureRequest) -> Iterator[LocalCluster]:
    """Nodes whose data lie on the small disk; their logs do not."""
    cluster = LocalCluster(disk.path, nodes=request.param, options=OPTIONS)
    cluster.node_command = disk.command(*NODE_COMMAND)
    with cluster:
        cluster.start(SECONDS_MAX)
        yield cluster


async def write_until_refused(kv: Client, acknowledged: set[bytes]) -> OutOfSpace:
    for number in range(len(acknowledged), 10_000):
        key = b"k%05d" % number
        try:
            await kv.put(key, VALUE, timeout=20)
        except OutOfSpace as error:
            return error
        except (OutcomeUnknown, Unavailable):
            continue  # its range was being split when the node began to refuse: the first attempt may count
        acknowledged.add(key)
    raise AssertionError("ten thousand values went into a small disk")


async def all_there(kv: Client, keys: set[bytes]) -> None:
    for key in sorted(keys):
        entry = await kv.get(key)
        assert entry is not None, key
        assert entry.value == VALUE, key


async def taken(kv: Client) -> bool:
    try:
        await kv.put(b"after", b"v", timeout=5)
    except OutOfSpace:
        return False
    return True


async def test_a_disk_that_fills_up_stops_writes_and_nothing_else(world: LocalCluster, disk: SmallDisk) -> None:
    """DESIGN 4.11. First by the node's own data, then to the last byte by somebody else."""
    acknowledged: set[bytes] = set()
    async with client(world) as kv:
        await settled(kv, len(world.names))
        error = await write_until_refused(kv, acknowledged)
        assert "free space or enlarge the disk" in str(error)
        assert disk.free_bytes > 0
        await eventually("a node says that its disk is nearly full", lambda: says_so(world))
        await all_there(kv, acknowledged)
        gone = acknowledged.pop()
        await eventually("a delete is taken", lambda: deleted(kv, gone))

        async def full() -> bool:
            """What a compaction makes of its tables is there before these are removed."""
            disk.fill()
            return disk.free_bytes == 0

        await eventually("not a byte is left", full)
        # Until the node has looked, it may take what still fits into what it has.
        await eventually("writes are refused", lambda: refused(kv, b"more"))
        for _ in range(20):
            with pytest.raises(OutOfSpace):
                await kv.put(b"more", VALUE)
        await all_there(kv, acknowledged)
        assert world.running == list(world.names)
        disk.make_room()
        disk.enlarge()
        await eventually("writes are taken again", lambda: taken(kv))
        await all_there(kv, acknowledged)


async def says_so(world: LocalCluster) -> bool:
    logs = [process.log.read_text() for process in world.processes.values()]
    return any("the disk is nearly full" in log for log in logs)


async def deleted(kv: Client, key: bytes) -> bool:
    """It is refused while a compaction takes what room there is left."""
    try:
        return await kv.delete(key, timeout=20)
    except OutOfSpace:
        return False


async def refused(kv: Client, key: bytes) -> bool:
    try:
        await kv.put(key, VALUE, timeout=20)
    except OutOfSpace:
        return True
    return False


async def test_a_disk_that_is_full_at_once_costs_no_node_and_nothing_acknowledged(
    world: LocalCluster, disk: SmallDisk
) -> None:
    """Under load, from one moment to the next. What was under way may be in doubt; it is never half there."""
    acknowledged: set[bytes] = set()
    async with client(world) as kv:
        await settled(kv, len(world.names))

        async def write(start: int) -> None:
            for number in range(start, start + 1000):
                key = b"k%05d" % number
                try:
                    await kv.put(key, VALUE, timeout=20)
                except ShardKVError:
                    return
                acknowledged.add(key)
                if len(acknowledged) == 60:
                    disk.fill()

        with trio.fail_after(SECONDS_MAX):
            async with trio.open_nursery() as nursery:
                for start in range(0, 8000, 1000):
                    nursery.start_soon(write, start)
        assert len(acknowledged) >= 60
        assert world.running == list(world.names)
        await all_there(kv, acknowledged)
        disk.make_room()
        await eventually("writes are taken again", lambda: taken(kv))
        for name in world.names:
            await kill(world, name)
        await restart(world, *world.names)
        await all_there(kv, acknowledged)
        await eventually("writes are taken", lambda: taken(kv))
