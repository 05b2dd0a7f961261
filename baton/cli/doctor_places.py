"""Where the workers are, and what it takes to ask them: addresses, cluster secret, certificates.

    run directory (given, or the only one of this user that has workers)
      registry/*.json            addresses, epochs, process ids
      registry/cluster-secret    unless the settings name another
      prefill*.yaml, decode*.yaml    the workers' own settings: secret, TLS, disk tier
    settings                     --config, BATON_TRANSFER__CLUSTER_SECRET, --set, ...
    --worker, --secret-file, --tls-dir    what is given by hand goes first

Nothing is asked here, and nothing is changed.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from baton.cli.certs import tls_config
from baton.core.clock import MonotonicClock
from baton.core.config import build, env_values, merge
from baton.core.errors import ConfigError
from baton.core.tls import TlsConfig, TlsFiles, open_tls
from baton.registry.directory import SECRET_FILE, DirectoryRegistry, RegistryEntry
from baton.settings import parse_override, read_yaml
from kvtransfer.tiers.config import TierConfig
from services.worker.config import RegistryConfig, TransferConfig

SECRET_FIX = (
    "give --run-dir (what `baton serve --run-dir` had), --secret-file FILE, or the workers' "
    "setting BATON_TRANSFER__CLUSTER_SECRET"
)


@dataclass(frozen=True, slots=True)
class DoctorSettings:
    """The sections of a worker's settings that say how to reach it."""

    transfer: TransferConfig = field(default_factory=TransferConfig)
    registry: RegistryConfig = field(default_factory=RegistryConfig)
    tiers: TierConfig = field(default_factory=TierConfig)
    tls: TlsConfig = field(default_factory=TlsConfig)


@dataclass(frozen=True, slots=True)
class Place:
    """One worker to ask."""

    address: str
    entry: RegistryEntry | None = None


@dataclass(frozen=True, slots=True)
class Places:
    """All that is to be asked, and with what."""

    workers: tuple[Place, ...]
    secret: bytes = field(repr=False)
    tls: TlsFiles | None
    tiers: TierConfig
    store_url: str | None = field(default=None, repr=False)
    """Of the Redis that the workers announce themselves in."""


@dataclass(frozen=True, slots=True)
class Given:
    """What the command line names."""

    workers: tuple[str, ...] = ()
    """host:port"""
    run_dir: Path | None = None
    secret_file: Path | None = None
    tls_dir: Path | None = None
    config: Path | None = None
    overrides: tuple[str, ...] = ()


def find_places(given: Given, environ: Mapping[str, str]) -> Places:
    """Raises ConfigError saying what is missing and how to give it."""
    workers, settings, registry = _find(given, environ)
    return Places(
        workers=workers,
        secret=_secret(given.secret_file, settings.transfer.cluster_secret, registry),
        tls=open_tls(settings.tls),
        tiers=settings.tiers,
        store_url=settings.registry.url,
    )


def find_workers(
    given: Given, environ: Mapping[str, str]
) -> tuple[tuple[Place, ...], TlsFiles | None]:
    """Whom to ask and with which certificates, without the secret. Raises ConfigError."""
    workers, settings, _ = _find(given, environ)
    return workers, open_tls(settings.tls)


def _find(
    given: Given, environ: Mapping[str, str]
) -> tuple[tuple[Place, ...], DoctorSettings, Path | None]:
    run_dir = given.run_dir
    if run_dir is not None and not run_dir.is_dir():
        raise ConfigError(f"--run-dir {run_dir} does not exist")
    settings = _settings(given, run_dir, environ)
    if run_dir is None and not given.workers and settings.registry.directory is None:
        run_dir = only_run_dir(Path(tempfile.gettempdir()))
        settings = _settings(given, run_dir, environ)
    registry = settings.registry.directory or (None if run_dir is None else run_dir / "registry")
    entries = registered(registry)
    if given.workers:
        at = {entry.info.address: entry for entry in entries}
        workers = tuple(Place(_checked(text), at.get(text)) for text in given.workers)
    else:
        workers = tuple(Place(entry.info.address, entry) for entry in entries)
    if not workers:
        raise ConfigError(
            f"no worker is registered in {registry}; is `baton serve` running? "
            "`--worker HOST:PORT` names one by hand"
        )
    return workers, settings, registry


def registered(directory: Path | None) -> Sequence[RegistryEntry]:
    """All registrations in `directory`; none where there is no such directory."""
    if directory is None or not directory.is_dir():
        return []
    return DirectoryRegistry(directory, clock=MonotonicClock()).entries()


def only_run_dir(folder: Path) -> Path:
    """The run directory in `folder` of the one system of this user that runs there.

    Raises ConfigError when there is none, or more than one.
    """
    found = [path for path in sorted(folder.glob("baton-*")) if _has_workers(path)]
    if len(found) == 1:
        return found[0]
    if not found:
        raise ConfigError(
            f"no running `baton serve` of this user was found in {folder}; name its --run-dir, or "
            "the workers with --worker HOST:PORT"
        )
    names = ", ".join(str(path) for path in found)
    raise ConfigError(f"{len(found)} systems run here; choose one with --run-dir: {names}")


def _has_workers(path: Path) -> bool:
    registry = path / "registry"
    try:
        if not registry.is_dir() or registry.stat().st_uid != os.getuid():
            return False
        return any(entry.has_process for entry in registered(registry))
    except (OSError, ConfigError):
        return False


def _settings(given: Given, run_dir: Path | None, environ: Mapping[str, str]) -> DoctorSettings:
    layers = [_sections(path) for path in worker_settings_files(run_dir)]
    if given.config is not None:
        layers.append(_sections(given.config))
    layers.append(env_values(environ, DoctorSettings))
    layers += [parse_override(text) for text in given.overrides]
    settings = build(DoctorSettings, merge(*layers))
    if given.tls_dir is None:
        return settings
    by_hand = tls_config(given.tls_dir, "router", settings.tls.name)
    return build(DoctorSettings, merge(*layers, {"tls": dict(by_hand.files())}))


def worker_settings_files(run_dir: Path | None) -> list[Path]:
    """The settings of a system's workers, as `baton serve` wrote them; decode's count most."""
    if run_dir is None:
        return []
    return [*sorted(run_dir.glob("prefill*.yaml")), *sorted(run_dir.glob("decode*.yaml"))]


def _sections(file: Path) -> dict[str, Any]:
    known = {each.name for each in fields(DoctorSettings)}
    return {name: value for name, value in read_yaml(file).items() if name in known}


def _secret(file: Path | None, setting: str | None, registry: Path | None) -> bytes:
    if file is not None:
        return _read_secret(file)
    if setting is not None:
        return setting.encode()
    shared = None if registry is None else registry / SECRET_FILE
    if shared is not None and shared.is_file():
        return _read_secret(shared)
    raise ConfigError(f"links cannot be measured without the cluster secret; {SECRET_FIX}")


def _read_secret(file: Path) -> bytes:
    try:
        secret = file.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a text"
        raise ConfigError(f"the cluster secret in {file} cannot be read: {reason}") from None
    if not secret:
        raise ConfigError(f"{file} holds no cluster secret, it is empty; {SECRET_FIX}")
    return secret.encode()


def _checked(address: str) -> str:
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise ConfigError(f"--worker {address!r} is not of the form HOST:PORT")
    return address


def process_ids(places: Sequence[Place]) -> dict[str, int]:
    """Workers of this machine by name, with their living processes."""
    return {
        str(place.entry.info.worker_id): place.entry.info.pid
        for place in places
        if place.entry is not None and place.entry.has_process
    }
