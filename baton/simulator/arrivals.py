"""Arrivals made up from lengths: Poisson, bursty, conversations. Deterministic by seed.

Lengths come as pairs, since long prompts do not have the outputs of short ones. Does not know:
files (`workload.py`, `trace_files.py`), the cluster.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from baton.core.block import BlockHash, next_hash, root_hash
from baton.core.errors import ConfigError
from baton.simulator.workload import Arrival


@dataclass(frozen=True, slots=True)
class RequestLengths:
    """Tokens of one request."""

    num_prompt_tokens: int
    num_output_tokens: int

    def __post_init__(self) -> None:
        for name in ("num_prompt_tokens", "num_output_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")


def sampled(
    lengths: Sequence[RequestLengths],
    *,
    rate_per_s: float,
    num_requests: int,
    block_size: int,
    burstiness: float = 1.0,
    seed: int = 0,
) -> list[Arrival]:
    """Pairs drawn with replacement; prompts share nothing.

    Gaps between arrivals follow a gamma distribution with the mean 1 / rate_per_s. `burstiness` is
    its squared coefficient of variation: 1 is Poisson, 4 comes in clumps, towards 0 it is a clock.
    Raises ConfigError for an empty list and for numbers that are not above 0.
    """
    _check(lengths, rate_per_s, num_requests, burstiness)
    rng = random.Random(seed)
    at_s, arrivals = 0.0, []
    for number in range(num_requests):
        at_s += rng.gammavariate(1 / burstiness, burstiness / rate_per_s)
        drawn = rng.choice(lengths)
        chain = unshared_chain(f"{seed}.{number}", drawn.num_prompt_tokens // block_size)
        arrivals.append(
            Arrival(number, at_s, drawn.num_prompt_tokens, drawn.num_output_tokens, chain)
        )
    return arrivals


def conversations(
    turns: Sequence[Sequence[RequestLengths]],
    *,
    rate_per_s: float,
    num_requests: int,
    block_size: int,
    think_s: float = 10.0,
    seed: int = 0,
) -> list[Arrival]:
    """Conversations whose turns repeat all that was said before.

    The lengths of a turn are those of the new question and of its answer. `rate_per_s` counts
    requests, so conversations start at that rate divided by the mean number of turns. A turn comes
    an exponential time (mean `think_s`) after the one before, which the answer's own time is part
    of. Raises ConfigError as `sampled` does.
    """
    if not turns or not all(turns):
        raise ConfigError("no conversation to draw from; each needs at least one turn")
    _check(turns[0], rate_per_s, num_requests, 1.0)
    rng = random.Random(seed)
    mean_turns = sum(map(len, turns)) / len(turns)
    start_s, number = 0.0, 0
    arrivals: list[Arrival] = []
    while len(arrivals) < num_requests:
        start_s += rng.expovariate(rate_per_s / mean_turns)
        arrivals += _turns(rng.choice(turns), f"{seed}.{number}", start_s, block_size, think_s, rng)
        number += 1
    ordered = sorted(arrivals, key=lambda arrival: arrival.at_s)[:num_requests]
    return [replace(arrival, number=i) for i, arrival in enumerate(ordered)]


def at_rate(arrivals: Sequence[Arrival], rate_per_s: float) -> list[Arrival]:
    """The same requests in the same order, faster or slower. Raises ConfigError for none."""
    if not arrivals:
        raise ConfigError("no request to replay")
    if not rate_per_s > 0:
        raise ConfigError(f"rate_per_s must be above 0, got {rate_per_s:g}")
    span_s = arrivals[-1].at_s - arrivals[0].at_s
    if len(arrivals) < 2 or span_s <= 0:
        raise ConfigError("a rate can only be given to at least two requests at different times")
    scale = (len(arrivals) - 1) / span_s / rate_per_s
    start_s = arrivals[0].at_s
    return [replace(arrival, at_s=(arrival.at_s - start_s) * scale) for arrival in arrivals]


def _turns(
    turns: Sequence[RequestLengths],
    name: str,
    start_s: float,
    block_size: int,
    think_s: float,
    rng: random.Random,
) -> list[Arrival]:
    """Of one conversation; every prompt is a prefix of the next one."""
    at_s, num_said, arrivals = start_s, 0, []
    total = sum(turn.num_prompt_tokens + turn.num_output_tokens for turn in turns)
    chain = unshared_chain(name, total // block_size)
    for turn in turns:
        num_prompt = num_said + turn.num_prompt_tokens
        arrivals.append(
            Arrival(
                0,
                at_s,
                num_prompt,
                turn.num_output_tokens,
                chain[: num_prompt // block_size],
                session_key=name,
            )
        )
        num_said = num_prompt + turn.num_output_tokens
        at_s += rng.expovariate(1 / think_s)
    return arrivals


def unshared_chain(name: str, num_blocks: int) -> tuple[BlockHash, ...]:
    """Names of blocks that no other `name` has."""
    parent, chain = root_hash(name), []
    for i in range(num_blocks):
        parent = next_hash(parent, [i])
        chain.append(parent)
    return tuple(chain)


def _check(
    lengths: Sequence[RequestLengths], rate_per_s: float, num_requests: int, burstiness: float
) -> None:
    if not lengths:
        raise ConfigError("no lengths to draw from")
    numbers = {"rate_per_s": rate_per_s, "num_requests": num_requests, "burstiness": burstiness}
    for name, value in numbers.items():
        if not value > 0:
            raise ConfigError(f"{name} must be above 0, got {value:g}")
