"""The real model on a GPU: recorded greedy outputs in float32, and how close bfloat16 stays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from baton.engine.config import EngineConfig
from baton.engine.gpu.device import CudaDevice
from gpu_harness import Output, gpu_engine

pytestmark = [pytest.mark.gpu, pytest.mark.model, pytest.mark.timeout(900)]


@pytest.mark.parametrize("budget", [1024, 48])
def test_golden_tokens_in_float32(
    smollm2_float32_dir: Path, golden_items: list[dict[str, Any]], budget: int
) -> None:
    """Whole prompts and chunks; decode steps run as graphs, two of them in flight."""
    config = EngineConfig(
        model_path=smollm2_float32_dir,
        dtype="float32",
        max_num_seqs=16,
        max_num_batched_tokens=budget,
        kv_cache_bytes=1 << 30,
    )
    output = Output(gpu_engine(config, CudaDevice(0)))
    for item in golden_items:
        output.submit(item["name"], item["prompt_token_ids"], max_tokens=64)
    output.run()
    for item in golden_items:
        expected = item["output_token_ids"]
        assert output.tokens[item["name"]][: len(expected)] == expected, item["name"]


def test_bfloat16_follows_the_golden_log_probabilities(
    smollm2_dir: Path, golden_items: list[dict[str, Any]]
) -> None:
    """The first token's five best, against float32: bfloat16 rounds logits of 20 by 0.06."""
    config = EngineConfig(model_path=smollm2_dir, max_num_seqs=16, kv_cache_bytes=1 << 30)
    output = Output(gpu_engine(config, CudaDevice(0)))
    for item in golden_items:
        output.submit(item["name"], item["prompt_token_ids"], max_tokens=1, logprobs=20)
    output.run()
    for item in golden_items:
        top = dict(output.logprobs[item["name"]][0].top)
        for candidate in item["first_top5"]:
            assert top[candidate["id"]] == pytest.approx(candidate["logprob"], abs=0.3), item[
                "name"
            ]
