"""How long things take: prefill from its tokens, a decode step from its batch. Pure and online.

    prefill  fixed + token * uncached + pair * uncached * (cached + uncached / 2)
    queue    token_queued * tokens queued before it
    itl      fixed + sequence * batch + kv_token * resident KV tokens

Coefficients are those of a role, times a factor of the single worker where it differs. They start
from `PerfConfig` and learn from what finished requests measured, and decode steps from batches as
they run. A role that nothing is known of yet is taken to be as much slower than assumed as the
other one.

Does not know: requests, clocks, where the numbers come from.
"""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple

from baton.core.worker_info import Role, WorkerId
from services.router.placement.online_fit import ERROR_GAIN, MAX_ERROR, OnlineFit, RatioBook, Vector
from services.router.placement.perf_config import PerfConfig

MIN_QUEUE_TOKENS = 256
"""A wait behind fewer tokens is the step at work, and says nothing of their rate."""
QUEUE_GAIN = 0.03
MAX_QUEUE_STEP = 0.5
MAX_QUEUE_RATIO = 10.0
OVERHEAD_GAIN = 0.05
MAX_OVERHEAD_STEP_S = 0.01
MAX_OVERHEAD_S = 1.0


class Quantity(Enum):
    """What is predicted."""

    PREFILL = "prefill"
    ITL = "itl"
    TTFT = "ttft"


class PrefillSpeed(NamedTuple):
    fixed_s: float
    token_s: float
    pair_s: float
    queued_token_s: float
    """Of waiting, for each token that was there before."""


class DecodeSpeed(NamedTuple):
    fixed_s: float
    sequence_s: float
    kv_token_s: float


