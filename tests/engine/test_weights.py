"""Loading: one file or shards, folding, type conversion, identity, and what is refused."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from baton.core.errors import ConfigError
from baton.engine.checkpoint import model_id, weight_files
from baton.engine.config import EngineConfig
from baton.engine.weights import LoadedModel, load_model

_SPEC = importlib.util.spec_from_file_location(
    "weights_tiny_llama", Path(__file__).parents[1] / "support/tiny_llama.py"
)
assert _SPEC is not None and _SPEC.loader is not None
tiny_llama: Any = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(tiny_llama)


def load(folder: Path, dtype: str = "float32", **settings: Any) -> LoadedModel:
    return load_model(EngineConfig(model_path=folder, dtype=dtype, **settings))


def head_logits(model: LoadedModel) -> torch.Tensor:
    """The head over fixed inputs: depends on two checkpoint tensors and on folding."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(4, model.model_config.hidden_size, generator=generator)
    with torch.inference_mode():
        return model.weights.head(x.to(model.weights.embedding.dtype)).float()


def test_shards_equal_a_single_file(tmp_path: Path) -> None:
    one = load(tiny_llama.write_checkpoint(tmp_path / "one"))
    many = load(tiny_llama.write_checkpoint(tmp_path / "many", num_shards=3))
    assert torch.equal(head_logits(one), head_logits(many))


def test_norm_gain_and_query_scale_are_folded(tmp_path: Path) -> None:
    folder = tiny_llama.write_checkpoint(tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    model = load(folder)
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(2))
    gain = tensors["model.layers.0.input_layernorm.weight"]
    with torch.inference_mode():
        fused = model.weights.layers[0].qkv(x / 64**0.5)
    prefix = "model.layers.0.self_attn."
    query = (x * gain) @ tensors[f"{prefix}q_proj.weight"].T / 16**0.5
    value = (x * gain) @ tensors[f"{prefix}v_proj.weight"].T
    torch.testing.assert_close(fused[:, :64], query, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(fused[:, 96:], value, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_embedding_is_kept_as_stored(tmp_path: Path, tied: bool) -> None:
    folder = tiny_llama.write_checkpoint(tmp_path / "m", tie_word_embeddings=tied)
    stored = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(load(folder).weights.embedding, stored)


def test_checkpoint_is_converted_to_the_engine_type(tmp_path: Path) -> None:
    folder = tiny_llama.write_checkpoint(tmp_path / "m")
    model = load(folder, dtype="bfloat16")
    assert model.weights.embedding.dtype is torch.bfloat16
    assert model.layout(16).dtype == "bfloat16"
    exact = head_logits(load(folder))
    # bfloat16 keeps 8 bits: sums of 64 rounded products stay well within 2 % of their scale.
    torch.testing.assert_close(head_logits(model), exact, atol=0.02 * 8, rtol=0.02)


def test_model_id_follows_content_and_not_place_or_time(tmp_path: Path) -> None:
    def identity(folder: Path) -> str:
        return model_id(folder, weight_files(folder))

    first = tiny_llama.write_checkpoint(tmp_path / "a")
    second = tiny_llama.write_checkpoint(tmp_path / "b")
    os.utime(second / "model.safetensors", (1, 1))
    assert identity(first) == identity(second)
    tensors = load_file(second / "model.safetensors")
    tensors["model.norm.weight"][0] += 1.0
    save_file(tensors, second / "model.safetensors", {"format": "pt"})
    assert identity(first) != identity(second)
    third = tiny_llama.write_checkpoint(tmp_path / "c", rms_norm_eps=1e-6)
    assert identity(first) != identity(third)


def test_context_length_beyond_the_model_is_refused(tmp_path: Path) -> None:
    folder = tiny_llama.write_checkpoint(tmp_path / "m")
    assert load(folder).max_model_len == 512
    assert load(folder, max_model_len=100).max_model_len == 100
    with pytest.raises(ConfigError, match="max_model_len 513"):
        load(folder, max_model_len=513)


def test_missing_tensor_is_named(tmp_path: Path) -> None:
    folder = tiny_llama.write_checkpoint(tmp_path / "m")
    path = folder / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(ConfigError, match=r"no tensor 'model\.layers\.1\.mlp\.up_proj\.weight'"):
        load(folder)


def test_misshapen_tensor_is_named(tmp_path: Path) -> None:
    folder = tiny_llama.write_checkpoint(tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 96}))
    with pytest.raises(ConfigError, match="gate_proj"):
        load(folder)


def test_tensor_that_would_be_left_over_is_refused(tmp_path: Path) -> None:
    folder = tiny_llama.write_checkpoint(tmp_path / "m", attention_bias=True)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"attention_bias": False}))
    with pytest.raises(ConfigError, match="attention_bias"):
        load(folder)


def test_folder_without_weights_is_refused(tmp_path: Path) -> None:
    folder = tiny_llama.write_checkpoint(tmp_path / "m")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="safetensors"):
        load(folder)


def test_truncated_weights_are_refused(tmp_path: Path) -> None:
    folder = tiny_llama.write_checkpoint(tmp_path / "m")
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ConfigError, match=r"model\.safetensors"):
        load(folder)


@pytest.mark.parametrize("name", ["../elsewhere.safetensors", "absent.safetensors"])
def test_index_naming_other_files_is_refused(tmp_path: Path, name: str) -> None:
    folder = tiny_llama.write_checkpoint(tmp_path / "m", num_shards=2)
    (tmp_path / "elsewhere.safetensors").write_bytes(b"")
    index = {"weight_map": {"model.norm.weight": name}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ConfigError, match="not in the folder"):
        load(folder)
