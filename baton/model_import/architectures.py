"""What differs from one model architecture to the next: tensor names, layouts, config.json.

One `Architecture` per value of GGUF's general.architecture; a new one is a new entry of
`ARCHITECTURES` and, when its tokenizer is of another kind, one in `tokenizer_files`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

import numpy as np

from baton.core.errors import ConfigError
from baton.model_import.gguf_file import GgufFile

Json = dict[str, object]
Transform = Callable[[np.ndarray, GgufFile], np.ndarray]


@dataclass(frozen=True, slots=True)
class Architecture:
    """How one family of models is written in Hugging Face form."""

    top_level: Mapping[str, str]
    """GGUF module name to Hugging Face module name; both are followed by .weight or .bias."""
    per_layer: Mapping[str, str]
    """The same below blk.<i> and model.layers.<i>."""
    config: Callable[[GgufFile, Collection[str]], Json]
    """config.json, from metadata and the Hugging Face names of the tensors present."""
    transforms: Mapping[str, Transform] = field(default_factory=dict)
    """By GGUF leaf name: from GGUF's value layout to Hugging Face's."""
    refused: Mapping[str, str] = field(default_factory=dict)
    """GGUF tensors that change the result in a way not handled, with the reason."""

    def target_name(self, gguf_name: str) -> str:
        """The Hugging Face name. Raises ConfigError for a tensor that has no place."""
        module, _, kind = gguf_name.rpartition(".")
        if gguf_name in self.refused:
            raise ConfigError(f"tensor {gguf_name}: {self.refused[gguf_name]}")
        if module in self.top_level:
            return f"{self.top_level[module]}.{kind}"
        parts = module.split(".")
        if len(parts) == 3 and parts[0] == "blk" and parts[2] in self.per_layer:
            return f"model.layers.{parts[1]}.{self.per_layer[parts[2]]}.{kind}"
        raise ConfigError(f"tensor {gguf_name} is unknown for this architecture")

    def target_values(self, gguf_name: str, values: np.ndarray, file: GgufFile) -> np.ndarray:
        transform = self.transforms.get(gguf_name.split(".")[-2])
        return values if transform is None else transform(values, file)


def find_architecture(file: GgufFile) -> Architecture:
    """Raises ConfigError listing what there is."""
    try:
        return ARCHITECTURES[file.architecture]
    except KeyError:
        raise ConfigError(
            f"{file.path.name} holds a model of architecture {file.architecture!r}; "
            f"known: {', '.join(sorted(ARCHITECTURES))}"
        ) from None


def _num_heads(file: GgufFile) -> int:
    return file.arch_get("attention.head_count", int)


def _num_kv_heads(file: GgufFile) -> int:
    return file.arch_get("attention.head_count_kv", int, _num_heads(file))


def _head_dim(file: GgufFile) -> int:
    even_split = file.arch_get("embedding_length", int) // _num_heads(file)
    return file.arch_get("attention.key_length", int, even_split)


def pairs_to_halves(values: np.ndarray, num_heads: int) -> np.ndarray:
    """Reorder the rows of a query or key projection, [num_heads * head_dim, ...].

    RoPE turns pairs of elements. GGUF's Llama keeps a pair side by side (2i, 2i + 1), Hugging
    Face's keeps it half a head apart (i, i + head_dim / 2); the same rotation needs the rows of
    the projection in the matching order.
    Source: permute() of https://github.com/ggml-org/llama.cpp/blob/master/convert_hf_to_gguf.py,
    of which this is the inverse
    """
    paired = values.reshape(num_heads, -1, 2, *values.shape[1:])
    return paired.swapaxes(1, 2).reshape(values.shape)


def _llama_config(file: GgufFile, names: Collection[str]) -> Json:
    scaling = file.arch_get("rope.scaling.type", str, "none")
    if scaling != "none":
        raise ConfigError(
            f"{file.path.name} uses rope scaling {scaling!r}, which the importer cannot "
            "translate; use the model's Hugging Face folder"
        )
    rope_theta = file.arch_get("rope.freq_base", float, 10_000.0)
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(file.get("tokenizer.ggml.tokens", list)),
        "hidden_size": file.arch_get("embedding_length", int),
        "intermediate_size": file.arch_get("feed_forward_length", int),
        "num_hidden_layers": file.arch_get("block_count", int),
        "num_attention_heads": _num_heads(file),
        "num_key_value_heads": _num_kv_heads(file),
        "head_dim": _head_dim(file),
        "max_position_embeddings": file.arch_get("context_length", int),
        "rms_norm_eps": file.arch_get("attention.layer_norm_rms_epsilon", float),
        "rope_theta": rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": rope_theta},
        "hidden_act": "silu",
        "attention_bias": any(name.endswith("q_proj.bias") for name in names),
        "mlp_bias": any(name.endswith("up_proj.bias") for name in names),
        "tie_word_embeddings": "lm_head.weight" not in names,
    }


LLAMA = Architecture(
    top_level={
        "token_embd": "model.embed_tokens",
        "output_norm": "model.norm",
        "output": "lm_head",
    },
    per_layer={
        "attn_norm": "input_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_norm": "post_attention_layernorm",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    },
    config=_llama_config,
    transforms={
        "attn_q": lambda values, file: pairs_to_halves(values, _num_heads(file)),
        "attn_k": lambda values, file: pairs_to_halves(values, _num_kv_heads(file)),
    },
    refused={
        "rope_freqs.weight": "rope scaling stored as a tensor cannot be translated into "
        "config.json; use the model's Hugging Face folder"
    },
)

ARCHITECTURES: Mapping[str, Architecture] = {"llama": LLAMA}
