"""The HTTP port of one router copy alone: it answers there before and after the shared ports do.

Metrics and health of a copy cannot be asked for at an address that several copies share. Where the
front doors have TLS, this one still speaks plain text, to probes and Prometheus, and then has
metrics and health alone.
"""

from __future__ import annotations

import os

from baton.core.errors import NotFound
from services.router.config import RouterConfig
from services.router.edge.http_app import HttpApp
from services.router.edge.http_server import HttpServer
from services.router.edge.preprocess import shorten
from services.router.edge.scrape_target import (
    ScrapeTarget,
    reachable_host,
    remove_target,
    write_target,
)
from services.router.openai_api.exchange import Exchange, Receive, Scope, Send


class OwnDoor:
    """start() → serving → stop(); nothing at all where `copy.own_port` is not set."""

    def __init__(self, app: HttpApp, config: RouterConfig) -> None:
        """Takes the port. Raises ConfigError."""
        self._config = config.copy
        self._host = config.host
        self._target: ScrapeTarget | None = None
        self._http: HttpServer | None = None
        if config.copy.own_port is not None:
            served = PlainTextApp(app) if config.edge.tls.is_on else app
            self._http = HttpServer(
                served, host=config.host, port=config.copy.own_port, config=config.edge
            )

    @property
    def port(self) -> int | None:
        return None if self._http is None else self._http.port

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


class PlainTextApp:
    """`app` without what belongs behind TLS: prompts, answers and API keys."""

    PATHS = frozenset({"/health", "/version", "/metrics", "/pool_stats"})

    def __init__(self, app: HttpApp) -> None:
        self._app = app

    @property
    def num_running(self) -> int:
        return self._app.num_running

    def end_all(self) -> None:
        self._app.end_all()

    def close(self) -> None:
        self._app.close()

    def count_rejected(self, status: int) -> None:
        self._app.count_rejected(status)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in self.PATHS:
            error = NotFound(
                f"there is no route {shorten(scope['path'])} at this port, which speaks plain "
                "text; the API is at the port with TLS"
            )
            await Exchange(scope, receive, send).answer_error(error, [])
            return
        await self._app(scope, receive, send)
