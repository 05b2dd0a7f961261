"""dequantize_weight against float32 torch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels.dequantize_weight import dequantize_weight, dequantize_weight_reference
from kernels.int4_packing import pack_int4

BF16 = torch.bfloat16
E4M3 = torch.float8_e4m3fn
KINDS: list[torch.dtype | int] = [torch.int8, E4M3, 32, 64, 128]


def _quantised(
    kind: torch.dtype | int, n: int, k: int, device: torch.device
) -> tuple[Tensor, Tensor, int | None]:
    """(weight, scale, group_size) of `kind`: a dtype, or the group size of int4."""
    if isinstance(kind, int):
        q = torch.randint(-8, 8, (n, k), dtype=torch.int8, device=device)
        scale = torch.randn(-(-k // kind), n, device=device).to(torch.float16).t()
        return pack_int4(q, group_size=kind), scale, kind
    weight = torch.randint(-127, 128, (n, k), dtype=torch.int8, device=device)
    return weight.float().to(kind), torch.randn(n, device=device), None


def _check(
    kind: torch.dtype | int, n: int, k: int, device: torch.device, dtype: torch.dtype = BF16
) -> None:
    torch.manual_seed(n + k)
    weight, scale, group_size = _quantised(kind, n, k, device)
    wide = torch.full((n + 2, k + 8), float("nan"), dtype=dtype, device=device)
    out = wide[1 : n + 1, :k]
    expected = dequantize_weight_reference(
        weight, scale, group_size=group_size, out=torch.empty_like(out)
    )
    assert dequantize_weight(weight, scale, group_size=group_size, out=out) is out
    assert torch.equal(out, expected)
    assert bool(wide[:, k:].isnan().all()) and bool(wide[[0, -1]].isnan().all())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n", "k"), [(1, 96), (9, 1100), (16, 256)])
def test_numbers_times_scales(
    kind: torch.dtype | int, n: int, k: int, device: torch.device
) -> None:
    _check(kind, n, k, device)


@pytest.mark.parametrize("kind", [torch.int8, 64])
def test_float32_out(kind: torch.dtype | int, device: torch.device) -> None:
    _check(kind, 3, 200, device, torch.float32)


def test_part_of_the_rows(device: torch.device) -> None:
    weight, scale, group_size = _quantised(64, 20, 256, device)
    whole, part = (torch.empty(rows, 256, dtype=BF16, device=device) for rows in (20, 5))
    dequantize_weight(weight, scale, group_size=group_size, out=whole)
    dequantize_weight(weight[7:12], scale[7:12], group_size=group_size, out=part)
    assert torch.equal(whole[7:12], part)


def test_wrong_operands_are_refused_with_the_numbers(device: torch.device) -> None:
    weight, scale, _ = _quantised(torch.int8, 20, 64, device)
    out = torch.empty(20, 64, dtype=BF16, device=device)
    with pytest.raises(ValueError, match=r"\(19, 64\).*\(20, 64\)"):
        dequantize_weight(weight[:19], scale[:19], out=out)
    with pytest.raises(ValueError, match="contiguous"):
        dequantize_weight(weight, scale, out=torch.empty(64, 20, dtype=BF16, device=device).t())


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_real_shapes(kind: torch.dtype | int, device: torch.device) -> None:
    for n, k in [(4096, 14336), (6144, 4096), (63, 1000)]:
        _check(kind, n, k, device)
