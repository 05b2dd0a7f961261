from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from kernels.rope_kv_write import FP8, rope_kv_write, rope_kv_write_reference

# Float32 on both sides, in the same order up to fused multiply-adds, and rounded once: one unit in
# the last place of a result, and absolutely, float32's error of the products it is a sum of.
RTOL = {torch.bfloat16: 2**-7, torch.float16: 2**-10, torch.float32: 2e-6, FP8: 2**-3}
ATOL = {torch.bfloat16: 1e-6, torch.float16: 1e-6, torch.float32: 1e-6, FP8: 2**-9}
MAX_POSITIONS = 64
EPS = 1e-6
PATTERN = 0x2B


@dataclass(frozen=True)
class Shape:
    num_tokens: int = 3
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 64
    block_size: int = 16
    num_blocks: int = 5
    num_layers: int = 2
    dtype: torch.dtype = torch.float32
    pool_dtype: torch.dtype | None = None
    has_norms: bool = False
    has_scales: bool = False

    @property
    def width(self) -> int:
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim


@dataclass
class Inputs:
    qkv: Tensor
    positions: Tensor
    cos_sin: Tensor
    pool: Tensor
    slot_mapping: Tensor
    options: dict[str, Tensor | None]


def make_cos_sin(head_dim: int, device: torch.device) -> Tensor:
    frequencies = 10000.0 ** (-torch.arange(0, head_dim, 2) / head_dim)
    angles = torch.arange(MAX_POSITIONS)[:, None] * frequencies
    return torch.cat((angles.cos(), angles.sin()), dim=-1).to(device)


def make_inputs(shape: Shape, device: torch.device) -> Inputs:
    """Distinct random slots and positions; the pool's bytes are a pattern that must stay."""
    generator = torch.Generator().manual_seed(shape.width + shape.num_tokens)
    qkv = torch.randn(shape.num_tokens, shape.width, generator=generator)
    pool_dtype = shape.pool_dtype or shape.dtype
    pool_shape = (
        shape.num_blocks,
        shape.num_kv_heads,
        shape.num_layers,
        2,
        shape.block_size,
        shape.head_dim,
    )
    num_bytes = torch.Size(pool_shape).numel() * pool_dtype.itemsize
    raw = torch.full((num_bytes,), PATTERN, dtype=torch.uint8, device=device)
    num_slots = shape.num_blocks * shape.block_size
    slots = torch.randperm(num_slots, generator=generator)[: shape.num_tokens]
    positions = torch.randint(0, MAX_POSITIONS, (shape.num_tokens,), generator=generator)
    gains = torch.rand(2, shape.head_dim, generator=generator) + 0.5
    scales = torch.rand(2, shape.num_kv_heads, generator=generator) * 0.1 + 0.01
    return Inputs(
        qkv=qkv.to(device, shape.dtype),
        positions=positions.to(device),
        cos_sin=make_cos_sin(shape.head_dim, device),
        pool=raw.view(pool_dtype).view(pool_shape),
        slot_mapping=slots.to(device),
        options={
            "q_norm": gains[0].to(device, shape.dtype) if shape.has_norms else None,
            "k_norm": gains[1].to(device, shape.dtype) if shape.has_norms else None,
            "k_scale": scales[0].to(device) if shape.has_scales else None,
            "v_scale": scales[1].to(device) if shape.has_scales else None,
        },
    )


def copy_of(inputs: Inputs) -> Inputs:
    return replace(inputs, qkv=inputs.qkv.clone(), pool=inputs.pool.clone())


def write(inputs: Inputs, shape: Shape, layer: int = 1) -> Tensor:
    return rope_kv_write(
        inputs.qkv,
        inputs.positions,
        inputs.cos_sin,
        inputs.pool,
        inputs.slot_mapping,
        layer=layer,
        num_heads=shape.num_heads,
        eps=EPS,
        **inputs.options,
    )


def write_reference(inputs: Inputs, shape: Shape, layer: int = 1) -> Tensor:
    return rope_kv_write_reference(
        inputs.qkv,
        inputs.positions,
        inputs.cos_sin,
        inputs.pool,
        inputs.slot_mapping,
        layer=layer,
        num_heads=shape.num_heads,
        eps=EPS,
        **inputs.options,
    )


def assert_close(actual: Tensor, expected: Tensor) -> None:
    dtype = expected.dtype
    torch.testing.assert_close(
        actual.float(), expected.float(), rtol=RTOL[dtype], atol=ATOL[dtype], equal_nan=True
    )


