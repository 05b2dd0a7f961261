"""A worker that computes nothing, for Dynamo's frontend. Runs in an environment that has Dynamo.

    PYTHON bench/router/dynamo_worker.py --model FOLDER --name NAME [--step-ms 5]

Every live sequence gets one token per step, as with the other made-up workers. Workers and frontend
find each other by files in DYN_FILE_KV.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import AsyncIterator
from typing import Any

import uvloop
from dynamo.llm import ModelInput, ModelType, WorkerType, register_model
from dynamo.runtime import DistributedRuntime

TOKEN_ID = 260
"""An ordinary word piece of the tokenizer in use."""


class Steps:
    """One clock for all sequences."""

    def __init__(self, step_s: float) -> None:
        self._step_s = step_s
        self._next: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def run(self) -> None:
        while True:
            await asyncio.sleep(self._step_s)
            done, self._next = self._next, asyncio.get_running_loop().create_future()
            done.set_result(None)

    async def wait(self) -> None:
        await asyncio.shield(self._next)


async def _serve(args: argparse.Namespace) -> None:
    steps = Steps(args.step_ms / 1000)
    running = asyncio.create_task(steps.run())

    async def generate(request: dict[str, Any], context: object) -> AsyncIterator[dict[str, Any]]:
        num_tokens = request["stop_conditions"]["max_tokens"] or 1
        for position in range(num_tokens):
            if position:
                await steps.wait()
            is_last = position + 1 == num_tokens
            yield {"token_ids": [TOKEN_ID], **({"finish_reason": "length"} if is_last else {})}

    loop = asyncio.get_running_loop()
    runtime = DistributedRuntime(loop, "file", "tcp")
    endpoint = runtime.endpoint("bench.backend.generate")
    await register_model(
        ModelInput.Tokens,
        ModelType.Chat,
        endpoint,
        args.model,
        args.name,
        worker_type=WorkerType.Aggregated,
        kv_cache_block_size=16,
        ignore_weights=True,
    )
    print("ready", flush=True)
    loop.add_reader(sys.stdin, lambda: sys.stdin.read(1) or runtime.shutdown())
    await endpoint.serve_endpoint(generate)
    running.cancel()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--name", required=True)
    parser.add_argument("--step-ms", type=float, default=5.0)
    uvloop.run(_serve(parser.parse_args()))


if __name__ == "__main__":
    main()
