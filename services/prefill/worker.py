"""One prefill worker: the shared worker program with this pool's defaults."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from baton.core.worker_info import Role
from services.prefill.config import DEFAULTS
from services.worker.config import load_worker_config
from services.worker.main import run
from services.worker.worker import WorkerServer

ROLE = Role.PREFILL


def create(
    *,
    file: Path | None = None,
    environ: Mapping[str, str] | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> WorkerServer:
    """A worker to be started inside a running event loop. Raises ConfigError."""
    config = load_worker_config(defaults=DEFAULTS, file=file, environ=environ, overrides=overrides)
    return WorkerServer(config)


def main(argv: Sequence[str] | None = None) -> int:
    """The process's entry point; returns the exit status."""
    return run(ROLE, DEFAULTS, argv)
