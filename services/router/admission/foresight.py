"""What a placement made now would mean by the time its prompt is computed.

    decode batch   as reported and sent, less what will have ended by then (`turnover`)
    its pace       as modelled for that batch, times how far the worker's steps differ from it now
    places         sequences that end per second on all workers of the model, at their present pace

The performance model learns decode steps from requests that have ended; a batch that grows is
learned from here as it runs, and much sooner.

Does not know: clocks, queues, who is admitted.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from baton.core.worker_info import Role, WorkerId
from services.router.admission.ticket import Prospect, Ticket
from services.router.admission.turnover import Sequence, Turnover
from services.router.placement.perf_model import PerfModel
from services.router.placement.placement import Placement, Prediction
from services.router.requests.step_gap import Decoding

MAX_CORRECTION = 8.0
"""By which a worker's present pace goes before what is modelled of it."""
MIN_ITL_S = 1e-6
MAX_WORKERS = 4096
PLACES_FRESH_S = 0.05
"""How long the rate at which places come free is taken for the same."""
LEARN_PERIOD_S = 0.25
"""Between two looks at one worker that the performance model learns from."""


class Running(NamedTuple):
    """What `ended` needs of a sequence that was `started`."""

    model: str
    worker_id: WorkerId
    sequence: Sequence


class Foresight:
    """One per router."""

    def __init__(
        self,
        perf: PerfModel,
        *,
        decoding: Callable[[WorkerId], Decoding | None],
        num_computing: Callable[[str], int],
        expected_output_tokens: float,
    ) -> None:
        """`decoding`: what a worker decodes now. `num_computing`: workers that compute prompts of a
        model."""
        self._perf = perf
        self._decoding_now, self._num_computing = decoding, num_computing
        self._expected_output_tokens = expected_output_tokens
        self._turnovers: dict[str, Turnover] = {}
        self._learned_at_s: dict[WorkerId, float] = {}
        self._places: dict[str, tuple[float, float]] = {}
        """(per second, good until) of models with running sequences."""

    @property
    def num_running(self) -> int:
        """Sequences followed."""
        return sum(map(len, self._turnovers.values()))

    def prospect(self, model: str, ticket: Ticket, placement: Placement, now_s: float) -> Prospect:
        """For `ticket` of `model`, were `placement` submitted now."""
        uncached = placement.terms_of(placement.computes_prompt).uncached
        num_computing = max(1, self._num_computing(model))
        predicted, worker_id = placement.predicted, placement.decode
        if predicted is None or worker_id is None:
            return Prospect(predicted, uncached, num_computing)
        role = placement.terms_of(worker_id).role
        turnover = self._turnover(model)
        speed = self._perf.decode_speed(role, worker_id)
        num_steps = predicted.ttft_s / max(MIN_ITL_S, predicted.itl_s)
        ending = turnover.ending(worker_id, num_steps, now_s)
        relief_s = speed.sequence_s * ending.num_sequences + speed.kv_token_s * ending.kv_tokens
        each_s = relief_s / ending.num_sequences if ending.num_sequences else speed.sequence_s
        pace = self._pace(role, worker_id, now_s)
        itl_s = pace * max(speed.fixed_s, predicted.itl_s - relief_s)
        alone_itl_s = 0.0
        if ticket.targets.itl_s is not None:
            alone_itl_s = self._perf.itl_s(role, 1, ticket.num_prompt_tokens, worker_id)
        return Prospect(
            predicted._replace(itl_s=itl_s),
            uncached,
            num_computing,
            alone_itl_s,
            worker_id,
            pace * each_s,
            self._places_per_s(model, predicted, now_s),
            max(1, len(turnover.workers)),
        )

    def started(self, model: str, worker_id: WorkerId, sequence: Sequence) -> Running:
        """Admitted: it is going to decode there."""
        self._turnover(model).add(worker_id, sequence)
        return Running(model, worker_id, sequence)

    def ended(self, running: Running) -> None:
        self._turnovers[running.model].remove(running.worker_id, running.sequence)

    def _pace(self, role: Role, worker_id: WorkerId, now_s: float) -> float:
        """The worker's present steps by what is modelled for them."""
        measured = self._decoding_now(worker_id)
        if measured is None or measured.num_sequences < 1:
            return 1.0
        batch, kv_tokens = measured.num_sequences, measured.kv_tokens
        # By the model that the prediction was made with.
        modelled_s = self._perf.itl_s(role, batch, kv_tokens, worker_id)
        if now_s - self._learned_at_s.get(worker_id, -LEARN_PERIOD_S) >= LEARN_PERIOD_S:
            if len(self._learned_at_s) >= MAX_WORKERS:
                self._learned_at_s.clear()
            self._learned_at_s[worker_id] = now_s
            self._perf.observe_itl(role, worker_id, batch, kv_tokens, measured.gap_s)
        return min(MAX_CORRECTION, max(1 / MAX_CORRECTION, measured.gap_s / modelled_s))

    def _places_per_s(self, model: str, predicted: Prediction, now_s: float) -> float:
        rate, good_until_s = self._places.get(model, (0.0, 0.0))
        if now_s < good_until_s:
            return rate
        turnover, rate = self._turnover(model), 0.0
        for worker_id in turnover.workers:
            measured = self._decoding_now(worker_id)
            gap_s = predicted.itl_s if measured is None else measured.gap_s
            rate += turnover.ending(worker_id, 1.0 / max(MIN_ITL_S, gap_s), now_s).num_sequences
        self._places[model] = (rate, now_s + PLACES_FRESH_S)
        return rate

    def _turnover(self, model: str) -> Turnover:
        """Only models that workers serve are ever placed."""
        turnover = self._turnovers.get(model)
        if turnover is None:
            turnover = self._turnovers[model] = Turnover(self._expected_output_tokens)
        return turnover
