"""What `autoscale` of a system may say: the rest is refused with value, limit and fix."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from baton.core.errors import ConfigError
from baton.core.worker_info import Role
from baton.model_info.machines import Machine
from services.launch.autoscale_config import LiveConfig, SystemAutoscale, judged_by, read_autoscale
from services.launch.config import SystemConfig, router_values
from services.launch.pool_models import pool_models
from tiny_llama import write_checkpoint

MODEL = Path("model")
TARGETS = {"enabled": True, "ttft_s": 0.5, "itl_s": 0.05}
GPUS = {"CUDA_VISIBLE_DEVICES": "0,1,2,3"}
HOST = Machine("this machine", 1e10, {"float32": 1e11, "bfloat16": 2e11}, "measured")


def read(
    autoscale: dict[str, Any], *, use_ray: bool = False, environ: dict[str, str] | None = None,
    **system: Any,
) -> SystemAutoscale | None:  # fmt: skip
    return read_autoscale(
        SystemConfig(MODEL, autoscale=autoscale, **system), environ or {}, use_ray=use_ray
    )


def test_it_is_off_unless_enabled() -> None:
    assert read({}) is None
    assert read({"ttft_s": 0.5, "itl_s": 0.05}) is None


def test_numbers_may_come_as_text_of_the_environment() -> None:
    found = read(
        {**TARGETS, "enabled": "true", "max_devices": "6", "prefill": {"max_workers": "2"}}
    )
    assert found is not None
    assert (found.targets.max_devices, found.targets.prefill.max_workers) == (6, 2)


def test_targets_are_those_of_the_default_class_where_none_are_given() -> None:
    classes = {"classes": {"fast": {"ttft_s": 0.3, "itl_s": 0.03}}, "default_class": "fast"}
    found = read({"enabled": True}, router={"slo": classes})
    assert found is not None
    assert (found.targets.ttft_s, found.targets.itl_s) == (0.3, 0.03)


def test_worker_takes_as_many_devices_as_it_has_ranks_and_all_gpus_are_the_budget() -> None:
    pool = {"engine": {"device": "cuda", "tp_size": 2}}
    found = read(TARGETS, environ=GPUS, prefill=pool, decode={"engine": {"device": "cuda"}})
    assert found is not None
    assert found.targets.prefill.devices_per_worker == 2
    assert found.targets.decode.devices_per_worker == 1
    assert found.targets.max_devices == 4


def test_routers_judge_by_what_is_planned_for() -> None:
    system = SystemConfig(MODEL, autoscale=TARGETS)
    judged = judged_by(system, read_autoscale(system, {}, use_ray=False))
    assert router_values(judged)["pool_stats"] == {"ttft_s": 0.5, "itl_s": 0.05}
    assert judged_by(system, None) is system


@pytest.mark.parametrize(
    ("changes", "system", "message"),
    [
        (
            {"prefill": {"min_workers": 5, "max_workers": 2}},
            {},
            "autoscale.prefill.min_workers 5 must be",
        ),
        ({"max_devices": 0}, {}, "autoscale.max_devices is 0, but"),
        ({"max_device": 4}, {}, "unknown setting autoscale.max_device; known here: "),
        ({"prefill": {"most": 4}}, {}, "unknown setting autoscale.prefill.most"),
        ({"prefill": 4}, {}, "autoscale.prefill is a section of settings, got 4"),
        ({"profile": "/nowhere/p.json"}, {}, "/nowhere/p.json is no file; `baton profile`"),
        ({}, {"num_prefill": 0}, "num_prefill is 0; start with --prefill 1"),
        ({"interval_s": 0}, {}, "autoscale.interval_s must be positive, got 0"),
        ({"interval_s": 1e9}, {}, "autoscale.interval_s must be at most 3600"),
        ({"ttft_s": -1}, {}, "autoscale.ttft_s must be above 0 seconds, got -1"),
        ({"ttft_s": None}, {}, "class 'standard', which requests have that name none"),
        ({"share": 1.5}, {}, "autoscale.share must be between 0 and 1"),
        ({"start_s": -1}, {}, "autoscale.start_s must not be negative"),
        ({"drain_s": 0}, {}, "autoscale.drain_s must be positive"),
        ({"prefill": {"min_workers": 0}}, {}, "prefill.min_workers is 0: a pool without"),
        ({"decode": {"max_workers": 2}}, {"num_decode": 3}, "start with --decode 2 or change"),
        (
            {"decode": {"min_workers": 2}, "max_devices": 4},
            {},
            "autoscale.decode allows 2 to 8",
        ),
        ({"max_devices": 4}, {"num_decode": 4}, "take 5 devices, and autoscale.max_devices is 4"),
        ({"decode": {"devices_per_worker": 2}}, {}, "takes 1; leave it out"),
    ],
)
def test_wrong_settings_are_refused_with_the_fix(
    changes: dict[str, Any], system: dict[str, Any], message: str
) -> None:
    values = {name: v for name, v in {**TARGETS, **changes}.items() if v is not None}
    with pytest.raises(ConfigError) as refused:
        read(values, **system)
    assert message in str(refused.value)


def test_budget_above_the_visible_gpus_is_refused() -> None:
    pools = {name: {"engine": {"device": "cuda"}} for name in ("prefill", "decode")}
    with pytest.raises(ConfigError, match="max_devices is 6, and 4 GPUs are visible"):
        read({**TARGETS, "max_devices": 6}, environ=GPUS, **pools)


def test_roles_change_only_between_equal_sizes_and_without_ray() -> None:
    pools = {"prefill": {"engine": {"device": "cuda", "tp_size": 2}}}
    pools["decode"] = {"engine": {"device": "cuda"}}
    with pytest.raises(ConfigError, match="prefill workers have 2 ranks"):
        read({**TARGETS, "can_change_roles": True}, environ=GPUS, **pools)
    with pytest.raises(ConfigError, match="--no-ray"):
        read({**TARGETS, "can_change_roles": True}, use_ray=True)


def test_models_come_from_the_profile_with_the_start_that_was_set(tmp_path: Path) -> None:
    file = tmp_path / "profile.json"
    file.write_text(PROFILE)
    system = SystemConfig(MODEL)
    models = pool_models(system, LiveConfig(profile=file, start_s=3.0))
    assert models[Role.PREFILL].hardware.step_fixed_s == 0.01
    assert models[Role.DECODE].hardware.step_fixed_s == 0.02
    assert models[Role.DECODE].start_s == 3.0


def test_profile_without_the_size_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "profile.json"
    file.write_text(PROFILE)
    system = SystemConfig(MODEL, decode={"engine": {"device": "cuda", "tp_size": 4}})
    with pytest.raises(ConfigError, match="no decode worker of tensor_parallel 4"):
        pool_models(system, LiveConfig(profile=file))


def test_cpu_is_measured_once_and_its_room_is_that_of_the_settings(tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "model")
    asked: list[str] = []

    def measure(dtype: str) -> Machine:
        asked.append(dtype)
        return HOST

    engine = {"engine": {"dtype": "float32"}}
    system = SystemConfig(model, prefill=engine, decode=engine)
    models = pool_models(system, LiveConfig(), measure_host=measure)
    assert asked == ["float32"]
    per_token = 2 * 3 * 2 * 16 * 4
    assert models[Role.DECODE].max_kv_tokens == (256 << 20) // per_token
    assert models[Role.PREFILL].hardware.prefill_token_s > 0


@pytest.mark.parametrize(("name", "message"), [("H200", None), ("Quadro", "GPU 'NVIDIA Quadro'")])
def test_gpu_is_found_by_what_its_driver_calls_it(
    tmp_path: Path, name: str, message: str | None
) -> None:
    folder = tmp_path / "gpus" / "0000:01:00.0"
    folder.mkdir(parents=True)
    (folder / "information").write_text(f"Model: \t\t NVIDIA {name}\nIRQ: 1\n")
    engine = {"engine": {"device": "cuda"}}
    system = SystemConfig(write_checkpoint(tmp_path / "model"), prefill=engine, decode=engine)
    if message is None:
        models = pool_models(system, LiveConfig(), gpu_files=tmp_path / "gpus")
        assert "h200" in models[Role.PREFILL].source
        return
    with pytest.raises(ConfigError, match=message):
        pool_models(system, LiveConfig(), gpu_files=tmp_path / "gpus")


PROFILE = """{"source": "made up", "kv_bytes_per_token": 100, "workers": [
 {"tensor_parallel": 1, "max_kv_tokens": 1000, "start_s": 9, "step_fixed_s": 0.01,
  "prefill_token_s": 0.001, "prefill_pair_s": 0, "decode_sequence_s": 0.001,
  "decode_kv_token_s": 0, "link_bytes_per_second": 1e9, "decode_step_fixed_s": 0.02}]}"""
