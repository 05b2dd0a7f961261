"""What this machine offers to KV transports, looked at before any worker is asked.

Each check tries the thing itself where that is harmless (memfd, pidfd, process_vm_readv on this
process, one small file on the disk tier), and reads /proc otherwise. Variables and limits are
those of the workers where their processes are known, since they were started elsewhere.

`doctor_limits` has the judgements that are pure.
"""

from __future__ import annotations

import ctypes
import fcntl
import importlib.metadata
import mmap
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from baton.cli.doctor_devices import INFINIBAND, SHM, check_nics, check_shm
from baton.cli.doctor_limits import judge_limits, judge_ucx, parse_limits
from baton.cli.doctor_types import Check, Severity
from kvtransfer.select import nixl_obstacle
from kvtransfer.tiers.config import TierConfig

ERROR, WARNING, NOTE = Severity.ERROR, Severity.WARNING, Severity.NOTE
PTRACE_SCOPE = Path("/proc/sys/kernel/yama/ptrace_scope")
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")
NETWORK = Path("/sys/class/net")
PROBE_BYTES = 1 << 20
MEMORY_FILE_SYSTEMS = frozenset({"tmpfs", "ramfs"})
NETWORK_FILE_SYSTEMS = frozenset({"nfs", "nfs4", "cifs", "smb3", "ceph", "9p", "fuse.sshfs"})


def check_machine(
    environ: Mapping[str, str], pids: Mapping[str, int], tiers: TierConfig, *, num_ranks: int = 1
) -> list[Check]:
    """`pids`: workers of this machine by name; `num_ranks`: processes of the largest of them."""
    return [
        check_nixl(),
        check_ptrace(),
        check_shared_memory(),
        check_process_handles(),
        *check_ucx(environ, pids),
        *check_limits(pids),
        check_gpu(Path("/dev")),
        check_disk_tier(tiers),
        check_shm(SHM, num_ranks),
        *check_nics(INFINIBAND),
        Check("huge pages", _huge_pages()),
    ]


def check_nixl() -> Check:
    obstacle = nixl_obstacle()
    if not obstacle:
        return Check("NIXL", f"usable, {_nixl_version()}")
    if "not installed" in obstacle:
        fix = "`pip install nixl-cu13`; without it blocks move by the other transports"
    else:
        fix = "run where seccomp allows process_vm_readv, in containers with SYS_PTRACE"
    return Check("NIXL", obstacle, NOTE, fix)


def check_ptrace() -> Check:
    """Yama decides who may read the memory of a process that allows it."""
    try:
        scope = int(PTRACE_SCOPE.read_text())
    except (OSError, ValueError):
        return Check("process_vm_readv", "allowed among processes of one user (no Yama)")
    if scope < 2:
        return Check("process_vm_readv", f"allowed among workers (ptrace_scope {scope})")
    return Check(
        "process_vm_readv",
        f"kernel.yama.ptrace_scope is {scope}: reads take the capability SYS_PTRACE",
        NOTE,
        "NIXL on host memory works by it, shared memory goes without; `sysctl "
        "kernel.yama.ptrace_scope=1`, or give workers SYS_PTRACE",
    )


