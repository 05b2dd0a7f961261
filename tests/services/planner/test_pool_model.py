"""Workers predicted from a machine's limits, and read from measured figures."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from baton.core.errors import ConfigError
from baton.model_info.formulas import kv_bytes_per_token
from baton.model_info.machines import find_machine
from baton.model_info.shapes import SHAPES, find_shape
from services.planner.pool_model import Efficiency, predict
from services.planner.profile_file import read_profile

EXACT = Efficiency(
    compute=1, attention=1, bandwidth=1, step_s=0, sequence_s=0, reduction_s=0
)  # fmt: skip
PUBLISHED_PARAMS = {
    "llama-3.2-1b": 1.24e9, "llama-2-7b": 6.74e9, "llama-3.1-8b": 8.03e9, "opt-13b": 12.85e9,
    "opt-66b": 65.7e9, "llama-3.1-70b": 70.6e9,
}  # fmt: skip


@pytest.mark.parametrize("name", SHAPES)
def test_known_shapes_have_the_published_number_of_parameters(name: str) -> None:
    model = find_shape(name)
    is_tied = name in ("llama-3.2-1b", "opt-13b", "opt-66b")
    embeddings = model.head_params * (1 if is_tied else 2)
    assert model.layer_matmul_params + embeddings == pytest.approx(PUBLISHED_PARAMS[name], rel=0.01)


def test_one_device_without_losses_is_the_roofline() -> None:
    model, machine = find_shape("llama-3.1-8b"), find_machine("h200")
    pool = predict(model, machine, 1, dtype="bfloat16", efficiency=EXACT)
    hardware = pool.hardware
    assert hardware.step_fixed_s == pytest.approx(model.weight_bytes_per_step / 4800e9)
    assert hardware.prefill_token_s == pytest.approx(2 * model.layer_matmul_params / 989.5e12)
    assert hardware.prefill_pair_s == pytest.approx(4 * 32 * 128 * 32 / 989.5e12)
    assert hardware.decode_kv_token_s == pytest.approx(kv_bytes_per_token(model) / 4800e9)
    room = 141e9 * 0.9 - model.weight_bytes_per_step
    assert pool.max_kv_tokens == int(room // kv_bytes_per_token(model))


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("size", [2, 4, 8])
def test_more_devices_are_faster_but_not_for_nothing(name: str, size: int) -> None:
    model, machine = find_shape(name), find_machine("h200")
    machine = dataclasses.replace(machine, memory_bytes=200e9)
    one = predict(model, machine, 1, dtype="bfloat16")
    more = predict(model, machine, size, dtype="bfloat16")
    for field in ("prefill_token_s", "prefill_pair_s", "decode_kv_token_s"):
        assert getattr(more.hardware, field) < getattr(one.hardware, field)
    assert more.hardware.prefill_token_s > one.hardware.prefill_token_s / size
    assert more.hardware.step_fixed_s > one.hardware.step_fixed_s / size
    assert more.max_kv_tokens > one.max_kv_tokens


def test_impossible_workers_are_refused_with_numbers() -> None:
    model, machine = find_shape("llama-3.1-70b"), find_machine("h100")
    with pytest.raises(ConfigError, match=r"no room for KV on 1 x h100 of 80 GB.*at least 2"):
        predict(model, machine, 1, dtype="bfloat16")
    with pytest.raises(ConfigError, match="tensor_parallel=3 does not divide 64 attention heads"):
        predict(model, machine, 3, dtype="bfloat16")
    with pytest.raises(ConfigError, match="no figures for memory"):
        predict(find_shape("opt-13b"), find_machine("cpu-2core"), 1, dtype="bfloat16")
    with pytest.raises(ConfigError, match=r"efficiency.compute must be .* got 1.5"):
        Efficiency(compute=1.5)
    with pytest.raises(ConfigError, match="unknown model shape 'gpt-5'"):
        find_shape("gpt-5")


WORKER = {
    "tensor_parallel": 1, "max_kv_tokens": 5000, "step_fixed_s": 0.02, "prefill_token_s": 1e-4,
    "prefill_pair_s": 1e-8, "decode_sequence_s": 1e-4, "decode_kv_token_s": 1e-7,
    "link_bytes_per_second": 1e10,
}  # fmt: skip


def profile(path: Path, *workers: object, **top: object) -> Path:
    path.write_text(json.dumps({"kv_bytes_per_token": 1000, "workers": workers, **top}))
    return path


def test_measured_figures_are_read_and_decode_steps_may_differ(tmp_path: Path) -> None:
    two = {**WORKER, "tensor_parallel": 2, "decode_step_fixed_s": 0.03, "start_s": 40}
    read = read_profile(profile(tmp_path / "p.json", WORKER, two, source="here"))
    assert set(read.prefill) == set(read.decode) == {1, 2}
    assert read.prefill[1] == read.decode[1]
    assert read.prefill[2].start_s == 40
    assert read.decode[2].hardware == dataclasses.replace(
        read.prefill[2].hardware, step_fixed_s=0.03
    )
    assert (read.source, read.kv_bytes_per_token) == ("here", 1000)


@pytest.mark.parametrize(
    ("workers", "says"),
    [
        ([], '"workers" is empty'),
        ([7], r"workers\[0\] must be an object, got int"),
        ([{**WORKER, "speed": 1}], "unknown key 'speed'"),
        ([{**WORKER, "step_fixed_s": -1}], "step_fixed_s must be a number of at least 0, got -1"),
        ([{**WORKER, "step_fixed_s": "1"}], "step_fixed_s must be a number"),
        ([{**WORKER, "max_kv_tokens": 0}], "no room for KV"),
        ([{**WORKER, "link_bytes_per_second": 0}], "link_bytes_per_second must be above 0"),
        ([WORKER, WORKER], "tensor_parallel 1 is there twice"),
        ([{k: v for k, v in WORKER.items() if k != "prefill_token_s"}], "prefill_token_s must be"),
    ],
)
def test_a_wrong_profile_is_refused_with_its_place(
    tmp_path: Path, workers: list[object], says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        read_profile(profile(tmp_path / "p.json", *workers))


@pytest.mark.parametrize("text", [None, "{", "[]", '{"workers": 3}', '{"workers": []}'])
def test_a_file_that_is_no_profile_is_refused(tmp_path: Path, text: str | None) -> None:
    path = tmp_path / "p.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=r"p\.json"):
        read_profile(path)
