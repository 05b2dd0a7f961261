"""Settings of a router as one of several copies on a machine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from baton.core.errors import ConfigError


@dataclass(frozen=True, slots=True)
class CopyConfig:
    """Several copies answer at one address; each can also be asked by itself."""

    shares_ports: bool = False
    """http_port and grpc_port are those of other copies too; the system spreads new connections
    over them (SO_REUSEPORT). A copy listens there once it is ready, so that no request meets one
    without workers."""
    own_port: int | None = None
    """Another HTTP port, of this copy alone: its /metrics and /health. 0 takes any free port. None:
    no such port."""
    targets_dir: Path | None = None
    """Where the copy says at which address it can be asked by itself, in a file of the format that
    Prometheus reads with file_sd_configs. Gone when the copy stops."""
    name: str = "router"
    """Of that file, and the value of its label `copy`."""

    def __post_init__(self) -> None:
        if self.own_port is not None and not 0 <= self.own_port <= 65535:
            raise ConfigError(f"copy.own_port must be between 0 and 65535, got {self.own_port}")
        if self.targets_dir is not None and self.own_port is None:
            raise ConfigError(
                "copy.targets_dir is set and copy.own_port is not; set it, 0 takes any free port"
            )
        if not self.name or "/" in self.name:
            raise ConfigError(f"copy.name must be a file name, got {self.name!r}")
