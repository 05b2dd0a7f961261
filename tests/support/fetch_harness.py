"""A Fetcher over a fake transport whose reads wait to be finished by hand."""

from __future__ import annotations

import asyncio
import dataclasses
from typing import Any

from baton.core.block import BlockHash, BlockId
from baton.core.clock import ManualClock
from baton.core.kv_layout import KvLayout
from baton.core.request import RequestId, TokenDelta
from baton.core.worker_info import Epoch, WorkerId
from kvtransfer.fake_transport import FakeFabric
from kvtransfer.fetch_state import FetchKind, FetchLimits, TransferFailure, TransferResult
from kvtransfer.fetcher import Fetcher
from kvtransfer.messages import ChunkReady, Completed, LeaseId, ReaderMessage
from kvtransfer.transport import PoolRegion

PEER = WorkerId("prefill-0")
EPOCH = Epoch("p1")
R = RequestId("r")
LEASE = LeaseId("lease")
FIRST = TokenDelta(R, token_ids=[7])
LAYOUT = KvLayout("m", 1, 1, 8, 4, "float32")
NUM_BLOCKS = 256
NONCE = bytes(range(16))


def hashes(count: int) -> tuple[BlockHash, ...]:
    return tuple(BlockHash(bytes([i]) * 16) for i in range(count))


class Recorder:
    """Sink and owner link; keeps the account of withheld blocks that an engine would keep."""

    def __init__(self) -> None:
        self.sent: list[ReaderMessage] = []
        self.results: list[TransferResult] = []
        self.failures: list[TransferFailure] = []
        self.withheld: set[BlockId] = set()

    def send(self, peer: WorkerId, message: ReaderMessage) -> None:
        assert peer == PEER
        self.sent.append(message)

    def transfer_finished(self, result: TransferResult) -> None:
        self.results.append(result)

    def transfer_failed(self, failure: TransferFailure) -> None:
        self.failures.append(failure)
        assert not self.withheld & set(failure.unsettled)
        self.withheld.update(failure.unsettled)

    def blocks_settled(self, block_ids: list[BlockId]) -> None:
        assert set(block_ids) <= self.withheld, "settled before it was declared unsettled"
        self.withheld.difference_update(block_ids)

    def take_sent(self) -> list[ReaderMessage]:
        sent, self.sent = self.sent, []
        return sent


def region(layout: KvLayout, *, address: int = 0) -> PoolRegion:
    return PoolRegion(address, NUM_BLOCKS * layout.block_bytes, NUM_BLOCKS, layout)


class Harness:
    """One reader and one owner that says what the test says."""

    def __init__(
        self, *, owner_region: PoolRegion | None = None, reader_region: PoolRegion | None = None
    ) -> None:
        self.fabric = FakeFabric()
        self.owner = self.fabric.transport(PEER, EPOCH, owner_region or region(LAYOUT))
        self.transport = self.fabric.transport("decode-0", "d1", reader_region or region(LAYOUT))
        self.transport.is_held = True
        self.clock = ManualClock(10.0)
        self.recorder = Recorder()
        self.fetcher = Fetcher(
            transport=self.transport,
            link=self.recorder,
            sink=self.recorder,
            clock=self.clock,
            limits=FetchLimits(read_timeout_s=30.0, link_grace_s=2.0, tick_s=0.001),
        )

    async def connect(self) -> None:
        card = self.owner.card(NONCE)
        assert await self.transport.connect(card, nonce=NONCE) == (PEER, EPOCH)

    def expect(self, num_blocks: int = 4, *, cached: int = 0, timeout_s: float = 60.0) -> None:
        self.watch(timeout_s=timeout_s)
        self.reserve(num_blocks, cached=cached)

    def watch(self, *, timeout_s: float = 60.0) -> None:
        self.fetcher.expect(R, peer=PEER, epoch=EPOCH, timeout_s=timeout_s)

    def take_over(self, num_blocks: int = 4, *, cached: int = 0, timeout_s: float = 60.0) -> None:
        self.fetcher.expect(
            R,
            peer=PEER,
            epoch=EPOCH,
            timeout_s=timeout_s,
            kind=FetchKind.TAKEOVER,
            num_known_tokens=9,
        )
        if num_blocks:
            self.reserve(num_blocks, cached=cached)

    def fetch_prefix(self, num_blocks: int = 4, *, timeout_s: float = 60.0) -> None:
        self.fetcher.fetch_prefix(
            R,
            peer=PEER,
            epoch=EPOCH,
            block_hashes=hashes(num_blocks),
            local=[BlockId(i) for i in range(num_blocks)],
            timeout_s=timeout_s,
        )

    def reserve(self, num_blocks: int, *, cached: int = 0) -> None:
        local = [BlockId(i) for i in range(num_blocks)]
        self.fetcher.reserved(R, local, num_cached_blocks=cached)

    def chunk(self, first: int, count: int, *, last: bool = False, **changes: Any) -> None:
        message = ChunkReady(
            request_id=R,
            lease_id=LEASE,
            epoch=EPOCH,
            lease_s=30.0,
            first_block_index=first,
            block_ids=tuple(BlockId(100 + first + i) for i in range(count)),
            is_last=last,
            first_token=FIRST if last else None,
        )
        self.fetcher.receive(PEER, dataclasses.replace(message, **changes))

    async def settle(self) -> None:
        """Let every task run until it waits."""
        for _ in range(10):
            await asyncio.sleep(0)

    async def land(self) -> None:
        """The oldest read lands."""
        await self.settle()
        self.transport.finish(self.transport.open_reads[0])
        await self.settle()

    def complete(self, *, valid: bool = True) -> None:
        self.fetcher.receive(PEER, Completed(LEASE, valid))

    @property
    def reads(self) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
        return [(r.remote, r.local) for r in self.transport.open_reads]

    @property
    def failure(self) -> TransferFailure:
        (failure,) = self.recorder.failures
        assert not self.recorder.results
        return failure

    async def finish(self) -> None:
        """Whatever happened: land what is open, and nothing may be left."""
        await self.settle()
        for read in list(self.transport.open_reads):
            self.transport.finish(read)
        await self.settle()
        self.fetcher.tick()
        self.fetcher.check_integrity()
        assert self.fetcher.is_empty and not self.recorder.withheld
        await self.fetcher.close()
