"""A whole run: what was asked for, what came of it. What reports are made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from baton.loadtest.figures import Figures
from baton.loadtest.generator_watch import GeneratorFigures
from baton.loadtest.options import Targets
from baton.loadtest.outcome import Outcome
from baton.loadtest.timeline import Timeline


@dataclass(frozen=True, slots=True)
class LoadResult:
    started_at: str
    """ISO 8601, UTC."""
    place: str
    model: str
    setup: Mapping[str, object]
    """The options of the run, as they were given or chosen."""
    targets: Targets
    figures: Figures
    timeline: Timeline
    generator: GeneratorFigures
    outcomes: Sequence[Outcome]
    is_stopped: bool
    """Ended before its time, by whoever started it."""

    @property
    def is_kept(self) -> bool:
        """The wanted share of requests was answered within the targets."""
        return self.figures.num_sent > 0 and self.figures.attainment.all >= self.targets.share
