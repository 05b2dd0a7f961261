"""One connection to a worker: Hello, Welcome, then messages both ways until it ends.

Does not know: requests, KV events, when to connect again.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from typing import Protocol, TypeVar

import grpc

from baton.core.errors import ConfigError
from baton.core.tls import TlsFiles
from baton.core.worker_info import PROTOCOL_VERSION
from baton.rpc.channel import open_channel, unreachable_reason
from baton.rpc.v1 import worker_pb2 as pb
from baton.rpc.v1.worker_pb2_grpc import WorkerStub
from services.router.config import SessionConfig

Message = TypeVar("Message")

CLOSE_TIMEOUT_S = 1.0


class StreamOwner(Protocol):
    """Whose connection it is. Called on the event loop; must not block."""

    @property
    def is_ready(self) -> bool:
        """The worker is welcome."""
        ...

    def on_welcome(self, welcome: pb.Welcome) -> None:
        """Raises ValueError or ConfigError on one that cannot be."""
        ...

    def on_message(self, message: pb.WorkerMessage) -> None:
        """Raises ValueError on one that cannot be."""
        ...

    def on_nonsense(self) -> None:
        """The worker has sent what cannot be; the connection ends."""
        ...

    def on_end(self) -> None:
        """The connection is about to be closed."""
        ...


class SessionStream:
    """What is to be sent outlives a connection unless it is cleared."""

    def __init__(
        self,
        address: str,
        owner: StreamOwner,
        *,
        router_id: str,
        config: SessionConfig,
        tls: TlsFiles | None,
    ) -> None:
        self._address = address
        self._owner = owner
        self._router_id = router_id
        self._config = config
        self._tls = tls
        self._stub: WorkerStub | None = None
        self._outgoing: deque[pb.RouterMessage] = deque()
        self._wake_writer = asyncio.Event()

    def send(self, message: pb.RouterMessage) -> None:
        """Never waits."""
        self._outgoing.append(message)
        self._wake_writer.set()

    def clear(self) -> None:
        """Send nothing of what has not been sent."""
        self._outgoing.clear()

    async def snapshot(self) -> pb.Welcome:
        """The worker's blocks as they are now. Raises AioRpcError, ValueError."""
        assert self._stub is not None, "only while connected"
        timeout_s = self._config.resync_timeout_s
        snapshot: pb.Welcome | None = await self._stub.GetInfo(
            pb.GetInfoRequest(), timeout=timeout_s
        )
        return _decoded(snapshot)

    async def serve(self) -> str:
        """Connect and follow; returns why it ended."""
        channel = open_channel(self._address, self._tls)
        call = None
        try:
            self._stub = WorkerStub(channel)
            call = self._stub.Session()
            return await self._talk(call)
        except grpc.aio.AioRpcError as error:
            if self._owner.is_ready:
                return f"{error.code().name}: {error.details()}"
            return await unreachable_reason(error, self._address, self._tls)
        except (ValueError, ConfigError) as error:
            self._owner.on_nonsense()
            return f"the worker sent what cannot be: {error}"
        finally:
            self._owner.on_end()
            if call is not None:
                call.cancel()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(channel.close(), CLOSE_TIMEOUT_S)

    async def _talk(self, call: grpc.aio.StreamStreamCall) -> str:
        hello = pb.Hello(router_id=self._router_id, protocol_version=PROTOCOL_VERSION)
        # Written once there is a connection; the answer may have to wait for an engine step.
        limit = f"no connection within {self._config.connect_timeout_s:g} s"
        try:
            async with asyncio.timeout(self._config.connect_timeout_s):
                await call.write(pb.RouterMessage(hello=hello))
            limit = f"no Welcome within {self._config.welcome_timeout_s:g} s"
            async with asyncio.timeout(self._config.welcome_timeout_s):
                first = await call.read()
        except TimeoutError:
            return limit
        if first is grpc.aio.EOF:
            return f"refused: {await call.details() or await call.code()}"
        if not _decoded(first).HasField("welcome"):
            raise ValueError("a first message that is not Welcome")
        self._owner.on_welcome(first.welcome)
        writer = asyncio.create_task(self._write(call))
        try:
            while (message := await call.read()) is not grpc.aio.EOF:
                self._owner.on_message(_decoded(message))
        finally:
            writer.cancel()
        return f"the worker ended the session: {await call.details() or await call.code()}"

    async def _write(self, call: grpc.aio.StreamStreamCall) -> None:
        """A write that fails ends the stream, which the reading side notices."""
        with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
            while True:
                while self._outgoing:
                    await call.write(self._outgoing.popleft())
                self._wake_writer.clear()
                await self._wake_writer.wait()


def _decoded(message: Message | None) -> Message:
    """gRPC gives None for bytes that are no such message. Raises ValueError."""
    if message is None:
        raise ValueError("a message that cannot be decoded")
    return message
