"""`baton simulate` as a user types it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from baton.cli.main import main

BASE = ["simulate", "--model", "llama-3.1-8b", "--gpu", "h200", "--ttft", "0.5", "--itl", "0.02"]
WORK = ["--lengths", "512/8", "--rate", "20", "--requests", "60"]


def test_a_run_is_told_in_json_and_drawn_and_equal_seeds_give_equal_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def told(*more: str) -> dict[str, object]:
        assert main([*BASE, *WORK, "--prefill", "2", "--decode", "2", "--json", *more]) == 0
        result = json.loads(capsys.readouterr().out)
        result.pop("took_s")
        return dict(result)

    plot = tmp_path / "run.png"
    first = told("--plot", str(plot))
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert first["cluster"] == "2 x tp1 prefill + 2 x tp1 decode"
    assert first["summary"]["num_requests"] == 60  # type: ignore[index]
    assert len(first["workers"]) == 4  # type: ignore[arg-type]
    assert told() == first
    assert told("--seed", "1") != first


def test_colocated_workers_and_traces_run_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = tmp_path / "t.csv"
    trace.write_text(
        "timestamp,input_length,output_length\n" + "".join(f"{i},300,4\n" for i in range(20))
    )
    assert main([*BASE, "--trace", str(trace), "--prefill", "0"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "1 x tp1 colocated" in out
    assert "20 ended, 0.0% refused" in out


def test_missed_targets_are_status_1(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["simulate", "--model", "llama-3.1-8b", "--gpu", "h200", "--ttft", "0.0001"]
    assert main([*arguments, "--itl", "1", *WORK, "--no-admission"]) == 1
    assert "0.0% kept both" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--lengths", "5/5"], "lengths have no rate of their own: say --rate"),
        (["--lengths", "5/5", "--rate", "0"], "rate_per_s must be above 0, got 0"),
        (
            ["--lengths", "5/5", "--rate", "1", "--decode", "0"],
            "--decode must be at least 1, got 0",
        ),
        (["--lengths", "5/5", "--rate", "1", "--prefill", "-1"], "--prefill must not be negative"),
        (["--lengths", "5/5", "--rate", "1", "--decode-tp", "3"], "--decode-tp 3 is not among"),
        (["--trace", "nowhere.csv"], "cannot read the trace nowhere.csv"),
    ],
)
def test_bad_input_is_one_line_with_the_fix(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*BASE, *arguments]) == 2
    assert says in capsys.readouterr().err
