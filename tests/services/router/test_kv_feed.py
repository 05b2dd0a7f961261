from __future__ import annotations

import asyncio

import grpc

from baton.core.block import BlockHash, join_hashes
from baton.rpc.v1 import worker_pb2 as pb
from services.router.kv_feed import KvFeed


def block(number):
    return BlockHash(number.to_bytes(16, "big"))


def stored(*numbers):
    return pb.KvEvent(stored=join_hashes([block(n) for n in numbers]))


class Known:
    """What an index would hold, and what a worker would answer."""

    def __init__(self):
        self.blocks = set()
        self.given_up = []
        self.answer = asyncio.get_running_loop().create_future()
        self.num_fetched = 0
        self.feed = KvFeed("w", self, fetch_snapshot=self.fetch, give_up=self.given_up.append)

    async def fetch(self):
        self.num_fetched += 1
        return await asyncio.shield(self.answer)

    def on_kv_event(self, removed, stored):
        self.blocks = (self.blocks - set(removed)) | set(stored)

    def on_snapshot(self, cached_hashes):
        self.blocks = set(cached_hashes)

    def numbers(self):
        return sorted(int.from_bytes(b, "big") for b in self.blocks)


async def settle():
    for _ in range(5):
        await asyncio.sleep(0)


async def test_events_follow_the_snapshot_and_known_ones_are_left_out():
    known = Known()
    known.feed.start(3)
    known.feed.push(3, [stored(3), stored(4)])
    known.feed.push(
        5, [pb.KvEvent(removed=join_hashes([block(4)]), stored=join_hashes([block(5)]))]
    )
    assert known.numbers() == [5] and not known.num_fetched


async def test_gap_empties_and_a_snapshot_fills_again():
    known = Known()
    known.feed.start(0)
    known.feed.push(1, [stored(1)])
    known.feed.push(3, [stored(3)])
    assert known.numbers() == []
    known.feed.push(4, [stored(4), stored(5)])
    await settle()
    known.answer.set_result(pb.Welcome(kv_sequence=4, cached_hashes=join_hashes([block(9)])))
    await settle()
    assert known.numbers() == [5, 9] and known.num_fetched == 1


async def test_no_snapshot_gives_the_session_up():
    known = Known()
    known.feed.start(0)
    known.feed.push(2, [stored(2)])
    await settle()
    metadata = grpc.aio.Metadata()
    known.answer.set_exception(
        grpc.aio.AioRpcError(grpc.StatusCode.DEADLINE_EXCEEDED, metadata, metadata)
    )
    await settle()
    assert known.given_up == ["gap in KV events and no snapshot: DEADLINE_EXCEEDED"]


async def test_snapshot_asked_for_by_an_ended_session_changes_nothing_of_the_next():
    known = Known()
    known.feed.start(0)
    known.feed.push(2, [stored(2)])
    await settle()
    known.feed.stop()
    known.feed.start(7)
    known.answer.set_result(pb.Welcome(kv_sequence=1, cached_hashes=join_hashes([block(1)])))
    await settle()
    known.feed.push(8, [stored(8)])
    assert known.numbers() == [8] and not known.given_up
