"""The requests that a plan is made for, at any rate: joint lengths, or a trace with its prefixes.

Means are never taken: long prompts, long outputs and cached prefixes come together as they do in
the sample.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from baton.core.errors import ConfigError
from baton.simulator.arrivals import RequestLengths, at_rate, sampled, unshared_chain
from baton.simulator.workload import Arrival


class Workload(Protocol):
    @property
    def name(self) -> str: ...

    def arrivals(self, rate_per_s: float | None, num_requests: int, seed: int) -> list[Arrival]:
        """At most `num_requests`, in order of arrival, at that mean rate; None: at its own.

        Raises ConfigError when it has none of its own.
        """
        ...

    @property
    def max_tokens(self) -> int:
        """Of prompt and output together, of the longest request."""
        ...


@dataclass(frozen=True, slots=True)
class SampledLengths:
    """Pairs of lengths, Poisson or clumped arrivals, nothing shared. Implements Workload."""

    name: str
    lengths: tuple[RequestLengths, ...]
    block_size: int
    burstiness: float = 1.0

    def arrivals(self, rate_per_s: float | None, num_requests: int, seed: int) -> list[Arrival]:
        if rate_per_s is None:
            raise ConfigError("lengths have no rate of their own: say --rate")
        return sampled(
            self.lengths,
            rate_per_s=rate_per_s,
            num_requests=num_requests,
            block_size=self.block_size,
            burstiness=self.burstiness,
            seed=seed,
        )

    @property
    def max_tokens(self) -> int:
        return max(pair.num_prompt_tokens + pair.num_output_tokens for pair in self.lengths)


class Replay:
    """A trace, sped up or slowed down. Implements Workload."""

    def __init__(self, name: str, trace: Sequence[Arrival]) -> None:
        if len(trace) < 2:
            raise ConfigError(f"{name}: a trace needs at least two requests, got {len(trace)}")
        self.name, self._trace = name, tuple(trace)

    def arrivals(self, rate_per_s: float | None, num_requests: int, seed: int) -> list[Arrival]:
        """The first ones; a trace has no other seeds."""
        first = self._trace[: max(2, num_requests)]
        return list(first) if rate_per_s is None else at_rate(first, rate_per_s)

    def without_sharing(self, block_size: int) -> Replay:
        """The same lengths at the same times; no prompt begins like another one."""
        alone = [
            dataclasses.replace(
                arrival,
                block_hashes=unshared_chain(
                    f"{self.name}.{arrival.number}", arrival.num_prompt_tokens // block_size
                ),
                session_key="",
            )
            for arrival in self._trace
        ]
        return Replay(f"{self.name}, no prefix shared", alone)

    @property
    def max_tokens(self) -> int:
        return max(a.num_prompt_tokens + a.num_output_tokens for a in self._trace)
