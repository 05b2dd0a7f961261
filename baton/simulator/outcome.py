"""What each simulated request got, and sums over all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from services.router.admission.slo import SloResult, SloTargets, result


@dataclass(slots=True)
class Outcome:
    """One request. Times in seconds of virtual time."""

    number: int
    arrived_s: float
    num_prompt_tokens: int
    kind: str = ""
    prefill: str = ""
    decode: str = ""
    num_cached_tokens: int = 0
    """Not computed by whoever computed the prompt: cached there, or fetched."""
    num_fetched_tokens: int = 0
    """Of these, read from another worker."""
    num_handed_tokens: int = 0
    """Of the prompt, whose KV went from the prefill to the decode worker."""
    placed_s: float = 0.0
    first_token_s: float = 0.0
    last_token_s: float = 0.0
    num_output_tokens: int = 0
    predicted_ttft_s: float | None = None
    refused_s: float | None = None
    """When it was sent away, unless it was admitted."""
    retry_after_s: float = 0.0

    @property
    def ttft_s(self) -> float:
        return self.first_token_s - self.arrived_s

    @property
    def itl_s(self) -> float | None:
        """Mean between its tokens; None of a single token."""
        if self.num_output_tokens < 2:
            return None
        return (self.last_token_s - self.first_token_s) / (self.num_output_tokens - 1)

    def against(self, targets: SloTargets) -> SloResult:
        """As the router judges it. One that never ended has missed them."""
        ttft_s = self.ttft_s if self.last_token_s else None
        return result(targets, ttft_s=ttft_s, mean_itl_s=self.itl_s)


@dataclass(frozen=True, slots=True)
class Summary:
    """Over all requests that have ended."""

    num_requests: int
    num_unfinished: int
    hit_rate: float
    """Share of prompt tokens that nobody had to compute again."""
    fetched_rate: float
    """Share that was read from another worker for it."""
    ttft_mean_s: float
    ttft_p50_s: float
    ttft_p90_s: float
    ttft_p99_s: float
    itl_mean_s: float
    itl_p50_s: float
    itl_p90_s: float
    itl_p99_s: float
    span_s: float
    """From the first arrival to the last token."""


def summarize(outcomes: Sequence[Outcome]) -> Summary:
    """Requests without a last token count as unfinished and nowhere else."""
    ended = [o for o in outcomes if o.last_token_s]
    ttft = sorted(o.ttft_s for o in ended)
    itl = sorted(s for o in ended if (s := o.itl_s) is not None)
    num_tokens = max(1, sum(o.num_prompt_tokens for o in ended))
    return Summary(
        num_requests=len(ended),
        num_unfinished=len(outcomes) - len(ended),
        hit_rate=sum(o.num_cached_tokens for o in ended) / num_tokens,
        fetched_rate=sum(o.num_fetched_tokens for o in ended) / num_tokens,
        ttft_mean_s=_mean(ttft),
        ttft_p50_s=_percentile(ttft, 0.5),
        ttft_p90_s=_percentile(ttft, 0.9),
        ttft_p99_s=_percentile(ttft, 0.99),
        itl_mean_s=_mean(itl),
        itl_p50_s=_percentile(itl, 0.5),
        itl_p90_s=_percentile(itl, 0.9),
        itl_p99_s=_percentile(itl, 0.99),
        span_s=max((o.last_token_s for o in ended), default=0.0),
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _percentile(ordered: Sequence[float], share: float) -> float:
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0
