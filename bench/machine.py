"""What a result must say of where it was measured: machine, commit, load, memory bandwidth."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"


def describe() -> dict[str, Any]:
    """Machine, versions and commit of this run."""
    return {
        "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": _git("rev-parse", "--short", "HEAD"),
        "is_modified": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "cpu": _cpu_model(),
        "cpu_features": _cpu_features(),
        "num_cpus": len(os.sched_getaffinity(0)),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "load_average": os.getloadavg(),
    }


def read_bandwidth_bytes_per_s(num_bytes: int = 512 << 20, rounds: int = 9) -> float:
    """Best rate of a threaded read-only pass over memory far larger than the caches."""
    import torch

    data = torch.ones(num_bytes // 4, dtype=torch.float32)
    best_s = float("inf")
    for _ in range(rounds):
        start = time.perf_counter()
        data.sum()
        best_s = min(best_s, time.perf_counter() - start)
    return num_bytes / best_s


def describe_gpu() -> dict[str, Any]:
    """The current CUDA device and what drives it."""
    import torch
    import triton

    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "gpu": properties.name,
        "num_multiprocessors": properties.multi_processor_count,
        "gpu_memory_bytes": properties.total_memory,
        "gpu_l2_bytes": properties.L2_cache_size,
        "driver": _nvidia_smi("driver_version"),
        "gpu_clocks_and_power": _nvidia_smi("clocks.max.sm,clocks.max.mem,power.limit"),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
    }


def store(name: str, result: dict[str, Any], folder: Path = RESULTS) -> Path:
    """Write `result` under `folder` with date and commit in its name."""
    folder.mkdir(parents=True, exist_ok=True)
    machine = result["machine"]
    path = folder / f"{name}-{machine['at'][:10]}-{machine['commit'] or 'unknown'}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    return path


def _git(*arguments: str) -> str:
    return _output_of("git", *arguments)


def _nvidia_smi(query: str) -> str:
    lines = _output_of("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader").splitlines()
    return lines[0] if lines else ""


def _output_of(*command: str) -> str:
    """Nothing where there is no such program."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, cwd=RESULTS.parent, check=False, timeout=30
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip()


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def _cpu_features() -> list[str]:
    interesting = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16")
    text = Path("/proc/cpuinfo").read_text()
    return [name for name in interesting if f" {name} " in text.replace("\n", " ")]
