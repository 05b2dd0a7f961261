"""Sampling fields of a body as SamplingParams, under the names clients know."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from baton.core.errors import InvalidRequest
from baton.core.request import MAX_BAD_WORDS, SamplingParams, check_num_entries
from baton.engine.tokenizer import Tokenizer
from services.router.edge.preprocess import check_sampling, output_tokens, shorten
from services.router.openai_api.schema import ChatBody, CompletionBody, GenerationBody
from services.router.openai_api.structured import Wanted
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
    "prompt_logprobs",
)
_SEED_STEP = 0x9E3779B97F4A7C15


@dataclasses.dataclass(frozen=True, slots=True)
class SamplingPlan:
    """Sampling of one request, still without the room its prompts leave."""

    card: ModelCard
    sampling: SamplingParams
    asked_max_tokens: int | None
    default_max_tokens: int | None
    drops_output: bool = False
    """Only the prompt is wanted: max_tokens 0 with echo. One token is generated all the same."""

    @property
    def wanted(self) -> Wanted | None:
        """The form that the sampling parameters themselves ask for."""
        spec = self.sampling.structured
        return None if spec is None else Wanted(spec, "structured")

    def shaped(self, wanted: Wanted | None) -> SamplingPlan:
        """With outputs of the form `wanted`. Raises InvalidRequest."""
        if wanted is None:
            return self
        return dataclasses.replace(
            self, sampling=dataclasses.replace(self.sampling, structured=wanted.spec)
        )

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
    asked = body.max_tokens
    if body.echo and asked == 0:
        plan = _plan(card, body, body.logprobs, 1, COMPLETION_MAX_TOKENS)
        plan = dataclasses.replace(plan, drops_output=True)
    else:
        plan = _plan(card, body, body.logprobs, asked, COMPLETION_MAX_TOKENS)
    if not body.echo or body.logprobs is None or body.prompt_logprobs is not None:
        return plan
    sampling = dataclasses.replace(plan.sampling, prompt_logprobs=body.logprobs)
    return dataclasses.replace(plan, sampling=sampling)


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
        allowed_token_ids=tuple(body.allowed_token_ids or ()),
        bad_words_ids=bad_word_ids(card.tokenizer, body.bad_words or ()),
        include_stop_token=bool(body.include_stop_str_in_output),
        **values,
    )
    return SamplingPlan(card, check_sampling(card, sampling), asked, default)


def bad_word_ids(tokenizer: Tokenizer, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
    """Each as it begins a text, and as it stands behind a space. Raises InvalidRequest."""
    check_num_entries("bad_words", len(words), MAX_BAD_WORDS // 2)
    found: dict[tuple[int, ...], None] = {}
    for word in words:
        bare = word.strip(" ")
        if not bare:
            raise InvalidRequest("bad_words has an empty entry; leave it out", param="bad_words")
        for text in (bare, f" {bare}"):
            found[tuple(tokenizer.encode(text, add_special_tokens=False))] = None
    return tuple(ids for ids in found if ids)


def _logit_bias(bias: Mapping[str, float]) -> tuple[tuple[int, float], ...]:
    entries = {}
    for key, value in bias.items():
        if not (key.isascii() and key.isdigit() and len(key) <= 10):
            raise InvalidRequest(
                f"logit_bias keys must be token ids, got {shorten(key)}", param="logit_bias"
            )
        entries[int(key)] = value
    return tuple(sorted(entries.items()))
