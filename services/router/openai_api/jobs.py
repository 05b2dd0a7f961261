"""From a parsed body to the generations that answer it; the same for HTTP and gRPC.

Everything that is cheap to check is checked before a prompt is tokenized.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from baton.core.errors import InvalidRequest, Overloaded, RateLimit
from baton.core.request import RequestId
from baton.core.structured import StructuredSpec
from baton.core.trace import TraceContext
from baton.engine.grammar.validate import validate_structured
from services.router.edge.edge_config import EdgeConfig
from services.router.edge.preprocess import Preprocessor, check_stop
from services.router.openai_api.prompts import (
    chat_options,
    num_chars,
    plain_messages,
    plain_prompts,
    plain_stop,
)
from services.router.openai_api.sampling import SamplingPlan
from services.router.openai_api.schema import ChatBody, CompletionBody, GenerationBody
from services.router.openai_api.serving import Job
from services.router.openai_api.structured import Wanted, named, wanted_structure
from services.router.openai_api.tool_plan import NO_TOOLS, ToolPlan, tool_plan
from services.router.openai_api.wire_format import Frame, Prompt
from services.router.requests.generation import GenerationInput, ModelCard
from services.router.tenants.quota_hold import QuotaHold
from services.router.tenants.tenants import Caller, check_priority

MAX_CHOICES = 256
"""Generations of one request: prompts times n."""
MAX_KNOWN_STRUCTURES = 256
MAX_CHECKS = 64
"""At a time, waiting ones included. Most take a millisecond, hostile ones seconds."""


@dataclass(frozen=True, slots=True)
class Call:
    """Who asks, when, and how long there is."""

    caller: Caller
    response_id: str
    arrived_at_s: float
    deadline_s: float
    on_rate_limits: Callable[[tuple[RateLimit, ...]], None]
    trace: TraceContext | None = None


PlanOf = Callable[[ModelCard], SamplingPlan]


class JobMaker:
    """One per front door."""

    def __init__(self, preprocessor: Preprocessor, config: EdgeConfig) -> None:
        self._preprocessor = preprocessor
        self._config = config
        self._known: OrderedDict[StructuredSpec, None] = OrderedDict()
        """Structures that were found to be sound."""
        self._num_checks = 0

    async def chat(
        self, body: ChatBody, call: Call, plan_of: PlanOf, at_end: contextlib.ExitStack
    ) -> Job:
        """`at_end` is to be closed when the request is over. Raises RequestError, NoWorker."""
        card = self._preprocessor.model_card(body.model)
        plan = plan_of(card)
        tools = tool_plan(body, card.tokenizer, self._config.tool_parser)
        wanted = tools.forced or wanted_structure(body) or plan.wanted
        plan = plan.shaped(await self._checked(wanted))
        _check_stream(body, plan)
        keep_last = kept_tokens(body, card)
        messages = plain_messages(body.messages)
        options = chat_options(body, tools.tools, body.reasoning_effort)
        hold = await self._hold(call, num_chars(messages) + options.num_chars, at_end)
        ids = await self._preprocessor.chat_prompt(card, messages, options, keep_last=keep_last)
        return self._job(body, call, plan, [Prompt(ids)], hold, tools)

    async def completion(
        self, body: CompletionBody, call: Call, plan_of: PlanOf, at_end: contextlib.ExitStack
    ) -> Job:
        """As `chat`."""
        card = self._preprocessor.model_card(body.model)
        plan = plan_of(card)
        plan = plan.shaped(await self._checked(wanted_structure(body) or plan.wanted))
        _check_stream(body, plan)
        _check_best_of(body)
        keep_last = kept_tokens(body, card)
        texts = plain_prompts(body.prompt)
        num_text_chars = sum(len(text) for text in texts if isinstance(text, str))
        hold = await self._hold(call, num_text_chars, at_end)
        prompts = []
        for text in texts:
            prompts.append(await self._prompt(body, card, text, keep_last))
            # Many short prompts must not keep the other streams waiting.
            await asyncio.sleep(0)
        return self._job(body, call, plan, prompts, hold, NO_TOOLS)

    async def _hold(
        self, call: Call, num_prompt_chars: int, at_end: contextlib.ExitStack
    ) -> QuotaHold | None:
        hold = await self._preprocessor.hold_quota(call.caller, num_prompt_chars)
        if hold is not None:
            at_end.callback(hold.release)
        return hold

    async def _prompt(
        self,
        body: CompletionBody,
        card: ModelCard,
        prompt: str | list[object],
        keep_last: int | None,
    ) -> Prompt:
        if not isinstance(prompt, str):
            ids = self._preprocessor.token_prompt(card, prompt, keep_last=keep_last)
            return Prompt(ids)
        ids = await self._preprocessor.text_prompt(
            card,
            prompt,
            add_special_tokens=body.add_special_tokens is not False,
            keep_last=keep_last,
        )
        return Prompt(ids, prompt if keep_last is None else None)

    async def _checked(self, wanted: Wanted | None) -> Wanted | None:
        """Raises InvalidRequest for a form that is none."""
        if wanted is None:
            return None
        if wanted.spec in self._known:
            self._known.move_to_end(wanted.spec)
            return wanted
        if self._num_checks >= MAX_CHECKS:
            raise Overloaded(
                f"{MAX_CHECKS} forms of output wait to be checked; try again in a moment"
            )
        self._num_checks += 1
        try:
            await self._preprocessor.check(lambda: validate_structured(wanted.spec))
        except InvalidRequest as error:
            raise named(error, wanted.param) from None
        finally:
            self._num_checks -= 1
        self._known[wanted.spec] = None
        if len(self._known) > MAX_KNOWN_STRUCTURES:
            self._known.popitem(last=False)
        return wanted

    def _job(
        self,
        body: GenerationBody,
        call: Call,
        plan: SamplingPlan,
        prompts: Sequence[Prompt],
        hold: QuotaHold | None,
        tools: ToolPlan,
    ) -> Job:
        """`hold` is what its first generation has of the tenant's quota."""
        num_choices = body.n or 1
        if len(prompts) * num_choices > MAX_CHOICES:
            raise InvalidRequest(
                f"prompts times n must be at most {MAX_CHOICES}, got {len(prompts) * num_choices}",
                param="n",
            )
        frame = _frame(body, call, plan, prompts, tools)
        caller = call.caller
        priority = caller.priority
        if body.priority is not None:
            priority = check_priority(body.priority, param="priority")
        stop = check_stop(plain_stop(body.stop))
        is_single = len(prompts) * num_choices == 1
        inputs = [
            GenerationInput(
                request_id=RequestId(
                    call.response_id if is_single else f"{call.response_id}-{p}.{c}"
                ),
                model=plan.card.name,
                prompt_token_ids=prompt.token_ids,
                sampling=plan.for_choice(len(prompt.token_ids), c),
                stop=stop,
                includes_stop=bool(body.include_stop_str_in_output),
                skip_special_tokens=frame.skip_special_tokens,
                cache_salt=caller.cache_salt(body.cache_salt or ""),
                deadline_s=call.deadline_s,
                arrived_at_s=call.arrived_at_s,
                tenant=caller.tenant,
                priority=priority,
                slo_class=caller.slo_class,
                targets=caller.targets,
                weight=caller.weight,
                limits=caller.limits,
                hold=hold if p == c == 0 else None,
                on_rate_limits=call.on_rate_limits,
                session_key=caller.session_key(body.user or ""),
                trace=call.trace,
                wants_timing=body.baton is not None and bool(body.baton.timing),
            )
            for p, prompt in enumerate(prompts)
            for c in range(num_choices)
        ]
        return Job(inputs, bool(body.stream), frame)


