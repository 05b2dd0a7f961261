"""Laws over everything that the chart renders: security, names that meet, stops, networks."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import yaml

from baton.cli.main import COMMANDS, _load, _parser
from baton.core import metrics
from baton.core.planner_metrics import PLANNER_SERIES
from chart import CHART, Objects
from manifests import pod_templates

WRITABLE = {"/tmp", "/cache", "/dev/shm", "/data", "/models"}


def pods(objects: Objects) -> Iterator[tuple[str, dict[str, Any]]]:
    for obj in objects:
        for template in pod_templates(obj):
            labels = template["metadata"].get("labels", {})
            yield labels.get("app.kubernetes.io/component", obj["kind"]), template


def containers(spec: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield from spec.get("initContainers", ())
    yield from spec["containers"]


def of_kind(objects: Objects, kind: str) -> list[dict[str, Any]]:
    return [obj for obj in objects if obj["kind"] == kind]


def matches(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    exact = all(labels.get(k) == v for k, v in selector.get("matchLabels", {}).items())
    return exact and all(
        labels.get(each["key"]) in each["values"] for each in selector.get("matchExpressions", ())
    )


def test_every_container_is_unprivileged_and_bounded(objects: Objects) -> None:
    for component, pod in pods(objects):
        spec = pod["spec"]
        assert spec["securityContext"]["runAsNonRoot"] is True, component
        assert spec["securityContext"]["runAsUser"] >= 1, component
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for name in ("hostNetwork", "hostPID", "hostIPC", "shareProcessNamespace"):
            assert not spec.get(name), component
        assert not any("hostPath" in volume for volume in spec["volumes"])
        for container in containers(spec):
            security = container["securityContext"]
            assert security["allowPrivilegeEscalation"] is False
            assert security["readOnlyRootFilesystem"] is True
            assert security["capabilities"]["drop"] == ["ALL"]
            assert security["capabilities"].get("add", []) in ([], ["IPC_LOCK"])
            assert "privileged" not in security
            resources = container["resources"]
            assert {"cpu", "memory"} <= set(resources["requests"])
            assert "memory" in resources["limits"]
            assert not container["image"].endswith(":latest") and ":" in container["image"]
            for mount in container["volumeMounts"]:
                assert mount.get("readOnly") or mount["mountPath"] in WRITABLE
            by_name = {volume["name"] for volume in spec["volumes"]}
            assert {mount["name"] for mount in container["volumeMounts"]} <= by_name


def test_lock_memory_is_the_only_capability_and_off_by_default(
    rendered: Callable[[str], Objects],
) -> None:
    for name in ("values-cpu.yaml", "values-gpu-small.yaml", "values-production.yaml"):
        for _, pod in pods(rendered(name)):
            for container in containers(pod["spec"]):
                assert "add" not in container["securityContext"]["capabilities"]
    added = {
        component
        for component, pod in pods(rendered("values-all-kubernetes.yaml"))
        for container in containers(pod["spec"])
        if "add" in container["securityContext"]["capabilities"]
    }
    assert added == {"prefill", "decode"}


def test_nothing_may_call_the_kubernetes_api(objects: Objects) -> None:
    kinds = {obj["kind"] for obj in objects}
    assert not kinds & {"Role", "RoleBinding", "ClusterRole", "ClusterRoleBinding"}
    for account in of_kind(objects, "ServiceAccount"):
        assert account["automountServiceAccountToken"] is False
    for _, pod in pods(objects):
        assert pod["spec"]["automountServiceAccountToken"] is False


def test_services_put_no_variables_into_containers(objects: Objects) -> None:
    """A service named baton would set BATON_PORT, which is a setting of workers."""
    for _, pod in pods(objects):
        assert pod["spec"]["enableServiceLinks"] is False


def test_secrets_stand_in_secrets_alone(objects: Objects) -> None:
    secret = "0123456789abcdef0123456789abcdef"
    for obj in objects:
        text = json.dumps(obj)
        assert (secret in text) == (obj["kind"] == "Secret" and secret in text)
        if obj["kind"] != "Secret":
            assert not re.search(r"redis://:[^@\"]+@", text)
    for _, pod in pods(objects):
        for container in containers(pod["spec"]):
            for variable in container.get("env", ()):
                if re.search("SECRET|PASSWORD|URL|AUTH", variable["name"]):
                    assert "secretKeyRef" in variable["valueFrom"]


def test_names_of_secrets_and_settings_exist(objects: Objects) -> None:
    made = {(obj["kind"], obj["metadata"]["name"]) for obj in objects}
    outside = {
        "baton-secrets", "baton-tls", "baton-api-keys", "certificates", "keys", "bucket",
        "public-name", "headers",
    }  # fmt: skip
    keys = {
        obj["metadata"]["name"]: set(obj.get("stringData", {}))
        for obj in of_kind(objects, "Secret")
    }
    for _, pod in pods(objects):
        for volume in pod["spec"]["volumes"]:
            if "configMap" in volume:
                assert ("ConfigMap", volume["configMap"]["name"]) in made
            if "secret" in volume:
                name = volume["secret"]["secretName"]
                assert ("Secret", name) in made or name in outside
            if "persistentVolumeClaim" in volume:
                claim = volume["persistentVolumeClaim"]["claimName"]
                assert claim == "models" or ("PersistentVolumeClaim", claim) in made
        for container in containers(pod["spec"]):
            for source in container.get("envFrom", ()):
                assert source["secretRef"]["name"] in outside
            for variable in container.get("env", ()):
                ref = variable.get("valueFrom", {}).get("secretKeyRef")
                if ref and ref["name"] not in outside:
                    assert ref["key"] in keys[ref["name"]], variable["name"]


def test_selectors_meet_pods_and_ports(objects: Objects) -> None:
    labels = [pod["metadata"]["labels"] for _, pod in pods(objects) if "labels" in pod["metadata"]]
    ports = set[str]()
    for service in of_kind(objects, "Service"):
        selector = {"matchLabels": service["spec"]["selector"]}
        (chosen,) = (pod for _, pod in pods(objects) if matches(selector, _labels(pod)))
        own = {
            port["name"]: port["containerPort"]
            for container in containers(chosen["spec"])
            for port in container.get("ports", ())
        }
        ports |= own.keys()
        for port in service["spec"]["ports"]:
            assert port["targetPort"] in own
            assert port["port"] == own[port["targetPort"]]
    ports |= {
        port["name"]
        for _, pod in pods(objects)
        for container in containers(pod["spec"])
        for port in container.get("ports", ())
    }
    for budget in of_kind(objects, "PodDisruptionBudget"):
        assert sum(matches(budget["spec"]["selector"], each) for each in labels) == 1
    for deployment in of_kind(objects, "Deployment"):
        template = deployment["spec"]["template"]["metadata"]["labels"]
        assert matches(deployment["spec"]["selector"], template)
    for policy in of_kind(objects, "NetworkPolicy"):
        assert any(matches(policy["spec"]["podSelector"], each) for each in labels)
        for rule in policy["spec"].get("ingress", []) + policy["spec"].get("egress", []):
            for port in rule.get("ports", ()):
                assert isinstance(port["port"], int) or port["port"] in ports
    for monitor in of_kind(objects, "ServiceMonitor"):
        services = of_kind(objects, "Service")
        (service,) = (
            s for s in services if matches(monitor["spec"]["selector"], s["metadata"]["labels"])
        )
        wanted = {endpoint["port"] for endpoint in monitor["spec"]["endpoints"]}
        assert wanted <= {port["name"] for port in service["spec"]["ports"]}
    for monitor in of_kind(objects, "PodMonitor"):
        (chosen,) = (
            pod for _, pod in pods(objects) if matches(monitor["spec"]["selector"], _labels(pod))
        )
        named = {port["name"] for port in chosen["spec"]["containers"][0]["ports"]}
        assert {each["port"] for each in monitor["spec"]["podMetricsEndpoints"]} <= named


def _labels(pod: dict[str, Any]) -> dict[str, str]:
    labels: dict[str, str] = pod["metadata"].get("labels", {})
    return labels


def test_the_test_hook_asks_a_port_that_answers_it(objects: Objects) -> None:
    """By the name of a service, at a port that the policies open for it; doors with TLS may ask
    for a certificate."""
    (hook,) = (o for o in objects if o["kind"] == "Pod")
    url = _parse(hook["spec"]["containers"][0]["command"]).url
    name, port = re.fullmatch(r"http://([a-z0-9-]+):([0-9]+)", url).groups()
    (service,) = (s for s in of_kind(objects, "Service") if s["metadata"]["name"] == name)
    (target,) = (p for p in service["spec"]["ports"] if p["port"] == int(port))
    assert target["appProtocol" if "appProtocol" in target else "protocol"] in ("http", "TCP")
    (router,) = (
        p["spec"]
        for p in of_kind(objects, "NetworkPolicy")
        if p["metadata"]["name"].endswith("-router")
    )
    opened = [
        rule["ports"]
        for rule in router["ingress"]
        if any(
            matches(peer["podSelector"], hook["metadata"]["labels"])
            for peer in rule["from"]
            if peer.get("podSelector")
        )
    ]
    assert any({"protocol": "TCP", "port": target["targetPort"]} in ports for ports in opened)


def test_keys_of_the_front_doors_are_in_router_pods_alone(objects: Objects) -> None:
    for component, pod in pods(objects):
        names = {volume["name"] for volume in pod["spec"]["volumes"]}
        assert component == "router" or "door-tls" not in names


def test_routes_lead_to_the_routers_service(objects: Objects) -> None:
    services = {s["metadata"]["name"]: s for s in of_kind(objects, "Service")}
    for route in of_kind(objects, "HTTPRoute") + of_kind(objects, "GRPCRoute"):
        for rule in route["spec"]["rules"]:
            for backend in rule["backendRefs"]:
                ports = [port["port"] for port in services[backend["name"]]["spec"]["ports"]]
                assert backend["port"] in ports
    for ingress in of_kind(objects, "Ingress"):
        for rule in ingress["spec"]["rules"]:
            for path in rule["http"]["paths"]:
                backend = path["backend"]["service"]
                names = [port["name"] for port in services[backend["name"]]["spec"]["ports"]]
                assert backend["port"]["name"] in names
                assert path["path"] == "/v1"


def test_pods_may_take_as_long_as_they_drain(objects: Objects) -> None:
    settings = next(o for o in objects if o["metadata"]["name"].endswith("-settings"))["data"]
    values = {name.split(".")[0]: yaml.safe_load(text) for name, text in settings.items()}
    drains = {pool: values[pool].get("drain_s", 20) for pool in ("prefill", "decode")}
    for component, pod in pods(objects):
        grace_s = pod["spec"].get("terminationGracePeriodSeconds", 30)
        container = pod["spec"]["containers"][0]
        command = container.get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command")
        if component in drains:
            # A worker's own stop takes up to 10 s more.
            assert grace_s >= drains[component] + 15
            args = _parse(command)
            assert args.config.as_posix() == f"/etc/baton/{component}.yaml"
            assert args.timeout == drains[component]
        elif component == "pair":
            assert grace_s >= max(drains.values()) + 15
            assert _parse(command).timeout == max(drains.values())
        elif component == "router":
            args = _parse(command)
            assert grace_s >= args.delay + args.timeout + 15
            assert args.timeout >= values["router"]["edge"]["stop_grace_s"]
            assert args.router.endswith(f":{values['router']['copy']['own_port']}")


def test_probes_ask_what_exists(objects: Objects) -> None:
    from services.router.edge.http_app import HttpApp  # noqa: F401  (the routes below are its own)

    source = (CHART.parents[2] / "services/router/edge/http_app.py").read_text()
    of_planner = (CHART.parents[2] / "services/planner/metrics_port.py").read_text()
    for component, pod in pods(objects):
        if component == "Pod":
            continue
        container = pod["spec"]["containers"][0]
        ports = {port["name"] for port in container.get("ports", ())}
        for kind in ("startupProbe", "livenessProbe", "readinessProbe"):
            probe = container[kind]
            if "httpGet" in probe:
                path = probe["httpGet"]["path"]
                if component == "planner":
                    assert f'"{path}"' in of_planner
                else:
                    assert f'"{path}": {{"GET"' in source
                assert probe["httpGet"]["port"] in ports
            else:
                command = probe["exec"]["command"]
                assert probe["timeoutSeconds"] >= 3
                if component != "redis":
                    args = _parse(command)
                    assert args.timeout < probe["timeoutSeconds"]
        if component == "router":
            # A router without workers is not to be started again.
            assert "/health" not in json.dumps(container["livenessProbe"])
            assert container["readinessProbe"]["httpGet"]["path"] == "/health"


def test_ready_needs_all_workers_of_the_pod(rendered: Callable[[str], Objects]) -> None:
    (pair,) = (
        pod
        for component, pod in pods(rendered("values-gpu-unequal-tp.yaml"))
        if component == "pair"
    )
    container = pair["spec"]["containers"][0]
    assert _parse(container["readinessProbe"]["exec"]["command"]).count == 6
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "8"


@pytest.mark.filterwarnings("ignore")
def test_the_serve_config_fits_the_cluster(objects: Objects) -> None:
    from services.launch.serve_app import RESOURCE_PREFIX, AppArgs, build_app

    for service in of_kind(objects, "RayService"):
        (application,) = yaml.safe_load(service["spec"]["serveConfigV2"])["applications"]
        assert application["import_path"] == f"{build_app.__module__}:{build_app.__name__}"
        args = AppArgs(**application["args"])
        offered: dict[str, int] = {}
        cluster = service["spec"]["rayClusterConfig"]
        assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
        for group in cluster["workerGroupSpecs"]:
            resources = json.loads(json.loads(group["rayStartParams"]["resources"].strip("'")))
            for name, count in resources.items():
                offered[name] = offered.get(name, 0) + count * group["replicas"]
            limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
            gpus = int(limits.get("nvidia.com/gpu", 0))
            assert int(group["rayStartParams"]["num-gpus"]) == gpus
        assert offered == {
            f"{RESOURCE_PREFIX}router": args.num_routers,
            f"{RESOURCE_PREFIX}prefill": args.num_prefill,
            f"{RESOURCE_PREFIX}decode": args.num_decode,
        }


def test_networks_are_closed_but_for_what_is_needed(objects: Objects) -> None:
    policies = {
        p["metadata"]["name"].rsplit("-", 1)[-1]: p["spec"]
        for p in of_kind(objects, "NetworkPolicy")
    }
    deny = policies["deny"]
    assert deny["policyTypes"] == ["Ingress", "Egress"]
    assert "ingress" not in deny and "egress" not in deny
    covered = [pod["metadata"]["labels"] for component, pod in pods(objects) if component != "Pod"]
    assert covered and all(matches(deny["podSelector"], labels) for labels in covered)
    assert _edges(objects) <= _allowed(objects)


def test_workers_hear_routers_and_workers_only(rendered: Callable[[str], Objects]) -> None:
    for name in ("values-cpu.yaml", "values-all-kubernetes.yaml", "values-pvc.yaml"):
        edges = _edges(rendered(name))
        for pool in ("prefill", "decode"):
            assert {source for source, target in edges if target == pool} == {
                "router", "prefill", "decode",
            }  # fmt: skip
        assert {source for source, target in edges if target == "redis"} <= {
            "router", "prefill", "decode",
        }  # fmt: skip
        assert ("redis", "router") not in edges


def test_routers_alone_reach_a_collector_and_only_where_there_is_one(
    rendered: Callable[[str], Objects],
) -> None:
    monitoring = {
        "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}
    }
    found = {}
    for name in ("values-cpu.yaml", "values-all-kubernetes.yaml"):
        found[name] = [
            (policy["metadata"]["name"], rule["ports"])
            for policy in of_kind(rendered(name), "NetworkPolicy")
            for rule in policy["spec"].get("egress", ())
            if monitoring in rule["to"]
        ]
    assert found == {
        "values-cpu.yaml": [],
        "values-all-kubernetes.yaml": [("everything-router", [{"protocol": "TCP", "port": 4318}])],
    }


def test_pools_are_kept_close_and_spread(rendered: Callable[[str], Objects]) -> None:
    for component, pod in pods(rendered("values-cpu.yaml")):
        if component in ("prefill", "decode"):
            terms = pod["spec"]["affinity"]["podAffinity"][
                "preferredDuringSchedulingIgnoredDuringExecution"
            ]
            other = "decode" if component == "prefill" else "prefill"
            for term in terms:
                labels = term["podAffinityTerm"]["labelSelector"]["matchLabels"]
                assert labels["app.kubernetes.io/component"] == other
        if component in ("prefill", "decode", "router"):
            (spread,) = pod["spec"]["topologySpreadConstraints"]
            assert matches(spread["labelSelector"], pod["metadata"]["labels"])


def test_scaling_asks_for_metrics_that_exist(rendered: Callable[[str], Objects]) -> None:
    known = {s.name for s in (*metrics.ALL_SERIES, *PLANNER_SERIES)}
    scaled = of_kind(rendered("values-all-kubernetes.yaml"), "ScaledObject")
    targets = {
        o["metadata"]["name"] for o in of_kind(rendered("values-all-kubernetes.yaml"), "Deployment")
    }
    assert len(scaled) == 2
    for each in scaled:
        assert each["spec"]["scaleTargetRef"]["name"] in targets
        (trigger,) = each["spec"]["triggers"]
        (name,) = re.findall(r"baton_\w+", trigger["metadata"]["query"])
        assert name in known


# Names of objects and of examples; a package index has none of them.
KNOWN_DOMAINS = (
    ".kubernetes.io", ".k8s.io", ".helm.sh", ".nvidia.com", ".monitoring.coreos.com", ".docker.io",
    ".example.com", ".ray.io", ".keda.sh", ".json-schema.org", ".baton.sh",
)  # fmt: skip
DOMAIN = re.compile(r"\b(?:[a-z0-9-]+\.)+(?:org|com|io|net|dev|ai|sh|cloud|eu|cn)\b", re.IGNORECASE)


def test_images_name_no_package_index() -> None:
    for path in [*CHART.rglob("*"), *(CHART.parents[1] / "docker").rglob("*")]:
        if path.is_file():
            text = path.read_text()
            named = {name.lower() for name in DOMAIN.findall(text)}
            assert not {n for n in named if not f".{n}".endswith(KNOWN_DOMAINS)}, path
            assert not re.search(r"\bpypi\b|index-url +http", text), path


def _parse(command: list[str]) -> Any:
    assert command[0] == "baton" and command[1] in COMMANDS
    return _parser({command[1]: _load(command[1])}).parse_args(command[1:])


def _edges(objects: Objects) -> set[tuple[str, str]]:
    """Who of the release reaches whom: a policy of both ends allows it."""
    specs = [policy["spec"] for policy in of_kind(objects, "NetworkPolicy")]
    named = {component: pod["metadata"]["labels"] for component, pod in pods(objects)}
    named.pop("Pod", None)
    found = set()
    for source, source_labels in named.items():
        for target, target_labels in named.items():
            # "clients" names every pod of the namespace; what is left of it is what egress allows.
            if _permits(specs, "ingress", target_labels, source_labels) and _permits(
                specs, "egress", source_labels, target_labels
            ):
                found.add((source, target))
    return found


def _permits(
    specs: list[dict[str, Any]], way: str, owner: dict[str, str], other: dict[str, str]
) -> bool:
    return any(
        "podSelector" in peer
        and "namespaceSelector" not in peer
        and matches(peer["podSelector"], other)
        for spec in specs
        if matches(spec["podSelector"], owner)
        for rule in spec.get(way, ())
        for peer in rule.get("from" if way == "ingress" else "to", ())
    )


def _allowed(objects: Objects) -> set[tuple[str, str]]:
    workers = {c for c, _ in pods(objects)} & {"prefill", "decode", "pair"}
    members = workers | {"router"}
    allowed = {("router", worker) for worker in workers}
    allowed |= {(a, b) for a in workers for b in workers}
    if of_kind(objects, "RayService"):
        members |= {"head"}
        allowed |= {(a, b) for a in members for b in members}
    allowed |= {("planner", "router")}
    return allowed | {(member, "redis") for member in members}


@pytest.mark.parametrize("name", ["values-cpu.yaml"])
def test_a_closed_network_has_no_way_from_redis(
    rendered: Callable[[str], Objects], name: str
) -> None:
    assert not any(source == "redis" for source, _ in _edges(rendered(name)))
