"""`baton plan --explain`: a decision of a log in numbers and sentences, and what it refuses."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from baton.cli.main import main
from made_up_worker import MODEL
from planned_world import World
from services.planner.autoscale_config import AutoscaleConfig, PoolLimits
from services.planner.decision_log import DecisionLog, DecisionLogConfig, read_records
from services.planner.decision_record import Models, to_line
from services.planner.loop import PlannerLoop
from services.planner.planner import Planner
from services.planner.planner_gauges import PlannerGauges

LIMITS = PoolLimits(min_workers=1, max_workers=12)
CONFIG = AutoscaleConfig(ttft_s=0.4, itl_s=0.04, max_devices=24, prefill=LIMITS, decode=LIMITS)
START_S = 1_772_374_000.0
"""2026-03-01T14:06:40 UTC."""


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Calm, then a burst, then calm again; a decision every ten seconds."""
    path = tmp_path_factory.mktemp("log") / "decisions.jsonl"
    world, gauges = World(now_s=START_S), PlannerGauges()
    planner = Planner(CONFIG, Models(MODEL, MODEL), DecisionLog(DecisionLogConfig(path)), gauges)
    loop = PlannerLoop(planner, world, world, gauges)
    for rate, num in ((2.0, 10), (40.0, 15), (2.0, 20)):
        world.rate_per_s, world.num_queued = rate, rate if rate > 10 else 0
        for _ in range(num):
            world.pass_time(10)
            loop.step(world.now_s)
    return path


@pytest.fixture
def log(written: Path, tmp_path: Path) -> Path:
    path = tmp_path / "decisions.jsonl"
    path.write_bytes(written.read_bytes())
    return path


def explain(capsys: pytest.CaptureFixture[str], *arguments: str, status: int = 0) -> str:
    assert main(["plan", "--explain", *arguments]) == status
    done = capsys.readouterr()
    return done.out if status < 2 else done.err


def test_the_last_decision_is_explained_by_default(
    log: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = explain(capsys, str(log))
    assert text.startswith("decision 43, 2026-03-01T14:14:10Z")
    assert "replay: 44 decisions made once more, all as logged" in text
    # The burst is within the window, so its workers stay.
    assert "The prefill pool stays at" in text
    assert "Within the last 300 s it needed" in text and "would have missed its target" in text


def test_a_burst_is_explained_with_its_figures(
    log: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = explain(capsys, f"{log}:9")
    records = list(read_records(log))
    decision = records[9].decision
    assert "40 requests/s at 2 routers" in text
    assert "80 waiting for their first step; to work them off: 2.13 requests/s more" in text
    assert f"The prefill pool goes from 1 to {decision.prefill.desired}: " in text
    assert f"{decision.prefill.desired} needed" in text
    for words in ("busy;", "wait,", "miss (one less", "by pace", "by memory", "sequences =",
                  "of 24 devices", "begun: start prefill", "model x1.00"):  # fmt: skip
        assert words in text, words
    assert text == explain(capsys, str(log), "--at", "9")
    assert text == explain(capsys, str(log), "--at", "-35")
    assert text == explain(capsys, f"{log}:-35")


def test_a_time_names_the_last_decision_until_then(
    log: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert explain(capsys, str(log), "--at", "2026-03-01T14:07").startswith("decision 5, ")
    assert explain(capsys, str(log), "--at", "2026-03-01T14:10:00Z").startswith(
        "decision 18, 2026-03-01T14:10:00Z"
    )


def test_figures_as_json(log: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(explain(capsys, f"{log}:9", "--json"))
    record = list(read_records(log))[9]
    assert found["is_reproduced"] is True
    assert found["record"]["number"] == 9
    assert found["prefill_now"]["num_workers"] == record.decision.prefill.needed_now
    assert found["prefill_soon"]["num_workers"] == record.decision.prefill.needed_soon
    assert found["decode_now"]["num_workers"] == record.decision.decode.needed_now
    assert found["decode_soon"]["num_workers"] == record.decision.decode.needed_soon
    assert 0 < found["prefill_now"]["miss_share"] <= 0.1
    assert found["prefill_now"]["miss_share_less"] is None or (
        found["prefill_now"]["miss_share_less"] > 0.1
    )


def test_figures_of_decisions_are_those_they_were_made_from(log: Path) -> None:
    from services.planner.explain import explain as take_apart

    for record in list(read_records(log))[::4]:
        found = take_apart(read_records(log), record.number)
        decision = record.decision
        assert found.prefill_now.num_workers == decision.prefill.needed_now
        assert found.prefill_soon.num_workers == decision.prefill.needed_soon
        assert found.decode_now.num_workers == decision.decode.needed_now
        assert found.decode_soon.num_workers == decision.decode.needed_soon
        assert found.prefill.sentences and found.decode.sentences and found.sentences


def test_a_log_that_was_changed_ends_with_status_1(
    log: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    *kept, last = read_records(log)
    other = dataclasses.replace(last.decision.decode, desired=9)
    changed = dataclasses.replace(last, decision=dataclasses.replace(last.decision, decode=other))
    log.write_text("".join(to_line(r) + "\n" for r in [*kept, changed]))
    assert "replay: 1 of 44 decisions came out differently" in explain(capsys, str(log), status=1)


def test_a_part_of_a_log_is_explained_without_a_replay(
    log: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = log.read_text().splitlines(keepends=True)
    log.write_text("".join(lines[5:]))
    text = explain(capsys, str(log))
    assert "replay: not possible, the file holds no state before" in text
    assert "The decode pool" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("{log}:99",), "there is no decision 99; the log holds 0 to 43"),
        (("{log}", "--at", "-99"), "holds 44 decisions, so there is no -99"),
        (("{log}", "--at", "yesterday"), "--at takes a decision's number, or a time in UTC"),
        (("{log}", "--at", "2020-01-01T00:00"), "holds no decision until 2020-01-01T00:00"),
        (("{log}:3", "--at", "4"), "both name a decision: leave one out"),
        (("{log}.gone",), "cannot read the decision log"),
        (("{log}.gone:3",), "cannot read the decision log"),
        (("{folder}",), "cannot read the decision log"),
    ],
)
def test_what_is_not_there_is_one_line(
    arguments: tuple[str, ...],
    message: str,
    log: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = [text.format(log=log, folder=log.parent) for text in arguments]
    error = explain(capsys, *given, status=2)
    assert error.startswith("baton: error: ") and message in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "is empty"), ("x\n", "line 1 is no JSON"), ('{"version": 1}\n', "line 1")],
)
def test_what_is_no_log_is_refused(
    text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text(text)
    assert message in explain(capsys, f"{path}:0", status=2)
    assert "baton: error: " in explain(capsys, str(path), status=2)


def test_a_plan_still_needs_what_it_needs(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["plan", "--gpus", "2"])
    assert "--ttft, --itl" in capsys.readouterr().err