class PerfModel:
    """One per router. `version` changes with the coefficients; what single workers differ by, and
    what waiting takes, may move a little between two versions."""

    def __init__(self, config: PerfConfig | None = None) -> None:
        config = config or PerfConfig()

        def fit(assumed: Vector) -> OnlineFit:
            return OnlineFit(assumed, memory=config.memory, outlier_ratio=config.outlier_ratio)

        prefill = (config.prefill_fixed_s, config.prefill_token_s, config.prefill_pair_s)
        itl = (config.itl_fixed_s, config.itl_sequence_s, config.itl_kv_token_s)
        self._prefill = {role: fit(prefill) for role in Role}
        self._itl = {role: fit(itl) for role in Role}
        self._fits = (*self._prefill.values(), *self._itl.values())
        self._queue_ratio = dict.fromkeys(Role, 1.0)
        """Seconds of waiting behind a token, by those of computing one."""
        self._prefill_ratio, self._itl_ratio = RatioBook(), RatioBook()
        self._ttft_error_ratio = dict.fromkeys(Role, 0.0)
        self._num_ttft = dict.fromkeys(Role, 0)
        self.overhead_s = 0.0
        """Of the first token, beside queue, transfer and prefill: messages, the router itself."""

    @property
    def version(self) -> int:
        a, b, c, d = self._fits
        return a.version + b.version + c.version + d.version

    def prefill_speed(self, role: Role, worker_id: WorkerId | None = None) -> PrefillSpeed:
        fit, ratio = _known(self._prefill, role), self.prefill_ratio(worker_id)
        fixed_s, token_s, pair_s = (c * ratio for c in fit.coefficients)
        return PrefillSpeed(fixed_s, token_s, pair_s, token_s * self._queue_ratio[role])

    def decode_speed(self, role: Role, worker_id: WorkerId | None = None) -> DecodeSpeed:
        fit, ratio = _known(self._itl, role), self.itl_ratio(worker_id)
        return DecodeSpeed(*(c * ratio for c in fit.coefficients))

    def prefill_ratio(self, worker_id: WorkerId | None) -> float:
        return 1.0 if worker_id is None else self._prefill_ratio.get(worker_id)

    def itl_ratio(self, worker_id: WorkerId | None) -> float:
        return 1.0 if worker_id is None else self._itl_ratio.get(worker_id)

    @property
    def ratio_books(self) -> tuple[RatioBook, RatioBook]:
        """What single workers differ by, in prefill and in decoding."""
        return self._prefill_ratio, self._itl_ratio

    def prefill_s(
        self, role: Role, uncached: int, cached: int = 0, worker_id: WorkerId | None = None
    ) -> float:
        """Computing `uncached` tokens that follow `cached` ones, on an idle worker."""
        speed = self.prefill_speed(role, worker_id)
        pairs = uncached * (cached + uncached / 2)
        return speed.fixed_s + speed.token_s * uncached + speed.pair_s * pairs

    def queue_s(self, role: Role, queued_tokens: float, worker_id: WorkerId | None = None) -> float:
        """Waiting behind `queued_tokens` of prefill."""
        return self.prefill_speed(role, worker_id).queued_token_s * queued_tokens

    def itl_s(
        self,
        role: Role,
        batch: float,
        resident_kv_tokens: float,
        worker_id: WorkerId | None = None,
    ) -> float:
        """Between tokens of each of `batch` sequences that hold so much KV together."""
        speed = self.decode_speed(role, worker_id)
        return speed.fixed_s + speed.sequence_s * batch + speed.kv_token_s * resident_kv_tokens

    def error_ratio(self, quantity: Quantity, role: Role) -> float:
        """Mean relative error of recent predictions for workers of `role`; of TTFT: for requests
        whose prompt they computed."""
        if quantity is Quantity.TTFT:
            return self._ttft_error_ratio[role]
        fits = self._prefill if quantity is Quantity.PREFILL else self._itl
        return fits[role].error_ratio

    # Learning. Durations that are not positive are ignored.

    def observe_prefill(
        self, role: Role, worker_id: WorkerId, uncached: int, cached: int, seconds: float
    ) -> None:
        """`seconds`: from the first chunk to the first token."""
        if uncached < 1 or not seconds > 0:
            return
        x = (1.0, float(uncached), uncached * (cached + uncached / 2))
        fit = self._prefill[role]
        fit.observe(x, seconds)
        self._prefill_ratio.observe(worker_id, seconds, fit.predict(x))

    def observe_queue(
        self, role: Role, worker_id: WorkerId, queued_tokens: int, seconds: float
    ) -> None:
        """`seconds`: waited for the first chunk, behind `queued_tokens` of others."""
        if queued_tokens < MIN_QUEUE_TOKENS or not seconds >= 0:
            return
        token_s = self.prefill_speed(role, worker_id).token_s
        step = seconds / (token_s * queued_tokens) - self._queue_ratio[role]
        step = max(-MAX_QUEUE_STEP, min(MAX_QUEUE_STEP, step))
        new = self._queue_ratio[role] + QUEUE_GAIN * step
        self._queue_ratio[role] = max(1 / MAX_QUEUE_RATIO, min(MAX_QUEUE_RATIO, new))

    def observe_itl(
        self,
        role: Role,
        worker_id: WorkerId,
        batch: float,
        resident_kv_tokens: float,
        seconds: float,
    ) -> None:
        """`seconds`: mean between tokens, of a request that ended or of a batch's last steps; the
        others: means over that time."""
        if batch < 1 or not seconds > 0:
            return
        x = (1.0, float(batch), float(resident_kv_tokens))
        fit = self._itl[role]
        fit.observe(x, seconds)
        self._itl_ratio.observe(worker_id, seconds, fit.predict(x))

    def observe_ttft(self, role: Role, predicted_s: float, seconds: float) -> None:
        """What was predicted for a request as it was placed, and what came. `role`: of the worker
        that computed the prompt."""
        if not (predicted_s > 0 and seconds > 0):
            return
        self._num_ttft[role] += 1
        gain = max(ERROR_GAIN, 1.0 / self._num_ttft[role])
        error = min(MAX_ERROR, abs(seconds - predicted_s) / predicted_s)
        self._ttft_error_ratio[role] += gain * (error - self._ttft_error_ratio[role])
        step = max(-MAX_OVERHEAD_STEP_S, min(MAX_OVERHEAD_STEP_S, seconds - predicted_s))
        overhead_s = self.overhead_s + OVERHEAD_GAIN * step
        self.overhead_s = max(0.0, min(MAX_OVERHEAD_S, overhead_s))


def _known(fits: dict[Role, OnlineFit], role: Role) -> OnlineFit:
    """The fit of `role`, or the other role's while there are no measurements of this one."""
    if fits[role].num_seen:
        return fits[role]
    return max(fits.values(), key=lambda fit: fit.num_seen)
