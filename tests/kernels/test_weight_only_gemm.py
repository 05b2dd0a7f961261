"""weight_only_gemm against float32 torch on the dequantised weights."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gemm_cases import Epilogues, assert_close, full_epilogue, poisoned_workspace, rows_apart
from kernels.gemm_epilogue import Epilogue, finish_reference
from kernels.gemm_launch import Tile
from kernels.int4_packing import packed_width
from kernels.weight_only_gemm import (
    candidate_tiles,
    dequantize,
    pack_int4,
    tile_for,
    unpack_int4,
    weight_only_gemm,
    weight_only_gemm_reference,
)

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
E4M3 = torch.float8_e4m3fn
KINDS: list[torch.dtype | int] = [torch.int8, E4M3, 32, 64, 128]


def _quantised(
    kind: torch.dtype | int, n: int, k: int, device: torch.device
) -> tuple[Tensor, Tensor, int | None]:
    """(weight, scale, group_size) of `kind`: a dtype, or the group size of int4."""
    if isinstance(kind, int):
        q = torch.randint(-8, 8, (n, k), dtype=torch.int8, device=device)
        scale = (torch.rand(n, -(-k // kind), device=device) + 0.1) / (5 * k**0.5)
        return pack_int4(q, group_size=kind), scale, kind
    if kind == torch.int8:
        weight = torch.randint(-128, 128, (n, k), dtype=torch.int8, device=device)
        return weight, (torch.rand(n, device=device) + 0.1) / (70 * k**0.5), None
    # Down to the smallest e4m3, which bfloat16 reaches by a product.
    exponents = torch.randint(-9, 6, (n, k), device=device)
    weight = torch.ldexp(torch.randn(n, k, device=device), exponents).clamp(-448, 448).to(kind)
    return weight, (torch.rand(n, device=device) + 0.1) / (10 * k**0.5), None


def _check(
    kind: torch.dtype | int,
    num_rows: int,
    n: int,
    k: int,
    device: torch.device,
    *,
    dtype: torch.dtype = BF16,
    swiglu: bool = False,
    tile: Tile | None = None,
) -> None:
    torch.manual_seed(num_rows * n + k)
    epilogue = full_epilogue(num_rows, n, dtype, device, swiglu=swiglu)
    x = rows_apart(num_rows, k, dtype, device)
    weight, scale, group_size = _quantised(kind, n * epilogue.rows_per_column, k, device)
    operands = {**epilogue._asdict(), "group_size": group_size}
    expected = weight_only_gemm_reference(x, weight, scale, **operands)
    actual = weight_only_gemm(x, weight, scale, tile=tile, **operands)
    tile = tile or tile_for(num_rows, len(weight), k, group_size=group_size)
    if group_size is not None and isinstance(tile, Tile) and tile.block_m >= 128 and dtype == BF16:
        # With many rows, weights are rounded once they are scaled. Behind SwiGLU what that leaves
        # is multiplied by the other half, so that no bound of the results holds for all of
        # millions and is still narrow: the sums are compared with those of the rounded weights,
        # and the rounding as a whole with what two steps of 2^-8 / sqrt(12) leave.
        rounded = _product_of_rounded(x, weight, scale, group_size, epilogue)
        assert_close(actual, rounded)
        error = (rounded.float() - expected.float()).norm() / expected.float().norm()
        assert error < 4e-3
    else:
        assert_close(actual, expected)


def _product_of_rounded(
    x: Tensor, weight: Tensor, scale: Tensor, group_size: int, epilogue: Epilogues
) -> Tensor:
    """The reference's result with scales, and weights after they are scaled, in bfloat16."""
    rounded = dequantize(weight, scale.to(BF16), x.shape[1], group_size).to(BF16)
    layer = Epilogue(epilogue.bias, epilogue.residual, epilogue.rms_eps, epilogue.swiglu)
    num_columns = len(weight) // epilogue.rows_per_column
    out = torch.empty(x.shape[0], num_columns, dtype=BF16, device=x.device)
    return finish_reference(x.float() @ rounded.float().T, x, layer, out)


def _small_tile(kind: torch.dtype | int, num_splits: int = 2) -> Tile:
    block_k = 4 * min(kind, 64) if isinstance(kind, int) else 64
    return Tile(16, 32, block_k, num_splits=num_splits)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("num_rows", "n", "k"), [(1, 1, 96), (3, 63, 300), (17, 70, 544)])
