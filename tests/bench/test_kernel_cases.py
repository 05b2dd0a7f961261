"""The kernel benchmark's cases: what they claim to move and compute, and that they run."""

from __future__ import annotations

import pytest
import torch

from bench import kernels
from bench.gpu.attention_cases import decode_case, prefill_case
from bench.gpu.attention_inputs import Heads
from bench.gpu.cases import OURS, OURS_PDL, TINY_SCALE, Bound, relative_error, worst
from bench.gpu.gemm_cases import gemm_case
from bench.gpu.gemm_inputs import Weights


def test_decode_bytes_are_keys_values_queries_and_outputs() -> None:
    case = decode_case(TINY_SCALE, "", Heads(8, 2, 32), 3, 20, 16, torch.bfloat16)

    # K and V: 3 sequences of 20 tokens, 2 heads of 32 in 2 bytes; 3 x 8 x 32 queries and outputs.
    assert case.num_bytes == 2 * 3 * 20 * 2 * 32 * 2 + 2 * 3 * 8 * 32 * 2
    assert case.flops == 4 * 3 * 20 * 8 * 32
    assert case.bound is Bound.COPY


def test_prefill_flops_count_visible_pairs_only() -> None:
    case = prefill_case(TINY_SCALE, "", Heads(4, 2, 32), 1, 2, 3, 16, torch.bfloat16)

    # Three queries behind two cached tokens see 3, 4 and 5 keys.
    assert case.flops == 4 * (3 + 4 + 5) * 4 * 32
    assert case.num_bytes == 2 * 5 * 2 * 32 * 2 + 2 * 3 * 4 * 32 * 2


@pytest.mark.parametrize(
    ("kind", "weight_bytes"),
    [
        (Weights.BF16, 2 * 64 * 256),
        (Weights.INT8, 64 * 256 + 4 * 64),
        (Weights.INT4_128, 64 * 256 / 2 + 2 * 64 * 2),
    ],
)
def test_gemm_bytes_are_weights_scales_and_both_sides(kind: Weights, weight_bytes: float) -> None:
    case = gemm_case(TINY_SCALE, "g", "", kind, 8, 64, 256)

    assert case.num_bytes == weight_bytes + 2 * 8 * (64 + 256)
    assert case.flops == 2 * 8 * 64 * 256
    assert case.bound is Bound.READ
    assert {OURS, OURS_PDL, "cublas"} <= set(case.contenders)


def test_products_of_many_rows_are_held_against_the_tensor_cores() -> None:
    bf16 = gemm_case(TINY_SCALE, "g", "", Weights.INT8, 70, 64, 256)
    fp8 = gemm_case(TINY_SCALE, "g", "", Weights.W8A8, 70, 64, 256)

    assert (bf16.bound, fp8.bound) == (Bound.MATMUL, Bound.FP8_MATMUL)
    assert OURS_PDL not in bf16.contenders


def test_one_wrong_row_shows_in_the_error() -> None:
    expected = torch.ones(1000, 64)
    actual = expected.clone()
    actual[17] *= 1.5

    assert relative_error(actual, expected) == pytest.approx(0.5)
    assert relative_error(expected, expected) == 0


def test_error_of_an_unwritten_result_is_no_number() -> None:
    error = relative_error(torch.tensor([[float("nan"), 1.0]]), torch.ones(1, 2))

    assert error != error


def test_worst_error_is_no_number_wherever_that_stands() -> None:
    for errors in ((0.1, float("nan")), (float("nan"), 0.1)):
        assert worst(errors) != worst(errors)
    assert worst((0.25, 0.5)) == 0.5


def test_names_of_cases_are_unique_within_their_group() -> None:
    planned = kernels.plan(TINY_SCALE, kernels.GROUPS)
    names = [(case.group, case.name) for case in planned]

    assert len(set(names)) == len(names)
    assert {group for group, _ in names} == set(kernels.GROUPS)


SUBSET = (
    ("decode-attention", "128 x 4096 h32/8 d128 block 64"),
    ("prefill-attention", "1 x 8192 h32/8 d128 block 64"),
    ("skinny-gemm", "gate_up 28672 x 4096, 8 rows"),
    ("weight-only-gemm", "o 4096 x 4096, 1 rows"),
    ("weight-only-gemm", "down 4096 x 14336, 1024 rows"),
    ("fp8-gemm", "qkv 6144 x 4096, 8 rows"),
    ("fp8-gemm", "quantize rows 64"),
    ("sampling", " 8 x"),
    ("norms", " 8 x"),
    ("rope", " 8 tokens"),
    ("block-copy", "128 KiB"),
)


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
@pytest.mark.parametrize(("group", "only"), SUBSET)
def test_dry_run_finds_every_result_right(
    group: str, only: str, capsys: pytest.CaptureFixture[str]
) -> None:
    status = kernels.main(["--dry-run", "--groups", group, "--only", only])

    printed = capsys.readouterr().out
    assert status == 0, printed
    assert "CHECKED" in printed
