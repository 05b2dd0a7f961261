"""Generations as responses of the Open Inference Protocol, in pieces or as a whole."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass

from baton.core.errors import InternalError
from baton.core.request import FinishReason
from baton.rpc.v1 import open_inference_pb2 as pb
from services.router.edge.open_inference_bodies import OUTPUTS, VERSION, InferRequest
from services.router.edge.open_inference_tensors import Value, write_tensor
from services.router.openai_api.feed import open_feed
from services.router.openai_api.serving import Job
from services.router.requests.generation import GenerationDelta, Generator, Usage

FINAL = "triton_final_response"
"""The parameter of a response that says whether it is the last of its request."""

Responses = AsyncGenerator[pb.ModelInferResponse, None]


@dataclass(frozen=True, slots=True)
class Ended:
    """How one answer ended."""

    finish_reason: FinishReason
    usage: Usage


class ResponseWriter:
    """Responses to one request."""

    def __init__(self, request: InferRequest, *, model: str, response_id: str) -> None:
        self._request = request
        self._model = model
        self._response_id = response_id

    def response(
        self, texts: Sequence[str], ends: Sequence[Ended] = (), *, is_last: bool
    ) -> pb.ModelInferResponse:
        """One text per answer; `ends` of all answers, or none while they go on."""
        response = pb.ModelInferResponse(
            model_name=self._model, model_version=VERSION, id=self._response_id
        )
        response.parameters[FINAL].bool_param = is_last
        columns: dict[str, list[Value]] = {"text_output": [text.encode() for text in texts]}
        if ends:
            columns |= {
                "finish_reason": [_reason(e.finish_reason) for e in ends],
                "prompt_tokens": [e.usage.prompt_tokens for e in ends],
                "completion_tokens": [e.usage.completion_tokens for e in ends],
                "cached_tokens": [e.usage.cached_tokens for e in ends],
            }
        for name in self._request.outputs:
            if name in columns:
                write_tensor(response, name, OUTPUTS[name], columns[name], raw=self._request.is_raw)
        return response


def _reason(reason: FinishReason) -> bytes:
    """Raises InternalError for ends that the dispatcher reports as errors instead."""
    if reason in (FinishReason.ERROR, FinishReason.CANCELLED):
        raise InternalError(f"the generation ended as {reason.value}")
    name: str = reason.value
    return name.encode()


async def in_pieces(generator: Generator, job: Job, writer: ResponseWriter) -> Responses:
    """Of one answer. Closing it closes the generation."""
    feed = open_feed([generator.generate(request) for request in job.inputs])
    try:
        while items := await feed.take():
            for _, delta in items:
                if delta.finish_reason is not None:
                    yield writer.response([delta.text], [_ended(delta)], is_last=True)
                elif delta.text:
                    yield writer.response([delta.text], is_last=False)
    finally:
        await feed.aclose()


async def whole(generator: Generator, job: Job, writer: ResponseWriter) -> Responses:
    """One response. Closing it closes the generations."""
    feed = open_feed([generator.generate(request) for request in job.inputs])
    texts: list[list[str]] = [[] for _ in job.inputs]
    ends: dict[int, Ended] = {}
    try:
        while items := await feed.take():
            for index, delta in items:
                texts[index].append(delta.text)
                if delta.finish_reason is not None:
                    ends[index] = _ended(delta)
    finally:
        await feed.aclose()
    if len(ends) < len(texts):
        raise InternalError("a generation ended without a finish reason")
    ordered = [ends[index] for index in range(len(texts))]
    yield writer.response(["".join(pieces) for pieces in texts], ordered, is_last=True)


def _ended(delta: GenerationDelta) -> Ended:
    assert delta.finish_reason is not None and delta.usage is not None
    return Ended(delta.finish_reason, delta.usage)
