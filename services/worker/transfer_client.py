"""The reader's side of the hand-off: from a DECODE request to its prompt's KV in our blocks.

 1. expect     the request is here: connect to its prefill worker in the background; once the
               link is ready, `Fetcher` watches, so that the lease is kept while we wait for blocks
 2. reserved   the engine holds blocks: `Fetcher` reads
 3. finished   the owner vouched for the lease: the first token goes to the engine, with the
               transfer's time points and statistics in its time line
 x. drop, failure in any state: the reservation is given up; blocks a read may still write to go
    with it and come back by `settled`

Not known here: sessions and routers (they are behind `TransferOutcome`).
"""

from __future__ import annotations

import asyncio
import copy
import dataclasses
import logging
from collections.abc import Sequence
from typing import Protocol

from baton.core.block import BlockId
from baton.core.clock import Clock
from baton.core.errors import TransferError
from baton.core.lifecycle import LifecycleEvent, Timeline
from baton.core.request import GenerateRequest, PeerRef, RequestId, TokenDelta
from baton.core.worker_info import WorkerId, WorkerInfo
from baton.engine.engine import Reservation
from kvtransfer.fetch_state import TransferFailure, TransferResult
from kvtransfer.fetcher import Fetcher, FetchLimits
from kvtransfer.messages import GiveUp, OwnerMessage, ReaderMessage
from kvtransfer.transport import Transport
from services.worker.peer_link import LinkState, PeerLink

logger = logging.getLogger(__name__)


class TransferOutcome(Protocol):
    """Who waits for the KV. Called on the event loop, exactly once per expected request."""

    def arrived(self, request_id: RequestId, first: TokenDelta) -> None:
        """All reserved blocks are valid; `first` holds the token sampled by the owner."""
        ...

    def not_arrived(
        self, request_id: RequestId, message: str, unsettled: Sequence[BlockId]
    ) -> None:
        """Maybe before there is a reservation; `unsettled` blocks of it may still be written to."""
        ...

    def settled(self, block_ids: Sequence[BlockId]) -> None:
        """Nothing can write to these unsettled blocks any more."""
        ...


