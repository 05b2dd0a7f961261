"""After the start nothing is compiled any more: no request waits for a compiler."""

from __future__ import annotations

from pathlib import Path

import tiny_llama
from compiler_process import run_compiling


def test_random_steps_compile_nothing_that_the_start_has_not(tmp_path: Path) -> None:
    folder = tiny_llama.write_checkpoint(
        tmp_path / "m",
        hidden_size=128,
        intermediate_size=256,
        head_dim=64,
        num_hidden_layers=2,
        max_position_embeddings=8192,
    )
    printed = run_compiling("warm_up_report.py", folder, timeout_s=280)
    num_of_start, *late = printed.split()
    assert int(num_of_start) > 20
    assert late == []
