"""What calibration measures, against the same numbers worked out from a plain forward pass."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import tiny_llama
from baton.core.errors import ConfigError
from baton.engine.quantization.calibration import (
    KV_MARGIN,
    WINDOW_TOKENS,
    calibrate,
    load_measured,
)
from baton.engine.quantization.dense_forward import last_hidden
from baton.engine.quantization.rounding import FP8_MAX
from model_harness import ModelHarness

PARTS = ("q", "k", "v", "o", "gate", "up", "down")
TOKENS = [(i * i + 3 * i) % 320 for i in range(100)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny_llama.write_checkpoint(tmp_path / "m")


def test_kv_scales_follow_what_the_engine_stores(folder: Path) -> None:
    result = calibrate(load_measured(folder, "float32", lambda done, total: None), TOKENS)
    harness = ModelHarness(folder)
    sequence = harness.sequence(TOKENS, room=4)
    harness.logits((sequence, len(TOKENS)))
    largest = harness.pool.blocks.abs().amax(dim=(0, 4, 5)).permute(2, 1, 0)
    expected = largest * KV_MARGIN / FP8_MAX
    torch.testing.assert_close(result.k_scale, expected[0])
    torch.testing.assert_close(result.v_scale, expected[1])


def test_importance_is_the_mean_square_of_each_input(folder: Path) -> None:
    result = calibrate(load_measured(folder, "float32", lambda done, total: None), TOKENS)
    names = {
        f"model.layers.{i}.{'self_attn' if part in 'qkvo' else 'mlp'}.{part}_proj"
        for i in range(3)
        for part in PARTS
    }
    assert set(result.importance) == names | {"lm_head"}
    # Before the first layer nothing but the embedding and its norm.
    table = tiny_llama.random_tensors(tiny_llama.BASE)["model.embed_tokens.weight"]
    hidden = torch.nn.functional.rms_norm(table[TOKENS], (64,), eps=1e-5)
    measured = result.importance["model.layers.0.self_attn.q_proj"]
    torch.testing.assert_close(
        measured / measured.sum(), hidden.square().mean(0) / 64, rtol=1e-3, atol=1e-6
    )
    assert result.importance["model.layers.2.mlp.down_proj"].shape == (112,)


def test_dense_forward_gives_the_engine_s_logits(folder: Path) -> None:
    harness = ModelHarness(folder)
    sequence = harness.sequence(TOKENS, room=4)
    (logits,) = harness.logits((sequence, len(TOKENS)))
    with torch.inference_mode():
        dense = harness.loaded.weights.head(last_hidden(harness.loaded, torch.tensor(TOKENS)))
    assert logits is not None
    torch.testing.assert_close(dense[-1], logits, atol=1e-5, rtol=1e-5)


def test_long_texts_are_measured_in_windows(folder: Path) -> None:
    told: list[int] = []
    model = load_measured(folder, "float32", lambda done, total: None)
    text = TOKENS * 11
    calibrate(model, text, on_progress=told.append)
    assert told == [WINDOW_TOKENS, 2 * WINDOW_TOKENS, len(text)]


def test_short_text_is_refused(folder: Path) -> None:
    model = load_measured(folder, "float32", lambda done, total: None)
    with pytest.raises(ConfigError, match="has 10 tokens"):
        calibrate(model, TOKENS[:10])
