"""One generation request as every part sees it: token ids in, token ids out.

Knows nothing of text, HTTP or protobuf. The router builds a `GenerateRequest`; workers answer
with `TokenDelta`s whose indices let the router join the first token (from the prefill worker)
and the rest (from the decode worker), and drop whatever a replay produces twice.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import Enum
from typing import NewType

from baton.core.block import BlockHash
from baton.core.errors import InvalidRequest
from baton.core.lifecycle import Timeline
from baton.core.structured import StructuredSpec
from baton.core.worker_info import Epoch, WorkerId

RequestId = NewType("RequestId", str)

MIN_TEMPERATURE = 1e-5
"""Below this sampling is greedy: logits divided by less need not fit into a float32."""
MAX_LOGPROBS = 20
MAX_LOGIT_BIAS = 1024
MAX_STOP_TOKEN_IDS = 256
MAX_BAD_WORDS = 256
MAX_BAD_WORD_TOKENS = 64
"""Of one of them."""
MAX_ALLOWED_TOKEN_IDS = 65536


class FinishReason(Enum):
    """Why a sequence ended."""

    STOP = "stop"
    """An end-of-sequence or stop token, or a stop string found by the router."""
    LENGTH = "length"
    """max_tokens or the model's context length was reached."""
    CANCELLED = "cancelled"
    ERROR = "error"


