"""A whole planner in virtual time: it follows, logs, resumes, corrects, and can be replayed."""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from baton.core.worker_info import Role
from baton.simulator.arrivals import RequestLengths, sampled
from made_up_worker import MODEL
from planned_world import World
from services.planner.actuator import PlannedWorker
from services.planner.autoscale import Autoscaler, Observation
from services.planner.autoscale_config import AutoscaleConfig, PoolLimits
from services.planner.candidate import Candidate, Layout, Pool, cluster_of
from services.planner.decision_log import DecisionLog, DecisionLogConfig, read_records
from services.planner.decision_record import (
    VERSION,
    Models,
    Record,
    Replay,
    Term,
    to_line,
)
from services.planner.elastic import ElasticRun
from services.planner.loop import PlannerLoop
from services.planner.objective import Objective
from services.planner.orders import Order, orders
from services.planner.pilots import Ongoing
from services.planner.planner import Decided, Planner
from services.planner.planner_gauges import PlannerGauges

LIMITS = PoolLimits(min_workers=1, max_workers=12)
CONFIG = AutoscaleConfig(
    ttft_s=0.4, itl_s=0.04, max_devices=24, prefill=LIMITS, decode=LIMITS, window_s=300
)
MODELS = Models(MODEL, MODEL)


class Run:
    """A world with a planner that acts in it."""

    def __init__(self, path: Path | None, config: AutoscaleConfig = CONFIG, **world: Any) -> None:
        self.world = World(**world)
        self.config, self.path = config, path
        self.start()

    def start(self) -> None:
        self.gauges = PlannerGauges()
        log = DecisionLog(DecisionLogConfig(self.path))
        self.planner = Planner(self.config, MODELS, log, self.gauges)
        self.loop = PlannerLoop(self.planner, self.world, self.world, self.gauges)

    def tick(self, rate: float | None = None, num: int = 1) -> Decided | None:
        if rate is not None:
            self.world.rate_per_s = rate
        decided = None
        for _ in range(num):
            self.world.pass_time(10)
            decided = self.loop.step(self.world.now_s)
        return decided

    def value(self, name: str, **labels: str) -> float | None:
        for line in self.gauges.page.decode().splitlines():
            if line.startswith(name) and all(f'{k}="{v}"' in line for k, v in labels.items()):
                return float(line.rpartition(" ")[2])
        return None


def test_pools_follow_a_step_up_and_down_again(tmp_path: Path) -> None:
    run = Run(tmp_path / "log.jsonl")
    run.tick(1.0, 10)
    assert (run.world.count(Role.PREFILL), run.world.count(Role.DECODE)) == (1, 1)
    run.tick(40.0, 20)
    grown = run.world.count(Role.PREFILL), run.world.count(Role.DECODE)
    assert grown[0] > 2 and grown[1] > 2
    run.tick(1.0, 90)
    assert run.world.count(Role.PREFILL) < grown[0] and run.world.count(Role.DECODE) < grown[1]
    assert all(word.split()[0] in ("start", "drain") for word in run.world.log)
    records = list(read_records(tmp_path / "log.jsonl"))
    assert [r.number for r in records] == list(range(119))


def test_every_logged_decision_comes_out_again(tmp_path: Path) -> None:
    path, rng = tmp_path / "log.jsonl", random.Random(3)
    run = Run(path, dataclasses.replace(CONFIG, can_change_roles=True), rate_per_s=5.0)
    for i in range(250):
        run.world.ttft_share, run.world.itl_share = rng.choice([1.0, 0.7]), rng.choice([1.0, 0.8])
        run.world.slowness = rng.choice([0.8, 1.0, 1.5])
        run.tick(rng.choice([None, 0.0, 3.0, 20.0, 60.0]))
        if i == 150:
            # In mid-file: a planner starts again and goes on.
            run.start()
    again = Replay()
    for record in read_records(path):
        assert again.step(record) == record.decision
    assert (again.num_equal, again.num_different) == (249 - 1, 0)


