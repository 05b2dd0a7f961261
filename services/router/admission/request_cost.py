"""What a request counts in fairness: tokens of work through both pools, and how long outputs get.

Pure. Does not know: who sends it, when it runs.
"""

from __future__ import annotations

from services.router.admission.admission_config import AdmissionConfig

OUTPUT_GAIN = 0.05
"""Of one request's output length in the mean that the next ones are expected to have."""


class RequestCost:
    """Of one model."""

    def __init__(self, config: AdmissionConfig) -> None:
        self._output_token_cost = config.output_token_cost
        self._residency_tokens = config.residency_tokens
        self._output_tokens = float(config.expected_output_tokens)

    def tokens(self, num_uncached: int, num_prompt: int, num_output: float) -> float:
        """In prompt tokens."""
        residency = 1 + (num_prompt + num_output / 2) / self._residency_tokens
        return max(1.0, num_uncached + self._output_token_cost * num_output * residency)

    def expected_output(self, max_tokens: int) -> int:
        """Of a request that may have so many."""
        return max(1, min(max_tokens, int(self._output_tokens)))

    def learn(self, num_output_tokens: int) -> None:
        """A request has come to its own end."""
        step = OUTPUT_GAIN * (num_output_tokens - self._output_tokens)
        self._output_tokens = max(1.0, self._output_tokens + step)
