"""Settings of stored responses."""

from __future__ import annotations

from dataclasses import dataclass

from baton.settings import check_positive


@dataclass(frozen=True, slots=True)
class ResponsesConfig:
    """What one router copy keeps of answers of POST /v1/responses, for GET and for conversations
    that go on. Whatever bound is met first lets the oldest go."""

    max_stored: int = 10_000
    """Responses kept at once."""
    max_stored_bytes: int = 64 << 20
    """All of them together, each with the conversation that it ended."""
    keep_s: float = 3600.0
    """How long one is kept."""
    max_background: int = 64
    """Responses that run in the background at once; more are refused."""

    def __post_init__(self) -> None:
        check_positive(
            "edge.responses", self, "max_stored", "max_stored_bytes", "keep_s", "max_background"
        )
