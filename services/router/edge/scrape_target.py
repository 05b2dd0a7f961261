"""Where one router copy can be asked for its metrics and health, as a file for Prometheus and for
whoever started the copies.

    [{"targets": ["127.0.0.1:40123"], "labels": {"copy": "router-0", "pid": "4711"}}]
"""

from __future__ import annotations

import contextlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

from baton.core.errors import ConfigError
from baton.process import process_exists

SUFFIX = ".json"


@dataclass(frozen=True, slots=True)
class ScrapeTarget:
    """One copy, as its file says."""

    address: str
    """host:port"""
    name: str
    pid: int


def reachable_host(host: str) -> str:
    """Where this machine reaches a server that listens on `host`, as it stands in a URL."""
    if host in ("0.0.0.0", "::"):
        return "127.0.0.1" if host == "0.0.0.0" else "[::1]"
    return f"[{host}]" if ":" in host else host


def write_target(directory: Path, target: ScrapeTarget) -> Path:
    """Write or replace the file of copy `target.name`. Raises ConfigError."""
    entry = {
        "targets": [target.address],
        "labels": {"copy": target.name, "pid": str(target.pid)},
    }
    path = directory / f"{target.name}{SUFFIX}"
    _sweep(directory)
    draft = directory / f".{target.name}.{os.getpid()}"
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        # Whole or not at all: Prometheus may read at any time.
        draft.write_text(json.dumps([entry]))
        draft.replace(path)
    except OSError as error:
        raise ConfigError(f"copy.targets_dir {directory}: {error.strerror}") from error
    return path


def remove_target(directory: Path, target: ScrapeTarget) -> None:
    """Remove the file unless it is another process's by now."""
    path = directory / f"{target.name}{SUFFIX}"
    with contextlib.suppress(OSError):
        if read_target(path) == target:
            path.unlink(missing_ok=True)


def read_targets(directory: Path) -> list[ScrapeTarget]:
    """The copies whose processes live, by name."""
    found = [read_target(path) for path in sorted(directory.glob(f"*{SUFFIX}"))]
    return [target for target in found if target is not None and process_exists(target.pid)]


def read_target(path: Path) -> ScrapeTarget | None:
    """None for what is missing or is no such file."""
    try:
        (entry,) = json.loads(path.read_text())
        (address,) = entry["targets"]
        labels = entry["labels"]
        return ScrapeTarget(str(address), str(labels["copy"]), int(labels["pid"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _sweep(directory: Path) -> None:
    """Copies that were killed leave their files behind."""
    for path in directory.glob(f"*{SUFFIX}"):
        target = read_target(path)
        if target is not None and not process_exists(target.pid):
            path.unlink(missing_ok=True)