def test_product_with_norm_bias_and_residual(
    kind: torch.dtype | int, num_rows: int, n: int, k: int, device: torch.device
) -> None:
    _check(kind, num_rows, n, k, device)


@pytest.mark.parametrize("kind", KINDS)
def test_swiglu_and_split_k(kind: torch.dtype | int, device: torch.device) -> None:
    _check(kind, 5, 37, 1000, device, swiglu=True, tile=_small_tile(kind))


@pytest.mark.parametrize("kind", [torch.int8, 128])
def test_many_rows(kind: torch.dtype | int, device: torch.device) -> None:
    _check(kind, 130, 40, 256, device)


@pytest.mark.parametrize("kind", [torch.int8, E4M3])
def test_channel_weights_without_tensor_cores(kind: torch.dtype, device: torch.device) -> None:
    _check(kind, 2, 21, 200, device, tile=Tile(2, 4, 64, uses_dot=False))


@pytest.mark.parametrize("dtype", [FP16, FP32])
@pytest.mark.parametrize("kind", [torch.int8, E4M3, 32])
def test_other_input_dtypes(
    kind: torch.dtype | int, dtype: torch.dtype, device: torch.device
) -> None:
    _check(kind, 3, 33, 160, device, dtype=dtype)


@pytest.mark.parametrize("scale_dtype", [BF16, FP32])
def test_scales_in_either_layout_and_dtype(scale_dtype: torch.dtype, device: torch.device) -> None:
    weight, scale, group_size = _quantised(64, 20, 256, device)
    scale = scale.to(scale_dtype)
    x = torch.randn(2, 256, device=device).to(BF16)
    expected = weight_only_gemm_reference(x, weight, scale, group_size=group_size)
    by_group = scale.t().contiguous().t()
    assert_close(weight_only_gemm(x, weight, by_group, group_size=group_size), expected)


def test_split_k_gives_the_same_bits_twice(device: torch.device) -> None:
    weight, scale, group_size = _quantised(32, 40, 512, device)
    x = torch.randn(3, 512, device=device).to(BF16)
    workspace = poisoned_workspace(device)
    runs = [
        weight_only_gemm(
            x,
            weight,
            scale,
            group_size=group_size,
            rms_eps=1e-5,
            tile=_small_tile(32, num_splits=3),
            workspace=workspace,
        )
        for _ in range(2)
    ]
    assert torch.equal(runs[0], runs[1])
    assert int(workspace.counters.abs().sum()) == 0


def test_every_e4m3_value_is_widened(device: torch.device) -> None:
    values = torch.arange(256, dtype=torch.uint8, device=device)
    finite = (values & 0x7F) != 0x7F
    weight = torch.where(finite, values, 0).view(E4M3)[:, None].repeat(1, 16).contiguous()
    x = torch.zeros(1, 16, dtype=BF16, device=device)
    x[0, 3] = 1
    y = weight_only_gemm(x, weight, torch.ones(256, device=device))
    assert torch.equal(y[0].float(), weight[:, 3].float())


def test_every_int8_value_is_widened(device: torch.device) -> None:
    weight = torch.arange(-128, 128, device=device).to(torch.int8)[:, None].repeat(1, 16)
    x = torch.zeros(1, 16, dtype=BF16, device=device)
    x[0, 5] = 1
    y = weight_only_gemm(x, weight.contiguous(), torch.ones(256, device=device))
    assert torch.equal(y[0].float(), weight[:, 5].float())


@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_int4_unpacks_to_what_was_packed(group_size: int, device: torch.device) -> None:
    for k in (1, 31, 256, 1000):
        q = torch.randint(-8, 8, (7, k), dtype=torch.int8, device=device)
        packed = pack_int4(q, group_size=group_size)
        assert packed.shape == (7, packed_width(k, group_size))
        assert torch.equal(unpack_int4(packed, k, group_size=group_size), q)


def test_int4_packs_half_a_byte_a_weight_where_chunks_are_full() -> None:
    for k in (4096, 14336, 11008, 8192, 2048):
        assert packed_width(k, 128) * 2 == k // 2


def test_dequantize_repeats_a_scale_over_its_group() -> None:
    q = torch.randint(-8, 8, (3, 70), dtype=torch.int8)
    scale = torch.rand(3, 3)
    expected = q.float() * scale.repeat_interleave(32, dim=1)[:, :70]
    assert torch.equal(dequantize(pack_int4(q, group_size=32), scale, 70, 32), expected)


