"""Fetcher: prefixes of peers' caches, takeovers of running requests, and what both count."""

from __future__ import annotations

import pytest

from baton.core.block import BlockId
from baton.core.errors import LeaseLost, PeerGone, TransferError, TransferTimeout
from baton.core.request import RequestId
from baton.core.worker_info import Epoch, WorkerId
from fetch_harness import EPOCH, LAYOUT, LEASE, PEER, Harness, R, hashes
from kvtransfer.fetch_state import FetchCounters, FetchKind
from kvtransfer.messages import Complete, FetchPrefix, Freeze, GiveUp, Refused, Renew, Takeover


@pytest.fixture
async def h():
    harness = Harness()
    await harness.connect()
    yield harness
    await harness.finish()


async def test_prefix_is_read_validated_and_counted(h):
    h.fetch_prefix(4)
    assert h.recorder.take_sent() == [FetchPrefix(R, hashes(4))]
    h.clock.advance(1.0)
    h.chunk(0, 4, last=True)
    await h.settle()
    assert h.reads == [((100, 101, 102, 103), (0, 1, 2, 3))]
    h.clock.advance(0.5)
    await h.land()
    assert h.recorder.take_sent() == [Complete(LEASE, EPOCH)]
    h.clock.advance(0.25)
    h.complete()
    (result,) = h.recorder.results
    assert (result.kind, result.num_blocks, result.pause_s) == (FetchKind.PREFIX, 4, 0.0)
    # Nothing computes meanwhile: all of a prefix's read is exposed.
    assert result.stats.seconds == result.stats.exposed_seconds == pytest.approx(0.5)
    num_bytes = 4 * LAYOUT.block_bytes
    counted = FetchCounters(reads=1, read_bytes=num_bytes, fetched_blocks=4)
    assert h.fetcher.counters == counted


async def test_prefix_of_fewer_blocks_than_asked_is_a_result(h):
    h.fetch_prefix(4)
    h.chunk(0, 2, last=True)
    await h.land()
    h.complete()
    (result,) = h.recorder.results
    assert result.num_blocks == 2 and result.stats.num_blocks == 2


async def test_prefix_of_more_blocks_than_asked_is_refused_before_reading(h):
    h.fetch_prefix(2)
    h.chunk(0, 3, last=True)
    await h.settle()
    assert type(h.failure.error) is TransferError and not h.reads
    assert "announced 3 blocks, 2 are expected" in str(h.failure.error)
    assert isinstance(h.recorder.take_sent()[-1], GiveUp)


async def test_prefix_that_is_not_cached_fails_readably(h):
    h.fetch_prefix(2)
    h.fetcher.receive(PEER, Refused(R, "none of these blocks is cached here"))
    assert isinstance(h.failure.error, LeaseLost) and h.failure.kind is FetchKind.PREFIX
    assert h.fetcher.counters == FetchCounters()


async def test_prefix_is_asked_for_again_on_a_new_stream(h):
    h.fetch_prefix(2)
    h.fetcher.link_lost(PEER, EPOCH)
    h.recorder.take_sent()
    h.fetcher.link_restored(PEER, EPOCH)
    assert h.recorder.take_sent() == [FetchPrefix(R, hashes(2))]
    h.fetcher.cancel(R, "test")


async def test_fetches_from_peers_that_are_not_connected_are_refused_at_once(h):
    stranger = WorkerId("prefill-9")
    with pytest.raises(PeerGone, match="not connected"):
        h.fetcher.expect(R, peer=stranger, epoch=EPOCH, timeout_s=1.0)
    with pytest.raises(PeerGone, match="not connected"):
        h.fetcher.fetch_prefix(
            R,
            peer=stranger,
            epoch=EPOCH,
            block_hashes=hashes(1),
            local=[BlockId(0)],
            timeout_s=1.0,
        )
    assert h.fetcher.is_empty


@pytest.mark.parametrize(("num_hashes", "num_local"), [(0, 0), (2, 1), (1, 2)])
async def test_prefix_needs_a_block_for_every_hash(h, num_hashes, num_local):
    with pytest.raises(ValueError, match="hashes"):
        h.fetcher.fetch_prefix(
            R,
            peer=PEER,
            epoch=EPOCH,
            block_hashes=hashes(num_hashes),
            local=[BlockId(i) for i in range(num_local)],
            timeout_s=1.0,
        )


async def test_takeover_reads_what_is_finished_then_freezes_and_reads_the_rest(h):
    h.take_over(6)
    assert h.recorder.take_sent() == [Takeover(R, 9)]
    h.chunk(0, 3)
    await h.settle()
    assert h.reads == [((100, 101, 102), (0, 1, 2))]
    h.clock.advance(2.0)
    await h.land()
    assert h.recorder.take_sent() == [Freeze(R)]
    # Finished before the owner had read Freeze: read as well, and not frozen twice.
    h.chunk(3, 1)
    h.clock.advance(0.25)
    await h.land()
    assert h.recorder.take_sent() == []
    h.clock.advance(0.25)
    h.chunk(4, 1, last=True)
    h.clock.advance(0.5)
    await h.land()
    assert h.recorder.take_sent() == [Complete(LEASE, EPOCH)]
    h.clock.advance(0.125)
    h.complete()
    (result,) = h.recorder.results
    assert (result.kind, result.num_blocks) == (FetchKind.TAKEOVER, 5)
    assert result.stats.seconds == pytest.approx(2.75)
    assert result.stats.exposed_seconds == pytest.approx(0.5)
    assert result.pause_s == pytest.approx(1.125)
    assert h.fetcher.counters.takeovers == 1
    assert h.fetcher.counters.takeover_pause_seconds == pytest.approx(1.125)


