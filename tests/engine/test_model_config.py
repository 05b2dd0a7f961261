"""What config.json may say: spellings that mean the same, and what is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from baton.core.errors import ConfigError
from baton.engine.model_config import RopeType, load_model_config, parse_model_config

RAW: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rope_theta": 500000.0,
}
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def test_defaults_follow_the_format() -> None:
    config = parse_model_config(RAW)
    assert (config.head_dim, config.group_size, config.rms_norm_eps) == (16, 2, 1e-6)
    assert config.rope.rope_type is RopeType.DEFAULT
    assert not config.tie_word_embeddings
    without_groups = {k: v for k, v in RAW.items() if k != "num_key_value_heads"}
    assert parse_model_config(without_groups).num_kv_heads == 4


def test_rope_spellings_mean_the_same() -> None:
    newest = {k: v for k, v in RAW.items() if k != "rope_theta"}
    newest["rope_parameters"] = {"rope_type": "llama3", "rope_theta": 500000.0, **LLAMA3}
    older = RAW | {"rope_scaling": {"rope_type": "llama3", **LLAMA3}}
    oldest = RAW | {"rope_scaling": {"type": "llama3", **LLAMA3}}
    configs = [parse_model_config(raw).rope for raw in (newest, older, oldest)]
    assert configs[0] == configs[1] == configs[2]
    assert configs[0].theta == 500000.0


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "LlamaForCausalLM"),
        ({"architectures": None}, "LlamaForCausalLM"),
        ({"hidden_act": "gelu"}, "silu"),
        ({"quantization_config": {"quant_method": "fp8"}}, "float32, bfloat16"),
        ({"sliding_window": 4096}, "sliding_window 4096"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "full_attention"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "default, linear, llama3"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ({"num_key_value_heads": 3}, "multiple"),
        ({"head_dim": 15}, "even"),
        ({"vocab_size": "many"}, "vocab_size must be a positive integer, got 'many'"),
        ({"hidden_size": None}, "hidden_size"),
    ],
)
def test_unsupported_is_refused_by_name(change: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse_model_config(RAW | change)
    assert named in str(error.value)


@pytest.mark.parametrize("text", ["", "[]", "{"])
def test_broken_file_is_a_config_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=r"config\.json"):
        load_model_config(tmp_path)


def test_missing_file_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.json"):
        load_model_config(tmp_path)


def test_parameter_count_of_the_real_shape() -> None:
    real = RAW | {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "tie_word_embeddings": True,
    }
    assert parse_model_config(json.loads(json.dumps(real))).num_parameters == 134_515_008
