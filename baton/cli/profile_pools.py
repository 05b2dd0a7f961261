"""The engines of both pools, one after the other, each as its worker builds and drives it.

Does not know: sockets, other processes of a system.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from baton.cli.profile_engine import EngineProbe
from baton.core.clock import WallClock
from baton.core.worker_info import Role
from baton.engine.config import Device, EngineConfig
from baton.engine.factory import BuiltEngine, build_engine
from baton.engine.model_config import load_model_config
from baton.engine.tokenizer import Tokenizer
from baton.model_import.progress import ImportProgress, Unit
from services.launch.config import SystemConfig
from services.launch.pools import engine_config
from services.planner.profiling.fit import StepFit, fit_steps
from services.planner.profiling.points import EngineLimits, Point, PrefillPoint, choose_points
from services.planner.profiling.samples import StepSample, medians

WARM_UP_TOKENS = 128
TOKENS_SHARE = 1 / 40
"""Of the time, what the largest measurement's prompts may take."""
MIN_TOKENS, MAX_TOKENS = 512, 65_536
MIN_ROUNDS = 2


@dataclass(frozen=True, slots=True)
class PoolMeasured:
    """What one pool's engine is and how fast."""

    fit: StepFit
    limits: EngineLimits
    tp_size: int
    block_size: int
    kv_bytes_per_token: int
    vocab_size: int
    num_rounds: int
    is_on_gpu: bool


def measure_pools(
    system: SystemConfig, seconds: float, *, seed: int, progress: ImportProgress
) -> dict[str, PoolMeasured]:
    """By pool. Where both have equal settings, one measurement is both. Raises ConfigError."""
    measured: dict[str, PoolMeasured] = {}
    known: dict[EngineConfig, PoolMeasured] = {}
    for role in (Role.PREFILL, Role.DECODE):
        config = engine_config(system, role)
        if config not in known:
            progress.start_stage(f"{role.value} engine", None, Unit.RUNS)
            known[config] = _measure(config, role, seconds, seed=seed, progress=progress)
        measured[role.value] = known[config]
    return measured


def _measure(
    config: EngineConfig, role: Role, seconds: float, *, seed: int, progress: ImportProgress
) -> PoolMeasured:
    built = build_engine(config, clock=WallClock())
    try:
        return _measure_built(built, config, role, seconds, seed=seed, progress=progress)
    finally:
        if built.ranks is not None:
            built.ranks.close()
        del built
        _return_memory(config)


def _measure_built(
    built: BuiltEngine,
    config: EngineConfig,
    role: Role,
    seconds: float,
    *,
    seed: int,
    progress: ImportProgress,
) -> PoolMeasured:
    vocab_size = usable_vocabulary(config.model_path)
    limits = EngineLimits(
        built.max_model_len,
        built.num_blocks * config.block_size,
        config.max_num_seqs,
        config.max_num_batched_tokens,
    )
    probe = EngineProbe(
        built.engine,
        vocab_size=vocab_size,
        block_size=config.block_size,
        max_num_seqs=config.max_num_seqs,
        seed=seed,
    )
    points = choose_points(limits, max_tokens=_max_tokens(probe, limits, seconds))
    samples, num_rounds = _rounds(probe, points, seconds, role, progress)
    return PoolMeasured(
        fit_steps(medians(samples)),
        limits,
        config.tp_size,
        config.block_size,
        built.layout.token_bytes,
        vocab_size,
        num_rounds,
        config.device is Device.CUDA,
    )


def usable_vocabulary(model_path: Path) -> int:
    """Token ids that both the model and its tokenizer know: heads are often padded."""
    tokenizer = Tokenizer.from_folder(model_path)
    return min(load_model_config(model_path).vocab_size, tokenizer.vocab_size)


def _max_tokens(probe: EngineProbe, limits: EngineLimits, seconds: float) -> int:
    """That the largest measurement can compute in its share of the time."""
    point = PrefillPoint(0, min(WARM_UP_TOKENS, limits.max_model_len // 2))
    probe.prefill(point)
    token_s = min(probe.prefill(point).seconds for _ in range(3)) / point.num_new_tokens
    return int(max(MIN_TOKENS, min(MAX_TOKENS, seconds * TOKENS_SHARE / token_s)))


def _rounds(
    probe: EngineProbe,
    points: Sequence[Point],
    seconds: float,
    role: Role,
    progress: ImportProgress,
) -> tuple[list[StepSample], int]:
    """As many as the time allows, after one that warms up and says how long a round takes."""
    end_s = time.monotonic() + seconds
    started_s = time.monotonic()
    probe.round(points)
    round_s = time.monotonic() - started_s
    num_rounds = max(MIN_ROUNDS, int((end_s - time.monotonic()) / max(round_s, 1e-6)))
    progress.start_stage(f"{role.value} engine's steps", num_rounds * len(points), Unit.RUNS)
    samples: list[StepSample] = []
    num_done = 0

    def on_point(_: Point) -> None:
        nonlocal num_done
        num_done += 1
        progress.update(num_done)

    for _ in range(num_rounds):
        samples += probe.round(points, on_point=on_point)
    return samples, num_rounds


def _return_memory(config: EngineConfig) -> None:
    """Of the engine that has ended, to the device: the next one takes what is free."""
    gc.collect()
    if config.device is Device.CUDA:
        import torch

        torch.cuda.empty_cache()
