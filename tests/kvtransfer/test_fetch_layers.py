"""Fetches that follow a prompt layer by layer while its last chunk is computed."""

from __future__ import annotations

import random

import numpy as np
import pytest

from baton.core.block import BlockId
from baton.core.kv_layout import KvLayout
from fetch_harness import FIRST, NUM_BLOCKS, PEER, Harness, R
from kvtransfer.messages import Complete, GiveUp, LayersRead, LayersReady, Watch
from kvtransfer.transport import PoolRegion

LAYERS = 4
UNTOUCHED = -1.0
FILL = 7


def layout(block_size: int) -> KvLayout:
    return KvLayout("m", LAYERS, 2, 3, block_size, "float32")


def make_pool(block_size: int) -> tuple[np.ndarray, PoolRegion]:
    shape = layout(block_size).pool_shape(NUM_BLOCKS)
    array = np.full(shape, UNTOUCHED, dtype=np.float32)
    return array, PoolRegion(array.ctypes.data, array.nbytes, NUM_BLOCKS, layout(block_size))


class LayerHarness(Harness):
    """Both pools have memory; the owner writes a layer of a block when the test says so."""

    def __init__(self, owner_block_size: int = 4, reader_block_size: int = 4) -> None:
        self.owner_pool, owner_region = make_pool(owner_block_size)
        self.reader_pool, reader_region = make_pool(reader_block_size)
        super().__init__(owner_region=owner_region, reader_region=reader_region)

    def compute(self, blocks: range, layers: range, *, value: float = 0.0) -> None:
        """Block i of the sequence is block 100 + i of the owner."""
        for block in blocks:
            for layer in layers:
                self.owner_pool[100 + block, :, layer] = value or 10 * block + layer

    def told(
        self, first: int, count: int, num_layers: int, *, fill_id: int = FILL, base: int = 100
    ) -> None:
        ids = tuple(BlockId(base + first + i) for i in range(count))
        self.fetcher.receive(PEER, LayersReady(R, fill_id, first, ids, num_layers))

    async def land_all(self) -> None:
        await self.settle()
        while self.transport.open_reads:
            await self.land()

    @property
    def layers(self) -> list[range | None]:
        return [read.layers for read in self.transport.open_reads]

    def check_arrived(self, num_blocks: int) -> None:
        """Of pools with equal blocks."""
        for block in range(num_blocks):
            for layer in range(LAYERS):
                assert (self.reader_pool[block, :, layer] == 10 * block + layer).all()
        assert (self.reader_pool[num_blocks:] == UNTOUCHED).all()


@pytest.fixture
async def h():
    harness = LayerHarness()
    await harness.connect()
    yield harness
    await harness.finish()


async def test_only_the_last_layers_are_left_when_the_chunk_is_announced(h):
    h.compute(range(4), range(LAYERS))
    h.owner_pool[102:104, :, 2:] = UNTOUCHED
    h.expect(4)
    h.chunk(0, 2)
    await h.land()
    h.told(2, 2, 2)
    await h.settle()
    assert h.layers == [range(0, 2)] and h.reads == [((102, 103), (2, 3))]
    await h.land()
    h.compute(range(2, 4), range(2, LAYERS))
    h.chunk(2, 2, last=True, fill_id=FILL)
    await h.settle()
    assert h.layers == [range(2, 4)]
    await h.land()
    assert isinstance(h.recorder.take_sent()[-1], Complete)
    h.complete()
    (result,) = h.recorder.results
    assert result.num_blocks == result.stats.num_blocks == 4
    assert result.stats.num_bytes == 4 * layout(4).block_bytes
    assert result.first_token is FIRST
    h.check_arrived(4)


async def test_a_reader_with_all_layers_says_so_and_needs_no_read_at_the_end(h):
    h.compute(range(3), range(LAYERS))
    h.expect(3)
    h.told(0, 3, 2)
    await h.settle()
    h.told(0, 3, 3)
    h.told(0, 3, 4)
    await h.land()
    # What came meanwhile is one read.
    assert h.layers == [range(2, 4)]
    await h.land()
    assert h.recorder.take_sent() == [Watch(R), LayersRead(R, FILL)]
    h.told(0, 3, 4)
    h.chunk(0, 3, last=True, fill_id=FILL)
    await h.settle()
    assert not h.transport.open_reads
    h.complete()
    (result,) = h.recorder.results
    assert result.stats.exposed_seconds == 0.0
    assert result.stats.num_blocks == 3
    h.check_arrived(3)


