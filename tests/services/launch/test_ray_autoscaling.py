"""An application of Ray Serve that follows its load, as it is built before Ray runs it."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest
import yaml

from baton.core.errors import ConfigError
from made_up_worker import MODEL
from services.launch.autoscale_config import SystemAutoscale, read_autoscale
from services.launch.autoscaling import Autoscaling
from services.launch.config import SystemConfig
from services.launch.run_directory import RunDirectory
from services.planner.decision_record import Models
from services.planner.planner_config import load_models, load_planner_config
from services.planner.profile_file import profile_json
from services.planner.ray_policy import POOLS, ROUTER, SloPolicy
from tiny_llama import write_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore")
AUTOSCALE = {
    "enabled": True, "ttft_s": 0.5, "itl_s": 0.05, "max_devices": 6, "drain_s": 90.0,
    "decode": {"max_workers": 4},
}  # fmt: skip


@pytest.fixture
def system(tmp_path: Path) -> SystemConfig:
    return SystemConfig(
        write_checkpoint(tmp_path / "model"), num_decode=2, autoscale=AUTOSCALE,
        prefill={"engine": {"dtype": "float32"}}, decode={"engine": {"dtype": "float32"}},
    )  # fmt: skip


@pytest.fixture
def settings(system: SystemConfig) -> SystemAutoscale:
    found = read_autoscale(system, {}, use_ray=True)
    assert found is not None
    return found


def test_pools_have_limits_and_time_to_drain_and_the_router_tells(
    system: SystemConfig, settings: SystemAutoscale, tmp_path: Path
) -> None:
    from services.launch.graph import build_from_file
    from services.launch.ray_autoscaling import write_system

    run = RunDirectory.create(tmp_path / "run")
    autoscaling = Autoscaling(settings, Models(MODEL, MODEL))
    file = write_system(system, run, "s" * 64, autoscaling)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    router = build_from_file({"file": str(file)})._bound_deployment
    pools = {app._bound_deployment.name: app._bound_deployment for app in router.init_args[2:]}
    assert router.name == ROUTER
    assert pools.keys() == POOLS.keys()
    limits = {
        name: deployment._deployment_config.autoscaling_config
        for name, deployment in {**pools, ROUTER: router}.items()
    }
    found = {
        name: (c.min_replicas, c.initial_replicas, c.max_replicas) for name, c in limits.items()
    }
    assert found == {"Prefill": (1, 1, 8), "Decode": (1, 2, 4), "Router": (1, 1, 1)}
    assert all(c.upscale_delay_s == c.downscale_delay_s == 0 for c in limits.values())
    decode = pools["Decode"]
    assert decode.init_args[0]["drain_s"] == 90.0
    assert decode._deployment_config.graceful_shutdown_timeout_s > 90.0


def test_policy_reads_what_was_written_for_it(
    system: SystemConfig, settings: SystemAutoscale, tmp_path: Path
) -> None:
    from services.launch.ray_autoscaling import POLICY, policy, write_planner

    run = RunDirectory.create(tmp_path / "run")
    file = write_planner(system, run, Autoscaling(settings, Models(MODEL, MODEL)))
    config = load_planner_config(file=file)
    assert config.autoscale == settings.targets
    assert load_models(config.models).decode.hardware == MODEL.hardware
    assert policy(file)["policy_kwargs"] == {"settings": str(file)}
    assert f"{SloPolicy.__module__}:{SloPolicy.__name__}" == POLICY


@pytest.mark.parametrize(
    ("num", "autoscale", "message"),
    [
        (3, {"decode": {"max_workers": 2}}, "num_decode is 3, and autoscale.decode"),
        (1, {"itl_s": -1}, "itl_s must be above 0"),
        (1, {"colour": "red"}, "unknown setting autoscale.colour"),
    ],
)
def test_release_whose_planner_cannot_work_is_refused(
    tmp_path: Path, num: int, autoscale: dict[str, object], message: str
) -> None:
    from services.launch.serve_app import build_app

    profile = tmp_path / "profile.json"
    profile.write_text(json.dumps(profile_json(MODEL, MODEL, kv_bytes_per_token=1, source="made")))
    values = {
        "autoscale": {"ttft_s": 0.5, "itl_s": 0.05, **autoscale},
        "models": {"profile": str(profile)},
    }
    (tmp_path / "planner.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(ConfigError, match=message):
        build_app({"settings_dir": str(tmp_path), "num_decode": num, "planner": True})
