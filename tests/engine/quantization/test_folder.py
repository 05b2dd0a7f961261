"""Quantised folders: what they hold, that the engine computes what they say, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny_llama
from baton.core.errors import ConfigError
from baton.core.quantization import QuantizationConfig, Scheme
from baton.engine.config import EngineConfig
from baton.engine.quantization import folder as folder_module
from baton.engine.quantization.folder import QuantizeResult, quantize_folder
from baton.engine.weights import load_model
from model_harness import ModelHarness

SHAPE: dict[str, Any] = {
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": 128,
}
FP8 = QuantizationConfig(Scheme.FP8)
CONFIGS = [
    FP8,
    QuantizationConfig(Scheme.FP8_WEIGHT),
    QuantizationConfig(Scheme.INT8),
    QuantizationConfig(Scheme.INT4, 32),
    QuantizationConfig(Scheme.INT4, 64, quantizes_head=True),
]


class Stages:
    """Remembers what it was told."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, int | None]] = []
        self.completed = 0

    def start_stage(self, description: str, total: int | None, *, counts_bytes: bool) -> None:
        self.seen.append((description, total))

    def update(self, completed: int) -> None:
        self.completed = completed


def make(folder: Path, config: QuantizationConfig, **overrides: Any) -> tuple[Path, Path]:
    """A plain folder and its quantised form."""
    plain = tiny_llama.write_checkpoint(folder / "plain", **(SHAPE | overrides))
    quantize(plain, folder / "quantised", config)
    return plain, folder / "quantised"


def quantize(source: Path, target: Path, config: QuantizationConfig) -> QuantizeResult:
    """Without a text: these folders have no tokenizer."""
    return quantize_folder(source, target, config, calibration_text=None, progress=Stages())


