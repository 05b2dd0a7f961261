"""Quantised folders mean the same to transformers with compressed-tensors as to the engine.

Skipped where compressed-tensors is not installed; it is no dependency of the project or its tests.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import tiny_llama
from baton.core.quantization import QuantizationConfig, Scheme
from baton.engine.quantization.folder import quantize_folder
from model_harness import ModelHarness

pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
TOKENS = range(3, 43)
TOLERANCE = 2e-6
"""Of logits of order one, in float32."""


class _Silent:
    def start_stage(self, description: str, total: int | None, *, counts_bytes: bool) -> None:
        pass

    def update(self, completed: int) -> None:
        pass


@pytest.mark.parametrize(
    "config",
    [
        QuantizationConfig(Scheme.FP8_WEIGHT),
        QuantizationConfig(Scheme.INT8, quantizes_head=True),
        QuantizationConfig(Scheme.INT4, 32),
        QuantizationConfig(Scheme.INT4, 64, quantizes_head=True),
    ],
    ids=lambda config: config.name,
)
@pytest.mark.filterwarnings("default")
def test_transformers_gives_the_engine_s_logits(tmp_path: Path, config: QuantizationConfig) -> None:
    from transformers import AutoModelForCausalLM

    plain = tiny_llama.write_checkpoint(tmp_path / "plain", head_dim=32, intermediate_size=128)
    folder = tmp_path / "quantised"
    quantize_folder(plain, folder, config, calibration_text=None, progress=_Silent())
    harness = ModelHarness(folder, num_blocks=8)
    (ours,) = harness.logits((harness.sequence(TOKENS, room=4), len(TOKENS)))
    assert ours is not None
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        theirs = model(torch.tensor([list(TOKENS)])).logits[0, -1]
    assert (ours.view(-1) - theirs).abs().max() < TOLERANCE
