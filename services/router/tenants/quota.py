"""What a tenant may use, asked before a request waits and settled when it has ended.

Rates and slots are counted by `SharedState`, for all router copies together. A generation (one
prompt, one choice) is one request. It takes its prompt and the output that is expected of it, and
at its end gives back, or owes, the difference to what it has used.

Does not know: HTTP, queues, how quotas are counted.
"""

from __future__ import annotations

from baton.core.errors import QuotaExceeded, RateLimit
from services.router.requests.generation import GenerationInput
from services.router.shared.state import (
    QuotaAnswer,
    QuotaGrant,
    QuotaKind,
    QuotaLimits,
    SharedState,
    SharedStatus,
)

MINUTE_S = 60.0
_NOUNS = {
    QuotaKind.REQUESTS: "requests per minute",
    QuotaKind.TOKENS: "tokens per minute",
    QuotaKind.CONCURRENCY: "requests at a time",
}


class QuotaDesk:
    """One per router."""

    def __init__(self, shared: SharedState, *, expected_output_tokens: int) -> None:
        self._shared = shared
        self._expected_output_tokens = expected_output_tokens

    def shared_status(self) -> SharedStatus:
        return self._shared.status()

    async def take(self, request: GenerationInput) -> QuotaGrant | None:
        """What the request holds until `settle`; None where there are no limits.

        Raises QuotaExceeded.
        """
        if request.limits.is_unlimited:
            return None
        output = min(request.sampling.max_tokens, self._expected_output_tokens)
        num_tokens = len(request.prompt_token_ids) + output
        answer = await self._shared.take_quota(
            request.tenant, limits=request.limits, num_tokens=num_tokens
        )
        if answer.grant is None:
            raise _exceeded(request, answer, num_tokens)
        return answer.grant

    def settle(self, grant: QuotaGrant | None, num_used_tokens: int) -> None:
        """The request has ended, having used so many tokens of prompt and output. Never waits."""
        if grant is not None:
            unused = grant.num_tokens - num_used_tokens
            self._shared.return_quota(grant, num_unused_tokens=unused)


def _exceeded(request: GenerationInput, answer: QuotaAnswer, num_tokens: int) -> QuotaExceeded:
    kind = answer.exceeded or QuotaKind.REQUESTS
    limit = request.limits.limit(kind)
    asks = f"; this request counts {num_tokens} tokens" if kind is QuotaKind.TOKENS else ""
    return QuotaExceeded(
        f"the quota of {limit} {_NOUNS[kind]} is used up{asks}; "
        f"try again in {answer.retry_after_s:.1f} s",
        retry_after_s=answer.retry_after_s,
        rate_limits=_rate_limits(request.limits, answer),
    )


def _rate_limits(limits: QuotaLimits, answer: QuotaAnswer) -> tuple[RateLimit, ...]:
    rates = (
        ("requests", limits.requests_per_minute, answer.remaining_requests),
        ("tokens", limits.tokens_per_minute, answer.remaining_tokens),
    )
    return tuple(
        RateLimit(name, limit, remaining, MINUTE_S * (limit - remaining) / limit)
        for name, limit, remaining in rates
        if limit is not None and remaining is not None
    )
