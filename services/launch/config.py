"""One configuration for the whole system, and what each process gets of it.

A file holds `system`-level keys (below) and one section per kind of process, whose keys are those
of that process's own configuration. Nothing here knows how processes are started.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from baton.core.config import merge
from baton.core.errors import ConfigError
from baton.core.worker_info import Role

LOCAL_DRAIN_S = 3.0
"""A person pressed Ctrl-C and waits: short, so that all is over within ten seconds."""


@dataclass(frozen=True, slots=True)
class SystemConfig:
    """Checked here for what concerns several processes; each process checks its own section."""

    model_path: Path
    """A Hugging Face folder."""
    model_name: str | None = None
    """The name clients use; None takes the folder's name."""
    host: str = "127.0.0.1"
    """Address of the HTTP and gRPC front doors. Workers always listen on loopback here."""
    http_port: int = 8000
    grpc_port: int = 9000
    num_prefill: int = 1
    num_decode: int = 1
    router: Mapping[str, Any] = field(default_factory=dict)
    prefill: Mapping[str, Any] = field(default_factory=dict)
    decode: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("http_port", "grpc_port"):
            port = getattr(self, name)
            if not 1 <= port <= 65535:
                raise ConfigError(f"{name} must be between 1 and 65535, got {port}")
        if self.http_port == self.grpc_port:
            raise ConfigError(
                f"http_port and grpc_port are both {self.http_port}; they must differ"
            )
        if self.num_decode < 1 or self.num_prefill < 0:
            raise ConfigError(
                f"{self.num_prefill} prefill and {self.num_decode} decode workers cannot serve; "
                "at least one decode worker is needed"
            )

    @property
    def roles(self) -> tuple[Role, ...]:
        """The pools this system has."""
        return (Role.PREFILL, Role.DECODE) if self.num_prefill else (Role.DECODE,)

    @property
    def served_model_name(self) -> str:
        return self.model_name or self.model_path.resolve().name


def worker_values(system: SystemConfig, role: Role, index: int) -> dict[str, Any]:
    """The settings of one worker, short of where it announces itself."""
    section = system.prefill if role is Role.PREFILL else system.decode
    return merge(
        {
            "model_name": system.served_model_name,
            "worker_id": f"{role.value}-{index}",
            "drain_s": LOCAL_DRAIN_S,
            "engine": {"model_path": str(system.model_path)},
        },
        section,
    )


def router_values(system: SystemConfig) -> dict[str, Any]:
    """The settings of the router, short of where it finds its workers."""
    return merge(
        {
            "host": system.host,
            "http_port": system.http_port,
            "grpc_port": system.grpc_port,
            "model_path": str(system.model_path),
            "model_name": system.served_model_name,
            "health": {"required_roles": [role.value for role in system.roles]},
        },
        system.router,
    )
