"""The Transfer gRPC service: who may read, the streams of those who do, and timed links.

1. Challenge: a reader gets a nonce. Connect: it shows its card over that nonce and gets ours over
   its own; one that must not read is told why (`peer_gate`).
2. Leases: one stream per reader that was admitted (`lease_server`).
3. Measure: people who look for a slow link have this worker time its own (`link_check`).
"""

from __future__ import annotations

import asyncio
import logging
from typing import TypeAlias

import grpc

from baton.core.errors import BatonError, IncompatiblePeer, InvalidRequest, Unavailable
from baton.core.logging import log_fields
from baton.core.request import PeerRef
from baton.core.worker_info import PROTOCOL_VERSION
from baton.rpc.channel import abort
from baton.rpc.convert import link_to_wire, peer_from_wire
from baton.rpc.v1 import transfer_pb2 as pb
from baton.rpc.v1 import transfer_pb2_grpc as pb_grpc
from kvtransfer.owner import ReaderId
from kvtransfer.transport import Transport
from services.worker.lease_server import LeaseServer, ReaderMessages
from services.worker.link_check import LinkCheck
from services.worker.peer_gate import PeerGate

logger = logging.getLogger(__name__)

HELLO_TIMEOUT_S = 10.0

Context: TypeAlias = grpc.aio.ServicerContext


class TransferServicer(pb_grpc.TransferServicer):
    """Implements baton.v1.Transfer."""

    def __init__(
        self, leases: LeaseServer, *, gate: PeerGate, transport: Transport, links: LinkCheck
    ) -> None:
        self._leases = leases
        self._gate = gate
        self._transport = transport
        self._links = links

    async def Challenge(self, request: pb.ChallengeRequest, context: Context) -> pb.ChallengeReply:
        try:
            return pb.ChallengeReply(nonce=self._gate.challenge(request.worker_id, request.epoch))
        except BatonError as error:
            await abort(context, error)

    async def Connect(self, request: pb.ConnectRequest, context: Context) -> pb.ConnectReply:
        try:
            if request.protocol_version != PROTOCOL_VERSION:
                raise IncompatiblePeer(
                    f"reader speaks protocol version {request.protocol_version}, this worker "
                    f"{PROTOCOL_VERSION}; run the same release on both"
                )
            card = await self._gate.admit(request.card, challenge=request.challenge)
            own_card = self._transport.card(request.nonce)
        except BatonError as error:
            await abort(context, error)
        log_fields(
            logger, f"reader {card.worker_id} connected", reader=card.worker_id, epoch=card.epoch
        )
        return pb.ConnectReply(card=own_card)

    async def Leases(self, messages: ReaderMessages, context: Context) -> None:
        try:
            reader = await self._hello(messages)
        except BatonError as error:
            await abort(context, error)
        # A status cannot be sent while the first message is still taking the metadata with it:
        # the reader would wait on a stream that nobody serves.
        await context.send_initial_metadata(())
        reason = await self._leases.serve(reader, messages, context)
        if reason is not None:
            await abort(context, reason)

    async def Measure(self, request: pb.MeasureRequest, context: Context) -> pb.MeasureReply:
        try:
            self._gate.authenticate(request.card, challenge=request.challenge)
            peers: list[PeerRef] = [peer_from_wire(peer) for peer in request.peers]
            checked = await self._links.run(peers, num_rounds=request.num_rounds)
        except BatonError as error:
            await abort(context, error)
        return pb.MeasureReply(
            links=[link_to_wire(link) for link in checked.links],
            memory_bytes_per_second=checked.memory_bytes_per_second,
            findings=checked.findings,
        )

    async def _hello(self, messages: ReaderMessages) -> ReaderId:
        try:
            async with asyncio.timeout(HELLO_TIMEOUT_S):
                first = await anext(messages, None)
        except TimeoutError:
            raise Unavailable(f"no hello within {HELLO_TIMEOUT_S:.0f} s") from None
        if first is None or first.WhichOneof("body") != "hello":
            raise InvalidRequest("the first message of a lease stream must be hello")
        hello = first.hello
        await self._gate.check(hello.worker_id, hello.epoch)
        return ReaderId(f"{hello.worker_id}@{hello.epoch}")
