"""The real system: `baton serve` as a user starts it, with the real model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from kvtransfer.select import nixl_obstacle
from observed import Observed, system_of
from running_system import RunningSystem
from trace_collector import grpc_collector


@pytest.fixture(scope="session")
def make_system(
    tmp_path_factory: pytest.TempPathFactory, smollm2_dir: Path
) -> Iterator[Callable[..., RunningSystem]]:
    """A function that prepares systems; whatever runs at the end is killed."""
    made: list[RunningSystem] = []

    def make(*arguments: str) -> RunningSystem:
        run_dir = tmp_path_factory.mktemp("run")
        made.append(RunningSystem(["--model", str(smollm2_dir), *arguments], run_dir))
        return made[-1]

    yield make
    for system in made:
        system.kill()


@pytest.fixture(scope="session")
def start_system(make_system: Callable[..., RunningSystem]) -> Callable[..., RunningSystem]:
    """A function that starts systems and returns when they are ready."""

    def start(*arguments: str) -> RunningSystem:
        system = make_system(*arguments)
        system.start()
        return system

    return start


@pytest.fixture(scope="session")
def exact_arguments(smollm2_float32_dir: Path) -> list[str]:
    """Disaggregated in float32, every prompt through both workers: equals the reference."""
    return [
        *("--model", str(smollm2_float32_dir), "--dtype", "float32"),
        *("--set", "router.policy.local_prefill_max_tokens=0"),
        *(("--transport", "nixl") if not nixl_obstacle() else ()),
    ]


@pytest.fixture(scope="session")
def system(start_system: Callable[..., RunningSystem], exact_arguments: list[str]) -> RunningSystem:
    return start_system("--no-ray", *exact_arguments)


@pytest.fixture
def client(system: RunningSystem) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=system.url, timeout=60, trust_env=False) as client:
        yield client


@pytest.fixture(scope="session")
def observed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Observed]:
    """With a tiny model, and a collector of traces beside it."""
    with grpc_collector() as collector:
        system = system_of(tmp_path_factory.mktemp("observed"), collector)
        system.start()
        yield Observed(system, collector)
        system.kill()
