"""The private folder of one running system: registry, settings and logs of its processes."""

from __future__ import annotations

import secrets
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml


@dataclass(frozen=True, slots=True)
class RunDirectory:
    """Readable by its owner only; removed when the system has stopped cleanly."""

    path: Path

    @classmethod
    def create(cls, path: Path | None = None) -> RunDirectory:
        """Use `path`, or a new temporary folder when it is None."""
        if path is None:
            path = Path(tempfile.mkdtemp(prefix="baton-"))
        else:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
        for name in ("registry", "logs"):
            (path / name).mkdir(mode=0o700, exist_ok=True)
        return cls(path)

    @property
    def registry(self) -> Path:
        return self.path / "registry"

    @property
    def targets(self) -> Path:
        """Where several router copies say at which address each can be asked."""
        return self.path / "targets"

    def log_file(self, name: str) -> Path:
        return self.path / "logs" / f"{name}.log"

    def write_settings(self, name: str, values: Mapping[str, Any]) -> Path:
        """Store one process's settings; the file may hold a secret, hence its mode."""
        file = self.path / f"{name}.yaml"
        file.touch(mode=0o600)
        file.write_text(yaml.safe_dump(dict(values)))
        return file

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)


def new_secret() -> str:
    """A cluster secret of 256 bits, as hex digits."""
    return secrets.token_hex(32)
