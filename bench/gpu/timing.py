"""Times of GPU work, free of launch gaps and of cached inputs.

Calls are captured into one CUDA graph that walks over several sets of inputs, so that nothing is
read twice from the L2 cache, and the replays are timed with events. Contenders take turns, round
by round; what is reported is the median of the rounds.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

L2_BYTES = 64 << 20
Call = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of one call."""

    median_s: float
    spread: float
    """(slowest - fastest) / median over the rounds."""
    is_captured: bool = True
    """False for plain launches, whose gaps count as well."""


def num_input_sets(bytes_of_one: int, *, largest: int = 64) -> int:
    """Sets of inputs that together are four times the L2 cache."""
    return max(1, min(largest, -(-4 * L2_BYTES // max(bytes_of_one, 1))))


def time_in_turns(
    contenders: Mapping[str, Sequence[Call]],
    *,
    rounds: int = 7,
    round_s: float = 0.02,
) -> dict[str, Timing]:
    """Median seconds of one call of each contender, given as one call per set of inputs.

    A contender that cannot be captured is timed as plain launches.
    """
    replays = {name: _Replay(calls, round_s) for name, calls in contenders.items()}
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, replay in replays.items():
            seconds[name].append(replay.time_s())
    return {
        name: summarize(times, is_captured=replays[name].is_captured)
        for name, times in seconds.items()
    }


def summarize(times: Sequence[float], *, is_captured: bool = True) -> Timing:
    """Of the seconds that the rounds took."""
    median_s = statistics.median(times)
    return Timing(median_s, (max(times) - min(times)) / median_s, is_captured)


class _Replay:
    """A captured walk over a contender's calls, long enough to time."""

    def __init__(self, calls: Sequence[Call], round_s: float) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for call in calls:
                call()
        torch.cuda.synchronize()
        self._num_calls = len(calls)
        self.is_captured = True
        self._run = self._capture(calls, stream)
        once_s = max(self._time_s(1), 1e-6)
        self._repeats = max(1, min(2000, round(round_s / once_s)))

    def time_s(self) -> float:
        return self._time_s(self._repeats) / (self._repeats * self._num_calls)

    def _capture(self, calls: Sequence[Call], stream: torch.cuda.Stream) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=stream):
                for call in calls:
                    call()
        except RuntimeError:
            torch.cuda.synchronize()
            self.is_captured = False
            return lambda: _run_all(calls)
        return graph.replay

    def _time_s(self, repeats: int) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(repeats):
            self._run()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3


def _run_all(calls: Sequence[Call]) -> None:
    for call in calls:
        call()
