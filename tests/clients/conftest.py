"""Other people's clients and load generators against the live system.

`make test-clients` makes an environment for each (tests/support/client_environments.py) and skips
those that cannot be installed. `--url` and `--grpc` take a system that runs already.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from client_environments import ClientEnvironment, NotInstallable, environment, file_of_wheel
from live_system import LiveSystem
from running_system import RunningSystem


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("clients")
    group.addoption("--url", help="of a system that runs already")
    group.addoption("--grpc", help="its gRPC address, host:port")
    group.addoption(
        "--huge", action="store_true", help="also clients of several gigabytes (guidellm)"
    )


@pytest.fixture(scope="session")
def live(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, smollm2_dir: Path
) -> Iterator[LiveSystem]:
    url, grpc = (request.config.getoption(name, default=None) for name in ("--url", "--grpc"))
    if url and grpc:
        yield LiveSystem(url, grpc, smollm2_dir.name, smollm2_dir)
        return
    arguments = ["--no-ray", "--model", str(smollm2_dir)]
    system = RunningSystem(arguments, tmp_path_factory.mktemp("run"))
    system.start()
    try:
        yield LiveSystem(system.url, f"127.0.0.1:{system.grpc_port}", smollm2_dir.name, smollm2_dir)
        system.assert_nothing_leaked()
    finally:
        system.kill()


@pytest.fixture
def client_environment() -> Callable[..., ClientEnvironment]:
    def make(name: str, *requirements: str, python: tuple[int, int] = (3, 11)) -> ClientEnvironment:
        try:
            return environment(name, *requirements, python=python)
        except NotInstallable as reason:
            pytest.skip(str(reason))

    return make


@pytest.fixture
def wheel_file() -> Callable[[str, str], Path]:
    def find(requirement: str, member: str) -> Path:
        try:
            return file_of_wheel(requirement, member)
        except NotInstallable as reason:
            pytest.skip(str(reason))

    return find
