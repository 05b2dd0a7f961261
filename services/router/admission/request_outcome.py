"""A request's two ends as admission sees them: the ticket it gets, and what has come of it.

Does not know: queues, decisions.
"""

from __future__ import annotations

from typing import NamedTuple

from baton.core.lifecycle import LifecycleEvent
from baton.core.request import FinishReason
from services.router.admission.slo import SloResult, SloTargets, class_targets, result
from services.router.admission.slo_config import SloConfig
from services.router.admission.ticket import Ticket
from services.router.requests.generation import GenerationInput
from services.router.requests.request_record import RequestRecord


def new_ticket(
    request: GenerationInput, slo: SloConfig, *, arrived_at_s: float, deadline_at_s: float
) -> Ticket:
    """Times are the lane's. A class that is not in the settings any more is the default one."""
    name = request.slo_class if request.slo_class in slo.classes else slo.default_class
    targets = request.targets or class_targets(slo, name)
    due_at_s = deadline_at_s
    if targets.ttft_s is not None:
        due_at_s = min(due_at_s, arrived_at_s + targets.ttft_s)
    return Ticket(
        tenant=request.tenant,
        cost_tokens=1.0,
        priority=request.priority,
        due_at_s=due_at_s,
        weight=request.weight,
        slo_class=name,
        targets=targets,
        arrived_at_s=arrived_at_s,
        num_prompt_tokens=len(request.prompt_token_ids),
        num_output_tokens=request.sampling.max_tokens,
    )


class Outcome(NamedTuple):
    """Of an admitted request; None: it did not get so far."""

    ttft_s: float | None
    mean_itl_s: float | None
    is_whole: bool
    """It came to its own end."""
    is_to_be_judged: bool
    """Else the client did not wait for what was promised."""

    def result(self, targets: SloTargets) -> SloResult:
        if not self.is_to_be_judged:
            return SloResult(None, None)
        return result(targets, ttft_s=self.ttft_s, mean_itl_s=self.mean_itl_s)


def outcome_of(record: RequestRecord) -> Outcome:
    """Of a request that is over."""
    ttft_s = record.timeline.seconds(LifecycleEvent.ARRIVED, LifecycleEvent.FIRST_TOKEN)
    is_whole = record.finish_reason in (FinishReason.STOP, FinishReason.LENGTH)
    has_failed = record.finish_reason is FinishReason.ERROR
    is_to_be_judged = is_whole or ttft_s is not None or has_failed
    return Outcome(ttft_s, record.mean_itl_s, is_whole, is_to_be_judged)
