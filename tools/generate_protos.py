"""Generate baton/rpc/v1 from proto/v1. Usage: python tools/generate_protos.py [OUTPUT_ROOT]

The virtual path `baton/rpc/v1=proto/v1` makes the stubs import `baton.rpc.v1`, so no text is
patched afterwards and no package called `proto` appears. The generator is pinned in the `lint`
extra to the oldest grpcio the project supports: generated code refuses older runtimes.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VIRTUAL = "baton/rpc/v1"


def generate(output_root: Path) -> list[Path]:
    """Write the stubs below `output_root`; returns the folder's generated files."""
    names = sorted(p.name for p in (ROOT / "proto/v1").glob("*.proto"))
    folder = output_root / VIRTUAL
    folder.mkdir(parents=True, exist_ok=True)
    arguments = [
        f"-I{VIRTUAL}={ROOT / 'proto/v1'}",
        *(f"--{kind}={output_root}" for kind in ("python_out", "pyi_out", "grpc_python_out")),
        *(f"{VIRTUAL}/{name}" for name in names),
    ]
    # In a process of its own: protoc and NIXL bring libraries that abort when both are loaded.
    subprocess.run([sys.executable, "-m", "grpc_tools.protoc", *arguments], check=True)
    return sorted(folder.glob("*_pb2*.py*"))


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT
    for path in generate(target):
        print(path)
