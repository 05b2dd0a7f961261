"""The HTTP port of one router copy alone: it answers there before and after the shared ports do.

Metrics and health of a copy cannot be asked for at an address that several copies share.
"""

from __future__ import annotations

import os

from services.router.config import RouterConfig
from services.router.edge.http_app import HttpApp
from services.router.edge.http_server import HttpServer
from services.router.edge.scrape_target import (
    ScrapeTarget,
    reachable_host,
    remove_target,
    write_target,
)


class OwnDoor:
    """start() → serving → stop(); nothing at all where `copy.own_port` is not set."""

    def __init__(self, app: HttpApp, config: RouterConfig) -> None:
        """Takes the port. Raises ConfigError."""
        self._config = config.copy
        self._host = config.host
        self._target: ScrapeTarget | None = None
        self._http: HttpServer | None = None
        if config.copy.own_port is not None:
            self._http = HttpServer(
                app, host=config.host, port=config.copy.own_port, config=config.edge
            )

    async def start(self) -> None:
        """Returns once it answers and says where. Raises ConfigError."""
        if self._http is None:
            return
        await self._http.start()
        if self._config.targets_dir is not None:
            address = f"{reachable_host(self._host)}:{self._http.port}"
            self._target = ScrapeTarget(address, self._config.name, os.getpid())
            write_target(self._config.targets_dir, self._target)

    async def stop(self) -> None:
        """After the other doors: until then it answers."""
        if self._target is not None and self._config.targets_dir is not None:
            remove_target(self._config.targets_dir, self._target)
        if self._http is not None:
            await self._http.stop()
