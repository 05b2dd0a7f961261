"""What a live system adds to its engines' steps, from requests that have it to themselves.

    request      first token - the prompt's own steps
    step gap     between tokens - the decode step: a part of every step, and one of each stream
    hand-off     first to second token - one decode step
    neighbours   the same with the other pool's worker at work, by what it takes alone

Medians of differences, so single disturbances count little. Does not know: sockets, processes.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from baton.core.errors import ConfigError
from baton.simulator.hardware import Hardware
from services.planner.profiling.fit import non_negative_least_squares


@dataclass(frozen=True, slots=True)
class PromptSeen:
    """A prompt of which one token was asked, computed by a prefill worker that did nothing else."""

    num_tokens: int
    ttft_s: float
    has_neighbour: bool
    """A decode worker computed all the while."""


@dataclass(frozen=True, slots=True)
class StreamsSeen:
    """Streams that decoded together, one of them looked at."""

    num_streams: int
    num_prompt_tokens: int
    handoff_s: float | None
    """From its first to its second token; None where others were under way."""
    itl_s: float
    """Mean of its later tokens."""
    mean_context_tokens: float
    has_neighbour: bool
    """A prefill worker computed all the while."""


@dataclass(frozen=True, slots=True)
class LiveSeen:
    prompts: Sequence[PromptSeen]
    streams: Sequence[StreamsSeen]
    start_s: dict[str, float]
    """Pool -> from the start of a worker's process until it has announced itself."""
    link_bytes_per_second: float | None
    """As the workers have timed it; None: there is no link."""


@dataclass(frozen=True, slots=True)
class Overheads:
    """Fields as in `Hardware`."""

    request_s: float
    request_token_s: float
    step_gap_s: float
    told_sequence_s: float
    """On top of `decode_sequence_s`: a token is told on the cores that compute the next ones."""
    link_latency_s: float
    prefill_neighbour_share: float
    decode_neighbour_share: float


def prompt_s(hardware: Hardware, num_tokens: int, step_tokens: int) -> float:
    """Of a prompt alone, in steps of at most `step_tokens`."""
    num_steps = -(-num_tokens // step_tokens)
    return (
        num_steps * hardware.step_fixed_s
        + (num_steps - 1) * hardware.step_gap_s
        + hardware.prefill_token_s * num_tokens
        + hardware.prefill_pair_s * num_tokens * num_tokens / 2
    )


def decode_s(hardware: Hardware, num_sequences: int, context_tokens: float) -> float:
    """From one step in which each sequence holds `context_tokens` to the next."""
    of_sequence = hardware.decode_sequence_s + hardware.decode_kv_token_s * context_tokens
    return hardware.step_fixed_s + hardware.step_gap_s + of_sequence * num_sequences


def find_overheads(
    seen: LiveSeen, prefill: Hardware, decode: Hardware, *, step_tokens: int, kv_bytes: int
) -> Overheads:
    """`prefill` and `decode` with fitted steps; `step_tokens` of the prefill pool's steps.

    Raises ConfigError when there is nothing to compare with.
    """
    alone = [s for s in seen.streams if not s.has_neighbour]
    lone_prompts = [p for p in seen.prompts if not p.has_neighbour]
    if not alone or not lone_prompts:
        raise ConfigError("the system answered no request on its own, so its costs are not known")
    gap_s, told_s = _gaps(alone, decode)
    prefill = dataclasses.replace(prefill, step_gap_s=gap_s)
    decode = with_telling(dataclasses.replace(decode, step_gap_s=gap_s), told_s)
    request_s, request_token_s = _outside(lone_prompts, prefill, step_tokens)

    def moved_s(s: StreamsSeen) -> float:
        tokens = min(s.num_prompt_tokens, step_tokens)
        return tokens * kv_bytes / (seen.link_bytes_per_second or prefill.link_bytes_per_second)

    latency_s = _median(
        s.handoff_s - (_step_s(decode, s) - gap_s) - moved_s(s)
        for s in alone
        if s.handoff_s is not None and s.num_streams == 1
    )
    prefill_share = _median(
        (p.ttft_s - request_s - request_token_s * p.num_tokens)
        / prompt_s(prefill, p.num_tokens, step_tokens)
        - 1
        for p in seen.prompts
        if p.has_neighbour
    )
    decode_share = _median(
        s.itl_s / _step_s(decode, s) - 1 for s in seen.streams if s.has_neighbour
    )
    return Overheads(
        request_s, request_token_s, gap_s, told_s, latency_s, prefill_share, decode_share
    )


def with_telling(hardware: Hardware, told_sequence_s: float) -> Hardware:
    """Decode steps that take so much longer for each sequence."""
    return dataclasses.replace(
        hardware, decode_sequence_s=hardware.decode_sequence_s + told_sequence_s
    )


def _gaps(streams: Sequence[StreamsSeen], decode: Hardware) -> tuple[float, float]:
    """Of every step, and for each stream."""
    by_size: dict[int, list[StreamsSeen]] = {}
    for s in streams:
        by_size.setdefault(s.num_streams, []).append(s)
    sizes = sorted(by_size)
    rests = np.array([_median(s.itl_s - _step_s(decode, s) for s in by_size[n]) for n in sizes])
    weights = np.array(
        [1.0 / decode_s(decode, n, by_size[n][0].mean_context_tokens) for n in sizes]
    )
    rows = np.array([(1.0, float(n)) for n in sizes])
    gap_s, told_s = non_negative_least_squares(rows * weights[:, None], rests * weights)
    return float(gap_s), float(told_s)


def _outside(
    prompts: Sequence[PromptSeen], prefill: Hardware, step_tokens: int
) -> tuple[float, float]:
    """Fixed, and for each token of the prompt."""
    by_length: dict[int, list[float]] = {}
    for p in prompts:
        rest_s = p.ttft_s - prompt_s(prefill, p.num_tokens, step_tokens)
        by_length.setdefault(p.num_tokens, []).append(rest_s)
    lengths = sorted(by_length)
    rests = np.array([max(0.0, statistics.median(by_length[n])) for n in lengths])
    rows = np.array([(1.0, float(n)) for n in lengths])
    # What is left of a long prompt is mostly the error of its steps: short ones weigh more.
    weights = 1.0 / np.array([prompt_s(prefill, n, step_tokens) for n in lengths])
    fixed_s, token_s = non_negative_least_squares(rows * weights[:, None], rests * weights)
    return float(fixed_s), float(token_s)


def _step_s(decode: Hardware, seen: StreamsSeen) -> float:
    return decode_s(decode, seen.num_streams, seen.mean_context_tokens)


def _median(values: Iterable[float]) -> float:
    """Not below 0; 0 of nothing."""
    found = list(values)
    return max(0.0, statistics.median(found)) if found else 0.0
