"""The planner's own HTTP port, on a thread of its own.

    GET /metrics    its series        GET /decision    the last decision's record, as JSON
    GET /health     200 while it tries, 503 when no step has ended for long

Reads what the planner's thread has left; asks it for nothing. Does not know: decisions.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

from baton.core.errors import ConfigError, MethodNotAllowed, NotFound
from services.planner.planner_gauges import PlannerGauges
from services.router.edge.edge_config import EdgeConfig
from services.router.edge.http_server import HttpServer
from services.router.edge.preprocess import shorten
from services.router.edge.scrape_target import (
    ScrapeTarget,
    reachable_host,
    remove_target,
    write_target,
)
from services.router.openai_api.exchange import JSON, Exchange, Receive, Scope, Send

logger = logging.getLogger(__name__)

START_TIMEOUT_S = 10.0
STOP_TIMEOUT_S = 5.0
NAME = "planner"
"""Of its file beside the routers', and there its label `copy`."""


class MetricsPort:
    """start() → answering → stop()."""

    def __init__(
        self,
        gauges: PlannerGauges,
        *,
        host: str,
        port: int,
        targets_dir: Path | None = None,
        is_alive: Callable[[], bool] = lambda: True,
    ) -> None:
        """Takes the port; 0 is any free one. `targets_dir`: where a file says which, for
        Prometheus. `is_alive`: whether the planner still tries. Raises ConfigError."""
        app = _App(gauges, is_alive)
        self._server = HttpServer(app, host=host, port=port, config=EdgeConfig(stop_grace_s=0.1))
        self._target = ScrapeTarget(f"{reachable_host(host)}:{self.port}", NAME, os.getpid())
        self._targets_dir = targets_dir
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="planner metrics", daemon=True)
        self._started = threading.Event()
        self._stopping: asyncio.Event | None = None
        self._error: BaseException | None = None

    @property
    def port(self) -> int:
        return self._server.port

    def start(self) -> None:
        """Returns once it answers. Raises ConfigError."""
        # Its lines about starting and stopping say nothing that ours do not.
        logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
        self._thread.start()
        if not self._started.wait(START_TIMEOUT_S) or self._error is not None:
            raise ConfigError(
                f"the planner's port {self.port} did not open: {self._error or 'too slow'}"
            )
        if self._targets_dir is not None:
            write_target(self._targets_dir, self._target)

    def stop(self) -> None:
        """Takes seconds at most; once it has started or not."""
        if self._targets_dir is not None:
            remove_target(self._targets_dir, self._target)
        if not self._thread.is_alive():
            if not self._loop.is_closed():
                self._loop.run_until_complete(self._server.stop())
                self._loop.close()
            return
        if self._stopping is not None:
            self._loop.call_soon_threadsafe(self._stopping.set)
        self._thread.join(STOP_TIMEOUT_S)

    def _run(self) -> None:
        try:
            self._loop.run_until_complete(self._serve())
        except Exception as error:
            self._error = error
            logger.exception("the planner's port has closed")
        finally:
            self._started.set()
            self._loop.close()

    async def _serve(self) -> None:
        self._stopping = asyncio.Event()
        await self._server.start()
        self._started.set()
        try:
            await self._stopping.wait()
        finally:
            await self._server.stop()


class _App:
    """Plain ASGI; everything is there already, so nothing waits."""

    num_running = 0

    def __init__(self, gauges: PlannerGauges, is_alive: Callable[[], bool]) -> None:
        self._gauges, self._is_alive = gauges, is_alive

    def end_all(self) -> None: ...

    def close(self) -> None: ...

    def count_rejected(self, status: int) -> None: ...

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        exchange = Exchange(scope, receive, send)
        if exchange.path not in ("/metrics", "/decision", "/health"):
            await exchange.answer_error(
                NotFound(
                    f"there is no route {shorten(exchange.path)}; a planner has /metrics, "
                    "/decision and /health"
                ),
                [],
            )
        elif exchange.method not in ("GET", "HEAD"):
            error = MethodNotAllowed(f"method {exchange.method} is not allowed here; use GET")
            await exchange.answer_error(error, [(b"allow", b"GET, HEAD")])
        elif exchange.path == "/metrics":
            content_type = self._gauges.content_type.encode()
            await exchange.answer(200, self._gauges.page, content_type)
        elif exchange.path == "/decision":
            await exchange.answer(200, self._gauges.last_decision, JSON)
        else:
            is_alive = self._is_alive()
            status = "ok" if is_alive else "no step has ended for long"
            await exchange.answer_json(
                200 if is_alive else 503, {"status": status, "time": round(time.time(), 3)}
            )
