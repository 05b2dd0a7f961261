"""Spans of a stream: both ends cut it in their own way and mean the same bytes."""

from __future__ import annotations

import random

import numpy as np
import pytest

from baton.core.kv_layout import KvLayout
from kvtransfer.byte_spans import SpanCursor, byte_spans
from kvtransfer.plan import RankPool, plan_pair

LAYOUT = KvLayout("m", 2, 4, 8, 16, "bfloat16")


@pytest.mark.parametrize("there", [(16, 0, 1), (64, 0, 1), (16, 1, 2), (8, 0, 4)])
def test_stream_of_one_side_fills_the_other(there):
    size, rank, ranks = there
    rng = random.Random(3)
    remote = RankPool(KvLayout("m", 2, 4, 8, size, "bfloat16"), rank, ranks, 1024 // size)
    local = RankPool(LAYOUT, 0, 1, 64)
    plan = plan_pair(remote, local)
    assert plan is not None
    source = np.random.default_rng(1).integers(0, 256, remote.num_bytes, dtype=np.uint8)
    target, expected = np.zeros((2, local.num_bytes), dtype=np.uint8)
    num_units = min(plan.remote.num_units, plan.local.num_units)
    there_ids = np.array([*rng.sample(range(num_units), 9), 3, 4, 5], dtype=np.int32)
    here_ids = np.array(rng.sample(range(num_units), 12), dtype=np.int32)
    for start, end, num_bytes in plan.copies(there_ids, here_ids):
        expected[end : end + num_bytes] = source[start : start + num_bytes]

    sending = SpanCursor(memoryview(source), byte_spans(plan.remote, there_ids))
    landing = SpanCursor(memoryview(target), byte_spans(plan.local, here_ids))
    assert sending.num_left == landing.num_left == 12 * plan.local.unit_bytes
    while sending.num_left:
        out, into = sending.window(4)[0], landing.window(3)[0]
        count = rng.randrange(1, min(len(out), len(into)) + 1)
        into[:count] = out[:count]
        sending.pass_over(count)
        landing.pass_over(count)
    assert landing.num_left == 0 and landing.window(3) == []
    assert (target == expected).all()


def test_neighbours_are_one_span_even_if_the_other_side_has_none():
    plan = plan_pair(RankPool(LAYOUT, 0, 1, 8), RankPool(LAYOUT, 0, 1, 8))
    assert plan is not None
    size = LAYOUT.block_bytes
    spans = byte_spans(plan.remote, np.array([2, 3, 4, 7, 6], dtype=np.int32))
    assert spans.starts.tolist() == [2 * size, 7 * size, 6 * size]
    assert spans.num_bytes.tolist() == [3 * size, size, size]
    nothing = SpanCursor(memoryview(b""), byte_spans(plan.remote, np.array([], dtype=np.int32)))
    assert nothing.num_left == 0 and nothing.window(5) == []
