"""A request as admission sees it: its place in the queue, its targets, what is predicted for it.

    NEW ─► WAITING ─► ADMITTED ─► ENDED
     │        ├─────► REFUSED
     └────────┴─────► LEFT          the client has gone, or its deadline has come

Does not know: prompts, workers, waiting.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

from baton.core.worker_info import WorkerId
from services.router.admission.fair_queue import Entry
from services.router.admission.slo import NO_TARGETS, SloTargets
from services.router.placement.placement import Prediction


class TicketState(Enum):
    NEW = "new"
    WAITING = "waiting"
    ADMITTED = "admitted"
    REFUSED = "refused"
    LEFT = "left"
    ENDED = "ended"


class Refusal(Enum):
    """Why a request is sent away."""

    TTFT = "ttft"
    """On arrival: predicted to get its first token too late."""
    ITL = "itl"
    """No decode batch that is fast enough is expected to have a place in time for its first token:
    on arrival, or after it had waited for one."""
    LATE = "late"
    """It waited, and can no longer get its first token in time."""
    QUEUE_FULL = "queue_full"
    PUSHED_OUT = "pushed_out"
    """It made room for a tenant that has less waiting."""
    NO_WORKER = "no_worker"
    """Nobody came who could take it."""


class Prospect(NamedTuple):
    """What a placement made now would mean."""

    predicted: Prediction | None
    """None by policies that do not predict."""
    num_uncached_tokens: int
    """Of the prompt, on the worker that would compute it."""
    num_workers: int = 1
    """Those that compute prompts of this model."""
    alone_itl_s: float = 0.0
    """Between its tokens with nobody beside it: no smaller target can be kept."""
    decode: WorkerId | None = None
    """Whose batch it would join."""
    itl_relief_s: float = 0.0
    """By which tokens there come faster for each sequence that ends."""
    places_per_s: float = 0.0
    """Sequences of the model that are expected to end, on all workers."""
    num_decoding: int = 1
    """Workers they run on."""


@dataclass(slots=True, eq=False)
class Ticket(Entry):
    """Lives from a request's arrival to its end."""

    slo_class: str = ""
    targets: SloTargets = NO_TARGETS
    arrived_at_s: float = 0.0
    num_prompt_tokens: int = 1
    num_output_tokens: int = 1
    """As many as are expected."""
    state: TicketState = TicketState.NEW
    refusal: Refusal | None = None
    retry_after_s: float = 0.0
    """When refused: by then the same request is predicted to be taken on."""
    predicted_ttft_s: float | None = None
    """From arrival, as last predicted."""
    predicted_itl_s: float | None = None
    promised_itl_s: float | None = None
    """Its target, unless no worker could keep it; what others must leave it."""
    decode: WorkerId | None = None
    """The worker on which that is promised."""
    num_uncached_tokens: int = 0
    """Of the prompt, as last looked up."""
    wait_started_at_s: float | None = None
    """None: it did not have to wait."""
    own_s: float = 0.0
    """The part of the time to first token that no idle worker can spare it."""
    admitted_at_s: float = math.nan
    wait_reason: Refusal | None = None
    """What it waits for, if it is not its turn."""
    blocked_since_s: float = math.nan
    """It was its turn and it could not go."""
    no_worker_since_s: float = math.nan
    check_at_s: float = math.inf
    """When its waiting becomes pointless."""
    unreachable_at_s: float = math.nan
    """When refused after it had waited: the moment from which its turn could not come in time."""
