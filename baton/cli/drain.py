"""`baton drain`: what runs in this container finishes, before its supervisor stops it.

Workers (--config) take no new work; running requests end or move to other workers, leased KV is
read, and then the command returns. For them draining is for good. A router (--router) is left
alone: after a delay in which load balancers hear of its end, the command waits until nothing runs
in it.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from baton.core.errors import ConfigError, Unavailable

if TYPE_CHECKING:
    import grpc

    from baton.core.worker_info import WorkerInfo

ANSWER_MARGIN_S = 5.0
"""Beyond the drain itself, until the worker has answered."""
POLL_S = 0.5
HTTP_TIMEOUT_S = 4.0
EXIT_LEFT = 1
"""Requests were ended, or still run."""
MAX_DRAIN_S = 86400.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    who = parser.add_mutually_exclusive_group(required=True)
    who.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="the workers' settings; names their registry directory",
    )
    who.add_argument("--router", metavar="URL", help="wait until this router is idle")
    parser.add_argument(
        "--timeout",
        type=float,
        metavar="S",
        help="seconds that requests may go on (default: drain_s of the settings; router: 120)",
    )
    parser.add_argument(
        "--delay",
        type=float,
        default=0.0,
        metavar="S",
        help="seconds before a router is looked at first (%(default)s)",
    )


def run(args: argparse.Namespace, environ: Mapping[str, str]) -> int:
    for name, value in (("--timeout", args.timeout), ("--delay", args.delay)):
        if value is not None and not 0 <= value <= MAX_DRAIN_S:
            raise ConfigError(f"{name} must be between 0 and {MAX_DRAIN_S:g}, got {value:g}")
    try:
        if args.router is not None:
            timeout_s = 120.0 if args.timeout is None else args.timeout
            num_left = wait_for_router(args.router, delay_s=args.delay, timeout_s=timeout_s)
            print(f"{num_left} requests still run")
            return EXIT_LEFT if num_left else 0
        num_workers, num_ended = asyncio.run(drain_workers(args.config, args.timeout, environ))
    except Unavailable as error:
        print(f"could not drain: {error}", file=sys.stderr)
        return EXIT_LEFT
    print(f"{num_workers} workers drained, {num_ended} requests ended")
    return EXIT_LEFT if num_ended else 0


def wait_for_router(url: str, *, delay_s: float, timeout_s: float) -> int:
    """Requests that still run in the router at `url` after at most `delay_s` + `timeout_s`.

    Raises Unavailable when it does not answer: then it has ended already.
    """
    from baton.cli.probe import ask_http

    time.sleep(delay_s)
    deadline = time.monotonic() + timeout_s
    while True:
        num_running = _num_running(ask_http(f"{url}/metrics", HTTP_TIMEOUT_S, max_bytes=None))
        if not num_running or time.monotonic() >= deadline:
            return num_running
        time.sleep(min(POLL_S, max(0.0, deadline - time.monotonic())))


def _num_running(metrics: str) -> int:
    from baton.core.metrics import RUNNING

    for line in metrics.splitlines():
        name, _, value = line.partition(" ")
        if name == RUNNING.name:
            return math.ceil(float(value))
    raise Unavailable(f"the router's metrics hold no {RUNNING.name}")


async def drain_workers(
    config: Path, timeout_s: float | None, environ: Mapping[str, str]
) -> tuple[int, int]:
    """Drain all workers of this container; returns how many there are and how many requests were
    ended for lack of time. Raises Unavailable when one does not answer."""
    from baton.cli.local_workers import find_local_workers
    from baton.rpc.v1 import worker_pb2, worker_pb2_grpc

    local = await find_local_workers(config, environ)
    drain_s = local.drain_s if timeout_s is None else timeout_s

    async def drain(info: WorkerInfo, channel: grpc.aio.Channel) -> int:
        request = worker_pb2.DrainRequest(timeout_ms=round(drain_s * 1000))
        reply = await worker_pb2_grpc.WorkerStub(channel).Drain(request)
        return int(reply.num_ended)

    ended = await local.ask(drain, timeout_s=drain_s + ANSWER_MARGIN_S)
    return len(ended), sum(ended)
