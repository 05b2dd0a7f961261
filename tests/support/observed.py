"""A disaggregated system whose metrics and traces are looked at, and what there is to see."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from running_system import RunningSystem
from tiny_llama import write_checkpoint, write_pair_tokenizer
from trace_collector import TraceCollector

MODEL = "tiny"
PROMPT = [(7 * i) % 256 for i in range(90)]
NUM_TOKENS = 12
WAIT_S = 20.0
SETTLE_S = 2.5
"""Idle workers say what there is to say once a second, and so does the router."""

Sample = tuple[str, frozenset[tuple[str, str]]]


class Scrape:
    """One answer of /metrics."""

    def __init__(self, text: str) -> None:
        self.families = {f.name: f for f in text_string_to_metric_families(text)}
        self.values: dict[Sample, float] = {
            (s.name, frozenset(s.labels.items())): s.value
            for f in self.families.values()
            for s in f.samples
        }

    def value(self, name: str, **labels: str) -> float:
        return self.values[name, frozenset(labels.items())]

    def total(self, name: str, **labels: str) -> float:
        wanted = labels.items()
        return sum(v for (n, ls), v in self.values.items() if n == name and wanted <= ls)

    @property
    def shown(self) -> set[str]:
        """Families that have samples, under the names they are declared with."""
        return {_declared(f.name, f.type) for f in self.families.values() if f.samples}

    @property
    def busy_seconds(self) -> float:
        """Of all engines."""
        return self.total("baton_worker_busy_seconds_total")

    def engine_seconds(self, **labels: str) -> float:
        """Of all tenants, or of those with `labels`."""
        return self.total("baton_tenant_engine_seconds_total", **labels)


def _declared(name: str, kind: str) -> str:
    return name + "_total" if kind == "counter" else name


def system_of(folder: Path, collector: TraceCollector) -> RunningSystem:
    """Every prompt through both workers; traced is who asks for it."""
    model = folder / MODEL
    write_checkpoint(model)
    write_pair_tokenizer(model)
    run_dir = folder / "run"
    run_dir.mkdir()
    arguments = [
        "--no-ray", "--model", str(model), "--dtype", "float32",
        "--set", "router.policy.local_prefill_max_tokens=0",
        "--set", f"router.tracing.otlp_endpoint={collector.endpoint}",
        "--set", "router.tracing.sample_ratio=0",
        "--set", "router.tenants.trust_tenant_header=true",
        "--set", "prefill.engine.max_num_batched_tokens=64",
    ]  # fmt: skip
    return RunningSystem(arguments, run_dir)


@dataclass
class Observed:
    """The running system and its collector."""

    system: RunningSystem
    collector: TraceCollector
    first_scrape: Scrape = field(init=False)
    """Before any request."""

    def __post_init__(self) -> None:
        self.first_scrape = self.scrape_when(lambda s: s.value("baton_router_ready") == 1)

    @property
    def completions_url(self) -> str:
        return f"{self.system.url}/v1/completions"

    def scrape(self) -> Scrape:
        url = f"{self.system.url}/metrics"
        return Scrape(httpx.get(url, timeout=10, trust_env=False).text)

    def scrape_when(self, is_there: Callable[[Scrape], bool]) -> Scrape:
        deadline = time.monotonic() + WAIT_S
        while not is_there(seen := self.scrape()):
            assert time.monotonic() < deadline, "not shown in time"
            time.sleep(0.2)
        return seen

    def settled(self) -> Scrape:
        """When nothing is under way and all has been told."""
        deadline = time.monotonic() + WAIT_S
        seen = self.scrape()
        while True:
            time.sleep(SETTLE_S)
            last, seen = seen, self.scrape()
            if _spent(last) == _spent(seen):
                return seen
            assert time.monotonic() < deadline, "goes on counting"

    def body(self, **changes: object) -> dict[str, object]:
        body = {"model": MODEL, "prompt": PROMPT, "max_tokens": NUM_TOKENS, "ignore_eos": True}
        return body | changes

    def post(self, body: dict[str, object], headers: dict[str, str]) -> httpx.Response:
        return httpx.post(
            self.completions_url,
            json=self.body(**body),
            headers=headers,
            timeout=60,
            trust_env=False,
        )

    def complete(self, body: dict[str, object] | None = None, **headers: str) -> dict[str, Any]:
        """The first choice. Header names have underscores for hyphens."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        answer = self.post(body or {}, named)
        assert answer.status_code == 200, answer.text
        choice = answer.json()["choices"][0]
        assert isinstance(choice, dict)
        return choice


def _spent(seen: Scrape) -> tuple[float, float]:
    return seen.busy_seconds, seen.engine_seconds()
