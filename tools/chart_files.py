"""Make the parts of the Helm chart that follow from others, or check that they are fresh (--check).

    values.schema.json   from tools/chart_schema.yaml and the program's settings
    README.md            from tools/chart_readme.md and the comments of values.yaml
    files/dashboards/*   from tools/dashboards
    ../examples/*.yaml   what helm makes of each profile

Run by `python -m tools.chart_files`, from the repository's root.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from services.decode.config import DEFAULTS as DECODE_DEFAULTS
from services.planner.planner_config import PlannerConfig
from services.prefill.config import DEFAULTS as PREFILL_DEFAULTS
from services.router.config import RouterConfig
from services.worker.config import WorkerConfig
from tools.dashboards.build import make_dashboards
from tools.helm import Helm, helm_binary
from tools.settings_schema import settings_schema

ROOT = Path(__file__).resolve().parent.parent
CHART = ROOT / "deploy/helm/baton"
EXAMPLES = ROOT / "deploy/helm/examples"
EXAMPLE_SECRET = "an-example-of-a-secret"
ROUTER_OWN = frozenset(
    {
        "model_path", "model_name", "host", "http_port", "grpc_port", "registry_dir", "workers",
        "shared.place", "shared.url", "shared.deployment", "shared.num_copies",
        "copy.shares_ports", "copy.own_port", "copy.targets_dir", "copy.name",
        "tenants.keys_file", "tenants.require_key",
        "edge.tls.cert_file", "edge.tls.key_file", "edge.tls.client_ca_file",
        "tls.ca_file", "tls.cert_file", "tls.key_file", "tls.name",
    }
)  # fmt: skip
"""Settings of a router that the chart makes of other values, or that only suit one machine."""
WORKER_OWN = frozenset(
    {
        "engine.model_path", "other_engine", "role", "model_name", "worker_id", "host", "port",
        "advertise_host",
        "transfer.cluster_secret", "registry.directory", "registry.directory_is_local",
        "registry.url", "registry.deployment",
        "tls.ca_file", "tls.cert_file", "tls.key_file", "tls.name",
    }
)  # fmt: skip
PLANNER_OWN = frozenset(
    {
        "host", "port", "stats.routers", "stats.targets_dir", "decisions.path", "models.profile",
        "models.prefill_tensor_parallel", "models.decode_tensor_parallel",
        "autoscale.prefill.devices_per_worker", "autoscale.decode.devices_per_worker",
    }
)  # fmt: skip
SHOWN_CHARS = 60
_KEY = re.compile(r"^(?P<indent> *)(?P<key>[A-Za-z][A-Za-z0-9]*):(?P<value>.*)$")


def config_schemas() -> dict[str, dict[str, Any]]:
    """What may stand below `config`, by process."""
    return {
        "router": settings_schema(RouterConfig, without=ROUTER_OWN),
        "prefill": settings_schema(WorkerConfig, without=WORKER_OWN, defaults=PREFILL_DEFAULTS),
        "decode": settings_schema(WorkerConfig, without=WORKER_OWN, defaults=DECODE_DEFAULTS),
        "planner": settings_schema(PlannerConfig, without=PLANNER_OWN),
    }


def make_schema() -> str:
    schema = yaml.safe_load((ROOT / "tools/chart_schema.yaml").read_text())
    schema["$defs"].pop("scheduling")
    schema["properties"]["config"] = {
        "type": "object",
        "additionalProperties": False,
        "properties": config_schemas(),
    }
    whole = {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}
    return json.dumps(whole, indent=1, ensure_ascii=False) + "\n"


@dataclass(frozen=True, slots=True)
class Value:
    """One line of the table of values."""

    key: str
    default: str
    text: str


def read_values(text: str) -> list[Value]:
    """The values with the `##` comments above them; a section without a comment of its own is left
    out. Raises ValueError for a value nobody has explained."""
    found = list(_walk(text))
    return [value for value in found if value.text]


def _walk(text: str) -> Iterator[Value]:
    path: list[tuple[int, str]] = []
    comment: list[str] = []
    for line in text.splitlines():
        stripped = line.strip()
        if stripped.startswith("##"):
            comment.append(stripped.removeprefix("##").strip())
            continue
        match = _KEY.match(line)
        if match is None:
            comment = []
            continue
        indent = len(match["indent"])
        while path and path[-1][0] >= indent:
            path.pop()
        path.append((indent, match["key"]))
        default = match["value"].strip()
        if len(default) > SHOWN_CHARS:
            default = default[: SHOWN_CHARS - 1] + "…"
        yield Value(".".join(key for _, key in path), default, " ".join(comment))
        comment = []


def make_readme() -> str:
    head = (ROOT / "tools/chart_readme.md").read_text()
    rows = ["| value | default | what |", "|---|---|---|"]
    for value in read_values((CHART / "values.yaml").read_text()):
        default = f"`{value.default}`" if value.default else ""
        cells = (f"`{value.key}`", default, value.text)
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return head.replace("{values}", "\n".join(rows)).replace("{settings}", _settings_table())


def _settings_table() -> str:
    rows = ["| settings | what they are about |", "|---|---|"]
    for process, schema in config_schemas().items():
        if process == "decode":
            continue
        name = "prefill`, `decode" if process == "prefill" else process
        sections = [n for n, part in schema["properties"].items() if "properties" in part]
        rows.append(f"| `{name}` | {', '.join(f'`{section}`' for section in sections)} |")
    return "\n".join(rows)


def make_examples() -> dict[Path, str]:
    """What each profile renders to, in an order and form of its own."""
    made = {}
    with tempfile.TemporaryDirectory() as home:
        helm = Helm(helm_binary(4), Path(home))
        for profile in sorted(CHART.glob("values-*.yaml")):
            given = yaml.safe_load(profile.read_text()).get("secrets")
            values = {} if given else {"secrets": {"clusterSecret": EXAMPLE_SECRET}}
            objects = helm.template(CHART, profile, values=values)
            objects.sort(key=lambda obj: (obj["kind"], obj["metadata"]["name"]))
            name = profile.name.removeprefix("values-")
            made[EXAMPLES / name] = yaml.safe_dump_all(objects, width=120)
    return made


def files() -> dict[Path, str]:
    """In the order in which they depend on each other."""
    boards = {CHART / "files/dashboards" / name: text for name, text in make_dashboards().items()}
    return {
        CHART / "values.schema.json": make_schema(),
        CHART / "README.md": make_readme(),
        **boards,
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--check", action="store_true", help="change nothing, say what is stale")
    args = parser.parse_args(argv)
    num_stale = 0
    for make in (files, make_examples):
        for path, text in make().items():
            if path.is_file() and path.read_text() == text:
                continue
            num_stale += 1
            if args.check:
                print(f"{path.relative_to(ROOT)} is stale; run python -m tools.chart_files")
            else:
                path.parent.mkdir(exist_ok=True)
                path.write_text(text)
    return int(bool(num_stale) and args.check)


if __name__ == "__main__":
    sys.exit(main())
