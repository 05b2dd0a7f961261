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


def test_a_sweep_is_told_by_rate_and_drawn(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plot = tmp_path / "sweep.png"
    arguments = ["--lengths", "512/8", "--sweep", "10:400:3", "--requests", "80", "--no-admission"]
    assert main([*BASE, *arguments, "--json", "--plot", str(plot)]) == 0
    runs = json.loads(capsys.readouterr().out)["runs"]
    assert [run["rate_per_s"] for run in runs] == [10, 205, 400]
    assert runs[0]["attainment"] > runs[2]["attainment"]
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert main([*BASE, *arguments]) == 0
    assert "goodput/s" in capsys.readouterr().out


def test_pools_that_follow_the_load_are_told_with_their_reasons_and_drawn(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plot = tmp_path / "day.png"
    arguments = [
        *BASE, "--lengths", "8000/4", "--rate", "0:1,30:12,60:1", "--seconds", "170",
        "--autoscale", "--max-gpus", "6", "--start-seconds", "5", "--window", "30", "--price", "2",
        "--no-admission", "--share", "0.1",
    ]  # fmt: skip
    assert main([*arguments, "--json", "--plot", str(plot)]) == 0
    told = json.loads(capsys.readouterr().out)
    assert max(sample["num_prefill"] for sample in told["samples"]) > 1
    assert told["samples"][-1]["num_prefill"] == 1
    assert {order["order"]["kind"] for order in told["orders"]} == {"start", "drain"}
    assert all(decision["prefill"]["reason"] for decision in told["decisions"])
    assert told["cost"] == pytest.approx(2 * told["device_hours"])
    assert told["moved_bytes"] > 0
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert main(arguments) == 0
    assert "workers started" in capsys.readouterr().out


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
        (["--lengths", "5/5", "--rate", "fast"], "--rate takes requests per second such as 20, or"),
        (["--lengths", "5/5", "--rate", "nan"], "rate_per_s must be above 0, got nan"),
        (["--lengths", "5/5", "--rate", "5,9"], "each of several rates needs its second"),
        (["--lengths", "5/5", "--rate", "0:5,9:1"], "for how long requests arrive at these rates"),
        (
            ["--lengths", "5/5", "--rate", "0:5,9:1,3:2", "--seconds", "9"],
            "seconds of a changing rate must rise: 3 follows 9",
        ),
        (
            ["--lengths", "5/5", "--rate", "0:0", "--seconds", "9"],
            "rate_per_s must be above 0, got 0",
        ),
        (["--lengths", "5/5", "--rate", "1e9", "--seconds", "1e9"], "more than one run simulates"),
        (["--lengths", "5/5", "--rate", "1", "--price", "-1"], "--price must be above 0"),
        (["--lengths", "5/5", "--rate", "1", "--requests", "0"], "--requests must be at least 1"),
        (["--lengths", "9000000/5", "--rate", "1"], "--prefill-tp, --decode-tp"),
        (["--lengths", "5/5", "--sweep", "5:1:3"], "needs LOW below HIGH and 2 to 100 rates"),
        (["--lengths", "5/5", "--sweep", "1,x"], "--sweep takes 5,10,20 or 5:40:8, got '1,x'"),
        (["--lengths", "5/5", "--sweep", "0"], "a rate must be above 0 and finite, got 0"),
        (["--lengths", "5/5", "--sweep", "5", "--rate", "5"], "leave --rate and --autoscale out"),
        (["--lengths", "5/5", "--rate", "5", "--autoscale", "--prefill", "0"], "is for two pools"),
        (["--lengths", "5/5", "--rate", "5", "--autoscale", "--max-gpus", "0"], "--max-gpus must"),
        (
            ["--lengths", "5/5", "--rate", "5", "--autoscale", "--max-gpus", "1"],
            "start with 2 GPUs and --max-gpus is 1",
        ),
        (
            [
                "--lengths",
                "5/5",
                "--rate",
                "5",
                "--autoscale",
                "--min-decode",
                "3",
                "--max-decode",
                "2",
            ],
            "--min-decode 3 must be from 0 to --max-decode 2",
        ),
        (
            ["--lengths", "5/5", "--rate", "5", "--autoscale", "--interval", "0"],
            "--interval must be above 0 seconds, got 0",
        ),
        (["--lengths", "5/5", "--rate", "1", "--decode-tp", "3"], "--decode-tp 3 is not among"),
        (["--trace", "nowhere.csv"], "cannot read the trace nowhere.csv"),
    ],
)
def test_bad_input_is_one_line_with_the_fix(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*BASE, *arguments]) == 2
    assert says in capsys.readouterr().err
