"""Pools are checked against the model and the GPUs before any process is started."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from baton.core.errors import ConfigError
from baton.core.worker_info import Role
from services.launch.config import SystemConfig
from services.launch.pools import (
    assign_gpus,
    check_pools,
    engine_config,
    reads_weights,
    visible_gpus,
)
from services.launch.processes import worker_environments
from tiny_llama import write_checkpoint

MODEL = Path("/models/llama")
GPU = {"engine": {"device": "cuda"}}
DUMMY = {"engine": {"load_format": "dummy"}}


def check(system: SystemConfig, gpus: str = "", *, use_ray: bool = True) -> None:
    check_pools(system, {"CUDA_VISIBLE_DEVICES": gpus}, use_ray=use_ray)


@pytest.mark.parametrize(
    ("demands", "gpus", "expected"),
    [
        ([0, 0], "", [[], []]),
        ([1, 2], "0123", [["0"], ["1", "2"]]),
        ([4, 4], "01234567", [list("0123"), list("4567")]),
        ([1, 1, 1], "0", [["0"], ["0"], ["0"]]),
        ([2, 2, 1], "012", [["0", "1"], ["0", "1"], ["2"]]),
    ],
)
def test_workers_get_gpus_of_their_own_while_there_are_any(
    demands: list[int], gpus: str, expected: list[list[str]]
) -> None:
    assert assign_gpus(demands, list(gpus)) == expected


def test_worker_with_more_ranks_than_gpus_is_refused() -> None:
    with pytest.raises(ConfigError, match="tp_size 4 needs 4 GPUs, and 2 are visible"):
        assign_gpus([1, 4], ["0", "1"])


def test_a_gpu_pool_on_a_machine_without_one_is_refused() -> None:
    with pytest.raises(ConfigError, match="no GPU is visible; take device cpu"):
        assign_gpus([0, 1], [])


def test_visible_gpus_come_from_the_environment_before_the_devices(tmp_path: Path) -> None:
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm"):
        (tmp_path / name).touch()
    assert visible_gpus({}, tmp_path) == ["0", "1"]
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": "3,GPU-7a"}, tmp_path) == ["3", "GPU-7a"]
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": ""}, tmp_path) == []
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": "-1"}, tmp_path) == []
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": "1, 2 ,-1,3"}, tmp_path) == ["1", "2"]


def test_each_worker_sees_the_gpus_of_its_ranks() -> None:
    system = SystemConfig(
        model_path=MODEL,
        num_decode=2,
        prefill=GPU,
        decode={"engine": {"device": "cuda", "tp_size": 2}},
    )
    environments = worker_environments(system, {"CUDA_VISIBLE_DEVICES": "4,5,6,7,8"})
    assert environments == {
        (Role.PREFILL, 0): {"CUDA_VISIBLE_DEVICES": "4"},
        (Role.DECODE, 0): {"CUDA_VISIBLE_DEVICES": "5,6"},
        (Role.DECODE, 1): {"CUDA_VISIBLE_DEVICES": "7,8"},
    }


def test_cpu_workers_keep_their_environment() -> None:
    environments = worker_environments(SystemConfig(model_path=MODEL), {})
    assert environments == {(Role.PREFILL, 0): {}, (Role.DECODE, 0): {}}


def test_pool_defaults_lie_under_its_settings() -> None:
    system = SystemConfig(model_path=MODEL, decode={"engine": {"tp_size": "2"}})
    config = engine_config(system, Role.DECODE)
    assert (config.tp_size, config.max_num_batched_tokens) == (2, 128)
    assert engine_config(system, Role.PREFILL).tp_size == 1


def test_impossible_sizes_name_the_pool_and_what_is_possible(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, num_attention_heads=6, num_key_value_heads=3)
    wrong = {"engine": {"tp_size": 4}}
    with pytest.raises(ConfigError, match=r"decode pool: tp_size 4 does not divide .* 6; take 1"):
        check(SystemConfig(model_path=folder, decode=wrong))
    with pytest.raises(ConfigError, match="prefill pool: tp_size must be at least 1, got 0"):
        check(SystemConfig(model_path=folder, prefill={"engine": {"tp_size": 0}}))
    # A pool without workers may be set as it likes.
    check(SystemConfig(model_path=folder, num_prefill=0, prefill=wrong))


def test_pools_on_a_gpu_and_a_cpu_cannot_exchange_kv(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path)
    cuda = {"engine": {"device": "cuda", "block_size": 64}}
    cpu = {"engine": {"block_size": 64}}
    with pytest.raises(ConfigError, match=r"engine.device is cpu in the prefill pool and cuda"):
        check(SystemConfig(model_path=folder, prefill=cpu, decode=cuda), "0")
    with pytest.raises(ConfigError, match=r"engine.device is cuda in the prefill pool and cpu"):
        check(SystemConfig(model_path=folder, prefill=cuda, decode=cpu), "0")
    check(SystemConfig(model_path=folder, num_prefill=0, decode=cuda), "0")
    check(SystemConfig(model_path=folder, prefill=cuda, decode=cuda), "0,1")


def test_ray_needs_gpus_for_all_workers_and_processes_share_them(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, num_attention_heads=4, num_key_value_heads=4)
    two_ranks = {"engine": {"device": "cuda", "tp_size": 2}}
    system = SystemConfig(model_path=folder, num_prefill=0, num_decode=2, decode=two_ranks)
    with pytest.raises(ConfigError, match="2 workers need 4 GPUs in all, and 3 are visible"):
        check(system, "0,1,2")
    check(system, "0,1,2,3")
    check(system, "0,1", use_ray=False)
    for use_ray in (False, True):
        with pytest.raises(ConfigError, match="tp_size 2 needs 2 GPUs, and 1 are visible"):
            check(system, "0", use_ray=use_ray)
        with pytest.raises(ConfigError, match="no GPU is visible"):
            check(system, "-1", use_ray=use_ray)


def test_pools_whose_kv_differs_are_refused(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path)
    fp8 = {"engine": {"kv_cache_dtype": "fp8"}}
    with pytest.raises(ConfigError, match=r"kv_cache_dtype .*fp8"):
        check_pools(SystemConfig(model_path=folder, decode=fp8), {}, use_ray=False)
    check_pools(SystemConfig(model_path=folder, decode=fp8, prefill=fp8), {}, use_ray=False)


def test_a_gpu_pool_is_read_with_the_gpus_defaults() -> None:
    settings = {"engine": {"device": "cuda", "max_num_seqs": 200}}
    config = engine_config(SystemConfig(model_path=MODEL, decode=settings), Role.DECODE)
    assert (config.max_num_seqs, config.max_num_batched_tokens) == (200, 8192)


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        ({}, True),
        ({"prefill": DUMMY}, True),
        ({"prefill": DUMMY, "decode": DUMMY}, False),
        ({"num_prefill": 0, "decode": DUMMY}, False),
    ],
    ids=["none", "one pool", "both", "the only one"],
)
def test_weights_are_read_unless_all_pools_make_their_own(
    sections: dict[str, Any], expected: bool
) -> None:
    assert reads_weights(SystemConfig(model_path=MODEL, **sections)) is expected
