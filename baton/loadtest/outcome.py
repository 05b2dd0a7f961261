"""What one request got, as its client saw it. Times are seconds since the start of the run.

planned ──lag──► sent ──connect──► ... first token ── gap ── token ── gap ── last token ── ended
                  └────────── TTFT ──────────┘└──────── mean gap = ITL ──────────┘
                  └─────────────────────────── E2E ─────────────────────────────────────┘
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum

MAX_MESSAGE_CHARS = 300


class ErrorKind(Enum):
    """Why a request was not answered."""

    CONNECT = "connect"
    """No connection, or it broke before the answer."""
    TIMEOUT = "timeout"
    REFUSED = "refused"
    """The server said no; the code says why."""
    STREAM = "stream_error"
    """An error inside of a stream."""
    CUT_OFF = "cut_off"
    """The stream ended before its end."""
    MALFORMED = "malformed"
    """Not an answer of this API."""
    NOT_SENT = "not_sent"
    """The generator's own limit on requests at a time."""


@dataclass(frozen=True, slots=True)
class RequestError:
    kind: ErrorKind
    code: str = ""
    """HTTP status or gRPC code of a refusal."""
    message: str = ""

    @property
    def label(self) -> str:
        """`refused 429`, `timeout`."""
        return f"{self.kind.value} {self.code}".rstrip()


@dataclass(slots=True)
class Outcome:
    """Filled while the answer comes. `now` gives seconds since the start of the run."""

    number: int
    now: Callable[[], float]
    planned_s: float | None = None
    """When it was due; None in a closed loop."""
    turn: int = 0
    """Of its conversation."""
    num_asked_tokens: int = 0
    sent_s: float = 0.0
    connected_s: float | None = None
    """When a connection made for it stood; None on one that was there."""
    token_times_s: array[float] = field(default_factory=lambda: array("d"))
    """Of each piece of text; several that came in one read have the same."""
    ended_s: float | None = None
    num_prompt_tokens: int | None = None
    num_cached_tokens: int | None = None
    num_output_tokens: int | None = None
    """As the server counts them."""
    text: str = ""
    """Of the answer; kept only where the next turn repeats it."""
    is_text_kept: bool = False
    finish_reason: str = ""
    error: RequestError | None = None

    @property
    def is_ok(self) -> bool:
        return self.ended_s is not None and self.error is None

    @property
    def is_over(self) -> bool:
        return self.ended_s is not None or self.error is not None

    @property
    def lag_s(self) -> float | None:
        return None if self.planned_s is None else self.sent_s - self.planned_s

    @property
    def ttft_s(self) -> float | None:
        return self.token_times_s[0] - self.sent_s if self.token_times_s else None

    @property
    def num_tokens(self) -> int:
        """Output, as the server counts it, or else the pieces that came."""
        if self.num_output_tokens is not None:
            return self.num_output_tokens
        return len(self.token_times_s)

    @property
    def itl_s(self) -> float | None:
        """Mean seconds between its tokens, which others call TPOT; None of a single token."""
        if len(self.token_times_s) < 2 or self.num_tokens < 2:
            return None
        return (self.token_times_s[-1] - self.token_times_s[0]) / (self.num_tokens - 1)

    @property
    def e2e_s(self) -> float | None:
        return None if self.ended_s is None else self.ended_s - self.sent_s

    def end(self, at_s: float) -> None:
        if self.error is None:
            self.ended_s = at_s

    def fail(self, kind: ErrorKind, message: str, code: str = "") -> None:
        """The first reason stays."""
        if self.error is None:
            self.error = RequestError(kind, code, message[:MAX_MESSAGE_CHARS])
            self.ended_s = self.now()

    def note_text(self, at_s: float, text: str) -> None:
        self.token_times_s.append(at_s)
        if self.is_text_kept:
            self.text += text
