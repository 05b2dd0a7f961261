"""POST /v1/messages and POST /v1/messages/count_tokens."""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable

from services.router.edge.preprocess import new_id
from services.router.openai_api.as_chat import renamed
from services.router.openai_api.exchange import Exchange
from services.router.openai_api.handlers import GenerationRoutes
from services.router.openai_api.messages.message_conversation import NAMES, as_chat
from services.router.openai_api.messages.message_errors import message_error
from services.router.openai_api.messages.message_format import MessagesFormat
from services.router.openai_api.messages.message_schema import CountTokensBody, MessagesBody
from services.router.openai_api.sampling import chat_plan
from services.router.openai_api.schema import parse_body
from services.router.tenants.tenants import Caller, HeaderOf

ROUTE = "/v1/messages"
COUNT_ROUTE = "/v1/messages/count_tokens"

Handler = Callable[[Exchange], Awaitable[None]]


class MessageRoutes:
    """Errors have this API's shape, and the key may come in the header X-Api-Key."""

    def __init__(self, chat: GenerationRoutes) -> None:
        """`chat`: whose jobs they are."""
        self._chat = chat

    def table(self) -> dict[str, dict[str, Handler]]:
        """Handlers by path and method."""
        return {ROUTE: {"POST": self._create}, COUNT_ROUTE: {"POST": self._count_tokens}}

    async def _create(self, exchange: Exchange) -> None:
        caller = await self._caller(exchange)
        body = parse_body(await self._chat.read(exchange), MessagesBody)
        call = self._chat.call(exchange, caller, new_id("msg").replace("-", "_"))
        with contextlib.ExitStack() as at_end:
            with renamed(NAMES):
                chat = as_chat(body)
                job = await self._chat.jobs.chat(
                    chat, call, lambda card: chat_plan(card, chat), at_end
                )
            await self._chat.serving.run(job, exchange, MessagesFormat(job.frame))

    async def _count_tokens(self, exchange: Exchange) -> None:
        caller = await self._caller(exchange)
        body = parse_body(await self._chat.read(exchange), CountTokensBody)
        call = self._chat.call(exchange, caller, new_id("msg"))
        with contextlib.ExitStack() as at_end, renamed(NAMES):
            chat = as_chat(body)
            job = await self._chat.jobs.chat(chat, call, lambda card: chat_plan(card, chat), at_end)
        await exchange.answer_json(200, {"input_tokens": len(job.inputs[0].prompt_token_ids)})

    async def _caller(self, exchange: Exchange) -> Caller:
        exchange.as_error = message_error
        return await self._chat.caller(exchange, _header_of(exchange))


def _header_of(exchange: Exchange) -> HeaderOf:
    def header(name: str) -> str:
        value = exchange.text_header(name)
        if name == "authorization" and not value:
            key = exchange.text_header("x-api-key")
            return f"Bearer {key}" if key else ""
        return value

    return header
