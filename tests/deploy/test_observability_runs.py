"""A real Prometheus scrapes the real system: every panel shows something, an alert reaches people.

The system computes, hands KV over, fetches a prefix from a peer, keeps blocks in a tier, moves a
running request, turns requests away, and in the end loses a worker.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from baton.core.worker_info import Role
from cluster import Cluster
from dashboard_files import PanelQuery, panel_queries
from monitoring import SETTINGS, Monitoring
from monitoring_tools import MonitoringTools, monitoring_tools
from rule_files import RULES, read_rules
from running_system import free_port
from tiny_llama import write_checkpoint, write_pair_tokenizer
from tools.dashboards import render

INTERVAL_S, RANGE_S = 10, 120
"""What stands for Grafana's $__rate_interval and $__range."""
SHOWN_S = 45.0
"""Until the last panel has its first sample."""
ALERT_S = 40.0
JOB = "baton"
LONG = {"max_tokens": 1800}


@pytest.fixture(scope="module")
def tools() -> MonitoringTools:
    return monitoring_tools()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("system")
    model = write_checkpoint(folder / "tiny", vocab_size=256, max_position_embeddings=2048)
    write_pair_tokenizer(model)
    settings = ("engine.kv_cache_bytes=16000000", "engine.block_size=16", "drain_s=20")
    cluster = Cluster(model, folder, *settings)
    cluster.add(Role.PREFILL, "tiers.host_bytes=4000000")
    for _ in range(2):
        cluster.add(Role.DECODE, "tiers.host_bytes=4000000")
    cluster.start_router("tenants.trust_tenant_header=true", "tenants.isolate_caches=false")
    try:
        asyncio.run(cluster.ready())
        yield cluster
    finally:
        asyncio.run(cluster.stop())


