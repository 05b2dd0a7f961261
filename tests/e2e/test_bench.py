"""`baton bench` on the real system, over HTTP and gRPC: what it tells is what the router counts."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from baton.cli.main import main
from running_system import RunningSystem

LOAD = ["--requests", "6", "--concurrency", "3", "--share", "1", "--json", "-"]


def bench(
    system: RunningSystem,
    capsys: pytest.CaptureFixture[str],
    *arguments: str,
    lengths: str = "40/5",
) -> dict[str, Any]:
    assert (
        main(["bench", "--url", system.url, *LOAD, "--lengths", lengths, *arguments], environ={})
        == 0
    )
    told: dict[str, Any] = json.loads(capsys.readouterr().out)["figures"]
    return told


@pytest.mark.parametrize("api", ["http", "grpc"])
@pytest.mark.parametrize("route", ["chat", "completions"])
def test_every_api_is_loaded_and_lengths_are_kept(
    system: RunningSystem, capsys: pytest.CaptureFixture[str], api: str, route: str
) -> None:
    where = ["--grpc", f"127.0.0.1:{system.grpc_port}"] if api == "grpc" else []
    more = ["--completions"] if route == "completions" else []
    told = bench(system, capsys, *where, *more)
    assert told["num_ok"] == 6
    assert told["num_output_tokens"] == 30
    # A word that is two tokens at the very beginning of a text is the only freedom there is.
    assert abs(told["num_prompt_tokens"] - 6 * 40) <= 6
    assert told["latencies"]["ttft_s"]["count"] == 6


def test_what_it_counts_is_what_the_router_counts(
    system: RunningSystem, client: httpx.Client, capsys: pytest.CaptureFixture[str]
) -> None:
    def counted() -> float:
        lines = client.get("/metrics").text.splitlines()
        name = "vllm:generation_tokens_total"
        return sum(float(line.split()[-1]) for line in lines if line.startswith(name))

    before = counted()
    told = bench(system, capsys, "--completions", "--token-ids", "40000")
    # No probes: ids need no calibration.
    assert counted() - before == told["num_output_tokens"] == 30
    assert told["num_prompt_tokens"] == 6 * 40


def test_conversations_hit_the_cache_with_the_servers_own_words(
    system: RunningSystem, capsys: pytest.CaptureFixture[str]
) -> None:
    told = bench(system, capsys, "--turns", "3", lengths="60/16")
    assert told["num_ok"] == 6
    assert told["cached_share"] > 0.3
    system.assert_nothing_leaked()
