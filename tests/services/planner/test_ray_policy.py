"""The policy inside Serve's controller: it decides once an interval, and never fails with it."""

from __future__ import annotations

import dataclasses
import json
import logging
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest
import yaml

from made_up_worker import MODEL
from running_system import free_port
from services.planner.actuator import WorkerPhase
from services.planner.profile_file import profile_json
from services.planner.ray_policy import Replicas, SloPolicy, statistics
from services.router.pool_stats import PoolStats

NOW_S = 1_000_000.0
INTERVAL_S = 5.0
WINDOW_S = 60.0


@dataclass(frozen=True)
class Deployment:
    name: str


@dataclass
class Value:
    timestamp: float
    value: float


@dataclass
class Context:
    target_num_replicas: int
    running_replicas: list[str]
    raw_metrics: dict[str, dict[object, list[Value]]] = field(default_factory=dict)


@dataclass
class Cluster:
    """One router, and pools that become at once what the policy says."""

    folder: Path
    now_s: float = NOW_S
    stats: PoolStats = field(default_factory=lambda: PoolStats(uptime_s=100.0))
    num: dict[str, int] = field(default_factory=lambda: {"Prefill": 1, "Decode": 1})
    is_silent: bool = False

    def policy(self, **changes: object) -> SloPolicy:
        profile = self.folder / "profile.json"
        profile.write_text(
            json.dumps(profile_json(MODEL, MODEL, kv_bytes_per_token=100, source="made up"))
        )
        settings = {
            "autoscale": {"ttft_s": 1.0, "itl_s": 0.05, "window_s": WINDOW_S, "forecast_s": 5},
            "models": {"profile": str(profile), "start_s": 5},
            "decisions": {"path": str(self.folder / "decisions.jsonl")},
            "interval_s": INTERVAL_S,
            "port": 0,
            **changes,
        }
        file = self.folder / "planner.yaml"
        file.write_text(yaml.safe_dump(settings))
        return SloPolicy(str(file), clock=lambda: self.now_s)

    def contexts(self) -> dict[Deployment, Context]:
        found = {
            Deployment(name): Context(num, [f"{name}#{i}" for i in range(num)])
            for name, num in self.num.items()
        }
        numbers = {} if self.is_silent else self.stats.to_numbers()
        metrics: dict[str, dict[object, list[Value]]] = {
            name: {"Router#0": [Value(self.now_s - 9, -1.0), Value(self.now_s, value)]}
            for name, value in numbers.items()
        }
        metrics["ongoing"] = {"Router#0": [Value(self.now_s, 3.0)]}
        found[Deployment("Router")] = Context(1, ["Router#0"], metrics)
        return found

    def advance(self, policy: SloPolicy, seconds: float, rate_per_s: float) -> list[int]:
        """Desired decode replicas over the time, each once."""
        seen: list[int] = []
        for _ in range(int(seconds)):
            self.now_s += 1.0
            num = rate_per_s
            old = self.stats
            self.stats = dataclasses.replace(
                old,
                uptime_s=old.uptime_s + 1.0,
                num_arrived=old.num_arrived + num,
                num_prompts=old.num_prompts + num,
                uncached_tokens=old.uncached_tokens + 500 * num,
                pairs=old.pairs + 125_000 * num,
                num_ended=old.num_ended + num,
                output_tokens=old.output_tokens + 200 * num,
                held_tokens=old.held_tokens + 200 * 600 * num,
            )
            desired = {d.name: n for d, n in policy(self.contexts())[0].items()}
            assert set(desired) == {"Prefill", "Decode"}
            self.num = desired
            if not seen or seen[-1] != desired["Decode"]:
                seen.append(desired["Decode"])
        return seen


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    yield Cluster(tmp_path)


def test_pools_follow_the_load_up_and_down_again(cluster: Cluster) -> None:
    policy = cluster.policy()
    assert cluster.advance(policy, 20, 0.5) == [1]
    up = cluster.advance(policy, 60, 12.0)
    assert up[-1] > 2
    assert up == sorted(up)
    down = cluster.advance(policy, 600, 0.5)
    assert down[-1] == 1
    assert down == sorted(down, reverse=True)


def test_one_decision_an_interval_and_the_same_answer_between(cluster: Cluster) -> None:
    policy = cluster.policy()
    for _ in range(3 * int(INTERVAL_S) * 10):
        cluster.now_s += 0.1
        cluster.stats = dataclasses.replace(cluster.stats, uptime_s=cluster.stats.uptime_s + 0.1)
        policy(cluster.contexts())
    lines = (cluster.folder / "decisions.jsonl").read_text().splitlines()
    assert 2 <= len(lines) <= 3


