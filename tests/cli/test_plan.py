"""`baton plan` as a user types it: its files, its status, what it refuses."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from baton.cli.main import main

WORKER = {
    "tensor_parallel": 1, "max_kv_tokens": 50_000, "step_fixed_s": 0.02, "prefill_token_s": 1.5e-4,
    "prefill_pair_s": 1e-9, "decode_sequence_s": 4e-4, "decode_kv_token_s": 5e-7,
    "link_bytes_per_second": 2e11,
}  # fmt: skip


@pytest.fixture
def profile(tmp_path: Path) -> str:
    path = tmp_path / "profile.json"
    path.write_text(
        json.dumps({"source": "made up", "kv_bytes_per_token": 800_000, "workers": [WORKER]})
    )
    return str(path)


GOALS = ("--ttft", "0.4", "--itl", "0.04")
QUICK = ("--requests", "30", "--span", "2")


def test_a_plan_is_printed_and_written_as_values_and_plot(
    profile: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values, plot = tmp_path / "values.yaml", tmp_path / "plot.png"
    status = main(
        ["plan", "--profile", profile, "--gpus", "2", "--lengths", "256/8", *GOALS, *QUICK,
         "--json", "--values", str(values), "--plot", str(plot)],
    )  # fmt: skip
    told = json.loads(capsys.readouterr().out)
    assert status == 0
    assert told["chosen"] in [row["name"] for row in told["ranking"]]
    assert all(row["curve"] for row in told["ranking"])
    assert yaml.safe_load(values.read_text())["pools"]["paired"]["prefill"] == 1
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_targets_out_of_reach_end_with_status_1_and_a_reason(
    profile: str, capsys: pytest.CaptureFixture[str]
) -> None:
    status = main(
        ["plan", "--profile", profile, "--gpus", "1", "--lengths", "256/8", "--ttft", "0.001",
         "--itl", "0.001", *QUICK],
    )  # fmt: skip
    assert status == 1
    out = capsys.readouterr().out
    assert "nothing keeps these targets" in out
    assert "misses TTFT even with one request at a time" in " ".join(out.split())
    # A step of 0.02 s and 256 tokens of 0.15 ms, and the way there and back.
    found = re.search(
        r"one prompt alone takes ([\d.]+) ms on the fastest worker \(prefill, tp1\)", out
    )
    assert found is not None
    assert 58.4 < float(found[1]) < 65
    assert "is the least that can be kept" in out
    assert "one step of a single sequence takes" in out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--lengths", "5/5"], "say what runs it"),
        (["--model", "opt-13b", "--gpu", "a100"], "say what comes in"),
        (["--model", "opt-13b", "--gpu", "a100", "--lengths", "512"], "such as 512/64, got '512'"),
        (["--model", "opt-13b", "--gpu", "a100", "--lengths", "0/4"], "at least 1, got 0"),
        (["--model", "opt-13b", "--gpu", "tpu", "--lengths", "5/5"], "unknown machine 'tpu'"),
        (["--model", "nothing", "--gpu", "a100", "--lengths", "5/5"], "unknown model shape"),
        (["--model", "llama-3.1-70b", "--gpu", "h100", "--lengths", "5/5"], "at least 2 devices"),
        (["--profile", "none.json", "--lengths", "5/5"], "cannot read the profile none.json"),
        (["--profile", "a", "--model", "opt-13b", "--lengths", "5/5"], "leave --model and --gpu"),
    ],
)
def test_bad_input_is_one_line_with_the_fix(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "--gpus", "1", *GOALS, *arguments]) == 2
    assert says in capsys.readouterr().err


def test_no_gpus_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["plan", "--gpus", "0", *GOALS, "--model", "opt-13b", "--gpu", "a100"]
    assert main([*arguments, "--lengths", "5/5"]) == 2
    assert "--gpus must be at least 1, got 0" in capsys.readouterr().err
