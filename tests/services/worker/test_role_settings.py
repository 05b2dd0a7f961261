"""What a change of role does to the engine's settings, and which settings stand in its way."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from baton.core.errors import ConfigError, RoleChangeRefused
from baton.core.worker_info import Role
from baton.engine.config import Device, EngineConfig
from baton.engine.scheduler import SchedulerLimits
from services.decode import config as decode
from services.prefill import config as prefill
from services.worker.config import load_worker_config
from services.worker.role_settings import KEPT, LIMITS, limits_in

ENGINE = EngineConfig(model_path=Path("/m"), max_num_seqs=8, max_num_batched_tokens=64)


def test_limits_of_a_step_are_those_of_the_other_pool() -> None:
    other = dataclasses.replace(
        ENGINE, max_num_seqs=32, max_num_batched_tokens=128, max_num_waiting=7, num_threads=3
    )
    assert limits_in(Role.DECODE, ENGINE, other) == SchedulerLimits(32, 128, 7)


@pytest.mark.parametrize(
    "change",
    [{"tp_size": 2}, {"dtype": "float32"}, {"max_model_len": 64}, {"revision": "b"}],
    ids=lambda change: next(iter(change)),
)
def test_what_was_decided_at_the_start_is_named(change: dict[str, Any]) -> None:
    (name,) = change
    with pytest.raises(RoleChangeRefused, match=f"engine.{name} is .* in the decode pool"):
        limits_in(Role.DECODE, ENGINE, dataclasses.replace(ENGINE, **change))


def test_every_setting_of_the_engine_is_changed_kept_or_compared() -> None:
    names = {field.name for field in dataclasses.fields(EngineConfig)}
    assert names >= {*LIMITS, *KEPT}


def test_a_gpus_buffers_bound_its_limits() -> None:
    gpu = dataclasses.replace(ENGINE, device=Device.CUDA)
    smaller = dataclasses.replace(gpu, max_num_seqs=4)
    assert limits_in(Role.PREFILL, gpu, smaller).max_num_seqs == 4
    with pytest.raises(RoleChangeRefused, match=r"max_num_batched_tokens is 65 .* made for 64"):
        limits_in(Role.PREFILL, gpu, dataclasses.replace(gpu, max_num_batched_tokens=65))


def test_a_worker_by_itself_takes_the_other_pools_own_limits() -> None:
    given = {"engine": {"model_path": "/m", "max_num_waiting": 9}}
    config = load_worker_config(defaults=prefill.DEFAULTS, overrides=given)
    assert config.other_engine is not None
    assert config.other_engine.max_num_seqs == decode.DEFAULTS["engine"]["max_num_seqs"]
    assert config.other_engine.max_num_waiting == 9


def test_what_is_given_of_the_other_pool_goes_over_its_own_limits() -> None:
    given = {
        "engine": {"model_path": "/m", "max_num_seqs": 4},
        "other_engine": {"max_num_batched_tokens": 99},
    }
    config = load_worker_config(defaults=decode.DEFAULTS, overrides=given)
    limits = prefill.DEFAULTS["engine"]
    assert config.other_engine == EngineConfig(
        model_path=Path("/m"), max_num_seqs=limits["max_num_seqs"], max_num_batched_tokens=99
    )


def test_an_other_pool_that_cannot_be_is_refused_at_the_start_only_if_it_was_given() -> None:
    odd = {"engine": {"model_path": "/m", "max_num_seqs": 200, "max_num_batched_tokens": 300}}
    assert load_worker_config(defaults=prefill.DEFAULTS, overrides=odd).other_engine is not None
    only_seqs = {"engine": {"model_path": "/m", "max_num_seqs": 200}}
    alone = load_worker_config(defaults=prefill.DEFAULTS, overrides=only_seqs)
    with pytest.raises(RoleChangeRefused, match="other_engine"):
        limits_in(Role.DECODE, alone.engine, alone.other_engine)
    given = {**only_seqs, "other_engine": {"max_num_seqs": 200}}
    with pytest.raises(ConfigError, match="max_num_batched_tokens 128 is below max_num_seqs 200"):
        load_worker_config(defaults=prefill.DEFAULTS, overrides=given)
