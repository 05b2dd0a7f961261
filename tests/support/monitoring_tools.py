"""Prometheus, promtool, Alertmanager and amtool: those that are installed, else those of the
distribution's packages, unpacked into the user's cache on first use.

Nothing is installed, and nothing here needs to be root. Alertmanager reads its templates from a
fixed place; where that is not there it runs with the unpacked one mounted over it, in a mount
namespace of its own.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

PACKAGES = ("prometheus", "prometheus-alertmanager")
FETCH_TIMEOUT_S = 120
TEMPLATES = Path("/usr/share/prometheus/alertmanager/default.tmpl")
HOW_TO_INSTALL = (
    "the tests of rules and dashboards need prometheus, promtool, alertmanager and amtool: install "
    f"the packages {' and '.join(PACKAGES)} of Debian or Ubuntu, or put the four on the PATH"
)


@dataclass(frozen=True, slots=True)
class MonitoringTools:
    """Commands to run; `alertmanager` takes its arguments after these words."""

    prometheus: Path
    promtool: Path
    amtool: Path
    alertmanager: tuple[str, ...]

    def run(self, tool: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        """promtool or amtool, to its end; what it says is in `stdout`."""
        return subprocess.run(
            [tool, *map(str, arguments)], text=True, timeout=60,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip


def monitoring_tools() -> MonitoringTools:
    """Raises RuntimeError, saying what to install, when there is no way to have them."""
    found = [
        shutil.which(name)
        for name in ("prometheus", "promtool", "amtool", "alertmanager", "prometheus-alertmanager")
    ]
    if all(found[:3]) and any(found[3:]):
        tools = [Path(path) for path in found[:3] if path]
        return MonitoringTools(*tools, alertmanager=(str(found[3] or found[4]),))
    root = _unpacked()
    binaries = root / "usr/bin"
    return MonitoringTools(
        *(binaries / name for name in ("prometheus", "promtool", "amtool")),
        alertmanager=_with_templates(root, binaries / "prometheus-alertmanager"),
    )


def _with_templates(root: Path, binary: Path) -> tuple[str, ...]:
    if TEMPLATES.exists():
        return (str(binary),)
    # `exec` and no fork: signals reach Alertmanager itself.
    script = (
        f'mount -t overlay overlay -o "lowerdir={root}/usr/share:/usr/share" /usr/share '
        f'&& exec "{binary}" "$@"'
    )
    who = () if os.geteuid() == 0 else ("--map-root-user",)
    return ("unshare", "--mount", *who, "sh", "-c", script, "alertmanager")


def _unpacked() -> Path:
    """The folder with the packages' files."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "baton-tests"
    folder = cache / "monitoring"
    if not folder.is_dir():
        if not (shutil.which("apt-get") and shutil.which("dpkg")):
            raise RuntimeError(f"{HOW_TO_INSTALL} (there is no apt-get to fetch them with)")
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            root = Path(scratch) / "root"
            root.mkdir()
            _unpack(Path(scratch), root)
            # Another run may have been faster; what it has made is the same.
            if not folder.is_dir():
                os.replace(root, folder)
    return folder


def _unpack(scratch: Path, root: Path) -> None:
    """By the machine's own lists of packages, or fresh ones where these are old or missing."""
    own = ["-o", "APT::Sandbox::User=", "-o", f"Dir::Cache={scratch}/cache"]
    fresh = [*own, "-o", f"Dir::State::lists={scratch}/lists"]
    (scratch / "cache/archives/partial").mkdir(parents=True)
    (scratch / "lists/partial").mkdir(parents=True)
    options = own
    try:
        _run(["apt-get", *options, "download", *PACKAGES], scratch)
    except RuntimeError:
        options = fresh
        # A list that cannot be fetched is a warning; the packages may be in another one.
        _run(["apt-get", *options, "update"], scratch, is_needed=False)
        _run(["apt-get", *options, "download", *PACKAGES], scratch)
    _extract(scratch, root)
    # Newer releases have a package for each of them.
    apart = [name for name in ("promtool", "amtool") if not (root / "usr/bin" / name).exists()]
    if apart:
        _run(["apt-get", *options, "download", *apart], scratch)
        _extract(scratch, root)


def _extract(scratch: Path, root: Path) -> None:
    for package in scratch.glob("*.deb"):
        _run(["dpkg", "-x", str(package), str(root)], scratch)
        package.unlink()


def _run(command: Sequence[str], folder: Path, *, is_needed: bool = True) -> None:
    try:
        done = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, timeout=FETCH_TIMEOUT_S
        )
    except subprocess.TimeoutExpired:
        text = f"took more than {FETCH_TIMEOUT_S} s"
    else:
        if done.returncode == 0:
            return
        text = done.stderr.strip()[-500:]
    if is_needed:
        raise RuntimeError(f"{HOW_TO_INSTALL}. `{' '.join(command[:1])}` did not help: {text}")
