"""The Worker gRPC service: sessions with routers, GetInfo, Drain, ChangeRole.

Life of a session:
 1. Hello names the router and its protocol version; another version is refused.
 2. The session joins the others and collects events from now on; then a snapshot is taken on the
    engine's thread. Events up to the snapshot's number are dropped again, so nothing falls
    between Welcome and the first StepBatch.
 3. Two tasks: one takes the router's messages, one writes what the outbox holds. The fabric report
    follows the Welcome.
 4. Whichever ends first ends the session; its requests are cancelled.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from typing import Any, TypeAlias

import grpc

from baton.core.block import HASH_BYTES, join_hashes
from baton.core.errors import (
    BatonError,
    DeadlineExceeded,
    IncompatiblePeer,
    InvalidRequest,
    Unavailable,
)
from baton.core.logging import log_fields
from baton.core.request import RequestId
from baton.core.worker_info import PROTOCOL_VERSION
from baton.rpc.channel import MAX_MESSAGE_BYTES, abort
from baton.rpc.convert import (
    hashing_to_wire,
    load_to_wire,
    peer_from_wire,
    role_from_wire,
    worker_info_to_wire,
)
from baton.rpc.v1 import worker_pb2 as pb
from baton.rpc.v1 import worker_pb2_grpc as pb_grpc
from services.worker.config import SessionConfig
from services.worker.drain import Drain
from services.worker.engine_api import Snapshot
from services.worker.engine_loop import EngineLoop
from services.worker.fabric import Fabric
from services.worker.mesh import Mesh
from services.worker.peer_gate import PeerGate
from services.worker.requests import Requests
from services.worker.role_change import RoleChanger
from services.worker.session import RouterSession, Sessions

logger = logging.getLogger(__name__)

HELLO_TIMEOUT_S = 10.0
SNAPSHOT_TIMEOUT_S = 60.0
"""The engine answers between two steps; no step takes this long."""
MAX_SNAPSHOT_BLOCKS = (MAX_MESSAGE_BYTES - (1 << 20)) // HASH_BYTES
"""Whose hashes fit into one message beside the rest; routers are told the number of more."""

RouterMessages = AsyncIterator[pb.RouterMessage]
Context: TypeAlias = grpc.aio.ServicerContext


class WorkerServicer(pb_grpc.WorkerServicer):
    """Implements baton.v1.Worker."""

    def __init__(
        self,
        *,
        roles: RoleChanger,
        engine: EngineLoop,
        requests: Requests,
        sessions: Sessions,
        drain: Drain,
        fabric: Fabric,
        mesh: Mesh,
        gate: PeerGate,
        config: SessionConfig,
    ) -> None:
        self._roles = roles
        self._engine = engine
        self._requests = requests
        self._sessions = sessions
        self._drain = drain
        self._fabric = fabric
        self._mesh = mesh
        self._gate = gate
        self._config = config

    async def Session(self, messages: RouterMessages, context: Context) -> None:
        try:
            hello = await _hello(messages)
        except BatonError as error:
            await abort(context, error)
        session = RouterSession(hello.router_id, self._config)
        self._sessions.open(session)
        log_fields(logger, f"session of {session.router_id} opened", router=session.router_id)
        try:
            reason = await self._serve(session, messages, context)
        finally:
            session.close(Unavailable("session ended"))
            self._sessions.remove(session)
            self._mesh.forget(session)
            if session.router_id not in {other.router_id for other in self._sessions}:
                self._gate.router_gone(session.router_id)
            self._requests.session_ended(session)
            log_fields(logger, f"session of {session.router_id} ended", router=session.router_id)
        if reason is not None:
            await abort(context, reason)

    async def GetInfo(self, request: pb.GetInfoRequest, context: Context) -> pb.Welcome:
        try:
            if request.check_integrity:
                await self._engine.check_integrity()
            return self._welcome(await self._snapshot())
        except BatonError as error:
            await abort(context, error)

    async def Drain(self, request: pb.DrainRequest, context: Context) -> pb.DrainResponse:
        timeout_s = request.timeout_ms / 1000
        num_ended = await self._drain.run(timeout_s=timeout_s, hands_back=True)
        return pb.DrainResponse(num_ended=num_ended)

    async def ChangeRole(
        self, request: pb.ChangeRoleRequest, context: Context
    ) -> pb.ChangeRoleResponse:
        began_s = asyncio.get_running_loop().time()
        try:
            info = await self._roles.change(
                role_from_wire(request.role),
                timeout_s=request.timeout_ms / 1000,
                may_empty_pool=request.may_empty_pool,
            )
        except BatonError as error:
            await abort(context, error)
        seconds = asyncio.get_running_loop().time() - began_s
        return pb.ChangeRoleResponse(info=worker_info_to_wire(info), seconds=seconds)

    async def _serve(
        self, session: RouterSession, messages: RouterMessages, context: Context
    ) -> BatonError | None:
        """Returns why the session must end with an error; None when the router hung up."""
        try:
            snapshot = await self._snapshot()
        except BatonError as error:
            return error
        session.outbox.forget_events(snapshot.kv_sequence)
        await context.write(pb.WorkerMessage(welcome=self._welcome(snapshot)))
        session.outbox.set_fabric(self._fabric.report())
        reading = asyncio.create_task(self._read(session, messages))
        writing = asyncio.create_task(_write(session, context))
        closed = asyncio.create_task(session.closed())
        tasks = (reading, writing, closed)
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            return closed.result() if closed.done() else None
        finally:
            await _end_tasks(tasks)

    async def _read(self, session: RouterSession, messages: RouterMessages) -> None:
        async for message in messages:
            try:
                self._handle(session, message)
            except Exception:
                # A defect of ours; the session and its other requests go on.
                logger.exception("router message could not be handled")

    def _handle(self, session: RouterSession, message: pb.RouterMessage) -> None:
        kind = message.WhichOneof("body")
        if kind == "submit":
            self._requests.submit(session, message.submit)
        elif kind == "cancel":
            request_id = RequestId(message.cancel.request_id)
            self._requests.cancel(session, request_id, message.cancel.reason)
        elif kind == "peers":
            peers = [peer_from_wire(peer) for peer in message.peers.peers]
            self._gate.members(session.router_id, peers)
            self._mesh.want(session, peers)
        else:
            logger.warning("ignored a router message of kind %s", kind)

    async def _snapshot(self) -> Snapshot:
        try:
            async with asyncio.timeout(SNAPSHOT_TIMEOUT_S):
                return await self._engine.snapshot()
        except TimeoutError:
            raise DeadlineExceeded(
                f"the engine did not answer within {SNAPSHOT_TIMEOUT_S:.0f} s"
            ) from None

    def _welcome(self, snapshot: Snapshot) -> pb.Welcome:
        welcome = pb.Welcome(
            info=worker_info_to_wire(self._roles.info),
            load=load_to_wire(self._requests.with_flags(snapshot.load)),
            kv_sequence=snapshot.kv_sequence,
            hashing=hashing_to_wire(self._roles.info.layout),
        )
        held = (snapshot.cached_hashes, snapshot.host_hashes, snapshot.disk_hashes)
        num_blocks = sum(map(len, held))
        if num_blocks > MAX_SNAPSHOT_BLOCKS:
            welcome.num_left_out = num_blocks
        else:
            cached, host, disk = map(join_hashes, held)
            welcome.cached_hashes, welcome.host_hashes, welcome.disk_hashes = cached, host, disk
        return welcome


async def _hello(messages: RouterMessages) -> pb.Hello:
    """The first message. Raises IncompatiblePeer, InvalidRequest or DeadlineExceeded."""
    try:
        async with asyncio.timeout(HELLO_TIMEOUT_S):
            message = await anext(messages, None)
    except TimeoutError:
        raise DeadlineExceeded(f"no hello within {HELLO_TIMEOUT_S:.0f} s") from None
    if message is None or message.WhichOneof("body") != "hello":
        raise InvalidRequest("the first message of a session must be hello")
    hello = message.hello
    if hello.protocol_version != PROTOCOL_VERSION:
        raise IncompatiblePeer(
            f"router speaks protocol version {hello.protocol_version}, this worker "
            f"{PROTOCOL_VERSION}; run the same release on both"
        )
    if not hello.router_id:
        raise InvalidRequest("hello.router_id is empty")
    return hello


async def _write(session: RouterSession, context: Context) -> None:
    while True:
        for message in await session.next_messages():
            await context.write(message)


async def _end_tasks(tasks: tuple[asyncio.Task[Any], ...]) -> None:
    for task in tasks:
        task.cancel()
    for task in tasks:
        with contextlib.suppress(asyncio.CancelledError, grpc.aio.AioRpcError, grpc.RpcError):
            await task
