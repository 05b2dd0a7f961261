"""What a tenant may use, asked before a request waits and settled when it has ended.

    long prompt:   hold (request, slot) ── text made into tokens ── take (tokens) ── settle
    short prompt:                                                   take (all)    ── settle

Rates and slots are counted by `SharedState`, for all router copies together. A generation (one
prompt, one choice) is one request. It takes its prompt and the output that is expected of it, and
at its end gives back, or owes, the difference to what it has used.

Does not know: HTTP, queues, how quotas are counted.
"""

from __future__ import annotations

import dataclasses

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
from services.router.tenants.quota_hold import QuotaHold, undo

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
        """What the request holds until `settle`; None where there are no limits. Tells the request
        what is left of its rates.

        Raises QuotaExceeded.
        """
        if request.limits.is_unlimited:
            return None
        output = min(request.sampling.max_tokens, self._expected_output_tokens)
        num_tokens = len(request.prompt_token_ids) + output
        held = None if request.hold is None else request.hold.claim()
        if held is None:
            answer = await self._shared.take_quota(
                request.tenant, limits=request.limits, num_tokens=num_tokens
            )
        else:
            answer = await self._take_tokens(held, num_tokens)
        if answer.grant is None:
            raise _exceeded(request.limits, answer, num_tokens)
        if request.on_rate_limits is not None:
            request.on_rate_limits(_rate_limits(request.limits, answer))
        return answer.grant

    async def hold(self, tenant: str, limits: QuotaLimits) -> QuotaHold | None:
        """For a prompt that takes long to be made into tokens: its request and its slot now, its
        tokens with `take`. None where there are no limits. Raises QuotaExceeded."""
        if limits.is_unlimited:
            return None
        answer = await self._shared.take_quota(tenant, limits=limits, num_tokens=1)
        if answer.grant is None:
            raise _exceeded(limits, answer, None)
        return QuotaHold(self._shared, answer.grant)

    async def _take_tokens(self, held: QuotaGrant, num_tokens: int) -> QuotaAnswer:
        """What a request needs beside what it holds; when that is refused it holds nothing."""
        rates = dataclasses.replace(held.limits, max_concurrent=None)
        is_granted = False
        try:
            answer = await self._shared.take_quota(
                held.tenant,
                limits=rates,
                num_tokens=num_tokens - held.num_tokens,
                num_requests=0,
            )
            is_granted = answer.is_granted
        finally:
            if not is_granted:
                undo(self._shared, held)
        if not is_granted:
            return answer
        # Its tokens are taken, and it has no slot of its own.
        self._shared.return_quota(answer.grant)
        return dataclasses.replace(answer, grant=dataclasses.replace(held, num_tokens=num_tokens))

    def settle(self, grant: QuotaGrant | None, num_used_tokens: int) -> None:
        """The request has ended, having used so many tokens of prompt and output. Never waits."""
        if grant is not None:
            unused = grant.num_tokens - num_used_tokens
            self._shared.return_quota(grant, num_unused_tokens=unused)


def _exceeded(limits: QuotaLimits, answer: QuotaAnswer, num_tokens: int | None) -> QuotaExceeded:
    """`num_tokens`: None before they are counted."""
    kind = answer.exceeded or QuotaKind.REQUESTS
    limit = limits.limit(kind)
    is_about_size = kind is QuotaKind.TOKENS and num_tokens is not None
    asks = f"; this request counts {num_tokens} tokens" if is_about_size else ""
    return QuotaExceeded(
        f"the quota of {limit} {_NOUNS[kind]} is used up{asks}; "
        f"try again in {answer.retry_after_s:.1f} s",
        retry_after_s=answer.retry_after_s,
        rate_limits=_rate_limits(limits, answer),
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
