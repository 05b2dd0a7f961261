"""The reader's side: from a request whose KV is elsewhere to that KV in our blocks.

 1. expect     a DECODE or TAKEOVER request is here: connect to the worker that has its KV in the
               background; once the link is ready, `Fetcher` asks, so that the lease is kept while
               we wait for blocks
 2. reserved   the engine holds blocks: `Fetcher` reads
 3. finished   the owner vouched for the lease: the tokens that came with it go to the engine, with
               the transfer's time points and statistics in the time line
 x. drop, failure in any state: the reservation is given up; blocks a read may still write to go
    with it and come back by `settled`

Prefixes from peers' caches come the same way for `kv_import`, without a request: blocks first.

Not known here: sessions and routers (they are behind `TransferOutcome`), links (behind `Mesh`).
"""

from __future__ import annotations

import asyncio
import copy
import dataclasses
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Protocol

from baton.core.block import BlockHash, BlockId
from baton.core.clock import Clock
from baton.core.errors import TransferError
from baton.core.fabric import FabricCounters
from baton.core.lifecycle import LifecycleEvent, Timeline
from baton.core.request import GenerateRequest, PeerRef, RequestId, TokenDelta, Work
from baton.core.worker_info import WorkerId
from baton.engine.engine import Reservation
from kvtransfer.fetch_state import FetchKind, FetchLimits, TransferFailure, TransferResult
from kvtransfer.fetcher import Fetcher
from kvtransfer.messages import GiveUp, OwnerMessage
from kvtransfer.transport import Transport
from services.worker.kv_import import PrefixFetched
from services.worker.mesh import Mesh

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


@dataclass(frozen=True, slots=True, eq=False)
class _Prefix:
    peer: PeerRef
    done: asyncio.Future[PrefixFetched]


class TransferClient:
    """All KV on its way to this worker."""

    def __init__(
        self,
        *,
        mesh: Mesh,
        transport: Transport,
        outcome: TransferOutcome,
        clock: Clock,
        wall_clock: Clock,
        limits: FetchLimits,
    ) -> None:
        self._mesh = mesh
        self._outcome = outcome
        self._clock = clock
        self._wall_clock = wall_clock
        self._fetcher = Fetcher(
            transport=transport, link=mesh, sink=self, clock=clock, limits=limits
        )
        self._prefixes: dict[RequestId, _Prefix] = {}
        self._expected: dict[RequestId, GenerateRequest] = {}
        self._starting: dict[RequestId, asyncio.Task[None]] = {}
        """Expected requests whose link is not ready yet."""
        self._early: dict[RequestId, Reservation] = {}
        """Reservations that came before the link was ready."""

    @property
    def is_empty(self) -> bool:
        """Nothing is fetched and no block unsettled."""
        return not self._expected and not self._prefixes and self._fetcher.is_empty

    def count(self, counters: FabricCounters) -> None:
        """Write what was read since the start into `counters`."""
        for name, value in asdict(self._fetcher.counters).items():
            setattr(counters, name, value)

    async def close(self) -> None:
        """Give up everything that is open. The links end after this."""
        for request_id in list(self._expected):
            self.drop(request_id)
        for fetch_id in list(self._prefixes):
            self.drop_prefix(fetch_id)
        await self._fetcher.close()

    # From the requests.

    def expect(self, request: GenerateRequest) -> None:
        """A request that reads all its KV has arrived; ends in exactly one call of the outcome."""
        assert request.kv_source is not None
        self._expected[request.request_id] = request
        self._starting[request.request_id] = asyncio.create_task(
            self._start(request, request.kv_source)
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
        assert request.kv_source is not None
        self._mesh.send(request.kv_source.worker_id, GiveUp(request_id, reason))

    async def _start(self, request: GenerateRequest, peer: PeerRef) -> None:
        request_id = request.request_id
        try:
            await self._mesh.link_to(peer).ready()
            takes_over = request.work is Work.TAKEOVER
            self._fetcher.expect(
                request_id,
                peer=peer.worker_id,
                epoch=peer.epoch,
                timeout_s=request.deadline_s,
                kind=FetchKind.TAKEOVER if takes_over else FetchKind.PROMPT,
                num_known_tokens=len(request.output_token_ids) if takes_over else 0,
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

    # From the imports.

    async def connect(self, peer: PeerRef) -> None:
        """Waits for the link. Raises TransferError."""
        await self._mesh.link_to(peer).ready()

    def fetch_prefix(
        self,
        fetch_id: RequestId,
        peer: PeerRef,
        hashes: Sequence[BlockHash],
        block_ids: Sequence[BlockId],
        *,
        timeout_s: float,
    ) -> asyncio.Future[PrefixFetched]:
        """Read the leading blocks of `hashes` that a connected peer caches. Never raises."""
        done: asyncio.Future[PrefixFetched] = asyncio.get_running_loop().create_future()
        self._prefixes[fetch_id] = _Prefix(peer, done)
        try:
            self._fetcher.fetch_prefix(
                fetch_id,
                peer=peer.worker_id,
                epoch=peer.epoch,
                block_hashes=hashes,
                local=block_ids,
                timeout_s=timeout_s,
            )
        except (TransferError, ValueError) as error:
            self._prefix_ended(fetch_id, PrefixFetched(reason=str(error)))
        return done

    def drop_prefix(self, fetch_id: RequestId) -> None:
        """End a fetch now; its future has its result when this returns. Unknown: ignored."""
        if fetch_id in self._prefixes:
            self._fetcher.cancel(fetch_id, "nobody waits for it")

    def _prefix_ended(self, fetch_id: RequestId, fetched: PrefixFetched) -> None:
        done = self._prefixes.pop(fetch_id).done
        if not done.done():
            done.set_result(fetched)

    # From the fetcher: TransferSink.

    def transfer_finished(self, result: TransferResult) -> None:
        if result.kind is FetchKind.PREFIX:
            self._prefix_ended(result.request_id, PrefixFetched(result.num_blocks))
            return
        del self._expected[result.request_id]
        if result.first_token is None:
            self._outcome.not_arrived(result.request_id, "the owner of the KV sent no token", ())
            return
        timeline = copy.deepcopy(result.first_token.timeline) or Timeline()
        timeline.record(LifecycleEvent.TRANSFER_STARTED, self._wall_time(result.started_at_s))
        timeline.record(LifecycleEvent.TRANSFER_ENDED, self._wall_time(result.ended_at_s))
        timeline.transfer = result.stats
        first = dataclasses.replace(result.first_token, timeline=timeline)
        self._outcome.arrived(result.request_id, first)

    def transfer_failed(self, failure: TransferFailure) -> None:
        if failure.kind is FetchKind.PREFIX:
            fetched = PrefixFetched(unsettled=failure.unsettled, reason=str(failure.error))
            self._prefix_ended(failure.request_id, fetched)
            return
        request = self._expected.pop(failure.request_id, None)
        peer = request.kv_source if request is not None else None
        message = _failed(peer, failure.error) if peer is not None else str(failure.error)
        self._outcome.not_arrived(failure.request_id, message, failure.unsettled)

    def blocks_settled(self, block_ids: list[BlockId]) -> None:
        self._outcome.settled(block_ids)

    # From the links: MeshUser.

    def uses(self, peer: WorkerId) -> bool:
        sources = (request.kv_source for request in self._expected.values())
        return any(source is not None and source.worker_id == peer for source in sources) or any(
            prefix.peer.worker_id == peer for prefix in self._prefixes.values()
        )

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
    return f"KV transfer from worker {peer.worker_id} failed: {error}"
