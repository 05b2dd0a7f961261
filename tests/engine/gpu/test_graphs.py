"""Batch sizes that get a graph, and padding to them."""

from __future__ import annotations

import pytest

from baton.engine.gpu.graphs import EagerDecode, decode_buckets


@pytest.mark.parametrize("largest", [1, 2, 3, 16, 50, 64, 65, 200, 256, 1000])
def test_buckets_rise_to_the_largest_batch_and_waste_little(largest: int) -> None:
    buckets = decode_buckets(largest)
    assert buckets == sorted(set(buckets))
    assert buckets[0] == 1
    assert buckets[-1] == largest
    assert len(buckets) <= 45
    decode = EagerDecode(buckets)
    for num_rows in range(1, largest + 1):
        bucket = decode.bucket_for(num_rows)
        assert bucket is not None
        assert num_rows <= bucket <= max(num_rows + 7, num_rows * 1.25)


def test_no_graphs_at_all_means_no_bucket() -> None:
    assert decode_buckets(0) == []
    assert EagerDecode([]).bucket_for(1) is None


def test_a_batch_beyond_the_largest_graph_has_no_bucket() -> None:
    decode = EagerDecode(decode_buckets(8))
    assert decode.bucket_for(8) == 8
    assert decode.bucket_for(9) is None
