"""The client API over gRPC: `baton.v1.Inference` on top of the same seams as the HTTP routes.

Unlike JSON bodies, messages with unknown fields are refused: a typed client that sends one
expects it to be obeyed.

Does not know: servers, ports, health (see `grpc_server`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable

import grpc
from google.protobuf.message import Message
from google.protobuf.unknown_fields import UnknownFieldSet

from baton.core.errors import BatonError, InternalError, InvalidRequest, Overloaded, wire_status
from baton.core.logging import log_fields
from baton.core.metrics import REJECTED
from baton.core.request import FinishReason, RequestId
from baton.core.trace import parse_traceparent
from baton.rpc.channel import grpc_status
from baton.rpc.convert import finish_to_wire, logprobs_to_wire, sampling_from_wire
from baton.rpc.v1 import inference_pb2 as pb
from baton.rpc.v1 import inference_pb2_grpc
from baton.telemetry.metrics import Metrics
from services.router.edge.edge_config import EdgeConfig
from services.router.edge.preprocess import (
    Preprocessor,
    check_num_messages,
    check_sampling,
    check_stop,
    new_id,
    output_tokens,
)
from services.router.edge.wire_timing import timing_to_wire
from services.router.openai_api.error_body import rate_limit_headers, retry_headers
from services.router.requests.generation import (
    GenerationDelta,
    GenerationInput,
    Generator,
    ModelCard,
)
from services.router.tenants.tenants import HeaderOf, Tenants

logger = logging.getLogger(__name__)

GENERATE_MAX_TOKENS = 16
"""What Generate produces when max_tokens is absent, as on the completions route."""

MAX_NAMED_UNKNOWN_BYTES = 4096
"""More than this is refused without looking for a field to name."""

Deltas = AsyncGenerator[pb.InferenceDelta, None]
PromptOf = Callable[[ModelCard], Awaitable[tuple[int, ...]]]


class InferenceApi(inference_pb2_grpc.InferenceServicer):
    """Calls turned away here are counted in `metrics` under the matching HTTP status."""

    def __init__(
        self,
        generator: Generator,
        preprocessor: Preprocessor,
        *,
        metrics: Metrics,
        config: EdgeConfig,
        tenants: Tenants,
    ) -> None:
        self._generator = generator
        self._preprocessor = preprocessor
        self._tenants = tenants
        self._metrics = metrics
        self._config = config

    async def Chat(self, request: pb.ChatRequest, context: grpc.aio.ServicerContext) -> Deltas:
        async def prompt(card: ModelCard) -> tuple[int, ...]:
            messages = [{"role": m.role, "content": m.content} for m in request.messages]
            return await self._preprocessor.chat_prompt(card, messages)

        async for delta in self._answer(request, context, prompt, None):
            yield delta

    async def Generate(
        self, request: pb.CompletionRequest, context: grpc.aio.ServicerContext
    ) -> Deltas:
        async def prompt(card: ModelCard) -> tuple[int, ...]:
            match request.WhichOneof("prompt"):
                case "text":
                    return await self._preprocessor.text_prompt(card, request.text, param="text")
                case "token_ids":
                    ids = request.token_ids.ids
                    return self._preprocessor.token_prompt(card, ids, param="token_ids")
            raise InvalidRequest("prompt is required; set text or token_ids", param="prompt")

        async for delta in self._answer(request, context, prompt, GENERATE_MAX_TOKENS):
            yield delta

    async def ListModels(
        self, request: pb.ListModelsRequest, context: grpc.aio.ServicerContext
    ) -> pb.ListModelsResponse:
        try:
            await self._tenants.caller(_metadata_of(context))
            _refuse_unknown_fields(request)
        except BatonError as error:
            self._refuse(context, error)
            return pb.ListModelsResponse()
        return pb.ListModelsResponse(
            models=[
                pb.Model(id=card.name, max_model_len=card.max_model_len)
                for card in self._generator.models()
            ]
        )

    async def _answer(
        self,
        request: pb.ChatRequest | pb.CompletionRequest,
        context: grpc.aio.ServicerContext,
        prompt: PromptOf,
        default_max_tokens: int | None,
    ) -> Deltas:
        with contextlib.ExitStack() as at_end:
            try:
                job = await self._job(request, context, prompt, default_max_tokens, at_end)
            except Exception as error:
                self._refuse(context, error)
                return
            async with contextlib.aclosing(self._run(job, context)) as deltas:
                async for delta in deltas:
                    yield delta

    async def _job(
        self,
        request: pb.ChatRequest | pb.CompletionRequest,
        context: grpc.aio.ServicerContext,
        prompt: PromptOf,
        default_max_tokens: int | None,
        at_end: contextlib.ExitStack,
    ) -> GenerationInput:
        """What can be checked cheaply is checked before the prompt is tokenized. `at_end`: run when
        the call is over."""
        arrived_at_s = time.time()
        header = _metadata_of(context)
        caller = await self._tenants.caller(header)
        if isinstance(request, pb.ChatRequest):
            check_num_messages(len(request.messages))
        _refuse_unknown_fields(request)
        card = self._preprocessor.model_card(request.model)
        wire = request.sampling
        at_most = default_max_tokens or card.max_model_len
        sampling = check_sampling(card, sampling_from_wire(wire, max_tokens=at_most))
        stop = check_stop(request.stop)
        hold = await self._preprocessor.hold_quota(caller, _num_chars(request))
        if hold is not None:
            at_end.callback(hold.release)
        token_ids = await prompt(card)
        asked = wire.max_tokens if wire.HasField("max_tokens") else None
        max_tokens = output_tokens(card, len(token_ids), asked, default_max_tokens)
        remaining_s = context.time_remaining() or self._config.deadline_s
        return GenerationInput(
            request_id=RequestId(new_id("gen")),
            model=card.name,
            prompt_token_ids=token_ids,
            sampling=dataclasses.replace(sampling, max_tokens=max_tokens),
            stop=stop,
            deadline_s=min(self._config.deadline_s, remaining_s),
            arrived_at_s=arrived_at_s,
            cache_salt=caller.cache_salt(""),
            tenant=caller.tenant,
            priority=caller.priority,
            slo_class=caller.slo_class,
            targets=caller.targets,
            weight=caller.weight,
            limits=caller.limits,
            hold=hold,
            on_rate_limits=lambda rates: context.set_trailing_metadata(
                tuple(rate_limit_headers(rates))
            ),
            session_key=caller.session_key(""),
            trace=parse_traceparent(header("traceparent"), header("tracestate")),
            wants_timing=request.with_timing,
        )

    async def _run(self, job: GenerationInput, context: grpc.aio.ServicerContext) -> Deltas:
        """Leaving this generator early, by cancel or deadline, closes the generation."""
        generation = self._generator.generate(job)
        try:
            async with contextlib.AsyncExitStack() as stack:
                if isinstance(generation, AsyncGenerator):
                    await stack.enter_async_context(contextlib.aclosing(generation))
                async for ready in generation:
                    for delta in ready:
                        yield _delta_to_wire(job, delta)
        except Exception as error:
            _end_with(context, error, job.request_id)

    def _refuse(self, context: grpc.aio.ServicerContext, error: Exception) -> None:
        status = wire_status(error)
        self._metrics.add(REJECTED, 1, str(status.http))
        log_fields(logger, "request rejected", status=status.grpc, error=str(error)[:500])
        _end_with(context, error, "")


def _end_with(context: grpc.aio.ServicerContext, error: Exception, request_id: str) -> None:
    if not isinstance(error, BatonError):
        logger.error("gRPC request %s failed", request_id, exc_info=error)
    metadata = retry_headers(error)
    if isinstance(error, Overloaded):
        # Obeyed by gRPC clients that have a retry policy.
        metadata.append(("grpc-retry-pushback-ms", dict(metadata)["retry-after-ms"]))
    if metadata:
        context.set_trailing_metadata(tuple(metadata))
    # Not `abort`: the call and what that raises would keep each other, and so the prompt.
    code, message = grpc_status(error)
    context.set_code(code)
    context.set_details(message)


def _metadata_of(context: grpc.aio.ServicerContext) -> HeaderOf:
    metadata = {str(key): value for key, value in context.invocation_metadata() or ()}

    def value_of(name: str) -> str:
        value = metadata.get(name, "")
        return value if isinstance(value, str) else value.decode("latin-1")

    return value_of


def _num_chars(request: pb.ChatRequest | pb.CompletionRequest) -> int:
    """To be tokenized."""
    if isinstance(request, pb.ChatRequest):
        return sum(len(message.content) for message in request.messages)
    return len(request.text)


def _delta_to_wire(job: GenerationInput, delta: GenerationDelta) -> pb.InferenceDelta:
    if delta.finish_reason in (FinishReason.ERROR, FinishReason.CANCELLED):
        raise InternalError(f"the generation ended as {delta.finish_reason.value}")
    message = pb.InferenceDelta(
        request_id=job.request_id,
        model=job.model,
        text=delta.text,
        token_ids=delta.token_ids,
        logprobs=[logprobs_to_wire(entry) for entry in delta.logprobs],
        finish_reason=finish_to_wire(delta.finish_reason),
    )
    if delta.usage is not None:
        message.usage.CopyFrom(
            pb.Usage(
                prompt_tokens=delta.usage.prompt_tokens,
                completion_tokens=delta.usage.completion_tokens,
                cached_tokens=delta.usage.cached_tokens,
            )
        )
    if delta.timing is not None:
        message.timing.CopyFrom(timing_to_wire(delta.timing))
    return message


def _refuse_unknown_fields(message: Message) -> None:
    """Raises InvalidRequest. Listing unknown fields costs half a microsecond for each and looking
    for them in Python more, so sizes are compared first."""
    known = type(message)()
    known.CopyFrom(message)
    known.DiscardUnknownFields()
    num_bytes = message.ByteSize() - known.ByteSize()
    name = message.DESCRIPTOR.name
    if num_bytes > MAX_NAMED_UNKNOWN_BYTES:
        raise InvalidRequest(
            f"{name} has {num_bytes} bytes of unknown fields; "
            "compare the client's .proto with the server's reflection",
            param=name,
        )
    if num_bytes:
        _name_unknown_field(message, name)


def _name_unknown_field(message: Message, name: str) -> None:
    """Raises InvalidRequest with the field's number, for there is no name to give."""
    unknown = UnknownFieldSet(message)
    if len(unknown):
        raise InvalidRequest(
            f"{name} has no field number {unknown[0].field_number}; "
            "compare the client's .proto with the server's reflection",
            param=name,
        )
    for field, value in message.ListFields():
        if field.message_type is None or field.message_type.GetOptions().map_entry:
            continue
        inner = f"{name}.{field.name}"
        for entry in value if field.is_repeated else (value,):
            _name_unknown_field(entry, inner)
