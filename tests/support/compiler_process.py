"""Runs a script of this folder where Triton compiles: a process without TRITON_INTERPRET."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

SUPPORT = Path(__file__).resolve().parent
ROOT = SUPPORT.parents[1]


def run_compiling(script: str, argument: Path, *, text: str = "", timeout_s: float) -> str:
    """What `script` prints, given `argument` and `text` as its standard input."""
    environ = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environ["PYTHONPATH"] = os.pathsep.join((str(ROOT), str(SUPPORT)))
    done = subprocess.run(
        [sys.executable, str(SUPPORT / script), str(argument)],
        input=text,
        env=environ,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