def kept_tokens(body: GenerationBody, card: ModelCard) -> int | None:
    """How many tokens of a prompt are kept, from its end; None: all, or an error if too many."""
    asked = body.truncate_prompt_tokens
    if asked is None:
        return None
    if asked == -1:
        return card.max_model_len - 1
    if not 1 <= asked < card.max_model_len:
        raise InvalidRequest(
            f"truncate_prompt_tokens must be -1 or between 1 and {card.max_model_len - 1}, "
            f"got {asked}",
            param="truncate_prompt_tokens",
        )
    return asked


def _check_stream(body: GenerationBody, plan: SamplingPlan) -> None:
    if body.stream_options is not None and not body.stream:
        raise InvalidRequest("stream_options needs stream: true", param="stream_options")
    if body.stream and body.prompt_logprobs is not None:
        raise InvalidRequest(
            "prompt_logprobs come with whole answers only; leave stream out",
            param="prompt_logprobs",
        )


def _check_best_of(body: CompletionBody) -> None:
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise InvalidRequest(
            f"best_of must be n or be left out, got {body.best_of}; ask for n answers and choose "
            "by their logprobs",
            param="best_of",
        )


def _frame(
    body: GenerationBody,
    call: Call,
    plan: SamplingPlan,
    prompts: Sequence[Prompt],
    tools: ToolPlan,
) -> Frame:
    options = body.stream_options
    include_usage = options is not None and bool(options.include_usage)
    return Frame(
        response_id=call.response_id,
        model=plan.card.name,
        created_s=int(call.arrived_at_s),
        tokenizer=plan.card.tokenizer,
        num_top_logprobs=plan.sampling.logprobs,
        include_usage=include_usage,
        continuous_usage=include_usage
        and options is not None
        and bool(options.continuous_usage_stats),
        num_choices=body.n or 1,
        prompts=prompts,
        echo=isinstance(body, CompletionBody) and bool(body.echo),
        drops_output=plan.drops_output,
        num_prompt_logprobs=body.prompt_logprobs,
        returns_token_ids=bool(body.return_token_ids),
        names_are_ids=bool(body.return_tokens_as_token_ids),
        skip_special_tokens=body.skip_special_tokens is not False
        and not tools.needs_special_tokens,
        tools=tools,
    )
