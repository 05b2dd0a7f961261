"""Ray Serve's pools under a policy of the whole application, on a real Ray of this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from running_system import free_port
from tiny_llama import write_checkpoint, write_pair_tokenizer

pytestmark = pytest.mark.slow

TIMEOUT_S = 600
ROOT = Path(__file__).resolve().parents[2]


def run(folder: Path, manner: str) -> dict[str, Any]:
    write_checkpoint(folder / "tiny", max_position_embeddings=8192)
    write_pair_tokenizer(folder / "tiny")
    support = ROOT / "tests/support"
    arguments = [str(folder), manner, str(free_port()), str(free_port())]
    done = subprocess.run(
        [sys.executable, str(support / "ray_scaled.py"), *arguments],
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{support}"},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    seen = json.loads(done.stdout.splitlines()[-1])
    assert isinstance(seen, dict)
    return seen


@pytest.mark.timeout(TIMEOUT_S + 60)
def test_replica_that_serve_takes_down_loses_no_request(tmp_path: Path) -> None:
    seen = run(tmp_path, "told")
    assert seen["equal"]
    assert seen["moved"] > 0


@pytest.mark.timeout(TIMEOUT_S + 60)
def test_policy_sees_the_load_and_asks_for_replicas(tmp_path: Path) -> None:
    seen = run(tmp_path, "planned")
    assert (seen["copies"], seen["desired"]) == (1, 2)
    assert seen["rate"] > 0
    assert "start decode" in seen["orders"]
