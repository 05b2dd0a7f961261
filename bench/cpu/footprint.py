"""Time to ready and resident memory of the whole system, with and without Ray.

Memory is the sum of the processes' proportional set sizes (shared pages counted once), after
`num_streams` prompts have been computed and answered.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import psutil

from bench.cpu.contender_system import run, running_system


@dataclass(frozen=True)
class Footprint:
    """One start of the system."""

    ready_s: float
    idle_bytes: int
    loaded_bytes: int
    stop_s: float


def measure_footprint(model_dir: str, mode: str, seed: int) -> Footprint:
    """Start `baton serve` with `mode` (--ray or --no-ray), load it, stop it."""
    with running_system(mode, "--model", model_dir) as system:
        idle = _resident_bytes(system.process.pid)
        asyncio.run(run(system.http_port, seed))
        loaded = _resident_bytes(system.process.pid)
    return Footprint(system.ready_s, idle, loaded, system.stop_s)


def _resident_bytes(pid: int) -> int:
    members = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    return sum(int(member.memory_full_info().pss) for member in members)
