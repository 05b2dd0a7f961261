"""How many retries the router may add to the load, as a share of its requests.

Every request pays a share of a retry in, every retry takes one out; what is saved is bounded. When
workers fail most of what they get, retries so stay a small part of the load instead of multiplying
it. Pure.
"""

from __future__ import annotations

from services.router.requests.retry_config import RetryConfig


class RetryBudget:
    """Starts full."""

    def __init__(self, config: RetryConfig) -> None:
        self._config = config
        self._left = float(config.budget_reserve)

    @property
    def num_left(self) -> int:
        """Retries that may be made now."""
        return int(self._left)

    def pay_in(self) -> None:
        """A request has been placed for the first time."""
        self._left = min(self._left + self._config.budget_ratio, float(self._config.budget_reserve))

    def take(self) -> bool:
        """Whether one more retry may be made; it then counts."""
        if self._left < 1:
            return False
        self._left -= 1
        return True
