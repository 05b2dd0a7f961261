"""`python -m services.router`: one router process without Ray.

Order of life: settings, ports, logging, event loop, start, ready, wait for a signal or for the
supervisor's end, stop. Stopping takes `edge.stop_grace_s` and a few seconds at most.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import sys
from collections.abc import Sequence

import uvloop

from baton.core.config import merge
from baton.core.errors import BatonError, ConfigError
from baton.core.logging import log_fields
from baton.process import (
    EXIT_CONFIG,
    EXIT_FAILED,
    add_parent_argument,
    add_settings_arguments,
    exit_with_parent,
    stop_signal,
)
from baton.settings import parse_override, start_logging
from services.router.collection import keep_from_collection
from services.router.config import RouterConfig, load_router_config
from services.router.core import RouterCore
from services.router.edge.door_tls import open_door_tls
from services.router.edge.http_server import HttpServer
from services.router.edge.own_door import OwnDoor
from services.router.fronts import open_grpc_server, open_http_app

logger = logging.getLogger("services.router")

CORE_STOP_TIMEOUT_S = 5.0
READY_POLL_S = 0.05


class RouterProcess:
    """Dispatcher and both front doors on one event loop."""

    def __init__(self, config: RouterConfig) -> None:
        """Takes the ports. Raises ConfigError."""
        self._core = RouterCore.from_config(config)
        self._config = config
        self._app = open_http_app(self._core, config)
        tls = open_door_tls(config.edge.tls, self._core.metrics)
        self.http = HttpServer(
            self._app,
            host=config.host,
            port=config.http_port,
            config=config.edge,
            shares_port=config.copy.shares_ports,
            tls=tls,
        )
        self.own = OwnDoor(self._app, config)
        self.grpc = open_grpc_server(self._core, config, tls)

    async def start(self) -> None:
        """Returns once both front doors answer; where they are shared with other copies that is
        not before this one is ready, which may take as long as workers take to come up."""
        self._core.start()
        await self.own.start()
        if self._config.copy.shares_ports:
            await self._wait_until_ready()
        await asyncio.gather(self.http.start(), self.grpc.start())
        log_fields(
            logger,
            "router ready",
            model=self._config.served_model_name,
            http=f"{self._config.host}:{self.http.port}",
            grpc=f"{self._config.host}:{self.grpc.port}",
            pid=os.getpid(),
        )

    async def stop(self) -> None:
        """Close the doors, let short requests finish, end the others with an error."""
        doors = asyncio.gather(self.http.stop(), self.grpc.stop(), return_exceptions=True)
        await asyncio.wait({doors}, timeout=self._config.edge.stop_grace_s)
        try:
            async with asyncio.timeout(CORE_STOP_TIMEOUT_S):
                await self._core.stop()
        except TimeoutError:
            logger.warning("requests or sessions did not end within %g s", CORE_STOP_TIMEOUT_S)
        await doors
        await self.own.stop()
        log_fields(logger, "router stopped")

    async def _wait_until_ready(self) -> None:
        while not (await self._core.dispatcher.health()).is_ready:
            await asyncio.sleep(READY_POLL_S)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one router until it is told to stop; returns the exit status."""
    arguments = _parser().parse_args(argv)
    exit_with_parent(arguments.exit_with_parent)
    try:
        overrides = merge(*(parse_override(text) for text in arguments.overrides))
        config = load_router_config(file=arguments.config, environ=os.environ, overrides=overrides)
    except ConfigError as error:
        print(f"baton router: {error}", file=sys.stderr)
        return EXIT_CONFIG
    start_logging("router", config.log)
    # Its lines about starting and stopping repeat ours.
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_serve(config))
    except BatonError as error:
        logger.error("%s", error)
        return EXIT_CONFIG if isinstance(error, ConfigError) else EXIT_FAILED
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m services.router",
        description="One router with its HTTP and gRPC front doors. Every setting of RouterConfig "
        "can be given by --config, by BATON_<SECTION>__<FIELD> in the environment, or by --set.",
    )
    add_settings_arguments(parser, example="edge.max_body_bytes=1048576")
    add_parent_argument(parser)
    return parser


async def _serve(config: RouterConfig) -> None:
    stop_requested = stop_signal()
    router = RouterProcess(config)
    starting = asyncio.create_task(router.start())
    stopping = asyncio.create_task(stop_requested.wait())
    try:
        await asyncio.wait([starting, stopping], return_when=asyncio.FIRST_COMPLETED)
        if starting.done():
            starting.result()
            keep_from_collection()
            await stopping
    finally:
        for task in (starting, stopping):
            task.cancel()
        await asyncio.gather(starting, stopping, return_exceptions=True)
        await router.stop()


if __name__ == "__main__":
    sys.exit(main())
