"""Batch sizes that get a graph, and padding to them."""

from __future__ import annotations

import pytest

from baton.engine.gpu.graphs import EagerSteps, chunk_buckets, decode_buckets


@pytest.mark.parametrize("largest", [1, 2, 3, 16, 50, 64, 65, 200, 256, 1000])
def test_buckets_rise_to_the_largest_batch_and_waste_little(largest: int) -> None:
    buckets = decode_buckets(largest)
    assert buckets == sorted(set(buckets))
    assert buckets[0] == 1
    assert buckets[-1] == largest
    assert len(buckets) <= 45
    decode = EagerSteps(buckets)
    for num_rows in range(1, largest + 1):
        bucket = decode.bucket_for(num_rows)
        assert bucket is not None
        assert num_rows <= bucket <= max(num_rows + 7, num_rows * 1.25)


def test_no_graphs_at_all_means_no_bucket() -> None:
    assert decode_buckets(0) == []
    assert EagerSteps([]).bucket_for(1) is None


def test_a_batch_beyond_the_largest_graph_has_no_bucket() -> None:
    decode = EagerSteps(decode_buckets(8))
    assert decode.bucket_for(8) == 8
    assert decode.bucket_for(9) is None


@pytest.mark.parametrize("most", [0, 1, 12, 16, 100, 512, 8192])
def test_chunks_up_to_a_step_or_512_tokens_are_padded_and_waste_little(most: int) -> None:
    chunks = EagerSteps(chunk_buckets(most))
    for num_tokens in range(1, min(most, 512) + 1):
        bucket = chunks.bucket_for(num_tokens)
        assert bucket is not None
        assert num_tokens <= bucket <= min(most, max(2 * num_tokens, 16))
    assert chunks.bucket_for(min(most, 512) + 1) is None
