"""Statistics of router copies over HTTP: every copy is asked at once, each answers or not.

Copies are found anew every time, as one of

    http://host:port            one copy
    dns://name:port             a copy at every address of the name, such as a headless Service
    a directory                 with a file for each copy, as `copy.targets_dir` of routers

A copy that does not answer in time is left out, and one that answers nonsense too.

Does not know: what the numbers mean.
"""

from __future__ import annotations

import asyncio
import json
import logging
import socket
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import httpx

from baton.core.errors import ConfigError
from baton.settings import check_positive
from services.planner.stats_source import Reading
from services.router.edge.scrape_target import read_targets
from services.router.pool_stats import PoolStats

PATH = "/pool_stats"
MAX_BYTES = 1 << 16
"""Of an answer; it has about two."""
MAX_COPIES = 256
MAX_REASON_CHARS = 200


@dataclass(frozen=True, slots=True)
class StatsConfig:
    """Where router copies tell of their pools."""

    routers: tuple[str, ...] = field(default=())
    """`http://HOST:PORT` of a copy's own port, or `dns://NAME:PORT` for a copy at every address of
    a name."""
    targets_dir: Path | None = None
    """Beside them: a directory in which copies say where they are, as their `copy.targets_dir`."""
    timeout_s: float = 2.0
    """Until a copy must have answered, finding it included."""

    def __post_init__(self) -> None:
        check_positive("stats", self, "timeout_s")
        for text in self.routers:
            check_router(text)
        if len(self.routers) > MAX_COPIES:
            raise ConfigError(
                f"stats.routers may name {MAX_COPIES} at most, got {len(self.routers)}"
            )


def check_router(text: str) -> None:
    """Raises ConfigError."""
    try:
        url = urlsplit(text)
        is_valid = url.scheme in ("http", "dns") and bool(url.hostname) and bool(url.port)
    except ValueError:
        is_valid = False
    if not is_valid or url.path not in ("", "/"):
        raise ConfigError(
            "stats.routers takes http://HOST:PORT or dns://NAME:PORT, without a path; got "
            f"{text[:MAX_REASON_CHARS]!r}"
        )


class HttpStats:
    """A `StatsSource`. Not to be used on a thread that runs an event loop."""

    def __init__(self, config: StatsConfig) -> None:
        """Raises ConfigError when nothing says where copies are."""
        if not config.routers and config.targets_dir is None:
            raise ConfigError("stats.routers is empty and stats.targets_dir not set: set one")
        self._config = config
        # It tells of every request, several of them every interval.
        logging.getLogger("httpx").setLevel(logging.WARNING)

    def read(self) -> Reading:
        """Within about twice the timeout: copies are found, then asked. A name that is not known
        takes until the system's resolver gives it up."""
        return asyncio.run(self._read())

    async def _read(self) -> Reading:
        places, failed = await self._places()
        copies: dict[str, PoolStats] = {}
        async with httpx.AsyncClient(trust_env=False, timeout=self._config.timeout_s) as client:
            answers = await asyncio.gather(*(self._ask(client, place) for place in places))
        for place, answer in zip(places, answers, strict=True):
            if isinstance(answer, PoolStats):
                copies[place] = answer
            else:
                failed[place] = answer
        return Reading(copies, failed)

    async def _places(self) -> tuple[list[str], dict[str, str]]:
        """host:port of copies, each once, and what could not be looked up."""
        places: dict[str, None] = {}
        failed: dict[str, str] = {}
        if self._config.targets_dir is not None:
            targets = await asyncio.to_thread(read_targets, self._config.targets_dir)
            # The planner says there where it can be scraped, too.
            places |= dict.fromkeys(t.address for t in targets if t.name.startswith("router"))
            if not targets:
                failed[str(self._config.targets_dir)] = "no router has told where it is yet"
        for text in self._config.routers:
            url = urlsplit(text)
            assert url.hostname is not None and url.port is not None
            if url.scheme == "http":
                host = f"[{url.hostname}]" if ":" in url.hostname else url.hostname
                places[f"{host}:{url.port}"] = None
                continue
            try:
                async with asyncio.timeout(self._config.timeout_s):
                    found = await _addresses(url.hostname, url.port)
            except (OSError, TimeoutError) as error:
                failed[text] = f"the name was not found: {_text(error)}"
                continue
            places |= dict.fromkeys(found)
        return list(places)[:MAX_COPIES], failed

    async def _ask(self, client: httpx.AsyncClient, place: str) -> PoolStats | str:
        """Its numbers, or why there are none."""
        try:
            async with asyncio.timeout(self._config.timeout_s):
                body = await _body(client, f"http://{place}{PATH}")
            numbers = json.loads(body)
            if not isinstance(numbers, dict):
                return f"answered {body[:40]!r}, no statistics"
            return PoolStats.from_numbers(numbers)
        except TimeoutError:
            return f"no answer within {self._config.timeout_s:g} s"
        except (httpx.HTTPError, OSError, ValueError, ConfigError) as error:
            return _text(error)


async def _body(client: httpx.AsyncClient, url: str) -> bytes:
    body = bytearray()
    async with client.stream("GET", url) as response:
        if response.status_code != 200:
            raise ConfigError(
                f"HTTP status {response.status_code} from {PATH}: is this a router's port?"
            )
        async for part in response.aiter_bytes():
            body += part
            if len(body) > MAX_BYTES:
                raise ConfigError(f"an answer of more than {MAX_BYTES} bytes")
    return bytes(body)


async def _addresses(name: str, port: int) -> Sequence[str]:
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(name, port, type=socket.SOCK_STREAM)
    hosts = sorted({str(info[4][0]) for info in found})
    return [f"[{host}]:{port}" if ":" in host else f"{host}:{port}" for host in hosts]


def _text(error: Exception) -> str:
    return (str(error) or type(error).__name__)[:MAX_REASON_CHARS]
