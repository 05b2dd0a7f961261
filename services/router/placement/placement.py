"""What placement is asked and what it answers, as plain values.

Does not know: how the answer is found.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

from baton.core.worker_info import Role, WorkerId


class PlacementKind(Enum):
    REMOTE_PREFILL = "remote_prefill"
    LOCAL_PREFILL = "local_prefill"
    PREFILL_ONLY = "prefill_only"


@dataclass(frozen=True, slots=True)
class PlacementRequest:
    """What placement needs to know of a request, beside its match in the prefix index."""

    model: str
    num_prompt_tokens: int
    """Prompt and, in a replay, the tokens produced so far."""
    max_tokens: int
    """Tokens still to be produced."""
    avoid: frozenset[WorkerId] = frozenset()
    """Workers that failed this request; taken only when there is no other."""
    last_workers: tuple[WorkerId, ...] = ()
    """Where the last turn of the same conversation ran."""


class ScoreTerms(NamedTuple):
    """How one candidate was judged. Tokens, and seconds where the name ends so."""

    worker_id: WorkerId
    role: Role
    cached: int
    """Tokens that would not be computed: on the device, restored from a tier or fetched."""
    uncached: int
    queued_prefill: int
    resident_kv: int
    num_sequences: int
    missing_kv: int
    """Tokens of KV the request needs and the worker has no blocks for."""
    prefill_cost: float
    """Seconds: queue, move and compute, with the credit for cached blocks as it is under load."""
    decode_cost: float
    """Seconds: the request's own decoding, the slow-down of others, shortage of blocks."""
    queue_s: float = 0.0
    """Behind prefill work that is there already."""
    move_s: float = 0.0
    """Restoring blocks from tiers and fetching them from a peer."""
    compute_s: float = 0.0
    itl_s: float = 0.0
    """Between tokens in the batch it would join there."""
    local_cost: float | None = None
    """Of all on this decode worker; None where that was not allowed."""


class PrefixOffer(NamedTuple):
    """A worker that caches more of the prompt than the one that computes it."""

    source: WorkerId
    num_blocks: int
    """Leading blocks of the prompt that it caches."""
    num_own_blocks: int
    """Those that the computing worker caches itself."""


class Prediction(NamedTuple):
    """What a placement would give its client if the request were placed now. Seconds."""

    ttft_s: float
    """From now to the first token: work queued before it, transfer of a fetched prefix, prefill."""
    itl_s: float
    """Between tokens in the decode batch it would join."""
    queued_s: float = 0.0
    """The part of `ttft_s` spent behind prefill work that others have queued on the worker."""
    needs_room: bool = False
    """The decode worker has no KV room for the request before some of its sequences end."""


@dataclass(frozen=True, slots=True)
class Placement:
    """`prefill` and `decode` name workers; the kind says which of them are set."""

    kind: PlacementKind
    prefill: WorkerId | None
    decode: WorkerId | None
    score: float
    """Seconds of cost."""
    reason: str
    terms: Sequence[ScoreTerms]
    """Of the workers chosen and of the best others."""
    offer: PrefixOffer | None = None
    predicted: Prediction | None = None
    """None by policies that do not predict."""
    num_candidates: int = 0
    """Workers that could have been chosen."""
    handoff_s: float = 0.0
    """What moving the KV to the decode worker adds to the score."""

    @property
    def computes_prompt(self) -> WorkerId:
        worker_id = self.prefill or self.decode
        assert worker_id is not None
        return worker_id

    @property
    def workers(self) -> tuple[WorkerId, ...]:
        return tuple(w for w in (self.prefill, self.decode) if w is not None)

    def settle(self) -> None:
        """Of a placement that is kept: terms that are rendered when asked for are rendered now,
        since what they are rendered from is many times as large."""
        len(self.terms)

    def terms_of(self, worker_id: WorkerId) -> ScoreTerms:
        return next(t for t in self.terms if t.worker_id == worker_id)
