"""Results of cases: what they say to people, and the JSON form for comparisons later."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import Enum
from typing import Any

from bench.gpu.cases import OURS, OURS_PDL, Bound, Case
from bench.gpu.ceilings import Ceilings
from bench.gpu.timing import Timing


class Status(Enum):
    TIMED = "timed"
    WRONG = "wrong"
    """Our result is off by more than the case allows, so it was not timed."""
    FAILED = "failed"
    """Ours raised."""
    CHECKED = "checked"
    """Ours is right; nothing was to be timed."""


@dataclass(frozen=True, slots=True)
class CaseResult:
    """One case with the times of all its contenders; holds none of its inputs."""

    group: str
    name: str
    status: Status
    num_bytes: float = 0.0
    flops: float = 0.0
    bound: Bound = Bound.COPY
    limit_s: float = 0.0
    """At the ceiling the case is held against."""
    error: float = math.nan
    timings: Mapping[str, Timing] = field(default_factory=dict)
    notes: Mapping[str, str] = field(default_factory=dict)
    """Contender -> why it has no time."""

    @classmethod
    def of(
        cls,
        case: Case,
        ceilings: Ceilings,
        status: Status,
        error: float,
        timings: Mapping[str, Timing],
        notes: Mapping[str, str],
    ) -> CaseResult:
        return cls(
            case.group,
            case.name,
            status,
            case.num_bytes,
            case.flops,
            case.bound,
            case.limit_s(ceilings),
            error,
            timings,
            notes,
        )

    @property
    def engine_s(self) -> float:
        """Ours as the engine launches it."""
        return self.timings.get(OURS_PDL, self.timings[OURS]).median_s

    def share_of_limit(self, contender: str = OURS) -> float:
        return self.limit_s / self.timings[contender].median_s

    def as_json(self) -> dict[str, Any]:
        is_timed = OURS in self.timings
        return {
            "group": self.group,
            "name": self.name,
            "status": self.status.value,
            "bytes": self.num_bytes,
            "flops": self.flops,
            "bound": self.bound.value,
            "error": round(self.error, 6) if math.isfinite(self.error) else None,
            "share_of_limit": round(self.share_of_limit(), 4) if is_timed else None,
            "contenders": {
                name: {
                    "us": round(timing.median_s * 1e6, 3),
                    "gb_per_s": round(self.num_bytes / timing.median_s / 1e9, 1),
                    "tflop_per_s": round(self.flops / timing.median_s / 1e12, 3),
                    "spread": round(timing.spread, 3),
                    "is_captured": timing.is_captured,
                }
                for name, timing in self.timings.items()
            },
            "notes": dict(self.notes),
        }

    def row(self) -> str:
        """`name | ours | share of the limit | each peer and how ours compares`."""
        cells = [f"{self.name:<46}"]
        if self.status is not Status.TIMED:
            cells.append(f"{self.status.value.upper()} (error {self.error:.2g})")
            return "  ".join([*cells, *_noted(self.notes)])
        ours = self.timings[OURS]
        cells += [
            f"{ours.median_s * 1e6:9.1f} us",
            self._rate(ours),
            f"{self.share_of_limit():6.1%} of {self.bound.value}",
        ]
        cells += [
            f"{name} {self._rate(timing).strip()} (x{timing.median_s / ours.median_s:.2f})"
            for name, timing in self.timings.items()
            if name != OURS
        ]
        loose = [name for name, timing in self.timings.items() if not timing.is_captured]
        if loose:
            cells.append(f"plain launches: {', '.join(loose)}")
        return "  ".join([*cells, *_noted(self.notes)])

    def _rate(self, timing: Timing) -> str:
        if self.bound.is_compute:
            return f"{self.flops / timing.median_s / 1e12:7.1f} TFLOP/s"
        return f"{self.num_bytes / timing.median_s / 1e9:7.0f} GB/s"


def _noted(notes: Mapping[str, str]) -> list[str]:
    return [f"[{name}: {message}]" for name, message in notes.items()]


def ceilings_line(ceilings: Ceilings) -> str:
    return (
        f"copy {ceilings.copy_bytes_per_s / 1e9:.0f} GB/s, read "
        f"{ceilings.read_bytes_per_s / 1e9:.0f} GB/s, matmul bf16 "
        f"{ceilings.bf16_flops_per_s / 1e12:.0f} TFLOP/s, fp8 "
        f"{ceilings.fp8_flops_per_s / 1e12:.0f} TFLOP/s"
    )


def results_json(
    machine: dict[str, Any],
    ceilings: Ceilings,
    results: Sequence[CaseResult],
    *,
    not_run: Sequence[str] = (),
) -> dict[str, Any]:
    return {
        "machine": machine,
        "ceilings": asdict(ceilings),
        "cases": [result.as_json() for result in results],
        "not_run": list(not_run),
    }
