"""`python -m bench.fabric.gpu_owner DEVICE ARENA_BYTES SEED`: a worker on a GPU that is read.

Each line of standard input is a JSON command and is answered by a line "> JSON":

    {"pools": {...}, "kind": "mapped", "nonce": hex}    open these pools; {"card": hex}
    {"multiply_s": 1.0}      multiply matrices; {"flops_per_s": ...}

End of input ends it.
"""

from __future__ import annotations

import asyncio
import json
import select
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.fabric.gpu_pool import WorkerPools

ROOT = Path(__file__).resolve().parents[2]
ANSWER_TIMEOUT_S = 60.0
NAME = "owner"
MATRIX_SIZE = 8192
MULTIPLICATIONS = 16
"""Between two looks at the clock."""


class GpuOwner:
    """Such a process, seen from its reader. A context manager."""

    def __init__(self, *, device_id: int, arena_bytes: int, seed: int) -> None:
        self._process = subprocess.Popen(
            [
                *(sys.executable, "-m", "bench.fabric.gpu_owner"),
                *(str(device_id), str(arena_bytes), str(seed)),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=ROOT,
            bufsize=0,
        )

    def open(self, pools: WorkerPools, kind: str, nonce: bytes) -> bytes:
        """The card of a worker with these pools, which replace the former ones."""
        return bytes.fromhex(self._ask(pools=asdict(pools), kind=kind, nonce=nonce.hex())["card"])

    def start_multiplying(self, seconds: float) -> None:
        self._send({"multiply_s": seconds})

    def multiplied(self) -> float:
        """Operations per second, of what was started."""
        return float(self._answer()["flops_per_s"])

    def _ask(self, **command: object) -> dict[str, Any]:
        self._send(command)
        return self._answer()

    def _send(self, command: dict[str, object]) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(command).encode() + b"\n")

    def _answer(self) -> dict[str, Any]:
        stdout = self._process.stdout
        assert stdout is not None
        while True:
            if not select.select([stdout], [], [], ANSWER_TIMEOUT_S)[0]:
                raise TimeoutError(f"the owner did not answer within {ANSWER_TIMEOUT_S:g} s")
            line = stdout.readline()
            if not line:
                raise RuntimeError(f"the owner has ended ({self._process.wait()})")
            # Libraries of GPUs greet on standard output.
            if line.startswith(b"> "):
                answer: dict[str, Any] = json.loads(line[2:])
                return answer

    def __enter__(self) -> GpuOwner:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(ANSWER_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()


def main() -> None:
    import torch

    from bench.fabric.gpu_pool import make_arena, open_rank_transports
    from kvtransfer.group_card import join_cards

    device_id, arena_bytes, seed = map(int, sys.argv[1:])
    torch.cuda.set_device(device_id)
    arena = make_arena(arena_bytes, torch.device("cuda", device_id), seed=seed)
    torch.cuda.synchronize()
    opened = []
    for line in sys.stdin:
        command = json.loads(line)
        answer: dict[str, object]
        if "pools" in command:
            for transport in opened:
                asyncio.run(transport.close())
            pools = WorkerPools(**command["pools"])
            opened = open_rank_transports(NAME, pools, arena, kind=command["kind"])
            nonce = bytes.fromhex(command["nonce"])
            answer = {"card": join_cards([one.card(nonce) for one in opened]).hex()}
        else:
            answer = {"flops_per_s": multiply_rate(command["multiply_s"])}
        print(f"> {json.dumps(answer)}", flush=True)


def multiply_rate(seconds: float) -> float:
    """Operations per second of products of two random bfloat16 matrices on the current stream."""
    import torch

    stream = torch.cuda.current_stream()

    shape = (MATRIX_SIZE, MATRIX_SIZE)
    left, right = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    product = torch.empty_like(left)
    torch.mm(left, right, out=product)
    stream.synchronize()
    started_s = time.perf_counter()
    count = 0
    while (elapsed_s := time.perf_counter() - started_s) < seconds:
        for _ in range(MULTIPLICATIONS):
            torch.mm(left, right, out=product)
        stream.synchronize()
        count += MULTIPLICATIONS
    return count * 2 * MATRIX_SIZE**3 / elapsed_s


if __name__ == "__main__":
    main()
