"""Both pools' models against what workers measured: predicted sums, and corrected models. Pure.

The terms of a model are linear, so the sums of what it is fed give the sum of what it says.

Does not know: how a ratio is learnt (`correction.py`).
"""

from __future__ import annotations

from services.planner.correction import Correction, corrected
from services.planner.decision_record import Models, Term
from services.planner.observer import Seen
from services.planner.pool_model import PoolModel
from services.router.pool_stats import DecodeSums, PrefillSums


def predicted_prefill_s(model: PoolModel, sums: PrefillSums) -> float:
    """Seconds of a worker for these prompts, each in a step of its own."""
    hardware = model.hardware
    return (
        hardware.step_fixed_s * sums.num
        + hardware.prefill_token_s * sums.tokens
        + hardware.prefill_pair_s * sums.pairs
    )


def predicted_step_s(model: PoolModel, sums: DecodeSums) -> float:
    """The sum of these decode steps."""
    hardware = model.hardware
    return (
        # Between two tokens of a sequence lies the gap between two steps, too.
        (hardware.step_fixed_s + hardware.step_gap_s) * sums.num
        + hardware.decode_sequence_s * sums.batch
        + hardware.decode_kv_token_s * sums.kv_tokens
    )


class Corrections:
    """One planner's."""

    def __init__(self, models: Models) -> None:
        self._models = models
        self._prefill, self._decode = Correction(), Correction()
        self.prefill_term, self.decode_term = Term(), Term()

    def observe(self, seen: Seen, *, cold_s: float) -> None:
        """What was measured since the last call; a pool with a worker that has joined within
        `cold_s` teaches nothing."""
        now_s, prefill, decode = seen.observation.now_s, seen.prefill_steps, seen.decode_steps
        cold = [
            now_s - pool.last_joined_s < cold_s
            for pool in (seen.observation.prefill, seen.observation.decode)
        ]
        prefill_s = predicted_prefill_s(self._models.prefill, prefill)
        # Device-seconds; all ranks of a worker work at once.
        engine_s = prefill.engine_s / self._models.prefill.tensor_parallel
        self.prefill_term = _learn(self._prefill, now_s, prefill_s, engine_s, cold[0])
        step_s = predicted_step_s(self._models.decode, decode)
        self.decode_term = _learn(self._decode, now_s, step_s, decode.step_s, cold[1])

    def models(self) -> Models:
        """With what was learnt."""
        return Models(
            corrected(self._models.prefill, self._prefill.ratio),
            corrected(self._models.decode, self._decode.ratio),
        )

    def restore(self, prefill: Term, decode: Term) -> None:
        """Go on from there."""
        self._prefill.restore(prefill.ratio, prefill.error_ratio)
        self._decode.restore(decode.ratio, decode.error_ratio)
        self.prefill_term, self.decode_term = prefill, decode


def _learn(
    correction: Correction, now_s: float, predicted_s: float, measured_s: float, is_cold: bool
) -> Term:
    correction.observe(predicted_s, measured_s, now_s, is_cold=is_cold)
    return Term(correction.ratio, correction.error_ratio, predicted_s, measured_s)
