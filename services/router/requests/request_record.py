"""Everything that is known of one request while it lives; histograms, log line, spans and the
client's time line are all made of it.

Pure. Does not know: metrics, logs.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from baton.core.lifecycle import LifecycleEvent as Event
from baton.core.lifecycle import Timeline
from baton.core.request import FinishReason, RequestId, TokenDelta
from baton.core.trace import TraceContext
from baton.core.worker_info import Role, WorkerId
from services.router.migration.handover import Handover
from services.router.placement.placement import Placement


@dataclass(frozen=True, slots=True)
class WorkerPart:
    """What one worker measured of the request, from its last delta."""

    worker_id: WorkerId
    role: Role
    computes_prompt: bool
    timeline: Timeline
    """Points of the worker that computed the prompt may be here too: a reader takes them over."""
    arrived_at_s: float
    """Wall clock of the router."""


@dataclass(slots=True)
class RequestRecord:
    """Filled in while the request lives."""

    request_id: RequestId
    model: str
    num_prompt_tokens: int
    tenant: str = ""
    trace: TraceContext | None = None
    """The client's."""
    timeline: Timeline = field(default_factory=Timeline)
    placements: list[Placement] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    """Of given-up placements, in order."""
    migrations: list[Handover] = field(default_factory=list)
    """Moves to other workers, failed ones too, in order."""
    parts: list[WorkerPart] = field(default_factory=list)
    """Of all placements, in order of arrival."""
    num_output_tokens: int = 0
    num_counted_tokens: int = 0
    """Those of them that a counter has already."""
    num_cached_tokens: int | None = None
    """On the worker that computed the prompt; None until it has spoken."""
    finish_reason: FinishReason | None = None
    error: BaseException | None = None
    last_token_at_s: float = 0.0
    is_turned_away: bool = False
    """Sent away before any work; the edge counts and logs that."""

    def merge(self, worker_id: WorkerId | None, delta: TokenDelta) -> None:
        """Take over what a worker measured, from its last delta.

        Of a request that has moved, decoding begins on its first worker and ends on its last one;
        what each move has transferred is kept with the move.
        """
        assert delta.timeline is not None
        points, transfer = dict(delta.timeline.points), delta.timeline.transfer
        if delta.finish_reason is None and any(m.source == worker_id for m in self.migrations):
            points.pop(Event.DECODE_ENDED, None)
        moves = [m for m in self.migrations if m.target == worker_id and m.has_moved]
        if moves:
            moves[-1].transfer = transfer
            points = {e: at_s for e, at_s in points.items() if e is Event.DECODE_ENDED}
            self.timeline.merge(Timeline(points))
        else:
            self.timeline.merge(Timeline(points, transfer))

    def engine_seconds(self) -> dict[Role, float]:
        """Engine time that workers have told of, by pool; only pools that have spent any."""
        seconds: dict[Role, float] = {}
        for part in self.parts:
            if part.timeline.engine.num_steps:
                used_s = part.timeline.engine.seconds
                seconds[part.role] = seconds.get(part.role, 0.0) + used_s
        return seconds

    @property
    def mean_itl_s(self) -> float | None:
        """Between its tokens; None for fewer than two."""
        first_at_s = self.timeline.points.get(Event.FIRST_TOKEN)
        if first_at_s is None or self.num_output_tokens < 2:
            return None
        return max(0.0, self.last_token_at_s - first_at_s) / (self.num_output_tokens - 1)
