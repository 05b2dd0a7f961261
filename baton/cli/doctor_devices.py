"""Memory and devices of this machine beside what settings ask of them.

Paths are given, so that tests can show machines other than this one.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from baton.cli.doctor_types import Check, Severity

ERROR, WARNING, NOTE = Severity.ERROR, Severity.WARNING, Severity.NOTE
SHM = Path("/dev/shm")
INFINIBAND = Path("/sys/class/infiniband")
MEMORY_LIMITS = (
    Path("/sys/fs/cgroup/memory.max"),
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
)
MEMINFO = Path("/proc/meminfo")
RANK_SHM_BYTES = 64 << 20
"""Of one rank: buffers of NCCL between processes, and queues of the rank's engine."""
RUNTIME_SHM_BYTES = 64 << 20
"""What a container gets where nobody asks for more."""


def check_shm(path: Path, num_ranks: int) -> Check:
    """`num_ranks`: of the largest worker here. KV pools lie in memory files without a name and need
    none of it."""
    name = "shared memory"
    try:
        status = os.statvfs(path)
    except OSError as error:
        fix = "mount a memory file system there (--shm-size, fabric.sharedMemory.sizeLimit)"
        return Check(name, f"{path}: {error.strerror}", ERROR, fix)
    size = status.f_blocks * status.f_frsize
    found = f"{path} has {size / 2**20:.0f} MiB"
    if not os.access(path, os.W_OK):
        fix = "mount it writable for the user of the processes"
        return Check(name, f"{found} and cannot be written", ERROR, fix)
    needed = num_ranks * RANK_SHM_BYTES if num_ranks > 1 else 0
    if size < needed:
        problem = f"{found}, and {num_ranks} ranks need {needed / 2**20:.0f} MiB"
        fix = "raise --shm-size of the container, or fabric.sharedMemory.sizeLimit of the chart"
        return Check(name, problem, ERROR, fix)
    if size <= RUNTIME_SHM_BYTES:
        fix = "give more where Ray runs in the container: its object store lies there"
        return Check(name, f"{found}, what container runtimes give unasked", NOTE, fix)
    return Check(name, found)


def check_nics(infiniband: Path) -> Iterator[Check]:
    """RDMA devices and whether their ports are up."""
    name = "NIC"
    devices = sorted(infiniband.iterdir()) if infiniband.is_dir() else []
    if not devices:
        yield Check(name, "no RDMA device: KV passes between hosts over TCP")
        return
    for device in devices:
        states = [
            f"port {port.name} {_word(port / 'state')}" for port in sorted(device.glob("ports/*"))
        ]
        found = f"{device.name}: {', '.join(states) or 'no port'}"
        if any(state.endswith("ACTIVE") for state in states):
            yield Check(name, found)
        else:
            fix = "check cable and subnet manager, or leave it out of UCX_NET_DEVICES"
            yield Check(name, found, WARNING, fix)


def _word(file: Path) -> str:
    """`ACTIVE` of a file that holds `4: ACTIVE`."""
    try:
        return file.read_text().strip().rpartition(" ")[2] or "unknown"
    except OSError:
        return "unknown"


def check_visible_gpus(visible: Sequence[str], demands: Sequence[tuple[str, int]]) -> Check:
    """`demands`: pool and GPUs of one of its workers."""
    name = "GPUs"
    for pool, demand in demands:
        if demand > len(visible):
            return Check(
                name,
                f"a {pool} worker needs {demand}, and {len(visible)} are visible",
                ERROR,
                "lower engine.tp_size, take engine.device cpu, or give the container more GPUs "
                "(device plugin, CUDA_VISIBLE_DEVICES)",
            )
    if not any(demand for _, demand in demands):
        return Check(name, f"{len(visible)} visible, none asked for")
    asked = ", ".join(f"{demand} for each {pool} worker" for pool, demand in demands)
    return Check(name, f"{len(visible)} visible, {asked}")


def memory_limit_bytes(
    limits: Sequence[Path] = MEMORY_LIMITS, meminfo: Path = MEMINFO
) -> int | None:
    """What the processes here may use: the container's limit or the machine's memory."""
    found = []
    for path in limits:
        try:
            text = path.read_text().strip()
        except OSError:
            continue
        if text.isdigit():
            found.append(int(text))
    try:
        lines = meminfo.read_text().splitlines()
    except OSError:
        lines = []
    found += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemTotal:")]
    return min(found, default=None)


def check_memory(limit_bytes: int | None, demands: Sequence[tuple[str, int]]) -> Check:
    """`demands`: what, and bytes of host memory that one worker holds for it."""
    name = "memory"
    if limit_bytes is None:
        return Check(name, "not told by this machine, not judged")
    for what, demand in demands:
        if demand >= limit_bytes:
            return Check(
                name,
                f"{what} is {demand / 1e9:.1f} GB, and {limit_bytes / 1e9:.1f} GB are there in all",
                ERROR,
                "lower the setting, or raise the container's memory limit",
            )
    return Check(name, f"{limit_bytes / 1e9:.1f} GB")
