"""What the host and the GPU do during decode steps, from a profile of them.

Two questions: does a step's time consist of kernels (busy share), and does the host ever make the
device wait (blocking calls a step)? Waiting for the event of the step before, while the next one
is already running, is how results come back and holds nobody up; it is counted apart. What the
profiler itself calls is seen in a window in which nothing is done, and is taken off.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

BLOCKING_CALLS = (
    "cudaStreamSynchronize",
    "cudaDeviceSynchronize",
    "cudaMemcpy",
    "cudaMalloc",
    "cudaFree",
)
"""Runtime calls that return only when the device has caught up."""
COPIES = ("Memcpy", "Memset")
"""Work of the device that computes nothing."""
EVENT_WAIT = "cudaEventSynchronize"


@dataclass(frozen=True, slots=True)
class StepProfile:
    """Averages over the profiled steps."""

    num_steps: int
    busy_share: float
    """Part of the window in which at least one kernel ran."""
    kernels_per_step: float
    blocking_calls_per_step: float
    event_waits_per_step: float
    blocking_calls: dict[str, int] = field(default_factory=dict)
    """By name, over all steps; empty when the host never waited for the device."""


class Window(NamedTuple):
    """What a profile shows of a stretch of time."""

    kernels: list[tuple[float, float]]
    """(start, end) of each, in one unit."""
    calls: Counter[str]
    """Of the runtime and of everything else on the host, by name."""


def profile_steps(run: Callable[[], object], num_steps: int) -> StepProfile:
    """Profile `run`, which does `num_steps` steps on the current GPU."""
    idle = _profiled(lambda: None)
    return summarise(_profiled(run), idle, num_steps)


def _profiled(run: Callable[[], object]) -> Window:
    """`run`, to the end of what it launched."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize()
    window = Window([], Counter())
    for event in profiler.events():
        if event.name.startswith(COPIES):
            continue
        if event.device_type == torch.autograd.DeviceType.CUDA:
            window.kernels.append((event.time_range.start, event.time_range.end))
        else:
            window.calls[event.name] += 1
    return window


def summarise(steps: Window, idle: Window, num_steps: int) -> StepProfile:
    """`idle`: a window without steps, profiled in the same way."""
    intervals = sorted(steps.kernels)
    window = max(end for _, end in intervals) - intervals[0][0] if intervals else 0.0
    # Subtraction of counters keeps what is above zero.
    calls = steps.calls - idle.calls
    blocking = {name: calls[name] for name in BLOCKING_CALLS if calls[name]}
    return StepProfile(
        num_steps=num_steps,
        busy_share=covered(intervals) / window if window else 0.0,
        kernels_per_step=len(intervals) / num_steps,
        blocking_calls_per_step=sum(blocking.values()) / num_steps,
        event_waits_per_step=calls[EVENT_WAIT] / num_steps,
        blocking_calls=blocking,
    )


def covered(intervals: list[tuple[float, float]]) -> float:
    """Length of the union of sorted intervals; kernels that overlap count once."""
    total, reach = 0.0, float("-inf")
    for start, end in intervals:
        total += max(0.0, end - max(start, reach))
        reach = max(reach, end)
    return total
