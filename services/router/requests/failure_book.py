"""What the router remembers of failures: whom to leave alone, and how much may be retried.

Does not know: requests, sessions, time.
"""

from __future__ import annotations

from baton.core import metrics as series
from baton.core.worker_info import WorkerId
from baton.telemetry.metrics import Metrics
from services.router.placement.policy import Placement
from services.router.requests.attempt import AttemptFailure
from services.router.requests.breaker import Breakers
from services.router.requests.retry_budget import RetryBudget
from services.router.requests.retry_config import BreakerConfig, RetryConfig


class FailureBook:
    """One per router."""

    def __init__(self, retry: RetryConfig, breaker: BreakerConfig, *, metrics: Metrics) -> None:
        self._budget = RetryBudget(retry)
        self._breakers = Breakers(breaker)
        self._metrics = metrics
        self._shown: frozenset[WorkerId] = frozenset()

    def resting(self, now_s: float) -> frozenset[WorkerId]:
        """Workers that get requests only where there is no other."""
        return self._breakers.resting(now_s)

    def placed(self, placement: Placement, now_s: float, *, is_first: bool) -> None:
        """A request has been submitted; `is_first`: not a retry."""
        if is_first:
            self._budget.pay_in()
        for worker_id in placement.workers:
            self._breakers.placed(worker_id, now_s)

    def succeeded(self, placement: Placement, now_s: float) -> None:
        """The request has come to its own end."""
        for worker_id in placement.workers:
            self._breakers.succeeded(worker_id, now_s)
        self._show()

    def failed(self, failure: AttemptFailure, now_s: float) -> bool:
        """Returns whether the request may be placed again, as far as the budget goes."""
        blamed = failure.blamed
        if failure.is_overload:
            return True
        if failure.is_lost:
            if blamed is not None:
                self._breakers.forget(blamed)
            return True
        if blamed is not None:
            self._breakers.failed(blamed, now_s)
            self._show()
        may_retry = self._budget.take()
        if not may_retry:
            self._metrics.add(series.RETRIES_REFUSED, 1)
        return may_retry

    def _show(self) -> None:
        shut = self._breakers.shut()
        if shut == self._shown:
            return
        for worker_id in shut - self._shown:
            self._metrics.set(series.BREAKER_OPEN, 1, worker_id)
        for worker_id in self._shown - shut:
            self._metrics.remove(series.BREAKER_OPEN, worker_id)
        self._shown = shut
