"""Fetches between pools of unequal block sizes: every token's bytes arrive, and no others."""

from __future__ import annotations

import numpy as np
import pytest

from baton.core.block import BlockId
from baton.core.errors import IncompatiblePeer, TransferError
from baton.core.kv_layout import KvLayout
from fetch_harness import NUM_BLOCKS, Harness, R
from kvtransfer.fetch_machine import contracted, expanded
from kvtransfer.fetch_state import FetchKind
from kvtransfer.messages import Freeze
from kvtransfer.transport import PoolRegion

UNTOUCHED = -1.0
PAIRS = [(4, 4), (4, 8), (8, 4), (4, 16), (16, 4)]
"""Block sizes of owner and reader."""


def layout(block_size: int) -> KvLayout:
    return KvLayout("m", 2, 2, 3, block_size, "float32")


class MemoryHarness(Harness):
    """Both pools have memory; the owner's holds the token index in every value of a token."""

    def __init__(self, owner_block_size: int, reader_block_size: int) -> None:
        self.sizes = owner_block_size, reader_block_size
        self.owner_pool, owner_region = self.pool(owner_block_size)
        self.reader_pool, reader_region = self.pool(reader_block_size)
        super().__init__(owner_region=owner_region, reader_region=reader_region)

    @staticmethod
    def pool(block_size: int) -> tuple[np.ndarray, PoolRegion]:
        shape = layout(block_size).pool_shape(NUM_BLOCKS)
        array = np.full(shape, UNTOUCHED, dtype=np.float32)
        region = PoolRegion(array.ctypes.data, array.nbytes, NUM_BLOCKS, layout(block_size))
        return array, region

    @property
    def unit_tokens(self) -> int:
        return min(self.sizes)

    def num_owner_blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self.sizes[0])

    def num_reader_blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self.sizes[1])

    def compute(self, num_tokens: int) -> None:
        """The owner's blocks from 100 on hold a sequence."""
        size = self.sizes[0]
        for token in range(num_tokens):
            self.owner_pool[100 + token // size, :, :, :, token % size] = token

    def check_arrived(self, num_tokens: int, *, first: int = 0) -> None:
        """Tokens from `first` on are here, and nothing outside of their units was written."""
        size = self.sizes[1]
        unit = self.unit_tokens
        end = -(-num_tokens // unit) * unit
        for token in range(first, num_tokens):
            assert (self.reader_pool[token // size, :, :, :, token % size] == token).all(), token
        tokens = self.reader_pool.transpose(0, 4, 1, 2, 3, 5).reshape(NUM_BLOCKS * size, -1)
        assert (tokens[:first] == UNTOUCHED).all() and (tokens[end:] == UNTOUCHED).all()


@pytest.fixture(params=PAIRS, ids=lambda pair: f"{pair[0]}to{pair[1]}")
async def h(request):
    harness = MemoryHarness(*request.param)
    await harness.connect()
    yield harness
    await harness.finish()


@pytest.mark.parametrize("num_tokens", [1, 3, 4, 5, 8, 15, 16, 17, 31, 33])
async def test_prompts_of_every_length_arrive_whole(h, num_tokens):
    h.compute(num_tokens)
    num_remote, num_local = h.num_owner_blocks(num_tokens), h.num_reader_blocks(num_tokens)
    h.expect(num_local)
    for block in range(num_remote):
        h.chunk(block, 1, last=block == num_remote - 1)
        await h.settle()
        if h.transport.open_reads:
            await h.land()
    while h.transport.open_reads:
        await h.land()
    h.complete()
    (result,) = h.recorder.results
    assert result.num_blocks == result.stats.num_blocks == num_local
    h.check_arrived(num_tokens)


@pytest.mark.parametrize("cached", [1, 2])
async def test_cached_blocks_are_not_read_again(h, cached):
    num_tokens = 37
    h.compute(num_tokens)
    h.expect(h.num_reader_blocks(num_tokens), cached=cached)
    h.chunk(0, h.num_owner_blocks(num_tokens), last=True)
    await h.land()
    h.complete()
    h.check_arrived(num_tokens, first=cached * h.sizes[1])


async def test_takeover_with_slack_reads_what_there_is(h):
    num_tokens = 21
    h.compute(num_tokens)
    num_finished = num_tokens // h.sizes[0]
    h.take_over(h.num_reader_blocks(num_tokens) + 4)
    h.chunk(0, num_finished)
    await h.land()
    assert Freeze(R) in h.recorder.take_sent()
    h.chunk(num_finished, h.num_owner_blocks(num_tokens) - num_finished, last=True)
    await h.land()
    h.complete()
    (result,) = h.recorder.results
    # Unused units of the owner's last block come too: the reader has room, and needs no count.
    arrived = h.num_owner_blocks(num_tokens) * h.sizes[0]
    assert result.num_blocks == h.num_reader_blocks(arrived)
    size = h.sizes[1]
    for token in range(num_tokens):
        assert (h.reader_pool[token // size, :, :, :, token % size] == token).all()


@pytest.mark.parametrize("difference", [-1, 1])
async def test_prompts_that_differ_by_a_larger_block_are_refused(h, difference):
    larger = max(h.sizes)
    h.expect(h.num_reader_blocks(2 * larger))
    h.chunk(0, h.num_owner_blocks((2 + difference) * larger), last=True)
    await h.settle()
    assert type(h.failure.error) is TransferError and h.failure.unsettled == ()
    assert not h.transport.open_reads


async def test_given_up_read_withholds_whole_blocks_until_all_of_it_is_safe(h):
    num_tokens = 32
    h.expect(h.num_reader_blocks(num_tokens))
    h.chunk(0, h.num_owner_blocks(num_tokens), last=True)
    await h.settle()
    (read,) = h.transport.open_reads
    h.transport.expire(read)
    await h.settle()
    blocks = {BlockId(i) for i in range(h.num_reader_blocks(num_tokens))}
    assert set(h.failure.unsettled) == h.recorder.withheld == blocks
    assert len(h.failure.unsettled) == len(blocks) == h.fetcher.num_quarantined
    h.transport.finish(read)
    h.fetcher.tick()
    assert h.recorder.withheld == set()


async def test_prefixes_need_equal_block_sizes(h):
    if h.sizes[0] == h.sizes[1]:
        h.compute(8)
        h.fetch_prefix(4)
        h.chunk(0, 2, last=True)
        await h.land()
        h.complete()
        (result,) = h.recorder.results
        assert (result.kind, result.num_blocks) == (FetchKind.PREFIX, 2)
        h.check_arrived(8)
    else:
        with pytest.raises(IncompatiblePeer, match="give both workers one block_size"):
            h.fetch_prefix(4)


@pytest.mark.parametrize("units_per_block", [1, 2, 4])
def test_blocks_and_units_are_each_others_inverse(units_per_block):
    blocks = tuple(BlockId(i) for i in (3, 0, 7))
    units = expanded(blocks, units_per_block)
    assert len(set(units)) == len(units) == 3 * units_per_block
    assert contracted(units, units_per_block) == blocks
    assert contracted(units[-1:], units_per_block) == blocks[-1:]
