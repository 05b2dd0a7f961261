"""API keys: how they look, and the file that holds their hashes.

    {"format": 1, "keys": {"<SHA-256 of the key, hex>": {"tenant": "acme", "weight": 2, ...}}}

The keys themselves are shown once, when they are made, and stored nowhere. A router reads the file
again when it has changed; a broken one leaves the keys that were known before.

Does not know: requests, the store that router copies share.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import os
import re
import secrets
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import orjson

from baton.core.clock import Clock
from baton.core.errors import ConfigError
from services.router.shared.state import TenantRecord
from services.router.shared.wire import record_from_json, record_to_json

logger = logging.getLogger(__name__)

PREFIX = "baton-"
FORMAT = 1
MAX_KEY_CHARS = 256
MAX_KEYS = 100_000
MAX_FILE_BYTES = 64 << 20
CHECK_PERIOD_S = 1.0
SELECTOR_CHARS = 16
_HASH = re.compile(r"[0-9a-f]{64}")


class _Version(NamedTuple):
    """Tells one content of the file from the next."""

    inode: int
    modified_ns: int
    num_bytes: int


def new_key() -> str:
    """256 random bits, so that its plain hash cannot be searched."""
    return PREFIX + secrets.token_urlsafe(32)


def read_keys(path: Path) -> dict[str, TenantRecord]:
    """Tenants by key hash; none when there is no file. Raises ConfigError."""
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise ConfigError(f"key file {path} has more than {MAX_FILE_BYTES} bytes")
        content = orjson.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise ConfigError(f"key file {path} cannot be read: {error.strerror}") from error
    except orjson.JSONDecodeError as error:
        raise ConfigError(f"key file {path} is not valid JSON: {error}") from error
    keys = content.get("keys") if isinstance(content, dict) else None
    if not isinstance(keys, dict) or content.get("format") != FORMAT:
        raise ConfigError(
            f'key file {path} must hold {{"format": {FORMAT}, "keys": {{...}}}}; '
            "write it with `baton keys`"
        )
    if len(keys) > MAX_KEYS:
        raise ConfigError(f"key file {path} holds {len(keys)} keys, at most {MAX_KEYS} are read")
    records: dict[str, TenantRecord] = {}
    for key_hash, values in keys.items():
        try:
            if not _HASH.fullmatch(key_hash):
                raise ValueError("it is no SHA-256 in hex")
            values = {"format": FORMAT, **values} if isinstance(values, dict) else values
            records[key_hash] = record_from_json(orjson.dumps(values))
        except ValueError as error:
            raise ConfigError(f"key file {path}, key {key_hash[:12]!r}: {error}") from error
    return records


def write_keys(path: Path, records: Mapping[str, TenantRecord]) -> None:
    """Replace the file in one step, readable by its owner alone. Raises OSError."""
    keys = {key_hash: orjson.loads(record_to_json(r)) for key_hash, r in records.items()}
    for values in keys.values():
        del values["format"]
    data = orjson.dumps({"format": FORMAT, "keys": keys}, option=orjson.OPT_INDENT_2)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data + b"\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


class FileKeys:
    """A key file as whoever edits it sees it; one editor at a time."""

    def __init__(self, path: Path) -> None:
        self._path = path

    async def list_keys(self) -> Mapping[str, TenantRecord]:
        """Raises ConfigError."""
        return read_keys(self._path)

    async def write_key(self, key_hash: str, record: TenantRecord) -> None:
        """Raises ConfigError, OSError."""
        write_keys(self._path, {**read_keys(self._path), key_hash: record})

    async def delete_key(self, key_hash: str) -> bool:
        """Raises ConfigError, OSError."""
        records = read_keys(self._path)
        was_there = records.pop(key_hash, None) is not None
        write_keys(self._path, records)
        return was_there


class KeyFile:
    """The keys of a file, as it is now."""

    def __init__(self, path: Path, *, clock: Clock) -> None:
        """Raises ConfigError when there is no file, or a broken one."""
        self._path = path
        self._clock = clock
        version = _version(path)
        if version is None:
            raise ConfigError(f"there is no key file {path}; make one with `baton keys create`")
        self._version: _Version | None = version
        self._take(read_keys(path))
        self._checked_at_s = clock.now()
        self._reading: asyncio.Task[None] | None = None

    async def owner(self, key_hash: str) -> TenantRecord | None:
        """Who holds the key of this `hash_key`; follows changes of the file within a second."""
        if self._clock.now() - self._checked_at_s >= CHECK_PERIOD_S and self._reading is None:
            self._checked_at_s = self._clock.now()
            version = _version(self._path)
            if version != self._version:
                self._reading = asyncio.create_task(self._read(version))
        if self._reading is not None:
            await asyncio.shield(self._reading)
        # Found by a part of the hash, compared in constant time by the whole.
        for known, record in self._by_selector.get(key_hash[:SELECTOR_CHARS], ()):
            if hmac.compare_digest(known, key_hash):
                return record
        return None

    def _take(self, records: Mapping[str, TenantRecord]) -> None:
        by_selector: dict[str, list[tuple[str, TenantRecord]]] = {}
        for key_hash, record in records.items():
            by_selector.setdefault(key_hash[:SELECTOR_CHARS], []).append((key_hash, record))
        self._by_selector = by_selector

    async def _read(self, version: _Version | None) -> None:
        try:
            # Of thousands of keys it takes longer than a stream should stand still.
            records = await asyncio.to_thread(read_keys, self._path)
            self._take(records)
            logger.info("the key file was read again and holds %d keys", len(records))
        except ConfigError as error:
            logger.error("%s; the keys known before stay valid", error)
        finally:
            self._version, self._reading = version, None


def _version(path: Path) -> _Version | None:
    try:
        stat = path.stat()
    except OSError:
        return None
    return _Version(stat.st_ino, stat.st_mtime_ns, stat.st_size)