@pytest.fixture(scope="module")
def planner(cluster: Cluster) -> Iterator[str]:
    """Where one can be asked that watches the router. Its figures are of other workers."""
    port = free_port()
    settings = (
        "models.model=llama-3.1-8b", "models.machine=h200", "interval_s=0.5", f"port={port}",
        "autoscale.ttft_s=60", "autoscale.itl_s=10",
        f"stats.routers=http://127.0.0.1:{cluster.http_port}",
    )  # fmt: skip
    command = [sys.executable, "-m", "services.planner"]
    command += [word for setting in settings for word in ("--set", setting)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        yield f"127.0.0.1:{port}"
    finally:
        process.terminate()
        assert process.wait(30) == 0


@pytest.fixture(scope="module")
def monitoring(
    tools: MonitoringTools,
    cluster: Cluster,
    planner: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Monitoring]:
    """Watches the system from before its first request."""
    made = Monitoring(
        tools, tmp_path_factory.mktemp("monitoring"),
        targets=[f"127.0.0.1:{cluster.http_port}", planner],
        pauses={"BatonWorkersMissing": "1s"},
    )  # fmt: skip
    try:
        made.start()
        made.until(lambda: made.now("baton_workers"))
        yield made
    finally:
        made.stop()


def ask(cluster: Cluster, number: int, *, tenant: str = "acme", **body: object) -> int:
    """A completion; returns its HTTP status. Prompts of one number begin alike."""
    given = {
        "model": "tiny",
        "prompt": [(number * 7 + i) % 250 for i in range(120)],
        "max_tokens": 24,
        "ignore_eos": True,
        "temperature": 0,
        **body,
    }
    headers = {"X-Tenant-Id": tenant, "X-SLO-Class": "interactive" if number % 3 else "batch"}
    # So much time that no machine is too slow for it.
    headers |= {"X-SLO-TTFT-Ms": "60000", "X-SLO-ITL-Ms": "10000"} if number % 3 else {}
    url = f"http://127.0.0.1:{cluster.http_port}/v1/completions"
    with httpx.Client(timeout=60, trust_env=False) as client:
        return client.post(url, json=given, headers=headers).status_code


def busy_decode_worker(cluster: Cluster, monitoring: Monitoring) -> str:
    """The name of one with running sequences, asked by itself: reports may be a second old."""
    busy: list[str] = []

    def look() -> bool:
        for name in ("decode-0", "decode-1"):
            if asyncio.run(cluster.info(name)).load.num_running > 1:
                busy.append(name)
        return bool(busy)

    monitoring.until(look)
    return busy[0]


@pytest.fixture(scope="module")
def traffic(cluster: Cluster, monitoring: Monitoring) -> int:
    """All of it over; returns how many requests were served."""
    with ThreadPoolExecutor(8) as pool:
        rounds = [pool.submit(ask, cluster, n % 12, tenant=f"t{n % 3}") for n in range(48)]
        assert {each.result() for each in rounds} == {200}
        assert ask(cluster, 1, model="another") == 404
        long = [pool.submit(ask, cluster, 20 + n, **LONG) for n in range(6)]
        leaving = busy_decode_worker(cluster, monitoring)
        cluster.leave(leaving)
        assert {each.result() for each in long} == {200}
    assert asyncio.run(cluster.ended(leaving, 30)) == 0
    cluster.restart(leaving)
    asyncio.run(cluster.ready())
    return 48 + 6


def test_settings_for_a_machine_without_kubernetes_are_valid(tools: MonitoringTools) -> None:
    done = tools.run(tools.promtool, "check", "config", SETTINGS / "prometheus.yml")
    assert done.returncode == 0, done.stdout
    for file in RULES.glob("*.yaml"):
        assert file.name in done.stdout
    done = tools.run(tools.amtool, "check-config", SETTINGS / "alertmanager.yml")
    assert done.returncode == 0, done.stdout


def test_every_panel_shows_something(
    cluster: Cluster, monitoring: Monitoring, traffic: int
) -> None:
    queries = list(panel_queries())
    assert len(queries) > 80
    missing = queries
    deadline = time.monotonic() + SHOWN_S
    while missing and time.monotonic() < deadline:
        assert ask(cluster, int(time.monotonic()) % 12) == 200
        missing = [query for query in missing if not _has_numbers(monitoring, query)]
    assert not missing, [f"{q.board}: {q.panel}: {q.expr}" for q in missing]


def test_a_dashboard_can_be_looked_at_without_grafana(
    monitoring: Monitoring, traffic: int, tmp_path: Path
) -> None:
    options = ["--prometheus", monitoring.url, "--job", JOB, "--minutes", "1", "--interval", "10"]
    assert render.main([*options, "--board", "router", "--out", str(tmp_path)]) == 0
    assert (tmp_path / "router.png").read_bytes().startswith(b"\x89PNG")
    nobody = ["--prometheus", f"http://127.0.0.1:{free_port()}", "--out", str(tmp_path)]
    assert render.main(nobody) == 1


def test_rules_are_evaluated_without_errors(monitoring: Monitoring, traffic: int) -> None:
    rules = [r for group in monitoring.ask("rules")["groups"] for r in group["rules"]]
    assert {rule["name"] for rule in rules} == {rule.name for rule in read_rules()}
    assert {(rule["health"], rule.get("lastError", "")) for rule in rules} == {("ok", "")}
    for rule in read_rules():
        if not rule.is_alert:
            assert monitoring.history(rule.name, range_s=RANGE_S), rule.name


def test_series_say_what_happened(monitoring: Monitoring, traffic: int) -> None:
    """Against what the clients saw."""
    assert monitoring.number("sum(baton_requests_total)") >= traffic
    assert monitoring.number('sum(baton_requests_total{finish_reason="error"})') == 0
    assert monitoring.number('sum(baton_requests_rejected_total{status="404"})') == 1
    moved = monitoring.number('sum(baton_migrations_total{reason="drain",result="moved"})')
    assert moved > 0
    by_tenant = monitoring.now('baton_tenant_requests_total{tenant=~"t."}')
    assert sorted((labels["tenant"], count) for labels, count in by_tenant) == [
        ("t0", 16), ("t1", 16), ("t2", 16),
    ]  # fmt: skip
    for name in (
        "baton:slo_attainment:ratio_rate5m",
        "baton:pool_kv_usage:ratio",
        "baton:prefix_cache_hit:ratio_rate5m",
        "baton:kv_transfer_hidden:ratio_rate5m",
    ):
        assert all(0 <= value <= 1 for _, value in monitoring.now(name)), name
    monitoring.until(lambda: monitoring.number("sum(baton_requests_running)") == 0)


def test_nobody_is_called_while_the_system_serves(monitoring: Monitoring, traffic: int) -> None:
    assert monitoring.now('ALERTS{alertstate="firing",severity="critical"}') == []
    # Warnings may be right: a machine with too much to do fails takeovers and forgets leases.
    assert [body for path, body in monitoring.webhook.notifications if "call" in path] == []


def test_an_alert_reaches_its_receiver_and_is_called_off(
    cluster: Cluster, monitoring: Monitoring, traffic: int
) -> None:
    def received(status: str) -> list[dict[str, Any]]:
        """Alerts of that name that were sent to whoever is called."""
        return [
            alert
            for path, body in monitoring.webhook.notifications
            for alert in body["alerts"]
            if path == "/call-somebody"
            and alert["labels"]["alertname"] == "BatonWorkersMissing"
            and alert["status"] == status
        ]

    cluster.kill("prefill-0")
    monitoring.until(lambda: received("firing"), ALERT_S)
    alert = received("firing")[0]
    assert alert["labels"]["role"] == "prefill" and alert["labels"]["job"] == JOB
    assert alert["annotations"]["description"].startswith(
        "A router of baton sees 0 live prefill workers."
    )
    assert alert["annotations"]["runbook_url"] == "docs/runbook.md#batonworkersmissing"
    cluster.restart("prefill-0")
    asyncio.run(cluster.ready())
    monitoring.until(lambda: received("resolved"), ALERT_S)
    asyncio.run(cluster.calm())


def _has_numbers(monitoring: Monitoring, query: PanelQuery) -> bool:
    expr = query.filled_in(JOB, interval_s=INTERVAL_S, range_s=RANGE_S)
    if query.is_instant:
        return bool(monitoring.now(expr))
    return bool(monitoring.history(expr, range_s=RANGE_S))
