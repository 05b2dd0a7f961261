"""A worker's registration as JSON, for registries that keep it as text."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from typing import Any

from baton.core.config import build
from baton.core.errors import ConfigError
from baton.core.worker_info import WorkerInfo

FORMAT = 1
_WORKER_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


def check_worker_id(worker_id: str) -> None:
    """Raises ConfigError."""
    if not _WORKER_ID.fullmatch(worker_id):
        raise ConfigError(
            f"worker id {worker_id!r} is not usable; take 1 to 128 of A-Z a-z 0-9 . _ -"
        )


def info_to_values(info: WorkerInfo) -> dict[str, Any]:
    values = {**dataclasses.asdict(info), "role": info.role.value}
    if info.role_version == 1:
        # Readers of the last release take no key they do not know.
        del values["role_version"]
    return values


def info_from_values(values: Any) -> WorkerInfo:
    """Raises ConfigError or ValueError saying what is wrong."""
    if not isinstance(values, Mapping):
        raise ValueError("a worker's description is not an object")
    info = build(WorkerInfo, values)
    for name in ("worker_id", "epoch", "address"):
        # Any value can be made text; these must have been meant as such.
        if not isinstance(values[name], str) or not values[name]:
            raise ValueError(f"{name} is not a text")
    return info


def registration_values(data: bytes) -> Mapping[str, Any]:
    """The registration that `data` holds as JSON in UTF-8. Raises ValueError."""
    try:
        values = json.loads(data.decode())
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    found = values.get("format") if isinstance(values, Mapping) else None
    if found != FORMAT:
        raise ValueError(f"format {str(found)[:20]}, this version reads {FORMAT}")
    return dict(values)
