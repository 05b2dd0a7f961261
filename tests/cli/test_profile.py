"""`baton profile` as a user types it, over the real engine with a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import psutil
import pytest

from baton.cli.main import main
from baton.core.worker_info import Role
from services.planner.profile_file import read_profile
from tiny_llama import write_checkpoint, write_pair_tokenizer

ENGINE = (
    "engine.num_threads=1",
    "engine.kv_cache_bytes=2000000",
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_checkpoint(tmp_path_factory.mktemp("model") / "tiny", num_hidden_layers=1)
    write_pair_tokenizer(folder)
    return folder


def arguments(model: Path, out: Path, *more: str) -> list[str]:
    settings = [f"{pool.value}.{setting}" for pool in Role for setting in ENGINE]
    return [
        *("profile", "--model", str(model), "--dtype", "float32", "--out", str(out)),
        *(part for setting in settings for part in ("--set", setting)),
        *more,
    ]


def test_engines_alone_are_measured_into_a_file_that_plans_read(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "p.json"
    assert main(arguments(model, out, "--no-system", "--seconds", "5")) == 0
    said = capsys.readouterr().out
    assert "prefill worker, tensor parallel 1" in said
    assert "P90" in said and str(out) in said
    profile = read_profile(out)
    assert profile.kv_bytes_per_token > 0
    for models in (profile.prefill, profile.decode):
        hardware = models[1].hardware
        assert hardware.step_fixed_s + hardware.decode_sequence_s > 0
        assert hardware.prefill_token_s + hardware.step_fixed_s > 0
        assert models[1].max_kv_tokens > 1000
    entry = json.loads(out.read_text())["workers"][0]
    assert set(entry["residuals"]["kinds"]) == {"prefill", "decode", "mixed"}
    simulate = [
        *("simulate", "--profile", str(out), "--lengths", "64/8", "--rate", "1"),
        *("--requests", "20", "--ttft", "60", "--itl", "60"),
    ]
    assert main(simulate) == 0


@pytest.mark.slow
def test_the_live_system_is_measured_and_leaves_nothing_behind(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {p.pid for p in psutil.Process().children(recursive=True)}
    out = tmp_path / "p.json"
    assert main(arguments(model, out, "--seconds", "5", "--rounds", "1")) == 0
    entry = json.loads(out.read_text())["workers"][1]
    assert 0.1 < entry["start_s"] < 120
    assert entry["request_s"] + entry["request_token_s"] > 0
    after = {p.pid for p in psutil.Process().children(recursive=True)}
    assert after <= before


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--seconds", "1"], "--seconds must be at least 5, got 1"),
        (["--seconds", "nan"], "--seconds must be at least 5"),
        (["--rounds", "0"], "--rounds must be at least 1, got 0"),
        (["--prefill-tp", "0"], "--prefill-tp must be at least 1, got 0"),
        (["--prefill-tp", "3"], "prefill pool: "),
        (["--model", "/nowhere/model"], "model folder /nowhere/model does not exist"),
        (["--out", "/nowhere/p.json"], "folder /nowhere does not exist"),
        (["--out", "/tmp"], "--out /tmp cannot be written"),
        (["--set", "decode.engine.max_num_seqs=0"], "max_num_seqs"),
        (
            ["--set", "prefill.engine.kv_cache_bytes=30000", "--no-system"],
            "a profile needs at least 512; raise engine.kv_cache_bytes",
        ),
    ],
)
def test_bad_input_is_one_line_with_the_fix(
    model: Path, tmp_path: Path, more: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(model, tmp_path / "p.json", "--seconds", "5", *more)) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "p.json").exists()


def test_help_says_what_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["profile", "--help"])
    said = capsys.readouterr().out
    assert "baton plan --profile measured.json" in said
    assert "Measure on a quiet machine" in said
