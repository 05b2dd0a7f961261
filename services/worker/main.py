"""The command line of a worker process, the same for both pools.

Order of life: settings, logging, event loop, start, ready, wait for a signal or for the
supervisor's end, drain, stop. Every wait is bounded, so a signal ends the process in
`drain_s` plus a few seconds at most. A worker that has failed stops without draining and exits
with EXIT_FAILED, for its supervisor to start another.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any, NoReturn

from baton.core.config import merge
from baton.core.errors import BatonError, ConfigError
from baton.core.worker_info import Role
from baton.process import (
    EXIT_CONFIG,
    EXIT_FAILED,
    add_parent_argument,
    add_settings_arguments,
    exit_with_parent,
    stop_signal,
)
from baton.settings import parse_override, start_logging
from services.worker.config import WorkerConfig, load_worker_config
from services.worker.worker import WorkerServer

logger = logging.getLogger(__name__)

STOP_MARGIN_S = 10.0
"""Beyond `drain_s`: for the step in progress, the transports and the server to end."""


class _End(Enum):
    """Why a worker stopped."""

    STOPPED = "stopped"
    STOPPED_IN_START = "stopped in start"
    FAILED = "failed"


def run(role: Role, defaults: Mapping[str, Any], argv: Sequence[str] | None = None) -> int:
    """Run one worker until it is told to stop; returns the exit status."""
    arguments = _parser(role).parse_args(argv)
    exit_with_parent(arguments.exit_with_parent)
    try:
        config = _config(role, defaults, arguments)
    except ConfigError as error:
        print(f"baton {role.value} worker: {error}", file=sys.stderr)
        return EXIT_CONFIG
    start_logging(role.value, config.log)
    try:
        end = asyncio.run(_serve(config))
    except BatonError as error:
        logger.error("%s", error)
        return EXIT_CONFIG if isinstance(error, ConfigError) else EXIT_FAILED
    except TimeoutError:
        logger.error("the worker did not stop in time")
        _leave_now(EXIT_FAILED)
    if end is _End.STOPPED:
        return 0
    # A thread may still be loading, or hang in a step.
    _leave_now(EXIT_FAILED if end is _End.FAILED else 0)


def _parser(role: Role) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"python -m services.{role.value}",
        description=f"One {role.value} worker. Every setting of WorkerConfig can be given by "
        "--config, by BATON_<SECTION>__<FIELD> in the environment, or by --set.",
    )
    parser.add_argument("--model", type=Path, metavar="PATH", help="Hugging Face model folder")
    add_settings_arguments(parser, example="engine.max_num_seqs=16")
    parser.add_argument(
        "--registry", type=Path, metavar="DIR", help="announce the worker in this directory"
    )
    add_parent_argument(parser)
    return parser


def _config(role: Role, defaults: Mapping[str, Any], arguments: argparse.Namespace) -> WorkerConfig:
    flags: dict[str, Any] = {
        "role": role.value,
        "engine": {"model_path": arguments.model},
        "registry": {"directory": arguments.registry},
    }
    overrides = merge(*(parse_override(text) for text in arguments.overrides), flags)
    return load_worker_config(
        defaults=defaults, file=arguments.config, environ=os.environ, overrides=overrides
    )


def _leave_now(code: int) -> NoReturn:
    """End the process although threads are still inside native code."""
    logging.shutdown()
    os._exit(code)


async def _serve(config: WorkerConfig) -> _End:
    drain_s = config.drain_s
    stop_requested = stop_signal()
    server = WorkerServer(config)
    starting = asyncio.create_task(server.start())
    stopping = asyncio.create_task(stop_requested.wait())
    try:
        await asyncio.wait((starting, stopping), return_when=asyncio.FIRST_COMPLETED)
        if not starting.done():
            starting.cancel()
            return _End.STOPPED_IN_START
        starting.result()
        failing = asyncio.create_task(server.failed())
        await asyncio.wait((failing, stopping), return_when=asyncio.FIRST_COMPLETED)
        failing.cancel()
        if stopping.done():
            return _End.STOPPED
        logger.error("the worker has failed and ends without draining")
        drain_s = 0
        return _End.FAILED
    finally:
        stopping.cancel()
        async with asyncio.timeout(drain_s + STOP_MARGIN_S):
            await server.stop(drain_s)
