"""The time line of one request as its client gets it, in milliseconds.

Plain values; `timing_report` fills them in. None where something is not known: a request that ended
at a stop string, for example, ended in the router, before its worker told how long it decoded.
"""

from __future__ import annotations

from dataclasses import dataclass

from baton.core.worker_info import WorkerId


@dataclass(frozen=True, slots=True)
class PrefillTiming:
    """As the worker that computed the prompt measured it."""

    worker: WorkerId
    queue_ms: float | None
    compute_ms: float | None
    num_chunks: int | None
    """Engine steps. None where the same worker generated: those were steps too."""
    engine_ms: float | None
    """The request's part of their time."""
    cached_tokens: int


@dataclass(frozen=True, slots=True)
class TransferTiming:
    """As the reader measured it."""

    ms: float
    exposed_ms: float
    """After the prompt had been computed."""
    num_bytes: int
    num_reads: int


@dataclass(frozen=True, slots=True)
class DecodeTiming:
    """As the worker that generated last measured it."""

    worker: WorkerId
    decode_ms: float | None
    num_steps: int | None
    engine_ms: float | None


@dataclass(frozen=True, slots=True)
class RequestTiming:
    placed_ms: float | None
    """Arrival until it was sent to workers."""
    ttft_ms: float | None
    total_ms: float | None
    """Arrival to the last token."""
    mean_itl_ms: float | None
    prefill: PrefillTiming | None
    transfer: TransferTiming | None
    """None where nothing was read."""
    decode: DecodeTiming | None
    num_failures: int
    """Placements that were given up."""
    num_moves: int
    """To other workers while it generated."""