def unpacked(tensors: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """The weight that a folder's tensors say, worked out without the engine's own code."""
    scale = tensors[f"{name}.weight_scale"].float()
    if f"{name}.weight" in tensors:
        return tensors[f"{name}.weight"].float() * scale
    rows, width = tensors[f"{name}.weight_shape"].tolist()
    words = tensors[f"{name}.weight_packed"].long() & 0xFFFFFFFF
    per_word = width // words.shape[1]
    bits = 32 // per_word
    numbers = torch.stack([words >> (bits * i) & (2**bits - 1) for i in range(per_word)], -1)
    numbers = numbers.view(rows, width) - 2 ** (bits - 1)
    return numbers.float() * scale.repeat_interleave(width // scale.shape[1], 1)


def write_dequantised(quantised: Path, target: Path) -> Path:
    """The same model as plain float32 tensors."""
    tensors = load_file(quantised / "model.safetensors")
    plain = {n: t for n, t in tensors.items() if ".weight_" not in n and t.dtype.itemsize > 1}
    for scale in [name for name in tensors if name.endswith(".weight_scale")]:
        name = scale.removesuffix(".weight_scale")
        plain[f"{name}.weight"] = unpacked(tensors, name)
    target.mkdir()
    raw = json.loads((quantised / "config.json").read_text())
    del raw["quantization_config"]
    (target / "config.json").write_text(json.dumps(raw))
    save_file(plain, target / "model.safetensors")
    return target


def last_logits(folder: Path) -> torch.Tensor:
    harness = ModelHarness(folder, num_blocks=8)
    sequence = harness.sequence(range(3, 43), room=4)
    (logits,) = harness.logits((sequence, 40))
    assert logits is not None
    return logits


@pytest.mark.parametrize("overrides", [{}, {"attention_bias": True, "mlp_bias": True}], ids=str)
@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.name)
def test_engine_computes_what_the_folder_says(
    tmp_path: Path, config: QuantizationConfig, overrides: dict[str, Any]
) -> None:
    plain, quantised = make(tmp_path, config, **overrides)
    logits = last_logits(quantised)
    exact = last_logits(write_dequantised(quantised, tmp_path / "dequantised"))
    # Sums in another order: the query scale is in the scales here and in the weights there.
    torch.testing.assert_close(logits, exact, atol=2e-5, rtol=2e-5)
    assert not torch.allclose(logits, last_logits(plain), atol=1e-4)


def test_gains_are_folded_and_one_is_stored(tmp_path: Path) -> None:
    plain, quantised = make(tmp_path, QuantizationConfig(Scheme.FP8_WEIGHT))
    before, after = (
        load_file(plain / "model.safetensors"),
        load_file(quantised / "model.safetensors"),
    )
    gain = before["model.layers.1.post_attention_layernorm.weight"]
    assert (after["model.layers.1.post_attention_layernorm.weight"] == 1).all()
    expected = before["model.layers.1.mlp.up_proj.weight"] * gain
    # Half a step of e4m3, and what lies below its smallest normal number.
    weight = unpacked(after, "model.layers.1.mlp.up_proj")
    torch.testing.assert_close(weight, expected, rtol=1 / 15, atol=1e-4)
    assert torch.equal(after["model.norm.weight"], before["model.norm.weight"])
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(after[name], before[name])


def test_quantised_head_has_the_final_gain_in_it(tmp_path: Path) -> None:
    plain, quantised = make(tmp_path, QuantizationConfig(Scheme.INT8, quantizes_head=True))
    before, after = (
        load_file(plain / "model.safetensors"),
        load_file(quantised / "model.safetensors"),
    )
    assert (after["model.norm.weight"] == 1).all()
    expected = before["lm_head.weight"] * before["model.norm.weight"]
    torch.testing.assert_close(unpacked(after, "lm_head"), expected, rtol=0, atol=0.01)


def test_kv_scales_cover_the_largest_values(tmp_path: Path, tiny_tokenizer: dict[str, Any]) -> None:
    plain = tiny_llama.write_checkpoint(tmp_path / "plain", **SHAPE)
    (plain / "tokenizer.json").write_text(json.dumps(tiny_tokenizer))
    stages = Stages()
    config = QuantizationConfig(None, has_kv_scales=True)
    text = "the quick brown fox " * 40
    quantize_folder(plain, tmp_path / "kv", config, calibration_text=text, progress=stages)
    assert stages.seen[1] == ("calibrate", len(text))
    model = load_model(EngineConfig(model_path=tmp_path / "kv", dtype="float32"))
    assert model.k_scale.shape == model.v_scale.shape == (3, 2)
    assert (model.k_scale > 0).all() and (model.k_scale < 1).all()
    tensors = load_file(tmp_path / "kv" / "model.safetensors")
    assert tensors["model.layers.0.self_attn.k_scale"].shape == (2, 1, 1)
    before = load_file(plain / "model.safetensors")
    for name, tensor in before.items():
        assert torch.equal(tensors[name], tensor)
    # Scales stored but not asked for leave the pool as it is.
    assert model.layout(16).dtype == "float32"
    assert model.pool_scales() is None
    fp8 = EngineConfig(model_path=tmp_path / "kv", dtype="bfloat16", kv_cache_dtype="fp8")
    scales = load_model(fp8).pool_scales()
    assert scales is not None
    assert torch.equal(scales.k, model.k_scale) and scales.dtype is torch.bfloat16
    for bad, named in ((None, "no tensor.*v_scale"), (torch.zeros(2, 1, 1), "not positive")):
        kept = {n: t for n, t in tensors.items() if n != "model.layers.2.self_attn.v_scale"}
        kept |= {} if bad is None else {"model.layers.2.self_attn.v_scale": bad}
        save_file(kept, tmp_path / "kv" / "model.safetensors")
        with pytest.raises(ConfigError, match=named):
            load_model(fp8)


@pytest.fixture
def tiny_tokenizer() -> dict[str, Any]:
    """One token per character."""
    characters = sorted(set("the quick brown fox"))
    return {
        "version": "1.0",
        "model": {
            "type": "BPE",
            "vocab": {character: i for i, character in enumerate(characters)},
            "merges": [],
        },
        "added_tokens": [],
    }


def test_other_files_are_copied_and_import_records_are_not(tmp_path: Path) -> None:
    plain = tiny_llama.write_checkpoint(tmp_path / "plain", **SHAPE)
    for name in ("tokenizer.json", "chat_template.jinja", "baton_import.json", "notes.bin"):
        (plain / name).write_text(name)
    quantize(plain, tmp_path / "q", FP8)
    names = {path.name for path in (tmp_path / "q").iterdir()}
    assert names == {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"}
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "q").iterdir()}
    assert len(modes) == 1


