"""Whole runs of the kernel benchmark and of tuning, on a device that only seems to be there."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import kernels, machine
from bench.gpu import cases, ceilings, timing, tune
from bench.gpu.cases import TINY_SCALE
from bench.gpu.ceilings import Ceilings
from bench.gpu.timing import Call, Timing


@pytest.fixture
def seeming_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny inputs in the CPU's memory; every contender takes a millisecond."""

    def time_in_turns(
        contenders: Mapping[str, Sequence[Call]], **options: Any
    ) -> dict[str, Timing]:
        for calls in contenders.values():
            for call in calls:
                call()
        return {name: Timing(1e-3, 0.0) for name in contenders}

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(machine, "describe_gpu", lambda: {"gpu": "made up", "driver": "none"})
    monkeypatch.setattr(ceilings, "measure_ceilings", lambda: Ceilings(4e12, 4e12, 8e14))
    monkeypatch.setattr(timing, "time_in_turns", time_in_turns)
    monkeypatch.setattr(cases, "GPU_SCALE", TINY_SCALE)


@pytest.mark.usefixtures("seeming_gpu")
def test_run_prints_and_stores_cases_and_goals(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--groups", "skinny-gemm,norms", "--only", " 8 ", "--commit", "abc"]

    assert kernels.main([*arguments, "--out", str(tmp_path)]) == 0

    printed = capsys.readouterr().out
    assert "must reach (copy 4000 GB/s" in printed
    (path,) = tmp_path.iterdir()
    assert path.name.endswith("-abc.json")
    content = json.loads(path.read_text())
    assert content["machine"]["gpu"] == "made up"
    assert {case["status"] for case in content["cases"]} == {"timed"}
    assert {case["group"] for case in content["cases"]} == {"skinny-gemm", "norms"}
    assert content["not_run"] == []
    assert content["goals"][0]["verdict"] == "reached"


@pytest.mark.usefixtures("seeming_gpu")
def test_tuning_prints_and_stores_rankings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    only = "int8 llama-3.1-8b o 4096 x 4096, 8 rows"

    def compiled(shapes: Sequence[Any], options: Any) -> dict[object, str | None]:
        tasks = tune.compile_tasks(shapes, options.max_tiles)
        outcomes: list[str | None] = [None, None, "its process died"]
        return {
            (shape.op, shape.compile_key(tile)): outcomes[i]
            for i, (shape, tile) in enumerate(tasks)
        }

    monkeypatch.setattr(tune, "_compile", compiled)
    (shape,) = tune.chosen_shapes(tune.parse(["--only", only]))
    monkeypatch.setattr(tune, "chosen_shapes", lambda options: [shape.at(TINY_SCALE)])

    assert tune.main(["--max-tiles", "3", "--commit", "abc", "--out", str(tmp_path)]) == 0

    printed = capsys.readouterr().out
    assert "1 of 3 candidates left out" in printed
    (path,) = tmp_path.iterdir()
    (stored,) = json.loads(path.read_text())["shapes"]
    assert len(stored["ranking"]) == 2
    assert list(stored["left_out"].values()) == ["its process died"]


def test_without_a_device_only_dry_runs_are_made(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    assert kernels.main([]) == 2
    assert tune.main([]) == 2
    assert "no CUDA device" in capsys.readouterr().err
