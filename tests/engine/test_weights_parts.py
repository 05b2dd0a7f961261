"""What ranks load put together is the whole model; dummies; types and progress."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import tiny_llama
from baton.core.errors import ConfigError
from baton.core.quantization import QuantizationConfig, Scheme, quantization_json
from baton.engine.config import EngineConfig, LoadFormat
from baton.engine.model_config import load_model_config
from baton.engine.model_shard import shard_model
from baton.engine.parallel import Parallel
from baton.engine.quantization.folder import quantize_folder
from baton.engine.quantization.weight import QuantizedWeight
from baton.engine.weights import LoadedModel, load_model


@dataclass(frozen=True, slots=True)
class Kept:
    """A linear layer that is nothing but its weights."""

    weight: torch.Tensor | QuantizedWeight
    bias: torch.Tensor | None

    @property
    def values(self) -> torch.Tensor:
        if isinstance(self.weight, QuantizedWeight):
            return self.weight.dequantized(torch.float32)
        return self.weight.float()


class KeptLinears:
    """A LinearFactory that keeps what it is given; gains go in plain."""

    def plain(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Kept:
        return Kept(weight, bias)

    def quantized(self, weight: QuantizedWeight, bias: torch.Tensor | None) -> Kept:
        return Kept(weight, bias)

    def gain_factor(self, hidden_size: int) -> float:
        return 1.0


class Silent:
    def start_stage(self, description: str, total: int | None, *, counts_bytes: bool) -> None:
        pass

    def update(self, completed: int) -> None:
        pass


def load(folder: Path, rank: int = 0, size: int = 1, **settings: Any) -> LoadedModel[Kept]:
    config = EngineConfig(model_path=folder, dtype="float32", **settings)
    return load_model(config, parallel=Parallel(rank, size), linears=KeptLinears())


def split_rows(layer: Kept, sizes: list[int]) -> list[torch.Tensor]:
    return list(layer.values.split(sizes))


SHAPE: dict[str, Any] = {
    "hidden_size": 64,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "vocab_size": 301,
}


@pytest.fixture(params=["plain", "biases", "tied", "fp8", "int8", "int4"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    kind = str(request.param)
    extra = {
        "biases": {"attention_bias": True, "mlp_bias": True},
        "tied": {"tie_word_embeddings": True},
        # Biases, so that they are seen to be read beside quantised weights.
        "int8": {"attention_bias": True, "mlp_bias": True},
    }.get(kind, {})
    plain = tiny_llama.write_checkpoint(tmp_path / "plain", **(SHAPE | extra))
    if kind not in ("fp8", "int8", "int4"):
        return plain
    scheme = Scheme(kind)
    config = QuantizationConfig(
        scheme, 64 if scheme is Scheme.INT4 else None, quantizes_head=kind == "int4"
    )
    target = tmp_path / "quantised"
    quantize_folder(plain, target, config, calibration_text=None, progress=Silent())
    return target


@pytest.mark.parametrize("size", [2, 4])
def test_parts_put_together_are_the_whole(folder: Path, size: int) -> None:
    whole = load(folder)
    ranks = [load(folder, rank, size) for rank in range(size)]
    heads, kv_heads, inner = 8 * 32, 4 * 32, 256
    for i, layer in enumerate(whole.weights.layers):
        parts = [rank.weights.layers[i] for rank in ranks]
        by_rank = [
            split_rows(p.qkv, [heads // size, kv_heads // size, kv_heads // size]) for p in parts
        ]
        qkv = torch.cat([torch.cat(piece) for piece in zip(*by_rank, strict=True)])
        assert torch.equal(qkv, layer.qkv.values)
        by_rank = [split_rows(p.gate_up, [inner // size] * 2) for p in parts]
        gate_up = torch.cat([torch.cat(piece) for piece in zip(*by_rank, strict=True)])
        assert torch.equal(gate_up, layer.gate_up.values)
        for name in ("o", "down"):
            summed = [getattr(p, name) for p in parts]
            assert torch.equal(
                torch.cat([s.values for s in summed], 1), getattr(layer, name).values
            )
            assert [s.bias is None for s in summed[1:]] == [True] * (size - 1)
            _same(summed[0].bias, getattr(layer, name).bias)
        if layer.qkv.bias is not None:
            biases = [p.qkv.bias.split([heads // size] + [kv_heads // size] * 2) for p in parts]
            joined = torch.cat([torch.cat(piece) for piece in zip(*biases, strict=True)])
            assert torch.equal(joined, layer.qkv.bias)
    head = torch.cat([rank.weights.head.values for rank in ranks])
    assert torch.equal(head[:301], whole.weights.head.values)
    assert (head[301:] == 0).all()
    assert {rank.weights.head.values.shape[0] for rank in ranks} == {-(-301 // size)}
    for rank in ranks:
        assert torch.equal(rank.weights.embedding, whole.weights.embedding)
        assert rank.model_id == whole.model_id
        assert rank.layout(16) == whole.layout(16)
        assert rank.rank_layout(16).num_kv_heads == 4 // size
        assert rank.shard.num_heads == 8 // size


def _same(a: torch.Tensor | None, b: torch.Tensor | None) -> None:
    assert (a is None) == (b is None)
    assert a is None or b is None or torch.equal(a, b)


@pytest.mark.parametrize(
    ("size", "named"),
    [
        (3, r"tp_size 3 does not divide num_attention_heads 8"),
        (8, r"tp_size 8 does not divide num_key_value_heads 4"),
    ],
)
def test_sizes_that_do_not_divide_are_refused_before_weights_are_read(
    tmp_path: Path, size: int, named: str
) -> None:
    folder = tiny_llama.write_checkpoint(tmp_path / "m", **SHAPE)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=named):
        load(folder, 0, size)


def test_intermediate_size_that_does_not_divide_is_refused(tmp_path: Path) -> None:
    shape = SHAPE | {"intermediate_size": 102}
    folder = tiny_llama.write_checkpoint(tmp_path / "m", **shape)
    with pytest.raises(ConfigError, match="tp_size 4 does not divide intermediate_size 102"):
        load(folder, 0, 4)


def test_ranks_that_would_cut_groups_are_refused(tmp_path: Path) -> None:
    folder = tiny_llama.write_checkpoint(tmp_path / "m", **SHAPE)
    raw = json.loads((folder / "config.json").read_text())
    quantization = quantization_json(QuantizationConfig(Scheme.INT4, 64))
    (folder / "config.json").write_text(json.dumps(raw | {"quantization_config": quantization}))
    config = load_model_config(folder)
    shard_model(config, Parallel(0, 4))
    odd = json.dumps(raw | {"quantization_config": quantization, "intermediate_size": 192})
    (folder / "config.json").write_text(odd)
    with pytest.raises(ConfigError, match=r"group_size 64 does not divide the MLP width.* 96"):
        shard_model(load_model_config(folder), Parallel(0, 2))


@pytest.mark.parametrize("vocab_size", [1, 5, 8, 301])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_vocabulary_parts_cover_it_once(tmp_path: Path, vocab_size: int, size: int) -> None:
    folder = tiny_llama.write_checkpoint(tmp_path / "m", **SHAPE | {"vocab_size": vocab_size})
    config = load_model_config(folder)
    shards = [shard_model(config, Parallel(rank, size)) for rank in range(size)]
    covered = [i for s in shards for i in range(s.vocab.start, s.vocab.stop)]
    assert covered == list(range(vocab_size))
    for rank, shard in enumerate(shards):
        assert shard.vocab.start == min(rank * shard.vocab_rows, vocab_size)
        assert shard.vocab.stop - shard.vocab.start <= shard.vocab_rows


SCHEMES = [None, Scheme.FP8, Scheme.FP8_WEIGHT, Scheme.INT8, Scheme.INT4]


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("size", [1, 2])
def test_dummy_weights_need_nothing_but_the_config(
    tmp_path: Path, scheme: Scheme | None, size: int
) -> None:
    raw = tiny_llama.BASE | SHAPE
    if scheme is not None:
        config = QuantizationConfig(scheme, 64 if scheme is Scheme.INT4 else None)
        raw["quantization_config"] = quantization_json(config)
    (tmp_path / "config.json").write_text(json.dumps(raw))
    told: list[tuple[int, int]] = []
    ranks = [
        load_model(
            EngineConfig(model_path=tmp_path, dtype="bfloat16", load_format=LoadFormat.DUMMY),
            parallel=Parallel(rank, size),
            linears=KeptLinears(),
            on_progress=lambda done, total: told.append((done, total)),
        )
        for rank in range(size)
    ]
    first = ranks[0]
    layer = first.weights.layers[0]
    assert layer.qkv.values.shape == (512 // size, 64)
    assert isinstance(layer.qkv.weight, QuantizedWeight) == (scheme is not None)
    for linear in (layer.o, layer.gate_up, layer.down, first.weights.head):
        assert 0.01 < linear.values.std() < 0.03
        assert linear.values.isfinite().all()
    assert first.weights.embedding.dtype is torch.bfloat16
    assert told[-1][0] == told[-1][1]
    assert torch.equal(ranks[-1].weights.embedding, first.weights.embedding)
    assert ranks[-1].model_id == first.model_id
    if size == 2:
        assert not torch.equal(ranks[1].weights.layers[0].o.values, layer.o.values)


def test_progress_ends_at_the_size_of_the_files(tmp_path: Path) -> None:
    folder = tiny_llama.write_checkpoint(tmp_path / "m", num_shards=2)
    told: list[tuple[int, int]] = []
    load_model(
        EngineConfig(model_path=folder, dtype="float32"),
        on_progress=lambda done, total: told.append((done, total)),
    )
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert {total for _, total in told} == {size}
    # The rest is the files' headers.
    assert 0.9 * size < told[-1][0] <= size


def test_tensor_of_an_integer_type_is_refused(tmp_path: Path) -> None:
    folder = tiny_llama.write_checkpoint(tmp_path / "m")
    tensors = tiny_llama.random_tensors(tiny_llama.BASE)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.int32)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ConfigError, match=r"model\.norm\.weight.*int32"):
        load(folder)


def test_gains_and_scale_reach_the_factory_folded(tmp_path: Path) -> None:
    folder = tiny_llama.write_checkpoint(tmp_path / "m")
    tensors = tiny_llama.random_tensors(tiny_llama.BASE)
    model = load(folder)
    gain = tensors["model.layers.0.input_layernorm.weight"]
    query = tensors["model.layers.0.self_attn.q_proj.weight"] * (gain / 16**0.5)
    torch.testing.assert_close(model.weights.layers[0].qkv.values[:64], query)
