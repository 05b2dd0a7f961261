"""Fixtures every test folder may use."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from redis_server import RedisServer

ImportModel = Callable[[str], Path]

# `make test-ui` installs what drives a browser; everybody else can do without.
collect_ignore = [] if importlib.util.find_spec("playwright") else ["ui"]


def pytest_configure() -> None:
    """Without a GPU Triton's interpreter runs the kernels; it is chosen when triton is imported."""
    if not Path("/dev/nvidia0").exists():
        os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session")
def redis_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """A real Redis on a random port."""
    # A GPU machine may have no client for it.
    from redis_server import running_redis

    yield from running_redis(tmp_path_factory.mktemp("redis"))


@pytest.fixture
def redis(redis_process: RedisServer) -> RedisServer:
    """A running server without data."""
    if not redis_process.is_running:
        redis_process.start()
    with redis_process.client() as client:
        client.flushall()
    return redis_process


@pytest.fixture(scope="session")
def import_smollm2() -> ImportModel:
    """dtype -> folder of the real model in it, from the cache that `make serve` fills as well."""
    # Not for collecting tests: a GPU machine may have no package that reads GGUF.
    from baton.model_import.cache import default_cache_dir
    from baton.model_import.importer import import_source
    from baton.model_import.sources import DEFAULT_SOURCE

    def import_as(dtype: str) -> Path:
        result = import_source(
            DEFAULT_SOURCE,
            cache_dir=default_cache_dir(os.environ),
            environ=os.environ,
            dtype=dtype,
        )
        return result.folder

    return import_as


@pytest.fixture(scope="session")
def smollm2_dir(import_smollm2: ImportModel) -> Path:
    """The real model as users get it: weights rounded to bfloat16."""
    return import_smollm2("bfloat16")


@pytest.fixture(scope="session")
def smollm2_float32_dir(import_smollm2: ImportModel) -> Path:
    """The real model unrounded: the weights that the golden outputs were made with."""
    return import_smollm2("float32")