def bytes_of(pool: Tensor) -> Tensor:
    return pool.contiguous().view(torch.uint8)


def check(shape: Shape, device: torch.device) -> None:
    actual = make_inputs(shape, device)
    expected = copy_of(actual)
    pool_before = bytes_of(actual.pool).clone()
    queries = write(actual, shape)
    assert_close(queries, write_reference(expected, shape))
    assert queries.shape == (shape.num_tokens, shape.num_heads, shape.head_dim)
    assert queries.data_ptr() == actual.qkv.data_ptr()
    assert_close(actual.qkv, expected.qkv)
    assert_close(actual.pool[:, :, 1], expected.pool[:, :, 1])
    written = torch.zeros(shape.num_blocks * shape.block_size, dtype=torch.bool, device=device)
    written[actual.slot_mapping] = True
    written = written.view(shape.num_blocks, 1, 1, 1, shape.block_size, 1)
    is_layer = torch.arange(shape.num_layers, device=device).view(-1, 1, 1, 1) == 1
    restored = torch.where(written & is_layer, pool_before, bytes_of(actual.pool))
    assert torch.equal(restored, pool_before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("has_norms", [False, True])
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 192, 256])
def test_every_head_dim_and_dtype(
    head_dim: int, has_norms: bool, dtype: torch.dtype, device: torch.device
) -> None:
    check(Shape(head_dim=head_dim, dtype=dtype, has_norms=has_norms), device)


@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads"),
    [(1, 1), (2, 1), (4, 1), (8, 1), (16, 1), (9, 3), (24, 8), (32, 8), (32, 32), (7, 7), (12, 2)],
)
def test_every_group_size(num_heads: int, num_kv_heads: int, device: torch.device) -> None:
    check(Shape(num_heads=num_heads, num_kv_heads=num_kv_heads, num_tokens=2), device)


@pytest.mark.parametrize("block_size", [1, 16, 32, 64])
def test_every_block_size(block_size: int, device: torch.device) -> None:
    check(Shape(block_size=block_size, num_tokens=5), device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("has_scales", [False, True])
def test_eight_bit_pool(has_scales: bool, dtype: torch.dtype, device: torch.device) -> None:
    check(Shape(dtype=dtype, pool_dtype=FP8, has_scales=has_scales, head_dim=128), device)


def test_many_tokens_take_the_larger_tile(device: torch.device) -> None:
    check(Shape(num_tokens=512, num_blocks=40, num_heads=3, num_kv_heads=1, head_dim=16), device)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 192, 256])
@pytest.mark.parametrize(("num_tokens", "block_size"), [(1, 16), (63, 32), (1000, 64)])
def test_full_grid(
    num_tokens: int, block_size: int, head_dim: int, dtype: torch.dtype, device: torch.device
) -> None:
    shape = Shape(
        num_tokens=num_tokens,
        num_heads=16,
        num_kv_heads=4,
        head_dim=head_dim,
        block_size=block_size,
        num_blocks=1000 // block_size + 2,
        dtype=dtype,
    )
    check(shape, device)
    check(replace(shape, has_norms=True, pool_dtype=FP8, has_scales=True), device)


@pytest.mark.gpu
@pytest.mark.parametrize("num_kv_heads", [1, 2, 3, 8])
@pytest.mark.parametrize("group_size", [1, 2, 3, 4, 6, 8, 16])
def test_group_sizes_over_many_tokens(
    group_size: int, num_kv_heads: int, device: torch.device
) -> None:
    num_heads = group_size * num_kv_heads
    shape = Shape(num_heads=num_heads, num_kv_heads=num_kv_heads, num_blocks=64, block_size=64)
    for num_tokens in (1, 511, 3000):
        check(replace(shape, num_tokens=num_tokens, dtype=torch.bfloat16), device)


def test_keys_and_values_land_in_their_slots(device: torch.device) -> None:
    """At position 0 nothing turns, so what is stored is what was projected."""
    shape = Shape(num_tokens=2, num_heads=2, num_kv_heads=2, head_dim=16, block_size=16)
    inputs = make_inputs(shape, device)
    inputs.positions = torch.zeros(2, dtype=torch.int32, device=device)
    inputs.slot_mapping = torch.tensor([3 * 16 + 5, 0], device=device)
    heads = inputs.qkv.clone().view(2, 6, 16)
    queries = write(inputs, shape, layer=0)
    assert torch.equal(queries, heads[:, :2])
    assert torch.equal(inputs.pool[3, :, 0, 0, 5], heads[0, 2:4])
    assert torch.equal(inputs.pool[3, :, 0, 1, 5], heads[0, 4:6])
    assert torch.equal(inputs.pool[0, :, 0, 0, 0], heads[1, 2:4])


