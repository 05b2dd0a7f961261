"""Run a tiny system on a local Ray whose pools a policy changes; prints what came of it as JSON.

python ray_scaled.py FOLDER told|planned HTTP_PORT GRPC_PORT
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx

from greedy_stream import stream_text
from services.launch import ray_autoscaling
from services.launch.autoscale_config import judged_by, read_autoscale
from services.launch.autoscaling import prepare
from services.launch.config import SystemConfig
from services.launch.ray_cluster import start_system
from services.launch.run_directory import RunDirectory

WAIT_S = 180.0
NUM_TOKENS = 1200
PROMPTS = [[(7 * i + 31 * k) % 256 for i in range(40 + k)] for k in range(6)]
PROFILE = {
    "source": "far too slow, so that any load needs more workers",
    "kv_bytes_per_token": 768,
    "workers": [
        {
            "tensor_parallel": 1, "max_kv_tokens": 2000, "start_s": 5, "step_fixed_s": 0.2,
            "prefill_token_s": 1e-5, "prefill_pair_s": 0, "decode_sequence_s": 0.2,
            "decode_kv_token_s": 0, "link_bytes_per_second": 1e9,
        }
    ],
}  # fmt: skip


class Run:
    """The system and what a test asks of it."""

    def __init__(self, folder: Path, http_port: int, grpc_port: int) -> None:
        (folder / "profile-in.json").write_text(json.dumps(PROFILE))
        system = SystemConfig(
            folder / "tiny", http_port=http_port, grpc_port=grpc_port,
            prefill={"engine": {"dtype": "float32"}}, decode={"engine": {"dtype": "float32"}},
            router={"policy": {"local_prefill_max_tokens": 0}},
            autoscale={
                "enabled": True, "ttft_s": 5.0, "itl_s": 0.5, "interval_s": 1.0, "max_devices": 3,
                "profile": str(folder / "profile-in.json"), "drain_s": 120.0,
                "prefill": {"max_workers": 1}, "decode": {"max_workers": 2},
            },
        )  # fmt: skip
        settings = read_autoscale(system, {}, use_ray=True)
        assert settings is not None
        self.system = judged_by(system, settings)
        self.run = RunDirectory.create(folder / "run")
        self.tell(1)
        self.local = start_system(
            self.system, self.run, use_haproxy=False, autoscaling=prepare(self.system, settings)
        )
        self.url = f"http://127.0.0.1:{http_port}"

    def tell(self, num_decode: int) -> None:
        """Replaced at once: the controller may read at any time."""
        draft = self.run.path / "told.draft"
        draft.write_text(json.dumps({"Prefill": 1, "Decode": num_decode}))
        draft.replace(self.run.path / "told.json")

    def num_decode(self) -> int:
        """Replicas that run, and those that are about to end."""
        from ray import serve

        states = serve.status().applications["baton"].deployments["Decode"].replica_states
        return sum(states.values())

    def num_ready(self) -> int:
        text = httpx.get(f"{self.url}/metrics", timeout=10, trust_env=False).text
        start = 'baton_workers{role="decode"'
        lines = [line for line in text.splitlines() if line.startswith(start)]
        return round(sum(float(line.rpartition(" ")[2]) for line in lines))

    async def streams(self) -> list[str]:
        return await asyncio.gather(*(stream_text(self.url, p, NUM_TOKENS) for p in PROMPTS))

    def moved(self) -> float:
        text = httpx.get(f"{self.url}/metrics", timeout=10, trust_env=False).text
        start = 'baton_migrations_total{reason="drain",result="moved"'
        return sum(float(x.rpartition(" ")[2]) for x in text.splitlines() if x.startswith(start))


async def wait_for(is_there: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not is_there():
        if time.monotonic() > deadline:
            raise TimeoutError("not in time")
        await asyncio.sleep(0.2)


async def told(run: Run) -> dict[str, Any]:
    """Up, and down again while requests run on both."""
    unscaled = await run.streams()
    run.tell(2)
    await wait_for(lambda: run.num_decode() == 2)
    await wait_for(lambda: run.num_ready() == 2)
    streams = asyncio.create_task(run.streams())
    await asyncio.sleep(1.0)
    run.tell(1)
    scaled = await streams
    await wait_for(lambda: run.num_decode() == 1)
    return {"equal": scaled == unscaled, "moved": run.moved()}


async def planned(run: Run) -> dict[str, Any]:
    """The real policy sees the load and asks for another replica."""
    going = True

    async def client() -> None:
        while going:
            await stream_text(run.url, PROMPTS[0], 40)

    clients = [asyncio.create_task(client()) for _ in range(4)]
    await wait_for(lambda: run.num_ready() == 2)
    going = False
    await asyncio.gather(*clients)
    lines = (run.run.path / "decisions.jsonl").read_text().splitlines()
    last = json.loads(lines[-1])
    return {
        "copies": last["num_copies"],
        "rate": max(json.loads(line)["seen"]["load"]["rate_per_s"] for line in lines),
        "desired": last["decision"]["decode"]["desired"],
        "orders": sorted({o for line in lines for o in json.loads(line)["orders"]}),
    }


def main() -> None:
    folder, manner, http_port, grpc_port = sys.argv[1:]
    if manner == "told":
        ray_autoscaling.POLICY = "ray_told_policy:ToldPolicy"
    run = Run(Path(folder), int(http_port), int(grpc_port))
    try:
        seen = asyncio.run(told(run) if manner == "told" else planned(run))
    finally:
        run.local.stop(grace_s=8)
    print(json.dumps(seen))


if __name__ == "__main__":
    main()
