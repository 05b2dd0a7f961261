"""Service-level objectives of one request: which hold, and whether they were met.

Does not know: queues, predictions, HTTP.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from baton.core.errors import InvalidRequest
from services.router.admission.slo_config import SloConfig

MAX_SHOWN_CHARS = 40


class SloTargets(NamedTuple):
    """Seconds; None promises nothing."""

    ttft_s: float | None = None
    """From arrival to the first token."""
    itl_s: float | None = None
    """Mean time between tokens."""


NO_TARGETS = SloTargets()


class SloResult(NamedTuple):
    """None where there was no target, or nothing to measure."""

    is_ttft_met: bool | None
    is_itl_met: bool | None

    @property
    def is_met(self) -> bool | None:
        """All targets that the request had; None when it had none."""
        parts = [part for part in self if part is not None]
        return all(parts) if parts else None


def class_named(config: SloConfig, name: str, *, param: str) -> str:
    """The class a client asks for; the default one for an empty name. Raises InvalidRequest."""
    if not name:
        return config.default_class
    if name not in config.classes:
        raise InvalidRequest(
            f"there is no SLO class {name[:MAX_SHOWN_CHARS]!r}; "
            f"classes here: {', '.join(sorted(config.classes))}",
            param=param,
        )
    return name


def class_targets(config: SloConfig, name: str) -> SloTargets:
    """Targets of class `name`; those of the default class when it is empty or gone."""
    slo_class = config.classes.get(name) or config.classes[config.default_class]
    return SloTargets(slo_class.ttft_s, slo_class.itl_s)


def target_from_ms(text: str, *, param: str) -> float | None:
    """A target in seconds from a client's number of milliseconds; None when it is empty.

    Raises InvalidRequest.
    """
    if not text:
        return None
    try:
        milliseconds = float(text)
    except ValueError:
        milliseconds = math.nan
    if not 0 < milliseconds <= 1e9:
        raise InvalidRequest(
            f"{param} must be a number of milliseconds above 0, got {text[:MAX_SHOWN_CHARS]!r}",
            param=param,
        )
    return milliseconds / 1000


def result(targets: SloTargets, *, ttft_s: float | None, mean_itl_s: float | None) -> SloResult:
    """What came of the targets. A request that never had a first token has missed both."""
    if ttft_s is None:
        return SloResult(
            None if targets.ttft_s is None else False, None if targets.itl_s is None else False
        )
    return SloResult(
        None if targets.ttft_s is None else ttft_s <= targets.ttft_s,
        None if targets.itl_s is None or mean_itl_s is None else mean_itl_s <= targets.itl_s,
    )
