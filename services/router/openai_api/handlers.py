"""POST /v1/chat/completions and POST /v1/completions."""

from __future__ import annotations

import contextlib

from baton.core.trace import parse_traceparent
from services.router.edge.edge_config import EdgeConfig
from services.router.edge.preprocess import Preprocessor, new_id
from services.router.openai_api.chat_format import ChatFormat
from services.router.openai_api.completion_format import CompletionFormat
from services.router.openai_api.exchange import Exchange
from services.router.openai_api.jobs import Call, JobMaker
from services.router.openai_api.sampling import chat_plan, completion_plan
from services.router.openai_api.schema import ChatBody, CompletionBody, parse_body
from services.router.openai_api.serving import Serving
from services.router.requests.generation import Generator
from services.router.tenants.tenants import Caller, HeaderOf, Tenants


class GenerationRoutes:
    """Parse, check, tokenize, run."""

    def __init__(
        self,
        generator: Generator,
        preprocessor: Preprocessor,
        config: EdgeConfig,
        tenants: Tenants,
    ) -> None:
        self.serving = Serving(generator)
        self.jobs = JobMaker(preprocessor, config)
        self.config = config
        self._tenants = tenants

    async def chat(self, exchange: Exchange) -> None:
        caller = await self.caller(exchange)
        body = parse_body(await self.read(exchange), ChatBody)
        call = self.call(exchange, caller, new_id("chatcmpl"))
        with contextlib.ExitStack() as at_end:
            job = await self.jobs.chat(body, call, lambda card: chat_plan(card, body), at_end)
            await self.serving.run(job, exchange, ChatFormat(job.frame))

    async def completions(self, exchange: Exchange) -> None:
        caller = await self.caller(exchange)
        body = parse_body(await self.read(exchange), CompletionBody)
        call = self.call(exchange, caller, new_id("cmpl"))
        with contextlib.ExitStack() as at_end:
            job = await self.jobs.completion(
                body, call, lambda card: completion_plan(card, body), at_end
            )
            await self.serving.run(job, exchange, CompletionFormat(job.frame))

    async def caller(self, exchange: Exchange, header: HeaderOf | None = None) -> Caller:
        """`header`: instead of the exchange's own. Raises NotAuthorized, InvalidRequest,
        Unavailable."""
        return await self._tenants.caller(header or exchange.text_header)

    async def read(self, exchange: Exchange) -> bytes:
        """The body, within the limits of the settings."""
        return await exchange.body(self.config.max_body_bytes, timeout_s=self.config.body_timeout_s)

    def call(self, exchange: Exchange, caller: Caller, response_id: str) -> Call:
        """What jobs must know of the exchange."""
        return Call(
            caller=caller,
            response_id=response_id,
            arrived_at_s=exchange.arrived_at_s,
            deadline_s=self.config.deadline_s,
            on_rate_limits=exchange.note_rate_limits,
            trace=parse_traceparent(
                exchange.text_header("traceparent"), exchange.text_header("tracestate")
            ),
        )
