"""The single-machine registry: a private directory with one JSON file per worker.

Files are replaced atomically, so a reader sees a whole registration or none. Time is the
machine's monotonic clock, whose origin all processes of one host share. A registration counts as
gone when its lease has passed or its process is dead, whichever shows first.

Not for several hosts or PID namespaces over one shared directory.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import logging
import os
import secrets
import stat
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from baton.core.clock import Clock
from baton.core.errors import BatonError, ConfigError, Unavailable
from baton.core.worker_info import Epoch, WorkerId, WorkerInfo
from baton.process import process_exists
from baton.registry.registration import (
    FORMAT,
    check_worker_id,
    info_from_values,
    info_to_values,
    registration_values,
)

POLL_S = 0.2
SECRET_FILE = "cluster-secret"
SECRET_BYTES = 32
_SUFFIX = ".json"

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Registration:
    info: WorkerInfo
    ttl_s: float
    renewed_at_s: float
    """On the machine's monotonic clock."""

    def is_live(self, now_s: float) -> bool:
        return now_s - self.renewed_at_s < self.ttl_s and process_exists(self.info.pid)


@dataclass(frozen=True, slots=True)
class RegistryEntry:
    """One registration as it lies there, live or not."""

    info: WorkerInfo
    ttl_s: float
    age_s: float
    """Since it was renewed."""
    has_process: bool


class DirectoryRegistry:
    """A `Registry` over files. Calls are short enough to run on the event loop."""

    def __init__(self, directory: Path, *, clock: Clock) -> None:
        """Create the directory when missing. Raises ConfigError when others could write to it."""
        self._directory = private_directory(directory)
        self._clock = clock

    async def register(self, info: WorkerInfo, *, ttl_s: float) -> None:
        if ttl_s <= 0:
            raise ConfigError(f"a registration's time to live must be positive, got {ttl_s} s")
        self._write(_Registration(info, ttl_s, self._clock.now()))

    async def renew(self, worker_id: WorkerId, epoch: Epoch) -> bool:
        current = self._read(self._path(worker_id))
        if current is None or current.info.epoch != epoch:
            return False
        self._write(dataclasses.replace(current, renewed_at_s=self._clock.now()))
        return True

    async def deregister(self, worker_id: WorkerId, epoch: Epoch) -> None:
        path = self._path(worker_id)
        current = self._read(path)
        if current is not None and current.info.epoch == epoch:
            path.unlink(missing_ok=True)

    def entries(self) -> Sequence[RegistryEntry]:
        """All registrations, those that have lapsed or outlived their process too. Removes none."""
        now_s = self._clock.now()
        found = [self._read(path) for path in sorted(self._directory.glob(f"*{_SUFFIX}"))]
        return [
            RegistryEntry(r.info, r.ttl_s, now_s - r.renewed_at_s, process_exists(r.info.pid))
            for r in found
            if r is not None
        ]

    async def list(self) -> Mapping[WorkerId, WorkerInfo]:
        now_s = self._clock.now()
        live: dict[WorkerId, WorkerInfo] = {}
        for path in sorted(self._directory.glob(f"*{_SUFFIX}")):
            registration = self._read(path)
            if registration is None:
                continue
            if registration.is_live(now_s):
                live[registration.info.worker_id] = registration.info
            elif not process_exists(registration.info.pid):
                self._remove_dead(path, registration)
        return live

    async def watch(self) -> AsyncGenerator[Mapping[WorkerId, WorkerInfo], None]:
        last: Mapping[WorkerId, WorkerInfo] | None = None
        while True:
            current = await self.list()
            if current != last:
                last = current
                yield current
            await asyncio.sleep(POLL_S)

    async def close(self) -> None:
        """Nothing is held between calls."""

    def _path(self, worker_id: WorkerId) -> Path:
        check_worker_id(worker_id)
        return self._directory / f"{worker_id}{_SUFFIX}"

    def _write(self, registration: _Registration) -> None:
        path = self._path(registration.info.worker_id)
        values = _to_json(registration)
        try:
            _write_atomically(path, json.dumps(values, indent=1).encode())
        except OSError as error:
            raise Unavailable(f"the worker registry cannot be written: {error.strerror}") from error

    def _read(self, path: Path) -> _Registration | None:
        try:
            return _from_json(registration_values(path.read_bytes()))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, KeyError, BatonError) as error:
            logger.warning("ignored unreadable registration %s: %s", path.name, error)
            return None

    def _remove_dead(self, path: Path, seen: _Registration) -> None:
        """Files of killed workers would stay for ever; any reader may sweep them."""
        current = self._read(path)
        if current is not None and current.info.epoch == seen.info.epoch:
            path.unlink(missing_ok=True)


def shared_secret(directory: Path) -> str:
    """The secret all workers of this machine share, created by whichever process comes first."""
    path = private_directory(directory) / SECRET_FILE
    if not path.exists():
        draft = path.with_name(f".{SECRET_FILE}.{secrets.token_hex(6)}")
        _create(draft, secrets.token_hex(SECRET_BYTES).encode())
        # A link, unlike a rename, fails when another process was faster: its secret then holds.
        with contextlib.suppress(FileExistsError):
            os.link(draft, path)
        draft.unlink()
    return path.read_text().strip()


def private_directory(directory: Path) -> Path:
    """`directory`, created with mode 0700 when missing.

    Raises ConfigError when it belongs to somebody else or is open to others: whoever can write
    here can send requests to a process of their own.
    """
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = directory.stat()
    except OSError as error:
        raise ConfigError(f"registry directory {directory}: {error.strerror}") from error
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
        raise ConfigError(f"registry directory {directory} is not a directory of this user")
    if status.st_mode & 0o077:
        raise ConfigError(
            f"registry directory {directory} has mode {stat.S_IMODE(status.st_mode):04o}; "
            f"others must not reach it: chmod 700 {directory}"
        )
    return directory


def _to_json(registration: _Registration) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "ttl_s": registration.ttl_s,
        "renewed_at_s": registration.renewed_at_s,
        "info": info_to_values(registration.info),
    }


def _from_json(values: Mapping[str, Any]) -> _Registration:
    return _Registration(
        info=info_from_values(values["info"]),
        ttl_s=float(values["ttl_s"]),
        renewed_at_s=float(values["renewed_at_s"]),
    )


def _write_atomically(path: Path, data: bytes) -> None:
    draft = path.with_name(f".{path.name}.{secrets.token_hex(6)}")
    _create(draft, data)
    draft.replace(path)


def _create(path: Path, data: bytes) -> None:
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(data)
