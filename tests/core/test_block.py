"""The hash chain: equal exactly when root and all tokens so far are equal."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.core.block import (
    HASH_BYTES,
    chain_hashes,
    first_hash,
    join_hashes,
    next_hash,
    root_hash,
    split_hashes,
)

TOKENS = st.lists(st.integers(0, 2**32 - 1), max_size=40)


@given(TOKENS, st.sampled_from([1, 2, 4, 16]))
def test_chain_equals_block_by_block_hashing(token_ids: list[int], block_size: int) -> None:
    parent = root_hash("fp", "tenant")
    expected = []
    for start in range(0, len(token_ids) - block_size + 1, block_size):
        parent = next_hash(parent, token_ids[start : start + block_size])
        expected.append(parent)
    assert chain_hashes(root_hash("fp", "tenant"), token_ids, block_size) == expected


@given(TOKENS, TOKENS)
def test_hashes_are_equal_exactly_on_the_common_prefix(a: list[int], b: list[int]) -> None:
    root = root_hash("fp")
    for i, (x, y) in enumerate(
        zip(chain_hashes(root, a, 2), chain_hashes(root, b, 2), strict=False)
    ):
        assert (x == y) == (a[: 2 * i + 2] == b[: 2 * i + 2])


def test_partial_last_block_has_no_hash() -> None:
    assert len(chain_hashes(root_hash("fp"), [1] * 11, 4)) == 2
    assert chain_hashes(root_hash("fp"), [1, 2, 3], 4) == []


def test_fingerprint_and_salt_separate_the_chains() -> None:
    roots = {root_hash("fp"), root_hash("fp2"), root_hash("fp", "a"), root_hash("fp", "b")}
    assert len(roots) == 4
    assert root_hash("ab", "c") != root_hash("a", "bc")


def test_wire_form_round_trips_and_refuses_broken_lengths() -> None:
    hashes = chain_hashes(root_hash("fp"), range(64), 4)
    assert split_hashes(join_hashes(hashes)) == hashes
    assert split_hashes(b"") == []
    with pytest.raises(ValueError, match=f"{HASH_BYTES}-byte"):
        split_hashes(b"x" * (HASH_BYTES + 1))


@pytest.mark.parametrize("token_id", [-1, 2**32])
def test_token_ids_outside_uint32_are_refused(token_id: int) -> None:
    with pytest.raises(OverflowError):
        next_hash(root_hash("fp"), [token_id])


def test_first_hash_is_that_of_the_first_block() -> None:
    assert first_hash("fp", 4) == chain_hashes(root_hash("fp"), range(9), 4)[0]
    assert len({first_hash("fp", 4), first_hash("fp", 8), first_hash("other", 4)}) == 3
