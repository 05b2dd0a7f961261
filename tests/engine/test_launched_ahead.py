"""A real, tiny model gives the same tokens whether steps are launched ahead or not."""

from __future__ import annotations

import importlib.util
import random
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from baton.core.clock import WallClock
from baton.core.request import FinishReason, GenerateRequest, RequestId, SamplingParams, Work
from baton.engine.config import EngineConfig
from baton.engine.engine import Engine
from baton.engine.model_runner import ModelRunner
from baton.engine.weights import LoadedModel, load_model

NUM_BLOCKS = 18
BLOCK_SIZE = 4
SAMPLING: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 0.8, "seed": 11, "top_k": 40, "logprobs": 2},
    {"temperature": 1.1, "top_p": 0.9},
    {"temperature": 0.0, "repetition_penalty": 1.3, "presence_penalty": 0.5},
    {"temperature": 0.7, "frequency_penalty": 0.8, "seed": 5, "min_tokens": 6},
    {"temperature": 0.0, "logit_bias": ((7, 4.0), (9, -4.0)), "logprobs": 0},
]


def _load(name: str) -> ModuleType:
    path = Path(__file__).parents[1] / "support" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"ahead_{name}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    folder = _load("tiny_llama").write_checkpoint(
        tmp_path_factory.mktemp("tiny"), num_hidden_layers=2
    )
    return load_model(EngineConfig(model_path=folder, dtype="float32"))


def requests(stop_ids: dict[str, tuple[int, ...]]) -> list[GenerateRequest]:
    rng = random.Random(7)
    return [
        GenerateRequest(
            RequestId(f"r{i}"),
            Work.GENERATE,
            tuple(rng.randrange(300) for _ in range(rng.randint(1, 30))),
            SamplingParams(
                max_tokens=rng.randint(12, 30), stop_token_ids=stop_ids.get(f"r{i}", ()), **params
            ),
        )
        for i, params in enumerate(SAMPLING * 2)
    ]


class Run:
    """Everything an engine said about the requests."""

    def __init__(self, model: LoadedModel, *, is_ahead: bool, stop_ids: dict[str, Any]) -> None:
        config = EngineConfig(
            model_path=Path("."),
            dtype="float32",
            block_size=BLOCK_SIZE,
            max_num_seqs=6,
            max_num_batched_tokens=32,
        )
        layout = model.layout(BLOCK_SIZE)
        runner = ModelRunner(model, config, layout, NUM_BLOCKS)
        self.runner = _load("deferred_runner").DeferredRunner(runner) if is_ahead else runner
        self.engine = Engine(
            config=config,
            layout=layout,
            num_blocks=NUM_BLOCKS,
            max_model_len=model.max_model_len,
            runner=self.runner,
            clock=WallClock(),
            vocab_size=model.model_config.vocab_size,
        )
        self.tokens: dict[str, list[int]] = {}
        self.logprobs: dict[str, list[float]] = {}
        self.reasons: dict[str, FinishReason | None] = {}
        for request in requests(stop_ids):
            self.engine.submit(request)
        while self.engine.has_work:
            for delta in self.engine.step().deltas:
                self.tokens.setdefault(delta.request_id, []).extend(delta.token_ids)
                values = [entry.logprob for entry in delta.logprobs]
                self.logprobs.setdefault(delta.request_id, []).extend(values)
                self.reasons[delta.request_id] = delta.finish_reason
            self.engine.check_integrity()
        assert self.engine.is_empty


def test_outputs_are_those_of_one_step_at_a_time(model: LoadedModel) -> None:
    free = Run(model, is_ahead=False, stop_ids={})
    # A token of the run becomes a stop token where nothing was known of it in advance.
    stop_ids = {name: (free.tokens[name][5],) for name in list(free.tokens)[::2]}
    alone = Run(model, is_ahead=False, stop_ids=stop_ids)
    ahead = Run(model, is_ahead=True, stop_ids=stop_ids)
    assert ahead.tokens == alone.tokens
    assert ahead.reasons == alone.reasons
    assert set(ahead.reasons.values()) == {FinishReason.STOP, FinishReason.LENGTH}
    for name, values in alone.logprobs.items():
        assert ahead.logprobs[name] == pytest.approx(values, abs=1e-4)
    assert ahead.engine.load().num_preemptions > 0
    assert ahead.runner.num_pending_tokens > 50
    assert ahead.runner.log[:3] == ["launch 1", "launch 2", "wait 1"]
