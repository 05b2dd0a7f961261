"""Judgements on UCX variables and process limits. Pure."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

from baton.cli.doctor_types import Check, Severity

MIN_OPEN_FILES = 1024
"""A link takes three or four files at each end, a worker some sixty by itself."""
MAX_FILES_SHARE = 0.8
_HOST_READS = frozenset({"all", "cma", "sm", "shm"})
"""Any of them lets UCX read another process's memory on one host."""
_GPU_READS = frozenset({"all", "cuda", "cuda_ipc"})
_NO_ERROR_HANDLING = frozenset({"cma", "sm", "shm", "mm", "posix", "sysv", "knem", "xpmem", "self"})


def judge_ucx(
    variables: Mapping[str, str], devices: Collection[str], *, has_gpu: bool
) -> Iterator[Check]:
    """What in `variables` keeps NIXL from working or makes it slow. `devices` exist here."""
    wanted = variables.get("UCX_NET_DEVICES", "all")
    names = [name.partition(":")[0].strip() for name in wanted.split(",")]
    missing = [name for name in names if name and name != "all" and name not in devices]
    if missing:
        yield Check(
            "UCX_NET_DEVICES",
            f"UCX_NET_DEVICES names {', '.join(missing)}, this machine has "
            f"{', '.join(sorted(devices)) or 'none'}: no NIXL agent is made",
            Severity.WARNING,
            "correct it, or leave it out: Baton sets lo for its bookkeeping",
        )
    yield from _judge_transports(variables.get("UCX_TLS", ""), has_gpu=has_gpu)
    if variables.get("UCX_PROTO_EMULATION_ENABLE", "n").lower() not in ("n", "no", "0"):
        yield Check(
            "UCX_PROTO_EMULATION_ENABLE",
            "UCX_PROTO_EMULATION_ENABLE is set and overridden: emulated reads can end the peer",
            Severity.NOTE,
            "leave it out",
        )


def _judge_transports(value: str, *, has_gpu: bool) -> Iterator[Check]:
    if not value or value == "all":
        return
    is_excluding = value.startswith("^")
    names = {name.strip() for name in value.removeprefix("^").split(",")}
    allowed = f"UCX_TLS={value}"
    fix = "leave UCX_TLS out, or add "
    if is_excluding:
        if names & {"cma", "sm", "shm"}:
            found = f"{allowed} excludes reads of another process's memory (cma)"
            yield Check("UCX_TLS", found, Severity.WARNING, "leave UCX_TLS out")
        if has_gpu and names & {"cuda", "cuda_ipc"}:
            found = f"{allowed} excludes reads between GPUs"
            yield Check("UCX_TLS", found, Severity.WARNING, "leave UCX_TLS out")
        return
    if names <= _NO_ERROR_HANDLING:
        found = f"{allowed} leaves no transport that notices a dead peer: no NIXL agent is made"
        yield Check("UCX_TLS", found, Severity.WARNING, fix + "tcp")
    if not names & _HOST_READS:
        found = f"{allowed} leaves out reads of another process's memory: NIXL cannot read here"
        yield Check("UCX_TLS", found, Severity.WARNING, fix + "cma")
    if has_gpu and not names & _GPU_READS:
        found = f"{allowed} leaves out GPUs"
        yield Check("UCX_TLS", found, Severity.WARNING, fix + "cuda")


def parse_limits(text: str) -> dict[str, int | None]:
    """Soft limits of a process from /proc/<pid>/limits; None: unlimited."""
    limits: dict[str, int | None] = {}
    for line in text.splitlines()[1:]:
        name, soft = line[:26].strip(), line[26:].split()
        if soft and (soft[0].isdigit() or soft[0] == "unlimited"):
            limits[name] = None if soft[0] == "unlimited" else int(soft[0])
    return limits


def judge_limits(
    limits: Mapping[str, int | None], num_open_files: int, *, has_rdma: bool
) -> Iterator[Check]:
    files = limits.get("Max open files")
    if files is not None and num_open_files > MAX_FILES_SHARE * files:
        yield Check(
            "open files",
            f"{num_open_files} of {files} files are open",
            Severity.ERROR,
            f"`ulimit -n {max(4 * files, 4 * MIN_OPEN_FILES)}` before the start",
        )
    elif files is not None and files < MIN_OPEN_FILES:
        yield Check(
            "open files",
            f"{files} open files are allowed, {num_open_files} are open; each link takes some",
            Severity.WARNING,
            f"`ulimit -n {4 * MIN_OPEN_FILES}` before the start",
        )
    locked = limits.get("Max locked memory")
    if has_rdma and locked is not None:
        yield Check(
            "locked memory",
            f"{locked} bytes may be locked, and RDMA locks the whole pool",
            Severity.WARNING,
            "`ulimit -l unlimited` before the start",
        )
