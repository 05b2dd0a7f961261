"""Client libraries: every way of asking gives the same greedy answer, and errors are their own."""

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


def told_by(client: ClientEnvironment, python: str, script: str, live: LiveSystem) -> Any:
    done = client.run(
        python, str(SCRIPTS / script), live.url, live.model, cwd=SCRIPTS,
        environ={"LITELLM_LOCAL_MODEL_COST_MAP": "True", "OPENAI_API_KEY": "none"},
    )  # fmt: skip
    return json.loads(done.stdout.splitlines()[-1])


def test_openai_sdk(live: LiveSystem) -> None:
    here = ClientEnvironment(Path(sys.prefix))
    told = told_by(here, sys.executable, "openai_sdk.py", live)
    assert told["models"] == [live.model]
    text = told["text"]
    assert "Paris" in text
    same = ("streamed", "events", "raw", "raw_streamed", "async_streamed")
    assert {name: told[name] for name in same} == dict.fromkeys(same, text)
    assert told["async"] == [text] * 4
    assert told["usage"] == told["streamed_usage"] <= 12
    assert told["logprobs"] >= told["usage"] - 1
    assert set(told["top_logprobs"]) == {2}
    assert told["raw_id"] == "mine-7"
    assert told["completions"] == [0, 1]
    assert told["seeded"][0] == told["seeded"][1]
    name, status, _, message = told["not_found"]
    assert (name, status) == ("NotFoundError", 404) and "nobody" in message
    name, status, param, _ = told["bad_request"]
    assert (name, status, param) == ("BadRequestError", 400, "temperature")


def test_litellm_sdk(live: LiveSystem, client_environment: Environment) -> None:
    client = client_environment("litellm", "litellm==1.90.0")
    told = told_by(client, client.python, "litellm_sdk.py", live)
    assert "Paris" in told["text"]
    assert told["streamed"] == told["async"] == told["text"]
    assert 0 < told["usage"] <= 12
    assert told["bad_request"] == 400


def test_langchain_openai(live: LiveSystem, client_environment: Environment) -> None:
    client = client_environment("langchain-openai", "langchain-openai>=1.0,<2")
    told = told_by(client, client.python, "langchain_sdk.py", live)
    assert "Paris" in told["text"]
    assert told["streamed"] == told["async"] == told["text"]
    assert told["batch"] == [told["text"]] * 3
    assert told["chain"] and told["completion"]
    assert 0 < told["usage"] <= 12


def test_llm_cli(live: LiveSystem, client_environment: Environment, tmp_path: Path) -> None:
    client = client_environment("llm", "llm==0.36")
    models = [{"model_id": "here", "model_name": live.model, "api_base": f"{live.url}/v1"}]
    (tmp_path / "extra-openai-models.yaml").write_text(json.dumps(models))
    question = "Which city is the capital of France?"
    options = ["-o", "max_tokens", "12", "-o", "temperature", "0", "--key", "none"]
    for more in ([], ["--no-stream"]):
        done = client.run(
            client.program("llm"), "-m", "here", question, *options, *more,
            cwd=tmp_path, environ={"LLM_USER_PATH": str(tmp_path)},
        )  # fmt: skip
        assert "Paris" in done.stdout
