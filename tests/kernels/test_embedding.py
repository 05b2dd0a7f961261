from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels.embedding import embed, embed_reference

WIDTHS = [1, 63, 576, 1000]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def make_table(vocab_size: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(width)
    return torch.randn(vocab_size, width, generator=generator).to(device, dtype)


def indices(values: list[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=dtype, device=device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("id_dtype", [torch.int32, torch.int64])
def test_rows_are_copied_exactly(
    width: int, dtype: torch.dtype, id_dtype: torch.dtype, device: torch.device
) -> None:
    table = make_table(11, width, dtype, device)
    token_ids = indices([0, 10, 3, 3], id_dtype, device)
    out = embed(token_ids, table)
    assert torch.equal(out, table[token_ids.long()])
    assert torch.equal(out, embed_reference(token_ids, table))


@pytest.mark.gpu
@pytest.mark.parametrize("width", [64, 576, 2048, 4096, 5120, 8192])
@pytest.mark.parametrize("num_tokens", [1, 2, 131, 132, 8193])
def test_rows_are_copied_exactly_on_a_full_grid(
    num_tokens: int, width: int, device: torch.device
) -> None:
    table = make_table(1009, width, torch.bfloat16, device)
    token_ids = torch.arange(num_tokens, device=device) * 7 % 1009
    assert torch.equal(embed(token_ids, table), table[token_ids])


def test_the_parts_of_a_split_vocabulary_sum_to_the_whole(device: torch.device) -> None:
    table = make_table(12, 64, torch.float32, device)
    token_ids = indices([0, 3, 4, 7, 8, 11], torch.int64, device)
    parts = [embed(token_ids, table[a : a + 4], first_token=a) for a in (0, 4, 8)]
    assert torch.equal(parts[0] + parts[1] + parts[2], table[token_ids])
    assert not parts[1][:2].any() and not parts[1][4:].any()


@pytest.mark.parametrize("resolved_dtype", [torch.int32, torch.int64])
def test_pending_tokens_are_read_from_the_last_samples(
    resolved_dtype: torch.dtype, device: torch.device
) -> None:
    table = make_table(20, 600, torch.float32, device)
    # Where a sample is pending, the token id may be anything.
    token_ids = indices([5, -999, 7, 1 << 40], torch.int64, device)
    last_tokens = indices([11, 12, 13], torch.int32, device)
    pending = indices([-1, 2, -1, 0], torch.int32, device)
    resolved = torch.zeros(4, dtype=resolved_dtype, device=device)
    out = embed(token_ids, table, pending_index=pending, last_tokens=last_tokens, resolved=resolved)
    assert resolved.tolist() == [5, 13, 7, 11]
    assert torch.equal(out, table[resolved.long()])


def test_pending_tokens_outside_this_part_are_zeros(device: torch.device) -> None:
    table = make_table(4, 64, torch.bfloat16, device)
    pending = indices([0, 1], torch.int32, device)
    out = embed(
        indices([0, 0], torch.int32, device),
        table,
        first_token=8,
        pending_index=pending,
        last_tokens=indices([9, 3], torch.int64, device),
    )
    assert torch.equal(out[0], table[1])
    assert not out[1].any()


def test_tokens_of_no_vocabulary_are_zeros(device: torch.device) -> None:
    table = make_table(4, 64, torch.float32, device)
    assert not embed(indices([-1, 4, -(1 << 31)], torch.int64, device), table).any()


def test_resolved_may_be_the_token_ids(device: torch.device) -> None:
    table = make_table(20, 1500, torch.float32, device)
    token_ids = indices([1, 2, 3], torch.int64, device)
    embed(
        token_ids,
        table,
        pending_index=indices([-1, 0, 1], torch.int32, device),
        last_tokens=indices([18, 19], torch.int64, device),
        resolved=token_ids,
    )
    assert token_ids.tolist() == [1, 18, 19]


def test_strided_table_and_output(device: torch.device) -> None:
    table = make_table(9, 128, torch.float32, device)[:, 32:96]
    wide_out = torch.full((2, 100), 7.0, device=device)
    embed(indices([8, 0], torch.int32, device), table, out=wide_out[:, 4:68])
    assert torch.equal(wide_out[:, 4:68], table[[8, 0]])
    assert bool((wide_out[:, :4] == 7.0).all()) and bool((wide_out[:, 68:] == 7.0).all())


def test_no_tokens(device: torch.device) -> None:
    table = make_table(4, 64, torch.float32, device)
    assert embed(indices([], torch.int64, device), table).shape == (0, 64)


@pytest.mark.gpu
def test_rows_past_2_31_elements(device: torch.device) -> None:
    table = torch.zeros((1 << 31) // 4096 + 2, 4096, dtype=torch.bfloat16, device=device)
    table[-1] = 3.0
    token_ids = indices([len(table) - 1, 0], torch.int64, device)
    assert embed(token_ids, table).float().sum(1).tolist() == [3 * 4096, 0]


@pytest.mark.parametrize(
    ("token_ids", "options", "message"),
    [
        (torch.zeros(2), {}, "float32"),
        (torch.zeros(2, 2, dtype=torch.int32), {}, r"\[2, 2\]"),
        (
            torch.zeros(2, dtype=torch.int32),
            {"pending_index": torch.zeros(2, dtype=torch.int32)},
            "both or neither",
        ),
        (
            torch.zeros(2, dtype=torch.int32),
            {
                "pending_index": torch.zeros(2, dtype=torch.int64),
                "last_tokens": torch.zeros(2, dtype=torch.int64),
            },
            "pending_index is torch.int64",
        ),
        (
            torch.zeros(2, dtype=torch.int32),
            {"resolved": torch.zeros(3, dtype=torch.int32)},
            r"resolved is \[3\]",
        ),
        (torch.zeros(2, dtype=torch.int32), {"out": torch.zeros(2, 7)}, r"\[2, 7\].*\[2, 8\]"),
    ],
)
def test_what_it_refuses(token_ids: Tensor, options: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        embed(token_ids, torch.zeros(4, 8), **options)