def test_workers_go_over_where_prompts_give_way_to_outputs(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    run = Run(path, dataclasses.replace(CONFIG, can_change_roles=True), rate_per_s=20.0)
    run.world.prompt_tokens, run.world.output_tokens = 1500, 16
    run.tick(num=15)
    run.world.prompt_tokens, run.world.output_tokens = 64, 400
    run.tick(num=15)
    assert any(word.startswith("change_role prefill-") for word in run.world.log)
    changes = run.value("baton_planner_role_changes_total", pool="decode")
    assert changes is not None and changes >= 1
    again = Replay()
    for record in read_records(path):
        assert again.step(record) == record.decision


def test_a_changed_line_is_seen_to_differ(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    Run(path).tick(30.0, 20)
    *_, last = read_records(path)
    changed = dataclasses.replace(last.decision.prefill, desired=7)
    other = dataclasses.replace(last, decision=dataclasses.replace(last.decision, prefill=changed))
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:-1], to_line(other)]) + "\n")
    again = Replay()
    for record in read_records(path):
        again.step(record)
    assert again.num_different == 1


def test_a_planner_that_starts_again_keeps_what_the_window_needs(tmp_path: Path) -> None:
    run = Run(tmp_path / "log.jsonl")
    run.tick(40.0, 20)
    high = run.world.count(Role.DECODE)
    run.world.rate_per_s = 1.0
    run.start()
    run.tick(num=5)
    # A planner without a memory would shrink the pools now.
    assert run.world.count(Role.DECODE) == high
    before = run.value("baton_planner_correction_ratio", term="prefill")
    assert before == pytest.approx(1.0, abs=0.01)
    *_, last = read_records(tmp_path / "log.jsonl")
    assert last.number == 19 + 4 - 1


def test_other_settings_start_afresh_and_numbers_go_on(tmp_path: Path) -> None:
    run = Run(tmp_path / "log.jsonl")
    run.tick(5.0, 10)
    run.config = dataclasses.replace(CONFIG, ttft_s=0.8)
    run.start()
    run.tick(5.0, 3)
    *_, last = read_records(tmp_path / "log.jsonl")
    assert last.config.ttft_s == 0.8 and last.number == 10


def test_slow_workers_correct_the_models_and_more_are_planned() -> None:
    fast, slow = Run(None), Run(None, slowness=2.0)
    for run in (fast, slow):
        run.tick(12.0, 120)
    ratio = slow.value("baton_planner_correction_ratio", term="decode_step")
    assert ratio == pytest.approx(2.0, rel=0.05)
    error = slow.value("baton_planner_prediction_error_ratio", term="prefill")
    assert error is not None and error < 0.2
    assert slow.world.count(Role.PREFILL) > fast.world.count(Role.PREFILL)


def test_no_statistics_leave_the_pools_as_they_are(caplog: pytest.LogCaptureFixture) -> None:
    run = Run(None)
    run.tick(30.0, 20)
    have = run.world.count(Role.PREFILL), run.world.count(Role.DECODE)
    decided_at = run.value("baton_planner_last_decision_timestamp_seconds")
    run.world.silent = set(run.world.copies)
    with caplog.at_level(logging.INFO):
        assert run.tick(num=50) is None
    assert (run.world.count(Role.PREFILL), run.world.count(Role.DECODE)) == have
    assert run.value("baton_planner_last_decision_timestamp_seconds") == decided_at
    assert run.value("baton_planner_failures_total", stage="read") == 100
    assert run.value("baton_planner_routers") == 0
    assert caplog.text.count("no statistics from router-0") == 1
    assert caplog.text.count("no router gives statistics") == 1
    run.world.silent = set()
    assert run.tick() is not None
    assert run.value("baton_planner_routers") == 2


def test_orders_that_fail_are_counted_and_given_again(caplog: pytest.LogCaptureFixture) -> None:
    run = Run(None)

    def refuse(role: Role) -> None:
        raise OSError("no device is free")

    original, run.world.start = run.world.start, refuse  # type: ignore[method-assign]
    run.tick(40.0, 5)
    failed = run.value("baton_planner_failures_total", stage="act")
    assert failed is not None and failed >= 4
    assert "no device is free" in caplog.text
    run.world.start = original  # type: ignore[method-assign]
    run.tick(num=3)
    assert run.world.count(Role.PREFILL) > 1


def test_a_step_that_breaks_is_counted_and_the_next_one_goes_on(
    caplog: pytest.LogCaptureFixture,
) -> None:
    run = Run(None)
    run.tick(num=2)

    def broken() -> None:
        raise RuntimeError("no sums today")

    read, run.world.read = run.world.read, broken  # type: ignore[assignment, method-assign]
    assert run.tick() is None
    assert run.value("baton_planner_failures_total", stage="decide") == 1
    run.world.read = read  # type: ignore[method-assign]
    assert run.tick() is not None


