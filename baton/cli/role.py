"""`baton role`: a running worker goes over to the other pool, and keeps its weights and KV cache.

The worker takes no new work, its requests end or move to others, and seconds later it serves in its
new pool. Nothing is ended for it: a worker that cannot get rid of its requests in time stays where
it is. A worker that is restarted comes back in the pool of its settings.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from baton.core.errors import BatonError, ConfigError

DEFAULT_TIMEOUT_S = 30.0
MAX_TIMEOUT_S = 3600.0
EXIT_STAYS = 1
"""The worker is in its old pool."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("worker", metavar="WORKER", help="its name, or HOST:PORT")
    parser.add_argument("role", choices=("prefill", "decode"), help="the pool it is to serve in")
    parser.add_argument(
        "--run-dir",
        type=Path,
        metavar="DIR",
        help="of the `baton serve` that runs it; default: the only one of this user",
    )
    parser.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="a worker's settings, for its registry and its certificates",
    )
    parser.add_argument(
        "--tls-dir", type=Path, metavar="DIR", help="certificates as `baton certs` writes them"
    )
    parser.add_argument(
        "--timeout",
        type=float,
        default=DEFAULT_TIMEOUT_S,
        metavar="S",
        help="seconds for its requests to end or to move (%(default)s)",
    )
    parser.add_argument(
        "--may-empty-pool",
        action="store_true",
        help="also if it is the last worker of its pool, or nobody can tell",
    )


def run(args: argparse.Namespace, environ: Mapping[str, str]) -> int:
    from baton.core.worker_info import Role

    if not 0 < args.timeout <= MAX_TIMEOUT_S:
        raise ConfigError(
            f"--timeout must be above 0 and at most {MAX_TIMEOUT_S:g}, got {args.timeout:g}"
        )
    began_s = time.monotonic()
    try:
        name = asyncio.run(_change(args, Role(args.role), environ))
    except ConfigError:
        raise
    except BatonError as error:
        print(f"{args.worker} stays where it is: {error}", file=sys.stderr)
        return EXIT_STAYS
    print(f"{name} serves as a {args.role} worker, after {time.monotonic() - began_s:.1f} s")
    return 0


async def _change(args: argparse.Namespace, role: object, environ: Mapping[str, str]) -> str:
    from baton.cli.doctor_places import Given, find_workers
    from baton.core.worker_info import Role
    from baton.rpc.role_change import change_role

    assert isinstance(role, Role)
    is_address = ":" in args.worker
    given = Given(
        workers=(args.worker,) if is_address else (),
        run_dir=args.run_dir,
        tls_dir=args.tls_dir,
        config=args.config,
    )
    places, tls = find_workers(given, environ)
    names = {str(p.entry.info.worker_id): p.address for p in places if p.entry is not None}
    address = args.worker if is_address else names.get(args.worker)
    if address is None:
        raise ConfigError(
            f"no worker {args.worker} is registered; there are {', '.join(sorted(names)) or 'none'}"
        )
    info = await change_role(address, role, tls, args.timeout, may_empty_pool=args.may_empty_pool)
    return str(info.worker_id)
