"""Log-probabilities of prompts: those of the model, whatever the chunks and caches, told once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import tiny_llama
from baton.core.block import chain_hashes, root_hash
from baton.core.clock import ManualClock
from baton.core.request import GenerateRequest, RequestId, SamplingParams, TokenDelta, Work
from baton.engine.config import EngineConfig
from baton.engine.engine import Engine
from baton.engine.layers.linear import Linear
from baton.engine.model_runner import ModelRunner
from baton.engine.weights import LoadedModel, load_model
from deferred_runner import DeferredRunner
from model_harness import ModelHarness

BLOCK_SIZE = 4
PROMPT = tuple((11 * i * i + 5) % 320 for i in range(90))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama.write_checkpoint(tmp_path_factory.mktemp("m") / "tiny")


@pytest.fixture(scope="module")
def model(folder: Path) -> LoadedModel[Linear]:
    return load_model(EngineConfig(model_path=folder, dtype="float32"))


@pytest.fixture(scope="module")
def reference(folder: Path) -> torch.Tensor:
    """[len(PROMPT) - 1, vocab_size]: computed token by token, as a decoder would."""
    harness = ModelHarness(folder, num_blocks=64)
    sequence = harness.sequence(PROMPT[:1], room=len(PROMPT))
    rows = []
    for token_id in PROMPT[1:]:
        rows.append(torch.log_softmax(harness.logits((sequence, 1))[0].float(), dim=-1))
        sequence.token_ids.append(token_id)
    return torch.stack(rows)


class Worker:
    def __init__(
        self,
        model: LoadedModel[Linear],
        *,
        budget: int,
        is_ahead: bool = False,
        num_blocks: int = 200,
    ) -> None:
        config = EngineConfig(
            model_path=Path("."),
            dtype="float32",
            block_size=BLOCK_SIZE,
            max_num_seqs=4,
            max_num_batched_tokens=budget,
        )
        self.layout = model.layout(BLOCK_SIZE)
        runner: Any = ModelRunner(model, config, self.layout, num_blocks)
        self.engine = Engine(
            config=config,
            layout=self.layout,
            num_blocks=num_blocks,
            max_model_len=model.max_model_len,
            runner=DeferredRunner(runner) if is_ahead else runner,
            clock=ManualClock(),
            vocab_size=model.model_config.vocab_size,
        )
        self.deltas: dict[str, list[TokenDelta]] = {}

    def submit(self, name: str, work: Work = Work.GENERATE, **fields: Any) -> None:
        known = fields.pop("known", ())
        prompt = fields.pop("prompt", PROMPT)
        hashes = chain_hashes(root_hash(self.layout.fingerprint), prompt, BLOCK_SIZE)
        params = SamplingParams(**({"temperature": 0.0, "max_tokens": 4} | fields))
        self.engine.submit(
            GenerateRequest(
                RequestId(name),
                work,
                prompt,
                params,
                block_hashes=tuple(hashes),
                output_token_ids=known,
            )
        )

    def run(self) -> None:
        while self.engine.has_work:
            output = self.engine.step()
            for delta in output.deltas:
                self.deltas.setdefault(delta.request_id, []).append(delta)
            for chunk in output.chunks:
                if chunk.is_last:
                    self.engine.release_lease(chunk.request_id)
            self.engine.check_integrity()
        assert self.engine.is_empty

    def tokens(self, name: str) -> list[int]:
        return [token_id for delta in self.deltas[name] for token_id in delta.token_ids]


def check(delta: TokenDelta, reference: torch.Tensor, num_top: int) -> None:
    entries = delta.prompt_logprobs
    assert [entry.token_id for entry in entries] == list(PROMPT[1:])
    for entry, row in zip(entries, reference, strict=True):
        assert entry.logprob == pytest.approx(row[entry.token_id].item(), abs=2e-4)
        values = [value for _, value in entry.top]
        assert values == pytest.approx(row.topk(num_top).values.tolist(), abs=2e-4)
        for token_id, value in entry.top:
            assert value == pytest.approx(row[token_id].item(), abs=2e-4)


@pytest.mark.parametrize("budget", [200, 17, 7])
@pytest.mark.parametrize("is_ahead", [False, True])
@pytest.mark.parametrize("work", [Work.GENERATE, Work.PREFILL])
def test_are_those_of_the_model(
    model: LoadedModel[Linear], reference: torch.Tensor, budget: int, is_ahead: bool, work: Work
) -> None:
    worker = Worker(model, budget=budget, is_ahead=is_ahead)
    worker.submit("plain", prompt=PROMPT[:30])
    worker.submit("r", work, prompt_logprobs=3)
    worker.submit("other", prompt=PROMPT[40:], prompt_logprobs=0)
    worker.run()
    first, *others = worker.deltas["r"]
    check(first, reference, 3)
    assert first.first_index == 0 and len(first.token_ids) == 1
    assert not any(delta.prompt_logprobs for delta in others)
    assert all(not entry.top for entry in worker.deltas["other"][0].prompt_logprobs)
    assert not worker.deltas["plain"][0].prompt_logprobs


def test_cached_prefix_is_computed_again_for_them(
    model: LoadedModel[Linear], reference: torch.Tensor
) -> None:
    worker = Worker(model, budget=64)
    worker.submit("warm")
    worker.run()
    worker.submit("r", prompt_logprobs=2)
    worker.run()
    check(worker.deltas["r"][0], reference, 2)
    assert worker.deltas["r"][-1].num_cached_tokens == 0
    # And what it computed is as good for others as before.
    worker.submit("after")
    worker.run()
    assert worker.deltas["after"][-1].num_cached_tokens == 88
    assert worker.tokens("warm") == worker.tokens("r") == worker.tokens("after")


def test_preempted_prompt_is_scored_once(
    model: LoadedModel[Linear], reference: torch.Tensor
) -> None:
    worker = Worker(model, budget=12, num_blocks=30)
    worker.submit("early", prompt=PROMPT[:20], max_tokens=40)
    worker.submit("r", prompt_logprobs=1, max_tokens=20)
    worker.run()
    check(worker.deltas["r"][0], reference, 1)
    assert sum(bool(delta.prompt_logprobs) for delta in worker.deltas["r"]) == 1
    assert worker.engine.load().num_preemptions > 0


def test_replayed_request_has_told_them(model: LoadedModel[Linear]) -> None:
    worker = Worker(model, budget=64)
    worker.submit("r", prompt_logprobs=1, known=(3,))
    worker.run()
    assert not any(delta.prompt_logprobs for delta in worker.deltas["r"])


def test_prompt_of_one_token_has_none(model: LoadedModel[Linear]) -> None:
    worker = Worker(model, budget=64)
    worker.submit("r", prompt=PROMPT[:1], prompt_logprobs=1)
    worker.run()
    assert worker.deltas["r"][0].prompt_logprobs == ()
