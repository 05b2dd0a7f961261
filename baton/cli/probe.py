"""`baton probe`: answers of the processes in this container, as an exit status for a supervisor.

router live     its event loop answers                      GET /version
router ready    workers answer and tokens flow               GET /health
worker live     the engine made a step or answered a ping lately
worker ready    registered, and connected to the peers that routers name
ray live        this container's Ray node answers            GET /api/local_raylet_healthz
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from baton.core.errors import ConfigError, Unavailable

if TYPE_CHECKING:
    import grpc

    from baton.core.worker_info import WorkerInfo

ROUTER_PATHS = {"live": "/version", "ready": "/health"}
RAYLET_URL = "http://127.0.0.1:52365/api/local_raylet_healthz"
DEFAULT_TIMEOUT_S = 4.0
"""Below the `timeoutSeconds: 10` that a probe of Kubernetes is given for starting Python too."""
EXIT_NO = 1
SHOWN_BYTES = 500


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", choices=("router", "worker", "ray"), help="who is asked")
    parser.add_argument("question", choices=("live", "ready"), help="what it is asked")
    parser.add_argument(
        "--url", default="http://127.0.0.1:8000", metavar="URL", help="of the router (%(default)s)"
    )
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="the workers' settings; names their registry"
    )
    parser.add_argument(
        "--count", type=int, default=1, metavar="N", help="workers that must answer (%(default)s)"
    )
    parser.add_argument(
        "--timeout",
        type=float,
        default=DEFAULT_TIMEOUT_S,
        metavar="S",
        help="seconds for an answer (%(default)s)",
    )


def run(args: argparse.Namespace, environ: Mapping[str, str]) -> int:
    if args.timeout <= 0 or args.count < 1:
        raise ConfigError(f"--timeout and --count must be positive: {args.timeout}, {args.count}")
    try:
        if args.what == "router":
            answer = ask_http(args.url + ROUTER_PATHS[args.question], args.timeout)
        elif args.what == "ray":
            answer = ask_http(RAYLET_URL, args.timeout)
        else:
            answer = asyncio.run(_ask_workers(args, environ))
    except Unavailable as error:
        print(f"{args.what} is not {args.question}: {error}", file=sys.stderr)
        return EXIT_NO
    print(answer)
    return 0


def ask_http(url: str, timeout_s: float, *, max_bytes: int | None = SHOWN_BYTES) -> str:
    """The answer of GET `url`, or its start. Raises Unavailable unless it is a 200."""
    # Of the standard library: a probe runs every few seconds, and other clients load slowly.
    import urllib.error
    import urllib.request

    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=timeout_s) as response:
            return str(response.read(max_bytes).decode(errors="replace"))
    except urllib.error.HTTPError as error:
        with error:
            text = error.read(SHOWN_BYTES).decode(errors="replace")
        raise Unavailable(f"{url}: HTTP {error.code}: {text}") from None
    except (OSError, ValueError) as error:
        raise Unavailable(f"{url}: {error}") from None


async def _ask_workers(args: argparse.Namespace, environ: Mapping[str, str]) -> str:
    from baton.cli.local_workers import find_local_workers
    from services.worker.readiness import READY_SERVICE

    if args.config is None:
        raise ConfigError("--config is missing: the settings that the workers were started with")
    local = await find_local_workers(args.config, environ)
    if len(local.workers) < args.count:
        raise Unavailable(f"{len(local.workers)} of {args.count} workers are registered here")
    service = READY_SERVICE if args.question == "ready" else ""

    async def ask(info: WorkerInfo, channel: grpc.aio.Channel) -> str | None:
        if await _is_serving(channel, service, args.timeout):
            return None
        if args.question == "live" and await _is_draining(channel, args.timeout):
            # A worker that leaves takes no work and yet must not be killed.
            return None
        return f"{info.worker_id} says no"

    reasons = [each for each in await local.ask(ask, timeout_s=args.timeout) if each is not None]
    if reasons:
        raise Unavailable("; ".join(reasons))
    return f"{len(local.workers)} workers"


async def _is_serving(channel: grpc.aio.Channel, service: str, timeout_s: float) -> bool:
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    stub = health_pb2_grpc.HealthStub(channel)
    request = health_pb2.HealthCheckRequest(service=service)
    reply = await stub.Check(request, timeout=timeout_s)
    return bool(reply.status == health_pb2.HealthCheckResponse.SERVING)


async def _is_draining(channel: grpc.aio.Channel, timeout_s: float) -> bool:
    from baton.rpc.v1 import worker_pb2, worker_pb2_grpc

    stub = worker_pb2_grpc.WorkerStub(channel)
    reply = await stub.GetInfo(worker_pb2.GetInfoRequest(), timeout=timeout_s)
    return bool(reply.load.is_draining)
