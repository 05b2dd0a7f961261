"""Greedy outputs of the real model, token for token, against recorded transformers outputs.

The recorded gap between the best two logits is at least 1e-3 at nearly every position; float32
sums in another order move logits by about 1e-5, so a difference is an error and not a tie.
"""

from __future__ import annotations

from typing import Any

import pytest

pytestmark = [pytest.mark.model, pytest.mark.timeout(600)]


@pytest.fixture(autouse=True)
def fresh_blocks(smollm2: Any) -> None:
    smollm2.reset()


def generate(smollm2: Any, sequence: Any, num_tokens: int) -> list[int]:
    """Decode alone until `num_tokens` are output."""
    while sequence.num_output_tokens < num_tokens:
        smollm2.step((sequence, 1))
    return sequence.output_token_ids


def test_whole_prompts(smollm2: Any, golden_items: list[dict[str, Any]]) -> None:
    for item in golden_items:
        smollm2.reset()
        prompt, expected = item["prompt_token_ids"], item["output_token_ids"]
        sequence = smollm2.sequence(prompt)
        smollm2.step((sequence, len(prompt)))
        assert generate(smollm2, sequence, len(expected)) == expected, item["name"]


@pytest.mark.parametrize("chunk", [16, 100])
def test_chunked_prompts(smollm2: Any, golden_items: list[dict[str, Any]], chunk: int) -> None:
    for item in golden_items:
        smollm2.reset()
        prompt, expected = item["prompt_token_ids"], item["output_token_ids"][:16]
        sequence = smollm2.sequence(prompt)
        while sequence.num_computed_tokens < len(prompt):
            left = len(prompt) - sequence.num_computed_tokens
            smollm2.step((sequence, min(chunk, left)))
        assert generate(smollm2, sequence, len(expected)) == expected, item["name"]


def test_batched_with_others(smollm2: Any, golden_items: list[dict[str, Any]]) -> None:
    """Prompts join a running batch one by one, so steps mix prefill and decode."""
    running: list[Any] = []
    waiting = list(golden_items)
    pending = {}
    while waiting or pending:
        work = [(s, 1) for s in running]
        if waiting:
            item = waiting.pop(0)
            sequence = smollm2.sequence(item["prompt_token_ids"])
            work.append((sequence, sequence.num_prompt_tokens))
            pending[sequence] = item
            running.append(sequence)
        smollm2.step(*work)
        for sequence in [s for s in running if s in pending]:
            if sequence.num_output_tokens == len(pending[sequence]["output_token_ids"]):
                item = pending.pop(sequence)
                assert sequence.output_token_ids == item["output_token_ids"], item["name"]
                running.remove(sequence)


def test_first_token_logprobs(smollm2: Any, golden_items: list[dict[str, Any]]) -> None:
    for item in golden_items:
        smollm2.reset()
        prompt = item["prompt_token_ids"]
        sequence = smollm2.sequence(prompt, logprobs=5)
        (result,) = smollm2.step((sequence, len(prompt)))
        best = item["first_top5"]
        assert [t for t, _ in result.logprobs.top] == [b["id"] for b in best]
        expected = [b["logprob"] for b in best]
        assert [p for _, p in result.logprobs.top] == pytest.approx(expected, abs=1e-4)
        assert result.logprobs.logprob == pytest.approx(item["chosen_logprobs"][0], abs=1e-4)
