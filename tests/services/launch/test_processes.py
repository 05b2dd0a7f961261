"""Commands of a system's workers: names, settings, and GPUs that nobody else has."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from baton.core.errors import Unavailable
from baton.core.worker_info import Role
from services.launch.config import SystemConfig
from services.launch.processes import WorkerLauncher, worker_environments
from services.launch.run_directory import RunDirectory
from services.launch.supervisor import Child

GPU = {"engine": {"device": "cuda"}}
TWO_GPUS = {"engine": {"device": "cuda", "tp_size": 2}}
FOUR = {"CUDA_VISIBLE_DEVICES": "4,5,6,7"}


def launcher(tmp_path: Path, environ: dict[str, str], **pools: object) -> WorkerLauncher:
    system = SystemConfig(tmp_path / "model", **pools)  # type: ignore[arg-type]
    return WorkerLauncher(system, RunDirectory.create(tmp_path / "run"), environ)


def started(making: WorkerLauncher) -> list[Child]:
    environments = worker_environments(making.system, making.environ)
    return [making.child(role, i, env) for (role, i), env in environments.items()]


def test_another_worker_takes_the_lowest_free_index_and_free_gpus(tmp_path: Path) -> None:
    making = launcher(tmp_path, FOUR, prefill=GPU, decode=TWO_GPUS)
    children = started(making)
    assert [c.environment["CUDA_VISIBLE_DEVICES"] for c in children] == ["4", "5,6"]
    more = making.another(Role.PREFILL, children)
    assert (more.name, more.environment) == ("prefill-1", {"CUDA_VISIBLE_DEVICES": "7"})
    # The first has gone meanwhile.
    again = making.another(Role.PREFILL, [*children[1:], more])
    assert (again.name, again.environment) == ("prefill-0", {"CUDA_VISIBLE_DEVICES": "4"})


def test_another_worker_without_enough_gpus_is_refused_with_the_fix(tmp_path: Path) -> None:
    making = launcher(tmp_path, FOUR, prefill=GPU, decode=TWO_GPUS)
    children = started(making)
    with pytest.raises(Unavailable) as refused:
        making.another(Role.DECODE, children)
    assert str(refused.value).startswith(
        "one more decode worker needs 2 GPUs, and 1 of the 4 visible ones are free"
    )
    assert "autoscale.max_devices" in str(refused.value)


def test_cpu_workers_need_no_gpu(tmp_path: Path) -> None:
    making = launcher(tmp_path, {})
    more = making.another(Role.DECODE, started(making))
    assert (more.name, more.environment) == ("decode-1", {})


def test_worker_of_another_role_keeps_its_name(tmp_path: Path) -> None:
    making = launcher(tmp_path, {})
    command = making.command(Role.DECODE, "prefill-1")
    assert "services.decode" in command
    settings = yaml.safe_load((making.run.path / "prefill-1.yaml").read_text())
    assert settings["worker_id"] == "prefill-1"
    assert settings["registry"]["directory"] == str(making.run.registry)
