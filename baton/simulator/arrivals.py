"""Arrivals made up from lengths: Poisson, clumped, in steps, conversations. Deterministic by seed.

Lengths come as pairs, since long prompts do not have the outputs of short ones. Does not know:
files (`workload.py`, `trace_files.py`), the cluster.
"""

from __future__ import annotations

import itertools
import math
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


def sharing(
    arrivals: Sequence[Arrival],
    *,
    num_prefixes: int,
    share: float,
    block_size: int,
    seed: int = 0,
) -> list[Arrival]:
    """The same requests; the first `share` of each prompt is that of one of `num_prefixes` texts,
    drawn for each. Raises ConfigError for numbers out of range."""
    if num_prefixes < 1:
        raise ConfigError(f"num_prefixes must be at least 1, got {num_prefixes}")
    if not 0 <= share <= 1:
        raise ConfigError(f"share must be from 0 to 1, got {share:g}")
    rng = random.Random(seed)
    most = max((a.num_prompt_tokens for a in arrivals), default=0) // block_size
    texts = [unshared_chain(f"{seed}.shared.{i}", most) for i in range(num_prefixes)]
    shared = []
    for arrival in arrivals:
        num_blocks = arrival.num_prompt_tokens // block_size
        prefix = rng.choice(texts)[: int(share * num_blocks)]
        rest = _chain_after(prefix, f"{seed}.{arrival.number}", num_blocks - len(prefix))
        shared.append(replace(arrival, block_hashes=prefix + rest))
    return shared


@dataclass(frozen=True, slots=True)
class RateStep:
    """From `at_s` on, until the next one, requests arrive at `rate_per_s`."""

    at_s: float
    rate_per_s: float


def varying(
    lengths: Sequence[RequestLengths],
    steps: Sequence[RateStep],
    *,
    until_s: float,
    block_size: int,
    seed: int = 0,
) -> list[Arrival]:
    """Poisson at a rate that changes, until `until_s`; pairs drawn with replacement.

    Raises ConfigError for steps that do not start at 0 or do not rise, and for rates that are
    negative or never above 0.
    """
    _check_steps(lengths, steps, until_s)
    rng = random.Random(seed)
    arrivals: list[Arrival] = []
    ends = [step.at_s for step in steps[1:]] + [until_s]
    for step, end_s in zip(steps, ends, strict=True):
        at_s = step.at_s
        # Poisson arrivals have no memory: each step starts afresh.
        while step.rate_per_s and (at_s := at_s + rng.expovariate(step.rate_per_s)) < end_s:
            if at_s >= until_s:
                break
            drawn, number = rng.choice(lengths), len(arrivals)
            chain = unshared_chain(f"{seed}.{number}", drawn.num_prompt_tokens // block_size)
            arrivals.append(
                Arrival(number, at_s, drawn.num_prompt_tokens, drawn.num_output_tokens, chain)
            )
    return arrivals


def _check_steps(
    lengths: Sequence[RequestLengths], steps: Sequence[RateStep], until_s: float
) -> None:
    if not lengths:
        raise ConfigError("no lengths to draw from")
    if not steps or steps[0].at_s != 0:
        raise ConfigError("the rate must be given from second 0 on, such as 0:4,600:16")
    for before, after in itertools.pairwise(steps):
        if not after.at_s > before.at_s:
            raise ConfigError(
                f"the seconds of a changing rate must rise: {after.at_s:g} follows {before.at_s:g}"
            )
    for step in steps:
        if not (math.isfinite(step.rate_per_s) and step.rate_per_s >= 0):
            raise ConfigError(f"a rate must not be negative, got {step.rate_per_s:g} requests/s")
    if not (math.isfinite(until_s) and until_s > 0):
        raise ConfigError(f"arrivals must last for more than 0 seconds, got {until_s:g}")
    if not any(step.rate_per_s and step.at_s < until_s for step in steps):
        raise ConfigError(f"no request arrives within {until_s:g} s: no rate is above 0")


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
    if not (math.isfinite(rate_per_s) and rate_per_s > 0):
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
    return _chain_after((), name, num_blocks)


def _chain_after(prefix: Sequence[BlockHash], name: str, num_blocks: int) -> tuple[BlockHash, ...]:
    parent = root_hash(name)
    if prefix:
        # No other name goes on from the prefix in this way.
        parent = next_hash(prefix[-1], list(parent))
    chain = []
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
        if not (math.isfinite(value) and value > 0):
            raise ConfigError(f"{name} must be above 0, got {value:g}")
