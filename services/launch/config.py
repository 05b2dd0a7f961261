"""One configuration for the whole system, and what each process gets of it.

A file holds `system`-level keys (below) and one section per kind of process, whose keys are those
of that process's own configuration. Nothing here knows how processes are started.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from baton.core.config import build, merge
from baton.core.errors import ConfigError
from baton.core.worker_info import Role
from baton.registry.redis_connection import check_deployment, check_redis_url
from services.router.edge.door_tls_config import DoorTlsConfig

MAX_ROUTERS = 64
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
    num_routers: int = 1
    """Copies of the router; all answer at the ports above."""
    redis_url: str | None = field(default=None, repr=False)
    """What the copies share lies there, and workers announce themselves there. None: with Ray an
    actor keeps it; without, each copy grants its share of the quotas."""
    deployment: str | None = None
    """Names this system among others in the same Redis; None makes it of host name and port."""
    num_prefill: int = 1
    num_decode: int = 1
    autoscale: Mapping[str, Any] = field(default_factory=dict)
    """Workers come and go with the load, see `autoscale_config.py`."""
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
        if not 1 <= self.num_routers <= MAX_ROUTERS:
            raise ConfigError(
                f"num_routers must be between 1 and {MAX_ROUTERS}, got {self.num_routers}"
            )
        if self.redis_url is not None:
            check_redis_url("redis_url", self.redis_url)
        check_deployment("deployment", self.deployment_name)
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
    def door_tls(self) -> DoorTlsConfig:
        """TLS towards clients. Raises ConfigError."""
        edge = self.router.get("edge", {})
        values = edge.get("tls", {}) if isinstance(edge, Mapping) else {}
        return build(DoorTlsConfig, values, where="router.edge.tls.")

    @property
    def has_own_ports(self) -> bool:
        """Each router has a port of its own for metrics and health: several share the front doors,
        or these ask for more than a probe can show."""
        return self.num_routers > 1 or self.door_tls.is_on

    @property
    def deployment_name(self) -> str:
        if self.deployment is not None:
            return self.deployment
        host = re.sub(r"[^A-Za-z0-9-]", "-", socket.gethostname())[:48].strip("-")
        return f"{host or 'host'}-{self.http_port}"

    @property
    def served_model_name(self) -> str:
        return self.model_name or self.model_path.resolve().name


def worker_values(system: SystemConfig, role: Role, index: int) -> dict[str, Any]:
    """The settings of one worker, short of where it announces itself."""
    sections = {Role.PREFILL: system.prefill, Role.DECODE: system.decode}
    section, other = sections[role], sections[role.other]
    announced = {"url": system.redis_url, "deployment": system.deployment_name}
    return merge(
        {
            "registry": announced if system.redis_url is not None else {},
            "model_name": system.served_model_name,
            "worker_id": f"{role.value}-{index}",
            "drain_s": LOCAL_DRAIN_S,
            "engine": {"model_path": str(system.model_path)},
            "other_engine": merge({"model_path": str(system.model_path)}, other.get("engine", {})),
        },
        section,
    )


def router_values(
    system: SystemConfig, *, index: int = 0, targets_dir: Path | None = None, use_ray: bool = False
) -> dict[str, Any]:
    """The settings of one router copy, short of a registry directory.

    `targets_dir`: where copies with ports of their own say at which address each can be asked.
    """
    copy: dict[str, Any] = {}
    if system.has_own_ports:
        copy = {
            "shares_ports": system.num_routers > 1,
            "own_port": 0,
            "targets_dir": None if targets_dir is None else str(targets_dir),
            "name": f"router-{index}" if system.num_routers > 1 and not use_ray else "router",
        }
    return merge(
        {
            "shared": _shared_values(system, use_ray=use_ray),
            "copy": copy,
            "host": system.host,
            "http_port": system.http_port,
            "grpc_port": system.grpc_port,
            "model_path": str(system.model_path),
            "model_name": system.served_model_name,
            "health": {"required_roles": [role.value for role in system.roles]},
        },
        system.router,
    )


def _shared_values(system: SystemConfig, *, use_ray: bool) -> dict[str, Any]:
    """Where the copies keep what they share."""
    if system.redis_url is not None:
        return {"url": system.redis_url, "deployment": system.deployment_name}
    if system.num_routers == 1:
        return {}
    if use_ray:
        return {"place": "ray", "deployment": system.deployment_name}
    return {"num_copies": system.num_routers}
