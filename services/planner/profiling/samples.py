"""What was measured of an engine: sums over some steps, and their seconds.

Does not know: engines, how coefficients are found.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import Enum


class StepKind(Enum):
    PREFILL = "prefill"
    DECODE = "decode"
    MIXED = "mixed"


@dataclass(frozen=True, slots=True)
class StepSample:
    """Some successive steps. Sums over all of them, as `Hardware.step_s` counts."""

    name: str
    """Equal names are repetitions of one measurement."""
    kind: StepKind
    num_steps: int
    prefill_tokens: float
    prefill_pairs: float
    decode_sequences: float
    decode_kv_tokens: float
    seconds: float

    @property
    def terms(self) -> tuple[float, float, float, float, float]:
        """What the coefficients of `Hardware` are multiplied by, in their order there."""
        return (
            float(self.num_steps),
            self.prefill_tokens,
            self.prefill_pairs,
            self.decode_sequences,
            self.decode_kv_tokens,
        )


def medians(samples: Iterable[StepSample]) -> list[StepSample]:
    """One a name, of the median seconds a step."""
    by_name: dict[str, list[StepSample]] = {}
    for sample in samples:
        by_name.setdefault(sample.name, []).append(sample)
    return [_median(repetitions) for repetitions in by_name.values()]


def _median(repetitions: list[StepSample]) -> StepSample:
    """Terms are those of the mean repetition: a batch may have held a little more KV each time."""
    num = len(repetitions)
    sums = [sum(column) / num for column in zip(*(s.terms for s in repetitions), strict=True)]
    step_s = statistics.median(s.seconds / s.num_steps for s in repetitions)
    return replace(
        repetitions[0],
        num_steps=round(sums[0]),
        prefill_tokens=sums[1],
        prefill_pairs=sums[2],
        decode_sequences=sums[3],
        decode_kv_tokens=sums[4],
        seconds=step_s * round(sums[0]),
    )
