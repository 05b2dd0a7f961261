"""Everything measured of one model with one kind of weights."""

from __future__ import annotations

from dataclasses import dataclass, field

from bench.gpu.engine_points import DecodePoint, PrefillPoint
from bench.gpu.step_profile import StepProfile


@dataclass(slots=True)
class ModelResult:
    """Filled in point by point."""

    model: str
    weights: str
    start_s: float
    weight_bytes: float
    """Of the linear layers, read once a decode step."""
    decode: list[DecodePoint] = field(default_factory=list)
    prefill: list[PrefillPoint] = field(default_factory=list)
    profile: StepProfile | None = None
    skipped: list[str] = field(default_factory=list)
