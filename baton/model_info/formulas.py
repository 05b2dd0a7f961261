"""The arithmetic of `baton model info`: pure functions of numbers. docs/model-info.md derives them.

Counts one multiply-add as 2 FLOPs and nothing but matrix products: norms, RoPE, softmax and
activations are below one percent of them. A dense decoder with full causal attention is assumed.
Sources: Kaplan et al. 2020, https://arxiv.org/abs/2001.08361 §2.1 (FLOPs of a transformer);
Williams et al. 2009, https://doi.org/10.1145/1498765.1498785 (roofline)
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

FLOPS_PER_MULTIPLY_ADD = 2


@dataclass(frozen=True, slots=True)
class CostModel:
    """The numbers of a model that its costs depend on."""

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    layer_matmul_params: int
    """Weights and biases of all attention and MLP projections, all layers together."""
    head_params: int
    """Entries of the output projection, vocab_size x hidden_size, tied or not."""
    weight_bytes_per_step: int
    """Of attention, MLP, norms and head: read in every step, however many tokens it computes. Of
    an untied embedding only the rows of the step's tokens are read, which is left out."""
    dtype_bytes: int
    """Of one KV element."""


class Bound(Enum):
    """Which limit of the machine is reached first."""

    COMPUTE = "compute"
    MEMORY = "memory"


@dataclass(frozen=True, slots=True)
class Estimate:
    """A roofline time: what no implementation on that machine can beat."""

    seconds: float
    tokens_per_s: float
    bound: Bound


def kv_bytes_per_token(model: CostModel) -> int:
    """K and V of every layer and KV head."""
    return 2 * model.num_layers * model.num_kv_heads * model.head_dim * model.dtype_bytes


def attention_flops(model: CostModel, context_tokens: int) -> int:
    """One token that attends to `context_tokens` tokens, itself included, in every layer.

    Scores and weighted sum are head_dim multiply-adds each, per head and attended token.
    """
    per_layer = 2 * model.num_heads * model.head_dim * context_tokens
    return FLOPS_PER_MULTIPLY_ADD * model.num_layers * per_layer


def decode_flops(model: CostModel, context_tokens: int) -> int:
    """One generated token: all projections, the output head, attention over the context."""
    projections = model.layer_matmul_params + model.head_params
    return FLOPS_PER_MULTIPLY_ADD * projections + attention_flops(model, context_tokens)


def prefill_flops(model: CostModel, prompt_tokens: int) -> int:
    """A whole prompt: each token attends to those up to itself; only the last one needs logits."""
    attended_tokens = prompt_tokens * (prompt_tokens + 1) // 2
    return (
        FLOPS_PER_MULTIPLY_ADD * model.layer_matmul_params * prompt_tokens
        + FLOPS_PER_MULTIPLY_ADD * model.head_params
        + attention_flops(model, attended_tokens)
    )


def prefill_bytes(model: CostModel, prompt_tokens: int) -> int:
    """The weights once, and the prompt's KV written and read once."""
    return model.weight_bytes_per_step + 2 * prompt_tokens * kv_bytes_per_token(model)


def decode_step_bytes(model: CostModel, batch_size: int, context_tokens: int) -> int:
    """The weights once, and for each sequence its context read and one token's KV written."""
    kv_bytes = batch_size * (context_tokens + 1) * kv_bytes_per_token(model)
    return model.weight_bytes_per_step + kv_bytes


def prefill_estimate(
    model: CostModel, prompt_tokens: int, *, flops_per_s: float, bytes_per_s: float
) -> Estimate:
    """One prompt, computed in one step."""
    flops, moved_bytes = prefill_flops(model, prompt_tokens), prefill_bytes(model, prompt_tokens)
    return _roofline(flops, moved_bytes, prompt_tokens, flops_per_s, bytes_per_s)


def decode_estimate(
    model: CostModel,
    batch_size: int,
    context_tokens: int,
    *,
    flops_per_s: float,
    bytes_per_s: float,
) -> Estimate:
    """One step of `batch_size` sequences of `context_tokens` each, one token for each of them."""
    flops = batch_size * decode_flops(model, context_tokens)
    moved_bytes = decode_step_bytes(model, batch_size, context_tokens)
    return _roofline(flops, moved_bytes, batch_size, flops_per_s, bytes_per_s)


def _roofline(
    flops: int, moved_bytes: int, num_tokens: int, flops_per_s: float, bytes_per_s: float
) -> Estimate:
    """Computing and moving overlap perfectly, so the longer of the two is the time."""
    compute_s, memory_s = flops / flops_per_s, moved_bytes / bytes_per_s
    seconds = max(compute_s, memory_s)
    bound = Bound.COMPUTE if compute_s >= memory_s else Bound.MEMORY
    return Estimate(seconds=seconds, tokens_per_s=num_tokens / seconds, bound=bound)