def test_large_models_are_written_in_several_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = tiny_llama.write_checkpoint(tmp_path / "plain", num_shards=2, **SHAPE)
    one = quantize(plain, tmp_path / "one", FP8)
    monkeypatch.setattr(folder_module, "SHARD_BYTES", 60_000)
    quantize(plain, tmp_path / "many", FP8)
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    assert torch.equal(last_logits(tmp_path / "many"), last_logits(tmp_path / "one"))
    assert one.target_bytes < one.source_bytes


def test_existing_target_is_left_alone(tmp_path: Path) -> None:
    plain = tiny_llama.write_checkpoint(tmp_path / "plain", **SHAPE)
    (tmp_path / "q").mkdir()
    with pytest.raises(ConfigError, match="exists"):
        quantize(plain, tmp_path / "q", FP8)
    assert list((tmp_path / "q").iterdir()) == []


def test_failure_leaves_nothing_behind(tmp_path: Path) -> None:
    plain = tiny_llama.write_checkpoint(tmp_path / "plain", **SHAPE)
    tensors = load_file(plain / "model.safetensors")
    del tensors["model.layers.2.mlp.down_proj.weight"]
    save_file(tensors, plain / "model.safetensors")
    with pytest.raises(ConfigError, match="down_proj"):
        quantize(plain, tmp_path / "q", FP8)
    assert [path.name for path in tmp_path.iterdir()] == ["plain"]


def test_tensors_that_the_model_does_not_use_are_refused_as_when_it_is_loaded(
    tmp_path: Path,
) -> None:
    plain = tiny_llama.write_checkpoint(tmp_path / "plain", **SHAPE)
    tensors = load_file(plain / "model.safetensors")
    tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(128)
    save_file(tensors, plain / "model.safetensors")
    with pytest.raises(ConfigError, match="holds 1 tensors") as loading:
        load_model(EngineConfig(model_path=plain))
    with pytest.raises(ConfigError) as quantising:
        quantize(plain, tmp_path / "q", FP8)
    assert str(quantising.value) == str(loading.value)


@pytest.mark.parametrize(
    ("config", "overrides", "named"),
    [
        (QuantizationConfig(Scheme.INT4, 128), {}, "128 does not divide hidden_size 64"),
        (QuantizationConfig(Scheme.INT4, 64), {"intermediate_size": 96}, "MLP width 96"),
        (
            QuantizationConfig(Scheme.FP8, quantizes_head=True),
            {"tie_word_embeddings": True},
            "tie_word_embeddings",
        ),
        (QuantizationConfig(None), {}, "neither"),
        (QuantizationConfig(Scheme.FP8, has_kv_scales=True), {}, "measured on a text"),
    ],
)
def test_what_does_not_fit_is_refused_before_work(
    tmp_path: Path, config: QuantizationConfig, overrides: dict[str, Any], named: str
) -> None:
    plain = tiny_llama.write_checkpoint(tmp_path / "plain", **(SHAPE | overrides))
    with pytest.raises(ConfigError, match=named):
        quantize(plain, tmp_path / "q", config)
    assert not (tmp_path / "q").exists()


def test_quantised_folder_is_not_quantised_again(tmp_path: Path) -> None:
    _, quantised = make(tmp_path, FP8)
    with pytest.raises(ConfigError, match="quantised already"):
        quantize(quantised, tmp_path / "again", FP8)


def test_stored_gains_beside_quantised_weights_are_refused(tmp_path: Path) -> None:
    _, quantised = make(tmp_path, FP8)
    tensors = load_file(quantised / "model.safetensors")
    tensors["model.layers.0.input_layernorm.weight"] *= 1.5
    save_file(tensors, quantised / "model.safetensors")
    with pytest.raises(ConfigError, match=r"input_layernorm.*not 1"):
        load_model(EngineConfig(model_path=quantised, dtype="float32"))


def test_plain_weights_under_a_quantised_config_are_refused(tmp_path: Path) -> None:
    plain, quantised = make(tmp_path, FP8)
    (plain / "config.json").write_bytes((quantised / "config.json").read_bytes())
    tensors = load_file(plain / "model.safetensors")
    ones = {n: torch.ones_like(t) if "norm" in n else t for n, t in tensors.items()}
    save_file(ones, plain / "model.safetensors")
    with pytest.raises(ConfigError, match="float8_e4m3fn"):
        load_model(EngineConfig(model_path=plain, dtype="float32"))