class TransferClient:
    """All hand-offs to this worker."""

    def __init__(
        self,
        *,
        myself: WorkerInfo,
        transport: Transport,
        outcome: TransferOutcome,
        clock: Clock,
        wall_clock: Clock,
        limits: FetchLimits,
        connect_timeout_s: float,
    ) -> None:
        self._myself = myself
        self._transport = transport
        self._outcome = outcome
        self._clock = clock
        self._wall_clock = wall_clock
        self._connect_timeout_s = connect_timeout_s
        self._fetcher = Fetcher(
            transport=transport, link=self, sink=self, clock=clock, limits=limits
        )
        self._links: dict[WorkerId, PeerLink] = {}
        self._expected: dict[RequestId, GenerateRequest] = {}
        self._starting: dict[RequestId, asyncio.Task[None]] = {}
        """Expected requests whose link is not ready yet."""
        self._early: dict[RequestId, Reservation] = {}
        """Reservations that came before the link was ready."""

    @property
    def is_empty(self) -> bool:
        """No hand-off is open and no block unsettled."""
        return not self._expected and self._fetcher.is_empty

    async def close(self) -> None:
        """Give up everything that is open and end all links."""
        for request_id in list(self._expected):
            self.drop(request_id)
        await self._fetcher.close()
        await asyncio.gather(*(link.close() for link in list(self._links.values())))

    # From the requests.

    def expect(self, request: GenerateRequest) -> None:
        """A DECODE request has arrived; ends in exactly one call of the outcome."""
        assert request.prefill_peer is not None
        self._expected[request.request_id] = request
        self._starting[request.request_id] = asyncio.create_task(
            self._start(request, request.prefill_peer)
        )

    def reserved(self, reservation: Reservation) -> None:
        """Blocks of an expected request to read into."""
        if reservation.request_id in self._starting:
            self._early[reservation.request_id] = reservation
        else:
            self._read_into(reservation)

    def drop(self, request_id: RequestId) -> None:
        """Nobody wants the KV any more. The outcome hears of it before this returns."""
        request = self._expected.pop(request_id, None)
        if request is None:
            return
        reason = "the request was cancelled"
        starting = self._starting.pop(request_id, None)
        if starting is not None:
            starting.cancel()
            self._early.pop(request_id, None)
            self._outcome.not_arrived(request_id, reason, ())
        else:
            self._fetcher.cancel(request_id, reason)
        # The owner may have leased blocks already, whether we watched or not.
        assert request.prefill_peer is not None
        self.send(request.prefill_peer.worker_id, GiveUp(request_id, reason))

    async def _start(self, request: GenerateRequest, peer: PeerRef) -> None:
        request_id = request.request_id
        try:
            await self._link_to(peer).ready()
            self._fetcher.expect(
                request_id, peer=peer.worker_id, epoch=peer.epoch, timeout_s=request.deadline_s
            )
        except Exception as error:
            if not isinstance(error, TransferError):
                logger.exception("hand-off of request %s could not start", request_id)
            del self._expected[request_id], self._starting[request_id]
            self._early.pop(request_id, None)
            self._outcome.not_arrived(request_id, _failed(peer, error), ())
            return
        del self._starting[request_id]
        reservation = self._early.pop(request_id, None)
        if reservation is not None:
            self._read_into(reservation)

    def _read_into(self, reservation: Reservation) -> None:
        self._fetcher.reserved(
            reservation.request_id,
            reservation.block_ids,
            num_cached_blocks=reservation.num_cached_blocks,
        )

    def _link_to(self, peer: PeerRef) -> PeerLink:
        """The link to this epoch of the peer; a dead or older one is replaced."""
        link = self._links.get(peer.worker_id)
        if link is not None and link.peer == peer and link.state is not LinkState.GONE:
            return link
        link = self._links[peer.worker_id] = PeerLink(
            peer,
            myself=self._myself,
            transport=self._transport,
            listener=self,
            connect_timeout_s=self._connect_timeout_s,
            predecessor=link,
        )
        return link

    # From the fetcher: OwnerLink and TransferSink.

    def send(self, peer: WorkerId, message: ReaderMessage) -> None:
        link = self._links.get(peer)
        if link is not None:
            link.send(message)

    def transfer_finished(self, result: TransferResult) -> None:
        del self._expected[result.request_id]
        if result.first_token is None:
            self._outcome.not_arrived(
                result.request_id, "the prefill worker sent no first token", ()
            )
            return
        timeline = copy.deepcopy(result.first_token.timeline) or Timeline()
        timeline.record(LifecycleEvent.TRANSFER_STARTED, self._wall_time(result.started_at_s))
        timeline.record(LifecycleEvent.TRANSFER_ENDED, self._wall_time(result.ended_at_s))
        timeline.transfer = result.stats
        first = dataclasses.replace(result.first_token, timeline=timeline)
        self._outcome.arrived(result.request_id, first)

    def transfer_failed(self, failure: TransferFailure) -> None:
        request = self._expected.pop(failure.request_id, None)
        peer = request.prefill_peer if request is not None else None
        message = _failed(peer, failure.error) if peer is not None else str(failure.error)
        self._outcome.not_arrived(failure.request_id, message, failure.unsettled)

    def blocks_settled(self, block_ids: list[BlockId]) -> None:
        self._outcome.settled(block_ids)

    # From the links.

    def on_message(self, peer: WorkerId, message: OwnerMessage) -> None:
        self._fetcher.receive(peer, message)

    def on_broken(self, peer: PeerRef) -> None:
        self._fetcher.link_lost(peer.worker_id, peer.epoch)

    def on_restored(self, peer: PeerRef) -> None:
        self._fetcher.link_restored(peer.worker_id, peer.epoch)

    def on_gone(self, peer: PeerRef, error: TransferError) -> None:
        self._fetcher.peer_gone(peer.worker_id, peer.epoch, str(error))

    def _wall_time(self, at_s: float) -> float:
        """A time of our monotonic clock as Unix time."""
        return self._wall_clock.now() - (self._clock.now() - at_s)


def _failed(peer: PeerRef, error: BaseException) -> str:
    return f"KV transfer from prefill worker {peer.worker_id} failed: {error}"
