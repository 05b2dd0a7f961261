"""The runner's contract: what is sampled, what is written, and that company changes nothing."""

from __future__ import annotations

import importlib.util
import random
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from baton.core.errors import ConfigError
from baton.engine.batch import Batch
from baton.engine.config import EngineConfig
from baton.engine.model_runner import ModelRunner
from baton.engine.weights import load_model


def _load(name: str) -> ModuleType:
    path = Path(__file__).parents[1] / "support" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"runner_{name}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def tiny_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    return _load("tiny_llama").write_checkpoint(folder, num_hidden_layers=2)


@pytest.fixture(scope="module", params=["float32", "bfloat16", "float16"])
def harness(request: pytest.FixtureRequest, tiny_dir: Path) -> Any:
    return _load("model_harness").ModelHarness(
        tiny_dir, dtype=request.param, block_size=4, num_blocks=400
    )


@pytest.fixture(autouse=True)
def fresh_blocks(harness: Any) -> None:
    harness.reset()


def test_only_the_last_known_token_samples(harness: Any) -> None:
    prompt = list(range(20))
    chunked, decoding = harness.sequence(prompt), harness.sequence(prompt[:6])
    assert harness.step((decoding, 6))[0] is not None
    assert harness.step((chunked, 7), (decoding, 1))[0] is None
    assert harness.step((chunked, 12))[0] is None
    (result,) = harness.step((chunked, 1))
    assert result is not None
    assert chunked.num_output_tokens == 1
    assert harness.runner.launch(Batch(())).wait() == []


def test_chunks_leave_the_same_kv_as_a_whole_prompt(harness: Any) -> None:
    prompt = [(7 * i) % 300 for i in range(45)]
    whole, chunked = harness.sequence(prompt, room=3), harness.sequence(prompt, room=3)
    harness.logits((whole, 45))
    for size in (1, 4, 13, 27):
        harness.logits((chunked, size))
    kv = [harness.pool.blocks[s.block_table].float() for s in (whole, chunked)]
    # The same sums in another order, then rounded to the type of the pool.
    bound = {"float32": 1e-4, "bfloat16": 0.1, "float16": 0.02}[harness.layout.dtype]
    torch.testing.assert_close(kv[0], kv[1], atol=bound, rtol=bound)


def test_writes_nothing_outside_its_slots(harness: Any) -> None:
    harness.pool.blocks.fill_(7.0)
    sequence = harness.sequence(range(10), room=20)
    harness.logits((sequence, 10))
    untouched = [b for b in range(harness.pool.num_blocks) if b not in sequence.block_table[:3]]
    assert (harness.pool.blocks[untouched] == 7.0).all()
    tail = harness.pool.blocks[sequence.block_table[2], ..., 2:, :]
    assert (tail == 7.0).all()


def test_random_schedules_generate_the_same_tokens(harness: Any) -> None:
    """Twelve prompts, chunked and mixed at random, against each prompt alone. Float32 only:
    coarser types round differently in company."""
    if harness.layout.dtype != "float32":
        pytest.skip("needs exact comparison")
    rng = random.Random(3)
    prompts = [[rng.randrange(300) for _ in range(rng.randint(1, 70))] for _ in range(12)]
    alone = []
    for prompt in prompts:
        harness.reset()
        sequence = harness.sequence(prompt, room=12)
        harness.step((sequence, len(prompt)))
        while sequence.num_output_tokens < 12:
            harness.step((sequence, 1))
        alone.append(sequence.output_token_ids)
    harness.reset()
    together = [harness.sequence(prompt, room=12) for prompt in prompts]
    while any(s.num_output_tokens < 12 for s in together):
        open_ones = [s for s in together if s.num_output_tokens < 12]
        chosen = rng.sample(open_ones, rng.randint(1, len(open_ones)))
        work = [(s, rng.randint(1, s.num_tokens - s.num_computed_tokens)) for s in chosen]
        harness.step(*work)
    assert [s.output_token_ids for s in together] == alone


def test_many_long_and_short_sequences_split_into_groups(harness: Any) -> None:
    """Lengths from 1 to 400 cannot share one padded attention call; results still agree."""
    if harness.layout.dtype != "float32":
        pytest.skip("needs exact comparison")
    lengths = [1, 2, 3, 30, 33, 170, 400]
    sequences = [harness.sequence([n % 300] * n, room=4) for n in lengths]
    for sequence, n in zip(sequences, lengths, strict=True):
        harness.step((sequence, n))
    together = harness.logits(*((s, 1) for s in sequences))
    for sequence, logits in zip(sequences, together, strict=True):
        sequence.num_computed_tokens -= 1
        (alone,) = harness.logits((sequence, 1))
        torch.testing.assert_close(logits, alone, atol=1e-4, rtol=1e-4)


def test_pool_lies_in_given_memory(tiny_dir: Path) -> None:
    config = EngineConfig(model_path=tiny_dir, dtype="float32")
    model = load_model(config)
    layout = model.layout(config.block_size)
    buffer = bytearray(3 * layout.block_bytes)
    runner = ModelRunner(model, config, layout, 3, memoryview(buffer))
    assert runner.pool_bytes == len(buffer)
    assert runner.pool_address == torch.frombuffer(buffer, dtype=torch.uint8).data_ptr()
    with pytest.raises(ConfigError, match="block_size: 32 here, 16 there"):
        ModelRunner(model, config, model.layout(32), 3)
