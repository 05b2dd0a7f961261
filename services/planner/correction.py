"""A model's seconds set right by measured ones: one ratio a term. Pure.

    observe(predicted, measured) ─► error of what was predicted ─► ratio, a bounded way towards
                                                                   measured / predicted

A term is what has one kind of error, such as seconds of a pool's prefill steps. Predictions are
those of the model without correction. In logarithms, so that half as long and twice as long weigh
the same. A sample moves the ratio by at most `MAX_SAMPLE_RATIO`, and the more the longer
ago the last one was; the first few count fully. What workers that have just joined measured (cold
caches, kernels still compiled) is no sample.

Does not know: workers, requests, clocks.
"""

from __future__ import annotations

import dataclasses
import math

from services.planner.pool_model import PoolModel

MIN_RATIO = 0.25
MAX_RATIO = 4.0
"""A model further off than that describes another machine."""
HALF_LIFE_S = 120.0
"""Until a lasting difference has been taken over by half."""
MAX_SAMPLE_RATIO = 2.0
NUM_FIRST_SAMPLES = 5
"""That weigh as in a mean, however close together they come."""
MAX_ERROR_RATIO = 10.0


class Correction:
    """Of one term. `observe` in order of time."""

    def __init__(self) -> None:
        self._log_ratio = 0.0
        self._num_samples = 0
        self._last_s: float | None = None
        self.error_ratio = 0.0
        """Mean relative error of recent predictions, each with the ratio of its moment."""

    @property
    def ratio(self) -> float:
        """Measured by predicted seconds, from `MIN_RATIO` to `MAX_RATIO`."""
        return math.exp(self._log_ratio)

    def observe(
        self, predicted_s: float, measured_s: float, now_s: float, *, is_cold: bool = False
    ) -> float:
        """The ratio after this sample. Sums over a moment's steps do as well as single steps.

        Cold samples, and seconds that are not above 0 or not finite, are ignored.
        """
        usable = all(math.isfinite(s) and s > 0 for s in (predicted_s, measured_s))
        if is_cold or not usable or not math.isfinite(now_s):
            return self.ratio
        gain = self._gain(now_s)
        error = min(MAX_ERROR_RATIO, abs(predicted_s * self.ratio - measured_s) / measured_s)
        step = math.log(measured_s / predicted_s) - self._log_ratio
        limit = math.log(MAX_SAMPLE_RATIO)
        self._log_ratio = _bounded(self._log_ratio + gain * max(-limit, min(limit, step)))
        self.error_ratio += gain * (error - self.error_ratio)
        self._num_samples += 1
        self._last_s = now_s if self._last_s is None else max(now_s, self._last_s)
        return self.ratio

    def restore(self, ratio: float, error_ratio: float) -> None:
        """Go on from what another one had learnt; numbers that none leaves behind are ignored."""
        if not (math.isfinite(ratio) and ratio > 0 and math.isfinite(error_ratio)):
            return
        self._log_ratio = _bounded(math.log(ratio))
        self.error_ratio = max(0.0, min(MAX_ERROR_RATIO, error_ratio))
        self._num_samples, self._last_s = NUM_FIRST_SAMPLES, None

    def _gain(self, now_s: float) -> float:
        if self._last_s is None:
            # The very first, or the first after a restart.
            return 1.0 / (self._num_samples + 1)
        by_time = 1.0 - math.pow(0.5, max(0.0, now_s - self._last_s) / HALF_LIFE_S)
        if self._num_samples < NUM_FIRST_SAMPLES:
            return max(by_time, 1.0 / (self._num_samples + 1))
        return by_time


def corrected(model: PoolModel, ratio: float) -> PoolModel:
    """`model` with all seconds of its steps times `ratio`."""
    hardware = model.hardware
    return dataclasses.replace(
        model,
        hardware=dataclasses.replace(
            hardware,
            step_fixed_s=hardware.step_fixed_s * ratio,
            step_gap_s=hardware.step_gap_s * ratio,
            prefill_token_s=hardware.prefill_token_s * ratio,
            prefill_pair_s=hardware.prefill_pair_s * ratio,
            decode_sequence_s=hardware.decode_sequence_s * ratio,
            decode_kv_token_s=hardware.decode_kv_token_s * ratio,
        ),
    )


def _bounded(log_ratio: float) -> float:
    return max(math.log(MIN_RATIO), min(math.log(MAX_RATIO), log_ratio))
