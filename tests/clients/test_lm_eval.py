"""lm-eval over the completions route: log-likelihoods by `echo` with `logprobs`, and generation."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from client_environments import ClientEnvironment
from live_system import LiveSystem

pytestmark = [pytest.mark.clients, pytest.mark.timeout(2400)]

CHOICES = """
task: capitals
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/capitals.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "The capital of {{country}} is"
doc_to_target: "{{answer}}"
doc_to_choice: "{{choices}}"
metric_list: [{metric: acc}]
"""
GENERATED = """
task: counting
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/capitals.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "1, 2, 3, 4,"
doc_to_target: " 5"
generation_kwargs: {until: [","], max_gen_toks: 4, temperature: 0}
metric_list: [{metric: exact_match}]
"""
ROWS = [("France", "Paris"), ("Italy", "Rome"), ("Japan", "Tokyo"), ("Spain", "Madrid")]


def test_lm_eval(
    live: LiveSystem, client_environment: Callable[..., ClientEnvironment], tmp_path: Path
) -> None:
    client = client_environment("lm-eval", "lm-eval[api]==0.4.13", "transformers")
    choices = [f" {city}" for _, city in ROWS]
    rows = [
        {"country": country, "choices": choices, "answer": i} for i, (country, _) in enumerate(ROWS)
    ]
    (tmp_path / "capitals.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    for name, task in (("capitals", CHOICES), ("counting", GENERATED)):
        (tmp_path / f"{name}.yaml").write_text(task.replace("FOLDER", str(tmp_path)))
    client.run(
        client.program("lm_eval"), "--model", "local-completions", "--model_args",
        f"model={live.model},base_url={live.url}/v1/completions,tokenizer={live.tokenizer},"
        "num_concurrent=2,max_retries=1,tokenized_requests=True",
        "--include_path", str(tmp_path), "--tasks", "capitals,counting", "--batch_size", "1",
        "--output_path", str(tmp_path / "out"),
        cwd=tmp_path, environ={"OPENAI_API_KEY": "none", "HF_HOME": str(tmp_path / "hf")},
    )  # fmt: skip
    (report,) = (tmp_path / "out").rglob("results_*.json")
    told = json.loads(report.read_text())["results"]
    assert told["capitals"]["acc,none"] == 1.0
    assert told["counting"]["exact_match,none"] == 1.0
