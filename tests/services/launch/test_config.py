"""What each process is told, from one system configuration."""

from __future__ import annotations

from pathlib import Path

import pytest

from baton.core.errors import ConfigError
from baton.core.worker_info import Role
from services.launch.config import SystemConfig, router_values, worker_values

MODEL = Path("/models/llama")


def test_section_values_win_over_what_the_system_derives() -> None:
    system = SystemConfig(
        model_path=MODEL,
        prefill={"engine": {"max_num_seqs": 4}},
        decode={"worker_id": "mine"},
    )
    prefill = worker_values(system, Role.PREFILL, 0)
    assert prefill["engine"] == {"model_path": "/models/llama", "max_num_seqs": 4}
    assert prefill["worker_id"] == "prefill-0"
    assert worker_values(system, Role.DECODE, 1)["worker_id"] == "mine"


def test_router_gets_the_front_door_and_the_tokenizer() -> None:
    values = router_values(SystemConfig(model_path=MODEL, http_port=8123))
    assert values["http_port"] == 8123
    assert values["model_path"] == "/models/llama"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"http_port": 0}, "http_port must be between 1 and 65535, got 0"),
        ({"grpc_port": 8000}, "both 8000"),
        ({"num_decode": 0}, "at least one decode worker"),
    ],
)
def test_contradictions_are_refused_with_values(changes: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SystemConfig(model_path=MODEL, **changes)
