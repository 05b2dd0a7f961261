"""The Ray Serve application, as it is built before Ray runs it."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
import yaml

from services.launch.config import SystemConfig
from services.launch.run_directory import RunDirectory


@pytest.mark.filterwarnings("default")
def test_run_directory_says_how_to_reach_the_workers(tmp_path: Path) -> None:
    graph = pytest.importorskip("services.launch.graph")
    system = SystemConfig(tmp_path / "model", decode={"tls": {"name": "ours"}})
    run = RunDirectory.create(tmp_path / "run")
    graph.build_graph(system, run, "s" * 64)
    for role in ("prefill", "decode"):
        file = run.path / f"{role}.yaml"
        values = yaml.safe_load(file.read_text())
        assert values["transfer"]["cluster_secret"] == "s" * 64
        assert values["registry"]["directory"] == str(run.registry)
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert yaml.safe_load((run.path / "decode.yaml").read_text())["tls"] == {"name": "ours"}
