"""Strict checks of Kubernetes objects: built-in kinds, custom resources, and rules in CEL."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cel
import jsonschema
import kubernetes_validate

Object = dict[str, Any]
Schema = dict[str, Any]


class CustomKinds:
    """Schemas of custom resources, where an unknown field is an error."""

    def __init__(self, folder: Path) -> None:
        self._schemas: dict[tuple[str, str], Schema] = {}
        for file in folder.glob("*.json"):
            crd = json.loads(file.read_text())
            self._schemas[f"{crd['group']}/{crd['version']}", crd["kind"]] = crd["schema"]
        self._validators = {
            kind: jsonschema.Draft7Validator(_strict(schema, is_root=True))
            for kind, schema in self._schemas.items()
        }

    def knows(self, obj: Object) -> bool:
        return (obj["apiVersion"], obj["kind"]) in self._schemas

    def errors(self, obj: Object) -> list[str]:
        kind = obj["apiVersion"], obj["kind"]
        return [
            f"{'/'.join(map(str, error.absolute_path))}: {error.message[:200]}"
            for error in self._validators[kind].iter_errors(obj)
        ] + list(_rules(self._schemas[kind], _with_defaults(self._schemas[kind], obj), ""))


def builtin_errors(obj: Object, version: str) -> list[str]:
    """Of a built-in kind under the schemas of one Kubernetes version, such as 1.35."""
    try:
        kubernetes_validate.validate(obj, version, strict=True)
    except kubernetes_validate.ValidationError as error:
        return [f"{'/'.join(map(str, error.path))}: {error.message[:200]}"]
    return []


def pod_templates(obj: Object) -> list[Object]:
    """Everything in `obj` that becomes a pod, with metadata and spec."""
    spec = obj.get("spec", {})
    if obj["kind"] == "Pod":
        return [{"metadata": obj["metadata"], "spec": spec}]
    if obj["kind"] in ("Deployment", "StatefulSet", "Job"):
        return [spec["template"]]
    if obj["kind"] == "RayService":
        cluster = spec["rayClusterConfig"]
        groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
        return [group["template"] for group in groups]
    return []


def as_pod(template: Object) -> Object:
    metadata = {"name": "pod", **template["metadata"]}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": template["spec"]}


def _strict(schema: Any, *, is_root: bool = False) -> Any:
    """As JSON schema, with fields that it does not list refused."""
    if not isinstance(schema, dict):
        return schema
    made = dict(schema)
    if made.get("x-kubernetes-int-or-string"):
        made.pop("type", None)
        made["anyOf"] = [{"type": "integer"}, {"type": "string"}]
    if made.get("nullable") and isinstance(made.get("type"), str):
        made["type"] = [made["type"], "null"]
    if "properties" in made:
        made["properties"] = {name: _strict(part) for name, part in made["properties"].items()}
        if not made.get("x-kubernetes-preserve-unknown-fields"):
            made.setdefault("additionalProperties", False)
    for inner in ("items", "additionalProperties"):
        if isinstance(made.get(inner), dict):
            made[inner] = _strict(made[inner])
    if is_root:
        named = {"apiVersion": {"type": "string"}, "kind": {"type": "string"}}
        made["properties"] = {**made["properties"], **named, "metadata": {"type": "object"}}
    return made


def _rules(schema: Schema, value: Any, path: str) -> Iterator[str]:
    """Broken rules; those about a change need an earlier object and are left out."""
    if value is None:
        return
    for rule in schema.get("x-kubernetes-validations") or ():
        if (
            "oldSelf" not in rule["rule"]
            and cel.evaluate(rule["rule"], {"self": value}) is not True
        ):
            yield f"{path}: {rule.get('message') or rule['rule']}"
    if isinstance(value, dict):
        extra = schema.get("additionalProperties")
        for name, part in value.items():
            inner = schema.get("properties", {}).get(name, extra)
            if isinstance(inner, dict):
                yield from _rules(inner, part, f"{path}/{name}")
    elif isinstance(value, list) and isinstance(schema.get("items"), dict):
        for index, part in enumerate(value):
            yield from _rules(schema["items"], part, f"{path}/{index}")


def _with_defaults(schema: Schema, value: Any) -> Any:
    """As the API server fills it in before it looks at the rules."""
    if isinstance(value, list) and isinstance(schema.get("items"), dict):
        return [_with_defaults(schema["items"], part) for part in value]
    if not isinstance(value, dict):
        return value
    parts = schema.get("properties", {})
    defaults = {name: part["default"] for name, part in parts.items() if "default" in part}
    extra = schema.get("additionalProperties")
    return {
        name: _with_defaults(inner, part)
        if isinstance(inner := parts.get(name, extra), dict)
        else part
        for name, part in {**defaults, **value}.items()
    }
