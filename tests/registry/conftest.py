from __future__ import annotations

from collections.abc import Iterator

import pytest

from redis_server import RedisServer, running_redis


@pytest.fixture(scope="session")
def redis_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    yield from running_redis(tmp_path_factory.mktemp("redis"))


@pytest.fixture
def redis(redis_process: RedisServer) -> RedisServer:
    """A running server without data."""
    if not redis_process.is_running:
        redis_process.start()
    with redis_process.client() as client:
        client.flushall()
    return redis_process
