"""Profiles as files: written and read again, old ones too, and what is wrong with the others."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from baton.core.errors import ConfigError
from made_up_worker import MODEL
from services.planner.profile_file import profile_json, read_profile

FASTER = dataclasses.replace(
    MODEL,
    tensor_parallel=2,
    start_s=12.5,
    hardware=dataclasses.replace(
        MODEL.hardware, step_gap_s=0.001, request_s=0.004, neighbour_share=0.4
    ),
)
ROOT = Path(__file__).resolve().parents[3]


def written(tmp_path: Path, data: Any) -> Path:
    file = tmp_path / "p.json"
    file.write_text(json.dumps(data))
    return file


def whole() -> dict[str, Any]:
    return profile_json(MODEL, FASTER, kv_bytes_per_token=4096, source="here")


def test_a_profile_is_read_as_it_was_written(tmp_path: Path) -> None:
    profile = read_profile(written(tmp_path, whole()))
    assert profile.prefill == {1: dataclasses.replace(MODEL, source="here")}
    assert profile.decode == {2: dataclasses.replace(FASTER, source="here")}
    assert (profile.kv_bytes_per_token, profile.source) == (4096, "here")


def test_entries_without_a_pool_are_for_both() -> None:
    profile = read_profile(ROOT / "bench/profiles/opt-13b-a100-vllm.json")
    assert set(profile.prefill) == set(profile.decode) == {1, 2, 4}
    prefill, decode = profile.prefill[1].hardware, profile.decode[1].hardware
    assert decode.step_fixed_s != prefill.step_fixed_s
    assert (prefill.step_gap_s, prefill.neighbour_share, prefill.request_s) == (0, 0, 0)


def test_residuals_do_not_disturb(tmp_path: Path) -> None:
    data = whole()
    data["workers"][0]["residuals"] = {"num_rounds": 3, "kinds": {}}
    assert read_profile(written(tmp_path, data)).prefill[1].max_kv_tokens == MODEL.max_kv_tokens


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"pool": "both"}, 'pool must be "prefill" or "decode", got \'both\''),
        ({"pool": 3}, 'pool must be "prefill" or "decode", got 3'),
        ({"pool": ["prefill"]}, 'pool must be "prefill" or "decode"'),
        ({"pool": "decode"}, "no entry for prefill workers"),
        ({"neighbour_share": -1}, "neighbour_share must be a number of at least 0, got -1"),
        ({"request_s": "x"}, "request_s must be a number of at least 0, got 'x'"),
        ({"speed": 1}, "unknown key 'speed'"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    data = whole()
    data["workers"][0] |= change
    with pytest.raises(ConfigError) as error:
        read_profile(written(tmp_path, data))
    assert says in str(error.value)


def test_a_size_twice_in_one_pool_is_refused(tmp_path: Path) -> None:
    data = whole()
    data["workers"].append(data["workers"][0])
    with pytest.raises(ConfigError, match="tensor_parallel 1 is there twice for prefill workers"):
        read_profile(written(tmp_path, data))
