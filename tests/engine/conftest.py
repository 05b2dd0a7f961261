"""Engines with fake runners, as fixtures. Helper files are loaded by path: tests are no package."""

from __future__ import annotations

import functools
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from baton.core.clock import ManualClock
from baton.engine.engine import Engine


def _load(name: str) -> ModuleType:
    qualified = f"engine_test_{name}"
    if qualified not in sys.modules:
        path = Path(__file__).with_name(f"{name}.py")
        spec = importlib.util.spec_from_file_location(qualified, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[qualified] = module
        spec.loader.exec_module(module)
    return sys.modules[qualified]


@pytest.fixture(scope="session")
def fake_runner() -> ModuleType:
    """The module with the arithmetic runner and its expected outputs."""
    return _load("fake_runner")


@pytest.fixture(scope="session")
def harness() -> ModuleType:
    """The module with Harness, make_engine and make_request."""
    return _load("harness")


@pytest.fixture(scope="session", params=[1, 2], ids=["depth1", "depth2"])
def depth(request: pytest.FixtureRequest) -> int:
    """Steps that the runner takes before the first is waited for."""
    return int(request.param)


@pytest.fixture(scope="session")
def make_harness_of_depth(fake_runner: ModuleType, harness: ModuleType) -> Callable[..., Any]:
    """Depth, num_blocks and engine settings -> a Harness with a checking runner."""

    def make(
        depth: int,
        num_blocks: int = 32,
        *,
        block_size: int = 4,
        runner_vocab: int = 97,
        **settings: Any,
    ) -> Any:
        runner = fake_runner.FakeRunner(num_blocks, block_size, runner_vocab, max_in_flight=depth)
        clock = ManualClock(1000.0)
        engine = harness.make_engine(
            runner, num_blocks=num_blocks, block_size=block_size, clock=clock, **settings
        )
        runner.block_pool = engine._pool
        return harness.Harness(engine, runner, clock)

    return make


@pytest.fixture(scope="session")
def make_harness(make_harness_of_depth: Callable[..., Any], depth: int) -> Callable[..., Any]:
    """num_blocks and engine settings -> a Harness with a checking runner."""
    return functools.partial(make_harness_of_depth, depth)


@pytest.fixture(scope="session")
def expected_output(fake_runner: ModuleType) -> Callable[..., list[int]]:
    """(prompt, num_tokens, stop_ids=()) -> the output of a run with the vocabulary of 97."""

    def expected(prompt: Any, num_tokens: int, stop_ids: Any = ()) -> list[int]:
        return fake_runner.expected_output(prompt, num_tokens, 97, stop_ids)

    return expected


@pytest.fixture(scope="session")
def assert_engine_empty(harness: ModuleType) -> Callable[[Engine], None]:
    """The last line of every life-cycle test."""
    return harness.assert_engine_empty
