"""Messages that are none are refused as bad input, whichever service they were meant for.

Without it gRPC ends such a call as UNKNOWN, in the words of a Python exception, and logs a
traceback for each.

Does not know: services.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from baton.core.errors import InvalidRequest
from services.router.edge.grpc_calls import end_with

_UNDECODABLE = object()
"""In place of the message."""


class RefuseUndecodable(grpc.aio.ServerInterceptor):
    """`on_refused`: called for each such call."""

    def __init__(self, on_refused: Callable[[], None]) -> None:
        self._on_refused = on_refused
        self._guarded: dict[str, grpc.RpcMethodHandler] = {}
        """By method; only those that exist."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler:
        name = handler_call_details.method
        guarded = self._guarded.get(name)
        if guarded is None:
            handler = await continuation(handler_call_details)
            if handler is None or handler.request_deserializer is None:
                return handler
            guarded = self._guarded[name] = self._guard(handler)
        return guarded

    def _guard(self, handler: grpc.RpcMethodHandler) -> grpc.RpcMethodHandler:
        read = _reader(handler.request_deserializer)
        write = handler.response_serializer
        if handler.request_streaming and handler.response_streaming:
            return grpc.stream_stream_rpc_method_handler(
                self._of_streams(handler.stream_stream), read, write
            )
        if handler.response_streaming:
            method = handler.unary_stream
            # What writes its responses itself is no generator.
            wrap = self._to_stream if inspect.isasyncgenfunction(method) else self._of_one
            return grpc.unary_stream_rpc_method_handler(wrap(method), read, write)
        if not handler.request_streaming:
            return grpc.unary_unary_rpc_method_handler(
                self._of_one(handler.unary_unary), read, write
            )
        return handler

    def _of_one(self, method: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
        async def call(request: Any, context: grpc.aio.ServicerContext) -> Any:
            if request is _UNDECODABLE:
                return self._refuse(context)
            return await method(request, context)

        return call

    def _to_stream(
        self, method: Callable[..., AsyncGenerator[Any, None]]
    ) -> Callable[..., AsyncGenerator[Any, None]]:
        async def call(
            request: Any, context: grpc.aio.ServicerContext
        ) -> AsyncGenerator[Any, None]:
            if request is _UNDECODABLE:
                self._refuse(context)
                return
            async with contextlib.aclosing(method(request, context)) as responses:
                async for response in responses:
                    yield response

        return call

    def _of_streams(
        self, method: Callable[..., AsyncGenerator[Any, None]]
    ) -> Callable[..., AsyncGenerator[Any, None]]:
        async def requests(
            received: AsyncIterator[Any], context: grpc.aio.ServicerContext
        ) -> AsyncGenerator[Any, None]:
            async for request in received:
                if request is _UNDECODABLE:
                    self._refuse(context)
                    return
                yield request

        async def call(
            received: AsyncIterator[Any], context: grpc.aio.ServicerContext
        ) -> AsyncGenerator[Any, None]:
            async with contextlib.aclosing(
                method(requests(received, context), context)
            ) as responses:
                async for response in responses:
                    yield response

        return call

    def _refuse(self, context: grpc.aio.ServicerContext) -> None:
        self._on_refused()
        error = InvalidRequest(
            "the message cannot be decoded; compare the client's .proto with the server's "
            "reflection"
        )
        end_with(context, error, "")


def _reader(deserialize: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    def read(data: bytes) -> Any:
        try:
            return deserialize(data)
        except DecodeError:
            return _UNDECODABLE

    return read