def test_scores_depend_on_distance_alone(device: torch.device) -> None:
    shape = Shape(num_tokens=4, num_heads=1, num_kv_heads=1, head_dim=64)
    inputs = make_inputs(shape, device)
    inputs.qkv[:] = inputs.qkv[0]
    inputs.positions = torch.tensor([3, 10, 40, 47], device=device)
    inputs.slot_mapping = torch.arange(4, device=device)
    queries = write(inputs, shape, layer=0)[:, 0]
    keys = inputs.pool[0, 0, 0, 0, :4]
    torch.testing.assert_close(queries[1] @ keys[0], queries[3] @ keys[2], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_padding_writes_nothing_and_reads_no_angle(
    dtype: torch.dtype, device: torch.device
) -> None:
    shape = Shape(num_tokens=4, dtype=dtype)
    inputs = make_inputs(shape, device)
    inputs.slot_mapping[[0, 2]] = -1
    # What a captured graph leaves in rows that no sequence uses.
    inputs.positions[[0, 2]] = torch.tensor([1 << 40, -(1 << 40)], device=device)
    inputs.qkv[0] = float("nan")
    expected = copy_of(inputs)
    before = inputs.qkv.clone()
    write(inputs, shape)
    write_reference(expected, shape)
    assert_close(inputs.qkv, expected.qkv)
    assert torch.equal(inputs.qkv[2], before[2]) and bool(inputs.qkv[0].isnan().all())
    assert_close(inputs.pool, expected.pool)
    assert not inputs.pool.isnan().any()


def test_only_padding(device: torch.device) -> None:
    shape = Shape()
    inputs = make_inputs(shape, device)
    inputs.slot_mapping.fill_(-1)
    before = copy_of(inputs)
    write(inputs, shape)
    assert torch.equal(inputs.qkv, before.qkv)
    assert torch.equal(bytes_of(inputs.pool), bytes_of(before.pool))


def test_no_tokens(device: torch.device) -> None:
    shape = Shape(num_tokens=0)
    assert write(make_inputs(shape, device), shape).shape == (0, 4, 64)


def test_eight_bit_values_saturate_and_are_never_nan(device: torch.device) -> None:
    shape = Shape(num_tokens=1, num_heads=1, num_kv_heads=1, head_dim=16, pool_dtype=FP8)
    inputs = make_inputs(shape, device)
    inputs.positions.zero_()
    inputs.slot_mapping.zero_()
    inf, nan = float("inf"), float("nan")
    values = [1e30, -1e30, inf, -inf, nan, 448.0, -448.0, 0.0, 460.0, 464.0, 480.0, 1.0]
    inputs.qkv[0, 32 : 32 + len(values)] = torch.tensor(values, device=device)
    write(inputs, shape, layer=0)
    expected = [448.0, -448.0, 448.0, -448.0, 0.0, 448.0, -448.0, 0.0, 448.0, 448.0, 448.0, 1.0]
    assert inputs.pool[0, 0, 0, 1, 0, : len(values)].tolist() == expected


def test_scales_divide_what_is_stored(device: torch.device) -> None:
    shape = Shape(num_tokens=1, num_heads=2, num_kv_heads=2, head_dim=16, pool_dtype=FP8)
    inputs = make_inputs(shape, device)
    inputs.qkv.fill_(6.0)
    inputs.positions.zero_()
    inputs.slot_mapping.zero_()
    inputs.options["k_scale"] = torch.tensor([0.5, 2.0], device=device)
    inputs.options["v_scale"] = torch.tensor([4.0, 1.0], device=device)
    write(inputs, shape, layer=0)
    stored = inputs.pool[0, :, 0, :, 0].float()
    assert stored[:, :, 0].tolist() == [[12.0, 1.5], [3.0, 6.0]]
    assert bool((stored == stored[..., :1]).all())


def test_strided_rows_leave_what_lies_between_them(device: torch.device) -> None:
    shape = Shape()
    inputs = make_inputs(shape, device)
    expected = copy_of(inputs)
    wide = torch.full((shape.num_tokens, shape.width + 64), 7.0, device=device)
    wide[:, 32:-32] = inputs.qkv
    inputs.qkv = wide[:, 32:-32]
    write(inputs, shape)
    write_reference(expected, shape)
    assert_close(inputs.qkv, expected.qkv)
    assert_close(inputs.pool, expected.pool)
    assert bool((wide[:, :32] == 7.0).all()) and bool((wide[:, -32:] == 7.0).all())


def test_pool_that_is_a_slice_of_heads_and_blocks(device: torch.device) -> None:
    shape = Shape()
    inputs = make_inputs(shape, device)
    expected = copy_of(inputs)
    larger = make_inputs(replace(shape, num_kv_heads=5, num_blocks=9), device).pool
    view = larger[2:7, 1:3]
    before = larger.clone()
    view.copy_(inputs.pool)
    inputs.pool = view
    write(inputs, shape)
    write_reference(expected, shape)
    assert_close(view, expected.pool)
    assert torch.equal(larger[:2], before[:2]) and torch.equal(larger[:, 3:], before[:, 3:])


def test_two_runs_are_equal(device: torch.device) -> None:
    shape = Shape(dtype=torch.bfloat16, has_norms=True, num_tokens=5)
    first = make_inputs(shape, device)
    second = copy_of(first)
    write(first, shape)
    write(second, shape)
    assert torch.equal(first.qkv, second.qkv)
    assert torch.equal(first.pool, second.pool)


@pytest.mark.gpu
def test_slots_past_2_31_elements(device: torch.device) -> None:
    shape = Shape(num_heads=8, num_kv_heads=8, head_dim=128, block_size=64, num_layers=32)
    shape = replace(shape, dtype=torch.bfloat16, num_blocks=2)
    small = make_inputs(shape, device)
    write_reference(small, shape, layer=31)
    inputs = make_inputs(shape, device)
    num_blocks = (1 << 31) // inputs.pool[0].numel() + 2
    inputs.pool = torch.zeros(num_blocks, *inputs.pool.shape[1:], dtype=shape.dtype, device=device)
    inputs.slot_mapping += (num_blocks - 2) * shape.block_size
    write(inputs, shape, layer=31)
    is_written = small.pool[:, :, 31].view(torch.int16) != PATTERN * 0x101
    assert_close(inputs.pool[-2:, :, 31][is_written], small.pool[:, :, 31][is_written])
    assert not inputs.pool[:-2].any()


@pytest.mark.gpu
def test_100_000_tokens(device: torch.device) -> None:
    shape = Shape(num_tokens=100_000, num_heads=32, num_kv_heads=8, head_dim=128, block_size=64)
    check(replace(shape, num_blocks=1600, dtype=torch.bfloat16), device)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"qkv": torch.zeros(3, 100)}, r"\[3, 100\].*512"),
        ({"qkv": torch.zeros(3, 512).half()}, "float16.*float32"),
        ({"positions": torch.zeros(2, dtype=torch.int64)}, "positions"),
        ({"positions": torch.zeros(3)}, "float32"),
        ({"slot_mapping": torch.zeros(3)}, "slot_mapping torch.float32"),
        ({"cos_sin": torch.zeros(8, 32)}, r"cos_sin is \[8, 32\]"),
        ({"cos_sin": torch.zeros(8, 64).half()}, "cos_sin is torch.float16"),
        ({"pool": torch.zeros(2, 2, 2, 2, 16)}, r"pool is \[2, 2, 2, 2, 16\]"),
        ({"pool": torch.zeros(2, 2, 2, 2, 24, 64)}, "block_size is 24"),
        ({"pool": torch.zeros(2, 2, 2, 2, 16, 258)}, "head_dim is 258"),
        ({"pool": torch.zeros(2, 2, 1, 2, 16, 64)}, "layer 1"),
        ({"options": {"k_scale": torch.zeros(3)}}, r"k_scale is \[3\].*\[2\]"),
        ({"options": {"v_scale": torch.zeros(2).half()}}, "v_scale is torch.float16"),
        ({"options": {"q_norm": torch.zeros(3)}}, r"q_norm is \[3\].*\[64\]"),
    ],
)
def test_what_it_refuses(changes: dict[str, Tensor], message: str) -> None:
    shape = Shape()
    inputs = replace(make_inputs(shape, torch.device("cpu")), **changes)
    with pytest.raises(ValueError, match=message):
        write(inputs, shape)
