"""Fetches KV from other workers: drives a `FetchMachine` per request over the transport.

    shell ── expect, reserved, fetch_prefix, cancel, receive, ... ──► Fetcher ── read ──► Transport
    shell ◄─ OwnerLink.send ────────────────────────────   │
    shell ◄─ TransferSink: finished | failed, then blocks_settled

Everything is called on one event loop. The sink is called synchronously and in order: a block is
named by `blocks_settled` only after the failure that declared it unsettled was handed over, so a
shell that forwards both through one queue cannot free a block before withholding it.

Not known here: gRPC, the engine, how a peer was connected (`Transport.connect` comes first).
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections.abc import Sequence
from dataclasses import dataclass

from baton.core.block import BlockHash, BlockId
from baton.core.clock import Clock
from baton.core.errors import IncompatiblePeer, PeerGone, TransferError, TransferTimeout
from baton.core.request import RequestId
from baton.core.worker_info import Epoch, WorkerId
from kvtransfer.fetch_machine import FetchMachine
from kvtransfer.fetch_state import (
    Expected,
    FetchCounters,
    FetchEffect,
    FetchKind,
    FetchLimits,
    FetchState,
    Finish,
    OwnerLink,
    StartRead,
    StopRead,
    ToOwner,
    TransferFailure,
    TransferResult,
    TransferSink,
)
from kvtransfer.messages import (
    ChunkReady,
    Completed,
    LayersReady,
    LeaseId,
    OwnerMessage,
    Refused,
)
from kvtransfer.quarantine import Quarantine
from kvtransfer.transport import Transport

__all__ = ["FetchCounters", "FetchKind", "FetchLimits", "Fetcher", "OwnerLink", "TransferSink"]

logger = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class _Fetch:
    machine: FetchMachine
    read: asyncio.Task[None] | None = None
    is_read_started: bool = False
    """False while the task of `read` has not run yet: the transport does not know of it."""


class Fetcher:
    """All fetches of one worker."""

    def __init__(
        self,
        *,
        transport: Transport,
        link: OwnerLink,
        sink: TransferSink,
        clock: Clock,
        limits: FetchLimits | None = None,
    ) -> None:
        self._transport = transport
        self._link = link
        self._sink = sink
        self._clock = clock
        self._limits = limits or FetchLimits()
        self._fetches: dict[RequestId, _Fetch] = {}
        self._quarantine = Quarantine()
        self._reads: set[asyncio.Task[None]] = set()
        self._ticker: asyncio.Task[None] | None = None
        self.counters = FetchCounters()

    @property
    def num_fetches(self) -> int:
        return len(self._fetches)

    @property
    def num_quarantined(self) -> int:
        """Blocks declared unsettled and not settled yet."""
        return len(self._quarantine)

    @property
    def is_empty(self) -> bool:
        """Nothing is fetched, in flight or withheld."""
        return not self._fetches and not self._reads and self._quarantine.is_empty

    def expect(
        self,
        request_id: RequestId,
        *,
        peer: WorkerId,
        epoch: Epoch,
        timeout_s: float,
        kind: FetchKind = FetchKind.PROMPT,
        num_known_tokens: int = 0,
    ) -> None:
        """Ask a connected peer for a prompt's KV, or for a request it generates (TAKEOVER).

        `reserved` follows, or `cancel`. Ends with exactly one call of the sink. Raises ValueError
        when the request is being fetched already, PeerGone when the peer is not connected.
        """
        self._start(
            Expected(
                request_id,
                peer,
                epoch,
                self._clock.now() + timeout_s,
                kind=kind,
                num_known_tokens=num_known_tokens,
                units_per_block=self._transport.units_per_block(peer),
                num_layers=self._transport.num_layers(peer),
            )
        )

    def fetch_prefix(
        self,
        fetch_id: RequestId,
        *,
        peer: WorkerId,
        epoch: Epoch,
        block_hashes: Sequence[BlockHash],
        local: Sequence[BlockId],
        timeout_s: float,
    ) -> None:
        """Read the leading blocks of a hash chain that the peer caches into `local`.

        `TransferResult.num_blocks` says how many of them came. `fetch_id` is no request's id here.
        Ends and raises as `expect` does, and raises IncompatiblePeer when the hashes of the two
        workers cannot be equal.
        """
        if len(block_hashes) != len(local) or not local:
            raise ValueError(f"{len(local)} blocks to read {len(block_hashes)} hashes into")
        units = self._transport.units_per_block(peer)
        if units.remote != units.local:
            raise IncompatiblePeer(
                f"no prefixes from {peer}: its blocks are {units.remote} units long, ours "
                f"{units.local}, so their hashes differ; give both workers one block_size"
            )
        deadline_s = self._clock.now() + timeout_s
        self._start(
            Expected(
                fetch_id,
                peer,
                epoch,
                deadline_s,
                kind=FetchKind.PREFIX,
                block_hashes=tuple(block_hashes),
                units_per_block=units,
            )
        )
        self.reserved(fetch_id, local, num_cached_blocks=0)

    def _start(self, expected: Expected) -> None:
        if expected.request_id in self._fetches:
            raise ValueError(f"request {expected.request_id} is being fetched already")
        fetch = _Fetch(FetchMachine(expected, self._limits.link_grace_s))
        self._fetches[expected.request_id] = fetch
        self._apply(fetch, fetch.machine.start())
        if self._ticker is None:
            self._ticker = asyncio.get_running_loop().create_task(self._tick_while_busy())

    def reserved(
        self, request_id: RequestId, local: Sequence[BlockId], *, num_cached_blocks: int
    ) -> None:
        """Read an expected request into the blocks `local`, by position.

        The first `num_cached_blocks` are valid already and not read. A fetch that has ended
        meanwhile has told the sink; nothing is read for it.
        """
        fetch = self._fetches.get(request_id)
        if fetch is not None:
            now_s = self._clock.now()
            self._apply(fetch, fetch.machine.reserved(tuple(local), num_cached_blocks, now_s))

    def receive(self, peer: WorkerId, message: OwnerMessage) -> None:
        """A message from the stream of `peer`. What belongs to no fetch (any more) is dropped."""
        now_s = self._clock.now()
        match message:
            case ChunkReady():
                fetch = self._find(peer, message.request_id)
                if fetch is not None:
                    self._apply(fetch, fetch.machine.chunk_ready(message, now_s))
            case LayersReady():
                fetch = self._find(peer, message.request_id)
                if fetch is not None:
                    self._apply(fetch, fetch.machine.layers_ready(message, now_s))
            case Refused(request_id, reason):
                fetch = self._find(peer, request_id)
                if fetch is not None:
                    self._apply(fetch, fetch.machine.refused(reason, now_s))
            case Completed(lease_id, valid):
                self._complete(peer, lease_id, valid, now_s)

    def link_lost(self, peer: WorkerId, epoch: Epoch) -> None:
        """The stream to `peer` broke; its fetches wait `link_grace_s` for `link_restored`."""
        for fetch in self._of(peer, epoch):
            self._apply(fetch, fetch.machine.link_lost(self._clock.now()))

    def link_restored(self, peer: WorkerId, epoch: Epoch) -> None:
        """A new stream to `peer`, which is the same process exactly if the epoch is the same."""
        for fetch in self._of(peer):
            now_s = self._clock.now()
            if fetch.machine.expected.epoch == epoch:
                self._apply(fetch, fetch.machine.link_restored(now_s))
            else:
                restarted = PeerGone(f"{peer} restarted: its KV is gone")
                self._apply(fetch, fetch.machine.peer_gone(restarted, now_s))

    def peer_gone(self, peer: WorkerId, epoch: Epoch, reason: str) -> None:
        """This epoch of the peer is known to be dead; no grace. A newer one is left alone."""
        for fetch in self._of(peer, epoch):
            error = PeerGone(f"{peer}: {reason}")
            self._apply(fetch, fetch.machine.peer_gone(error, self._clock.now()))

    def cancel(self, request_id: RequestId, reason: str) -> None:
        """End a fetch in any state; the sink hears of it before this returns."""
        fetch = self._fetches.get(request_id)
        if fetch is not None:
            self._apply(fetch, fetch.machine.cancel(reason, self._clock.now()))

    def tick(self) -> None:
        """Let time pass. Called by the fetcher itself while it is busy."""
        for fetch in list(self._fetches.values()):
            self._apply(fetch, fetch.machine.tick(self._clock.now()))
        freed = self._quarantine.settle(self._transport.settled())
        if freed:
            self._sink.blocks_settled(freed)

    async def close(self) -> None:
        """Fail everything that is open. The transport is closed by its owner afterwards."""
        for request_id in list(self._fetches):
            self.cancel(request_id, "the worker is stopping")
        if self._ticker is not None:
            self._ticker.cancel()
        await asyncio.gather(*self._reads, *filter(None, [self._ticker]), return_exceptions=True)
        self.tick()

    def check_integrity(self) -> None:
        """Raises AssertionError when machines, reads and quarantine disagree."""
        self._quarantine.check_integrity()
        for fetch in self._fetches.values():
            fetch.machine.check_integrity()
            assert fetch.machine.state is not FetchState.ENDED
            assert (fetch.read is not None) == (fetch.machine.state is FetchState.READING)

    def _apply(self, fetch: _Fetch, effects: list[FetchEffect]) -> None:
        expected = fetch.machine.expected
        for effect in effects:
            match effect:
                case ToOwner(message):
                    self._link.send(expected.peer, message)
                case StartRead():
                    task = asyncio.get_running_loop().create_task(self._read(fetch, effect))
                    fetch.read = task
                    fetch.is_read_started = False
                    self._reads.add(task)
                    task.add_done_callback(self._reads.discard)
                case StopRead():
                    assert fetch.read is not None
                    fetch.read.cancel()
                    self.counters.failed_reads += 1
                case Finish(TransferResult() as result):
                    self._succeed(result)
                case Finish(TransferFailure() as failure):
                    self._fail(fetch, failure)

    def _succeed(self, result: TransferResult) -> None:
        del self._fetches[result.request_id]
        if result.kind is FetchKind.PREFIX:
            self.counters.fetched_blocks += result.num_blocks
        if result.kind is FetchKind.TAKEOVER:
            self.counters.takeovers += 1
            self.counters.takeover_pause_seconds += result.pause_s
        self._sink.transfer_finished(result)

    def _fail(self, fetch: _Fetch, failure: TransferFailure) -> None:
        del self._fetches[failure.request_id]
        if failure.kind is FetchKind.TAKEOVER:
            self.counters.failed_takeovers += 1
        # Cancelled before its task ran, a read is unknown to the transport.
        was_never_started = fetch.read is not None and not fetch.is_read_started
        held = () if was_never_started else self._quarantine.hold(failure.unsettled)
        unsettled = tuple(held)
        logger.info(
            "transfer of %s failed: %s (%d blocks withheld)",
            failure.request_id,
            failure.error,
            len(unsettled),
        )
        self._sink.transfer_failed(dataclasses.replace(failure, unsettled=unsettled))

    async def _read(self, fetch: _Fetch, wanted: StartRead) -> None:
        expected = fetch.machine.expected
        left_s = expected.deadline_s - self._clock.now()
        fetch.is_read_started = True
        try:
            read = await self._transport.read(
                expected.peer,
                wanted.remote,
                wanted.local,
                timeout_s=max(0.001, min(self._limits.read_timeout_s, left_s)),
                layers=wanted.layers,
            )
        except TransferError as error:
            fetch.read = None
            self.counters.failed_reads += 1
            self._apply(fetch, fetch.machine.read_failed(error, self._clock.now()))
        except Exception:
            # A defect: nobody knows what was moved, so the blocks stay withheld.
            logger.exception("read for %s failed unexpectedly", expected.request_id)
            fetch.read = None
            self.counters.failed_reads += 1
            defect = TransferTimeout(f"internal error while reading from {expected.peer}")
            self._apply(fetch, fetch.machine.read_failed(defect, self._clock.now()))
        else:
            fetch.read = None
            self.counters.reads += 1
            self.counters.read_bytes += read.num_bytes
            self._apply(fetch, fetch.machine.read_done(read, self._clock.now()))

    def _complete(self, peer: WorkerId, lease_id: LeaseId, valid: bool, now_s: float) -> None:
        for fetch in self._of(peer):
            self._apply(fetch, fetch.machine.completed(lease_id, valid=valid, now_s=now_s))

    def _find(self, peer: WorkerId, request_id: RequestId) -> _Fetch | None:
        fetch = self._fetches.get(request_id)
        return fetch if fetch is not None and fetch.machine.expected.peer == peer else None

    def _of(self, peer: WorkerId, epoch: Epoch | None = None) -> list[_Fetch]:
        return [
            fetch
            for fetch in self._fetches.values()
            if fetch.machine.expected.peer == peer and epoch in (None, fetch.machine.expected.epoch)
        ]

    async def _tick_while_busy(self) -> None:
        while not self.is_empty:
            await asyncio.sleep(self._limits.tick_s)
            self.tick()
        self._ticker = None
