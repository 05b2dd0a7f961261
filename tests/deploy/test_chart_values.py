"""Values are the program's settings, and wrong ones are refused before anything starts."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import yaml

from baton.core.config import build, merge
from chart import CHART, SECRET, Objects, values_file
from services.decode.config import DEFAULTS as DECODE_DEFAULTS
from services.launch.compatibility import check_pools_match
from services.prefill.config import DEFAULTS as PREFILL_DEFAULTS
from services.router.config import RouterConfig, load_router_config
from services.worker.config import WorkerConfig, load_worker_config
from tools.chart_files import (
    ROUTER_OWN,
    WORKER_OWN,
    config_schemas,
    make_schema,
    read_values,
)
from tools.helm import Helm, HelmError
from tools.settings_schema import schema_paths, setting_paths

SETTINGS = {
    "router": (RouterConfig, ROUTER_OWN, {}),
    "prefill": (WorkerConfig, WORKER_OWN, PREFILL_DEFAULTS),
    "decode": (WorkerConfig, WORKER_OWN, DECODE_DEFAULTS),
}
SECRETS = {
    "BATON_ADVERTISE_HOST": "10.0.0.1",
    "BATON_TRANSFER__CLUSTER_SECRET": "s" * 32,
    "BATON_REGISTRY__URL": "redis://r:6379",
    "BATON_SHARED__URL": "redis://r:6379",
}


@pytest.mark.parametrize("process", SETTINGS)
def test_config_takes_every_setting_of_the_program_and_no_other(process: str) -> None:
    cls, own, _ = SETTINGS[process]
    settings = setting_paths(cls)
    assert own <= settings
    assert schema_paths(config_schemas()[process]) == settings - own


@pytest.mark.parametrize("process", SETTINGS)
def test_defaults_in_the_schema_are_those_of_the_program(process: str) -> None:
    cls, own, defaults = SETTINGS[process]
    stated = _defaults(config_schemas()[process])
    assert stated
    least: dict[str, Any] = {"model_path": "/m"}
    if cls is WorkerConfig:
        least = {"engine": {"model_path": "/m"}, "role": process}
    assert build(cls, merge(defaults, stated, least)) == build(cls, merge(defaults, least))
    # Mapping by mapping, since a merge would hide a default that is missing.
    for path in setting_paths(cls) - own:
        assert _has_default(config_schemas()[process], path), path


def test_every_object_of_the_schema_says_what_it_takes() -> None:
    import json

    def check(part: Any, path: str) -> None:
        if isinstance(part, dict):
            if "properties" in part and "type" in part:
                assert part.get("additionalProperties") is False, path
            for name, inner in part.items():
                check(inner, f"{path}/{name}")
        elif isinstance(part, list):
            for inner in part:
                check(inner, path)

    check(json.loads(make_schema()), "")


def test_every_value_is_explained_and_typed() -> None:
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    known = {value.key for value in read_values((CHART / "values.yaml").read_text())}
    assert set(values) <= {key.partition(".")[0] for key in known}
    # What repeats between pools is explained once.
    shared = (
        r"(resources|nodeSelector|tolerations|affinity|priorityClassName|podAnnotations|labels)"
    )
    missing = [
        key
        for key in _leaves(values)
        if not any(key == k or key.startswith(f"{k}.") for k in known)
        and not re.search(rf"\.({shared}|replicas|enabled|create)(\.|$)", key)
        and not key.startswith(("config.", "serviceAccount.", "ingress.", "podSecurity."))
    ]
    assert not missing, missing


def test_settings_files_are_read_by_the_program(objects: Objects) -> None:
    settings = next(o for o in objects if o["metadata"]["name"].endswith("-settings"))["data"]
    expected = {"decode.yaml", "prefill.yaml", "router.yaml"}
    assert expected <= set(settings) <= expected | {"planner.yaml", "profile.json"}
    values = {name: yaml.safe_load(text) for name, text in settings.items()}
    build(RouterConfig, merge(values["router.yaml"], {"shared": {"url": "redis://r"}}))
    engines = []
    for pool, defaults in (("prefill", PREFILL_DEFAULTS), ("decode", DECODE_DEFAULTS)):
        config = load_worker_config(
            defaults=defaults, environ=SECRETS, overrides=values[f"{pool}.yaml"]
        )
        assert config.role.value == pool
        engines.append(config.engine)
    check_pools_match(*engines)


def test_settings_of_values_reach_the_program(rendered: Callable[[str], Objects], tmp_path) -> None:
    objects = rendered("values-all-kubernetes.yaml")
    settings = next(o for o in objects if o["metadata"]["name"] == "everything-settings")["data"]
    file = tmp_path / "router.yaml"
    file.write_text(settings["router.yaml"])
    config = load_router_config(file=file, environ=SECRETS)
    assert config.slo.default_class == "fast"
    assert config.tenants.named["acme"].max_concurrent == 10
    assert config.tenants.needs_key
    assert config.edge.stop_grace_s == 120
    assert config.tls.is_on
    assert str(config.edge.tls.cert_file) == "/etc/baton-door-tls/tls.crt"
    assert str(config.edge.tls.client_ca_file) == "/etc/baton-door-tls/ca.crt"
    assert config.copy.own_port == 8001
    assert config.shared.url == SECRETS["BATON_SHARED__URL"]


BAD = [
    # (values, what the refusal names)
    ({"prefil": {}}, "prefil"),
    ({"config": {"router": {"edge": {"max_body_byte": 1}}}}, "max_body_byte"),
    ({"config": {"prefill": {"engine": {"block_size": "many"}}}}, "block_size"),
    ({"config": {"decode": {"role": "prefill"}}}, "role"),
    ({"config": {"router": {"http_port": 1}}}, "http_port"),
    ({"config": {"decode": {"engine": {"device": "tpu"}}}}, "device"),
    ({"config": {"router": {"slo": {"classes": {"a": {"ttft": 1}}}}}}, "ttft"),
    ({"router": {"httpPort": 99999}}, "httpPort"),
    ({"router": {"replicas": 0}}, "replicas"),
    ({"image": {"tag": "latest"}}, "tag"),
    ({"image": {"digest": "sha256:short"}}, "digest"),
    ({"model": {"path": "../etc"}}, "path"),
    ({"model": {"source": "s3"}}, "source"),
    ({"model": {"source": "image"}}, "model.image.reference"),
    ({"model": {"source": "fetch"}}, "model.fetch.image"),
    ({"fabric": {"env": {"LD_PRELOAD": "x"}}}, "LD_PRELOAD"),
    ({"fabric": {"sharedMemory": {"sizeLimit": "lots"}}}, "sizeLimit"),
    ({"fabric": {"sharedMemory": {"sizeLimit": "100Mi"}}}, "rayObjectStoreBytes 200000000"),
    ({"podSecurity": {"runAsUser": 0}}, "runAsUser"),
    ({"pools": {"prefill": {"resources": {"limits": []}}}}, "limits"),
    ({"secrets": {"clusterSecret": "short"}}, "clusterSecret"),
    ({"secrets": {"clusterSecret": ""}}, "secrets.clusterSecret or secrets.existingSecret"),
    ({"tls": {"enabled": True}}, "tls.existingSecret"),
    ({"frontDoorTls": {"enabled": True}}, "frontDoorTls.existingSecret"),
    (
        {"frontDoorTls": {"enabled": True, "existingSecret": "s"}},
        "frontDoorTls.enabled needs runtime kubernetes",
    ),
    ({"frontDoorTls": {"requireClientCertificate": True}}, "needs frontDoorTls.enabled"),
    (
        {"monitoring": {"serviceMonitor": {"enabled": True}, "podMonitor": {"enabled": True}}},
        "podMonitor.enabled are both set",
    ),
    (
        {"fabric": {"sharedMemory": {"sizeLimit": "4Gi"}}},
        r"sizeLimit 4Gi does not fit into pools.prefill.resources.limits.memory 3Gi",
    ),
    (
        {"config": {"decode": {"engine": {"kv_cache_bytes": 3221225472}}}},
        r"kv_cache_bytes 3221225472 does not fit into pools.decode.resources.limits.memory 3Gi",
    ),
    (
        {"pools": {"decode": {"resources": {"limits": {"memory": "lots"}}}}},
        r"lots.* is no amount of memory",
    ),
    ({"config": {"decode": {"engine": {"revision": "b"}}}}, "config.prefill.engine.revision"),
    ({"config": {"router": {"edge": {"tls": {"cert_file": "x"}}}}}, "tls"),
    (
        {"config": {"router": {"tracing": {"otlp_endpoint": "http://collector"}}}},
        "config.router.tracing.otlp_endpoint http://collector names no port",
    ),
    ({"gateway": {"enabled": True}}, "gateway.parentRefs"),
    ({"networkPolicy": {"clients": []}}, "clients"),
    ({"redis": {"externalUrl": "redis://:password@host"}}, "externalUrl"),
    ({"redis": {"externalUrl": "redis://host"}}, "redis.enabled and redis.externalUrl"),
    ({"runtime": "kubernetes", "redis": {"enabled": False}}, "redis.enabled"),
    ({"runtime": "kubernetes", "pools": {"layout": "paired"}}, "pools.layout paired"),
    ({"keda": {"enabled": True}}, "keda.enabled needs runtime kubernetes"),
    (
        {"runtime": "kubernetes", "keda": {"enabled": True, "decode": {"minReplicas": 9}}},
        r"keda.decode.minReplicas 9 is above keda.decode.maxReplicas 4",
    ),
    (
        {"model": {"numKvHeads": 8}, "config": {"decode": {"engine": {"tp_size": 3}}}},
        r"config.decode.engine.tp_size 3 does not divide model.numKvHeads 8",
    ),
    ({"config": {"decode": {"engine": {"block_size": 32}}}}, "block_size"),
    ({"config": {"decode": {"engine": {"device": "cuda"}}}}, "device is cuda and pools.layout"),
]


@pytest.mark.parametrize(("values", "named"), BAD, ids=[named[:40] for _, named in BAD])
def test_wrong_values_are_refused_by_name(helm: Helm, values: dict[str, Any], named: str) -> None:
    with pytest.raises(HelmError, match=named):
        helm.template(CHART, values=merge(SECRET, values))


def test_helm_3_refuses_by_name_too(tmp_path) -> None:
    from tools.helm import helm_binary

    old = Helm(helm_binary(3), tmp_path)
    for values, named in BAD[:3]:
        with pytest.raises(HelmError, match=named):
            old.template(CHART, values=merge(SECRET, values))


def test_a_pod_with_more_gpus_than_a_node_is_refused(helm: Helm) -> None:
    with pytest.raises(HelmError, match=r"needs 10 GPUs and gpu.maxPerNode is 8"):
        helm.template(
            CHART,
            values_file("values-gpu-unequal-tp.yaml"),
            values=merge(SECRET, {"pools": {"paired": {"decode": 3}}}),
        )


def test_a_changed_setting_or_secret_rolls_the_pods(helm: Helm) -> None:
    def annotations(values: dict[str, Any]) -> dict[str, str]:
        given = merge(copy.deepcopy(SECRET), values)
        objects = helm.template(CHART, values_file("values-cpu.yaml"), values=given)
        (router,) = (
            o
            for o in objects
            if (o["kind"], o["metadata"]["name"]) == ("Deployment", "rel-baton-router")
        )
        return router["spec"]["template"]["metadata"]["annotations"]

    before = annotations({})
    assert annotations({}) == before
    setting = annotations({"config": {"router": {"edge": {"deadline_s": 5}}}})
    assert setting["checksum/settings"] != before["checksum/settings"]
    secret = annotations({"secrets": {"clusterSecret": "another-secret-of-some-length"}})
    assert secret["checksum/secret"] != before["checksum/secret"]


def _defaults(schema: dict[str, Any]) -> dict[str, Any]:
    made = {}
    for name, part in schema["properties"].items():
        if "default" in part:
            made[name] = part["default"]
        elif "properties" in part:
            made[name] = _defaults(part)
    return made


def _has_default(schema: dict[str, Any], path: str) -> bool:
    for name in path.split("."):
        schema = schema["properties"][name]
    return "default" in schema


def _leaves(values: dict[str, Any], prefix: str = "") -> list[str]:
    found = []
    for name, value in values.items():
        if isinstance(value, dict) and value:
            found += _leaves(value, f"{prefix}{name}.")
        else:
            found.append(f"{prefix}{name}")
    return found
