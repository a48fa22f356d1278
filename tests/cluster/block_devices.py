"""A block device of its own for each node, which can be made slow or broken while the node runs.

Lives here: a loop device with a file system for each name, mounted in a mount namespace of our own; a limit on how many
writes a second a process gets from it; and taking its blocks away, so that the kernel itself fails the node's syncs.
Nothing is mounted in the namespace that this process lives in: a holder process of ours keeps the mounts, and when it
ends the kernel takes them and the loop devices with it. The one thing with a name outside is the control group of a
slow device, which goes when that ends. Needs Linux, root, the tools below, and the block controller of cgroup 1;
:func:`obstacle` says what is missing.
"""

import fcntl
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final

_TOOLS: Final = ("unshare", "nsenter", "mount", "umount", "losetup", "mkfs.ext4")
_DEVICE_BYTES: Final = 256 << 20
_BROKEN_BYTES: Final = 1 << 20
"""What is left of a device without its blocks."""
_LOOP_SET_STATUS64: Final = 0x4C04
_LOOP_GET_STATUS64: Final = 0x4C05
_STATUS_BYTES: Final = 232
_SIZE_LIMIT: Final = struct.Struct("=Q")
_SIZE_LIMIT_OFFSET: Final = 32
"""In the kernel's ``struct loop_info64``: the device ends so many bytes from its start; 0 means with its file."""


def _throttle() -> Path | None:
    """Where the block controller of cgroup 1 is mounted."""
    for line in Path("/proc/mounts").read_text().splitlines():
        _, where, kind, options, *_ = line.split()
        if kind == "cgroup" and "blkio" in options.split(","):
            return Path(where)
    return None


def _group_of(pid: int) -> str:
    """Which of the block controller's groups a process is in, relative to the root group."""
    for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if "blkio" in controllers.split(","):
            return path.lstrip("/")
    return ""


def obstacle(directory: Path) -> str | None:
    """Why there can be no such devices in ``directory``; None when there can."""
    if not sys.platform.startswith("linux"):
        return "loop devices are Linux's"
    missing = [tool for tool in _TOOLS if shutil.which(tool) is None]
    if missing:
        return f"{' and '.join(missing)} missing"
    if os.geteuid() != 0:
        return "mounting a loop device needs root"
    root = _throttle()
    if root is None or not (root / "blkio.throttle.write_iops_device").exists():
        return "no block controller of cgroup 1, which slows a device down"
    try:
        with block_devices(directory, ["tried"]) as devices, devices["tried"].slow(os.getpid()) as limit:
            limit(1000)
            return None
    except (OSError, subprocess.CalledProcessError) as error:
        return f"this machine refuses: {getattr(error, 'stderr', None) or error}"


class BlockDevice:
    """One device, mounted at ``path`` where ``enter`` leads: the beginning of a command that runs there."""

    def __init__(self, path: Path, enter: list[str]) -> None:
        self.path = path
        self.enter = enter
        self._image = path.with_name(f"{path.name}.image")
        with self._image.open("wb") as image:
            image.truncate(_DEVICE_BYTES)
        self._run("mkfs.ext4", "-q", str(self._image))
        path.mkdir()
        self._mount()

    def _run(self, *command: str) -> str:
        return subprocess.run([*self.enter, *command], check=True, capture_output=True, text=True).stdout

    def _mount(self) -> None:
        # The device of this kind of mount is freed with the mount.
        self._run("mount", "-o", "loop", str(self._image), str(self.path))
        found = self._run("losetup", "--noheadings", "--output", "NAME", "--associated", str(self._image)).split()
        assert len(found) == 1, f"{self._image} is {found}"
        self._device = Path(found[0])

    @contextmanager
    def slow(self, pid: int) -> Iterator[Callable[[int], None]]:
        """Meanwhile process ``pid`` may write to it only so many times a second as it is called with; 0 is no limit."""
        root = _throttle()
        assert root is not None
        number = self._device.stat().st_rdev
        group = root / f"shardkv-{os.getpid()}-{self.path.name}"
        group.mkdir()
        try:
            file = group / "blkio.throttle.write_iops_device"

            def limit(writes_a_second: int) -> None:
                file.write_text(f"{os.major(number)}:{os.minor(number)} {writes_a_second}")

            home = root / _group_of(pid) / "cgroup.procs"
            (group / "cgroup.procs").write_text(str(pid))
            try:
                yield limit
            finally:
                limit(0)
                for inside in (group / "cgroup.procs").read_text().split():
                    home.write_text(inside)
        finally:
            group.rmdir()

    def break_down(self) -> None:
        """Take its blocks away: reads of what is not cached, writes and syncs fail."""
        descriptor = os.open(self._device, os.O_RDWR)
        try:
            status = bytearray(_STATUS_BYTES)
            fcntl.ioctl(descriptor, _LOOP_GET_STATUS64, status)
            _SIZE_LIMIT.pack_into(status, _SIZE_LIMIT_OFFSET, _BROKEN_BYTES)
            fcntl.ioctl(descriptor, _LOOP_SET_STATUS64, status)
        finally:
            os.close(descriptor)

    def repair(self) -> None:
        """Give the blocks back, with what was on them, and nothing of what the system only had in memory.

        No process may use it.
        """
        self._run("umount", str(self.path))
        self._mount()


@contextmanager
def block_devices(directory: Path, names: Iterable[str]) -> Iterator[dict[str, BlockDevice]]:
    """A device for each name, at ``directory / name``. End the processes that use them first."""
    with ExitStack() as stack:
        holder = stack.enter_context(
            subprocess.Popen(
                ["unshare", "--mount", "sh", "-c", "echo up && exec cat"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        )
        assert holder.stdout is not None
        if holder.stdout.readline() != "up\n":
            raise OSError("no mount namespace")
        enter = ["nsenter", "--target", str(holder.pid), "--mount"]
        yield {name: BlockDevice(directory / name, enter) for name in names}
