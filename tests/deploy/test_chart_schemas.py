"""What the chart renders is valid: for helm 3 and 4, Kubernetes of several years, and the CRDs."""

from __future__ import annotations

import copy
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from chart import CHART, OTHERS, PROFILES, ROOT, TESTS, Objects, extra_values, values_file
from manifests import CustomKinds, as_pod, builtin_errors, pod_templates
from tools.helm import Helm, HelmError

VERSIONS = ("1.29", "1.31", "1.33", "1.35", "1.37")


@pytest.fixture(scope="module")
def custom() -> CustomKinds:
    return CustomKinds(TESTS / "crds")


@pytest.mark.parametrize("name", [*PROFILES, *OTHERS])
def test_every_profile_lints_and_renders_alike(
    each_helm: Helm, rendered: Callable[[str], Objects], name: str
) -> None:
    file = values_file(name)
    each_helm.run("lint", str(CHART), "--strict", "-f", str(file))
    objects = each_helm.template(CHART, file, values=extra_values(name))
    assert _sorted(objects) == _sorted(rendered(name))


def test_the_chart_can_be_packaged(each_helm: Helm, tmp_path: Path) -> None:
    each_helm.run("package", str(CHART), "-d", str(tmp_path))
    (package,) = tmp_path.glob("*.tgz")
    with tarfile.open(package) as archive:
        names = archive.getnames()
    assert {f"baton/{name}" for name in (*PROFILES, "values.schema.json", "README.md")} <= {*names}
    assert each_helm.template(package, values=extra_values("values-cpu.yaml"))


def test_an_old_kubernetes_is_refused(each_helm: Helm) -> None:
    with pytest.raises(HelmError, match=r"1\.28"):
        each_helm.template(CHART, values=extra_values("values-cpu.yaml"), kubernetes="1.28.0")


@pytest.mark.parametrize("version", VERSIONS)
def test_objects_are_valid(objects: Objects, custom: CustomKinds, version: str) -> None:
    found = []
    for obj in objects:
        errors = custom.errors(obj) if custom.knows(obj) else builtin_errors(obj, version)
        # Pods inside custom resources are of this Kubernetes too.
        for template in pod_templates(obj):
            errors += builtin_errors(as_pod(template), version)
        found += [f"{obj['kind']} {obj['metadata']['name']}: {error}" for error in errors]
    assert not found


def test_a_wrong_field_would_be_seen(
    rendered: Callable[[str], Objects], custom: CustomKinds
) -> None:
    objects = rendered("values-all-kubernetes.yaml")
    for obj in objects:
        wrong = copy.deepcopy(obj)
        place = wrong.get("spec", wrong)
        place["speling"] = 1
        errors = custom.errors(wrong) if custom.knows(wrong) else builtin_errors(wrong, "1.35")
        assert errors, obj["kind"]
    scaled = copy.deepcopy(next(obj for obj in objects if obj["kind"] == "ScaledObject"))
    scaled["spec"]["minReplicaCount"] = 99
    assert any("must be less" in error for error in custom.errors(scaled))


def test_the_profiles_have_what_they_are_about(rendered: Callable[[str], Objects]) -> None:
    kinds = {name: {obj["kind"] for obj in rendered(name)} for name in (*PROFILES, *OTHERS)}
    assert "RayService" not in kinds["values-cpu.yaml"]
    for name in ("values-gpu-small.yaml", "values-gpu-unequal-tp.yaml", "values-production.yaml"):
        assert "RayService" in kinds[name] and "Deployment" not in kinds[name] - {"Deployment"}
    assert {"ServiceMonitor", "HTTPRoute", "GRPCRoute"} <= kinds["values-production.yaml"]
    assert kinds["values-all-kubernetes.yaml"] >= {
        "Ingress", "HTTPRoute", "GRPCRoute", "PodMonitor", "ScaledObject", "PriorityClass",
        "PodDisruptionBudget", "NetworkPolicy", "ServiceAccount", "Secret", "Deployment",
    }  # fmt: skip
    assert "PersistentVolumeClaim" in kinds["values-pvc.yaml"]


def test_rules_and_dashboards_in_the_chart_become_objects(
    each_helm: Helm, tmp_path: Path, custom: CustomKinds
) -> None:
    chart = tmp_path / "baton"
    _copy(CHART, chart)
    for kind in ("rules", "dashboards"):
        (chart / "files" / kind).mkdir(parents=True, exist_ok=True)
    (chart / "files/rules/my_rules.yaml").write_text(
        'groups:\n  - name: g\n    rules:\n      - {alert: A, expr: "up == 0", for: 5m, '
        'annotations: {text: "{{ $value }}"}}\n'
    )
    dashboard = {"title": 'a "quoted" {{ name }}', "panels": []}
    (chart / "files/dashboards/over_view.json").write_text(json.dumps(dashboard))
    objects = each_helm.template(chart, values_file("values-production.yaml"))
    rule = _named(objects, "PrometheusRule", "rel-baton-my-rules")
    assert not custom.errors(rule)
    assert rule["spec"]["groups"][0]["rules"][0]["annotations"] == {"text": "{{ $value }}"}
    board = _named(objects, "ConfigMap", "rel-baton-dashboard-over-view")
    assert json.loads(board["data"]["over_view.json"]) == dashboard
    assert board["metadata"]["labels"]["grafana_dashboard"] == "1"


def test_generated_files_are_fresh() -> None:
    from tools import chart_files

    for path, text in {**chart_files.files(), **chart_files.make_examples()}.items():
        assert path.read_text() == text, f"{path.relative_to(ROOT)}: python -m tools.chart_files"


def _named(objects: Objects, kind: str, name: str) -> dict:
    return next(o for o in objects if o["kind"] == kind and o["metadata"]["name"] == name)


def _copy(source: Path, target: Path) -> None:
    import shutil

    shutil.copytree(source, target)


def _sorted(objects: Objects) -> list[str]:
    return sorted(json.dumps(obj, sort_keys=True) for obj in objects)
