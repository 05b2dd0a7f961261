"""Settings: the classes of service a request can ask for."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from baton.core.errors import ConfigError

MAX_CLASSES = 32
"""Class names are label values of metrics."""
MAX_PRIORITY = 100
"""Priorities lie between minus this and this."""
_NAME = re.compile(r"[a-z0-9][a-z0-9_.-]{0,31}")


@dataclass(frozen=True, slots=True)
class SloClass:
    """What requests of one class are promised. A class without targets is served as well as
    fairness allows, and waits as long as its deadline does."""

    ttft_s: float | None = None
    """From arrival to the first token."""
    itl_s: float | None = None
    """Between tokens, the mean of one request."""
    priority: int = 0
    """Among requests of one tenant, where the request names none; smaller goes first."""

    def __post_init__(self) -> None:
        for name, value in (("ttft_s", self.ttft_s), ("itl_s", self.itl_s)):
            if value is not None and not 0 < value < 1e6:
                raise ConfigError(
                    f"slo.classes: {name} must be seconds above 0, got {value}; leave it out for "
                    "no target"
                )
        if not -MAX_PRIORITY <= self.priority <= MAX_PRIORITY:
            raise ConfigError(
                f"slo.classes: priority must be between -{MAX_PRIORITY} and {MAX_PRIORITY}, "
                f"got {self.priority}"
            )


def _default_classes() -> Mapping[str, SloClass]:
    return {
        "interactive": SloClass(ttft_s=2.0, itl_s=0.1),
        "standard": SloClass(),
        "batch": SloClass(priority=10),
    }


@dataclass(frozen=True, slots=True)
class SloConfig:
    """Classes of service."""

    classes: Mapping[str, SloClass] = field(default_factory=_default_classes)
    """By name; setting any replaces the default ones (interactive: 2 s, 100 ms; standard and batch:
    no targets)."""
    default_class: str = "standard"
    """Of requests that name none. Without targets, so that a machine of any speed serves everybody
    who has not asked for more."""
    allow_request_targets: bool = True
    """Clients may set targets of their own by X-SLO-TTFT-Ms and X-SLO-ITL-Ms."""

    def __post_init__(self) -> None:
        if not 1 <= len(self.classes) <= MAX_CLASSES:
            raise ConfigError(
                f"slo.classes must hold 1 to {MAX_CLASSES} classes, got {len(self.classes)}"
            )
        for name in self.classes:
            if not _NAME.fullmatch(name):
                raise ConfigError(
                    f"slo.classes: {name[:40]!r} is no name of a class; use up to 32 of a-z, 0-9, "
                    "'.', '_' and '-'"
                )
        if self.default_class not in self.classes:
            raise ConfigError(
                f"slo.default_class is {self.default_class!r}, which is not one of "
                f"{', '.join(sorted(self.classes))}"
            )
