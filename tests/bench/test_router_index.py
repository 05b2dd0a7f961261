"""The index benchmark, on indexes small enough for a test."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict

from bench.router import index
from bench.router.index_workload import HASH_BYTES, Workload, split
from bench.router.soak import soak

SMALL = Workload("small", 9024, num_workers=100)


def test_workload_is_what_it_says():
    assert SMALL.num_chains == 20 and SMALL.num_distinct == 9024
    events = list(SMALL.events())
    assert sum(len(joined) for _, _, joined in events) == SMALL.num_stored * HASH_BYTES
    assert len({h for _, _, joined in events for h in split(joined)}) == SMALL.num_distinct
    last = {}
    for worker, parent, joined in events:
        assert not parent or parent == last[worker], "a chain's events follow each other"
        last[worker] = joined[-HASH_BYTES:]
    spread = Workload("spread", 9024, num_holders=10)
    assert [*spread.holders(3)] == [3, 13, 23, 33, 43, 53, 63, 73, 83, 93]


def test_ours_is_measured_in_a_process_of_its_own():
    workload = Workload("enough for all workers", 50_000)
    order = json.dumps({"contender": "baton", "workload": asdict(workload)})
    done = subprocess.run(
        [sys.executable, str(index.CHILD), order], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    measured = json.loads(done.stdout)
    assert all(value > 0 for value in measured.values())


def test_missing_peer_is_left_out_and_said(monkeypatch):
    monkeypatch.setattr(index, "_child", lambda *_: {"match_full_p50_us": 1.0})
    result = index._beside(None, 1)
    assert "--dynamo" in result["left_out"][0]
    assert [*result[index.WORKLOADS[0].name]["medians"]] == ["baton"]


def test_parts_of_ours_alone():
    assert all(rate > 0 for rate in index.batches(2000, 20_000).values())
    assert index.bound(20_000)["entries"] == 20_000
    done = soak(200_000, 20.0, max_entries=20_000)
    assert done["events"] >= 200_000 and done["rss_mb_at_most_later"] > 0
    assert done["samples"][-1]["entries"] == 20_000
    ample = index.wrong_lengths(1.5, num_turns=300)
    assert ample["lengths"] > 0 and ample["wrong_share"] == 0.0
