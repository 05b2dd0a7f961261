"""`inference.GRPCInferenceService`: the Open Inference Protocol on top of the seams that the other
doors use, with Triton's ModelStreamInfer.

One stream carries many requests, which run side by side:

    read ──► request 0 ──answer──►┐
        └──► request 1 ──answer──►├─ responses ──► client      at most MAX_PER_STREAM at a time
        └──► request n ──answer──►┘

A client that takes nothing stops the answers, and these the reading of requests.

Does not know: tensors (see `open_inference_bodies`), servers, ports.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator

import grpc

import baton
from baton.core.errors import (
    BatonError,
    DeadlineExceeded,
    InvalidRequest,
    ModelNotFound,
    public_message,
    wire_status,
)
from baton.core.logging import log_fields
from baton.core.metrics import REJECTED
from baton.core.trace import parse_traceparent
from baton.rpc.v1 import open_inference_pb2 as pb
from baton.rpc.v1 import open_inference_pb2_grpc
from baton.telemetry.metrics import Metrics
from services.router.edge.edge_config import EdgeConfig
from services.router.edge.grpc_calls import end_with, is_ready, metadata_of, refuse_unknown_fields
from services.router.edge.open_inference_answers import (
    FINAL,
    Responses,
    ResponseWriter,
    in_pieces,
    whole,
)
from services.router.edge.open_inference_bodies import (
    InferRequest,
    check_version,
    model_metadata,
    read_request,
)
from services.router.edge.preprocess import Preprocessor, new_id, shorten
from services.router.openai_api.error_body import rate_limit_headers
from services.router.openai_api.jobs import Call, JobMaker
from services.router.openai_api.sampling import completion_plan
from services.router.openai_api.serving import Job
from services.router.requests.generation import Generator
from services.router.tenants.tenants import Caller, Tenants

logger = logging.getLogger(__name__)

SERVER_NAME = "baton"
MAX_PER_STREAM = 64
"""Requests of one stream that run at a time; the next is read when one of them has ended."""
_BUFFERED_RESPONSES = 16

StreamResponses = AsyncGenerator[pb.ModelStreamInferResponse, None]


class OpenInferenceApi(open_inference_pb2_grpc.GRPCInferenceServiceServicer):
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

    async def ServerLive(
        self, request: pb.ServerLiveRequest, context: grpc.aio.ServicerContext
    ) -> pb.ServerLiveResponse:
        return pb.ServerLiveResponse(live=True)

    async def ServerReady(
        self, request: pb.ServerReadyRequest, context: grpc.aio.ServicerContext
    ) -> pb.ServerReadyResponse:
        return pb.ServerReadyResponse(ready=await is_ready(self._generator))

    async def ModelReady(
        self, request: pb.ModelReadyRequest, context: grpc.aio.ServicerContext
    ) -> pb.ModelReadyResponse:
        try:
            await self._tenants.caller(metadata_of(context))
        except BatonError as error:
            self._refuse(context, error)
            return pb.ModelReadyResponse()
        try:
            self._check_model(request.name, request.version)
        except ModelNotFound:
            return pb.ModelReadyResponse(ready=False)
        return pb.ModelReadyResponse(ready=await is_ready(self._generator))

    async def ServerMetadata(
        self, request: pb.ServerMetadataRequest, context: grpc.aio.ServicerContext
    ) -> pb.ServerMetadataResponse:
        return pb.ServerMetadataResponse(name=SERVER_NAME, version=baton.__version__)

    async def ModelMetadata(
        self, request: pb.ModelMetadataRequest, context: grpc.aio.ServicerContext
    ) -> pb.ModelMetadataResponse:
        try:
            await self._tenants.caller(metadata_of(context))
            self._check_model(request.name, request.version)
        except BatonError as error:
            self._refuse(context, error)
            return pb.ModelMetadataResponse()
        return model_metadata(request.name)

    async def ModelInfer(
        self, request: pb.ModelInferRequest, context: grpc.aio.ServicerContext
    ) -> pb.ModelInferResponse:
        response_id = new_id("infer")
        answer = pb.ModelInferResponse()
        try:
            caller = await self._tenants.caller(metadata_of(context))
            responses = self._answer(request, caller, context, response_id, may_stream=False)
            async with contextlib.aclosing(responses):
                async for response in responses:
                    answer = response
        except Exception as error:
            end_with(context, error, response_id)
        return answer

    async def ModelStreamInfer(
        self,
        request_iterator: AsyncIterator[pb.ModelInferRequest],
        context: grpc.aio.ServicerContext,
    ) -> StreamResponses:
        try:
            caller = await self._tenants.caller(metadata_of(context))
        except BatonError as error:
            self._refuse(context, error)
            return
        responses: asyncio.Queue[pb.ModelStreamInferResponse | None] = asyncio.Queue(
            _BUFFERED_RESPONSES
        )
        reading = asyncio.create_task(self._read(request_iterator, caller, context, responses))
        try:
            while (response := await responses.get()) is not None:
                yield response
        finally:
            # By cancel, deadline or the end: closes the generations of all requests.
            reading.cancel()
            await asyncio.wait({reading})

    async def _read(
        self,
        requests: AsyncIterator[pb.ModelInferRequest],
        caller: Caller,
        context: grpc.aio.ServicerContext,
        responses: asyncio.Queue[pb.ModelStreamInferResponse | None],
    ) -> None:
        """Run every request of a stream, then put None."""
        room = asyncio.Semaphore(MAX_PER_STREAM)
        try:
            async with asyncio.TaskGroup() as running:
                async for request in requests:
                    await room.acquire()
                    task = running.create_task(self._respond(request, caller, context, responses))
                    task.add_done_callback(lambda _: room.release())
        except Exception:
            logger.exception("a stream of requests broke")
        await responses.put(None)

    async def _respond(
        self,
        request: pb.ModelInferRequest,
        caller: Caller,
        context: grpc.aio.ServicerContext,
        responses: asyncio.Queue[pb.ModelStreamInferResponse | None],
    ) -> None:
        """All responses to one request of a stream; what goes wrong becomes the last."""
        response_id = new_id("infer")
        try:
            answer = self._answer(request, caller, context, response_id, may_stream=True)
            async with contextlib.aclosing(answer):
                async for response in answer:
                    await responses.put(pb.ModelStreamInferResponse(infer_response=response))
        except Exception as error:
            if not isinstance(error, BatonError):
                logger.error("gRPC request %s failed", response_id, exc_info=error)
            failed = pb.ModelInferResponse(model_name=request.model_name, id=request.id)
            failed.parameters[FINAL].bool_param = True
            failed.parameters["error_code"].string_param = wire_status(error).grpc
            message = public_message(error)
            await responses.put(
                pb.ModelStreamInferResponse(error_message=message, infer_response=failed)
            )

    async def _answer(
        self,
        request: pb.ModelInferRequest,
        caller: Caller,
        context: grpc.aio.ServicerContext,
        response_id: str,
        *,
        may_stream: bool,
    ) -> Responses:
        """Leaving this generator early, by cancel or deadline, closes the generations."""
        with contextlib.ExitStack() as at_end:
            try:
                call = self._call(caller, context, response_id)
                understood, job = await self._job(request, call, may_stream, at_end)
            except Exception as error:
                self._note_refused(error, response_id)
                raise
            writer = ResponseWriter(
                understood, model=job.frame.model, response_id=request.id or response_id
            )
            responses_of = in_pieces if job.is_stream else whole
            async with contextlib.aclosing(responses_of(self._generator, job, writer)) as responses:
                async for response in responses:
                    yield response

    async def _job(
        self,
        request: pb.ModelInferRequest,
        call: Call,
        may_stream: bool,
        at_end: contextlib.ExitStack,
    ) -> tuple[InferRequest, Job]:
        refuse_unknown_fields(request)
        understood = read_request(request)
        body = understood.body
        if body.stream and not may_stream:
            raise InvalidRequest(
                "stream needs ModelStreamInfer; call that or leave stream out", param="stream"
            )
        if understood.timeout_s is not None:
            deadline_s = min(call.deadline_s, understood.timeout_s)
            call = dataclasses.replace(call, deadline_s=deadline_s)
        job = await self._jobs.completion(
            body, call, lambda card: completion_plan(card, body), at_end
        )
        if job.is_stream and len(job.inputs) > 1:
            raise InvalidRequest(
                f"a stream is of one answer, and this request asks for {len(job.inputs)}; "
                "send a request for each, or leave stream out",
                param="stream",
            )
        return understood, job

    def _call(self, caller: Caller, context: grpc.aio.ServicerContext, response_id: str) -> Call:
        """Raises DeadlineExceeded."""
        header = metadata_of(context)
        remaining_s = context.time_remaining()
        if remaining_s is None:
            remaining_s = self._config.deadline_s
        if remaining_s <= 0:
            raise DeadlineExceeded("the call's deadline had passed before its request was read")
        return Call(
            caller=caller,
            response_id=response_id,
            arrived_at_s=time.time(),
            deadline_s=min(self._config.deadline_s, remaining_s),
            on_rate_limits=lambda rates: context.set_trailing_metadata(
                tuple(rate_limit_headers(rates))
            ),
            trace=parse_traceparent(header("traceparent"), header("tracestate")),
        )

    def _check_model(self, name: str, version: str) -> None:
        """Raises ModelNotFound."""
        names = [card.name for card in self._generator.models()]
        if name not in names:
            served = ", ".join(names[:8]) or "none"
            raise ModelNotFound(
                f"model {shorten(name)} does not exist; served now: {served}", param="name"
            )
        check_version(name, version)

    def _refuse(self, context: grpc.aio.ServicerContext, error: Exception) -> None:
        self._note_refused(error, "")
        end_with(context, error, "")

    def _note_refused(self, error: Exception, request_id: str) -> None:
        status = wire_status(error)
        self._metrics.add(REJECTED, 1, str(status.http))
        log_fields(
            logger,
            "request rejected",
            request_id=request_id,
            status=status.grpc,
            error=str(error)[:500],
        )
