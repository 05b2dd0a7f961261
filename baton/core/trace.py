"""Where a request stands in a distributed trace: the W3C header `traceparent`, read and written.

Source: W3C Recommendation "Trace Context", sections 3.2 and 3.3. Does not know: spans, exporters.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_HEADER = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
_INVALID_VERSION = "ff"
MAX_STATE_CHARS = 512
MAX_STATE_MEMBERS = 32
_STATE_MEMBER = re.compile(
    r"([a-z][a-z0-9_*/-]{0,255}|[a-z0-9][a-z0-9_*/-]{0,240}@[a-z][a-z0-9_*/-]{0,13})"
    r"=[\x20-\x2b\x2d-\x3c\x3e-\x7e]{0,255}[\x21-\x2b\x2d-\x3c\x3e-\x7e]"
)
_SAMPLED = 1


@dataclass(frozen=True, slots=True)
class TraceContext:
    """The caller's span."""

    trace_id: int
    """128 bits, never 0."""
    span_id: int
    """64 bits, never 0."""
    is_sampled: bool
    state: str = ""
    """`tracestate`, handed on as it is; empty if it is not as it must be."""

    @property
    def traceparent(self) -> str:
        return f"00-{self.trace_id:032x}-{self.span_id:016x}-{int(self.is_sampled):02x}"


def parse_traceparent(header: str, state: str = "") -> TraceContext | None:
    """None for a missing or malformed header, which starts a trace of its own.

    Headers of later versions may be longer; what is known of them is read.
    """
    match = _HEADER.fullmatch(header.strip())
    if match is None or match[1] == _INVALID_VERSION or (match[1] == "00" and match[5]):
        return None
    trace_id, span_id = int(match[2], 16), int(match[3], 16)
    if not trace_id or not span_id:
        return None
    is_sampled = bool(int(match[4], 16) & _SAMPLED)
    return TraceContext(trace_id, span_id, is_sampled, state if _is_valid_state(state) else "")


def _is_valid_state(state: str) -> bool:
    if len(state) > MAX_STATE_CHARS:
        return False
    members = [text for text in (part.strip(" \t") for part in state.split(",")) if text]
    keys = {text.partition("=")[0] for text in members}
    is_unambiguous = len(keys) == len(members) <= MAX_STATE_MEMBERS
    return is_unambiguous and all(_STATE_MEMBER.fullmatch(text) for text in members)
