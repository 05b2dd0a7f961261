"""The Redis that routers and workers share, asked directly: does it answer, does it take writes,
and does this machine's clock agree with its own.

Every machine that looks compares itself with the same clock, so two that pass agree with each
other. Never shows a URL: it may hold a password.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import redis

from baton.cli.doctor_types import Check, Severity
from baton.registry.redis_connection import redis_failure

TIMEOUT_S = 3.0
OLDEST = (6, 2)
PROBE_KEY = "baton:doctor"
PROBE_TTL_S = 5
MAX_SKEW_S = 0.5
"""Time lines of requests hold times of several machines; above it they make no sense."""
BAD_SKEW_S = 60.0
"""Certificates and deadlines go wrong."""


def check_store(url: str) -> Iterator[Check]:
    """Writes one key that is gone after some seconds."""
    name = "Redis"
    with redis.Redis.from_url(
        url, socket_timeout=TIMEOUT_S, socket_connect_timeout=TIMEOUT_S
    ) as client:
        try:
            information: dict[str, Any] = client.info()
            before_s = time.time()
            seconds, micros = client.time()
            after_s = time.time()
            client.set(PROBE_KEY, "", ex=PROBE_TTL_S)
        except (redis.RedisError, OSError) as error:
            fix = "check shared.url and registry.url, the network policy and the server itself"
            yield Check(name, redis_failure(error) or str(error), Severity.ERROR, fix)
            return
    yield judge_server(information)
    yield judge_clock(seconds + micros / 1e6, before_s, after_s)


def judge_server(information: dict[str, Any]) -> Check:
    """`information`: as the command INFO answers."""
    text = str(information.get("redis_version", "0"))
    found = f"answers, version {text}"
    numbers = tuple(int(part) for part in text.split(".")[:2] if part.isdigit())
    if numbers < OLDEST:
        least = ".".join(map(str, OLDEST))
        return Check("Redis", f"{found}, {least} is needed", Severity.ERROR, "update the server")
    if information.get("cluster_enabled"):
        fix = "take a single server or a replicated one; quotas change several keys at once"
        return Check("Redis", f"{found}, as a cluster", Severity.ERROR, fix)
    policy, limit = information.get("maxmemory_policy", ""), information.get("maxmemory", 0)
    if limit and policy != "noeviction":
        fix = "set maxmemory-policy noeviction: routers go on without a store that is full"
        problem = f"{found}, throws keys away when it is full ({policy})"
        return Check("Redis", problem, Severity.WARNING, fix)
    return Check("Redis", f"{found}, takes writes")


def judge_clock(server_s: float, before_s: float, after_s: float) -> Check:
    """`before_s`, `after_s`: this machine's clock around the question. Unix times."""
    skew_s = max(0.0, before_s - server_s, server_s - after_s)
    found = f"{skew_s:.3f} s from that of Redis"
    fix = "let both machines follow a time server"
    if skew_s > BAD_SKEW_S:
        return Check("clock", f"{found}: certificates seem outdated", Severity.ERROR, fix)
    if skew_s > MAX_SKEW_S:
        problem = f"{found}: times of several machines do not add up in time lines"
        return Check("clock", problem, Severity.WARNING, fix)
    return Check("clock", found)
