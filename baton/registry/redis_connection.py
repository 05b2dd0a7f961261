"""Connections to Redis: what its URL may be, deadlines, and its failures as our errors.

Nothing here retries: whoever calls knows how long it can wait.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from urllib.parse import parse_qsl, urlsplit

from redis.asyncio import ConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import AuthenticationError, RedisError, ResponseError
from redis.exceptions import TimeoutError as RedisTimeoutError

from baton.core.errors import ConfigError, Unavailable

KEY_FORMAT = 1
"""Part of every key; a change of what keys hold gets another number."""
CONNECT_TIMEOUT_S = 1.0
CALL_TIMEOUT_S = 1.0
MAX_CONNECTIONS = 16
_DEPLOYMENT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_SCHEMES = ("redis", "rediss", "unix")
_OPTION = re.compile(r"db|username|password|client_name|socket_\w+|ssl_\w+")
"""Behind the `?` of a URL; others would change what answers look like."""


def check_redis_url(name: str, url: str) -> None:
    """Raises ConfigError, which never shows the URL: it may hold a password."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise ConfigError(f"{name} is not a URL: its port is no number up to 65535") from error
    if parts.scheme not in _SCHEMES:
        raise ConfigError(
            f"{name} must start with {', '.join(f'{s}://' for s in _SCHEMES)}, "
            f"got {parts.scheme[:20] or 'nothing'}"
        )
    if parts.scheme == "unix":
        if not parts.path:
            raise ConfigError(f"{name} names no socket; take unix:///path/to/redis.sock")
        _check_options(name, url, parts.query)
        return
    if not parts.hostname:
        raise ConfigError(f"{name} names no host; take {parts.scheme}://host:6379/0")
    if port == 0:
        raise ConfigError(f"{name} has port 0; Redis listens on 6379 by default")
    database = parts.path.lstrip("/")
    if database and not database.isdigit():
        raise ConfigError(f"{name} has {database[:20]!r} where the number of a database belongs")
    _check_options(name, url, parts.query)


def _check_options(name: str, url: str, query: str) -> None:
    options = [option for option, _ in parse_qsl(query, keep_blank_values=True)]
    for option in options:
        if not _OPTION.fullmatch(option):
            raise ConfigError(
                f"{name} has the option {option[:40]!r}; known are db, username, password, "
                "client_name, socket_... and ssl_..."
            )
    try:
        open_redis(url).connection_pool.make_connection()
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"{name} has an option with an unknown name or a wrong value: {', '.join(options)}"
        ) from error


def check_deployment(name: str, deployment: str) -> None:
    """Raises ConfigError on what cannot be part of a key."""
    if not _DEPLOYMENT.fullmatch(deployment):
        raise ConfigError(f"{name} must be 1 to 64 of A-Z a-z 0-9 . _ -, got {deployment!r}")


def open_redis(url: str) -> Redis:
    """A client that connects when first used. Close it with `aclose`."""
    pool = ConnectionPool.from_url(
        url,
        max_connections=MAX_CONNECTIONS,
        socket_timeout=CALL_TIMEOUT_S,
        socket_connect_timeout=CONNECT_TIMEOUT_S,
        # Our callers decide about another try.
        retry=Retry(NoBackoff(), 0),
        health_check_interval=0,
        protocol=2,
    )
    return Redis.from_pool(pool)


def key_prefix(deployment: str) -> str:
    """All keys of a deployment start with it."""
    return f"baton:{KEY_FORMAT}:{deployment}:"


def redis_failure(error: BaseException) -> str | None:
    """What went wrong in one line; None for what is no failure of Redis or on the way to it."""
    if isinstance(error, AuthenticationError):
        return "Redis refuses the user or password of its URL"
    if isinstance(error, ResponseError):
        return f"Redis answers {str(error)[:200]!r}"
    if isinstance(error, (TimeoutError, RedisTimeoutError)):
        return f"Redis did not answer within {CALL_TIMEOUT_S:g} s"
    if isinstance(error, (RedisError, OSError, EOFError)):
        return f"Redis cannot be reached ({type(error).__name__}: {str(error)[:200]})"
    return None


@contextlib.contextmanager
def redis_errors(what: str) -> Iterator[None]:
    """Failures of Redis inside as Unavailable, saying that `what` could not be done."""
    try:
        yield
    except (RedisError, OSError, EOFError) as error:
        raise Unavailable(f"{what}: {redis_failure(error)}") from error
