"""The decision log: exact lines, rotation, half lines, disks that are full, what is no log."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from baton.core.errors import ConfigError
from planned_world import World
from services.planner.decision_log import DecisionLog, DecisionLogConfig, read_records
from services.planner.decision_record import (
    Replay,
    from_line,
    to_line,
)
from services.planner.planner import Planner
from services.planner.planner_gauges import PlannerGauges
from tests.services.planner.test_planner import CONFIG, MODELS, Run


def test_a_record_comes_back_exactly(tmp_path: Path) -> None:
    run = Run(tmp_path / "log.jsonl")
    run.tick(7.3, 130)
    for record in read_records(tmp_path / "log.jsonl"):
        line = to_line(record)
        assert from_line(line, "there") == record
        json.loads(line, parse_constant=pytest.fail)
        # What decisions rest on stays small.
        assert len(line) < 8000


def test_a_damaged_log_is_told_and_not_fatal(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text('{"version": 2}\nnonsense\n')
    run = Run(path)
    assert "starting without what was learnt before" in caplog.text
    assert run.tick(5.0, 3) is not None
    # The damaged file is put aside, so that the new one can be read.
    assert [record.number for record in read_records(path)] == [0, 1]
    assert "nonsense" in (tmp_path / "log.1.jsonl").read_text()


def test_a_full_log_begins_anew_and_each_file_can_be_replayed(tmp_path: Path) -> None:
    path = tmp_path / "sub" / "log.jsonl"
    config = DecisionLogConfig(path, max_bytes=1 << 16, keep=3)
    world, gauges = World(), PlannerGauges()
    planner = Planner(CONFIG, MODELS, DecisionLog(config), gauges)
    for _ in range(120):
        world.pass_time(10)
        planner.decide(world.now_s, world.read().copies, world.workers())
    files = sorted(p.name for p in path.parent.iterdir())
    assert files == ["log.1.jsonl", "log.2.jsonl", "log.jsonl"]
    numbers: list[int] = []
    for name in ("log.2.jsonl", "log.1.jsonl", "log.jsonl"):
        file = path.parent / name
        assert file.stat().st_size < (1 << 16) + 8000
        again, records = Replay(), list(read_records(file))
        assert records[0].state is not None
        for record in records:
            again.step(record)
        assert again.num_different == 0
        numbers += [r.number for r in records]
    assert numbers == list(range(numbers[0], 119))


def test_a_log_that_cannot_be_written_is_told_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    run = Run(tmp_path / "file" / "log.jsonl")
    run.tick(5.0, 5)
    assert caplog.text.count("decisions cannot be written") == 1
    assert run.value("baton_planner_desired_workers", pool="decode") == 1


def test_what_could_not_be_written_does_not_make_the_rest_differ(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    run = Run(path)
    run.tick(5.0, 10)
    path.rename(tmp_path / "kept")
    path.mkdir()
    run.tick(40.0, 10)
    path.rmdir()
    (tmp_path / "kept").rename(path)
    run.tick(5.0, 10)
    again, records = Replay(), list(read_records(path))
    for record in records:
        again.step(record)
    assert [r.number for r in records] == [*range(9), *range(19, 29)]
    assert again.num_different == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nonsense\n", "line 1 is no JSON"),
        ("[1]\n", r"line 1 holds '\[1\]', no decision"),
        ('{"a": 1}\n', "line 1 is of version None, this release reads 2"),
        ('{"version": 1}\n', "line 1 is of version 1"),
        ('{"version": 2, "x": 1}\n', "line 1: x"),
        ('{"version": 2, "number": "three"}\n', "line 1: number must be int"),
    ],
)
def test_what_is_no_decision_is_refused_by_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        list(read_records(path))


def test_a_killed_writer_leaves_no_half_line_in_the_middle(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    run = Run(path)
    run.tick(5.0, 4)
    with path.open("a") as file:
        file.write('{"version": 2, "numb')
    run.start()
    run.tick(5.0, 4)
    assert [record.number for record in read_records(path)] == [0, 1, 2, 3, 4, 5]


def test_a_line_that_is_being_written_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    Run(path).tick(5.0, 4)
    whole = list(read_records(path))
    with path.open("a") as file:
        file.write(to_line(whole[0])[:100])
    assert list(read_records(path)) == whole


@pytest.mark.parametrize(
    ("values", "message"),
    [({"max_bytes": 10}, "max_bytes must be at least 65536"), ({"keep": 0}, "keep must be from 1")],
)
def test_impossible_logs_are_refused(values: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DecisionLogConfig(**values)
