"""Logits of every token of a text, and what they say against those of another model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from baton.engine.layers.linear import Linear
from baton.engine.quantization.dense_forward import last_hidden
from baton.engine.quantization.rounding import to_fp8
from baton.engine.weights import LoadedModel

WINDOW_TOKENS = 512
"""The text is computed in windows of so many tokens, each on its own."""


@dataclass(frozen=True, slots=True)
class TextScore:
    """Of one model on a text; the last two against the logits of another."""

    perplexity: float
    mean_kl: float
    """Nats; KL(other || this), mean over tokens."""
    top1_agreement: float
    """Share of tokens with the same most likely successor."""


class Text:
    """Token ids, and the logits of the model that others are held against."""

    def __init__(self, token_ids: Sequence[int], reference: LoadedModel[Linear]) -> None:
        self._windows = [
            torch.tensor(token_ids[first : first + WINDOW_TOKENS])
            for first in range(0, len(token_ids) - 1, WINDOW_TOKENS)
        ]
        with torch.inference_mode():
            self._expected = [all_logits(reference, window) for window in self._windows]

    @torch.inference_mode()
    def score(self, model: LoadedModel[Linear]) -> TextScore:
        loss = kl = same = 0.0
        num_tokens = 0
        for window, expected in zip(self._windows, self._expected, strict=True):
            logs = F.log_softmax(all_logits(model, window).float(), dim=-1)[:-1]
            others = F.log_softmax(expected.float(), dim=-1)[:-1]
            loss -= float(logs.gather(1, window[1:, None]).double().sum())
            kl += float((others.exp() * (others - logs)).double().sum())
            same += int((logs.argmax(1) == others.argmax(1)).sum())
            num_tokens += len(window) - 1
        return TextScore(math.exp(loss / num_tokens), kl / num_tokens, same / num_tokens)


@torch.inference_mode()
def all_logits(model: LoadedModel[Linear], token_ids: Tensor) -> Tensor:
    """[num_tokens, vocab_size]; with an FP8 pool's rounding of KV when the model has one."""
    scales = model.pool_scales()
    if scales is None:
        return model.weights.head(last_hidden(model, token_ids))

    def rounded(layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        return _rounded(keys, scales.k[layer]), _rounded(values, scales.v[layer])

    return model.weights.head(last_hidden(model, token_ids, kv_tap=rounded))


def _rounded(x: Tensor, scale: Tensor) -> Tensor:
    """x [num_tokens, num_kv_heads, head_dim] as it comes back from e4m3."""
    return (to_fp8(x.float() / scale[:, None]).float() * scale[:, None]).to(x.dtype)
