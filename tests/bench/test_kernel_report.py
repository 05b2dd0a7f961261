"""Rows, JSON, goals and the plot of kernel results."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from bench import kernels, machine
from bench.gpu.attention_cases import DECODE, PREFILL
from bench.gpu.attention_peers import FA3_PAGED
from bench.gpu.cases import OURS, OURS_PDL, Bound
from bench.gpu.ceilings import Ceilings
from bench.gpu.gemm_cases import SKINNY, WEIGHT_ONLY, gemm_name
from bench.gpu.gemm_inputs import Weights
from bench.gpu.goals import Goal, evaluate, linears_s
from bench.gpu.report import CaseResult, Status, results_json
from bench.gpu.shapes import LLAMA_3_1_8B
from bench.gpu.timing import Timing, summarize

CEILINGS = Ceilings(4e12, 4.5e12, 8e14, 16e14)
BLOCK_16 = "1 x 8192 h32/8 d128 block 16 bf16"
BLOCK_64 = "1 x 8192 h32/8 d128 block 64 bf16"


def timed(
    group: str,
    name: str,
    seconds: float,
    *,
    num_bytes: float = 4e9,
    flops: float = 1e9,
    bound: Bound = Bound.COPY,
    **peers_s: float,
) -> CaseResult:
    limit_s = flops / 8e14 if bound is Bound.MATMUL else num_bytes / 4e12
    times = {OURS: seconds} | peers_s
    timings = {contender: Timing(s, 0.01) for contender, s in times.items()}
    return CaseResult(group, name, Status.TIMED, num_bytes, flops, bound, limit_s, 0.001, timings)


def goal(results: list[CaseResult], text: str) -> Goal:
    (found,) = [g for g in evaluate(results, CEILINGS) if text in g.text]
    return found


def test_row_gives_time_rate_share_and_how_a_peer_compares() -> None:
    row = timed(DECODE, "128 x 4096 bf16", 1.25e-3, cublas=2.5e-3).row()

    assert "1250.0 us" in row
    assert "3200 GB/s" in row
    assert "80.0% of copy" in row
    assert "cublas 1600 GB/s (x2.00)" in row


def test_row_of_a_product_gives_flops() -> None:
    row = timed(PREFILL, "p", 1e-3, flops=6e11, bound=Bound.MATMUL).row()

    assert "600.0 TFLOP/s" in row
    assert "75.0% of matmul" in row


def test_row_says_which_contender_was_not_captured() -> None:
    loose = CaseResult(
        "g", "n", Status.TIMED, 1.0, 0.0, Bound.COPY, 1.0, 0.0, {OURS: Timing(1.0, 0.0, False)}
    )

    assert "plain launches: baton" in loose.row()


def test_json_has_no_numbers_that_json_does_not_know() -> None:
    wrong = CaseResult("g", "n", Status.WRONG, error=math.nan)
    content = results_json({"commit": "abc"}, CEILINGS, [wrong, timed("g", "t", 1e-3)])

    assert json.loads(json.dumps(content, allow_nan=False))["cases"][0]["error"] is None


def test_worst_large_decode_case_decides() -> None:
    results = [
        timed(DECODE, "128 x 4096 bf16", 1.02e-3),
        timed(DECODE, "64 x 4096 bf16", 1.1e-3),
        timed(DECODE, "1 x 4096 bf16", 9e-3, num_bytes=1e8),
        timed(DECODE, "128 x 4096 fp8 KV", 1.05e-3),
    ]

    bf16, fp8 = goal(results, "decode attention, bf16"), goal(results, "decode attention, fp8")
    assert (bf16.verdict, bf16.where) == ("missed", "64 x 4096 bf16")
    assert bf16.measured == pytest.approx(1 / 1.1)
    assert fp8.verdict == "reached"


def test_faster_block_size_decides_prefill() -> None:
    results = [
        timed(PREFILL, BLOCK_64, 1e-3, flops=6.2e11, bound=Bound.MATMUL, **{FA3_PAGED: 1.1e-3}),
        timed(PREFILL, BLOCK_16, 2e-3, flops=6.2e11, bound=Bound.MATMUL, **{FA3_PAGED: 0.9e-3}),
    ]

    assert goal(results, "(FlashAttention-3 paged)").verdict == "reached"
    assert goal(results, "(its contiguous)").verdict == "missed"
    in_this_run = goal(results, "in this run")
    assert in_this_run.measured == pytest.approx(0.9)


def test_goals_without_cases_are_not_measured() -> None:
    assert {g.verdict for g in evaluate([], CEILINGS)} == {"not measured"}


def test_one_wrong_case_misses_the_first_goal() -> None:
    results = [timed(DECODE, "a", 1.0), CaseResult(DECODE, "b", Status.WRONG)]

    assert goal(results, "results are right").verdict == "missed"


def linears(group: str, kind: Weights, seconds: float) -> list[CaseResult]:
    return [
        timed(group, gemm_name(kind, layer, n, k, 1), 2 * seconds, **{OURS_PDL: seconds})
        for layer, (n, k) in LLAMA_3_1_8B.linears.items()
    ]


def test_linear_layers_of_a_token_add_up_as_the_engine_launches_them() -> None:
    results = linears(SKINNY, Weights.BF16, 3e-5) + linears(WEIGHT_ONLY, Weights.INT8, 1e-5)
    by_name = {(r.group, r.name): r for r in results}

    assert linears_s(by_name, Weights.BF16) == pytest.approx((4 * 32 + 1) * 3e-5)
    assert linears_s(by_name, Weights.INT4_128) is None
    assert goal(results, "int8: times our bf16").measured == pytest.approx(3.0)
    assert goal(results, "int4 group 128").verdict == "not measured"


def test_median_and_spread_of_rounds() -> None:
    assert summarize([1.0, 2.0, 4.0]) == Timing(2.0, 1.5)


def test_unknown_group_is_refused_with_the_known_ones(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        kernels.parse(["--groups", "norms,gemm"])

    assert "gemm: give some of decode-attention" in capsys.readouterr().err


def test_defaults_measure_every_group_into_the_results_folder() -> None:
    options = kernels.parse([])

    assert (options.groups, options.budget_s, options.out) == (
        kernels.GROUPS, 420.0, machine.RESULTS,
    )  # fmt: skip


def test_result_is_stored_by_date_and_commit(tmp_path: Path) -> None:
    about = {"at": "2026-01-02T03:04:05Z", "commit": "abc"}

    path = machine.store("kernels", {"machine": about}, tmp_path / "new")

    assert path == tmp_path / "new" / "kernels-2026-01-02-abc.json"
    assert json.loads(path.read_text()) == {"machine": about}


def test_plot_shows_timed_cases(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from bench.gpu.roofline import draw

    results = [
        timed(DECODE, "d", 1e-3),
        timed(PREFILL, "p", 1e-3, flops=5e11, bound=Bound.MATMUL),
        CaseResult(PREFILL, "w", Status.WRONG, 1.0, 1.0),
    ]
    target = tmp_path / "roofline.png"

    draw(results_json({"commit": "abc", "gpu": "made up"}, CEILINGS, results), target)

    assert target.read_bytes().startswith(b"\x89PNG")
