"""What the kernels must reach, held against the results of one run.

Figures of others are from an NVIDIA H200 (bf16 matmul 797 TFLOP/s in the same hour); on another
card only the shares mean anything.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from bench.gpu.attention_cases import DECODE, PREFILL
from bench.gpu.attention_peers import FA3_PAGED
from bench.gpu.cases import OURS
from bench.gpu.ceilings import Ceilings
from bench.gpu.gemm_cases import SKINNY, WEIGHT_ONLY, gemm_name
from bench.gpu.gemm_inputs import Weights
from bench.gpu.report import CaseResult, Status
from bench.gpu.shapes import LLAMA_3_1_8B

LARGE_KV_BYTES = 1e9
FA3_PAGED_TFLOPS = 603.0
FA3_CONTIGUOUS_TFLOPS = 693.0
LINEARS_SHARE_OF_COPY = 0.88
"""The whole of single-stream decode must reach it, so its linear layers must."""
INT8_SPEEDUP, INT4_SPEEDUP = 1.6, 2.2


@dataclass(frozen=True, slots=True)
class Goal:
    text: str
    wanted: float
    measured: float | None
    """None where the cases it needs have no times."""
    where: str = ""
    """The case that decides."""

    @property
    def verdict(self) -> str:
        if self.measured is None:
            return "not measured"
        return "reached" if self.measured >= self.wanted else "missed"

    def row(self) -> str:
        measured = "     -" if self.measured is None else f"{self.measured:6.2f}"
        return f"{self.verdict:<12} {measured} >= {self.wanted:<6g} {self.text}  {self.where}"

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"verdict": self.verdict}


def evaluate(results: Sequence[CaseResult], ceilings: Ceilings) -> list[Goal]:
    """All lines, also those that this run cannot answer."""
    timed = {(r.group, r.name): r for r in results if r.status is Status.TIMED}
    broken = [r for r in results if r.status in (Status.WRONG, Status.FAILED)]
    return [
        Goal(
            "share of cases whose results are right",
            1.0,
            1 - len(broken) / len(results) if results else None,
            broken[0].name if broken else "",
        ),
        *_decode_goals(timed.values(), ceilings),
        *_prefill_goals(timed),
        *_linear_goals(timed, ceilings),
    ]


def _decode_goals(timed: Iterable[CaseResult], ceilings: Ceilings) -> Iterator[Goal]:
    large = [r for r in timed if r.group == DECODE and r.num_bytes >= LARGE_KV_BYTES]
    for kind, wanted in (("bf16", 0.95), ("fp8 KV", 0.9)):
        text = f"decode attention, {kind}, 1 GB of KV and more: share of copy"
        cases = [r for r in large if r.name.endswith(kind)]
        worst = min(cases, key=lambda r: r.share_of_limit(), default=None)
        if worst is None:
            yield Goal(text, wanted, None)
        else:
            yield Goal(text, wanted, worst.share_of_limit(), worst.name)


def _prefill_goals(timed: Mapping[tuple[str, str], CaseResult]) -> Iterator[Goal]:
    names = [f"1 x 8192 h32/8 d128 block {block_size} bf16" for block_size in (16, 64)]
    cases = [timed[PREFILL, name] for name in names if (PREFILL, name) in timed]
    best = max(cases, key=lambda r: r.flops / r.timings[OURS].median_s, default=None)
    rate, where = None, ""
    if best is not None:
        rate, where = best.flops / best.timings[OURS].median_s / 1e12, best.name
    text = "prefill 1 x 8192 causal, paged: TFLOP/s"
    yield Goal(f"{text} (FlashAttention-3 paged)", FA3_PAGED_TFLOPS, rate, where)
    yield Goal(f"{text} (its contiguous)", FA3_CONTIGUOUS_TFLOPS, rate, where)
    text = "prefill 1 x 8192 causal, paged: times FlashAttention-3 paged in this run"
    peers = [r.timings[FA3_PAGED].median_s for r in cases if FA3_PAGED in r.timings]
    ratio = None
    if best is not None and peers:
        ratio = min(peers) / best.timings[OURS].median_s
    yield Goal(text, 1.0, ratio, where)


def _linear_goals(
    timed: Mapping[tuple[str, str], CaseResult], ceilings: Ceilings
) -> Iterator[Goal]:
    seconds = {
        kind: linears_s(timed, kind) for kind in (Weights.BF16, Weights.INT8, Weights.INT4_128)
    }
    text = f"all linear layers of one {LLAMA_3_1_8B.name} token"
    plain = seconds[Weights.BF16]
    weight_bytes = 2.0 * LLAMA_3_1_8B.num_linear_weights
    share = None if plain is None else weight_bytes / plain / ceilings.copy_bytes_per_s
    yield Goal(f"{text}, bf16: share of copy", LINEARS_SHARE_OF_COPY, share)
    for kind, wanted in ((Weights.INT8, INT8_SPEEDUP), (Weights.INT4_128, INT4_SPEEDUP)):
        quantised = seconds[kind]
        ratio = None if plain is None or quantised is None else plain / quantised
        yield Goal(f"{text}, {kind.value}: times our bf16", wanted, ratio)


def linears_s(timed: Mapping[tuple[str, str], CaseResult], kind: Weights) -> float | None:
    """Seconds of every product of a decode step of one row, if all were timed."""
    group = SKINNY if kind is Weights.BF16 else WEIGHT_ONLY
    total_s = 0.0
    for layer, (n, k) in LLAMA_3_1_8B.linears.items():
        result = timed.get((group, gemm_name(kind, layer, n, k, 1)))
        if result is None:
            return None
        count = 1 if layer == "head" else LLAMA_3_1_8B.num_layers
        total_s += count * result.engine_s
    return total_s
