"""Reading folders, naming machines, and the whole report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from baton.core.errors import ConfigError
from baton.model_info import machines
from baton.model_info.folder import Component, component_of, read_shape
from baton.model_info.machines import MACHINES, find_machine, measure
from baton.model_info.report import build_report

CONFIG = {
    "model_type": "llama", "num_hidden_layers": 1, "hidden_size": 8, "num_attention_heads": 2,
    "num_key_value_heads": 1, "vocab_size": 10, "torch_dtype": "bfloat16",
    "max_position_embeddings": 64,
}  # fmt: skip
SHAPES = {
    "model.embed_tokens.weight": (10, 8),
    "model.layers.0.input_layernorm.weight": (8,),
    "model.layers.0.self_attn.q_proj.weight": (8, 8),
    "model.layers.0.self_attn.k_proj.weight": (4, 8),
    "model.layers.0.self_attn.v_proj.weight": (4, 8),
    "model.layers.0.self_attn.o_proj.weight": (8, 8),
    "model.layers.0.mlp.up_proj.weight": (16, 8),
    "model.norm.weight": (8,),
}


def make_folder(
    tmp_path: Path, *, extra: dict[str, tuple[int, ...]] | None = None, **config: Any
) -> Path:
    """Weights in two files, as large models have them."""
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, **config}))
    shapes = [*SHAPES.items(), *(extra or {}).items()]
    for part, some in enumerate((shapes[:4], shapes[4:])):
        arrays = {name: np.zeros(shape, dtype=np.float16) for name, shape in some}
        save_file(arrays, tmp_path / f"model-{part}.safetensors", {"format": "pt"})
    return tmp_path


def test_parameters_are_counted_by_component_over_all_files(tmp_path: Path) -> None:
    shape = read_shape(make_folder(tmp_path))
    assert {component: n for component, n in shape.params.items() if n} == {
        Component.EMBEDDING: 80,
        Component.NORMS: 16,
        Component.ATTENTION: 192,
        Component.MLP: 128,
    }
    assert shape.num_params == 416
    assert shape.stored_bytes == 832
    assert shape.is_tied
    assert shape.head_dim == 4


def test_untied_head_is_its_own_component(tmp_path: Path) -> None:
    shape = read_shape(make_folder(tmp_path, extra={"lm_head.weight": (10, 8)}))
    assert not shape.is_tied
    assert shape.params[Component.HEAD] == 80


@pytest.mark.parametrize(
    ("name", "component"),
    [
        ("model.layers.3.self_attn.q_norm.weight", Component.NORMS),
        ("model.layers.3.post_attention_layernorm.weight", Component.NORMS),
        ("model.layers.3.self_attn.q_proj.bias", Component.ATTENTION),
        ("model.layers.3.mlp.gate_proj.weight", Component.MLP),
        ("model.vision.patch.weight", Component.OTHER),
    ],
)
def test_tensors_are_told_apart_by_name(name: str, component: Component) -> None:
    assert component_of(name) is component


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"num_experts": 8}, "mixture of experts"),
        ({"hidden_size": None}, "has no hidden_size"),
        ({"head_dim": "64"}, "head_dim must be a positive number, got '64'"),
        ({"torch_dtype": "float8"}, "dtype 'float8' is not one of"),
    ],
)
def test_models_that_cannot_be_counted_are_refused(
    tmp_path: Path, config: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        read_shape(make_folder(tmp_path, **config))


def test_broken_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no readable config\.json"):
        read_shape(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="not valid JSON"):
        read_shape(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(ConfigError, match="no \\*\\.safetensors"):
        read_shape(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(ConfigError, match="is not a safetensors file"):
        read_shape(tmp_path)


def test_report_covers_the_table_or_the_named_machine(tmp_path: Path) -> None:
    folder = make_folder(tmp_path)
    report = build_report(folder, block_size=4, batch_sizes=(1, 2), context_tokens=10)
    assert [r.machine.name for r in report.rooflines] == [m.name for m in MACHINES]
    assert report.kv_bytes_per_token == 2 * 1 * 1 * 4 * 2
    assert report.kv_bytes_per_block == 4 * report.kv_bytes_per_token
    assert report.notes == ()
    named = build_report(folder, machine="a100")
    assert [r.machine.name for r in named.rooflines] == ["a100"]


def test_what_the_estimate_leaves_out_is_noted(tmp_path: Path) -> None:
    folder = make_folder(tmp_path, extra={"model.extra.weight": (3,)}, sliding_window=16)
    notes = " ".join(build_report(folder, context_tokens=100).notes)
    for words in ("window of 16", "limit of 64", "3 parameters belong to no known component"):
        assert words in notes


def test_wrong_numbers_and_machines_are_named(tmp_path: Path) -> None:
    folder = make_folder(tmp_path)
    with pytest.raises(ConfigError, match="context must be at least 1, got 0"):
        build_report(folder, context_tokens=0)
    with pytest.raises(ConfigError, match="unknown machine 'b300'; known: h200"):
        build_report(folder, machine="b300")
    with pytest.raises(ConfigError, match="cpu-2core has no figure for float16"):
        find_machine("cpu-2core").flops_for("float16")


def test_this_machine_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("READ_BYTES", 32 << 20), ("MATMUL_SIZE", 256), ("MEASURE_S", 0.02)):
        monkeypatch.setattr(machines, name, value)
    steps: list[str] = []
    machine = measure("float32", on_step=steps.append)
    assert machine.bytes_per_s > 1e8
    assert machine.flops_for("float32") > 1e8
    assert len(steps) == 2


@pytest.mark.model
def test_real_model_has_its_known_size(smollm2_dir: Path) -> None:
    report = build_report(smollm2_dir)
    shape = report.shape
    assert (shape.num_params, shape.num_layers, shape.is_tied) == (134_515_008, 30, True)
    # 30 layers x (576 x (576 + 192 + 192 + 576) + 3 x 576 x 1536)
    assert shape.params[Component.ATTENTION] == 26_542_080
    assert shape.params[Component.MLP] == 79_626_240
    assert shape.params[Component.NORMS] == 61 * 576
    assert report.weight_bytes == shape.stored_bytes == 269_030_016
    assert report.kv_bytes_per_token == 23_040
    assert report.decode_flops_per_token == 2 * (106_168_320 + 28_311_552) + 4 * 30 * 576 * 1024
