"""What the host and the GPU do during decode steps, from a profile of them.

Two questions: does a step's time consist of kernels (busy share), and does the host ever make the
device wait (blocking calls a step)? Waiting for the event of the step before, while the next one
is already running, is how results come back and holds nobody up; it is counted apart.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

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


def profile_steps(run: Callable[[], object], num_steps: int) -> StepProfile:
    """Profile `run`, which does `num_steps` steps on the current GPU."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize()
    kernels: list[tuple[float, float]] = []
    calls: Counter[str] = Counter()
    for event in profiler.events():
        if event.name.startswith(COPIES):
            continue
        if event.device_type == torch.autograd.DeviceType.CUDA:
            kernels.append((event.time_range.start, event.time_range.end))
        else:
            calls[event.name] += 1
    # The engine has no part in the one that ends the window, nor in the profiler's own.
    calls["cudaDeviceSynchronize"] -= 2
    return summarise(kernels, calls, num_steps)


def summarise(
    kernels: Iterable[tuple[float, float]], calls: Counter[str], num_steps: int
) -> StepProfile:
    """From kernels' (start, end) in one unit and counts of runtime calls by name."""
    intervals = sorted(kernels)
    window = max(end for _, end in intervals) - intervals[0][0] if intervals else 0.0
    return StepProfile(
        num_steps=num_steps,
        busy_share=covered(intervals) / window if window else 0.0,
        kernels_per_step=len(intervals) / num_steps,
        blocking_calls_per_step=sum(max(calls[name], 0) for name in BLOCKING_CALLS) / num_steps,
        event_waits_per_step=calls[EVENT_WAIT] / num_steps,
    )


def covered(intervals: list[tuple[float, float]]) -> float:
    """Length of the union of sorted intervals; kernels that overlap count once."""
    total, reach = 0.0, float("-inf")
    for start, end in intervals:
        total += max(0.0, end - max(start, reach))
        reach = max(reach, end)
    return total
