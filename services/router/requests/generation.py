"""The seam between the router's edges (HTTP, gRPC) and its dispatcher.

An edge parses, validates, tokenizes and builds a `GenerationInput`; the dispatcher places it,
follows the workers, detokenizes and yields `GenerationDelta`s. Neither knows the other's format.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from baton.core.errors import RateLimit
from baton.core.request import FinishReason, RequestId, SamplingParams, TokenLogprobs
from baton.core.trace import TraceContext
from baton.engine.tokenizer import Tokenizer
from services.router.admission.slo import SloTargets
from services.router.requests.timing import RequestTiming
from services.router.shared.state import QuotaLimits
from services.router.tenants.quota_hold import QuotaHold

NO_LIMITS = QuotaLimits()

OnRateLimits = Callable[[tuple[RateLimit, ...]], None]


@dataclass(frozen=True, slots=True)
class ModelCard:
    """A model that the live workers serve."""

    name: str
    max_model_len: int
    """Tokens of prompt and output together."""
    tokenizer: Tokenizer
    created_s: int
    """Unix time at which the router first saw it."""


@dataclass(frozen=True, slots=True)
class GenerationInput:
    """One prompt, validated and tokenized."""

    request_id: RequestId
    model: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    stop: tuple[str, ...] = ()
    """Strings that end the output, also when split over tokens."""
    includes_stop: bool = False
    """The stop string that ended the output stays at its end."""
    skip_special_tokens: bool = True
    """The text is without them."""
    cache_salt: str = ""
    """From the tenant. Prompts share KV only under equal salts."""
    deadline_s: float = 600.0
    """Seconds from arrival until the client gets an error."""
    arrived_at_s: float = 0.0
    """Wall-clock time at which the edge read the request."""
    tenant: str = ""
    """Who is charged: the owner of the API key; the anonymous tenant where there are no keys."""
    priority: int = 0
    """Among requests of one tenant; a smaller number goes first, as in vLLM."""
    slo_class: str = ""
    """Which service-level objectives hold; empty takes the default class."""
    targets: SloTargets | None = None
    """The client's own, instead of those of the class."""
    weight: float = 1.0
    """Of the tenant, among those that have work waiting."""
    limits: QuotaLimits = NO_LIMITS
    """What the tenant may use."""
    hold: QuotaHold | None = None
    """What it has of that already; only of long prompts."""
    on_rate_limits: OnRateLimits | None = None
    """Told where the tenant stands once the request has been counted, if it has limits."""
    session_key: str = ""
    """Requests of one conversation share it: a hint where their prefix may be cached."""
    trace: TraceContext | None = None
    """The client's span."""
    wants_timing: bool = False
    """The last delta says where the time went."""


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts of one finished request."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


class GenerationDelta(NamedTuple):
    """Text that became certain, with the tokens it came from.

    `text` may be empty while `token_ids` is not: a character or a possible stop string is still
    incomplete. The last delta has `finish_reason` and `usage`.
    """

    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    """The stop string or stop token id that ended the output; None for EOS and length."""
    usage: Usage | None = None
    timing: RequestTiming | None = None
    """If it was asked for."""
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    """Of all prompt tokens but the first, with output 0, if they were asked for."""


@dataclass(frozen=True, slots=True)
class Health:
    """`is_ready`: a token was produced recently, or idle workers of both pools answer."""

    is_ready: bool
    reason: str
    detail: dict[str, object] = field(default_factory=dict)


class Generator(Protocol):
    """What an edge needs of the dispatcher."""

    def models(self) -> list[ModelCard]:
        """Models served now; empty while no worker is connected."""
        ...

    async def hold_quota(self, tenant: str, limits: QuotaLimits) -> QuotaHold | None:
        """A request and a slot, before a long prompt is made into tokens; goes into the input, and
        is to be released in any case. None without limits. Raises QuotaExceeded."""
        ...

    def generate(self, request: GenerationInput) -> AsyncIterator[Sequence[GenerationDelta]]:
        """Run one request; yields all deltas that are there, at least one, at a time.

        Raises RequestError or ServiceError, also in mid-stream. Closing the iterator (or cancelling
        its task) cancels the request on all workers.
        """
        ...

    async def health(self) -> Health:
        """Answers within a second."""
        ...