class Work(Enum):
    """What a worker is asked to do with a request."""

    GENERATE = "generate"
    """Compute the prompt and generate, all on one worker."""
    PREFILL = "prefill"
    """Compute the prompt, sample the first token, keep the KV under a lease for a reader."""
    DECODE = "decode"
    """Read the prompt's KV from the prefill worker, then generate from the second token on."""
    TAKEOVER = "takeover"
    """Take a request over from the worker that is generating it: read its KV while it goes on,
    let it stop, generate from its last token on."""

    @property
    def reads_all_kv(self) -> bool:
        """All KV comes from another worker; nothing of the prompt is computed here."""
        return self in (Work.DECODE, Work.TAKEOVER)


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is chosen. Raises InvalidRequest on values out of range."""

    max_tokens: int = 16
    temperature: float = 1.0
    """Below MIN_TEMPERATURE, as 0 is: greedy."""
    top_p: float = 1.0
    top_k: int = 0
    """0 keeps the whole vocabulary."""
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    """Divides (or multiplies, below zero) the logits of tokens seen in prompt or output."""
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int | None = None
    """Randomness is a function of (seed, output position): a replay draws the same tokens."""
    logprobs: int | None = None
    """Alternatives to report per token; 0 reports the chosen token alone, None nothing."""
    stop_token_ids: tuple[int, ...] = ()
    """End the output without being part of it, as the model's end-of-sequence tokens do."""
    ignore_eos: bool = False
    min_tokens: int = 0
    """Stop and end-of-sequence tokens are impossible before so many outputs."""
    bad_words_ids: tuple[tuple[int, ...], ...] = ()
    """Token sequences that the output never contains: the last token of each is impossible where
    the output ends with the others. Where a `structured` output leaves no other token, it wins."""
    allowed_token_ids: tuple[int, ...] = ()
    """Every other token is impossible, ends of sequence included; empty: all are allowed."""
    prompt_logprobs: int | None = None
    """Alternatives to report per prompt token, as `logprobs` for outputs."""
    include_stop_token: bool = False
    """The stop or end-of-sequence token that ends the output is its last token."""
    structured: StructuredSpec | None = None
    """What the output must look like; it ends when the model chooses to where it is complete."""

    def __post_init__(self) -> None:
        _check_range("max_tokens", self.max_tokens, 1, None)
        _check_range("temperature", self.temperature, 0.0, 100.0)
        _check_range("top_p", self.top_p, 0.0, 1.0, low_open=True)
        _check_range("top_k", self.top_k, 0, None)
        _check_range("min_p", self.min_p, 0.0, 1.0)
        _check_range("repetition_penalty", self.repetition_penalty, 0.01, 100.0)
        _check_range("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _check_range("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        if self.seed is not None:
            _check_range("seed", self.seed, -(2**63), 2**63 - 1)
        if self.logprobs is not None:
            _check_range("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        _check_range("min_tokens", self.min_tokens, 0, self.max_tokens)
        check_num_entries("stop_token_ids", len(self.stop_token_ids), MAX_STOP_TOKEN_IDS)
        check_num_entries("logit_bias", len(self.logit_bias), MAX_LOGIT_BIAS)
        for _, bias in self.logit_bias:
            _check_range("logit_bias", bias, -100.0, 100.0)
        check_num_entries("bad_words", len(self.bad_words_ids), MAX_BAD_WORDS)
        for word in self.bad_words_ids:
            _check_range("tokens of a bad word", len(word), 1, MAX_BAD_WORD_TOKENS)
        check_num_entries("allowed_token_ids", len(self.allowed_token_ids), MAX_ALLOWED_TOKEN_IDS)
        if self.prompt_logprobs is not None:
            _check_range("prompt_logprobs", self.prompt_logprobs, 0, MAX_LOGPROBS)
        if self.structured is not None:
            self._check_structured()

    def _check_structured(self) -> None:
        """Raises InvalidRequest for what contradicts an output that ends where it is complete."""
        for name, value in (
            ("ignore_eos", self.ignore_eos),
            ("min_tokens", self.min_tokens),
            ("allowed_token_ids", self.allowed_token_ids),
        ):
            if value:
                raise InvalidRequest(
                    f"{name} cannot be combined with a structured output, whose shape decides "
                    f"which tokens are possible and where it may end; send one of the two",
                    param=name,
                )

    @property
    def is_greedy(self) -> bool:
        return self.temperature < MIN_TEMPERATURE

    @property
    def limits_tokens(self) -> bool:
        """Some tokens are impossible, for other reasons than `min_tokens`."""
        return bool(self.bad_words_ids or self.allowed_token_ids) or self.structured is not None

    @property
    def has_penalties(self) -> bool:
        return (
            self.repetition_penalty != 1.0
            or self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
        )


def _check_range(
    name: str,
    value: float,
    low: float | None,
    high: float | None,
    *,
    low_open: bool = False,
) -> None:
    """Raises InvalidRequest naming the value and the limit."""
    bad_low = low is not None and (value <= low if low_open else value < low)
    bad_high = high is not None and value > high
    if not (bad_low or bad_high or math.isnan(value) or math.isinf(value)):
        return
    if low is not None and high is not None:
        limit = f"between {low:g} {'(exclusive) ' if low_open else ''}and {high:g}"
    else:
        limit = f"greater than {low:g}" if low_open else f"at least {low:g}"
    raise InvalidRequest(f"{name} must be {limit}, got {value:g}", param=name)


def check_num_entries(name: str, num_entries: int, limit: int) -> None:
    """Raises InvalidRequest naming both numbers."""
    if num_entries > limit:
        raise InvalidRequest(f"{name} takes at most {limit} entries, got {num_entries}", param=name)


@dataclass(frozen=True, slots=True)
class PeerRef:
    """Where a worker finds another one, whose KV it is to read."""

    worker_id: WorkerId
    epoch: Epoch
    address: str


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """One sequence for one worker."""

    request_id: RequestId
    work: Work
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    block_hashes: tuple[BlockHash, ...] = ()
    """Hash chain of the prompt's full blocks, tenant salt included. Empty switches caching off."""
    output_token_ids: tuple[int, ...] = ()
    """Tokens already sent to the client when a lost worker's request is replayed elsewhere."""
    eos_token_ids: tuple[int, ...] = ()
    kv_source: PeerRef | None = None
    """The worker to read KV from. DECODE: it computes the prompt; TAKEOVER: it generates the
    request now. PREFILL and GENERATE may name a worker that caches more of the prompt than this
    one: fetched when that is cheaper than computing."""
    deadline_s: float = 600.0
    """Seconds from arrival at the worker until it must give up."""

    def __post_init__(self) -> None:
        if not self.prompt_token_ids:
            raise InvalidRequest("prompt is empty; send at least one token", param="prompt")
        if self.kv_source is None and self.work.reads_all_kv:
            raise InvalidRequest(f"work {self.work.value} needs a kv_source")


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probabilities at one output position, natural log."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    """(token id, logprob) of the most likely tokens, best first."""


@dataclass(slots=True)
class TokenDelta:
    """What one engine step (or one failure) adds to one sequence."""

    request_id: RequestId
    first_index: int = 0
    """Output position of `token_ids[0]`."""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    """The token that ended the sequence, when it was a stop token. Not an output, or with
    `include_stop_token` the last one."""
    error: str = ""
    """Set with FinishReason.ERROR: a message fit for the router's log."""
    is_retryable: bool = False
    """With an error: the same request may succeed on another worker."""
    is_overload: bool = False
    """With a retryable error: refused untouched, because the worker has no room for it."""
    is_handed_back: bool = False
    """With a retryable error: the worker leaves its pool; to be placed anew, nobody has failed."""
    num_cached_tokens: int = 0
    """Prompt tokens whose KV was found in this worker's cache; set on the first and last delta."""
    timeline: Timeline | None = None
    """Set on the last delta of this worker."""
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    """Of all prompt tokens but the first, in order; once, with output 0, if they were wanted."""
