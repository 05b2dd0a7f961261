"""What the charts show: one sample a period, kept for a while.

Pure: time and statistics are passed in. Does not know: where the statistics come from.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from services.router.pool_stats import PoolStats
from services.router.ui.request_book import EndedRequest

PERIOD_S = 2.0


@dataclass(frozen=True, slots=True)
class Sample:
    """Of one period. Rates are per second, durations seconds; None where nothing was measured."""

    number: int
    """Counts up from 1."""
    at_s: float
    """Wall clock."""
    arrived_per_s: float
    tokens_per_s: float
    kept_per_s: float | None
    """Goodput: requests that kept every target they had. None where nothing has a target."""
    ttft_attainment: float | None
    itl_attainment: float | None
    ttft_p50_s: float | None
    ttft_p90_s: float | None
    itl_p50_s: float | None
    itl_p90_s: float | None
    num_running: float
    num_queued: float
    prefill_kv_usage: float
    decode_kv_usage: float
    num_prefill: float
    """Workers that take requests."""
    num_decode: float


class History:
    """`look` as often as wanted: it samples once a period."""

    def __init__(self, history_s: float) -> None:
        self._samples: deque[Sample] = deque(maxlen=max(1, math.ceil(history_s / PERIOD_S)))
        self._before: PoolStats | None = None
        self._looked_at_s = -math.inf
        self._number = 0

    def is_due(self, at_s: float) -> bool:
        """Whether a period has passed since the last look. A clock that was set back counts."""
        return not 0 <= at_s - self._looked_at_s < PERIOD_S

    def look(self, stats: PoolStats, ended: Sequence[EndedRequest], at_s: float) -> None:
        """`ended` since the last look; `at_s` is the wall clock's."""
        self._looked_at_s = at_s
        before, self._before = self._before, stats
        if before is None:
            return
        self._number += 1
        self._samples.append(_sample(self._number, stats, stats.since(before), ended, at_s))

    def since(self, number: int) -> list[Sample]:
        """Samples after that one, oldest first. A number of before a restart gives all."""
        if number > self._number:
            number = 0
        return [sample for sample in self._samples if sample.number > number]


def _sample(
    number: int, now: PoolStats, added: PoolStats, ended: Sequence[EndedRequest], at_s: float
) -> Sample:
    seconds = max(added.uptime_s, 1e-3)
    ttfts = sorted(e.ttft_s for e in ended if e.ttft_s is not None)
    itls = sorted(e.itl_s for e in ended if e.itl_s is not None)
    return Sample(
        number=number,
        at_s=at_s,
        arrived_per_s=added.num_arrived / seconds,
        tokens_per_s=added.output_tokens / seconds,
        kept_per_s=added.num_kept / seconds if now.num_judged else None,
        ttft_attainment=_share(added.ttft_met, added.ttft_measured),
        itl_attainment=_share(added.itl_met, added.itl_measured),
        ttft_p50_s=_quantile(ttfts, 0.5),
        ttft_p90_s=_quantile(ttfts, 0.9),
        itl_p50_s=_quantile(itls, 0.5),
        itl_p90_s=_quantile(itls, 0.9),
        num_running=now.num_running,
        num_queued=now.num_queued,
        prefill_kv_usage=now.prefill.kv_usage,
        decode_kv_usage=now.decode.kv_usage,
        num_prefill=now.prefill.num_ready,
        num_decode=now.decode.num_ready,
    )


def _share(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def _quantile(ordered: Sequence[float], share: float) -> float | None:
    """The smallest value that at least `share` of all do not exceed."""
    if not ordered:
        return None
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]
