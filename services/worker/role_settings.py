"""What a change of role does to the engine's settings. Pure.

The limits of a step change with the role. Everything else was decided when the process started:
where the other pool's settings differ in it, this process cannot serve there.
"""

from __future__ import annotations

import dataclasses
from enum import Enum

from baton.core.errors import RoleChangeRefused
from baton.core.worker_info import Role
from baton.engine.config import Device, EngineConfig
from baton.engine.scheduler import SchedulerLimits

LIMITS = ("max_num_seqs", "max_num_batched_tokens", "max_num_waiting")
KEPT = (
    "num_threads", "rank_timeout_s", "gpu_memory_fraction", "max_graph_batch_size",
    "layer_notice_groups", "layer_notice_min_tokens",
)  # fmt: skip
"""How the process computes, not what: stays as it was started."""


def limits_of(engine: EngineConfig) -> SchedulerLimits:
    return SchedulerLimits(
        engine.max_num_seqs, engine.max_num_batched_tokens, engine.max_num_waiting
    )


def limits_in(target: Role, engine: EngineConfig, other: EngineConfig | None) -> SchedulerLimits:
    """Step limits of a process that was started with `engine` and serves in the other pool, whose
    settings are `other`. Raises RoleChangeRefused naming the setting that stands in the way."""
    pool = target.value
    if other is None:
        raise RoleChangeRefused(
            f"this worker does not know the engine settings of the {pool} pool; give them as "
            "other_engine"
        )
    for field in dataclasses.fields(EngineConfig):
        if field.name in LIMITS or field.name in KEPT:
            continue
        ours, theirs = getattr(engine, field.name), getattr(other, field.name)
        if ours != theirs:
            raise RoleChangeRefused(
                f"engine.{field.name} is {_text(ours)} here and {_text(theirs)} in the {pool} "
                f"pool, and is fixed when a process starts; start a {pool} worker instead, or "
                "make the two equal"
            )
    if engine.device is Device.CUDA:
        for name in ("max_num_seqs", "max_num_batched_tokens"):
            ours, theirs = getattr(engine, name), getattr(other, name)
            if theirs > ours:
                raise RoleChangeRefused(
                    f"engine.{name} is {theirs} in the {pool} pool and this worker's GPU buffers "
                    f"were made for {ours}; give both pools the larger one"
                )
    return limits_of(other)


def _text(value: object) -> str:
    return str(value.value if isinstance(value, Enum) else value)
