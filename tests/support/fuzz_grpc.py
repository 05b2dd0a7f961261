"""Calls that are nearly right, to every method that a port offers, and bytes that are nearly
those of HTTP/2."""

from __future__ import annotations

import asyncio
import contextlib
import random
import struct
from collections.abc import AsyncIterator
from dataclasses import dataclass

import grpc
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from baton.rpc.v1 import inference_pb2, open_inference_pb2, worker_pb2
from fuzzing import mutate, random_message

TIMEOUT_S = 20.0
CUT_SHORT = "Internal error from Core"
"""Of this client: the server had ended the call while there was more to send."""

_HELLO = inference_pb2.ChatMessage(role="user", content="hi")
_SHORT = worker_pb2.SamplingParams(max_tokens=4)
_SERVICES: list[ServiceDescriptor] = [
    inference_pb2.DESCRIPTOR.services_by_name["Inference"],
    open_inference_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"],
    health_pb2.DESCRIPTOR.services_by_name["Health"],
    reflection_pb2.DESCRIPTOR.services_by_name["ServerReflection"],
]
METHODS: list[MethodDescriptor] = [
    method
    for service in _SERVICES
    for method in service.methods
    # It has no end.
    if method.name != "Watch"
]


def _infer(**parameters: object) -> open_inference_pb2.ModelInferRequest:
    request = open_inference_pb2.ModelInferRequest(model_name="tiny", id="a")
    prompt = request.inputs.add(name="text_input", datatype="BYTES", shape=[1])
    prompt.contents.bytes_contents.append(b"abc")
    request.parameters["max_tokens"].int64_param = 4
    if parameters:
        request.parameters["stream"].bool_param = True
    return request


def _raw_infer() -> open_inference_pb2.ModelInferRequest:
    request = open_inference_pb2.ModelInferRequest(
        model_name="tiny", raw_input_contents=[b"\3\0\0\0abc"]
    )
    request.inputs.add(name="text_input", datatype="BYTES", shape=[1, 1])
    return request


EXAMPLES = [
    message.SerializeToString()
    for message in (
        inference_pb2.ChatRequest(model="tiny", messages=[_HELLO], sampling=_SHORT),
        inference_pb2.CompletionRequest(model="tiny", text="abc", sampling=_SHORT, stop=["zz"]),
        _infer(),
        _infer(stream=True),
        _raw_infer(),
        reflection_pb2.ServerReflectionRequest(file_containing_symbol="baton.v1.Inference"),
    )
]
_FINE = {
    grpc.StatusCode.OK,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.UNIMPLEMENTED,
    grpc.StatusCode.DEADLINE_EXCEEDED,
}


@dataclass(frozen=True, slots=True)
class Drawn:
    """One call."""

    method: MethodDescriptor
    messages: list[bytes]
    metadata: list[tuple[str, str]]
    leaves_after_s: float | None

    @property
    def path(self) -> str:
        return f"/{self.method.containing_service.full_name}/{self.method.name}"


def draw(rng: random.Random) -> Drawn:
    method = rng.choice(METHODS)
    messages = [_message(method, rng) for _ in range(rng.choice((1, 1, 2, 4)))]
    metadata = []
    if rng.random() < 0.1:
        name = rng.choice(("x-slo-class", "x-priority", "x-slo-ttft-ms", "traceparent", "zz"))
        metadata.append((name, rng.choice(("batch", "1", "-1", "x" * 200, "00-0-0-0", ""))))
    leaves = rng.choice((0.0, 0.001, 0.05)) if rng.random() < 0.1 else None
    return Drawn(method, messages, metadata, leaves)


def _message(method: MethodDescriptor, rng: random.Random) -> bytes:
    kind = rng.randrange(4)
    if kind == 0:
        return mutate(rng.choice(EXAMPLES), rng, EXAMPLES)
    data = random_message(method.input_type._concrete_class, rng).SerializeToString()
    return mutate(data, rng, EXAMPLES) if kind == 1 else data


async def call(channel: grpc.aio.Channel, drawn: Drawn) -> tuple[grpc.StatusCode, str]:
    """How it ended."""
    is_many, is_streamed = drawn.method.client_streaming, drawn.method.server_streaming
    shape = ("stream" if is_many else "unary") + ("_stream" if is_streamed else "_unary")
    made = getattr(channel, shape)(drawn.path)
    request = _each(drawn.messages) if is_many else drawn.messages[0]
    running = made(request, timeout=TIMEOUT_S, metadata=drawn.metadata)
    if drawn.leaves_after_s is not None:
        asyncio.get_running_loop().call_later(drawn.leaves_after_s, running.cancel)
    with contextlib.suppress(grpc.aio.AioRpcError, asyncio.CancelledError):
        if is_streamed:
            async for _ in running:
                pass
        else:
            await running
    return await running.code(), await running.details() or ""


def wrong(code: grpc.StatusCode, details: str, drawn: Drawn) -> str | None:
    if code in _FINE or (drawn.method.client_streaming and details == CUT_SHORT):
        return None
    sent = [message.hex() for message in drawn.messages][:4]
    return f"{code.name} ({details}) for {drawn.path} of {sent}"


async def _each(messages: list[bytes]) -> AsyncIterator[bytes]:
    for message in messages:
        yield message


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def _literal(name: bytes, value: bytes) -> bytes:
    return b"\0" + bytes([len(name)]) + name + bytes([len(value)]) + value


PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + _frame(4, 0, 0, b"")


def call_frames(stream: int, path: bytes, message: bytes) -> list[bytes]:
    """Of one call with one message."""
    head = [
        (b":method", b"POST"), (b":scheme", b"http"), (b":path", path), (b":authority", b"a"),
        (b"te", b"trailers"), (b"content-type", b"application/grpc"),
    ]  # fmt: skip
    return [
        _frame(1, 4, stream, b"".join(_literal(*pair) for pair in head)),
        _frame(0, 1, stream, b"\0" + struct.pack(">I", len(message)) + message),
    ]


def connection_bytes(rng: random.Random) -> bytes:
    """A connection with one or more calls, mutated where no client would be."""
    frames = [PREFACE]
    for stream in range(1, rng.choice((3, 3, 9)), 2):
        method = rng.choice(METHODS)
        path = f"/{method.containing_service.full_name}/{method.name}".encode()
        frames += call_frames(stream, path, _message(method, rng))
        if rng.random() < 0.3:
            frames.append(_frame(rng.choice((3, 8, 9, 6, 7)), 0, stream, rng.randbytes(4)))
    data = b"".join(frames)
    return mutate(data, rng, frames) if rng.random() < 0.9 else data


async def send_bytes(host: str, port: int, data: bytes, *, wait_s: float) -> None:
    """And read for at most `wait_s` what comes back."""
    reader, writer = await asyncio.open_connection(host, port)
    try:
        with contextlib.suppress(ConnectionError, TimeoutError):
            writer.write(data)
            await writer.drain()
            async with asyncio.timeout(wait_s):
                while await reader.read(65536):
                    pass
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()
