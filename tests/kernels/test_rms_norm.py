from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels.rms_norm import rms_norm, rms_norm_reference

# Both sides compute in float32 in different orders and round once; the interpreter rounds towards
# zero. So results differ by one unit in the last place, or by float32's error of a sum.
RTOL = {torch.bfloat16: 2**-7, torch.float16: 2**-10, torch.float32: 2e-6}
ATOL = {torch.bfloat16: 1e-6, torch.float16: 1e-6, torch.float32: 1e-6}
EPS = 1e-5
WIDTHS = [1, 63, 64, 80, 1000, 4096]
DTYPES = list(RTOL)


def make_rows(num_rows: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(num_rows * 31 + width)
    return torch.randn(num_rows, width, generator=generator).to(device, dtype)


def assert_close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(
        actual, expected, rtol=RTOL[expected.dtype], atol=ATOL[expected.dtype]
    )


def check(
    num_rows: int, width: int, dtype: torch.dtype, device: torch.device, *, has_residual: bool
) -> None:
    x = make_rows(num_rows, width, dtype, device)
    weight = make_rows(1, width, dtype, device)[0]
    if not has_residual:
        assert_close(
            rms_norm(x, eps=EPS, weight=weight), rms_norm_reference(x, eps=EPS, weight=weight)
        )
        return
    # A grid coarse enough that every sum is exact: rounding the residual is not under test here.
    x = (x * 8).round() / 8
    residual = (x.flip(0) * 4).round() / 4
    expected_residual = residual.clone()
    expected = rms_norm_reference(x, eps=EPS, weight=weight, residual=expected_residual)
    out, returned = rms_norm(x, eps=EPS, weight=weight, residual=residual)
    assert returned is residual
    torch.testing.assert_close(residual, expected_residual, rtol=0, atol=0)
    assert_close(out, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("has_residual", [False, True])
def test_equals_the_reference(
    width: int, dtype: torch.dtype, has_residual: bool, device: torch.device
) -> None:
    check(3, width, dtype, device, has_residual=has_residual)


def test_rows_that_share_a_program(device: torch.device) -> None:
    """Narrow rows are packed once there are many: 1056 of them go two to a program."""
    check(1057, 16, torch.float32, device, has_residual=False)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [*WIDTHS, 2048, 5120, 8192, 14336, 16384])
@pytest.mark.parametrize("num_rows", [1, 2, 63, 1000, 8193])
@pytest.mark.parametrize("has_residual", [False, True])
def test_equals_the_reference_on_a_full_grid(
    num_rows: int, width: int, dtype: torch.dtype, has_residual: bool, device: torch.device
) -> None:
    check(num_rows, width, dtype, device, has_residual=has_residual)


@pytest.mark.parametrize("num_rows", [3, 1100])
def test_strided_rows_leave_what_lies_between_them(num_rows: int, device: torch.device) -> None:
    x = make_rows(num_rows, 96, torch.float32, device)
    wide = [torch.full((num_rows, 128), 7.0, device=device) for _ in range(3)]
    wide_x, wide_residual, wide_out = (w[:, 16:112] for w in wide)
    wide_x.copy_(x)
    wide_residual.copy_(x.flip(1))
    residual = x.flip(1)
    expected = rms_norm_reference(x, eps=EPS, residual=residual)
    out, _ = rms_norm(wide_x, eps=EPS, residual=wide_residual, out=wide_out)
    assert_close(out, expected)
    assert_close(wide_residual, residual)
    for w in wide:
        assert bool((w[:, :16] == 7.0).all()) and bool((w[:, 112:] == 7.0).all())


def test_the_norm_is_of_the_rounded_residual(device: torch.device) -> None:
    """256 + 0.5 is 256 in bfloat16, and that is what is normalised."""
    x = torch.full((1, 8), 0.5, dtype=torch.bfloat16, device=device)
    residual = torch.full((1, 8), 256.0, dtype=torch.bfloat16, device=device)
    out, _ = rms_norm(x, eps=0.0, residual=residual)
    assert residual.tolist() == [[256.0] * 8]
    assert_close(out, torch.ones_like(out))


def test_out_may_be_the_input(device: torch.device) -> None:
    x = make_rows(5, 128, torch.float32, device)
    expected = rms_norm_reference(x, eps=EPS)
    assert rms_norm(x, eps=EPS, out=x) is x
    assert_close(x, expected)


def test_a_row_of_zeros_is_zeros(device: torch.device) -> None:
    out = rms_norm(torch.zeros(2, 64, device=device), eps=EPS)
    assert not out.any()


def test_no_rows(device: torch.device) -> None:
    x = torch.empty(0, 64, device=device)
    assert rms_norm(x, eps=EPS).shape == (0, 64)


def test_two_runs_are_equal(device: torch.device) -> None:
    x = make_rows(7, 1000, torch.bfloat16, device)
    assert torch.equal(rms_norm(x, eps=EPS), rms_norm(x, eps=EPS))


@pytest.mark.gpu
def test_rows_past_2_31_elements(device: torch.device) -> None:
    x = torch.zeros((1 << 31) // 4096 + 2, 4096, dtype=torch.bfloat16, device=device)
    x[-2:] = make_rows(2, 4096, torch.bfloat16, device)
    out = rms_norm(x, eps=EPS, out=x.clone())
    assert_close(out[-2:], rms_norm_reference(x[-2:], eps=EPS))
    assert not out[:-2].any()


@pytest.mark.gpu
def test_dependent_launches_in_a_replayed_graph(device: torch.device) -> None:
    x = make_rows(1, 4096, torch.bfloat16, device)
    weight = torch.full((4096,), 3.0, dtype=torch.bfloat16, device=device)

    def chain() -> Tensor:
        rows = x
        for _ in range(20):
            rows = rms_norm(rows, eps=EPS, weight=weight, launch_pdl=True)
        return rows

    expected = x
    for _ in range(20):
        expected = rms_norm(expected, eps=EPS, weight=weight)
    chain()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = chain()
    for _ in range(3):
        out.fill_(float("nan"))
        graph.replay()
        assert torch.equal(out, expected)


@pytest.mark.parametrize(
    ("x", "options", "message"),
    [
        (torch.zeros(4), {}, r"\[4\]"),
        (torch.zeros(1, 16385), {}, "16384"),
        (torch.zeros(1, 8, dtype=torch.int32), {}, "int32"),
        (torch.zeros(8, 2).T, {}, "column stride"),
        (torch.zeros(2, 8), {"weight": torch.zeros(7)}, r"\[7\].*\[8\]"),
        (torch.zeros(2, 8), {"residual": torch.zeros(1, 8)}, "residual"),
        (torch.zeros(2, 8), {"out": torch.zeros(2, 8).half()}, "out.*float16"),
    ],
)
def test_what_it_refuses(x: Tensor, options: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rms_norm(x, eps=EPS, **options)
