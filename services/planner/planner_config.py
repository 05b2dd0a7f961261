"""Settings of a planner process: what it keeps, what it asks, what it tells.

Layers, lowest first: field defaults, a YAML file, the environment (`BATON_<SECTION>__<FIELD>`),
explicit overrides.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from baton.core.errors import ConfigError
from baton.model_info.folder import read_shape
from baton.model_info.machines import find_machine
from baton.model_info.report import cost_model
from baton.model_info.shapes import find_shape
from baton.settings import LogConfig, check_positive, load
from services.planner.autoscale_config import AutoscaleConfig
from services.planner.decision_log import DecisionLogConfig
from services.planner.decision_record import Models
from services.planner.http_stats import StatsConfig
from services.planner.pool_model import PoolModel, predict
from services.planner.profile_file import read_profile

MAX_INTERVAL_S = 3600.0


@dataclass(frozen=True, slots=True)
class ModelsConfig:
    """How long a worker's steps take: measured figures, or a prediction from data sheets."""

    profile: Path | None = None
    """A file of `baton profile`."""
    model: str | None = None
    """A known shape of `baton model info`, or a model folder; instead of a profile, with
    `machine`."""
    machine: str | None = None
    """One device: a name of `baton model info`."""
    prefill_tensor_parallel: int = 1
    """Devices of a prefill worker."""
    decode_tensor_parallel: int = 1
    start_s: float | None = None
    """From the decision to a worker that takes requests. None: as the profile says, else 60 s."""

    def __post_init__(self) -> None:
        check_positive("models", self, "prefill_tensor_parallel", "decode_tensor_parallel")
        if (self.profile is None) == (self.model is None and self.machine is None):
            raise ConfigError(
                "models needs either profile, or model and machine: figures that were measured, or "
                "what they are predicted from"
            )
        if self.profile is None and not (self.model and self.machine):
            raise ConfigError("models.model and models.machine belong together: set both")
        if self.start_s is not None and not self.start_s >= 0:
            raise ConfigError(f"models.start_s must not be negative, got {self.start_s:g}")


@dataclass(frozen=True, slots=True)
class PlannerConfig:
    """One planner process. It decides and tells; who acts on it is another matter."""

    autoscale: AutoscaleConfig
    """What is kept, and how boldly."""
    models: ModelsConfig
    stats: StatsConfig = field(default_factory=StatsConfig)
    decisions: DecisionLogConfig = field(default_factory=DecisionLogConfig)
    interval_s: float = 10.0
    """Between two decisions."""
    host: str = "127.0.0.1"
    """Of the port with /metrics, /decision and /health."""
    port: int = 9200
    """0 takes any free port."""
    log: LogConfig = field(default_factory=LogConfig)

    def __post_init__(self) -> None:
        if not 0.1 <= self.interval_s <= MAX_INTERVAL_S:
            raise ConfigError(
                f"interval_s must be from 0.1 to {MAX_INTERVAL_S:g}, got {self.interval_s:g}"
            )
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"port must be between 0 and 65535, got {self.port}")


def load_planner_config(
    *,
    file: Path | None = None,
    environ: Mapping[str, str] | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> PlannerConfig:
    """Build the settings from their layers. Raises ConfigError naming the wrong key."""
    return load(PlannerConfig, file=file, environ=environ, overrides=overrides)


def load_models(config: ModelsConfig) -> Models:
    """Raises ConfigError for a file, a name or a size that is not there."""
    prefill = _load(config, config.prefill_tensor_parallel, is_prefill=True)
    decode = _load(config, config.decode_tensor_parallel, is_prefill=False)
    return Models(_with_start(prefill, config.start_s), _with_start(decode, config.start_s))


def _load(config: ModelsConfig, size: int, *, is_prefill: bool) -> PoolModel:
    if config.profile is None:
        assert config.model is not None and config.machine is not None
        folder = Path(config.model)
        if folder.is_dir():
            shape = read_shape(folder)
            cost, dtype = cost_model(shape, shape.dtype), shape.dtype
        else:
            cost, dtype = find_shape(config.model), "bfloat16"
        return predict(cost, find_machine(config.machine), size, dtype=dtype)
    profile = read_profile(config.profile)
    sizes = profile.prefill if is_prefill else profile.decode
    if size not in sizes:
        pool = "prefill" if is_prefill else "decode"
        known = ", ".join(map(str, sorted(sizes))) or "none"
        raise ConfigError(
            f"models.{pool}_tensor_parallel is {size}, and {config.profile} has figures of {pool} "
            f"workers of {known}; measure that size with `baton profile`"
        )
    return sizes[size]


def _with_start(model: PoolModel, start_s: float | None) -> PoolModel:
    return model if start_s is None else dataclasses.replace(model, start_s=start_s)
