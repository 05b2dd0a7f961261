"""A process that is a worker to whoever manages workers: it announces itself and answers Drain.

    python idle_worker.py --name decode-1 --role decode --registry DIR [--manner MANNER]

Manners: plain; slow (draining takes 1 s); deaf (no end on SIGTERM); silent (never announced);
broken (exits at once).
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
from pathlib import Path

import grpc

from baton.core.clock import MonotonicClock
from baton.core.kv_layout import KvLayout
from baton.core.worker_info import Epoch, Role, WorkerId, WorkerInfo
from baton.registry.directory import DirectoryRegistry
from baton.rpc.v1 import worker_pb2, worker_pb2_grpc

TTL_S = 5.0


class _Service(worker_pb2_grpc.WorkerServicer):
    def __init__(self, manner: str) -> None:
        self._manner = manner

    async def Drain(
        self, request: worker_pb2.DrainRequest, context: grpc.aio.ServicerContext
    ) -> worker_pb2.DrainResponse:
        print("draining", flush=True)
        if self._manner == "slow":
            await asyncio.sleep(min(1.0, request.timeout_ms / 1000))
        return worker_pb2.DrainResponse()


async def _serve(name: str, role: Role, registry: Path, manner: str) -> None:
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    ignored = manner == "deaf"
    loop.add_signal_handler(signal.SIGTERM, (lambda: None) if ignored else stopped.set)
    if manner == "silent":
        await stopped.wait()
        return
    server = grpc.aio.server()
    worker_pb2_grpc.add_WorkerServicer_to_server(_Service(manner), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    info = WorkerInfo(
        WorkerId(name), Epoch(str(os.getpid())), role, f"127.0.0.1:{port}", "m",
        KvLayout("m", 2, 1, 4, 4, "float32"), 8, 64, 4, "shm", os.getpid(),
    )  # fmt: skip
    entries = DirectoryRegistry(registry, clock=MonotonicClock())
    await entries.register(info, ttl_s=TTL_S)
    while not stopped.is_set():
        await entries.renew(info.worker_id, info.epoch)
        try:
            async with asyncio.timeout(TTL_S / 4):
                await stopped.wait()
        except TimeoutError:
            continue
    await entries.deregister(info.worker_id, info.epoch)
    await server.stop(0)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--name", required=True)
    parser.add_argument("--role", type=Role, required=True)
    parser.add_argument("--registry", type=Path, required=True)
    parser.add_argument("--manner", default="plain")
    args = parser.parse_args()
    if args.manner == "broken":
        sys.exit("no model here")
    asyncio.run(_serve(args.name, args.role, args.registry, args.manner))


if __name__ == "__main__":
    main()
