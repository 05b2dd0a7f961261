"""Tiny random Llama checkpoints in the Hugging Face format, written without transformers."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import tokenizers
import torch
from safetensors.torch import save_file
from tokenizers import decoders, models, pre_tokenizers

BASE: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
SHAPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "one_kv_head_dim_32_tied": {
        "num_key_value_heads": 1,
        "head_dim": 32,
        "tie_word_embeddings": True,
    },
    "head_dim_80": {
        "hidden_size": 96,
        "head_dim": 80,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
    },
    "no_grouping_odd_widths": {
        "hidden_size": 72,
        "head_dim": 18,
        "num_key_value_heads": 4,
        "intermediate_size": 100,
        "vocab_size": 301,
    },
    "llama3_rope": {"rope_parameters": LLAMA3_ROPE},
    "linear_rope": {
        "rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
    },
    "biases": {"attention_bias": True, "mlp_bias": True},
}
"""Differences from BASE, by name."""


def tensor_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all tensors of a checkpoint with this config."""
    width, inner, vocab = (
        config["hidden_size"],
        config["intermediate_size"],
        config["vocab_size"],
    )
    heads = config["num_attention_heads"] * config["head_dim"]
    kv_heads = config["num_key_value_heads"] * config["head_dim"]
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocab, width),
        "model.norm.weight": (width,),
    }
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (vocab, width)
    linears = {
        "self_attn.q_proj": (heads, width),
        "self_attn.k_proj": (kv_heads, width),
        "self_attn.v_proj": (kv_heads, width),
        "self_attn.o_proj": (width, heads),
        "mlp.gate_proj": (inner, width),
        "mlp.up_proj": (inner, width),
        "mlp.down_proj": (width, inner),
    }
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{prefix}{norm}.weight"] = (width,)
        for name, shape in linears.items():
            shapes[f"{prefix}{name}.weight"] = shape
            part = "attention_bias" if name.startswith("self_attn") else "mlp_bias"
            if config[part]:
                shapes[f"{prefix}{name}.bias"] = shape[:1]
    return shapes


def random_tensors(config: dict[str, Any], *, seed: int = 0) -> dict[str, torch.Tensor]:
    """Values that make logits of order one, exactly representable in bfloat16."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in tensor_shapes(config).items():
        values = torch.randn(shape, generator=generator)
        if "norm" in name:
            values = 1.0 + 0.1 * values
        elif name.endswith("bias"):
            values = 0.1 * values
        elif "embed_tokens" not in name or config["tie_word_embeddings"]:
            values = values * shape[-1] ** -0.5
        tensors[name] = values.bfloat16().float()
    return tensors


def write_checkpoint(folder: Path, *, num_shards: int = 1, seed: int = 0, **overrides: Any) -> Path:
    """A checkpoint with BASE and `overrides`, in one file or in shards with an index. Those of two
    seeds are two revisions of a model."""
    config = BASE | overrides
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    tensors = random_tensors(config, seed=seed)
    if num_shards == 1:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return folder
    weight_map = {}
    for shard in range(num_shards):
        file_name = f"model-{shard + 1:05d}-of-{num_shards:05d}.safetensors"
        part = {name: tensors[name] for name in sorted(tensors)[shard::num_shards]}
        save_file(part, folder / file_name, {"format": "pt"})
        weight_map.update(dict.fromkeys(part, file_name))
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def write_pair_tokenizer(folder: Path) -> None:
    """256 tokens, each a pair of letters, so that a text shows every token."""
    pairs = ("".join(pair) for pair in itertools.product("abcdefghijklmnop", repeat=2))
    backend = tokenizers.Tokenizer(models.BPE({pair: i for i, pair in enumerate(pairs)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.save(str(folder / "tokenizer.json"))


END_TOKEN_ID = 256


def write_byte_tokenizer(folder: Path) -> None:
    """A token for each byte, under the byte's number, and one that ends a sequence."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet(), key=_byte_of)
    backend = tokenizers.Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|end|>"])
    backend.save(str(folder / "tokenizer.json"))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": END_TOKEN_ID}))


def _byte_of(char: str) -> int:
    """Of a character of the byte alphabet: printable Latin-1 stands for itself, the others follow
    from U+0100 in order."""
    if ord(char) < 0x100:
        return ord(char)
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return others[ord(char) - 0x100]