async def test_takeover_waits_with_freeze_for_its_own_blocks_and_for_the_first_chunk(h):
    h.take_over(0)
    h.chunk(0, 2)
    await h.settle()
    assert h.recorder.take_sent() == [Takeover(R, 9)]
    h.reserve(4, cached=2)
    assert h.recorder.take_sent() == [Freeze(R)]
    h.fetcher.cancel(R, "test")
    h.recorder.take_sent()
    h.take_over(4)
    assert h.recorder.take_sent() == [Takeover(R, 9)]
    h.fetcher.cancel(R, "test")


async def test_takeover_of_a_request_that_outgrew_its_room_is_given_up(h):
    h.take_over(3)
    h.chunk(0, 2)
    await h.land()
    h.chunk(2, 2, last=True)
    assert "has grown to 4 blocks, 3 are reserved" in str(h.failure.error)
    assert isinstance(h.recorder.take_sent()[-1], GiveUp)
    assert h.fetcher.counters.failed_takeovers == 1


async def test_takeover_that_fits_to_the_last_block_succeeds(h):
    h.take_over(3, cached=3)
    h.chunk(0, 2)
    h.chunk(2, 1, last=True)
    h.complete()
    (result,) = h.recorder.results
    assert result.num_blocks == 3 and result.stats.num_reads == 0
    assert result.stats.exposed_seconds == 0.0


@pytest.mark.parametrize("was_frozen", [False, True])
async def test_freeze_is_repeated_on_a_new_stream_when_it_may_be_lost(h, was_frozen):
    h.take_over(4)
    h.chunk(0, 2)
    await h.land()
    h.clock.advance(1.0)
    h.fetcher.link_lost(PEER, EPOCH)
    h.recorder.take_sent()
    h.fetcher.link_restored(PEER, EPOCH)
    assert h.recorder.take_sent() == [Takeover(R, 9)]
    h.chunk(0, 3 if was_frozen else 2, last=was_frozen)
    if was_frozen:
        await h.land()
        assert h.recorder.take_sent() == [Complete(LEASE, EPOCH)]
    else:
        assert h.recorder.take_sent() == [Freeze(R)]
        h.chunk(2, 1, last=True)
        await h.land()
    h.clock.advance(1.0)
    h.complete()
    # The pause is counted from the first Freeze: the client may have waited since then.
    assert h.recorder.results[0].pause_s == pytest.approx(2.0)


async def test_takeover_keeps_its_lease_alive(h):
    h.take_over(4)
    h.chunk(0, 1)
    await h.land()
    h.recorder.take_sent()
    for _ in range(3):
        h.clock.advance(10.0)
        h.fetcher.tick()
    assert h.recorder.take_sent() == [Renew(LEASE)] * 3
    h.fetcher.cancel(R, "test")


async def test_blocks_after_the_last_chunk_are_refused(h):
    h.take_over(8)
    h.chunk(0, 1)
    h.chunk(1, 1, last=True)
    h.chunk(2, 1)
    await h.settle()
    assert "after the last chunk" in str(h.failure.error)


@pytest.mark.parametrize("kind", [FetchKind.PREFIX, FetchKind.TAKEOVER])
@pytest.mark.parametrize("end", ["timeout", "restart", "epoch", "lease", "not valid"])
async def test_every_kind_fails_cleanly(h, kind, end):
    start = h.fetch_prefix if kind is FetchKind.PREFIX else h.take_over
    start(4, timeout_s=5.0)
    if end == "timeout":
        h.clock.advance(5.0)
        h.fetcher.tick()
        assert isinstance(h.failure.error, TransferTimeout)
    elif end == "restart":
        h.fetcher.link_restored(PEER, Epoch("p2"))
        assert isinstance(h.failure.error, PeerGone)
    elif end == "epoch":
        h.chunk(0, 2, last=True, epoch=Epoch("p2"))
        assert isinstance(h.failure.error, LeaseLost)
    elif end == "lease":
        h.chunk(0, 1)
        h.chunk(0, 2, last=True, lease_id="another")
        await h.settle()
        assert isinstance(h.failure.error, LeaseLost)
    else:
        h.chunk(0, 2, last=True)
        await h.land()
        h.complete(valid=False)
        assert isinstance(h.failure.error, LeaseLost)
    assert h.failure.kind is kind
    assert h.fetcher.counters.failed_takeovers == (kind is FetchKind.TAKEOVER)
    assert h.fetcher.counters.fetched_blocks == 0


async def test_block_ids_outside_the_owners_pool_fail_that_fetch_alone(h):
    h.expect(1)
    other = RequestId("other")
    h.fetcher.expect(other, peer=PEER, epoch=EPOCH, timeout_s=60.0)
    h.chunk(0, 1, last=True, block_ids=(BlockId(100_000),))
    await h.settle()
    assert "block id 100000 is outside prefill-0's pool" in str(h.failure.error)
    assert h.failure.unsettled == () and h.fetcher.counters.failed_reads == 1
    assert h.fetcher.num_fetches == 1
    h.fetcher.cancel(other, "test")


async def test_failed_reads_are_counted_once_each(h):
    h.expect(2)
    h.chunk(0, 2)
    await h.settle()
    h.transport.expire(h.transport.open_reads[0])
    await h.settle()
    assert h.fetcher.counters == FetchCounters(failed_reads=1)
