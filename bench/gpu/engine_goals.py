"""What the engine must reach, held against the results of one run.

Peers' figures are from the same kind of card on another day; shares of the copy bandwidth are of
this run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from bench.gpu.ceilings import Ceilings
from bench.gpu.engine_results import ModelResult
from bench.gpu.goals import INT4_SPEEDUP, INT8_SPEEDUP, LINEARS_SHARE_OF_COPY, Goal
from bench.gpu.peers import VLLM_DECODE_TOKENS_PER_S, VLLM_PREFILL_TOKENS_PER_S

MODEL = "llama-3.1-8b"
BUSY_SHARE = 0.95
SINGLE_STREAM = (1, 128)


def evaluate_engine(results: Sequence[ModelResult], ceilings: Ceilings) -> list[Goal]:
    """All lines, also those that this run cannot answer."""
    by_weights = {r.weights: r for r in results if r.model == MODEL}
    plain = by_weights.get("bf16")
    return [
        *_single_stream(plain, ceilings),
        _speedup(by_weights, "int8", INT8_SPEEDUP),
        _speedup(by_weights, "int4", INT4_SPEEDUP),
        *_against_vllm(plain),
    ]


def _single_stream(plain: ModelResult | None, ceilings: Ceilings) -> Iterator[Goal]:
    step_s = None if plain is None else _step_s(plain, SINGLE_STREAM)
    share = None
    if plain is not None and step_s is not None:
        share = plain.weight_bytes / step_s / ceilings.copy_bytes_per_s
    yield Goal("one stream, bf16: linear weights read, share of copy", LINEARS_SHARE_OF_COPY, share)
    profile = None if plain is None else plain.profile
    yield Goal(
        "one stream, bf16: share of the time in kernels",
        BUSY_SHARE,
        None if profile is None else profile.busy_share,
    )
    yield Goal(
        "one stream, bf16: steps without a call that waits for the device",
        1.0,
        None if profile is None else max(0.0, 1.0 - profile.blocking_calls_per_step),
    )


def _speedup(by_weights: dict[str, ModelResult], weights: str, wanted: float) -> Goal:
    text = f"one stream, {weights}: times bf16"
    if "bf16" not in by_weights or weights not in by_weights:
        return Goal(text, wanted, None)
    plain_s = _step_s(by_weights["bf16"], SINGLE_STREAM)
    step_s = _step_s(by_weights[weights], SINGLE_STREAM)
    return Goal(text, wanted, None if plain_s is None or step_s is None else plain_s / step_s)


def _against_vllm(plain: ModelResult | None) -> Iterator[Goal]:
    for kind, points, peers in (
        ("decode", () if plain is None else plain.decode, VLLM_DECODE_TOKENS_PER_S),
        ("prefill", () if plain is None else plain.prefill, VLLM_PREFILL_TOKENS_PER_S),
    ):
        ours = {point.key: point.tokens_per_s for point in points}
        ratios = {key: ours[key] / peer for key, peer in peers.items() if key in ours}
        worst = min(ratios, key=lambda key: ratios[key], default=None)
        yield Goal(
            f"{kind}, bf16: times vLLM's tokens/s at the least of {len(ratios)} points of "
            f"{len(peers)}",
            1.0,
            None if worst is None else ratios[worst],
            "" if worst is None else f"{worst[0]} x {worst[1]}",
        )


def _step_s(result: ModelResult, key: tuple[int, int]) -> float | None:
    return next((point.step_s for point in result.decode if point.key == key), None)
