"""Models and settings that no GPU kernel serves are refused with the numbers, before loading."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import tiny_llama
from baton.core.errors import ConfigError
from baton.engine.communicator import SingleCommunicator
from baton.engine.config import EngineConfig
from baton.engine.gpu.build import build_gpu_rank
from baton.engine.gpu.device import InterpretedDevice


@pytest.mark.parametrize(
    ("model", "settings", "message"),
    [
        ({"head_dim": 8}, {}, "head_dim 8 is not an even number from 16 to 256"),
        ({"head_dim": 260}, {}, "head_dim 260 is not"),
        ({"num_attention_heads": 130, "num_key_value_heads": 2}, {}, "65 query heads share"),
        ({}, {"block_size": 2048}, "block_size 2048 is above 1024"),
        ({}, {"max_num_seqs": 5000}, "max_num_seqs 5000 is above 4096"),
        ({"vocab_size": 1 << 21}, {}, "vocab_size 2097152 is above 1048576"),
    ],
)
def test_what_no_kernel_serves_is_refused(
    tmp_path: Path, model: dict[str, Any], settings: dict[str, Any], message: str
) -> None:
    folder = tiny_llama.write_checkpoint(tmp_path / "m")
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(json.dumps(json.loads(config) | model))
    engine = EngineConfig(
        model_path=folder, dtype="float32", max_num_batched_tokens=8192, **settings
    )
    with pytest.raises(ConfigError, match=message):
        build_gpu_rank(engine, communicator=SingleCommunicator(), device=InterpretedDevice())
