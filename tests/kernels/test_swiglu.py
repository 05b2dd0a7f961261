from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels.swiglu import swiglu, swiglu_reference

# Float32 on both sides, rounded once; the interpreter rounds towards zero. One unit in the last
# place of the result, and for float32 the exponential's own error.
RTOL = {torch.bfloat16: 2**-7, torch.float16: 2**-10, torch.float32: 2e-6}
ATOL = {torch.bfloat16: 1e-6, torch.float16: 1e-6, torch.float32: 1e-6}
DTYPES = list(RTOL)
WIDTHS = [1, 63, 96, 1000, 2753]


def make_rows(num_rows: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(num_rows * 31 + width)
    return (3 * torch.randn(num_rows, width, generator=generator)).to(device, dtype)


def assert_close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(
        actual, expected, rtol=RTOL[expected.dtype], atol=ATOL[expected.dtype]
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("num_rows", [1, 3])
def test_equals_the_reference(
    num_rows: int, width: int, dtype: torch.dtype, device: torch.device
) -> None:
    gate_up = make_rows(num_rows, 2 * width, dtype, device)
    assert_close(swiglu(gate_up), swiglu_reference(gate_up))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [*WIDTHS, 8192, 11008, 14336])
@pytest.mark.parametrize("num_rows", [1, 2, 63, 1000, 8193])
def test_equals_the_reference_on_a_full_grid(
    num_rows: int, width: int, dtype: torch.dtype, device: torch.device
) -> None:
    gate_up = make_rows(num_rows, 2 * width, dtype, device)
    assert_close(swiglu(gate_up), swiglu_reference(gate_up))


def test_row_scale_multiplies_gate_and_up(device: torch.device) -> None:
    gate_up = make_rows(5, 200, torch.float32, device)
    row_scale = torch.tensor([1.0, 0.0, 2.0, -1.0, 1e-3], device=device)
    expected = swiglu(gate_up * row_scale[:, None])
    assert_close(swiglu(gate_up, row_scale=row_scale), expected)
    assert_close(swiglu_reference(gate_up, row_scale=row_scale), expected)


def test_strided_rows_leave_what_lies_between_them(device: torch.device) -> None:
    wide = torch.full((3, 256), 7.0, device=device)
    wide_out = torch.full((3, 128), 7.0, device=device)
    wide[:, 16:216] = make_rows(3, 200, torch.float32, device)
    out = swiglu(wide[:, 16:216], out=wide_out[:, 8:108])
    assert_close(out, swiglu_reference(wide[:, 16:216].contiguous()))
    assert bool((wide_out[:, :8] == 7.0).all()) and bool((wide_out[:, 108:] == 7.0).all())


@pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")
def test_extreme_gates_neither_overflow_nor_vanish(device: torch.device) -> None:
    gates = torch.tensor([-200.0, -88.0, 0.0, 88.0, 3e38], device=device)
    out = swiglu(torch.cat((gates, torch.ones(5, device=device)))[None])
    assert_close(out, torch.tensor([[0.0, 0.0, 0.0, 88.0, 3e38]], device=device))


def test_no_rows(device: torch.device) -> None:
    assert swiglu(torch.empty(0, 64, device=device)).shape == (0, 32)


def test_two_runs_are_equal(device: torch.device) -> None:
    gate_up = make_rows(4, 2000, torch.bfloat16, device)
    assert torch.equal(swiglu(gate_up), swiglu(gate_up))


@pytest.mark.gpu
def test_rows_past_2_31_elements(device: torch.device) -> None:
    width = 16384
    gate_up = torch.zeros((1 << 31) // (2 * width) + 2, 2 * width, device=device).bfloat16()
    gate_up[-2:] = make_rows(2, 2 * width, torch.bfloat16, device)
    out = swiglu(gate_up)
    assert_close(out[-2:], swiglu_reference(gate_up[-2:]))
    assert not out[:-2].any()


@pytest.mark.parametrize(
    ("gate_up", "options", "message"),
    [
        (torch.zeros(2, 7), {}, r"\[2, 7\]"),
        (torch.zeros(2, 8, dtype=torch.int32), {}, "int32"),
        (torch.zeros(8, 2).T, {}, "column stride"),
        (torch.zeros(2, 8), {"out": torch.zeros(2, 8)}, r"\[2, 4\]"),
        (torch.zeros(2, 8), {"row_scale": torch.zeros(2).half()}, "row_scale.*float16"),
    ],
)
def test_what_it_refuses(gate_up: Tensor, options: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        swiglu(gate_up, **options)
