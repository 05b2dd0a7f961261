"""How long `baton serve` waits for its system."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from baton.cli import serve
from baton.core.errors import ConfigError
from services.launch.config import SystemConfig

GPU = {"engine": {"device": "cuda"}}


def ready_timeout_s(*arguments: str, decode: dict[str, dict[str, str]] | None = None) -> float:
    parser = argparse.ArgumentParser()
    serve.add_arguments(parser)
    system = SystemConfig(model_path=Path("/models/llama"), num_prefill=0, decode=decode or {})
    return serve._ready_timeout_s(system, parser.parse_args(arguments).ready_timeout)


def test_workers_on_gpus_may_take_longer_than_their_ranks_may() -> None:
    from baton.engine.tensor_parallel.group import CONNECT_TIMEOUT_S, START_TIMEOUT_S

    assert ready_timeout_s() == 180
    assert ready_timeout_s(decode=GPU) > CONNECT_TIMEOUT_S + START_TIMEOUT_S


def test_ready_timeout_is_taken_as_told() -> None:
    assert ready_timeout_s("--ready-timeout", "7.5", decode=GPU) == 7.5
    for wrong in ("0", "-1", "nan"):
        with pytest.raises(ConfigError, match="--ready-timeout must be above zero"):
            ready_timeout_s("--ready-timeout", wrong)
