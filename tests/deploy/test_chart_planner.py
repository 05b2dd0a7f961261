"""The planner in the chart: its settings, its way to the routers, and KEDA that follows it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from chart import CHART, SECRET, Objects, values_file
from services.planner.planner_config import PlannerConfig, load_models, load_planner_config
from services.planner.ray_policy import SloPolicy
from tools.chart_files import PLANNER_OWN, config_schemas
from tools.helm import Helm
from tools.settings_schema import schema_paths, setting_paths

PROFILE = json.dumps(
    {
        "kv_bytes_per_token": 1000,
        "workers": [
            {
                "tensor_parallel": size, "max_kv_tokens": 1000, "step_fixed_s": 0.02,
                "prefill_token_s": 1e-4, "prefill_pair_s": 0, "decode_sequence_s": 1e-4,
                "decode_kv_token_s": 0, "link_bytes_per_second": 1e9,
            }
            for size in (1, 2)
        ],
    }
)  # fmt: skip
PLANNER: dict[str, Any] = {
    **SECRET,
    "runtime": "kubernetes",
    "planner": {"enabled": True, "profile": PROFILE},
    "config": {
        "planner": {"autoscale": {"ttft_s": 0.5, "itl_s": 0.03, "decode": {"max_workers": 6}}},
        "decode": {"engine": {"tp_size": 2}},
    },
}


def changed(**values: Any) -> dict[str, Any]:
    return {**PLANNER, **values}


def render(helm: Helm, values: dict[str, Any]) -> Objects:
    return helm.template(CHART, values_file("values-cpu.yaml"), values=values)


def named(objects: Objects, kind: str, end: str) -> dict[str, Any]:
    (found,) = (o for o in objects if o["kind"] == kind and o["metadata"]["name"].endswith(end))
    return found


def test_there_is_none_by_default(helm: Helm) -> None:
    objects = render(helm, {**SECRET, "runtime": "kubernetes"})
    assert not [o for o in objects if "planner" in o["metadata"]["name"]]
    settings = named(objects, "ConfigMap", "-settings")["data"]
    assert "planner.yaml" not in settings and "pool_stats" not in settings["router.yaml"]


def test_config_takes_every_setting_of_the_program_and_no_other() -> None:
    settings = setting_paths(PlannerConfig)
    assert settings >= PLANNER_OWN
    assert schema_paths(config_schemas()["planner"]) == settings - PLANNER_OWN


def test_its_settings_are_read_by_the_program(helm: Helm, tmp_path: Path) -> None:
    data = named(render(helm, PLANNER), "ConfigMap", "-settings")["data"]
    file, profile = tmp_path / "planner.yaml", tmp_path / "profile.json"
    profile.write_text(data["profile.json"])
    file.write_text(data["planner.yaml"].replace("/etc/baton/profile.json", str(profile)))
    config = load_planner_config(file=file)
    assert config.stats.routers == ("dns://rel-baton-metrics:8001",)
    assert (config.host, config.port) == ("0.0.0.0", 9200)
    assert config.autoscale.decode.devices_per_worker == 2
    assert (config.autoscale.prefill.devices_per_worker, config.autoscale.decode.max_workers) == (
        1,
        6,
    )
    assert load_models(config.models).decode.tensor_parallel == 2
    # Routers judge by what is planned for.
    router = yaml.safe_load(data["router.yaml"])
    assert router["pool_stats"] == {"ttft_s": 0.5, "itl_s": 0.03}


def test_it_is_scraped_as_a_part_of_its_deployment(helm: Helm) -> None:
    for kind in ("serviceMonitor", "podMonitor"):
        objects = render(helm, changed(monitoring={kind: {"enabled": True}}))
        own = named(objects, kind[0].upper() + kind[1:], "-planner")
        (endpoint,) = own["spec"].get("endpoints") or own["spec"]["podMetricsEndpoints"]
        (relabeling,) = endpoint["relabelings"]
        # Without a label of its own, a ServiceMonitor takes the name of the service.
        job = "rel-baton-metrics" if kind == "serviceMonitor" else "llm/rel-baton"
        assert relabeling == {"targetLabel": "job", "replacement": job}


def test_keda_gives_each_pool_what_is_wanted(helm: Helm) -> None:
    keda = {"enabled": True, "follow": "planner", "decode": {"maxReplicas": 6}}
    objects = render(helm, changed(keda=keda))
    for pool, most in (("prefill", 4), ("decode", 6)):
        spec = named(objects, "ScaledObject", f"-{pool}")["spec"]
        (trigger,) = spec["triggers"]
        assert trigger["metadata"]["query"] == (
            f'max(baton_planner_desired_workers{{namespace="llm",pool="{pool}"}})'
        )
        # One worker for each one that is wanted.
        assert (trigger["metricType"], trigger["metadata"]["threshold"]) == ("AverageValue", "1")
        behavior = spec["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]
        for way in ("scaleUp", "scaleDown"):
            assert behavior[way]["stabilizationWindowSeconds"] == 0
            assert behavior[way]["policies"][0]["value"] == most


def test_keda_follows_the_load_unless_told_otherwise(helm: Helm) -> None:
    objects = render(helm, {**SECRET, "runtime": "kubernetes", "keda": {"enabled": True}})
    spec = named(objects, "ScaledObject", "-decode")["spec"]
    assert "baton_worker_kv_usage_ratio" in spec["triggers"][0]["metadata"]["query"]
    assert "advanced" not in spec


@pytest.mark.filterwarnings("ignore")
def test_ray_serve_follows_it_within_its_limits(helm: Helm) -> None:
    from services.launch.serve_app import AppArgs

    pools = {"layout": "separate", "prefill": {"replicas": 1}, "decode": {"replicas": 2}}
    objects = render(helm, changed(runtime="ray", pools=pools))
    assert not [o for o in objects if o["metadata"]["name"].endswith("-planner")]
    assert "planner.yaml" in named(objects, "ConfigMap", "-settings")["data"]
    spec = named(objects, "RayService", "rel-baton")["spec"]
    (application,) = yaml.safe_load(spec["serveConfigV2"])["applications"]
    assert AppArgs(**application["args"]).planner
    module, _, name = application["autoscaling_policy"]["policy_function"].partition(":")
    assert (module, name) == (SloPolicy.__module__, SloPolicy.__name__)
    kwargs = application["autoscaling_policy"]["policy_kwargs"]
    assert kwargs == {"settings": "/etc/baton/planner.yaml"}
    cluster = spec["rayClusterConfig"]
    assert cluster["enableInTreeAutoscaling"] is True
    sizes = {
        g["groupName"]: (g["minReplicas"], g["maxReplicas"]) for g in cluster["workerGroupSpecs"]
    }
    assert sizes == {"router": (1, 1), "prefill": (1, 8), "decode": (1, 6)}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"runtime": "ray", "pools": {"layout": "paired"}},
            "planner.enabled with runtime ray needs pools.layout separate",
        ),
        ({"runtime": "ray", "pools": {"decode": {"replicas": 9}}}, "pools.decode.replicas is 9"),
        ({"planner": {"enabled": True}}, "needs figures of a worker: planner.profile, or"),
        ({"config": {}}, "needs config.planner.autoscale.ttft_s"),
        (
            {"config": {"planner": {"autoscale": {"ttft_s": 1}}}},
            "needs config.planner.autoscale.itl_s",
        ),
        (
            {
                "config": {
                    "planner": {
                        "autoscale": {"ttft_s": 1, "itl_s": 1},
                        "models": {"machine": "h200"},
                    }
                }
            },
            "figures come from one source",
        ),
        (
            {"planner": {}, "keda": {"enabled": True, "follow": "planner"}},
            "keda.follow planner needs planner.enabled",
        ),
        ({"keda": {"follow": "moon"}}, "follow"),
        (
            {
                "config": {
                    "planner": {"autoscale": {"ttft_s": 1, "itl_s": 1, "can_change_roles": True}}
                }
            },
            "can_change_roles: a pod or a replica belongs to its pool",
        ),
        ({"config": {"planner": {"autoscale": {"colour": "red"}}}}, "colour"),
        ({"config": {"planner": {"stats": {"routers": ["dns://x:1"]}}}}, "routers"),
        ({"planner": {"enabled": True, "replicas": 2}}, "replicas"),
    ],
)
def test_what_cannot_work_is_refused_by_name(
    helm: Helm, values: dict[str, Any], message: str
) -> None:
    with pytest.raises(Exception, match=message):
        render(helm, changed(**values))