def test_controller_that_starts_again_without_a_log_shrinks_nothing_for_a_whole_window(
    cluster: Cluster,
) -> None:
    cluster.num = {"Prefill": 2, "Decode": 4}
    log = {"decisions": {}}
    first = cluster.policy(**log)
    assert cluster.advance(first, WINDOW_S - 2 * INTERVAL_S, 0.1) == [4]
    again = cluster.policy(**log)
    assert cluster.advance(again, WINDOW_S - 2 * INTERVAL_S, 0.1) == [4]
    assert cluster.advance(again, 6 * INTERVAL_S, 0.1)[-1] == 1


def test_controller_that_starts_again_goes_on_from_its_log(cluster: Cluster) -> None:
    first = cluster.policy()
    cluster.advance(first, 60, 12.0)
    num = cluster.num["Decode"]
    again = cluster.policy()
    assert cluster.advance(again, 10, 12.0) == [num]
    numbers = [
        json.loads(line)["number"]
        for line in (cluster.folder / "decisions.jsonl").read_text().splitlines()
    ]
    assert numbers == list(range(len(numbers)))


def test_policy_that_another_one_replaces_gives_its_port_to_it(cluster: Cluster) -> None:
    port = free_port()

    def number() -> int | None:
        answer = httpx.get(f"http://127.0.0.1:{port}/decision", trust_env=False).json()
        return None if answer is None else int(answer["number"])

    num_threads = threading.active_count()
    policy = cluster.policy(port=port)
    cluster.advance(policy, 20, 1.0)
    before = number()
    assert before is not None
    # Serve makes the new one first.
    again = cluster.policy(port=port)
    del policy
    cluster.advance(again, 20, 1.0)
    assert (number() or 0) > before
    del again
    deadline = time.monotonic() + 10
    while threading.active_count() > num_threads and time.monotonic() < deadline:
        time.sleep(0.05)
    assert threading.active_count() == num_threads


def test_without_statistics_every_pool_stays_as_it_is(cluster: Cluster) -> None:
    policy = cluster.policy()
    cluster.num, cluster.is_silent = {"Prefill": 3, "Decode": 5}, True
    assert cluster.advance(policy, 30, 0.0) == [5]
    assert cluster.num == {"Prefill": 3, "Decode": 5}


def test_wrong_settings_are_told_and_hurt_nobody(
    cluster: Cluster, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.ERROR):
        policy = cluster.policy(autoscale={"ttft_s": 1.0, "itl_s": -1.0})
    assert "no autoscaling: " in caplog.text
    assert "itl_s must be above 0" in caplog.text
    cluster.num["Decode"] = 3
    assert cluster.advance(policy, 10, 5.0) == [3]


def test_decision_that_raises_is_logged_once_and_tried_again(
    cluster: Cluster, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = cluster.policy()

    def fail(*_: object) -> None:
        raise ZeroDivisionError("no such number")

    with caplog.at_level(logging.ERROR), monkeypatch.context() as patch:
        patch.setattr(Replicas, "look", fail)
        assert cluster.advance(policy, 30, 5.0) == [1]
    assert caplog.text.count("no decision could be made") == 1
    assert cluster.advance(policy, 60, 12.0)[-1] > 1


def test_old_and_foreign_statistics_are_left_out(cluster: Cluster) -> None:
    contexts = cluster.contexts()
    assert list(statistics(contexts, cluster.now_s)) == ["Router#0"]
    assert statistics(contexts, cluster.now_s) == {"Router#0": cluster.stats}
    assert statistics(contexts, cluster.now_s + 61) == {}
    router = contexts[Deployment("Router")]
    router.raw_metrics = {"ongoing": {"Router#1": [Value(cluster.now_s, 1.0)]}}
    assert statistics(contexts, cluster.now_s) == {}


def test_replicas_that_are_to_come_count_as_starting() -> None:
    replicas = Replicas()
    first = replicas.look({Deployment("Decode"): Context(2, ["a"])}, 10.0)
    assert [(w.phase, w.joined_s) for w in first] == [
        (WorkerPhase.READY, float("-inf")),
        (WorkerPhase.STARTING, float("-inf")),
    ]
    second = replicas.look({Deployment("Decode"): Context(2, ["a", "b"])}, 20.0)
    assert [(w.name, w.joined_s) for w in second] == [("a", float("-inf")), ("b", 20.0)]
