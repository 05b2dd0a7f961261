"""POST /v1/chat/completions and POST /v1/completions."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from baton.core.errors import InvalidRequest
from baton.core.request import RequestId
from baton.core.trace import parse_traceparent
from services.router.edge.edge_config import EdgeConfig
from services.router.edge.preprocess import Preprocessor, check_stop, new_id
from services.router.openai_api.exchange import Exchange
from services.router.openai_api.prompts import plain_messages, plain_prompts, plain_stop
from services.router.openai_api.sampling import SamplingPlan, chat_plan, completion_plan
from services.router.openai_api.schema import (
    ChatBody,
    CompletionBody,
    GenerationBody,
    check_response_format,
    parse_body,
)
from services.router.openai_api.serving import Job, Serving
from services.router.openai_api.wire_format import ChatFormat, CompletionFormat, Frame
from services.router.requests.generation import GenerationInput, Generator, ModelCard
from services.router.tenants.quota_hold import QuotaHold
from services.router.tenants.tenants import Caller, Tenants, check_priority

MAX_CHOICES = 256
"""Generations of one HTTP request: prompts times n."""


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
        self._preprocessor = preprocessor
        self._tenants = tenants
        self._config = config

    async def chat(self, exchange: Exchange) -> None:
        caller = await self._tenants.caller(exchange.text_header)
        body = parse_body(await self._read(exchange), ChatBody)
        card = self._preprocessor.model_card(body.model)
        plan = chat_plan(card, body)
        _check_common(body)
        messages = plain_messages(body.messages)
        num_chars = sum(len(message["content"]) for message in messages)
        hold = await self._preprocessor.hold_quota(caller, num_chars)
        try:
            prompt = await self._preprocessor.chat_prompt(card, messages)
            frame = _frame(new_id("chatcmpl"), card, body, exchange, plan.sampling.logprobs)
            job = self._job(exchange, caller, body, plan, frame, [prompt], hold)
            await self.serving.run(job, exchange, ChatFormat(frame))
        finally:
            if hold is not None:
                hold.release()

    async def completions(self, exchange: Exchange) -> None:
        caller = await self._tenants.caller(exchange.text_header)
        body = parse_body(await self._read(exchange), CompletionBody)
        card = self._preprocessor.model_card(body.model)
        plan = completion_plan(card, body)
        _check_common(body)
        texts = plain_prompts(body.prompt)
        num_chars = sum(len(text) for text in texts if isinstance(text, str))
        hold = await self._preprocessor.hold_quota(caller, num_chars)
        try:
            prompts = []
            for text in texts:
                prompts.append(await self._prompt(card, text))
                # Many short prompts must not keep the other streams waiting.
                await asyncio.sleep(0)
            frame = _frame(new_id("cmpl"), card, body, exchange, plan.sampling.logprobs)
            job = self._job(exchange, caller, body, plan, frame, prompts, hold)
            await self.serving.run(job, exchange, CompletionFormat(frame))
        finally:
            if hold is not None:
                hold.release()

    async def _read(self, exchange: Exchange) -> bytes:
        return await exchange.body(
            self._config.max_body_bytes, timeout_s=self._config.body_timeout_s
        )

    async def _prompt(self, card: ModelCard, prompt: str | list[object]) -> tuple[int, ...]:
        if isinstance(prompt, str):
            return await self._preprocessor.text_prompt(card, prompt)
        return self._preprocessor.token_prompt(card, prompt)

    def _job(
        self,
        exchange: Exchange,
        caller: Caller,
        body: GenerationBody,
        plan: SamplingPlan,
        frame: Frame,
        prompts: Sequence[tuple[int, ...]],
        hold: QuotaHold | None,
    ) -> Job:
        """`hold` is what its first generation has of the tenant's quota."""
        num_choices = body.n or 1
        if len(prompts) * num_choices > MAX_CHOICES:
            raise InvalidRequest(
                f"prompts times n must be at most {MAX_CHOICES}, got {len(prompts) * num_choices}",
                param="n",
            )
        stop = check_stop(plain_stop(body.stop))
        priority = caller.priority
        if body.priority is not None:
            priority = check_priority(body.priority, param="priority")
        is_single = len(prompts) * num_choices == 1
        trace = parse_traceparent(
            exchange.text_header("traceparent"), exchange.text_header("tracestate")
        )
        inputs = [
            GenerationInput(
                request_id=RequestId(
                    frame.response_id if is_single else f"{frame.response_id}-{p}.{c}"
                ),
                model=plan.card.name,
                prompt_token_ids=prompt,
                sampling=plan.for_choice(len(prompt), c),
                stop=stop,
                cache_salt=caller.cache_salt(body.cache_salt or ""),
                deadline_s=self._config.deadline_s,
                arrived_at_s=exchange.arrived_at_s,
                tenant=caller.tenant,
                priority=priority,
                slo_class=caller.slo_class,
                targets=caller.targets,
                weight=caller.weight,
                limits=caller.limits,
                hold=hold if p == c == 0 else None,
                on_rate_limits=exchange.note_rate_limits,
                session_key=caller.session_key(body.user or ""),
                trace=trace,
                wants_timing=body.baton is not None and bool(body.baton.timing),
            )
            for p, prompt in enumerate(prompts)
            for c in range(num_choices)
        ]
        return Job(
            inputs=inputs,
            num_choices=num_choices,
            is_stream=bool(body.stream),
            include_usage=frame.include_usage,
            has_logprobs=frame.num_top_logprobs is not None,
        )


def _check_common(body: GenerationBody) -> None:
    check_response_format(body.response_format)
    if body.stream_options is not None and not body.stream:
        raise InvalidRequest("stream_options needs stream: true", param="stream_options")


def _frame(
    response_id: str,
    card: ModelCard,
    body: GenerationBody,
    exchange: Exchange,
    num_top_logprobs: int | None,
) -> Frame:
    return Frame(
        response_id=response_id,
        model=card.name,
        created_s=int(exchange.arrived_at_s),
        tokenizer=card.tokenizer,
        num_top_logprobs=num_top_logprobs,
        include_usage=body.stream_options is not None and bool(body.stream_options.include_usage),
    )
