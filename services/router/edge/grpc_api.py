"""The client API over gRPC: `baton.v1.Inference` on top of the same seams as the HTTP routes.

Unlike JSON bodies, messages with unknown fields are refused: a typed client that sends one
expects it to be obeyed.

Does not know: servers, ports, health (see `grpc_server`).
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Sequence

import grpc

from baton.core.errors import BatonError, wire_status
from baton.core.logging import log_fields
from baton.core.metrics import REJECTED
from baton.core.trace import parse_traceparent
from baton.rpc.v1 import inference_pb2 as pb
from baton.rpc.v1 import inference_pb2_grpc
from baton.telemetry.metrics import Metrics
from services.router.edge.edge_config import EdgeConfig
from services.router.edge.grpc_bodies import Request, chat_body, completion_body, sampling_plan
from services.router.edge.grpc_calls import end_with, metadata_of, refuse_unknown_fields
from services.router.edge.grpc_deltas import DeltaWriter
from services.router.edge.preprocess import Preprocessor, check_num_messages, new_id
from services.router.openai_api.error_body import rate_limit_headers
from services.router.openai_api.feed import DeltaFeed, Generation, Item
from services.router.openai_api.jobs import Call, JobMaker
from services.router.openai_api.sampling import SamplingPlan
from services.router.openai_api.serving import Job
from services.router.requests.generation import Generator, ModelCard
from services.router.tenants.tenants import Tenants

logger = logging.getLogger(__name__)

Deltas = AsyncGenerator[pb.InferenceDelta, None]


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
        self._jobs = JobMaker(preprocessor, config)
        self._tenants = tenants
        self._metrics = metrics
        self._config = config

    async def Chat(self, request: pb.ChatRequest, context: grpc.aio.ServicerContext) -> Deltas:
        async for delta in self._answer(request, context):
            yield delta

    async def Generate(
        self, request: pb.CompletionRequest, context: grpc.aio.ServicerContext
    ) -> Deltas:
        async for delta in self._answer(request, context):
            yield delta

    async def ListModels(
        self, request: pb.ListModelsRequest, context: grpc.aio.ServicerContext
    ) -> pb.ListModelsResponse:
        try:
            await self._tenants.caller(metadata_of(context))
            refuse_unknown_fields(request)
        except BatonError as error:
            self._refuse(context, error)
            return pb.ListModelsResponse()
        return pb.ListModelsResponse(
            models=[
                pb.Model(id=card.name, max_model_len=card.max_model_len)
                for card in self._generator.models()
            ]
        )

    async def _answer(self, request: Request, context: grpc.aio.ServicerContext) -> Deltas:
        with contextlib.ExitStack() as at_end:
            try:
                job = await self._job(request, context, at_end)
            except Exception as error:
                self._refuse(context, error)
                return
            async with contextlib.aclosing(self._run(job, context)) as deltas:
                async for delta in deltas:
                    yield delta

    async def _job(
        self,
        request: Request,
        context: grpc.aio.ServicerContext,
        at_end: contextlib.ExitStack,
    ) -> Job:
        """What can be checked cheaply is checked before the prompt is tokenized. `at_end`: run when
        the call is over."""
        arrived_at_s = time.time()
        header = metadata_of(context)
        caller = await self._tenants.caller(header)
        remaining_s = context.time_remaining() or self._config.deadline_s
        call = Call(
            caller=caller,
            response_id=new_id("gen"),
            arrived_at_s=arrived_at_s,
            deadline_s=min(self._config.deadline_s, remaining_s),
            on_rate_limits=lambda rates: context.set_trailing_metadata(
                tuple(rate_limit_headers(rates))
            ),
            trace=parse_traceparent(header("traceparent"), header("tracestate")),
        )
        if isinstance(request, pb.ChatRequest):
            check_num_messages(len(request.messages))
        refuse_unknown_fields(request)

        def plan(card: ModelCard) -> SamplingPlan:
            return sampling_plan(card, request)

        if isinstance(request, pb.ChatRequest):
            return await self._jobs.chat(chat_body(request), call, plan, at_end)
        return await self._jobs.completion(completion_body(request), call, plan, at_end)

    async def _run(self, job: Job, context: grpc.aio.ServicerContext) -> Deltas:
        """Leaving this generator early, by cancel or deadline, closes the generations."""
        generations = [self._generator.generate(request) for request in job.inputs]
        writer = DeltaWriter(job.frame)
        try:
            if len(generations) > 1:
                async with contextlib.aclosing(_together(generations)) as items:
                    async for index, delta in items:
                        yield writer.message(index, delta)
                return
            async with contextlib.AsyncExitStack() as stack:
                (generation,) = generations
                if isinstance(generation, AsyncGenerator):
                    await stack.enter_async_context(contextlib.aclosing(generation))
                async for ready in generation:
                    for delta in ready:
                        yield writer.message(0, delta)
        except Exception as error:
            end_with(context, error, job.frame.response_id)

    def _refuse(self, context: grpc.aio.ServicerContext, error: Exception) -> None:
        status = wire_status(error)
        self._metrics.add(REJECTED, 1, str(status.http))
        log_fields(logger, "request rejected", status=status.grpc, error=str(error)[:500])
        end_with(context, error, "")


async def _together(generations: Sequence[Generation]) -> AsyncGenerator[Item, None]:
    """The deltas of several answers as they come."""
    feed = DeltaFeed(generations)
    try:
        while items := await feed.take():
            for item in items:
                yield item
    finally:
        await feed.aclose()
