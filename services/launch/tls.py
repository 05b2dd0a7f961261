"""TLS of a system, checked before anything starts: between its processes, with settings from a
folder of `baton certs`, and at the front doors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from baton.core.config import build
from baton.core.errors import ConfigError
from baton.core.tls import TlsConfig, load_material
from services.launch.config import SystemConfig, router_values, worker_values
from services.router.edge.door_tls import load_door_material, refuse_client_ca


def tls_values(folder: Path | None) -> dict[str, dict[str, Any]]:
    """The settings of each section of a system whose certificates lie in `folder`."""
    if folder is None:
        return {}
    # Processes may have other working directories.
    folder = folder.resolve()
    roles = {"router": "router", "prefill": "worker", "decode": "worker"}
    return {section: {"tls": _files(folder, role)} for section, role in roles.items()}


def check_tls(system: SystemConfig) -> None:
    """Raises ConfigError for certificates that do not work, and for processes that could not talk
    to each other."""
    configs = {"router": _config("router", router_values(system))}
    for role in system.roles:
        configs[role.value] = _config(role.value, worker_values(system, role, 0))
    for section, config in configs.items():
        _check_agreement(section, config, configs["router"])
        if config.is_on:
            try:
                load_material(config)
            except ConfigError as error:
                raise ConfigError(f"{section}: {error}") from error


def check_door_tls(system: SystemConfig, *, use_ray: bool) -> None:
    """Raises ConfigError for certificates of the front doors that do not work."""
    config = system.door_tls
    if not config.is_on:
        return
    if use_ray:
        refuse_client_ca(config)
    load_door_material(config)


def _config(section: str, values: Mapping[str, Any]) -> TlsConfig:
    return build(TlsConfig, values.get("tls", {}), where=f"{section}.tls.")


def _check_agreement(section: str, config: TlsConfig, router: TlsConfig) -> None:
    if config.is_on != router.is_on:
        on, off = (section, "router") if config.is_on else ("router", section)
        raise ConfigError(
            f"{on}.tls names certificates and {off}.tls none; router, prefill and decode all take "
            "TLS or none does: --tls-dir sets all three"
        )
    if config.name != router.name:
        raise ConfigError(
            f"{section}.tls.name is {config.name!r} and router.tls.name {router.name!r}; "
            "a deployment has one"
        )


def _files(folder: Path, role: str) -> dict[str, str]:
    return {
        "ca_file": str(folder / "ca.pem"),
        "cert_file": str(folder / f"{role}.pem"),
        "key_file": str(folder / f"{role}-key.pem"),
    }