async def test_an_answer_that_comes_before_all_is_read_ends_nothing(h):
    """The owner has heard of all layers from somebody else; ours are on their way."""
    h.compute(range(3), range(LAYERS))
    h.expect(3)
    h.told(0, 3, 2)
    await h.settle()
    h.chunk(0, 3, last=True, fill_id=FILL)
    h.complete()
    await h.land()
    assert h.layers == [range(2, 4)]
    h.complete()
    assert not h.recorder.results
    await h.land()
    assert isinstance(h.recorder.take_sent()[-1], Complete)
    h.complete()
    assert len(h.recorder.results) == 1
    h.check_arrived(3)


async def test_layers_wait_for_our_blocks_and_for_whole_ones(h):
    h.compute(range(4), range(LAYERS))
    h.watch()
    h.told(0, 4, 1)
    h.reserve(4)
    await h.land()
    h.chunk(0, 2)
    h.told(2, 2, 2)
    await h.settle()
    # The chunk did not confirm what had been told: its blocks come whole, then the next are told.
    assert h.layers == [None]
    await h.land()
    assert h.layers == [range(0, 2)]
    await h.land()
    h.chunk(2, 2, last=True, fill_id=FILL)
    await h.land()
    h.complete()
    h.check_arrived(4)


@pytest.mark.parametrize(
    "changes",
    [{"fill_id": FILL + 1}, {"fill_id": 0}, {"block_ids": (BlockId(101), BlockId(100))}],
    ids=["another computation", "none", "other blocks"],
)
async def test_what_the_last_chunk_does_not_confirm_is_read_again(h, changes):
    """The owner let go of the blocks and filled them anew."""
    h.compute(range(2), range(LAYERS), value=-5.0)
    h.expect(2)
    h.told(0, 2, LAYERS)
    await h.land()
    h.compute(range(2), range(LAYERS))
    swapped = "block_ids" in changes
    if swapped:
        h.owner_pool[[100, 101]] = h.owner_pool[[101, 100]]
    h.chunk(0, 2, last=True, **({"fill_id": FILL} | changes))
    await h.settle()
    assert h.layers == [None]
    await h.land()
    h.complete()
    h.check_arrived(2)


async def test_a_second_computation_replaces_the_first(h):
    h.compute(range(2), range(LAYERS), value=-5.0)
    h.expect(2)
    h.told(0, 2, 3)
    await h.settle()
    h.told(0, 2, 2, fill_id=FILL + 1)
    h.compute(range(2), range(LAYERS))
    await h.land()
    assert h.layers == [range(0, 2)]
    await h.land()
    h.chunk(0, 2, last=True, fill_id=FILL + 1)
    await h.land()
    h.complete()
    h.check_arrived(2)


@pytest.mark.parametrize(
    ("first", "num_layers"), [(1, 2), (0, 0), (0, LAYERS + 1)], ids=["gap", "none", "too many"]
)
async def test_hints_that_do_not_fit_are_of_no_consequence(h, first, num_layers):
    h.compute(range(2), range(LAYERS))
    h.expect(2)
    h.told(first, 2 - first, num_layers)
    await h.settle()
    assert not h.transport.open_reads
    h.chunk(0, 2, last=True, fill_id=FILL)
    h.told(0, 2, 2)
    await h.land()
    h.complete()
    h.check_arrived(2)


async def test_a_hint_of_no_computation_vouches_for_nothing(h):
    """The last chunk's 0 says that nothing was told by layers."""
    h.compute(range(2), range(LAYERS), value=-5.0)
    h.expect(2)
    h.told(0, 2, LAYERS, fill_id=0)
    await h.settle()
    assert not h.transport.open_reads
    h.compute(range(2), range(LAYERS))
    h.chunk(0, 2, last=True)
    await h.land()
    h.complete()
    h.check_arrived(2)


