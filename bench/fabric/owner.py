"""`python -m bench.fabric.owner NAME SPEC SEED`: a process that owns a pool and lets others read.

A line with a nonce in hex on standard input is answered by a card in hex; end of input
ends it.
"""

from __future__ import annotations

import json
import select
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

from bench.fabric.pool import PoolSpec, open_side

ROOT = Path(__file__).resolve().parents[2]
START_TIMEOUT_S = 60.0


class Owner:
    """Such a process, seen from its reader. A context manager."""

    def __init__(self, name: str, spec: PoolSpec, seed: int) -> None:
        self.name = name
        self.spec = spec
        self.seed = seed
        arguments = [name, json.dumps(asdict(spec)), str(seed)]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bench.fabric.owner", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=ROOT,
            text=True,
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    def card(self, nonce: bytes) -> bytes:
        """Raises TimeoutError when the process does not answer."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(nonce.hex() + "\n")
        self._process.stdin.flush()
        if not select.select([self._process.stdout], [], [], START_TIMEOUT_S)[0]:
            raise TimeoutError(f"{self.name} gave no card within {START_TIMEOUT_S:g} s")
        return bytes.fromhex(self._process.stdout.readline())

    def __enter__(self) -> Owner:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(START_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()


def main() -> None:
    name, spec, seed = sys.argv[1:]
    side = open_side(name, "auto", PoolSpec(**json.loads(spec)), seed=int(seed))
    for line in sys.stdin:
        print(side.transport.card(bytes.fromhex(line)).hex(), flush=True)


if __name__ == "__main__":
    main()
