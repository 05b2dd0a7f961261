"""Shapes of the models whose speed is reported; weights are random, speed does not depend on them.

Figures from the models' public config.json files.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What a config.json needs, and what it is called in reports."""

    name: str
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    tie_word_embeddings: bool = False
    rope_theta: float = 500000.0
    max_position_embeddings: int = 131072

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """out_features, in_features of the layer's projections and of the head."""
        heads = (self.num_heads + 2 * self.num_kv_heads) * self.head_dim
        return {
            "qkv": (heads, self.hidden_size),
            "o": (self.hidden_size, self.num_heads * self.head_dim),
            "gate_up": (2 * self.intermediate_size, self.hidden_size),
            "down": (self.hidden_size, self.intermediate_size),
            "head": (self.vocab_size, self.hidden_size),
        }

    @property
    def num_linear_weights(self) -> int:
        """Weights that a decode step reads: all projections and the head."""
        per_layer = sum(n * k for name, (n, k) in self.linears.items() if name != "head")
        return self.num_layers * per_layer + self.vocab_size * self.hidden_size

    @property
    def kv_bytes_per_token(self) -> int:
        """bfloat16"""
        return 2 * 2 * self.num_layers * self.num_kv_heads * self.head_dim

    def prefill_flops(self, num_tokens: int) -> float:
        """One prompt: every projection for every token, the head for one, causal attention."""
        per_layer = sum(n * k for name, (n, k) in self.linears.items() if name != "head")
        linear = 2.0 * self.num_layers * per_layer * num_tokens
        head = 2.0 * self.vocab_size * self.hidden_size
        attention = 2.0 * self.num_layers * self.num_heads * self.head_dim * num_tokens**2
        return linear + head + attention

    def write_config(self, folder: Path, **changes: Any) -> Path:
        """A folder with a config.json of this shape, for weights made at random."""
        config = {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "vocab_size": self.vocab_size,
            "tie_word_embeddings": self.tie_word_embeddings,
            "max_position_embeddings": self.max_position_embeddings,
            "rms_norm_eps": 1e-5,
            "hidden_act": "silu",
            "rope_parameters": {"rope_type": "default", "rope_theta": self.rope_theta},
            "torch_dtype": "bfloat16",
        }
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(config | changes, indent=1))
        return folder


LLAMA_3_1_8B = ModelShape("llama-3.1-8b", 4096, 14336, 32, 32, 8, 128, 128256)
LLAMA_3_2_1B = ModelShape(
    "llama-3.2-1b", 2048, 8192, 16, 32, 8, 64, 128256, tie_word_embeddings=True
)
LLAMA_2_7B = ModelShape("llama-2-7b", 4096, 11008, 32, 32, 32, 128, 32000, False, 10000.0, 4096)
SHAPES = {shape.name: shape for shape in (LLAMA_3_1_8B, LLAMA_3_2_1B, LLAMA_2_7B)}