def test_a_clock_that_goes_back_stands_still(tmp_path: Path) -> None:
    run = Run(tmp_path / "log.jsonl")
    run.tick(5.0, 5)
    run.loop.step(run.world.now_s - 30)
    run.tick(5.0, 2)
    times = [r.seen.now_s for r in read_records(tmp_path / "log.jsonl")]
    assert times == sorted(times)


def test_a_clock_that_was_set_back_begins_anew(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = Run(tmp_path / "log.jsonl")
    run.world.now_s = 10_000.0
    run.tick(5.0, 5)
    run.world.now_s -= 3600
    run.tick(5.0, 5)
    assert "the clock went back by 3590 s" in caplog.text
    records, again = list(read_records(tmp_path / "log.jsonl")), Replay()
    assert records[-1].seen.now_s == run.world.now_s
    for record in records:
        again.step(record)
    assert again.num_different == 0


def test_corrections_go_on_being_learnt_after_a_clock_was_set_back() -> None:
    run = Run(None)
    run.world.now_s = 10_000.0
    run.tick(5.0, 20)
    run.world.now_s -= 3600
    run.world.slowness = 2.0
    run.tick(5.0, 60)
    ratio = run.value("baton_planner_correction_ratio", term="prefill")
    assert ratio is not None and ratio > 1.8


def test_gauges_say_what_was_decided() -> None:
    run = Run(None, dataclasses.replace(CONFIG, max_devices=4))
    assert run.value("baton_planner_desired_workers", pool="decode") is None
    run.tick(80.0, 10)
    desired = [run.value("baton_planner_desired_workers", pool=p) for p in ("prefill", "decode")]
    assert sum(n for n in desired if n is not None) == 4
    assert run.value("baton_planner_at_budget") == 1
    assert run.value("baton_planner_devices", kind="budget") == 4
    assert run.value("baton_planner_devices", kind="desired") == 4
    assert run.value("baton_planner_workers", pool="decode", state="ready") is not None
    assert run.value("baton_planner_arrivals_per_second", when="now") == pytest.approx(80)
    assert run.value("baton_planner_attainment_ratio", target="ttft") == 1
    ups = run.value("baton_planner_decisions_total", pool="prefill", direction="up")
    assert ups is not None and ups >= 1
    record = json.loads(run.gauges.last_decision)
    assert record["decision"]["is_at_budget"] is True


def test_routers_that_judge_by_other_targets_are_told_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    run = Run(None, ttft_s=2.0)
    run.tick(num=5)
    assert caplog.text.count("planned for are 0.4 s and 0.04 s") == 1


def test_decisions_of_a_simulated_run_come_out_again(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    config = dataclasses.replace(CONFIG, can_change_roles=True, window_s=40.0)
    log, scaler = DecisionLog(DecisionLogConfig(path)), Autoscaler(config, MODEL, MODEL)
    numbers = itertools.count()

    def pilot(
        seen: Observation, ongoing: Ongoing, workers: Sequence[PlannedWorker]
    ) -> Sequence[Order]:
        state = scaler.state() if log.prepare() else None
        decision = scaler.decide(seen)
        given = orders(decision, workers, config)
        log.write(
            Record(
                VERSION, next(numbers), "", config, MODELS, Term(), Term(), MODELS, 1, 0.0, seen,
                decision, tuple(order.kind.value for order in given), state,
            )
        )  # fmt: skip
        return given

    candidate = Candidate(Pool(MODEL, 1), Pool(MODEL, 1), 2048)
    elastic = ElasticRun(
        cluster_of(candidate, Layout(64, 800_000, 1024), seed=0),
        pilot, Objective(0.4, 0.04), start_s=5.0, interval_s=2.0,
    )  # fmt: skip
    elastic.run(
        sampled([RequestLengths(512, 16)], rate_per_s=12, num_requests=600, block_size=64, seed=1)
    )
    again, records = Replay(), list(read_records(path))
    for record in records:
        assert again.step(record) == record.decision
    assert again.num_equal == len(records) > 20
    assert any(record.orders for record in records)
