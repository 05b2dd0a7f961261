"""`baton serve` from start to Ctrl-C, with and without Ray, as a new user meets it."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import grpc
import httpx
import openai
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)

from baton.rpc.v1 import inference_pb2, inference_pb2_grpc, worker_pb2
from running_system import RunningSystem

pytestmark = pytest.mark.model

STOP_LIMIT_S = 10.0
QUESTION = "Which city is the capital of France?"


def ask_over_http(system: RunningSystem) -> str:
    client = openai.OpenAI(base_url=f"{system.url}/v1", api_key="none", timeout=60)
    model = client.models.list().data[0].id
    stream = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": QUESTION}],
        temperature=0,
        max_tokens=20,
        stream=True,
    )
    return "".join(chunk.choices[0].delta.content or "" for chunk in stream)


def ask_over_grpc(system: RunningSystem) -> str:
    with grpc.insecure_channel(f"127.0.0.1:{system.grpc_port}") as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        model = stub.ListModels(inference_pb2.ListModelsRequest(), timeout=10).models[0].id
        request = inference_pb2.ChatRequest(
            model=model,
            messages=[inference_pb2.ChatMessage(role="user", content=QUESTION)],
            sampling=worker_pb2.SamplingParams(temperature=0, max_tokens=20),
        )
        return "".join(delta.text for delta in stub.Chat(request, timeout=60))


def ask_with_the_command(system: RunningSystem) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "baton.cli.main", "chat", "--url", system.url, "--once", QUESTION,
         "--temperature", "0", "--max-tokens", "20"],
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    return done.stdout


@contextlib.contextmanager
def endless_stream(system: RunningSystem) -> Iterator[None]:
    """Within the block, a long generation is running."""
    body = {
        "prompt": list(range(1000, 1300)),
        "max_tokens": 4000,
        "stream": True,
        "ignore_eos": True,
    }
    url = f"{system.url}/v1/completions"
    with httpx.stream("POST", url, json=body, timeout=60, trust_env=False) as response:
        lines = response.iter_lines()
        next(lines)
        yield


@pytest.mark.parametrize("mode", ["--no-ray", "--ray"])
def test_serves_every_client_and_stops_within_ten_seconds(
    start_system: Callable[..., RunningSystem], mode: str
) -> None:
    system = start_system(mode)
    for ask in (ask_over_http, ask_over_grpc, ask_with_the_command):
        assert "Paris" in ask(system), ask.__name__
    assert httpx.get(f"{system.url}/health", trust_env=False).status_code == 200
    metrics = httpx.get(f"{system.url}/metrics", trust_env=False).text
    assert "baton_time_to_first_token_seconds_count" in metrics
    assert "Traceback" not in system.logs()
    with endless_stream(system):
        assert system.interrupt(2 * STOP_LIMIT_S) < STOP_LIMIT_S
    assert system.leftovers() == []


@pytest.mark.parametrize("mode", ["--no-ray", pytest.param("--ray", marks=pytest.mark.slow)])
@pytest.mark.parametrize("delay_s", [0.7, 4.0])
def test_stops_within_ten_seconds_while_it_is_still_starting(
    make_system: Callable[..., RunningSystem], mode: str, delay_s: float
) -> None:
    system = make_system(mode)
    system.launch()
    time.sleep(delay_s)
    assert system.interrupt(2 * STOP_LIMIT_S) < STOP_LIMIT_S
    assert system.leftovers() == []


@pytest.mark.parametrize("mode", ["--no-ray", pytest.param("--ray", marks=pytest.mark.slow)])
def test_sigterm_stops_it_cleanly(start_system: Callable[..., RunningSystem], mode: str) -> None:
    system = start_system(mode)
    assert system.interrupt(2 * STOP_LIMIT_S, signal.SIGTERM) < STOP_LIMIT_S
    assert system.process is not None
    assert system.process.returncode == 0
    assert system.leftovers() == []


def test_grpc_reflection_and_health_answer(system: RunningSystem) -> None:
    with grpc.insecure_channel(f"127.0.0.1:{system.grpc_port}") as channel:
        services = set(ProtoReflectionDescriptorDatabase(channel).get_services())
        assert {"baton.v1.Inference", "grpc.health.v1.Health"} <= services
        request = health_pb2.HealthCheckRequest(service="baton.v1.Inference")
        deadline = time.monotonic() + 5
        stub = health_pb2_grpc.HealthStub(channel)
        # It follows the dispatcher's own verdict twice a second.
        while stub.Check(request, timeout=5).status != health_pb2.HealthCheckResponse.SERVING:
            assert time.monotonic() < deadline
            time.sleep(0.1)


def test_taken_port_is_an_error_that_says_what_to_do(
    start_system: Callable[..., RunningSystem], system: RunningSystem
) -> None:
    with pytest.raises(AssertionError, match="--http-port"):
        start_system("--no-ray", "--http-port", str(system.http_port))


def test_settings_of_the_environment_reach_the_system_and_rank_below_options(
    make_system: Callable[..., RunningSystem], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BATON_HTTP_PORT", "1")
    monkeypatch.setenv("BATON_MODEL_NAME", "named-by-the-environment")
    system = make_system("--no-ray")
    system.start()
    models = httpx.get(f"{system.url}/v1/models", trust_env=False).json()["data"]
    assert [m["id"] for m in models] == ["named-by-the-environment"]
    system.interrupt(2 * STOP_LIMIT_S)


def test_empty_model_folder_is_an_error_that_names_it(
    start_system: Callable[..., RunningSystem], tmp_path: pytest.TempPathFactory
) -> None:
    with pytest.raises(AssertionError, match=r"config\.json"):
        start_system("--no-ray", "--model", str(tmp_path))
