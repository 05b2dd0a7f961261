"""The page and its data over HTTP.

    GET /ui                          the page; open, since it holds nothing
    GET /ui/NAME                     its files, likewise
    GET /ui/data/state/NUMBER        cluster, last requests, samples of the charts after NUMBER
    GET /ui/data/requests/ID         one request's waterfall

Data needs an API key where keys are required, and shows a tenant its own requests alone. Each
router copy knows the requests that it has served.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from importlib import resources
from typing import NamedTuple

import orjson

from baton.core.errors import NotFound
from services.router.edge.preprocess import shorten
from services.router.openai_api.exchange import Exchange
from services.router.requests.request_record import RequestRecord
from services.router.tenants.tenants import Tenants
from services.router.tenants.tenants_config import TenantsConfig
from services.router.ui.ui import Ui

ROOT = "/ui"
_TYPES = {
    "html": b"text/html; charset=utf-8",
    "css": b"text/css; charset=utf-8",
    "js": b"text/javascript; charset=utf-8",
    "svg": b"image/svg+xml",
}
_HEADERS = (
    # Nothing from elsewhere, nothing inline: what a model writes can never run.
    (
        b"content-security-policy",
        b"default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
        b"connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    ),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-cache"),
)
_PRIVATE = ((b"cache-control", b"no-store"),)

Handler = Callable[[Exchange], Awaitable[None]]


class _File(NamedTuple):
    content_type: bytes
    body: bytes


class UiRoutes:
    """`handler` for every path below /ui."""

    def __init__(self, ui: Ui, tenants: Tenants, *, shows_all: bool) -> None:
        """`shows_all`: everybody is one tenant, so requests are nobody's secret."""
        self._ui = ui
        self._tenants = tenants
        self._shows_all = shows_all
        self._files = _read_files()

    def methods(self, path: str) -> dict[str, Handler] | None:
        """None for paths that are not the page's."""
        if path != ROOT and not path.startswith(ROOT + "/"):
            return None
        parts = path.removeprefix(ROOT).strip("/").split("/")
        match parts:
            case [""]:
                return _get(self._file("index.html"))
            case ["data", "state", number] if number.isascii() and number.isdigit():
                return _get(self._state(int(number[:18])))
            case ["data", "requests", request_id]:
                return _get(self._request(request_id))
            case [name] if name in self._files:
                return _get(self._file(name))
        return None

    def _file(self, name: str) -> Handler:
        async def show(exchange: Exchange) -> None:
            content_type, body = self._files[name]
            await exchange.answer(200, body, content_type, _HEADERS)

        return show

    def _state(self, since: int) -> Handler:
        async def show(exchange: Exchange) -> None:
            sees = await self._sees(exchange)
            await _answer(exchange, self._ui.state(since, sees))

        return show

    def _request(self, request_id: str) -> Handler:
        async def show(exchange: Exchange) -> None:
            sees = await self._sees(exchange)
            shown = self._ui.waterfall(request_id, sees)
            if shown is None:
                raise NotFound(
                    f"request {shorten(request_id)} is not among the last ones of this router copy"
                )
            await _answer(exchange, shown)

        return show

    async def _sees(self, exchange: Exchange) -> Callable[[RequestRecord], bool]:
        """Raises NotAuthorized."""
        caller = await self._tenants.caller(exchange.text_header)
        if self._shows_all:
            return lambda record: True
        return lambda record: record.tenant == caller.tenant


def open_ui_routes(ui: Ui | None, tenants: Tenants, config: TenantsConfig) -> UiRoutes | None:
    """None where the page is switched off."""
    if ui is None:
        return None
    is_shared = config.needs_key or config.trust_tenant_header
    return UiRoutes(ui, tenants, shows_all=not is_shared)


async def _answer(exchange: Exchange, content: object) -> None:
    await exchange.answer(200, orjson.dumps(content), headers=_PRIVATE)


def _get(handler: Handler) -> dict[str, Handler]:
    return {"GET": handler, "HEAD": handler}


def _read_files() -> dict[str, _File]:
    page = resources.files(__package__) / "page"
    return {
        entry.name: _File(_TYPES[suffix], entry.read_bytes())
        for entry in page.iterdir()
        if (suffix := entry.name.rpartition(".")[2]) in _TYPES
    }
