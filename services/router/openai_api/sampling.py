"""Sampling fields of a body as SamplingParams, under the names clients know."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from baton.core.errors import InvalidRequest
from baton.core.request import SamplingParams
from services.router.edge.preprocess import check_sampling, output_tokens, shorten
from services.router.openai_api.schema import ChatBody, CompletionBody, GenerationBody
from services.router.requests.generation import ModelCard

COMPLETION_MAX_TOKENS = 16
"""What the completions route generates when max_tokens is absent."""

_PLAIN_FIELDS = (
    "temperature",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "seed",
    "ignore_eos",
    "min_tokens",
)
_SEED_STEP = 0x9E3779B97F4A7C15


@dataclasses.dataclass(frozen=True, slots=True)
class SamplingPlan:
    """Sampling of one request, still without the room its prompts leave."""

    card: ModelCard
    sampling: SamplingParams
    asked_max_tokens: int | None
    default_max_tokens: int | None

    def for_choice(self, num_prompt_tokens: int, choice: int) -> SamplingParams:
        """Sampling of choice number `choice` of one prompt. Raises ContextLengthExceeded.

        Choice 0 is what a request for one choice would get; others have seeds of their own.
        """
        sampling = self.sampling
        max_tokens = output_tokens(
            self.card, num_prompt_tokens, self.asked_max_tokens, self.default_max_tokens
        )
        if max_tokens != sampling.max_tokens:
            sampling = dataclasses.replace(sampling, max_tokens=max_tokens)
        if choice and sampling.seed is not None:
            seed = (sampling.seed + choice * _SEED_STEP + 2**63) % 2**64 - 2**63
            return dataclasses.replace(sampling, seed=seed)
        return sampling


def chat_plan(card: ModelCard, body: ChatBody) -> SamplingPlan:
    """Raises InvalidRequest."""
    num_top = body.top_logprobs
    if num_top is not None and not body.logprobs:
        raise InvalidRequest("top_logprobs needs logprobs: true", param="top_logprobs")
    num_top = (num_top or 0) if body.logprobs else None
    client_names = {"logprobs": "top_logprobs"}
    asked = body.max_tokens
    if body.max_completion_tokens is not None:
        asked = body.max_completion_tokens
        client_names["max_tokens"] = "max_completion_tokens"
    try:
        return _plan(card, body, num_top, asked, None)
    except InvalidRequest as error:
        name = client_names.get(error.param or "")
        if name is None:
            raise
        message = str(error).replace(error.param or "", name, 1)
        raise InvalidRequest(message, param=name) from None


def completion_plan(card: ModelCard, body: CompletionBody) -> SamplingPlan:
    """Raises InvalidRequest."""
    return _plan(card, body, body.logprobs, body.max_tokens, COMPLETION_MAX_TOKENS)


def _plan(
    card: ModelCard,
    body: GenerationBody,
    num_top_logprobs: int | None,
    asked: int | None,
    default: int | None,
) -> SamplingPlan:
    values: dict[str, Any] = {}
    for name in _PLAIN_FIELDS:
        value = getattr(body, name)
        if value is not None:
            values[name] = value
    if body.top_k is not None:
        # Clients write -1 for "the whole vocabulary".
        values["top_k"] = 0 if body.top_k == -1 else body.top_k
    # Checked before the prompt is tokenized; `for_choice` puts the final number in.
    at_most = asked if asked is not None else default or card.max_model_len
    sampling = SamplingParams(
        max_tokens=at_most,
        logit_bias=_logit_bias(body.logit_bias or {}),
        logprobs=num_top_logprobs,
        stop_token_ids=tuple(body.stop_token_ids or ()),
        **values,
    )
    return SamplingPlan(card, check_sampling(card, sampling), asked, default)


def _logit_bias(bias: Mapping[str, float]) -> tuple[tuple[int, float], ...]:
    entries = {}
    for key, value in bias.items():
        if not (key.isascii() and key.isdigit() and len(key) <= 10):
            raise InvalidRequest(
                f"logit_bias keys must be token ids, got {shorten(key)}", param="logit_bias"
            )
        entries[int(key)] = value
    return tuple(sorted(entries.items()))
