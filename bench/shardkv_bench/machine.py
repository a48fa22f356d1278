"""What the measurements were made on: processor, cores, kernel, Python, and what an fsync costs there."""

import os
import platform
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path

from shardkv_bench.etcd import EtcdMissing, find_etcd
from shardkv_bench.trials import fsync_seconds


@dataclass(frozen=True, slots=True)
class Machine:
    processor: str
    cores: int
    kernel: str
    python: str
    fsync_ms_median: float
    fsync_ms_p99: float
    etcd: str

    def to_json(self) -> dict[str, object]:
        return asdict(self)


def describe(directory: Path) -> Machine:
    """This machine, with the fsync measured in ``directory``."""
    median, p99 = fsync_seconds(directory)
    return Machine(
        processor=processor_of(Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""),
        cores=len(os.sched_getaffinity(0)),
        kernel=f"{platform.system()} {platform.release()}",
        python=f"{platform.python_implementation()} {platform.python_version()}",
        fsync_ms_median=round(median * 1000, 3),
        fsync_ms_p99=round(p99 * 1000, 3),
        etcd=etcd_version(),
    )


def processor_of(cpuinfo: str) -> str:
    """The processor's name in the text of /proc/cpuinfo."""
    for line in cpuinfo.splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    return platform.processor() or platform.machine()


def etcd_version() -> str:
    try:
        answer = subprocess.run([find_etcd(), "--version"], capture_output=True, text=True, timeout=10, check=False)
    except EtcdMissing:
        return "not installed"
    first = answer.stdout.splitlines()[:1]
    return first[0].removeprefix("etcd Version: ") if first else "unknown"
