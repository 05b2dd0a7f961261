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
from services.router.tenants.tenants import Caller, Tenants


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
        self._jobs = JobMaker(preprocessor, config)
        self._tenants = tenants
        self._config = config

    async def chat(self, exchange: Exchange) -> None:
        caller = await self._tenants.caller(exchange.text_header)
        body = parse_body(await self._read(exchange), ChatBody)
        call = self._call(exchange, caller, "chatcmpl")
        with contextlib.ExitStack() as at_end:
            job = await self._jobs.chat(body, call, lambda card: chat_plan(card, body), at_end)
            await self.serving.run(job, exchange, ChatFormat(job.frame))

    async def completions(self, exchange: Exchange) -> None:
        caller = await self._tenants.caller(exchange.text_header)
        body = parse_body(await self._read(exchange), CompletionBody)
        call = self._call(exchange, caller, "cmpl")
        with contextlib.ExitStack() as at_end:
            job = await self._jobs.completion(
                body, call, lambda card: completion_plan(card, body), at_end
            )
            await self.serving.run(job, exchange, CompletionFormat(job.frame))

    async def _read(self, exchange: Exchange) -> bytes:
        return await exchange.body(
            self._config.max_body_bytes, timeout_s=self._config.body_timeout_s
        )

    def _call(self, exchange: Exchange, caller: Caller, prefix: str) -> Call:
        return Call(
            caller=caller,
            response_id=new_id(prefix),
            arrived_at_s=exchange.arrived_at_s,
            deadline_s=self._config.deadline_s,
            on_rate_limits=exchange.note_rate_limits,
            trace=parse_traceparent(
                exchange.text_header("traceparent"), exchange.text_header("tracestate")
            ),
        )
