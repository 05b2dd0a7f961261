"""A router's gRPC API `baton.v1.Inference`: Chat, or Generate for completions.

Its messages carry token ids, so tokens are counted even where no text is due yet. Times are those
at which grpc.aio hands messages out, a task's turn after the socket.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import grpc

from baton.core.errors import InvalidRequest, Unavailable
from baton.loadtest.outcome import ErrorKind, Outcome
from baton.loadtest.target import Ask
from baton.rpc.channel import open_channel
from baton.rpc.v1 import inference_pb2, inference_pb2_grpc, worker_pb2

QUESTION_TIMEOUT_S = 10.0
_FINISH_NAMES = {
    worker_pb2.FINISH_REASON_STOP: "stop",
    worker_pb2.FINISH_REASON_LENGTH: "length",
}
_Request = inference_pb2.ChatRequest | inference_pb2.CompletionRequest


@dataclass(frozen=True, slots=True)
class GrpcOptions:
    """How requests are put."""

    address: str
    """host:port."""
    model: str = ""
    is_chat: bool = True
    ignores_eos: bool = True
    timeout_s: float = 300.0
    headers: tuple[tuple[str, str], ...] = ()
    """Metadata of every call."""
    ca_file: str | None = None
    """Certificates that sign the server's; None speaks plain text."""


class GrpcTarget:
    """Implements Target."""

    def __init__(self, options: GrpcOptions, now: Callable[[], float]) -> None:
        host, _, port = options.address.rpartition(":")
        if not host or not port.isdigit():
            raise InvalidRequest(f"{options.address!r} is no address; write host:port")
        self._options = options
        self._now = now
        self._channel = _channel(options)
        self._stub = inference_pb2_grpc.InferenceStub(self._channel)

    @property
    def place(self) -> str:
        return f"{self._options.address} (gRPC)"

    def prepare(self, ask: Ask) -> GrpcExchange:
        options = self._options
        metadata = [("x-request-id", ask.request_id)]
        metadata += [(name.lower(), value) for name, value in options.headers]
        if ask.session:
            metadata.append(("x-session-id", ask.session))
        sampling = worker_pb2.SamplingParams(
            max_tokens=ask.max_tokens, temperature=0.0, ignore_eos=options.ignores_eos
        )
        request: _Request
        if options.is_chat:
            request = inference_pb2.ChatRequest(model=options.model, sampling=sampling)
            for message in ask.prompt.messages:
                request.messages.add(role=message.role, content=message.content)
        else:
            request = inference_pb2.CompletionRequest(model=options.model, sampling=sampling)
            if ask.prompt.ids:
                request.token_ids.ids.extend(ask.prompt.ids)
            else:
                request.text = ask.prompt.text
        return GrpcExchange(self._stub, request, metadata, options.timeout_s, self._now)

    async def model_names(self) -> list[str]:
        question = inference_pb2.ListModelsRequest()
        try:
            answer = await self._stub.ListModels(
                question, timeout=QUESTION_TIMEOUT_S, metadata=list(self._metadata())
            )
        except grpc.aio.AioRpcError as error:
            where = self._options.address
            if error.code() is grpc.StatusCode.UNAVAILABLE:
                raise Unavailable(f"nothing answers at {where}: {error.details()}") from None
            raise InvalidRequest(
                f"{where} answered {error.code().name}: {error.details()}"
            ) from None
        return [model.id for model in answer.models]

    async def aclose(self) -> None:
        await self._channel.close()

    def _metadata(self) -> tuple[tuple[str, str], ...]:
        return tuple((name.lower(), value) for name, value in self._options.headers)


class GrpcExchange:
    """Implements Exchange."""

    def __init__(
        self,
        stub: inference_pb2_grpc.InferenceStub,
        request: _Request,
        metadata: list[tuple[str, str]],
        timeout_s: float,
        now: Callable[[], float],
    ) -> None:
        self._stub = stub
        self._request = request
        self._metadata = metadata
        self._timeout_s = timeout_s
        self._now = now

    async def run(self, outcome: Outcome) -> None:
        method = (
            self._stub.Chat
            if isinstance(self._request, inference_pb2.ChatRequest)
            else self._stub.Generate
        )
        outcome.sent_s = self._now()
        call = method(self._request, timeout=self._timeout_s, metadata=self._metadata)
        try:
            async for delta in call:
                self._read(delta, outcome)
        except grpc.aio.AioRpcError as error:
            _fail(outcome, error, self._timeout_s)
        except asyncio.CancelledError:
            call.cancel()
            raise
        else:
            if outcome.finish_reason:
                outcome.end(self._now())
            else:
                outcome.fail(ErrorKind.CUT_OFF, "the stream ended without a finish reason")

    def _read(self, delta: inference_pb2.InferenceDelta, outcome: Outcome) -> None:
        if delta.token_ids or delta.text:
            outcome.note_text(self._now(), delta.text)
        if delta.finish_reason != worker_pb2.FINISH_REASON_UNSPECIFIED:
            outcome.finish_reason = _FINISH_NAMES.get(delta.finish_reason, "other")
        if delta.HasField("usage"):
            outcome.num_prompt_tokens = delta.usage.prompt_tokens
            outcome.num_output_tokens = delta.usage.completion_tokens
            outcome.num_cached_tokens = delta.usage.cached_tokens


def _channel(options: GrpcOptions) -> grpc.aio.Channel:
    if options.ca_file is None:
        return open_channel(options.address)
    try:
        trusted = Path(options.ca_file).read_bytes()
    except OSError as error:
        raise InvalidRequest(f"cannot use the CA file: {error}") from None
    # The server is dialled by the name on its certificate, as any client of it does.
    return grpc.aio.secure_channel(options.address, grpc.ssl_channel_credentials(trusted))


def _fail(outcome: Outcome, error: grpc.aio.AioRpcError, timeout_s: float) -> None:
    details, code = error.details() or "", error.code()
    if code is grpc.StatusCode.DEADLINE_EXCEEDED and outcome.now() - outcome.sent_s >= timeout_s:
        outcome.fail(ErrorKind.TIMEOUT, f"not over within {timeout_s:g} s")
    elif outcome.token_times_s:
        outcome.fail(ErrorKind.STREAM, details, code.name)
    elif code is grpc.StatusCode.UNAVAILABLE and "failed to connect" in details.lower():
        outcome.fail(ErrorKind.CONNECT, details)
    else:
        outcome.fail(ErrorKind.REFUSED, details, code.name)