def test_no_rows(device: torch.device) -> None:
    weight, scale, _ = _quantised(torch.int8, 20, 64, device)
    x = torch.empty(0, 64, dtype=BF16, device=device)
    assert weight_only_gemm(x, weight, scale).shape == (0, 20)


def test_wrong_operands_are_refused_with_the_numbers(device: torch.device) -> None:
    x = torch.randn(2, 256, device=device).to(BF16)
    weight, scale, _ = _quantised(torch.int8, 20, 256, device)
    packed, scales, _ = _quantised(64, 20, 256, device)
    with pytest.raises(ValueError, match="group_size is None"):
        weight_only_gemm(x, packed, scales)
    with pytest.raises(ValueError, match="group_size is 64"):
        weight_only_gemm(x, weight, scale, group_size=64)
    with pytest.raises(ValueError, match=r"group_size is 48.*32, 64, 128"):
        weight_only_gemm(x, packed, scales, group_size=48)
    with pytest.raises(ValueError, match=r"scale is \(20, 4\).*\(20, 8\)"):
        weight_only_gemm(x, packed, scales, group_size=32)
    with pytest.raises(ValueError, match=r"scale has shape \(10,\)"):
        weight_only_gemm(x, weight, scale[:10])
    with pytest.raises(ValueError, match=r"weight is torch\.uint8"):
        weight_only_gemm(x, weight.to(torch.uint8), scale)
    with pytest.raises(ValueError, match=r"q spans -9\.\.7"):
        pack_int4(torch.tensor([[-9, 7]], dtype=torch.int8), group_size=32)


@pytest.mark.parametrize("kind", KINDS)
def test_table_leads_the_candidates(kind: torch.dtype | int) -> None:
    group_size = kind if isinstance(kind, int) else None
    for num_rows in (1, 3, 8, 9, 16, 33, 64, 65, 1000):
        for n, k in [(6144, 4096), (4096, 14336), (1, 32)]:
            tiles = candidate_tiles(num_rows, n, k, group_size=group_size)
            assert tiles[0] == tile_for(num_rows, n, k, group_size=group_size)
            assert len(set(tiles)) == len(tiles)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("swiglu", [False, True])
def test_grid_of_shapes(kind: torch.dtype | int, swiglu: bool, device: torch.device) -> None:
    for num_rows in (1, 3, 17, 33, 64, 65, 1000):
        for n, k in [(63, 1000), (4096, 4096), (6144, 11008)]:
            _check(kind, num_rows, n, k, device, swiglu=swiglu)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [torch.int8, E4M3, 128])
@pytest.mark.parametrize("num_rows", [1, 8, 64, 1024])
def test_candidate_tiles_agree(
    num_rows: int, kind: torch.dtype | int, device: torch.device
) -> None:
    group_size = kind if isinstance(kind, int) else None
    for tile in candidate_tiles(num_rows, 4096, 4096, group_size=group_size)[::9]:
        _check(kind, num_rows, 4096, 4096, device, tile=tile)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [torch.int8, E4M3, 64])
@pytest.mark.parametrize(("n", "k"), [(28672, 4096), (4096, 14336)])
def test_prompts_of_real_layers(
    n: int, k: int, kind: torch.dtype | int, device: torch.device
) -> None:
    """Products that one step leaves under way must not read what the next overwrites."""
    weight, scale, group_size = _quantised(kind, n, k, device)
    for num_rows in (128, 256, 1024, 4096):
        x = torch.randn(num_rows, k, device=device).to(BF16)
        runs = [weight_only_gemm(x, weight, scale, group_size=group_size) for _ in range(2)]
        assert torch.equal(runs[0], runs[1])
        expected = weight_only_gemm_reference(x, weight, scale, group_size=group_size).float()
        error = (runs[0].float() - expected).norm(dim=-1) / expected.norm(dim=-1)
        assert float(error.max()) < 5e-3


@pytest.mark.slow
@pytest.mark.gpu
@pytest.mark.parametrize("num_rows", [1, 64, 256])
def test_weights_past_two_to_the_31_elements(num_rows: int, device: torch.device) -> None:
    n, k = 600_000, 4096
    x = torch.randn(num_rows, k, device=device).to(BF16)
    weight = torch.randint(-128, 128, (n, k), dtype=torch.int8, device=device)
    scale = torch.full((n,), 1e-4, device=device)
    y = weight_only_gemm(x, weight, scale)
    last = slice(n - 1000, n)
    assert_close(y[:, last], weight_only_gemm_reference(x, weight[last], scale[last]))
