"""Targets that no number of workers keeps: what one request alone takes on an idle worker. Pure.

Does not know: load, how many workers there are.
"""

from __future__ import annotations

from services.planner.autoscale_config import AutoscaleConfig
from services.planner.decision_record import Models
from services.planner.demand import Load, decode_batch, prefill_s

_ALONE = Load(0.0, 1.0, 1.0, 1.0, 1.0)
"""One token of prompt, one sequence: nothing is shorter."""


def out_of_reach(config: AutoscaleConfig, models: Models) -> list[str]:
    """One sentence a target that cannot be kept, with the least that can; by what is known of the
    workers, which measurements may still correct."""
    told = []
    # A batch is never below one sequence.
    step_s = decode_batch(models.decode, _ALONE, itl_s=0.0).step_s
    prompt_s = prefill_s(models.prefill, _ALONE)
    for name, what, wanted_s, least_s in (
        ("ttft_s", "the shortest prompt", config.ttft_s, prompt_s),
        ("itl_s", "a decode step of one sequence", config.itl_s, step_s),
    ):
        if wanted_s < least_s:
            told.append(
                f"autoscale.{name} is {wanted_s:g}, and {what} takes {least_s:.3g} s on an idle "
                f"worker: no number of workers keeps it. Ask for more than {least_s:.3g}, or take "
                "faster workers"
            )
    return told
