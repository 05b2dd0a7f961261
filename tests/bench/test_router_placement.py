"""The placement benchmark, on a cluster small enough for a test."""

from __future__ import annotations

import pytest

from bench.router import placement
from bench.router.index_workload import Workload, split
from services.router.placement.placement import PlacementKind

NUM_WORKERS = 6


@pytest.fixture
def workload():
    return Workload("small", 9024, num_workers=NUM_WORKERS)


@pytest.mark.parametrize("is_busy", [False, True])
@pytest.mark.parametrize("kind", placement.KINDS)
def test_every_kind_is_measured(kind, is_busy, workload, monkeypatch):
    monkeypatch.setattr(placement, "NUM_PLACEMENTS", 40)
    monkeypatch.setattr(placement, "NUM_WARM_UP", 5)
    monkeypatch.setattr(placement, "ROUND_PLACEMENTS", 10)
    scene = placement.Scene(NUM_WORKERS, workload)
    prompts = scene.mixed_prompts(9) if kind == "mixed" else list(workload.prompts(kind, 45))
    row = placement._measure(scene, kind, prompts, is_busy=is_busy)
    assert (row.workers, row.prompt, row.busy) == (NUM_WORKERS, kind, is_busy)
    assert 0 < row.p50_us <= row.p99_us and 0 < row.cpu_p50_us <= row.cpu_p99_us
    assert (len(scene.predicted) > 0) == is_busy == (scene.perf.version > 0)
    scene.table.check_integrity()
    scene.index.check_integrity()


def test_parts_and_what_is_placed(workload):
    scene = placement.Scene(NUM_WORKERS, workload)
    hashes = split(workload.chain(0))
    assert scene.place(hashes).kind in PlacementKind
    parts = list(placement._parts(scene, NUM_WORKERS, hashes))
    assert len(parts) == 5 and all(part.median_us > 0 for part in parts)
