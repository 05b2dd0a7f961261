"""Serve the ASGI application with uvicorn in a loop that is already running.

Does not handle signals: the process does, and calls `stop`.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import Callable, Iterator
from typing import Protocol

import uvicorn

from baton.core.errors import ConfigError
from services.router.edge.door_tls import DoorTls
from services.router.edge.edge_config import EdgeConfig
from services.router.edge.head_limits import limited_protocol
from services.router.openai_api.exchange import Receive, Scope, Send

BACKLOG = 2048
_CUT_AFTER_S = 1
"""Between the error that open streams get at a stop and the cut of their connections."""
_POLL_S = 0.02


class ServedApp(Protocol):
    """What a server needs of its application beside ASGI."""

    @property
    def num_running(self) -> int: ...
    def end_all(self) -> None: ...
    def close(self) -> None: ...
    def count_rejected(self, status: int) -> None: ...
    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None: ...


class HttpServer:
    """start() → serving → stop()."""

    def __init__(
        self,
        app: ServedApp,
        *,
        host: str,
        port: int,
        config: EdgeConfig,
        shares_port: bool = False,
        tls: DoorTls | None = None,
    ) -> None:
        """`shares_port`: other processes of this user may listen there too; connections come in
        from `start` on. Without `tls` it speaks plain text."""
        self._app = app
        self._config = config
        self._socket = _bind(host, port, shares_port=shares_port)
        _cut_stalled_clients(self._socket, config.stalled_client_s)
        self._server = _QuietServer(
            uvicorn.Config(
                app,
                http=limited_protocol(config, app.count_rejected),
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                proxy_headers=False,
                server_header=False,
                backlog=BACKLOG,
                timeout_keep_alive=config.keep_alive_s,
                timeout_graceful_shutdown=_CUT_AFTER_S,
                ssl_context_factory=None if tls is None else _context_factory(tls),
            )
        )
        self._task: asyncio.Task[None] | None = None

    @property
    def port(self) -> int:
        port: int = self._socket.getsockname()[1]
        return port

    async def start(self) -> None:
        """Returns once connections are accepted."""
        self._task = asyncio.create_task(self._server.serve(sockets=[self._socket]))
        while not self._server.started:
            if self._task.done():
                self._task.result()
                raise ConfigError("the HTTP server ended while starting")
            await asyncio.sleep(_POLL_S)

    async def stop(self) -> None:
        """Accept no more, let streams go on for `stop_grace_s`, then end them with an error."""
        if self._task is None:
            self._socket.close()
            return
        self._server.stop_listening()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._config.stop_grace_s):
                while self._app.num_running:
                    await asyncio.sleep(_POLL_S)
        self._app.end_all()
        self._server.should_exit = True
        await self._task
        self._app.close()


class _QuietServer(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals belong to the process."""
        yield

    def stop_listening(self) -> None:
        for server in self.servers:
            server.close()


def _context_factory(tls: DoorTls) -> Callable[..., ssl.SSLContext]:
    return lambda config, default: tls.http_context()


def _bind(host: str, port: int, *, shares_port: bool) -> socket.socket:
    """Bound here, so that a taken port is one clear error before anything else starts."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if shares_port:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"cannot listen on {host}:{port} ({error.strerror}); choose another port"
        ) from error
    listener.setblocking(False)
    return listener


def _cut_stalled_clients(listener: socket.socket, after_s: float) -> None:
    """Accepted connections inherit these options on Linux.

    A client that vanished without a word fails the keep-alive probes; one that never reads keeps
    its window at zero until the user time-out.
    """
    num_probes = 4
    interval_s = max(1, int(after_s / (num_probes + 1)))
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, interval_s)
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, interval_s)
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, num_probes)
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(after_s * 1000))
