"""The gRPC contract as buf sees it: its style, and what breaks with proto/baseline.binpb.

The baseline is the contract that clients and workers of the last release were built with.
`python -m tools.proto_contract` makes it anew, which belongs to a release and to nothing else.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROTO = ROOT / "proto"
BASELINE = PROTO / "baseline.binpb"
VIRTUAL = "baton/rpc/v1"
"""Where files import each other from; see tools/generate_protos.py."""
TIMEOUT_S = 60


def buf(*arguments: str | Path, proto: Path = PROTO) -> subprocess.CompletedProcess[str]:
    """Run buf on a copy of `proto`/v1; what it found is in `stdout`.

    Raises RuntimeError when it is not installed.
    """
    binary = Path(sysconfig.get_path("scripts")) / "buf"
    if not binary.is_file():
        raise RuntimeError(f"{binary} is missing; pip install -e '.[test]'")
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(PROTO / "buf.yaml", folder)
        shutil.copytree(proto / "v1", Path(folder) / VIRTUAL)
        return subprocess.run(
            [binary, *map(str, arguments)], cwd=folder, text=True, timeout=TIMEOUT_S,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            env={"HOME": folder, "PATH": "/usr/bin:/bin"},
        )  # fmt: skip


if __name__ == "__main__":
    done = buf("build", "-o", BASELINE)
    print(done.stdout, end="")
    sys.exit(done.returncode)
