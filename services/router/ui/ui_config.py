"""Settings of the page at /ui."""

from __future__ import annotations

from dataclasses import dataclass

from baton.core.errors import ConfigError

MAX_REQUESTS = 10_000
MAX_HISTORY_S = 86_400


@dataclass(frozen=True, slots=True)
class UiConfig:
    """A page for people. It asks for an API key where keys are required."""

    enabled: bool = True
    max_requests: int = 300
    """Ended requests whose time lines are kept, in the memory of this router copy."""
    history_s: int = 600
    """How far back its charts go."""

    def __post_init__(self) -> None:
        for name, limit in (("max_requests", MAX_REQUESTS), ("history_s", MAX_HISTORY_S)):
            value = getattr(self, name)
            if not 1 <= value <= limit:
                raise ConfigError(f"ui.{name} must be from 1 to {limit}, got {value}")
