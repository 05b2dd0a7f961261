"""`baton model quantize`: what users type and see."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import tiny_llama
from baton.cli.main import main
from baton.engine.config import EngineConfig
from baton.engine.weights import load_model


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    return tiny_llama.write_checkpoint(tmp_path / "plain", intermediate_size=128)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        (["--scheme", "fp8"], "fp8"),
        (["--scheme", "fp8-weight"], "fp8-weight"),
        (["--scheme", "int8", "--quantize-head"], "int8"),
        (["--scheme", "int4", "--no-calibration"], "int4 group 64"),
        (["--scheme", "int4", "--group-size", "32", "--no-calibration"], "int4 group 32"),
    ],
)
def test_quantised_folder_is_made_loaded_and_described(
    plain: Path, capsys: pytest.CaptureFixture[str], options: list[str], name: str
) -> None:
    target = plain.parent / "q"
    assert main(["model", "quantize", str(plain), str(target), *options]) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith(f"quantised to {target}: {name}, ")
    assert "quantise weights" in printed.err
    model = load_model(EngineConfig(model_path=target, dtype="float32"))
    assert model.model_config.quantization is not None
    assert model.model_config.quantization.name == name
    assert main(["model", "info", str(target), "--machine", "h200"]) == 0
    printed_info = capsys.readouterr().out
    assert f"quantised  {name}" in printed_info
    assert main(["model", "info", str(target), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["weight_bytes"] < (plain / "model.safetensors").stat().st_size
    assert main(["model", "info", str(plain), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["shape"]["params"] == report["shape"]["params"]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--scheme", "int4", "--group-size", "128"], "128 does not divide hidden_size 64"),
        (["--scheme", "fp8", "--group-size", "64"], "group_size 64 does not go with scheme fp8"),
        (["--scheme", "none"], "give a scheme or fp8 KV"),
        (["--scheme", "fp8", "--calibration", "x"], "--kv-cache fp8"),
        (["--scheme", "int4", "--calibration", "x", "--no-calibration"], "contradict"),
        (["--scheme", "none", "--kv-cache", "fp8", "--no-calibration"], "measured on a text"),
        (["--scheme", "int4"], "tokenizer.json"),
        (["--scheme", "none", "--kv-cache", "fp8", "--calibration", "absent"], "absent"),
    ],
)
def test_what_cannot_be_done_is_one_line(
    plain: Path, capsys: pytest.CaptureFixture[str], options: list[str], named: str
) -> None:
    target = plain.parent / "q"
    assert main(["model", "quantize", str(plain), str(target), *options]) == 2
    assert named in capsys.readouterr().err
    assert not target.exists()


def test_existing_folder_is_refused(plain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["model", "quantize", str(plain), str(plain), "--scheme", "fp8"]) == 2
    assert "exists" in capsys.readouterr().err


@pytest.mark.model
def test_real_model_gets_kv_scales(
    smollm2_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "q"
    options = ["--scheme", "int4", "--kv-cache", "fp8"]
    assert main(["model", "quantize", str(smollm2_dir), str(target), *options]) == 0
    printed = capsys.readouterr().out
    assert "int4 group 64 + KV scales, 269.1 MB -> 113.2 MB (42%)" in printed
    model = load_model(EngineConfig(model_path=target, dtype="bfloat16", kv_cache_dtype="fp8"))
    assert model.layout(16).block_bytes == 23_040 * 16 // 2
    assert model.k_scale.shape == (30, 3)
    assert model.k_scale.unique().numel() > 30
    assert (target / "tokenizer.json").exists()
