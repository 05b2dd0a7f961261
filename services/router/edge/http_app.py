"""The router's HTTP front as one plain ASGI application.

    POST /v1/chat/completions   POST /v1/completions
    POST /v1/messages           POST /v1/messages/count_tokens
    POST /v1/responses          GET, DELETE /v1/responses/{id}          POST .../{id}/cancel
    GET  /v1/models             GET  /v1/models/{id}
    POST /tokenize              POST /detokenize         GET /openapi.json
    GET  /health, /ping, /load  GET  /version            GET /metrics      (HEAD wherever GET)
    GET  /pool_stats            GET  /ui

Runs under any ASGI server: uvicorn here (`http_server`), Ray Serve's replica otherwise.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping

import baton
from baton.core.errors import (
    BatonError,
    MethodNotAllowed,
    ModelNotFound,
    NotFound,
    NotOffered,
    RequestCancelled,
    RequestError,
    Unavailable,
)
from baton.core.logging import log_fields
from baton.core.metrics import REJECTED
from baton.telemetry.metrics import Metrics
from services.router.edge.edge_config import EdgeConfig
from services.router.edge.preprocess import Preprocessor, shorten
from services.router.openai_api.exchange import Exchange, Receive, Scope, Send
from services.router.openai_api.handlers import GenerationRoutes
from services.router.openai_api.messages.message_routes import MessageRoutes
from services.router.openai_api.openapi import openapi_document
from services.router.openai_api.responses.response_routes import ResponseRoutes
from services.router.openai_api.token_routes import TokenRoutes
from services.router.pool_stats import PoolStats
from services.router.requests.generation import Generator, Health, ModelCard
from services.router.tenants.tenants import Tenants, open_to_all
from services.router.ui.ui_routes import UiRoutes

logger = logging.getLogger(__name__)

HEALTH_TIMEOUT_S = 2.0
_MODELS = "/v1/models"

Handler = Callable[[Exchange], Awaitable[None]]


class HttpApp:
    """`metrics` is what /metrics shows; requests turned away here are counted in it."""

    def __init__(
        self,
        generator: Generator,
        *,
        metrics: Metrics,
        config: EdgeConfig | None = None,
        tenants: Tenants | None = None,
        pool_stats: Callable[[], PoolStats] | None = None,
        ui: UiRoutes | None = None,
    ) -> None:
        """`tenants`: who may use it; by default everybody. `pool_stats`: what planners are told.
        `ui`: the page."""
        self._ui = ui
        self._generator = generator
        self._metrics = metrics
        self._preprocessor = Preprocessor(generator)
        self._tenants = tenants or open_to_all(metrics)
        config = config or EdgeConfig()
        self._routes = GenerationRoutes(generator, self._preprocessor, config, self._tenants)
        tokens = TokenRoutes(self._preprocessor, config, self._tenants)
        self._table: dict[str, dict[str, Handler]] = {
            "/v1/chat/completions": {"POST": self._routes.chat},
            "/v1/completions": {"POST": self._routes.completions},
            _MODELS: {"GET": self._models, "HEAD": self._models},
            "/health": {"GET": self._health, "HEAD": self._health},
            "/ping": {"GET": self._health, "HEAD": self._health, "POST": self._health},
            "/load": {"GET": self._load, "HEAD": self._load},
            "/version": {"GET": self._version, "HEAD": self._version},
            "/openapi.json": {"GET": self._openapi, "HEAD": self._openapi},
            "/tokenize": {"POST": tokens.tokenize},
            "/detokenize": {"POST": tokens.detokenize},
            "/v1/embeddings": {"POST": self._embeddings},
            "/reset_prefix_cache": {"POST": self._reset_prefix_cache},
            "/metrics": {"GET": self._show_metrics, "HEAD": self._show_metrics},
        }
        if pool_stats is not None:
            show = _shown(pool_stats)
            self._table["/pool_stats"] = {"GET": show, "HEAD": show}
        self._responses = ResponseRoutes(self._routes)
        self._table |= MessageRoutes(self._routes).table()
        self._document: dict[str, object] | None = None
        self._one_model: dict[str, Handler] = {"GET": self._model, "HEAD": self._model}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await self._serve(Exchange(scope, receive, send))
        elif scope["type"] == "lifespan":
            await _lifespan(receive, send)
        else:
            await send({"type": "websocket.close", "code": 1000})

    @property
    def num_running(self) -> int:
        """Generation requests being answered."""
        return self._routes.serving.num_running

    def end_all(self) -> None:
        """Answer everything that still runs with an error, as the process is about to stop."""
        self._routes.serving.end_all(Unavailable("the router is stopping; send the request again"))

    def count_rejected(self, status: int) -> None:
        """A request that was turned away before it came here."""
        self._metrics.add(REJECTED, 1, str(status))

    def close(self) -> None:
        """Free the threads. No request may follow."""
        self._preprocessor.close()

    async def _serve(self, exchange: Exchange) -> None:
        try:
            await self._handler(exchange)(exchange)
        except Exception as error:
            await self._fail(exchange, error)

    def _handler(self, exchange: Exchange) -> Handler:
        methods: Mapping[str, Handler] | None = self._table.get(exchange.path)
        if methods is None and exchange.path.startswith(_MODELS + "/"):
            methods = self._one_model
        if methods is None:
            methods = self._responses.methods(exchange.path)
        if methods is None and self._ui is not None:
            methods = self._ui.methods(exchange.path)
        if methods is None:
            raise NotFound(f"there is no route {shorten(exchange.path)}")
        handler = methods.get(exchange.method)
        if handler is None:
            raise _WrongMethod(exchange.method, tuple(methods))
        return handler

    async def _fail(self, exchange: Exchange, error: Exception) -> None:
        request_id = exchange.request_id.decode()
        if not isinstance(error, BatonError):
            logger.error("request %s failed", request_id, exc_info=error)
        if exchange.has_started:
            raise error
        headers = [error.allow] if isinstance(error, _WrongMethod) else []
        status = await exchange.answer_error(error, headers)
        if isinstance(error, RequestCancelled):
            return
        log_fields(
            logger,
            "request rejected",
            request_id=request_id,
            method=exchange.method,
            path=exchange.path[:200],
            status=status,
            error=str(error)[:500],
        )
        # The dispatcher counts what it has begun; what it refuses at the door it leaves to us.
        if isinstance(error, RequestError) or not exchange.is_dispatched:
            self._metrics.add(REJECTED, 1, str(status))

    async def _models(self, exchange: Exchange) -> None:
        await self._tenants.caller(exchange.text_header)
        cards = [_model_object(card) for card in self._generator.models()]
        await exchange.answer_json(200, {"object": "list", "data": cards})

    async def _model(self, exchange: Exchange) -> None:
        await self._tenants.caller(exchange.text_header)
        name = exchange.path.removeprefix(_MODELS + "/")
        for card in self._generator.models():
            if card.name == name:
                await exchange.answer_json(200, _model_object(card))
                return
        raise ModelNotFound(f"model {shorten(name)} does not exist", param="model")

    async def _health(self, exchange: Exchange) -> None:
        try:
            async with asyncio.timeout(HEALTH_TIMEOUT_S):
                health = await self._generator.health()
        except TimeoutError:
            health = Health(is_ready=False, reason=f"no answer within {HEALTH_TIMEOUT_S:g} s")
        await exchange.answer_json(
            200 if health.is_ready else 503,
            {
                "status": "ok" if health.is_ready else "unavailable",
                "reason": health.reason,
                "detail": health.detail,
            },
        )

    async def _load(self, exchange: Exchange) -> None:
        await exchange.answer_json(200, {"server_load": self.num_running})

    async def _openapi(self, exchange: Exchange) -> None:
        self._document = self._document or openapi_document()
        await exchange.answer_json(200, self._document)

    async def _embeddings(self, exchange: Exchange) -> None:
        await self._tenants.caller(exchange.text_header)
        raise NotOffered(
            "the models served here generate text and have no embeddings; send this to a server of "
            "an embedding model"
        )

    async def _reset_prefix_cache(self, exchange: Exchange) -> None:
        await self._tenants.caller(exchange.text_header)
        raise NotOffered(
            "the workers' prefix caches cannot be emptied from here; send a new cache_salt with "
            "requests that are to find nothing cached"
        )

    async def _version(self, exchange: Exchange) -> None:
        await exchange.answer_json(200, {"version": baton.__version__})

    async def _show_metrics(self, exchange: Exchange) -> None:
        content_type = self._metrics.content_type.encode()
        await exchange.answer(200, self._metrics.render(), content_type)


class _WrongMethod(MethodNotAllowed):
    def __init__(self, method: str, allowed: tuple[str, ...]) -> None:
        super().__init__(f"method {method} is not allowed here; use {' or '.join(allowed)}")
        self.allow = (b"allow", ", ".join(allowed).encode())


def _shown(pool_stats: Callable[[], PoolStats]) -> Handler:
    async def show(exchange: Exchange) -> None:
        await exchange.answer_json(200, pool_stats().to_numbers())

    return show


async def _lifespan(receive: Receive, send: Send) -> None:
    while True:
        event = (await receive())["type"]
        await send({"type": f"{event}.complete"})
        if event == "lifespan.shutdown":
            return


def _model_object(card: ModelCard) -> dict[str, object]:
    return {
        "id": card.name,
        "object": "model",
        "created": card.created_s,
        "owned_by": "baton",
        "root": card.name,
        "max_model_len": card.max_model_len,
    }