def check_shared_memory() -> Check:
    """As a pool is made: a memory file of fixed size, opened anew by its path and mapped."""
    name = "memory files"
    try:
        fd = os.memfd_create("baton-doctor", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(fd, mmap.PAGESIZE)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
            again = os.open(f"/proc/{os.getpid()}/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
            try:
                mmap.mmap(again, mmap.PAGESIZE, prot=mmap.PROT_READ).close()
            finally:
                os.close(again)
        finally:
            os.close(fd)
    except OSError as error:
        return Check(
            name,
            f"cannot be made or opened ({error.strerror})",
            ERROR,
            "workers put their pools there: allow memfd_create and mount /proc",
        )
    return Check(name, "work")


def check_process_handles() -> Check:
    """Links on one host watch their peer's process by one."""
    try:
        os.close(os.pidfd_open(os.getpid()))
    except OSError as error:
        return Check(
            "pidfd",
            f"not available ({error.strerror})",
            ERROR,
            "Linux 5.3 or newer is needed, and a seccomp profile that allows pidfd_open",
        )
    return Check("pidfd", "works")


def check_ucx(environ: Mapping[str, str], pids: Mapping[str, int]) -> Iterator[Check]:
    """Of each worker, or of this shell where none is known."""
    devices = {path.name for folder in (NETWORK, INFINIBAND) for path in _listed(folder)}
    of = {name: _environment(pid) for name, pid in pids.items()} or {"this shell": dict(environ)}
    has_gpu = bool(_gpus(Path("/dev")))
    is_bad = False
    for name, variables in of.items():
        for check in judge_ucx(variables, devices, has_gpu=has_gpu):
            is_bad = True
            yield Check(f"UCX of {name}", check.found, check.severity, check.fix)
    if not is_bad:
        yield Check("UCX variables", f"none that hurts, of {', '.join(of)}")


def check_limits(pids: Mapping[str, int]) -> Iterator[Check]:
    has_rdma = any(_listed(INFINIBAND))
    is_bad = False
    num_files = []
    for name, pid in (pids or {"this shell": os.getpid()}).items():
        try:
            limits = parse_limits(Path(f"/proc/{pid}/limits").read_text())
            num_open = len(os.listdir(f"/proc/{pid}/fd"))
        except OSError:
            continue
        num_files.append(limits.get("Max open files"))
        for check in judge_limits(limits, num_open, has_rdma=has_rdma):
            is_bad = True
            yield Check(f"limits of {name}", check.found, check.severity, check.fix)
    if not is_bad:
        least = min((limit for limit in num_files if limit is not None), default=None)
        files = "unlimited" if least is None else str(least)
        memory = "" if has_rdma else "; locked memory is not needed without RDMA"
        yield Check("limits", f"{files} open files{memory}")


def check_gpu(devices: Path) -> Check:
    gpus = _gpus(devices)
    if not gpus:
        return Check("GPU", "none here: pools lie in host memory")
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return Check(
            "GPU",
            f"{len(gpus)} devices and no libcuda.so.1",
            ERROR,
            "install the driver, or give the container its libraries",
        )
    return Check("GPU", f"{len(gpus)}, driver found")


def check_disk_tier(tiers: TierConfig) -> Check:
    """Writes one file of 1 MiB and removes it."""
    name, path = "disk tier", tiers.disk_path
    if path is None or not tiers.disk_bytes:
        return Check(name, "not configured")
    if not path.is_dir():
        fix = "workers make it if they may; check the path in tiers.disk_path"
        return Check(name, f"{path} is no directory", ERROR, fix)
    try:
        rate = _write_rate(path)
        free_bytes = shutil.disk_usage(path).free
    except OSError as error:
        fix = "make it writable for the workers' user, or free space"
        return Check(name, f"{path} cannot be written: {error.strerror}", ERROR, fix)
    kind = file_system_of(path, Path("/proc/self/mounts"))
    found = (
        f"{path} ({kind or 'unknown file system'}): {free_bytes / 1e9:.1f} GB free, each worker "
        f"takes up to {tiers.disk_bytes / 1e9:.1f} GB, 1 MiB written at {rate / 1e6:.0f} MB/s"
    )
    if free_bytes < PROBE_BYTES:
        return Check(name, found, ERROR, "free space, or lower tiers.disk_bytes")
    if kind in MEMORY_FILE_SYSTEMS:
        return Check(name, found, WARNING, "this is memory, not a disk; raise tiers.host_bytes")
    if kind in NETWORK_FILE_SYSTEMS:
        return Check(name, found, WARNING, "take a local drive: a restore must beat computing")
    if rate < tiers.disk_bytes_per_second / 4:
        return Check(name, found, NOTE, "slower than tiers.disk_bytes_per_second; lower it")
    return Check(name, found)


def file_system_of(path: Path, mounts: Path) -> str:
    """The kind of file system that holds `path`, empty when unknown."""
    best, kind = "", ""
    try:
        lines = mounts.read_text().splitlines()
    except OSError:
        return ""
    resolved = str(path.resolve())
    for line in lines:
        _, point, this_kind, *_ = (*line.split(), "", "", "")
        point = point.replace("\\040", " ")
        is_above = resolved == point or resolved.startswith(point.rstrip("/") + "/")
        if is_above and len(point) >= len(best):
            best, kind = point, this_kind
    return kind


def _write_rate(folder: Path) -> float:
    """Bytes per second, down to the drive. Raises OSError."""
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".doctor-") as file:
        started_s = time.perf_counter()
        file.write(os.urandom(PROBE_BYTES))
        file.flush()
        os.fsync(file.fileno())
        return PROBE_BYTES / max(time.perf_counter() - started_s, 1e-9)


def _environment(pid: int) -> dict[str, str]:
    """With which a process was started; empty when it is not ours to know."""
    try:
        content = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace")
    except OSError:
        return {}
    pairs = (entry.partition("=") for entry in content.split("\0") if "=" in entry)
    return {name: value for name, _, value in pairs}


def _gpus(devices: Path) -> list[Path]:
    return sorted(devices.glob("nvidia[0-9]*"))


def _listed(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.is_dir() else []


def _nixl_version() -> str:
    for name in ("nixl-cu13", "nixl-cu12", "nixl"):
        try:
            return f"{name} {importlib.metadata.version(name)}"
        except importlib.metadata.PackageNotFoundError:
            continue
    return "version unknown"


def _huge_pages() -> str:
    try:
        modes = HUGE_PAGES.read_text().split()
    except OSError:
        return "not told by this kernel, not judged"
    chosen = next((mode.strip("[]") for mode in modes if mode.startswith("[")), "unknown")
    return f"shmem_enabled is {chosen}; not judged, the links below are measured as they are"
