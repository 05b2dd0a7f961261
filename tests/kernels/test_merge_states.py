"""Merging attention states: against the formula, and against attention over the whole."""

from __future__ import annotations

import pytest
import torch

from kernel_inputs import assert_close, poisoned
from kernels.attention_reference import attend
from kernels.merge_states import merge_states, merge_states_reference


def _states(*shape: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(42)
    outs = torch.randn(shape, generator=generator)
    lse = torch.randn(shape[:-1], generator=generator) * 20
    return outs.to(device), lse.to(device)


@pytest.mark.parametrize("shape", [(1, 1, 64), (3, 7, 80), (2, 5, 3, 128), (9, 63, 16)])
def test_equals_the_formula(shape: tuple[int, ...], device: torch.device) -> None:
    outs, lse = _states(*shape, device=device)
    merged = merge_states(outs, lse)
    expected = merge_states_reference(outs, lse)
    assert_close(merged.out, expected.out)
    assert_close(merged.lse, expected.lse)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(66, 1000, 128), (4, 4097, 256)])
def test_equals_the_formula_at_full_size(shape: tuple[int, ...], device: torch.device) -> None:
    test_equals_the_formula(shape, device)


def test_parts_that_saw_nothing_are_not_read(device: torch.device) -> None:
    outs, lse = _states(3, 6, 32, device=device)
    lse[1, 2:] = float("-inf")
    outs[1, 2:] = float("nan")
    lse[:, 5] = float("-inf")
    merged = merge_states(outs, lse)
    expected = merge_states_reference(outs, lse)
    assert_close(merged.out, expected.out)
    assert merged.out[5].eq(0).all() and merged.lse[5] == float("-inf")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_writes_into_a_given_buffer(dtype: torch.dtype, device: torch.device) -> None:
    outs, lse = _states(4, 5, 48, device=device)
    out = poisoned(5, 48, dtype=dtype, device=device)
    assert merge_states(outs, lse, out=out).out is out
    assert_close(out, merge_states_reference(outs, lse).out)


def test_takes_strided_parts(device: torch.device) -> None:
    outs, lse = _states(6, 5, 48, device=device)
    merged = merge_states(outs[::2], lse[::2])
    assert_close(merged.out, merge_states_reference(outs[::2], lse[::2]).out)


def test_no_rows(device: torch.device) -> None:
    outs, lse = _states(2, 0, 16, device=device)
    assert merge_states(outs, lse).out.shape == (0, 16)


def test_two_parts_of_a_context_equal_the_whole(device: torch.device) -> None:
    generator = torch.Generator().manual_seed(1)
    keys, values = torch.randn(2, 50, 2, 32, generator=generator)
    query = torch.randn(1, 4, 32, generator=generator)
    plain = {"scale": 0.2, "sliding_window": 0, "soft_cap": 0.0, "sinks": None}
    parts = [attend(query, keys[a:b], values[a:b], **plain) for a, b in ((0, 17), (17, 50))]
    outs, lse = (torch.stack(x).contiguous().to(device) for x in zip(*parts, strict=True))
    whole, whole_lse = attend(query, keys, values, **plain)
    merged = merge_states(outs, lse)
    assert_close(merged.out, whole.to(device))
    assert_close(merged.lse, whole_lse.to(device))


def test_two_runs_are_equal(device: torch.device) -> None:
    outs, lse = _states(5, 33, 64, device=device)
    assert torch.equal(merge_states(outs, lse).out, merge_states(outs, lse).out)


def test_refuses_what_it_cannot_merge(device: torch.device) -> None:
    outs, lse = _states(2, 3, 16, device=device)
    with pytest.raises(ValueError, match="float32"):
        merge_states(outs.half(), lse)
    with pytest.raises(ValueError, match="need lse"):
        merge_states(outs, lse[:, :2])
    with pytest.raises(ValueError, match="contiguous"):
        merge_states(outs.transpose(1, 2), torch.zeros(2, 16, device=device))
