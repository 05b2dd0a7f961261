"""After the start nothing is compiled any more: no request waits for a compiler."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import tiny_llama

SUPPORT = Path(__file__).resolve().parents[2] / "support"
ROOT = SUPPORT.parents[1]


def test_random_steps_compile_nothing_that_the_start_has_not(tmp_path: Path) -> None:
    folder = tiny_llama.write_checkpoint(
        tmp_path / "m",
        hidden_size=128,
        intermediate_size=256,
        head_dim=64,
        num_hidden_layers=2,
        max_position_embeddings=8192,
    )
    environ = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environ["PYTHONPATH"] = os.pathsep.join((str(ROOT), str(SUPPORT)))
    done = subprocess.run(
        [sys.executable, str(SUPPORT / "warm_up_report.py"), str(folder)],
        env=environ,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    num_of_start, *late = done.stdout.split()
    assert int(num_of_start) > 20
    assert late == []
