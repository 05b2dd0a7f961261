"""Each layer against a plain float64 formula."""

from __future__ import annotations

import math

import pytest
import torch

from baton.engine.layers.linear import PackedLinear, PlainLinear, can_pack, make_linear
from baton.engine.layers.rms_norm import RmsNorm, gain_factor
from baton.engine.layers.rotary import Rotary, inverse_frequencies
from baton.engine.model_config import RopeConfig, RopeType

CPU = torch.device("cpu")
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}
"""A few units in the last place of values of order one, after sums over some hundred products."""


@pytest.fixture(autouse=True)
def inference_mode() -> object:
    with torch.inference_mode():
        yield


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_rows", [1, 3, 64, 130])
@pytest.mark.parametrize("has_bias", [False, True])
def test_packed_linear_is_linear(dtype: torch.dtype, num_rows: int, has_bias: bool) -> None:
    if not can_pack(CPU, dtype):
        pytest.skip(f"no packed {dtype} on this machine")
    torch.manual_seed(0)
    weight = (torch.randn(50, 96) / 96**0.5).to(dtype)
    bias = torch.randn(50).to(dtype) if has_bias else None
    x, residual = torch.randn(num_rows, 96).to(dtype), torch.randn(num_rows, 50).to(dtype)
    expected = x.double() @ weight.double().T + (bias.double() if bias is not None else 0.0)
    for linear in (PackedLinear(weight, bias), PlainLinear(weight, bias)):
        bound = {"atol": TOLERANCE[dtype], "rtol": TOLERANCE[dtype]}
        torch.testing.assert_close(linear(x).double(), expected, **bound)
        total = linear.add_to(residual, x).double()
        torch.testing.assert_close(total, expected + residual.double(), **bound)


def test_type_without_packing_falls_back() -> None:
    assert isinstance(make_linear(torch.zeros(2, 2, dtype=torch.float64)), PlainLinear)
    assert isinstance(make_linear(torch.zeros(2, 2, device="meta")), PlainLinear)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_rows", [1, 8, 200])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_rms_norm_with_folded_gain(dtype: torch.dtype, num_rows: int, scale: float) -> None:
    torch.manual_seed(0)
    x, gain = (torch.randn(num_rows, 72) * scale).to(dtype), torch.rand(72) + 0.5
    mean_square = x.double().square().mean(-1, keepdim=True)
    expected = x.double() / (mean_square + 1e-5).sqrt() * gain.double()
    result = RmsNorm(72, 1e-5, CPU)(x).double() * (gain * gain_factor(72)).double()
    torch.testing.assert_close(result, expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


def test_rms_norm_of_zeros_is_zero() -> None:
    assert torch.equal(RmsNorm(8, 1e-5, CPU)(torch.zeros(2, 8)), torch.zeros(2, 8))


@pytest.mark.parametrize("num_rows", [1, 70])
def test_rotary_rotates_pairs_half_a_head_apart(num_rows: int) -> None:
    torch.manual_seed(0)
    config = RopeConfig(theta=10000.0)
    rotary = Rotary(config, head_dim=16, max_positions=200, dtype=torch.float32, device=CPU)
    wide = torch.randn(num_rows, 5, 16)
    before, positions = wide.clone(), torch.arange(num_rows) + 7
    rotary.apply_(wide[:, :3], rotary.tables(positions))
    angles = positions[:, None, None].double() * inverse_frequencies(config, 16).double()
    first, second = before[:, :3, :8].double(), before[:, :3, 8:].double()
    expected = torch.cat(
        (
            first * angles.cos() - second * angles.sin(),
            second * angles.cos() + first * angles.sin(),
        ),
        dim=-1,
    )
    # Angles reach 70 radians; float32 positions them to about 4e-6.
    torch.testing.assert_close(wide[:, :3].double(), expected, atol=3e-5, rtol=0)
    assert torch.equal(wide[:, 3:], before[:, 3:])


def test_llama3_scaling_keeps_short_and_stretches_long_wavelengths() -> None:
    plain = inverse_frequencies(RopeConfig(theta=500000.0), 128)
    config = RopeConfig(
        theta=500000.0,
        rope_type=RopeType.LLAMA3,
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=8192,
    )
    scaled = inverse_frequencies(config, 128)
    wavelengths = 2 * math.pi / plain
    short, long = wavelengths < 8192 / 4.0, wavelengths > 8192 / 1.0
    assert short.any() and long.any() and (~short & ~long).any()
    assert torch.equal(scaled[short], plain[short])
    assert torch.equal(scaled[long], plain[long] / 8.0)
    between = scaled[~short & ~long] / plain[~short & ~long]
    assert ((between > 1 / 8) & (between < 1)).all()


def test_linear_scaling_divides_every_frequency() -> None:
    plain = inverse_frequencies(RopeConfig(theta=10000.0), 32)
    config = RopeConfig(theta=10000.0, rope_type=RopeType.LINEAR, factor=4.0)
    assert torch.equal(inverse_frequencies(config, 32), plain / 4.0)