@pytest.mark.parametrize("base", [NUM_BLOCKS, 2**32 - 2], ids=["just outside", "far outside"])
async def test_a_hint_of_blocks_that_are_not_there_ends_the_fetch_before_memory_is_touched(h, base):
    h.expect(2)
    h.told(0, 2, 2, base=base)
    await h.settle()
    assert f"outside {PEER}'s pool of {NUM_BLOCKS} blocks" in str(h.failure.error)
    assert not h.failure.unsettled
    assert isinstance(h.recorder.take_sent()[-1], GiveUp)
    h.check_arrived(0)


async def test_layers_of_a_request_that_nobody_fetches_are_dropped(h):
    h.told(0, 2, 2)
    await h.settle()
    assert not h.transport.open_reads and not h.recorder.sent


async def test_a_transport_that_reads_whole_blocks_alone_ignores_layers(h, monkeypatch):
    monkeypatch.setattr(h.transport, "num_layers", lambda peer: 0)
    h.compute(range(2), range(LAYERS))
    h.expect(2)
    h.told(0, 2, 2)
    await h.settle()
    assert not h.transport.open_reads
    h.chunk(0, 2, last=True, fill_id=FILL)
    await h.land()
    h.complete()
    h.check_arrived(2)


async def test_cancel_while_layers_are_read_withholds_their_blocks(h):
    h.expect(3, cached=1)
    h.told(0, 3, 2)
    await h.settle()
    h.fetcher.cancel(R, "test")
    assert h.failure.unsettled == (BlockId(1), BlockId(2))
    await h.settle()
    assert h.recorder.withheld == {1, 2}
    await h.land()
    h.fetcher.tick()
    assert not h.recorder.withheld


@pytest.mark.parametrize("sizes", [(4, 8), (8, 4), (4, 16), (16, 4)], ids=str)
@pytest.mark.parametrize("num_tokens", [3, 16, 21, 37])
async def test_blocks_of_unequal_sizes_are_followed_too(sizes, num_tokens):
    h = LayerHarness(*sizes)
    await h.connect()
    owner_size, reader_size = sizes
    for token in range(num_tokens):
        h.owner_pool[100 + token // owner_size, :, :, :, token % owner_size] = token
    num_remote, num_local = -(-num_tokens // owner_size), -(-num_tokens // reader_size)
    first = num_remote // 2
    h.expect(num_local)
    if first:
        h.chunk(0, first)
        await h.land_all()
    for num_layers in (2, 3):
        h.told(first, num_remote - first, num_layers)
        await h.land_all()
    h.chunk(first, num_remote - first, last=True, fill_id=FILL)
    await h.land_all()
    h.complete()
    assert h.recorder.results[0].stats.num_blocks == num_local
    for token in range(num_tokens):
        assert (h.reader_pool[token // reader_size, :, :, :, token % reader_size] == token).all()
    await h.finish()


@pytest.mark.parametrize("seed", range(30))
async def test_random_walks_end_with_what_the_confirmed_computation_wrote(seed):
    """Computations that come to nothing write the same blocks with other values before."""
    rng = random.Random(seed)
    h = LayerHarness()
    await h.connect()
    num_blocks, num_first = 6, rng.randrange(5)
    h.watch()
    is_reserved = False
    h.compute(range(num_first), range(LAYERS))
    is_announced = not num_first
    fills = rng.randrange(1, 4)
    for fill in range(1, fills + 1):
        is_real = fill == fills
        last = range(num_first, num_blocks)
        h.compute(last, range(LAYERS), value=-100.0)
        for layer in range(1, LAYERS + 1):
            h.compute(last, range(layer - 1, layer), value=0.0 if is_real else -fill)
            if not is_announced and rng.random() < 0.5:
                h.chunk(0, num_first)
                is_announced = True
            if rng.random() < 0.7:
                h.told(num_first, len(last), layer, fill_id=fill)
            if not is_reserved and rng.random() < 0.4:
                h.reserve(num_blocks)
                is_reserved = True
            await h.settle()
            h.fetcher.check_integrity()
            if h.transport.open_reads and rng.random() < 0.6:
                await h.land()
    if not is_announced:
        h.chunk(0, num_first)
    if not is_reserved:
        h.reserve(num_blocks)
    h.chunk(num_first, num_blocks - num_first, last=True, fill_id=fills)
    await h.land_all()
    h.fetcher.check_integrity()
    h.complete()
    h.check_arrived(num_blocks)
    await h.finish()
