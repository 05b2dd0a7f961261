"""The image's recipe: linted, unprivileged, whole, and its steps done here without a container."""

from __future__ import annotations

import fnmatch
import json
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

import pytest

from baton.cli.main import COMMANDS, _load, _parser
from chart import CHART, ROOT

DOCKER = ROOT / "deploy/docker"
RECIPE = DOCKER / "Dockerfile"
BUILD_TOOLS = r"\b(gcc|g\+\+|make|cmake|build-essential|libc6-dev|git|curl|wget)\b"


def steps() -> list[str]:
    """Instructions with their continuations joined and comments left out."""
    lines = [x for x in RECIPE.read_text().splitlines() if not x.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [line for line in joined.splitlines() if line.strip()]


def stages() -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    name = ""
    for step in steps():
        if step.startswith("FROM"):
            name = step.split()[-1]
        found.setdefault(name, []).append(step)
    return found


def test_the_recipe_is_linted() -> None:
    binary = Path(sysconfig.get_path("scripts")) / "hadolint"
    done = subprocess.run([str(binary), str(RECIPE)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout


def test_the_image_is_not_root_and_says_how_it_is() -> None:
    final = stages()["final"]
    users = [step.split()[1] for step in final if step.startswith("USER")]
    assert users == ["10001:10001"]
    after = final[final.index("USER 10001:10001") :]
    assert not any(step.startswith(("RUN", "COPY", "ADD")) for step in after)
    values = (CHART / "values.yaml").read_text()
    assert "runAsUser: 10001" in values
    for step in final:
        if step.startswith(("HEALTHCHECK", "CMD")):
            command = json.loads(step[step.index("[") :])
            assert command[0] == "baton" and command[1] in COMMANDS
            _parser({command[1]: _load(command[1])}).parse_args(command[1:])
    assert any(step.startswith("HEALTHCHECK") for step in final)


def test_build_tools_stay_out_of_the_final_stage() -> None:
    made = stages()
    for name in ("wheels", "final"):
        for step in made[name]:
            # Triton compiles launchers at run time: a C compiler for CUDA, and nothing beside it.
            found = set(re.findall(BUILD_TOOLS, step))
            assert not found or (found == {"gcc", "libc6-dev"} and " cuda) apt-get" in step)
            assert not found or "Python.h" in step
    assert "COPY --from=build /opt/baton /opt/baton" in made["final"]


def test_what_is_copied_exists_and_is_all_there_is() -> None:
    copied = [
        source
        for step in stages()["build"]
        if step.startswith("COPY")
        for source in step.split()[1:-1]
        if "$" not in source
    ]
    rules = (ROOT / ".dockerignore").read_text().splitlines()
    kept = [rule[1:] for rule in rules if rule.startswith("!")]
    assert "*" in rules
    for source in copied:
        assert (ROOT / source).exists(), source
        assert any(fnmatch.fnmatch(source, rule) for rule in kept), source
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wanted = project["tool"]["setuptools"]["packages"]["find"]["include"]
    assert {name.rstrip("*") for name in wanted} <= set(copied)


def test_dependencies_are_those_of_the_project() -> None:
    script = DOCKER / "dependencies.py"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    done = subprocess.run(
        [sys.executable, str(script), str(ROOT / "pyproject.toml"), "certs", "tracing"],
        capture_output=True, text=True, check=True, timeout=30,
    )  # fmt: skip
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *extras["certs"], *extras["tracing"]]
    assert done.stdout.splitlines() == wanted


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project as the build stage installs it: a wheel of nothing but what was copied."""
    root = tmp_path_factory.mktemp("image")
    source = root / "src"
    source.mkdir()
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, source)
    for name in ("baton", "kernels", "kvtransfer", "services"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    subprocess.run(
        [
            *(sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check"),
            *("--no-deps", "--no-build-isolation", "-w", str(root), str(source)),
        ],
        check=True, capture_output=True, timeout=120,
    )  # fmt: skip
    (wheel,) = root.glob("*.whl")
    site = root / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    return site


def test_the_installed_project_is_whole(installed: Path) -> None:
    for package in ("baton", "kernels", "kvtransfer", "services"):
        ours = {
            path.relative_to(ROOT)
            for path in (ROOT / package).rglob("*")
            if path.suffix in (".py", ".jinja") or path.name == "py.typed"
        }
        missing = {path for path in ours if not (installed / path).is_file()}
        assert not missing


def test_every_entry_point_starts_from_it(installed: Path, tmp_path: Path) -> None:
    for words in (
        ["baton.cli.main", "--version"],
        ["services.router", "--help"],
        ["services.prefill", "--help"],
        ["services.decode", "--help"],
        ["baton.cli.main", "probe", "router", "live", "--url", "http://127.0.0.1:9"],
    ):
        done = subprocess.run(
            [sys.executable, "-P", "-m", *words],
            cwd=tmp_path,
            env={"PYTHONPATH": str(installed), "HOME": str(tmp_path), "PATH": "/usr/bin:/bin"},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == (1 if "probe" in words else 0), done.stderr
    # A read-only root file system gets no compiled files beside the sources.
    assert not list(tmp_path.iterdir())
