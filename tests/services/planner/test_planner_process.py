"""`python -m services.planner` as a process, its port, its settings."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import httpx
import pytest

from baton.core.errors import ConfigError
from planned_world import World
from services.planner.__main__ import main
from services.planner.decision_log import read_records
from services.planner.metrics_port import MetricsPort
from services.planner.planner_config import ModelsConfig, load_models, load_planner_config
from services.planner.planner_gauges import PlannerGauges
from services.router.edge.scrape_target import read_targets
from tests.services.planner.test_http_stats import Copy

SETTINGS = (
    "models.model=llama-3.1-8b", "models.machine=h200", "autoscale.ttft_s=0.5",
    "autoscale.itl_s=0.03", "port=0", "interval_s=0.2",
)  # fmt: skip


@pytest.fixture
def port(tmp_path: Path) -> Iterator[MetricsPort]:
    port = MetricsPort(PlannerGauges(), host="127.0.0.1", port=0, targets_dir=tmp_path)
    port.start()
    with closing(_Stopping(port)):
        yield port


class _Stopping:
    def __init__(self, port: MetricsPort) -> None:
        self.port = port

    def close(self) -> None:
        self.port.stop()


def test_the_port_answers_and_says_where(port: MetricsPort, tmp_path: Path) -> None:
    (target,) = read_targets(tmp_path)
    assert (target.name, target.address) == ("planner", f"127.0.0.1:{port.port}")
    with httpx.Client(base_url=f"http://{target.address}", trust_env=False) as client:
        text = client.get("/metrics").text
        assert "baton_planner_decisions_total" in text
        # Nothing has been decided, and nobody must act on a zero.
        assert "baton_planner_desired_workers{" not in text
        assert client.get("/decision").json() is None
        assert client.get("/health").json()["status"] == "ok"
        assert client.head("/metrics").status_code == 200
        assert client.post("/metrics").status_code == 405
        assert "a planner has /metrics" in client.get("/v1/models").text
    port.stop()
    assert read_targets(tmp_path) == []
    assert not any(t.name == "planner metrics" for t in threading.enumerate())


def test_a_port_that_is_taken_is_refused_and_one_never_started_is_freed(port: MetricsPort) -> None:
    with pytest.raises(ConfigError, match="cannot listen on"):
        MetricsPort(PlannerGauges(), host="127.0.0.1", port=port.port)
    unused = MetricsPort(PlannerGauges(), host="127.0.0.1", port=0)
    number = unused.port
    unused.stop()
    again = MetricsPort(PlannerGauges(), host="127.0.0.1", port=number)
    again.stop()


def test_health_says_when_no_step_ends() -> None:
    port = MetricsPort(PlannerGauges(), host="127.0.0.1", port=0, is_alive=lambda: False)
    port.start()
    with closing(_Stopping(port)):
        answer = httpx.get(f"http://127.0.0.1:{port.port}/health", trust_env=False)
    assert answer.status_code == 503


def test_a_planner_watches_routers_and_stops_on_a_signal(tmp_path: Path) -> None:
    world, log = World(num_copies=1, rate_per_s=30.0), tmp_path / "decisions.jsonl"
    with closing(Copy()) as copy:
        settings = (*SETTINGS, f"stats.routers=http://{copy.place}", f"decisions.path={log}")
        command = [sys.executable, "-m", "services.planner"]
        command += [word for setting in settings for word in ("--set", setting)]
        child = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        try:
            assert child.stderr is not None
            ready = json.loads(next(child.stderr))
            assert ready["message"] == "planner ready", ready
            url = f"http://127.0.0.1:{ready['port']}/metrics"
            deadline_s = time.monotonic() + 60
            while "baton_planner_desired_workers{" not in (text := _get(url)):
                assert time.monotonic() < deadline_s, text
                world.pass_time(0.2)
                copy.body = json.dumps(world.copies["router-0"].to_numbers()).encode()
                time.sleep(0.1)
            assert 'baton_planner_workers{pool="prefill",state="ready"} 1.0' in text
        finally:
            child.send_signal(signal.SIGTERM)
            rest = child.communicate(timeout=30)[1]
    assert child.returncode == 0, rest
    assert "planner stopped" in rest
    # It only tells.
    assert all(record.orders == () for record in read_records(log))


def _get(url: str) -> str:
    return httpx.get(url, trust_env=False, timeout=10).text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ((), "autoscale"),
        (("autoscale.ttft_s=0.5", "autoscale.itl_s=0.03"), "models"),
        ((*SETTINGS, "models.profile=p.json"), "models needs either profile, or model and machine"),
        ((*SETTINGS[1:],), "models.model and models.machine belong together"),
        ((*SETTINGS,), "stats.routers is empty"),
        ((*SETTINGS, "autoscale.decode.max_workers=0"), "max_workers must be at least 1, got 0"),
        ((*SETTINGS, "interval_s=0"), "interval_s must be from 0.1 to 3600"),
        ((*SETTINGS, "port=70000"), "port must be between 0 and 65535"),
        ((*SETTINGS, "models.machine=abacus"), "abacus"),
        ((*SETTINGS, "models.decode_tensor_parallel=3"), "does not divide"),
        ((*SETTINGS, "autoscale.can_change_roles=true"), "can_change_roles: nobody who follows"),
        ((*SETTINGS, "autoscale.colour=red"), "unknown setting autoscale.colour"),
    ],
)
def test_wrong_settings_end_it_with_one_line(
    settings: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    handlers = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    try:
        status = main([word for setting in settings for word in ("--set", setting)])
    finally:
        for number, handler in zip((signal.SIGTERM, signal.SIGINT), handlers, strict=True):
            signal.signal(number, handler)
    assert status == 2
    error = capsys.readouterr().err
    assert error.startswith("baton planner: ") and message in error and error.count("\n") == 1


def test_models_come_from_a_profile_too(tmp_path: Path) -> None:
    worker = {
        "tensor_parallel": 2, "max_kv_tokens": 1000, "step_fixed_s": 0.02, "prefill_token_s": 1e-4,
        "prefill_pair_s": 0, "decode_sequence_s": 1e-4, "decode_kv_token_s": 0,
        "link_bytes_per_second": 1e9, "start_s": 7,
    }  # fmt: skip
    path = tmp_path / "profile.json"
    path.write_text(json.dumps({"kv_bytes_per_token": 1, "workers": [worker]}))
    models = load_models(ModelsConfig(path, None, None, 2, 2))
    assert (models.prefill.tensor_parallel, models.decode.start_s) == (2, 7)
    assert load_models(ModelsConfig(path, None, None, 2, 2, 3.0)).prefill.start_s == 3
    with pytest.raises(ConfigError, match=r"prefill_tensor_parallel is 1, and .* of 2"):
        load_models(ModelsConfig(path))


def test_settings_come_from_file_and_environment(tmp_path: Path) -> None:
    file = tmp_path / "planner.yaml"
    file.write_text(
        "autoscale: {ttft_s: 1, itl_s: 0.1, decode: {max_workers: 5}}\n"
        "models: {model: llama-3.1-8b, machine: h100}\n"
        "stats: {routers: ['dns://baton-metrics:8001']}\n"
    )
    config = load_planner_config(file=file, environ={**os.environ, "BATON_AUTOSCALE__TTFT_S": "2"})
    assert config.autoscale.ttft_s == 2 and config.autoscale.decode.max_workers == 5
    assert config.stats.routers == ("dns://baton-metrics:8001",)
